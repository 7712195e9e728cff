"""Which tenants are renamings of each other, before the split and after it, so that one proof serves them all.

A tenant's *portrait* is everything that any rule, before or after, says about it, in words that name the tenant
only by place ("its first address"), together with what the rules that name nobody make of its names and
addresses. Equal portraits: exchanging the two tenants' names and addresses changes no rule, so what is proved
of one holds of the other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Hashable, Mapping, Sequence

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.arrangement import Arrangement
from netslot.rulesets.proof.conditions import interface_is
from netslot.rulesets.proof.lent import Number, lent_addresses, lent_numbers, numbers_of, one_address
from netslot.rulesets.proof.places import NOBODY, Places
from netslot.rulesets.proof.tagged import Filed, FiledRuleset, without_names
from netslot.rulesets.values import ALL_ONES, address_text, network_text

Token = Hashable


class _Commons:
    """What rules that name nobody compare addresses, links and published ports with."""

    def __init__(self, filed: Sequence[FiledRuleset]) -> None:
        exact: set[tuple[int, int]] = set()
        wide: dict[tuple[int, int], None] = {}
        spans: dict[tuple[int, int], None] = {}
        links: dict[tuple[str, bool], None] = {}
        edges: set[int] = set()
        for one in filed:
            ones = ALL_ONES[one.ruleset.family]
            for key, rules in one.chains.items():
                if key in one.chain_owner:
                    continue
                for item in rules:
                    if item.tags:
                        continue
                    for match in item.rule.matches:
                        if isinstance(match, m.Address):
                            if match.mask == ones:
                                exact.add((match.value, match.mask))
                            else:
                                wide[match.value, match.mask] = None
                        elif isinstance(match, m.IpRange):
                            spans[match.low, match.high] = None
                        elif isinstance(match, m.Interface):
                            links[match.name, match.wildcard] = None
                        elif isinstance(match, m.Ports):
                            edges.update(edge for low, high in match.ranges for edge in (low, high + 1))
        self._exact, self._wide, self._spans, self._links = exact, list(wide), list(spans), list(links)
        self._edges = sorted(edges)

    def of_address(self, value: int, ones: int) -> Token:
        wide = tuple(i for i, (other, mask) in enumerate(self._wide) if value & mask == other)
        spans = tuple(i for i, (low, high) in enumerate(self._spans) if low <= value <= high)
        return wide, spans, value if (value, ones) in self._exact else None

    def of_link(self, name: str) -> Token:
        return tuple(
            i for i, (stem, wild) in enumerate(self._links) if interface_is(m.Interface("in", stem, wild), name)
        )

    def of_port(self, port: int) -> int:
        return bisect_right(self._edges, port)


def _other_words(target: t.Target) -> Token:
    """What a target says beside its number."""
    if not isinstance(target, t.CtTarget):
        return ()
    return tuple(word for word in target.words if word != str(target.zone))


class Portraits:
    """Draws every tenant's portrait in one pass over each ruleset."""

    def __init__(self, places: Places, arrangement: Arrangement | None = None) -> None:
        self._places = places
        self._arrangement = arrangement
        self._words: list[list[Token]] = [[] for _ in places.tenants]
        self._names: dict[Family, list[dict[tuple[int, int], int]]] = {}
        self._numbers: list[Mapping[Number, int]] = []

    def add(self, family: Family, *filed: FiledRuleset) -> None:
        """Take one family's rules into the portraits: those before, and those after if there are any."""
        commons = _Commons(filed)
        places, ones = self._places, ALL_ONES[family]
        names = self._names[family] = []
        lent = lent_addresses(filed, places, family)
        self._numbers = lent_numbers(filed, places)
        for index, tenant in enumerate(places.tenants):
            own = [(a.value, a.mask) for a in tenant.addresses if a.family == family]
            own += [(value, ones) for value in places.gateways[family][index]]
            own += [(value, ones) for value in lent[index]]
            names.append({pattern: place for place, pattern in enumerate(own)})
            self._words[index].append(tuple(commons.of_address(value, ones) for value, _ in own))
            self._words[index].append(tuple(commons.of_link(name) for name in tenant.interfaces))
            self._words[index].append(tuple(mask for _, mask in own))
        for one in filed:
            self._draw(one, family, commons)

    def _draw(self, filed: FiledRuleset, family: Family, commons: _Commons) -> None:
        chains: list[dict[str, int]] = [{} for _ in self._places.tenants]
        postponed: list[tuple[int, str, str, list[Filed]]] = []
        for (table, chain), rules in filed.chains.items():
            owner = filed.chain_owner.get((table, chain), NOBODY)
            if owner != NOBODY:
                postponed.append((owner, table, chain, rules))
                continue
            for item in rules:
                for who in {tenant for _, tenant in item.tags}:
                    words = self._rule(item.rule, who, family, commons, chains[who], (filed, table))
                    self._words[who].append((table, chain, item.segment, words))
        by_owner: dict[tuple[int, str], tuple[str, list[Filed]]] = {}
        for who, table, chain, rules in postponed:
            by_owner[who, chain] = (table, rules)
        for who, known in enumerate(chains):
            done: set[str] = set()
            while left := [name for name in known if name not in done]:
                for name in left:
                    done.add(name)
                    table, rules = by_owner.get((who, name), ("", []))
                    for item in rules:
                        words = self._rule(item.rule, who, family, commons, known, (filed, table))
                        self._words[who].append((table, known[name], words))

    def _rule(
        self,
        rule: Rule,
        who: int,
        family: Family,
        commons: _Commons,
        chains: dict[str, int],
        where: tuple[FiledRuleset, str],
    ) -> Token:
        target = rule.target
        published = type(target) is t.Dnat
        words: list[Token] = []
        for match in rule.matches:
            kind = type(match)
            if kind is m.Address or kind is m.Interface:
                words.append(self._named(match, who, family))
            elif isinstance(match, m.Mark | m.Connmark):
                place = self._numbers[who].get(("mark", match.value))
                words.append(match if place is None else (kind.__name__, place, match.negated))
            elif isinstance(match, m.Opaque) and match.stateful and where[0].own_memories:
                words.append((kind.__name__, without_names(match, where[0].own_memories)))
            elif published and isinstance(match, m.Ports):
                words.append((match.side, match.negated, tuple(commons.of_port(low) for low, _ in match.ranges)))
            else:
                words.append(match)
        filed, table = where
        if isinstance(target, t.Jump | t.Goto) and filed.chain_owner.get((table, target.chain), NOBODY) == who:
            words.append((type(target).__name__, chains.setdefault(target.chain, len(chains))))
        elif isinstance(target, t.Dnat | t.Snat) and (there := one_address(target)) is not None:
            place = self._names[family][who].get((there, ALL_ONES[family]))
            words.append((type(target).__name__, place, target.to.ports) if place is not None else target)
        elif (
            self._numbers[who]
            and (number := next(iter(numbers_of(Rule((), target, ""))), None)) in self._numbers[who]
        ):
            assert number is not None
            words.append((type(target).__name__, number[0], self._numbers[who][number], _other_words(target)))
        else:
            words.append(target)
        return tuple(words)

    def _named(self, match: m.Match, who: int, family: Family) -> Token:
        if isinstance(match, m.Interface):
            links = self._places.tenants[who].interfaces
            place = links.index(match.name) if not match.wildcard and match.name in links else None
            return match if place is None else ("link", match.direction, place, match.negated)
        assert isinstance(match, m.Address)
        place = self._names[family][who].get((match.value, match.mask))
        return match if place is None else ("address", match.side, place, match.negated)

    def classes(self, numbers: int = 0, alone: Collection[int] = ()) -> list[int]:
        """The class of each tenant. What the directory says of it counts too: its template and its values.

        ``numbers``: bits of links' groups that make no difference, but for those who are ``alone``.
        """
        known: dict[Token, int] = {}
        found = []
        for index, words in enumerate(self._words):
            key = (tuple(words), self._after(index, 0 if index in alone else numbers))
            found.append(known.setdefault(key, len(known)))
        return found

    def _after(self, index: int, numbers: int) -> Token:
        if self._arrangement is None:
            return None
        member, tenant = self._arrangement.members[index], self._places.tenants[index]
        forms: dict[str, Token] = {name: ("link", place) for place, name in enumerate(tenant.interfaces)}
        for family, names in self._names.items():
            for (value, mask), place in names[index].items():
                forms.setdefault(address_text(value, family), (family, place))
                forms.setdefault(network_text(value, mask, family), (family, place, "net"))
        values = tuple((name, forms.get(text, text)) for name, text in sorted(member.variables.items()))
        return member.kind, values, member.group & ~numbers, forms.get(member.link, member.link)
