"""What address translation can do to packets of connections that are open, as far as the rules tell.

Where a first packet goes the rules say (``Way.as_ruled``). Replies are translated back: what was a destination that a
rule gave becomes the one again that was asked for, and so the source (nf_nat_packet(), net/netfilter/nf_nat_core.c).
"""

from __future__ import annotations

from functools import cached_property

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.conditions import interface_is
from netslot.rulesets.proof.flow import Flow
from netslot.rulesets.proof.journey import OWN_ADDRESS, Way
from netslot.rulesets.proof.places import NOBODY, Pattern, Places, cover, is_loopback
from netslot.rulesets.proof.solving import Unknowns
from netslot.rulesets.proof.tagged import FiledRuleset
from netslot.rulesets.proof.terms import (
    Number,
    Truth,
    all_of,
    any_of,
    both,
    either,
    equal,
    masked_equal,
    negate,
    within,
)
from netslot.rulesets.values import ALL_ONES


class _Addresses:
    """A set of addresses, in few patterns: ranges, networks, the host's own, or all."""

    def __init__(self, places: Places, family: Family) -> None:
        self._places, self._family = places, family
        self._ranges: set[tuple[int, int]] = set()
        self._networks: set[Pattern] = set()
        self.own = self.everything = False
        self.loopback = False  # REDIRECT of what the host sends leads there; MASQUERADE never takes such an address

    def add_range(self, low: int, high: int) -> None:
        if low == high:
            self._networks.add((low, ALL_ONES[self._family]))
        else:
            self._ranges.add((low, high))

    def add_network(self, value: int, mask: int) -> None:
        self._networks.add((value, mask))

    def add_asked(self, rule: Rule, side: m.Side) -> None:
        """What the rule asks of the packet's address on this side."""
        asked = [x for x in rule.matches if isinstance(x, m.Address) and x.side == side and not x.negated]
        if asked:
            self.add_network(asked[0].value, asked[0].mask)
        else:
            self.everything = True

    @cached_property
    def _covered(self) -> list[Pattern]:
        return cover(list(self._networks))

    def holds(self, address: Number) -> Truth:
        if self.everything:
            return True
        width = 32 if self._family == 4 else 128
        parts = [within(address, low, high) for low, high in sorted(self._ranges)]
        parts += [masked_equal(address, mask, value, width) for value, mask in self._covered]
        own = self._places.is_local(address, self._family) if self.own else False
        if not self.loopback:
            own = both(own, negate(is_loopback(address, self._family)))
        return any_of([*parts, own])


class Translations:
    """The rules that translate, of both sides: one side's sets and maps say what the other's rules say."""

    def __init__(self, before: FiledRuleset, after: FiledRuleset, places: Places) -> None:
        self._roots, self._places = (before, after), places
        family = before.ruleset.family
        self._family: Family = family
        self._asked, self._destinations = _Addresses(places, family), _Addresses(places, family)  # DNAT: from, to
        self._senders, self._sources = _Addresses(places, family), _Addresses(places, family)  # SNAT: from, to
        for root in self._roots:
            for (table, _), items in root.chains.items():
                for item in items if table == "nat" else ():
                    self._learn(item.rule)

    def _learn(self, rule: Rule) -> None:
        target = rule.target
        if isinstance(target, t.Dnat | t.Redirect):
            self._asked.add_asked(rule, "dst")
            self._destinations.own |= isinstance(target, t.Redirect)
            self._destinations.loopback |= isinstance(target, t.Redirect)
            if target.to.address is not None:
                self._destinations.add_range(*target.to.address)
        elif isinstance(target, t.Snat | t.Masquerade):
            self._senders.add_asked(rule, "src")
            self._sources.own |= isinstance(target, t.Masquerade)
            if target.to.address is not None:
                self._sources.add_range(*target.to.address)
        elif isinstance(target, t.Netmap):
            for asked, given in ((self._asked, self._destinations), (self._senders, self._sources)):
                asked.everything = True
                given.add_network(target.value, target.mask)

    def entering(self, way: Way) -> bool:
        """Whether a reply on this way can go to an address that a source was given."""
        return self._can(way, way.entry, ("POSTROUTING",))

    def leaving(self, way: Way) -> bool:
        """Whether a packet on this way can get another source, or a reply the one back that was asked for."""
        return self._can(way, self._leaves_by(way), ("PREROUTING", "POSTROUTING"))

    def _can(self, way: Way, near: str, chains: tuple[str, ...]) -> bool:
        if not {way.entry, self._leaves_by(way)} & self._places.link_owner.keys():
            return True
        return any(
            _touches(item.rule, near, chain)
            for root in self._roots
            for chain in chains
            for item in root.chains.get(("nat", chain), ())
        )

    def _leaves_by(self, way: Way) -> str:
        return (self._places.link(way.receiver) if way.receiver != NOBODY else "") or way.exit

    def limits(self, unknowns: Unknowns, flow: Flow, way: Way) -> list[Truth]:
        """What the unknown addresses of a translation can be, for a packet that is still as it came."""
        found: list[Truth] = []
        gives = self._can(way, self._leaves_by(way), ("POSTROUTING",))
        for name, number in unknowns.numbers.items():
            if name.startswith(OWN_ADDRESS):
                found.append(self._places.is_local(number, self._family))
            elif name.startswith("tracked src "):
                back = all_of((equal(flow.reply, 1), self._destinations.holds(flow.src), self._asked.holds(number)))
                given = both(self._senders.holds(flow.src), self._sources.holds(number))
                forth = all_of((equal(flow.reply, 0), gives, given))
                found.append(any_of((_as_it_was(unknowns, name, number, flow.src, flow.sport), back, forth)))
            elif name.startswith("tracked dst "):
                back = both(self._sources.holds(flow.dst), self._senders.holds(number))
                found.append(either(_as_it_was(unknowns, name, number, flow.dst, flow.dport), back))
        return [truth for truth in found if truth is not True]


def _as_it_was(unknowns: Unknowns, name: str, number: Number, address: Number, port: Number) -> Truth:
    """Neither the address nor its port is translated."""
    translated = unknowns.numbers.get(name.replace("tracked ", "tracked port ", 1), port)
    return both(equal(number, address), equal(translated, port))


def _touches(rule: Rule, near: str, chain: str) -> bool:
    """Whether a nat rule's interface conditions let it act on the connection of this way."""
    wanted = "in" if chain == "PREROUTING" else "out"
    for match in rule.matches:
        if isinstance(match, m.Interface) and match.direction == wanted:
            return interface_is(match, near) != match.negated
    return True
