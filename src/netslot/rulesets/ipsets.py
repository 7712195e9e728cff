"""IP sets that netslot writes beside a root ruleset: rules of many tenants as one rule and a set that lists them.

A set is an index: ``-m set --match-set S dst,dst -j ACCEPT`` says what one rule for each element would say. So a
reader can put those rules in place of it, and what is known of rules holds for sets too. The text is what
``ipset restore`` takes (ipset(8)); only the types in ``KINDS`` are written and read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from netslot.errors import SpecError
from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Chain, Family, Rule, Ruleset, Table
from netslot.rulesets.values import network, network_text

PREFIX = "netslot-"
SETS: Mapping[Family, str] = {4: "root.sets", 6: "root.sets6"}

KINDS: Mapping[str, tuple[str, ...]] = {
    "hash:net": ("address",),
    "hash:net,port": ("address", "port"),
    "hash:net,net": ("address", "address"),
    "hash:net,iface": ("address", "link"),
    "hash:ip,port,net": ("address", "port", "address"),
    "hash:net,port,net": ("address", "port", "address"),
}
"""What an element of each type consists of, in order (ipset(8))."""

PROTOCOLS: Mapping[str, int] = {"tcp": 6, "udp": 17, "sctp": 132, "udplite": 136}
_PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
_LEAST = 1024

Part = tuple[int, int] | str
"""An address and its mask, a protocol and a port, or the name of a link."""


@dataclass(frozen=True, slots=True)
class IpSet:
    """``elements``: one part for each word of ``KINDS[kind]``."""

    name: str
    kind: str
    family: Family
    elements: tuple[tuple[Part, ...], ...]


def write_sets(sets: Sequence[IpSet]) -> str:
    """Text for ``ipset restore``."""
    lines = []
    for one in sets:
        size = _LEAST
        while size < len(one.elements):
            size *= 2
        family = "inet" if one.family == 4 else "inet6"
        lines.append(f"create {one.name} {one.kind} family {family} hashsize {size} maxelem {max(65536, 4 * size)}")
        lines += [f"add {one.name} {_element_text(one, element)}" for element in one.elements]
    return "\n".join(lines) + "\n"


def _element_text(one: IpSet, element: tuple[Part, ...]) -> str:
    words = []
    for kind, part in zip(KINDS[one.kind], element, strict=True):
        if isinstance(part, str):
            words.append(part)
        elif kind == "port":
            words.append(f"{_PROTOCOL_NAMES[part[0]]}:{part[1]}")
        else:
            words.append(network_text(*part, one.family))
    return ",".join(words)


def read_sets(text: str, family: Family, file: str) -> dict[str, IpSet]:
    """The sets by name. SpecError names the line that is not what netslot writes."""
    kinds: dict[str, str] = {}
    elements: dict[str, dict[tuple[Part, ...], None]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        try:
            match words:
                case []:
                    pass
                case ["create", name, kind, "family", _, *_] if name.startswith(PREFIX) and kind in KINDS:
                    kinds[name], elements[name] = kind, {}
                case ["add", name, element] if name in kinds:
                    elements[name][_element(element, kinds[name], family)] = None
                case _:
                    raise ValueError("expected 'create netslot-... TYPE family ...' or 'add netslot-... ELEMENT'")
        except ValueError as error:
            raise SpecError(str(error), file=file, line=number, hint="run netslot split again") from None
    return {name: IpSet(name, kinds[name], family, tuple(found)) for name, found in elements.items()}


def _element(text: str, kind: str, family: Family) -> tuple[Part, ...]:
    words = text.split(",")
    parts = KINDS[kind]
    if len(words) != len(parts):
        raise ValueError(f"an element of {kind} has {len(parts)} parts, and '{text}' has {len(words)}")
    found: list[Part] = []
    for word, part in zip(words, parts, strict=True):
        if part == "address":
            found.append(network(word, family))
            continue
        if part == "link":
            found.append(word)
            continue
        name, _, port = word.partition(":")
        if name not in PROTOCOLS or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"'{word}' is no PROTOCOL:PORT")
        found.append((PROTOCOLS[name], int(port)))
    return tuple(found)


def expanded(ruleset: Ruleset, sets: Mapping[str, IpSet], file: str, links: Iterable[str]) -> Ruleset:
    """The ruleset with one rule for each element in place of each rule that asks for one of netslot's sets.

    ``links`` are the tenants': a rule about what is *not* in a set is met by all packets of those that the set lacks.
    """
    everybody = frozenset(links)
    tables = {}
    for table in ruleset.tables.values():
        chains = {}
        for chain in table.chains.values():
            rules: list[Rule] = []
            for rule in chain.rules:
                rules += _expand(rule, sets, file, everybody)
            chains[chain.name] = Chain(chain.name, chain.policy, tuple(rules), chain.counters, chain.line)
        tables[table.name] = Table(table.name, chains, table.line)
    return Ruleset(ruleset.family, tables, ruleset.notes)


def _expand(rule: Rule, sets: Mapping[str, IpSet], file: str, links: frozenset[str]) -> list[Rule]:
    asked = [x for x in rule.matches if isinstance(x, m.SetMatch) and x.name.startswith(PREFIX)]
    if not asked:
        return [rule]
    one = sets.get(asked[0].name)
    if one is None:
        raise SpecError(f"the rule asks for the set {asked[0].name}, which is not there", file=file, line=rule.line)
    words = KINDS[one.kind]
    negated = asked[0].negated and one.kind == "hash:net,iface" and _one_address_a_link(one)
    if len(asked) > 1 or asked[0].options or len(asked[0].flags) != len(words) or asked[0].negated != negated:
        raise SpecError(
            f"expected one plain match of {one.name} with {len(words)} directions", file=file, line=rule.line
        )
    if not isinstance(rule.target, _ONCE) and not _apart(one):
        raise SpecError(
            f"elements of {one.name} overlap, and what the rule does would be done twice", file=file, line=rule.line
        )
    rest = tuple(x for x in rule.matches if x is not asked[0])
    found = [_one(rule, rest, asked[0], words, element) for element in one.elements]
    return found + (_of_no_element(rule, rest, asked[0], one, links) if negated else [])


def _of_no_element(
    rule: Rule, rest: tuple[m.Match, ...], asked: m.SetMatch, one: IpSet, links: frozenset[str]
) -> list[Rule]:
    """The rule for packets of links that the set lacks: each other tenant's, and all the rest."""
    place = KINDS[one.kind].index("link")
    side: m.Direction = "in" if asked.flags[place] == "src" else "out"
    named = {str(element[place]) for element in one.elements}
    others: list[m.Match] = [m.Interface(side, link) for link in sorted(links - named)]
    others.append(m.OtherLink(side, links | named))
    return [Rule((*rest, other), rule.target, rule.text, rule.line, rule.comment) for other in others]


def _one_address_a_link(one: IpSet) -> bool:
    """Then 'not in the set' is 'not the address that goes with this link', for the links that are in it."""
    links = [element[1] for element in one.elements]
    return len(set(links)) == len(links)


_ONCE = (*t.TERMINAL, t.Return, t.Log, t.NoTarget)
"""Where it makes no difference whether one rule acts or two that say the same: the first ends the walk, or tells."""


def _apart(one: IpSet) -> bool:
    """Whether no packet can be in two elements, as far as one address tells."""
    for place, word in enumerate(KINDS[one.kind]):
        found = sorted(part for element in one.elements if not isinstance(part := element[place], str))
        if word == "link" and _one_address_a_link(one):
            return True
        if word != "address":
            continue
        if all((a ^ b) & mask & other for (a, mask), (b, other) in pairwise(found)) and (
            len({mask for _, mask in found}) <= 1
        ):
            return True
    return len(one.elements) < 2


def _one(
    rule: Rule, rest: tuple[m.Match, ...], asked: m.SetMatch, words: tuple[str, ...], element: tuple[Part, ...]
) -> Rule:
    found = list(rest)
    for word, flag, part in zip(words, asked.flags, element, strict=True):
        side: m.Side = "src" if flag == "src" else "dst"
        if isinstance(part, str):
            found.append(m.Interface("in" if side == "src" else "out", part))
        elif word == "address":
            found.append(m.Address(side, *part, negated=asked.negated))
        else:
            protocol = m.Protocol(part[0])
            if protocol not in found:
                found.append(protocol)
            found.append(m.Ports(_PROTOCOL_NAMES[part[0]], side, ((part[1], part[1]),)))
    return Rule(tuple(found), rule.target, rule.text, rule.line, rule.comment)
