"""Packets to try on a kernel: on both sides of every rule's boundary, and random ones.

Only packets that the kernel's own routing lets pass are made: unicast, with no address of the host's as source unless
the host makes them. A packet of a connection that is open goes between the ends that routing would lead it between.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from netslot.rulesets import matches as m
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.conditions import interface_is
from netslot.rulesets.proof.flow import ESTABLISHED, ICMP, INVALID, NEW, RELATED, STATES
from netslot.rulesets.proof.places import NOBODY, Places
from netslot.rulesets.proof.tagged import FiledRuleset
from netslot.rulesets.values import ALL_ONES

TCP, UDP = 6, 17
_FIN, _SYN, _RST, _PSH, _ACK = 1, 2, 4, 8, 16
_ERRORS = {4: (3, 11, 12), 6: (1, 2, 3, 4)}
"""ICMP errors that may be sent; not a redirect, which would change routes."""
_QUESTIONS = {4: (8, 13), 6: (128,)}
_ANSWERS = {4: (0, 14), 6: (129,)}
_SMALLEST = {4: 20, 6: 40}
_TAG = 8  # bytes that a replay needs to know a packet again


@dataclass(frozen=True, slots=True)
class Sample:
    """A packet that comes in by ``entry`` ('' when the host makes it).

    ``values`` as :class:`~netslot.rulesets.proof.flow.Flow` names them. For an ICMP error the ports are those of the
    UDP connection that it is about.
    """

    entry: str
    values: Mapping[str, int]
    family: Family = 4


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


def can_be_sent(sample: Sample, filed: FiledRuleset, places: Places, players: Sequence[int]) -> bool:
    """Whether a replay with these tenants can send it, and a kernel would see it in the state that it names."""
    maker = _Maker(filed, places, players, random.Random(0))
    v = maker.finished(sample.entry, sample.values).values
    return sample.entry in maker.entries and v == sample.values and maker.can_be_sent(sample)


class _Maker:
    def __init__(self, filed: FiledRuleset, places: Places, players: Sequence[int], dice: random.Random) -> None:
        self._filed, self._places, self._players, self._dice = filed, places, players, dice
        self._family: Family = filed.ruleset.family
        self._links = [places.link(tenant) for tenant in players if places.link(tenant)]
        self.entries = [*self._links, *places.outside, ""]
        self._own = {places.link(t): [a.value for a in places.addresses(t, self._family)] for t in players}
        self._own |= {"": list(places.hosts[self._family])}
        self._ones = ALL_ONES[self._family]
        self._known = [a.value for t in players for a in places.addresses(t, self._family)]
        self._known += [v for t in players for v in places.gateways[self._family][t]]
        self._known += places.hosts[self._family]
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
        entry = self._dice.choice(self.entries)
        values = self._blank(entry)
        values["dst"] = self._dice.choice([*self._known, self._stranger()])
        values["dport"] = self._dice.choice([*self._ports, self._dice.randrange(1, 65536)])
        if self._dice.random() < 0.2:
            values |= {"ttl": self._dice.choice((8, 63, 128, 255)), "dscp": self._dice.randrange(64)}
            values["length"] = self._dice.randrange(80, 1200)
        return self.finished(entry, values)

    def _stranger(self) -> int:
        """An address of the documentation ranges."""
        if self._family == 6:
            return 0x20010DB8 << 96 | self._dice.getrandbits(16)
        return self._dice.choice((0xC0000200, 0xCB007100)) + self._dice.randrange(1, 255)

    def _blank(self, entry: str) -> dict[str, int]:
        own = self._own.get(entry)
        dice, family = self._dice, self._family
        state = dice.choices((NEW, ESTABLISHED, RELATED), (6, 3, 1))[0]
        return {
            "src": dice.choice(own) if own and (dice.random() < 0.9 or not entry) else self._stranger(),
            "dst": self._stranger(),
            "proto": dice.choice((TCP, UDP, ICMP[family])),
            "sport": dice.randrange(1024, 65536),
            "dport": dice.randrange(1, 65536),
            "icmp_type": dice.choice(
                (*_QUESTIONS[family], *_QUESTIONS[family], *_ANSWERS[family], _ERRORS[family][0])
            ),
            "icmp_code": 0,
            "flags": dice.choice((_SYN, _SYN, _SYN, _ACK, _RST, _SYN | _ACK)),
            "length": 0,
            "ttl": 64,
            "dscp": 0,
            "state": state,
            "reply": dice.getrandbits(1) if state != NEW else 0,
            "fragment": 0,
        }

    def finished(self, entry: str, values: Mapping[str, int]) -> Sample:
        """With what the protocol and the state of the connection ask for."""
        v, family = dict(values), self._family
        icmp = ICMP[family]
        if v["state"] == RELATED:
            v["proto"] = icmp
            if v["icmp_type"] not in _ERRORS[family]:
                v |= {"icmp_type": _ERRORS[family][0], "icmp_code": self._dice.randrange(4)}
        elif v["state"] == ESTABLISHED:
            if v["proto"] == icmp:
                v |= {"icmp_type": (_ANSWERS if v["reply"] else _QUESTIONS)[family][0], "icmp_code": 0}
            if v["proto"] == TCP:
                v["flags"] = v["flags"] & (_ACK | _PSH) | _ACK
        else:
            v |= {"state": self._state(v), "reply": 0}
        smallest = _SMALLEST[family] + {TCP: 20, UDP: 8}.get(v["proto"], 8) + _TAG
        if v["proto"] == icmp and v["icmp_type"] in _ERRORS[family]:
            smallest += _SMALLEST[family] + 20
        return Sample(entry, v | {"length": max(v["length"], smallest)}, family)

    def _state(self, v: Mapping[str, int]) -> int:
        """What a kernel without memory of this connection sees (nf_conntrack_proto_tcp.c, ..._icmp.c)."""
        flags = v["flags"] & (_FIN | _SYN | _RST | _ACK)
        if v["proto"] == TCP:
            return NEW if flags in (_SYN, _ACK) else INVALID
        if v["proto"] == ICMP[self._family]:
            return NEW if v["icmp_type"] in _QUESTIONS[self._family] else INVALID
        return NEW

    def _around(self, rule: Rule) -> Iterator[Sample]:
        """Packets that the rule's conditions accept, and some that one of them just does not."""
        entries = [
            name
            for name in self.entries
            if all(
                interface_is(x, name) != x.negated
                for x in rule.matches
                if isinstance(x, m.Interface) and x.direction == "in"
            )
        ]
        for entry in self._dice.sample(entries, min(2, len(entries))):
            base = self._blank(entry)
            for match in rule.matches:
                if isinstance(match, m.CtState):
                    base |= self._of_state(match)
            leaving = next((x for x in rule.matches if isinstance(x, m.Interface) and x.direction == "out"), None)
            if leaving is not None:
                towards = [
                    v
                    for name, own in self._own.items()
                    if name and interface_is(leaving, name) != leaving.negated
                    for v in own
                ]
                base["dst"] = self._dice.choice(towards) if towards else self._stranger()
            for match in rule.matches:
                self._meet(match, base)
            yield self.finished(entry, dict(base))
            for match in rule.matches:
                for field, value in self._beside(match):
                    yield self.finished(entry, base | {field: value})

    def _of_state(self, match: m.CtState) -> dict[str, int]:
        """A state that the condition asks for, or one that it does not."""
        made = (NEW, ESTABLISHED, RELATED)
        fitting = [state for state in made if (STATES[state] in match.states) != match.negated]
        state = self._dice.choice(fitting if fitting and self._dice.random() < 0.8 else made)
        return {"state": state, "reply": self._dice.getrandbits(1) if state != NEW else 0}

    def _meet(self, match: m.Match, values: dict[str, int]) -> None:
        if getattr(match, "negated", False):
            return
        match match:
            case m.Address():
                values[match.side] = match.value | (self._dice.getrandbits(128) & ~match.mask & self._ones)
            case m.IpRange():
                values[match.side] = self._dice.randint(match.low, match.high)
            case m.Protocol():
                values["proto"] = match.number
            case m.Ports():
                values["sport" if match.side == "src" else "dport"] = self._dice.choice(match.ranges)[0]
            case m.IcmpType() if not (match.module == "icmp" and match.type == 255):
                values |= {"icmp_type": match.type, "icmp_code": match.code_low}
            case m.TcpFlags():
                values["flags"] = match.value
            case m.CtDirection():
                values |= {"state": ESTABLISHED, "reply": int(match.direction == "REPLY")}
            case m.Length():
                values["length"] = min(max(match.low, 100), match.high)
            case m.Dscp():
                values["dscp"] = match.value

    def _beside(self, match: m.Match) -> Iterator[tuple[str, int]]:
        match match:
            case m.Address():
                lowest = match.mask & -match.mask
                yield match.side, match.value ^ lowest
                if match.negated:
                    yield match.side, match.value
            case m.IpRange():
                for value in (match.low - 1, match.low, match.high, match.high + 1):
                    yield match.side, value
            case m.Ports():
                field = "sport" if match.side == "src" else "dport"
                for low, high in match.ranges:
                    for port in (low - 1, low, high, high + 1):
                        if 0 < port < 65536:
                            yield field, port
            case m.Protocol():
                yield "proto", UDP if match.number == TCP else TCP
            case m.IcmpType():
                for kind in (*_QUESTIONS[self._family], *_ANSWERS[self._family]):
                    yield "icmp_type", kind
            case m.TcpFlags():
                for flags in (_SYN, _ACK, _SYN | _ACK, _FIN | _ACK):
                    yield "flags", flags
            case m.Length():
                for length in (match.low - 1, match.low, match.high, match.high + 1):
                    if 100 <= length <= 1400:
                        yield "length", length
            case m.Ttl():
                for ttl in (match.value - 1, match.value, match.value + 1, match.value + 2):
                    if 8 <= ttl < 256:
                        yield "ttl", ttl
            case m.Dscp():
                yield "dscp", match.value ^ 1
            case m.CtState():
                for state in (NEW, ESTABLISHED, RELATED):
                    yield "state", state

    def can_be_sent(self, sample: Sample) -> bool:
        """Whether the kernel would route such a packet at all, and this program can write it."""
        v, family, places = sample.values, self._family, self._places
        if v["proto"] not in (TCP, UDP, ICMP[family]) or v["length"] > 1400 or v["ttl"] < 8:
            return False
        if v["proto"] == ICMP[family] and v["icmp_type"] not in (
            *_QUESTIONS[family],
            *_ANSWERS[family],
            *_ERRORS[family],
        ):
            return False
        if places.is_local(v["src"], family) is not (not sample.entry) or v["src"] == v["dst"]:
            return False
        if not sample.entry and places.is_local(v["dst"], family):
            return False
        if any(self._absent(v[end]) for end in ("src", "dst")) or not all(
            _unicast(v[end], family) for end in ("src", "dst")
        ):
            return False
        return v["state"] not in (ESTABLISHED, RELATED) or self._home(v["src"]) == sample.entry

    def _absent(self, address: int) -> bool:
        """Whether it is a tenant's who does not play."""
        owner = self._places.owner_of(address, self._ones, self._family)
        return owner != NOBODY and owner not in self._players

    def _home(self, address: int) -> str:
        """The link that leads to an address; '' for the host."""
        owner = self._places.owner_of(address, self._ones, self._family)
        if owner != NOBODY and self._places.link(owner):
            return self._places.link(owner)
        return "" if self._places.is_local(address, self._family) is True else self._places.outside[0]


def _unicast(address: int, family: Family) -> bool:
    if family == 6:
        return address >> 125 == 1
    first = address >> 24
    return first not in (0, 127) and first < 224
