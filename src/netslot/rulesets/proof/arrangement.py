"""What a directory that ``split`` wrote says: root's rules after, a template per class, every tenant's values.

``read`` takes the files as text and believes nothing: what it cannot read exactly it refuses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from netslot.errors import SpecError
from netslot.rulesets.ipsets import SETS, expanded, read_sets
from netslot.rulesets.model import Family, Ruleset
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.proof.places import cover
from netslot.rulesets.published import PUBLISH, read_published, with_published
from netslot.rulesets.values import ALL_ONES, network_text
from netslot.spec.render import render

MANIFEST = "tenants.json"
ROOT: Mapping[Family, str] = {4: "root.rules", 6: "root.rules6"}
HOST: Mapping[Family, str] = {4: "${host}", 6: "${host6}"}
"""Stands in a template for all addresses of the host: a rule that names it is there once for each pattern of them."""

_KEYS: Mapping[Family, str] = {4: "ipv4", 6: "ipv6"}
_TEMPLATE = re.compile(r"class\d+\.rules6?")


@dataclass(frozen=True, slots=True)
class Member:
    """One tenant as the directory lists it. ``link``: root's end of its link; ``group``: that link's group."""

    name: str
    kind: str
    link: str
    group: int
    netns: str
    variables: Mapping[str, str]


NO_SLOT = Member("", "", "", 0, "", {})
"""Stands for a tenant that has no slot: its rules are in root."""


@dataclass(frozen=True)
class Arrangement:
    """``templates[class][family]`` is text with variables; ``root[family]`` includes the published ports.

    ``hosts``: the host's addresses where templates ask for them; whoever uses the templates has to know them.
    """

    attachment: Attachment
    guest_if: str
    uplink_if: str
    templates: Mapping[str, Mapping[Family, str]]
    members: tuple[Member, ...]
    root: Mapping[Family, Ruleset]
    root_rules: int
    hosts: Mapping[Family, tuple[int, ...]] = field(default_factory=dict)

    @property
    def asks_for_hosts(self) -> bool:
        """Whether a template holds ``HOST``."""
        return any(HOST[family] in text for texts in self.templates.values() for family, text in texts.items())

    def slot_text(self, member: Member, family: Family) -> str | None:
        """The member's rules with its own values in them, as iptables-restore takes them; None for no rules."""
        text = self.templates[member.kind].get(family)
        if text is None:
            return None
        values = {"guest_if": self.guest_if, "uplink_if": self.uplink_if, **member.variables}
        text = with_hosts(text, self.hosts.get(family, ()), family)
        return render(text, values, file=f"the template of {member.kind}")

    def slot_rules(self, member: Member, family: Family) -> Ruleset | None:
        """The member's rules, parsed."""
        text = self.slot_text(member, family)
        return None if text is None else parse(text, family=family).rulesets[0]


def with_hosts(template: str, hosts: Sequence[int], family: Family) -> str:
    """The template with these addresses of the host in the place of ``HOST``, in as few patterns as hold no other."""
    lines: list[str] = []
    patterns = cover([(address, ALL_ONES[family]) for address in hosts])
    for line in template.splitlines(keepends=True):
        if HOST[family] in line:
            lines += [line.replace(HOST[family], network_text(*pattern, family)) for pattern in patterns]
        else:
            lines.append(line)
    return "".join(lines)


def read(files: Mapping[str, str]) -> Arrangement:
    """Read the directory's files, given by name. SpecError names the file, the line and what is wrong in it."""
    manifest = _manifest(files)
    templates: dict[str, dict[Family, str]] = {}
    for name, entry in manifest.classes.items():
        templates[name] = {family: _file(files, file) for family, file in entry.items()}
    members = tuple(_member(entry, templates) for entry in manifest.tenants if entry.get("class") is not None)
    _refuse_strays(files, manifest)
    root: dict[Family, Ruleset] = {}
    count = 0
    for family, name in ROOT.items():
        if name not in files:
            continue
        ruleset = parse(files[name], file=name, family=family).rulesets[0]
        count += ruleset.rule_count()
        sets = files.get(SETS[family])
        if sets is not None:
            known = read_sets(sets, family, SETS[family])
            ruleset = expanded(ruleset, known, name, (member.link for member in members))
        published = files.get(PUBLISH[family])
        if published is not None:
            in_maps = read_published(published, family, PUBLISH[family])
            ruleset = with_published(ruleset, in_maps)
            count += in_maps.statements
        root[family] = ruleset
    if not root:
        raise SpecError("there is no root.rules or root.rules6 in the directory", hint="run netslot split again")
    found = Arrangement(manifest.attachment, manifest.guest, manifest.uplink, templates, members, root, count)
    _check_templates(found, manifest)
    return found


def _file(files: Mapping[str, str], name: str) -> str:
    if name not in files:
        raise SpecError("the directory has no such file, though tenants.json names it", file=name)
    return files[name]


@dataclass(frozen=True)
class _Manifest:
    """``tenants.json``, its values of the types that they must have. ``classes[name][family]`` is a file's name."""

    attachment: Attachment
    guest: str
    uplink: str
    classes: Mapping[str, Mapping[Family, str]]
    tenants: tuple[Mapping[str, Any], ...]


def _manifest(files: Mapping[str, str]) -> _Manifest:
    if MANIFEST not in files:
        raise SpecError("is not there", file=MANIFEST, hint="give the directory that netslot split wrote")
    try:
        found = json.loads(files[MANIFEST])
    except json.JSONDecodeError as error:
        raise SpecError(f"is no JSON: {error.msg}", file=MANIFEST, line=error.lineno) from error
    except RecursionError:
        raise SpecError("is nested too deeply", file=MANIFEST) from None
    whole = _typed(found, dict, "")
    attachment = _value(whole, "attachment", str, "")
    if attachment not in ("tap", "veth", "process"):
        raise SpecError(f"'{attachment}' is none of tap, veth, process", file=MANIFEST, key="attachment")
    classes: dict[str, dict[Family, str]] = {}
    for name, value in _value(whole, "classes", dict, "").items():
        where = f"classes.{name}"
        entry = _typed(value, dict, where)
        classes[name] = {f: _typed(entry[key], str, where) for f, key in _KEYS.items() if entry.get(key) is not None}
    people = _value(whole, "tenants", list, "")
    return _Manifest(
        attachment,
        _value(whole, "guest_interface", str, ""),
        _value(whole, "uplink_interface", str, ""),
        classes,
        tuple(_typed(entry, dict, f"tenants[{number}]") for number, entry in enumerate(people)),
    )


def _typed(value: Any, kind: type[Any], key: str) -> Any:
    if type(value) is not kind:
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
        raise SpecError(f"expected {names[kind]}, and it is {json.dumps(value)[:40]}", file=MANIFEST, key=key or None)
    return value


def _value(entry: Mapping[str, Any], key: str, kind: type[Any], where: str, default: Any = None) -> Any:
    place = f"{where}.{key}" if where else key
    if key not in entry and default is None:
        raise SpecError("is missing", file=MANIFEST, key=place, hint="run netslot split again")
    return _typed(entry.get(key, default), kind, place)


def _member(entry: Mapping[str, Any], templates: Mapping[str, object]) -> Member:
    name = _value(entry, "name", str, "a tenant")
    where = f"tenant {name}"
    variables = _value(entry, "variables", dict, where)
    member = Member(
        name,
        _value(entry, "class", str, where),
        _value(entry, "link", str, where),
        _value(entry, "group", int, where, 0),
        _value(entry, "netns", str, where, ""),
        {key: _typed(value, str, f"{where}.variables.{key}") for key, value in variables.items()},
    )
    if member.kind not in templates:
        raise SpecError(
            f"is of class '{member.kind}', which is not listed under classes ({', '.join(templates)})",
            file=MANIFEST,
            key=where,
        )
    return member


def _refuse_strays(files: Mapping[str, str], manifest: _Manifest) -> None:
    """A template that no class names would be in force nowhere; whoever put it there thinks otherwise."""
    named = {file for entry in manifest.classes.values() for file in entry.values()}
    for name in files:
        if _TEMPLATE.fullmatch(name) and name not in named:
            raise SpecError(
                f"no class of {MANIFEST} names it", file=name, hint="name it there, or take it out of the directory"
            )


def _check_templates(found: Arrangement, manifest: _Manifest) -> None:
    """Each template read once with the values of its first tenant, so that an error has its file and line."""
    first: dict[str, Member] = {}
    for member in found.members:
        first.setdefault(member.kind, member)
    for kind, member in first.items():
        values = {"guest_if": found.guest_if, "uplink_if": found.uplink_if, **member.variables}
        for family, text in found.templates[kind].items():
            file = manifest.classes[kind][family]
            one = with_hosts(text, (1,), family)  # a line for a line
            parse(render(one, values, file=file), file=file, family=family)
