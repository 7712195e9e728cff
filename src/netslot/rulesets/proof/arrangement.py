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
from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.ipsets import SETS, expanded, read_sets
from netslot.rulesets.model import Chain, Family, Rule, Ruleset, Table
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.values import address, address_text
from netslot.spec.render import render

MANIFEST = "tenants.json"
ROOT: Mapping[Family, str] = {4: "root.rules", 6: "root.rules6"}
PUBLISH: Mapping[Family, str] = {4: "publish.nft", 6: "publish.nft6"}
PUBLISH_TABLE = "netslot-publish"

HOST: Mapping[Family, str] = {4: "${host}", 6: "${host6}"}
"""Stands in a template for every address of the host's: a rule that names it is there once for each."""

_RULE = re.compile(
    r'(?:iifname "(?P<iif>[^"]+)" )?(?:(?:ip|ip6) daddr (?P<dst>\S+) )?meta l4proto (?P<proto>tcp|udp) '
    r"dnat (?:ip|ip6) to th dport map @(?P<map>[\w-]+)"
)
_ELEMENT = re.compile(r"(?P<port>\d+) : (?P<address>[0-9a-f.:]+) \. (?P<to>\d+)")
_PROTO = {"tcp": 6, "udp": 17}


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

    def slot_rules(self, member: Member, family: Family) -> Ruleset | None:
        """The member's rules with its own values in them."""
        text = self.templates[member.kind].get(family)
        if text is None:
            return None
        values = {"guest_if": self.guest_if, "uplink_if": self.uplink_if, **member.variables}
        text = with_hosts(text, self.hosts.get(family, ()), family)
        dump = parse(render(text, values, file=f"the template of {member.kind}"), family=family)
        return dump.rulesets[0]


def with_hosts(template: str, hosts: Sequence[int], family: Family) -> str:
    """The template with each of these addresses of the host in the place of ``HOST``."""
    lines: list[str] = []
    for line in template.splitlines(keepends=True):
        if HOST[family] in line:
            lines += [line.replace(HOST[family], address_text(address, family)) for address in hosts]
        else:
            lines.append(line)
    return "".join(lines)


def read(files: Mapping[str, str]) -> Arrangement:
    """Read the directory's files, given by name. SpecError names the file and what is wrong in it."""
    manifest = _manifest(files)
    templates: dict[str, dict[Family, str]] = {}
    for name, entry in manifest["classes"].items():
        templates[name] = {}
        for family, key in ((4, "ipv4"), (6, "ipv6")):
            if entry.get(key):
                templates[name][4 if family == 4 else 6] = _file(files, entry[key])
    members = tuple(_member(entry, templates) for entry in manifest["tenants"] if entry.get("class") is not None)
    root: dict[Family, Ruleset] = {}
    count = 0
    for family, name in ROOT.items():
        if name not in files:
            continue
        ruleset = parse(files[name], file=name, family=family).rulesets[0]
        count += ruleset.rule_count()
        sets = files.get(SETS[family])
        if sets is not None:
            ruleset = expanded(ruleset, read_sets(sets, family, SETS[family]), name)
        published = files.get(PUBLISH[family])
        if published is not None:
            rules, first, statements = read_published(published, family, PUBLISH[family])
            ruleset = _with_published(ruleset, rules, first)
            count += statements
        root[family] = ruleset
    if not root:
        raise SpecError("there is no root.rules or root.rules6 in the directory", hint="run netslot split again")
    return Arrangement(
        manifest["attachment"],
        manifest["guest_interface"],
        manifest["uplink_interface"],
        templates,
        members,
        root,
        count,
    )


def _file(files: Mapping[str, str], name: str) -> str:
    if name not in files:
        raise SpecError("the directory has no such file, though tenants.json names it", file=name)
    return files[name]


def _manifest(files: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(_file(files, MANIFEST))
        for key in ("attachment", "guest_interface", "uplink_interface", "classes", "tenants"):
            if key not in found:
                raise SpecError(f"has no '{key}'", file=MANIFEST, hint="run netslot split again")
    except json.JSONDecodeError as error:
        raise SpecError(f"is no JSON: {error.msg}", file=MANIFEST, line=error.lineno) from error
    if found["attachment"] not in ("tap", "veth", "process"):
        raise SpecError(f"attachment '{found['attachment']}' is none of tap, veth, process", file=MANIFEST)
    return dict(found)


def _member(entry: Mapping[str, Any], templates: Mapping[str, object]) -> Member:
    try:
        member = Member(
            entry["name"],
            entry["class"],
            entry["link"],
            entry.get("group", 0),
            entry.get("netns", ""),
            entry["variables"],
        )
    except KeyError as error:
        raise SpecError(f"a tenant without {error}", file=MANIFEST) from error
    if member.kind not in templates:
        raise SpecError(f"tenant {member.name} is of class {member.kind}, which is not listed", file=MANIFEST)
    return member


def _with_published(ruleset: Ruleset, rules: list[Rule], first: bool) -> Ruleset:
    """The nft chain hooks in beside iptables' nat table: before it or after it, by priority."""
    tables = dict(ruleset.tables)
    nat = tables.get("nat", Table("nat", {}))
    chains = dict(nat.chains)
    old = chains.get("PREROUTING", Chain("PREROUTING", "ACCEPT"))
    both = (*rules, *old.rules) if first else (*old.rules, *rules)
    chains["PREROUTING"] = Chain("PREROUTING", old.policy, both, old.counters, old.line)
    tables["nat"] = Table("nat", chains, nat.line)
    return Ruleset(ruleset.family, tables, ruleset.notes)


def write_published(rules: list[Rule], family: Family, first: bool) -> str:
    """Rules ``[-i X] [-d A] -p P --dport N -j DNAT --to T:M`` as an nft table: one rule for each X, A and P."""
    maps: dict[tuple[str, str, str], list[str]] = {}
    for rule in rules:
        iif = dst = proto = ""
        port = 0
        for match in rule.matches:
            if isinstance(match, m.Interface):
                iif = match.name
            elif isinstance(match, m.Address):
                dst = address_text(match.value, family)
            elif isinstance(match, m.Protocol):
                proto = "tcp" if match.number == 6 else "udp"
            elif isinstance(match, m.Ports):
                port = match.ranges[0][0]
        assert isinstance(rule.target, t.Dnat) and rule.target.to.address is not None
        to = rule.target.to.ports[0] if rule.target.to.ports else port
        element = f"{port} : {address_text(rule.target.to.address[0], family)} . {to}"
        maps.setdefault((iif, dst, proto), []).append(element)
    word = "ip" if family == 4 else "ip6"
    lines = [f"table {word} {PUBLISH_TABLE} {{"]
    statements = []
    for number, ((iif, dst, proto), elements) in enumerate(maps.items()):
        name = f"{proto}-{number}"
        kind = "ipv4_addr" if family == 4 else "ipv6_addr"
        lines += [f"\tmap {name} {{", f"\t\ttype inet_service : {kind} . inet_service"]
        lines += ["\t\telements = {", *(f"\t\t\t{element}," for element in elements), "\t\t}", "\t}"]
        condition = (f'iifname "{iif}" ' if iif else "") + (f"{word} daddr {dst} " if dst else "")
        statements.append(f"\t\t{condition}meta l4proto {proto} dnat {word} to th dport map @{name}")
    lines += [
        "\tchain prerouting {",
        f"\t\ttype nat hook prerouting priority {-101 if first else -99}; policy accept;",
    ]
    return "\n".join([*lines, *statements, "\t}", "}"]) + "\n"


def read_published(text: str, family: Family, file: str) -> tuple[list[Rule], bool, int]:
    """The rules that such a table stands for, whether it comes before iptables' nat, and its number of rules."""
    elements: dict[str, list[tuple[int, int, int]]] = {}
    rules: list[Rule] = []
    statements = 0
    priority = current = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip().rstrip(",")
        found = _ELEMENT.fullmatch(line)
        if found and current:
            entry = (int(found["port"]), address(found["address"], family), int(found["to"]))
            elements[current].append(entry)
        elif line.startswith("map ") and line.endswith(" {"):
            current = line.split()[1]
            elements[current] = []
        elif line.startswith("type nat hook prerouting priority "):
            priority = line.split("priority ")[1].split(";")[0]
        elif rule := _RULE.fullmatch(line):
            statements += 1
            if rule["map"] not in elements:
                raise SpecError(f"there is no map {rule['map']}", file=file, line=number)
            rules += _expanded(rule, elements[rule["map"]], family, raw.strip())
        elif not _frame(line):
            raise SpecError(
                "expected what netslot split writes", file=file, line=number, hint="run netslot split again"
            )
    if priority not in ("-101", "-99"):
        raise SpecError("the chain's priority must be -101 or -99", file=file)
    return rules, priority == "-101", statements


def _frame(line: str) -> bool:
    return line in ("", "}", "elements = {", "chain prerouting {") or line.startswith(
        (f"table ip {PUBLISH_TABLE} ", f"table ip6 {PUBLISH_TABLE} ", "type inet_service : ")
    )


def _expanded(rule: re.Match[str], elements: list[tuple[int, int, int]], family: Family, text: str) -> list[Rule]:
    common: list[m.Match] = []
    if rule["iif"]:
        common.append(m.Interface("in", rule["iif"]))
    if rule["dst"]:
        ones = (1 << (32 if family == 4 else 128)) - 1
        common.append(m.Address("dst", address(rule["dst"], family), ones))
    common.append(m.Protocol(_PROTO[rule["proto"]]))
    made = []
    for port, to, to_port in elements:
        ports = m.Ports(rule["proto"], "dst", ((port, port),))
        target = t.Dnat(t.NatTarget((to, to), (to_port, to_port)))
        made.append(Rule((*common, ports), target, f"{text} [{port}]"))
    return made
