"""Rules of many tenants that say the same, as one rule that names none of them.

A rule is *generalised* by saying of every name that it is the packet's own tenant's: the link becomes any slot's
link; the tenant's own source address is dropped where spoofed sources were dropped before, else it becomes the
pool; the host's address on the tenant's link becomes "an address of the link it came in by". A chain of the tenant's
own becomes a chain for all whose chain says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.lent import lent_addresses, lent_numbers, numbers_of, one_address
from netslot.rulesets.proof.tagged import Filed, FiledRuleset
from netslot.rulesets.splitting.counts import what_counts
from netslot.rulesets.splitting.naming import Naming
from netslot.rulesets.splitting.plan import CannotSplit

_MOST_CLASSES = 16
"""More kinds of tenants than this in one place of a chain are no longer a few slot-agnostic rules."""
_INLINE = 2
"""Longer lists of one class get a chain of their own, so that other classes' packets pass them with one rule."""
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class General:
    """``near``: the side on which the tenant's own link is asked for; None if it is not.

    A match of a set whose name begins with ``OWN`` stands for a set of tenants' own addresses, which is still to be
    made: the rest of the name is the address's variable. ``as_they_were``: the rules of all tenants of the class,
    where no rule can say it for them.
    """

    near: m.Direction | None
    matches: tuple[m.Match, ...]
    target: t.Target
    as_they_were: tuple[str, ...] = ()


OWN = "@"
MakeSet = Callable[[str, bool, Iterable[int]], str]
"""Makes a set of these tenants' addresses, given by variable, with or without their links; returns its name."""


class Generaliser:
    """Generalises rules of one family, and keeps the chains that stand for tenants' own."""

    def __init__(self, filed: FiledRuleset, naming: Naming, spoofing: Callable[[int], bool]) -> None:
        self._filed, self._naming, self._spoofing = filed, naming, spoofing
        self._family: Family = filed.ruleset.family
        self._counted: frozenset[Hashable] = frozenset()
        self._moved: frozenset[Hashable] = frozenset()
        self._lent = lent_numbers([filed], naming.places)
        self._addresses = lent_addresses([filed], naming.places, self._family)
        self._names: dict[tuple[str, tuple[General, ...]], str] = {}

    def chains(self, table: str) -> dict[str, list[General]]:
        """The chains of this table that stand for tenants' own, by name."""
        return {name: list(rules) for (place, rules), name in self._names.items() if place == table}

    def rule(
        self,
        table: str,
        chain: str,
        item: Filed,
        tenant: int,
        counted: frozenset[Hashable] = frozenset(),
        moved: frozenset[Hashable] = frozenset(),
    ) -> General:
        """The rule with the tenant's names generalised; CannotSplit if it names the tenant in another way.

        ``counted``: what keeps a count of one tenant's (see ``what_counts``). ``moved``: what its slot counts.
        """
        self._counted, self._moved = counted, moved
        if what_counts(item.rule) in counted:
            raise CannotSplit("it keeps a count of one tenant's")
        if self._lends(item.rule, tenant):
            raise CannotSplit("an address is lent to one tenant")
        if any(number in self._lent[tenant] for number in numbers_of(item.rule)):
            raise CannotSplit("each tenant has a mark or a zone of its own")
        near = self._near(item, tenant)
        matches = self._matches(item, tenant, near, chain == "INPUT")
        return General(near, matches, self._target(table, item, tenant, near, 0))

    def _lends(self, rule: Rule, tenant: int) -> bool:
        """Whether the rule names an address that is this tenant's outside."""
        lent = self._addresses[tenant]
        if isinstance(rule.target, t.Dnat | t.Snat) and one_address(rule.target) in lent:
            return True
        return any(isinstance(x, m.Address) and x.value in lent for x in rule.matches)

    def _near(self, item: Filed, tenant: int) -> m.Direction | None:
        """The side of the tenant's own link, where the rule asks for it."""
        sides = {role for role, who in item.tags if who == tenant}
        if {"in", "out"} <= sides:
            raise CannotSplit("it asks for the tenant's link on both sides")
        return "in" if "in" in sides else "out" if "out" in sides else None

    def _matches(self, item: Filed, tenant: int, near: m.Direction | None, to_host: bool) -> tuple[m.Match, ...]:
        found: list[m.Match] = []
        for match in item.rule.matches:
            if isinstance(match, m.Interface) and self._naming.places.link_owner.get(match.name) == tenant:
                if match.negated:
                    raise CannotSplit("it is about every link but the tenant's")
                if match.direction != near:
                    raise CannotSplit("it asks for the tenant's link on both sides")
                continue
            if isinstance(match, m.Address):
                found += self._address(match, tenant, near, to_host)
            else:
                found.append(match)
        names = self._naming.names(tenant, self._family)
        own = [x for x in item.rule.matches if isinstance(x, m.Address) and (x.value, x.mask) in names]
        if near is None and len(own) > 1:
            raise CannotSplit("it names the tenant's address twice, and in two conditions it could be two tenants'")
        return tuple(found)

    def _target(self, table: str, item: Filed, tenant: int, near: m.Direction | None, depth: int) -> t.Target:
        target = item.rule.target
        if isinstance(target, t.Dnat) and ("to", tenant) in item.tags:
            raise CannotSplit("it leads to one tenant's address")
        if not isinstance(target, t.Jump | t.Goto):
            return target
        if self._filed.chain_owner.get((table, target.chain)) != tenant:
            return target
        if near is None or depth == _DEEPEST:
            raise CannotSplit("it leads to a chain of the tenant's own, and does not ask for its link")
        rules = tuple(
            self._inner(table, inner, tenant, near, depth)
            for inner in self._filed.chains[table, target.chain]
            if what_counts(inner.rule) not in self._moved
        )
        name = self._names.setdefault((table, rules), f"netslot-own-{len(self._names)}")
        return replace(target, chain=name)

    def _inner(self, table: str, item: Filed, tenant: int, near: m.Direction, depth: int) -> General:
        """A rule of the tenant's own chain: its link has been asked for by whoever leads there."""
        if what_counts(item.rule) in self._counted:
            raise CannotSplit("a rule of its chain keeps a count of one tenant's")
        if any(number in self._lent[tenant] for number in numbers_of(item.rule)):
            raise CannotSplit("each tenant has a mark or a zone of its own")
        return General(
            None, self._matches(item, tenant, near, False), self._target(table, item, tenant, near, depth + 1)
        )

    def _address(self, match: m.Address, tenant: int, near: m.Direction | None, to_host: bool) -> list[m.Match]:
        places, pattern = self._naming.places, (match.value, match.mask)
        names = self._naming.names(tenant, self._family)
        if pattern not in names:
            return [match]
        if pattern[0] in places.gateways[self._family][tenant]:
            if match.side == "dst" and not match.negated and near == "in" and to_host:
                return [m.AddrType("dst", frozenset(("LOCAL",)), interface="in")]
            raise CannotSplit("it names the host's address on the tenant's link")
        alone = len(places.addresses(tenant, self._family)) == 1
        pool = self._naming.pool(self._family)
        if match.side == "src" and not match.negated and alone and not self._spoofing(tenant):
            if near == "in":
                return []
            if near is None and pool is not None:
                return [m.Address("src", *pool)]
        if match.side == "dst" and near == "out" and not match.negated and alone:
            return []
        if near is None:
            if match.negated:
                raise CannotSplit("it is about every address but the tenant's")
            return [m.SetMatch(OWN + names[pattern], (match.side,))]
        if match.negated and not alone:
            raise CannotSplit("it names one of several addresses of the tenant")
        return [m.SetMatch(OWN + names[pattern], (match.side, "src" if near == "in" else "dst"), match.negated)]


Text = tuple[tuple[m.Match, ...], t.Target] | str


def merged(
    lists: Mapping[int, tuple[General, ...]],
    naming: Naming,
    kinds: Sequence[int],
    chain: Callable[[list[Text]], str],
    make: MakeSet,
) -> list[Text]:
    """What all classes say, as few rules: with any slot's link if all say the same, else with each class's group.

    ``kinds``: the class of each tenant. ``chain`` makes a chain of some rules and says its name.
    """
    values = list(lists.values())
    if all(one == values[0] for one in values):
        return [text for rule in values[0] for text in plain(rule, naming, range(len(kinds)), make)]
    for rule in (rule for rules in values for rule in rules):
        if rule.near is None and not rule.as_they_were and not _asks_for_own(rule):
            raise CannotSplit("classes of tenants differ here, and nothing tells whose packet it is")
    if len(lists) > _MOST_CLASSES:
        raise CannotSplit("it differs from tenant to tenant")
    found: list[Text] = []
    for number, rules in lists.items():
        members = [tenant for tenant, kind in enumerate(kinds) if kind == number]
        for near, run in groupby(rules, key=lambda rule: rule.near):
            mine = [text for rule in run for text in plain(replace(rule, near=None), naming, members, make)]
            link = () if near is None else (naming.class_link(near, number),)
            if near is not None and len(mine) > _INLINE:
                found.append((link, t.Jump(chain(mine))))
            else:
                found += [text if isinstance(text, str) else ((*link, *text[0]), text[1]) for text in mine]
    return found


def plain(rule: General, naming: Naming, tenants: Iterable[int], make: MakeSet) -> list[Text]:
    """The rule as it is written, with the sets that it needs."""
    if rule.as_they_were:
        return list(rule.as_they_were)
    found: list[m.Match] = [] if rule.near is None else [naming.link(rule.near)]
    for match in rule.matches:
        if isinstance(match, m.SetMatch) and match.name.startswith(OWN):
            name = make(match.name[len(OWN) :], len(match.flags) > 1, tenants)
            found.append(replace(match, name=name))
        else:
            found.append(match)
    return [(tuple(found), rule.target)]


def _asks_for_own(rule: General) -> bool:
    return any(map(_is_own, rule.matches))


def _is_own(match: m.Match) -> bool:
    return isinstance(match, m.SetMatch) and match.name.startswith(OWN)
