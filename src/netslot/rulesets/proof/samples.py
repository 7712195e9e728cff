"""Packets to try on a kernel: on both sides of every rule's boundary, and random ones.

Only packets that the kernel's own routing lets pass are made: unicast, with no address of the host's as source.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from netslot.rulesets import matches as m
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.conditions import interface_is
from netslot.rulesets.proof.flow import ICMP, INVALID, NEW
from netslot.rulesets.proof.places import Places
from netslot.rulesets.proof.solving import ConcretePacket
from netslot.rulesets.proof.tagged import FiledRuleset

TCP, UDP = 6, 17
_SYN, _RST, _ACK = 2, 4, 16


@dataclass(frozen=True, slots=True)
class Sample:
    """A packet that comes in by ``entry``; ``values`` as :class:`~netslot.rulesets.proof.flow.Flow` names them."""

    entry: str
    values: Mapping[str, int]


def samples(filed: FiledRuleset, places: Places, players: Sequence[int], count: int, seed: int = 1) -> list[Sample]:
    """At most ``count`` different packets between these tenants, the outside and the host."""
    maker = _Maker(filed, places, players, random.Random(seed))
    found: dict[tuple[str, tuple[int, ...]], Sample] = {}
    for sample in maker.all(count):
        key = (sample.entry, tuple(sample.values.values()))
        if maker.can_be_sent(sample):
            found.setdefault(key, sample)
        if len(found) >= count:
            break
    return list(found.values())


class _Maker:
    def __init__(self, filed: FiledRuleset, places: Places, players: Sequence[int], dice: random.Random) -> None:
        self._filed, self._places, self._players, self._dice = filed, places, players, dice
        self._family: Family = filed.ruleset.family
        self._links = [places.link(tenant) for tenant in players]
        self._entries = [*self._links, *places.outside]
        self._own = {places.link(t): [a.value for a in places.addresses(t, self._family)] for t in players}
        self._known = [value for own in self._own.values() for value in own]
        self._known += [v for t in players for v in places.gateways[self._family][t]] + list(
            places.hosts[self._family]
        )
        self._ports = sorted(
            {
                p
                for rule in self._rules()
                for x in rule.matches
                if isinstance(x, m.Ports)
                for low, high in x.ranges
                for p in (low, high)
            }
        ) or [80]

    def _rules(self) -> Iterator[Rule]:
        """The rules that the players' packets can meet."""
        mine = set(self._players)
        for (table, chain), items in self._filed.chains.items():
            owner = self._filed.chain_owner.get((table, chain))
            if owner is not None and owner not in mine:
                continue
            for item in items:
                if not item.tags or {who for _, who in item.tags} <= mine:
                    yield item.rule

    def all(self, count: int) -> Iterator[Sample]:
        """Boundary packets and random ones in turn, so that any count has both."""
        boundary = [sample for rule in self._rules() for sample in self._around(rule)]
        self._dice.shuffle(boundary)
        for sample in boundary:
            yield sample
            yield self._random()
        for _ in range(4 * count):
            yield self._random()

    def _random(self) -> Sample:
        entry = self._dice.choice(self._entries)
        values = self._blank(entry)
        values["dst"] = self._dice.choice([*self._known, self._stranger()])
        values["dport"] = self._dice.choice([*self._ports, self._dice.randrange(1, 65536)])
        return self._finished(entry, values)

    def _stranger(self) -> int:
        """An address of the documentation ranges."""
        if self._family == 6:
            return 0x20010DB8 << 96 | self._dice.getrandbits(16)
        return self._dice.choice((0xC0000200, 0xCB007100)) + self._dice.randrange(1, 255)

    def _blank(self, entry: str) -> dict[str, int]:
        own = self._own.get(entry)
        return {
            "src": self._dice.choice(own) if own and self._dice.random() < 0.9 else self._stranger(),
            "dst": self._stranger(),
            "proto": self._dice.choice((TCP, UDP, ICMP[self._family])),
            "sport": self._dice.randrange(1024, 65536),
            "dport": self._dice.randrange(1, 65536),
            "icmp_type": self._dice.choice((8, 0, 8)) if self._family == 4 else 128,
            "icmp_code": 0,
            "flags": self._dice.choice((_SYN, _SYN, _SYN, _ACK, _RST, _SYN | _ACK)),
            "length": 0,
            "ttl": 64,
            "dscp": 0,
            "reply": 0,
            "fragment": 0,
        }

    def _finished(self, entry: str, values: dict[str, int]) -> Sample:
        """The state that a kernel without memory of this connection sees (nf_conntrack_proto_tcp.c, ..._icmp.c)."""
        state = NEW
        if values["proto"] == TCP and (values["flags"] & _RST or values["flags"] == _SYN | _ACK):
            state = INVALID
        if values["proto"] == ICMP[self._family] and values["icmp_type"] not in (8, 128):
            state = INVALID
        length = (20 if self._family == 4 else 40) + {TCP: 20, UDP: 8}.get(values["proto"], 8) + 8
        return Sample(entry, values | {"state": state, "length": length})

    def _around(self, rule: Rule) -> Iterator[Sample]:
        """Packets that the rule's conditions accept, and some that one of them just does not."""
        entries = [
            name
            for name in self._entries
            if all(
                interface_is(x, name) != x.negated
                for x in rule.matches
                if isinstance(x, m.Interface) and x.direction == "in"
            )
        ]
        for entry in self._dice.sample(entries, min(2, len(entries))):
            base = self._blank(entry)
            leaving = next((x for x in rule.matches if isinstance(x, m.Interface) and x.direction == "out"), None)
            if leaving is not None:
                towards = [
                    v
                    for name, own in self._own.items()
                    if interface_is(leaving, name) != leaving.negated
                    for v in own
                ]
                base["dst"] = self._dice.choice(towards) if towards else self._stranger()
            for match in rule.matches:
                self._meet(match, base)
            yield self._finished(entry, dict(base))
            for match in rule.matches:
                for field, value in self._beside(match):
                    yield self._finished(entry, base | {field: value})

    def _meet(self, match: m.Match, values: dict[str, int]) -> None:
        if isinstance(match, m.Address) and not match.negated:
            values[match.side] = match.value | (self._dice.getrandbits(32) & ~match.mask & 0xFFFFFFFF)
        elif isinstance(match, m.Protocol) and not match.negated:
            values["proto"] = match.number
        elif isinstance(match, m.Ports) and not match.negated:
            values["sport" if match.side == "src" else "dport"] = match.ranges[0][0]
        elif isinstance(match, m.IcmpType) and not match.negated and match.type != 255:
            values |= {"icmp_type": match.type, "icmp_code": match.code_low}
        elif isinstance(match, m.TcpFlags) and not match.negated:
            values["flags"] = match.value

    def _beside(self, match: m.Match) -> Iterator[tuple[str, int]]:
        if isinstance(match, m.Address):
            lowest = match.mask & -match.mask
            yield match.side, match.value ^ lowest
            if match.negated:
                yield match.side, match.value
        elif isinstance(match, m.IpRange):
            for value in (match.low - 1, match.low, match.high, match.high + 1):
                yield match.side, value
        elif isinstance(match, m.Ports):
            field = "sport" if match.side == "src" else "dport"
            for low, high in match.ranges:
                for port in (low - 1, low, high, high + 1):
                    if 0 < port < 65536:
                        yield field, port
        elif isinstance(match, m.Protocol):
            yield "proto", UDP if match.number == TCP else TCP

    def can_be_sent(self, sample: Sample) -> bool:
        """Whether the kernel would route such a packet at all, and this program can write it."""
        v = sample.values
        if v["proto"] not in (TCP, UDP, ICMP[self._family]) or self._places.is_local(v["src"], self._family):
            return False
        if v["icmp_type"] not in (0, 8) and v["proto"] == ICMP[self._family]:
            return False
        owner = self._places.owner_of(v["dst"], (1 << (32 if self._family == 4 else 128)) - 1, self._family)
        if owner >= 0 and owner not in self._players:
            return False
        return all(_unicast(v[end], self._family) for end in ("src", "dst"))


def _unicast(address: int, family: Family) -> bool:
    if family == 6:
        return address >> 125 == 1
    first = address >> 24
    return first not in (0, 10 * 0 + 127) and first < 224 and address & 0xFF not in (0, 255)


def packet(sample: Sample, family: Family, numbers: Mapping[str, int], asked: list[str]) -> ConcretePacket:
    """The packet for the model. ``asked`` collects what the model has no answer to: such packets prove nothing."""

    def answers(key: tuple[str, ...], _contents: tuple[object, ...]) -> bool:
        asked.append(" ".join(key))
        return False

    return ConcretePacket(family, sample.values, answers, numbers)
