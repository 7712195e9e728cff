"""Addresses and ports of the host's that belong to tenants, as an nft table of netslot's own: one rule and a map.

Three kinds of rule of iptables' nat table go there: a port published for a tenant, an address that leads to one, and
an address that one is seen under. The table hooks in beside iptables' own, before it or after it by priority; which
translates first has the say (nf_nat_inet_fn, net/netfilter/nf_nat_core.c).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from netslot.errors import SpecError
from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Chain, Family, Rule, Ruleset, Table
from netslot.rulesets.values import ALL_ONES, address, address_text

PUBLISH: Mapping[Family, str] = {4: "publish.nft", 6: "publish.nft6"}
PUBLISH_TABLE = "netslot-publish"

_HOOKS = {"PREROUTING": ("prerouting", -100), "POSTROUTING": ("postrouting", 100)}
_CONDITION = r'(?:(?:iifname|oifname) "(?P<link>[^"]+)" )?'
_PORT = re.compile(
    _CONDITION + r"(?:(?:ip|ip6) daddr (?P<dst>\S+) )?meta l4proto (?P<proto>tcp|udp) "
    r"dnat (?:ip|ip6) to th dport map @(?P<map>[\w-]+)"
)
_WHOLE = re.compile(_CONDITION + r"(?P<what>[ds]nat) (?:ip|ip6) to (?:ip|ip6) [ds]addr map @(?P<map>[\w-]+)")
_CHAIN = re.compile(r"type nat hook (?P<hook>\w+) priority (?P<priority>-?\d+); policy accept;")
_ELEMENT = re.compile(r"(?P<key>[0-9a-f.:]+) : (?P<address>[0-9a-f.:]+)(?: \. (?P<to>\d+))?")
_PROTO = {"tcp": 6, "udp": 17}
_PORTS = 1 << 16


@dataclass(frozen=True)
class _Element:
    key: str
    address: str
    port: str | None
    line: int


@dataclass
class Published:
    """Rules by chain of the nat table. ``first``: whether they come before the chain's own rules."""

    rules: dict[str, list[Rule]] = field(default_factory=dict)
    first: dict[str, bool] = field(default_factory=dict)
    statements: int = 0


def write_published(published: Published, family: Family) -> str:
    """Rules ``[-i X] [-d A] -p P --dport N -j DNAT --to T:M``, ``[-i X] -d A -j DNAT --to T`` and
    ``[-o X] -s T -j SNAT --to A`` as an nft table: one rule for each X, A and P.
    """
    word, kind = ("ip", "ipv4_addr") if family == 4 else ("ip6", "ipv6_addr")
    lines = [f"table {word} {PUBLISH_TABLE} {{"]
    chains: list[str] = []
    number = 0
    for hook, rules in published.rules.items():
        maps: dict[tuple[str, str], list[str]] = {}
        for rule in rules:
            condition, how, element = _parts(rule, word, family)
            maps.setdefault((condition, how), []).append(element)
        name, own = _HOOKS[hook]
        chains.append(f"\tchain {name} {{")
        chains.append(
            f"\t\ttype nat hook {name} priority {own + (-1 if published.first[hook] else 1)}; policy accept;"
        )
        for (condition, how), elements in maps.items():
            values = f"inet_service : {kind} . inet_service" if "dport" in how else f"{kind} : {kind}"
            lines += [f"\tmap map-{number} {{", f"\t\ttype {values}", "\t\telements = {"]
            lines += [*(f"\t\t\t{element}," for element in elements), "\t\t}", "\t}"]
            chains.append(f"\t\t{condition}{how} map @map-{number}")
            number += 1
        chains.append("\t}")
    return "\n".join([*lines, *chains, "}"]) + "\n"


def _parts(rule: Rule, word: str, family: Family) -> tuple[str, str, str]:
    """The condition of a rule, what it does but for the map, and its element."""
    link = here = proto = ""
    port = -1
    for match in rule.matches:
        if isinstance(match, m.Interface):
            link = f'{"iifname" if match.direction == "in" else "oifname"} "{match.name}" '
        elif isinstance(match, m.Address):
            here = address_text(match.value, family)
        elif isinstance(match, m.Protocol):
            proto = next(name for name, number in _PROTO.items() if number == match.number)
        elif isinstance(match, m.Ports):
            port = match.ranges[0][0]
    target = rule.target
    assert isinstance(target, t.Dnat | t.Snat) and target.to.address is not None
    there = address_text(target.to.address[0], family)
    if port < 0:
        what, side = ("dnat", "daddr") if isinstance(target, t.Dnat) else ("snat", "saddr")
        return link, f"{what} {word} to {word} {side}", f"{here} : {there}"
    to = target.to.ports[0] if target.to.ports else port
    condition = link + (f"{word} daddr {here} " if here else "") + f"meta l4proto {proto} "
    return condition, f"dnat {word} to th dport", f"{port} : {there} . {to}"


def read_published(text: str, family: Family, file: str) -> Published:
    """The rules that such a table stands for. SpecError names the line that is not what netslot writes."""
    elements: dict[str, list[_Element]] = {}
    found = Published()
    hook = current = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip().rstrip(",")
        if (element := _ELEMENT.fullmatch(line)) and current:
            elements[current].append(_Element(element["key"], element["address"], element["to"], number))
        elif line.startswith("map ") and line.endswith(" {"):
            current = line.split()[1]
            elements[current] = []
        elif chain := _CHAIN.fullmatch(line):
            hook = _hook(chain["hook"], int(chain["priority"]), found, file, number)
        elif hook and (rule := _PORT.fullmatch(line) or _WHOLE.fullmatch(line)):
            if rule["map"] not in elements:
                raise SpecError(f"there is no map {rule['map']}", file=file, line=number)
            found.statements += 1
            found.rules[hook] += _expanded(rule, elements[rule["map"]], family, raw.strip(), file, number)
        elif not _frame(line):
            raise SpecError(
                "expected what netslot split writes", file=file, line=number, hint="run netslot split again"
            )
    if not hook:
        raise SpecError("there is no chain in it", file=file, hint="run netslot split again")
    return found


def _hook(name: str, priority: int, found: Published, file: str, line: int) -> str:
    for hook, (word, own) in _HOOKS.items():
        if name == word and priority in (own - 1, own + 1):
            found.rules[hook], found.first[hook] = [], priority < own
            return hook
    raise SpecError("the chain's priority must be one beside that of iptables' nat table", file=file, line=line)


def _frame(line: str) -> bool:
    return line in ("", "}", "elements = {", "chain prerouting {", "chain postrouting {") or line.startswith(
        (f"table ip {PUBLISH_TABLE} ", f"table ip6 {PUBLISH_TABLE} ", "type inet_service : ", "type ipv")
    )


@contextlib.contextmanager
def _located(file: str, line: int) -> Iterator[None]:
    """Say of nonsense in a value where it is."""
    try:
        yield
    except ValueError as error:
        raise SpecError(str(error), file=file, line=line, hint="run netslot split again") from None


def _expanded(
    rule: re.Match[str], elements: Sequence[_Element], family: Family, text: str, file: str, line: int
) -> list[Rule]:
    named = rule.groupdict()
    common: list[m.Match] = []
    if named["link"]:
        common.append(m.Interface("out" if named.get("what") == "snat" else "in", named["link"]))
    if named.get("dst"):
        with _located(file, line):
            common.append(m.Address("dst", address(named["dst"], family), ALL_ONES[family]))
    made: list[Rule] = []
    for element in elements:
        with _located(file, element.line):
            own, target = _from_element(element, named, family)
        made.append(Rule((*common, *own), target, f"{text} [{element.key}]"))
    return made


def _from_element(element: _Element, named: Mapping[str, str], family: Family) -> tuple[list[m.Match], t.Target]:
    """What one element of a map adds to its rule's matches, and the target. ValueError."""
    to = address(element.address, family)
    if "what" not in named:
        key, port = _port(element.key), _port(element.port or "")
        ports = m.Ports(named["proto"], "dst", ((key, key),))
        return [m.Protocol(_PROTO[named["proto"]]), ports], t.Dnat(t.NatTarget((to, to), (port, port)))
    if element.port is not None:
        raise ValueError(f"the map is of addresses, and '{element.port}' is a port")
    source = named["what"] == "snat"
    own = m.Address("src" if source else "dst", address(element.key, family), ALL_ONES[family])
    return [own], (t.Snat if source else t.Dnat)(t.NatTarget((to, to)))


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= _PORTS:
        raise ValueError(f"'{text}' is no port")
    return int(text)


def with_published(ruleset: Ruleset, published: Published) -> Ruleset:
    """The ruleset with these rules in the chains beside which they hook in."""
    tables = dict(ruleset.tables)
    nat = tables.get("nat", Table("nat", {}))
    chains = dict(nat.chains)
    for hook, rules in published.rules.items():
        old = chains.get(hook, Chain(hook, "ACCEPT"))
        both = (*rules, *old.rules) if published.first[hook] else (*old.rules, *rules)
        chains[hook] = Chain(hook, old.policy, both, old.counters, old.line)
    tables["nat"] = Table("nat", chains, nat.line)
    return Ruleset(ruleset.family, tables, ruleset.notes)
