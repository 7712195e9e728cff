"""The roster as a part of the spec: read beside it, given numbers, and checked against it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path

from netslot.errors import SpecError
from netslot.spec import roster
from netslot.spec.document import ClassSection
from netslot.spec.model import HostSpec
from netslot.spec.problems import Problems
from netslot.spec.render import nearest
from netslot.spec.roster import Resident

_SEVERAL = 3  # problems of one kind that are shown


def read(spec: Path, name: str, files: Mapping[str, str], problems: Problems) -> list[Resident]:
    """Everybody in the roster ``name`` who has a slot; what is wrong is noted."""
    path = spec.parent / name
    try:
        text = files.get(str(path))
        sections = roster.decode(path.read_text(encoding="utf-8") if text is None else text, str(path))
    except (OSError, UnicodeDecodeError) as error:
        problems.add(("roster",), f"cannot read {path}: {error}")
        return []
    except SpecError as error:
        problems.note(error)
        return []
    found: list[Resident] = []
    for section in sections:
        if section.class_name is None:
            continue
        try:
            found.append(roster.resident(section))
        except SpecError as error:
            problems.note(SpecError(error.message, file=str(path), key=error.key, hint=error.hint))
    for tenant, what in roster.conflicts(found)[:_SEVERAL]:
        problems.note(SpecError(what, file=str(path), key=tenant))
    return found


def by_class(
    residents: Sequence[Resident] | None,
    classes: Mapping[str, ClassSection],
    numbers: Mapping[str, int],
    problems: Problems,
) -> dict[str, dict[int, Resident]]:
    """The residents of each class that says no number of slots, by their slots' numbers."""
    found: dict[str, dict[int, Resident]] = {name: {} for name, each in classes.items() if each.slots is None}
    if residents is None:
        for name in found:
            problems.add(("class", name), "'slots' is missing", hint="How many slots this class has, or a roster")
        return {}
    own = roster.numbered([one.name for one in residents], numbers)
    unknown: dict[str, None] = {}
    for one in residents:
        if one.class_name in found:
            found[one.class_name][own[one.name]] = one
        elif one.class_name in classes:
            hint = "the roster says which ones there are: remove this line"
            problems.add(("class", one.class_name, "slots"), "the roster has tenants of this class", hint=hint)
        else:
            unknown[one.class_name] = None
    for name in unknown:
        close = nearest(name, list(classes))
        hint = f"did you mean {close}?" if close else f"classes: {', '.join(classes)}"
        problems.add(("roster",), f"names a class {name} that the spec does not have", hint=hint)
    return found


def check(problems: Problems, spec: HostSpec) -> None:
    """Whether residents fit their class, and the rest of the spec."""
    links: list[str] = []
    for name, each in spec.classes.items():
        if each.residents is None:
            continue
        people = list(each.residents.values())
        where = ("class", name)
        links += [one.link for one in people if one.link is not None]
        odd = [one.name for one in people if one.shape != people[0].shape]
        if odd:
            problems.add(
                where,
                f"{_some(odd)}: not as many addresses, gateways or MACs as {people[0].name} has, or networks of "
                "another size",
                hint="put them into a class of their own, which may name the same rule files",
            )
        if each.attachment.kind == "process" and any(one.has_networks for one in people):
            problems.add((*where, "attachment", "kind"), "a process has addresses, not networks", hint="use veth")
        if each.nat.kind != "rules":
            problems.add((*where, "nat"), "residents keep their addresses, so there is nothing to translate")
    _check_links(problems, spec, links)
    _check_pool(problems, spec)


def _check_links(problems: Problems, spec: HostSpec, links: Sequence[str]) -> None:
    taken = [name for name in links if name in (spec.uplink, "lo")]
    taken += [name for name in links if name.removeprefix(spec.prefix).isdecimal() and name.startswith(spec.prefix)]
    if taken:
        problems.add(("roster",), f"{_some(taken)}: a link of that name is somebody else's", hint="another link")
    past = [name for name in links if not name.startswith(spec.prefix)]
    if past and spec.root.preset:
        problems.add(
            ("roster",),
            f"{_some(past)}: netslot's rules in root know slots' links by their prefix, {spec.prefix}",
            hint="links with that prefix; or [root] preset = false, and rules of your own",
        )


def _check_pool(problems: Problems, spec: HostSpec) -> None:
    """A numbered slot must not be given a resident's address."""
    pools = [pool for pool in (spec.addresses.pool, spec.addresses.pool6) if pool is not None]
    if all(each.residents is not None for each in spec.classes.values()):
        return
    inside = [
        one.name
        for each in spec.classes.values()
        for one in (each.residents or {}).values()
        if any(_overlap(pool, own) for pool in pools for own in one.addresses)
    ]
    if inside:
        problems.add(("addresses",), f"{_some(inside)}: in the pool that other slots' addresses are of")


def _overlap(one: ipaddress.IPv4Network | ipaddress.IPv6Network, other: roster.Network) -> bool:
    low, high = int(other.network_address), int(other.broadcast_address)
    return one.version == other.version and int(one.network_address) <= high and low <= int(one.broadcast_address)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SEVERAL} more" if len(names) > _SEVERAL else ""
    return ", ".join(names[:_SEVERAL]) + more
