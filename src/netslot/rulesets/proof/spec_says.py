"""What ``netslot up`` would build from the directory, and whether it is what is proved.

The proof reads the list of tenants and the templates. The spec beside them may have been edited since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from netslot.rulesets.model import Family
from netslot.rulesets.proof.arrangement import ROOT, Arrangement, Member
from netslot.rulesets.published import PUBLISH
from netslot.spec.load import parse
from netslot.spec.model import UPLINK_INTERFACE, ClassSpec, HostSpec, RuleFile

SPEC = "netslot.toml"
_FAMILIES: tuple[Family, ...] = (4, 6)
_OWN = ("address", "gateway")


def differences(files: Mapping[str, str], arrangement: Arrangement) -> list[str]:
    """In which points the spec says otherwise; none when there is no spec. SpecError when it is none."""
    text = files.get(SPEC)
    if text is None:
        return []
    spec = parse(text, Path(SPEC), files=files)
    return [
        f"{SPEC}: {each}"
        for each in (*_root(spec, files), *_classes(spec, arrangement), *_tenants(spec, arrangement))
    ]


def _root(spec: HostSpec, files: Mapping[str, str]) -> Iterator[str]:
    if spec.root.preset:
        yield "root.preset: netslot's own rules in root would stand beside those that are proved"
        return
    for family, file in zip(_FAMILIES, (spec.root.rules.ipv4, spec.root.rules.ipv6), strict=True):
        if _text(file) != files.get(ROOT[family]):
            yield f"root: root's IPv{family} rules are not {ROOT[family]}"
    published = {file.text for file in spec.root.published}
    if published != {files[name] for name in PUBLISH.values() if name in files}:
        yield f"root: the published ports are not those of {' and '.join(PUBLISH.values())}"


def _classes(spec: HostSpec, arrangement: Arrangement) -> Iterator[str]:
    used = {member.kind for member in arrangement.members}
    for name, each in spec.classes.items():
        if name not in used:
            continue
        files = (each.rules.ipv4, each.rules.ipv6) if each.rules is not None else (None, None)
        for family, file in zip(_FAMILIES, files, strict=True):
            if _text(file) != arrangement.templates[name].get(family):
                yield f"class.{name}.rules: the IPv{family} rules are not the template that is proved"
        if each.rules is not None and each.rules.nft is not None:
            yield f"class.{name}.rules: nft rules are not proved"
        guest = each.guest_interface or ""
        if (each.attachment.kind, guest) != (arrangement.attachment, arrangement.guest_if):
            yield f"class.{name}.attachment: is not {arrangement.attachment}, which is proved"
        yield from (f"class.{name}.{what}: is not in the model" for what in _beyond(each))
    if arrangement.uplink_if != UPLINK_INTERFACE:
        yield f"slots call their link to root {UPLINK_INTERFACE}, and the templates {arrangement.uplink_if}"


def _beyond(each: ClassSpec) -> list[str]:
    """The policies of the class that change what becomes of packets and that the proof knows nothing of."""
    sections = {"bpf": each.bpf, "routes": each.routes, "rates": each.rates}
    return [name for name, section in sections.items() if section is not None]


def _tenants(spec: HostSpec, arrangement: Arrangement) -> Iterator[str]:
    members = {member.name: member for member in arrangement.members}
    for name in members.keys() ^ spec.by_tenant.keys():
        there = "a slot" if name in spec.by_tenant else "no slot"
        yield f"roster: {name} has {there} here, and tenants.json says otherwise"
    for name, (number, kind) in spec.by_tenant.items():
        member = members.get(name)
        resident = spec.resident(number, kind)
        if member is None or resident is None:
            continue
        if (resident.link, resident.group, kind) != (member.link, member.group, member.kind):
            yield f"roster: {name}: link, group or class are not those of tenants.json"
        elif _own(resident.variables) != _own(member.variables) or not _holds(resident.variables, member):
            yield f"roster: {name}: addresses, gateways or variables are not those that are proved"


def _own(variables: Mapping[str, str]) -> set[str]:
    """Which names of addresses there are."""
    return {name for name in variables if name.startswith(_OWN)}


def _holds(variables: Mapping[str, str], member: Member) -> bool:
    return all(variables.get(name) == value for name, value in member.variables.items())


def _text(file: RuleFile | None) -> str | None:
    return file.text if file is not None else None
