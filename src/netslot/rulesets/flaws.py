"""Rules that do nothing: unreachable, duplicate, and (where it can be known) about what no longer exists.

A rule is *unreachable* when an earlier rule of its chain takes every packet that it could apply to: the
earlier one ends the walk of the chain and each of its conditions follows from the later one's. Only conditions
that cannot change between the two rules count, so marks and rate limits never shadow anything. A rule is a
*duplicate* when an earlier rule of its chain has the same conditions and the same target, and has done all
that this one could do. A rule is *dead*
when it is about a tenant that is not among those that are known to exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.attribute import Attribution, Directory, attribute
from netslot.rulesets.graph import reachable
from netslot.rulesets.model import Chain, Dump, Family, Rule, Table


@dataclass(frozen=True, slots=True)
class Flaw:
    """``kind`` is ``dead``, ``unreachable`` or ``duplicate``; ``reason`` is one clause for a person."""

    kind: str
    family: Family
    table: str
    chain: str
    rule: Rule
    reason: str


_LEAVES = (*t.TERMINAL, t.Return, t.Goto)
_UNSTEADY = (m.Mark, m.Connmark, m.Ttl, m.Dscp)


def find_flaws(dump: Dump) -> list[Flaw]:
    """Unreachable and duplicate rules, in the order of the dump."""
    flaws: list[Flaw] = []
    for ruleset in dump.rulesets:
        for table in ruleset.tables.values():
            reached = reachable(table)
            endings = _Endings(table)
            for chain in table.chains.values():
                if chain.name not in reached:
                    why = f"nothing that packets pass jumps to the chain {chain.name}"
                    found: Iterator[tuple[str, Rule, str]] = (("unreachable", rule, why) for rule in chain.rules)
                else:
                    found = _in_chain(chain, endings)
                flaws += [Flaw(kind, ruleset.family, table.name, chain.name, rule, why) for kind, rule, why in found]
    return flaws


def find_dead(attribution: Attribution) -> list[Flaw]:
    """Rules about guests that the dump shows but the list of tenants does not have.

    Only for an attribution to a list that somebody gave; tenants that were found in the dump exist by that.
    """
    if attribution.found_in_dump:
        return []
    seen = attribute(attribution.dump)
    known = Directory(attribution.tenants)
    gone = {
        index
        for index, tenant in enumerate(seen.tenants)
        if not any(name in known.by_interface for name in tenant.interfaces)
        and not any(mac in known.by_mac for mac in tenant.macs)
        and not any(known.by_address(a.family, a.value, a.mask) >= 0 for a in tenant.addresses)
    }
    return [
        Flaw(
            "dead",
            ruleset.family,
            table.name,
            chain.name,
            rule,
            f"it is about {seen.tenants[seen.owner[rule]].name}, which no tenant in the list has",
        )
        for ruleset in attribution.dump.rulesets
        for table, chain, rule in ruleset.rules()
        if seen.owner[rule] in gone
    ]


def find_missing(attribution: Attribution, links: frozenset[str]) -> list[Flaw]:
    """Rules about a tenant none of whose interfaces is among ``links``, the links that exist."""
    gone = {
        index
        for index, tenant in enumerate(attribution.tenants)
        if tenant.interfaces and not links.intersection(tenant.interfaces)
    }
    return [
        Flaw(
            "dead",
            ruleset.family,
            table.name,
            chain.name,
            rule,
            f"{attribution.tenants[attribution.owner[rule]].interfaces[0]} does not exist",
        )
        for ruleset in attribution.dump.rulesets
        for table, chain, rule in ruleset.rules()
        if attribution.owner[rule] in gone
    ]


class _Endings:
    """Chains from which no packet comes back."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._known: dict[str, bool] = {}

    def never_returns(self, name: str) -> bool:
        """Whether every packet that enters the chain gets a verdict in it."""
        if name not in self._known:
            self._known[name] = False  # while it is being looked at: a loop proves nothing
            self._known[name] = self._look(self._table.chains[name])
        return self._known[name]

    def _look(self, chain: Chain) -> bool:
        for rule in chain.rules:
            target = rule.target
            if isinstance(target, t.Return):
                return False
            if isinstance(target, t.Goto) and not self.never_returns(target.chain):
                return False
            if not rule.matches and (
                isinstance(target, t.TERMINAL)
                or (isinstance(target, t.Jump | t.Goto) and self.never_returns(target.chain))
            ):
                return True
        return False


def _in_chain(chain: Chain, endings: _Endings) -> Iterator[tuple[str, Rule, str]]:
    shadows = _Shadows(chain)
    seen: dict[tuple[frozenset[int], int], Rule] = {}
    closed: Rule | None = None
    for previous, rule in zip((None, *chain.rules), chain.rules, strict=False):
        if closed is not None:
            yield "unreachable", rule, f"the rule of line {closed.line} before it takes every packet"
            continue
        conditions = frozenset(map(id, rule.matches))
        key = conditions, id(rule.target)
        first = seen.setdefault(key, rule)
        if first is not rule and _is_duplicate(first, rule, previous):
            yield "duplicate", rule, f"the same as the rule of line {first.line}"
            continue
        shadow = shadows.of(rule, conditions)
        if shadow is not None:
            yield "unreachable", rule, f"the rule of line {shadow.line} takes all of its packets"
            continue
        target = rule.target
        leaves = isinstance(target, _LEAVES) or (isinstance(target, t.Jump) and endings.never_returns(target.chain))
        if not leaves:
            continue
        if not rule.matches:
            closed = rule
        else:
            shadows.add(rule, conditions)


def _is_duplicate(first: Rule, rule: Rule, previous: Rule | None) -> bool:
    """Whether the second rule can be left out, given that its words are those of the first.

    Where rules stand between them a mark may have changed, and a chain that is visited twice may act twice:
    then only a rule that would have ended the walk the first time counts. Rules without a target only count
    packets or carry a comment: two comments are two rules.
    """
    if any(isinstance(match, m.Opaque) and match.stateful for match in rule.matches):
        return False
    if isinstance(rule.target, _LEAVES):
        return first is previous or not any(isinstance(match, _UNSTEADY) for match in rule.matches)
    idle = isinstance(rule.target, t.NoTarget) and first.comment == rule.comment
    return first is previous and (idle or isinstance(rule.target, t.Jump))


class _Shadows:
    """Earlier rules of one chain that end its walk, filed under the rarest of their conditions."""

    def __init__(self, chain: Chain) -> None:
        self._frequency = Counter(id(match) for rule in chain.rules for match in rule.matches)
        self._filed: dict[int, list[tuple[frozenset[int], Rule]]] = {}
        self._wider = _Wider({id(match): match for rule in chain.rules for match in rule.matches})

    def add(self, rule: Rule, conditions: frozenset[int]) -> None:
        if any(
            isinstance(match, _UNSTEADY) or (isinstance(match, m.Opaque) and match.stateful) for match in rule.matches
        ):
            return
        rarest = min(conditions, key=self._frequency.__getitem__)
        self._filed.setdefault(rarest, []).append((conditions, rule))

    def of(self, rule: Rule, conditions: frozenset[int]) -> Rule | None:
        """An earlier rule, all of whose conditions follow from these."""
        filed = self._filed
        if not filed:
            return None
        implied: frozenset[int] | set[int] = conditions
        known = self._wider.known
        for match in rule.matches:
            wider = known.get(id(match))
            if wider is None:
                wider = self._wider.than(match)
            if wider:
                implied = {*implied, *wider}
        for condition in implied:
            if condition in filed:
                for earlier, by in filed[condition]:
                    if earlier <= implied:
                        return by
        return None


_FEW = 64


class _Wider:
    """For each condition of a chain, the other conditions of that chain that it implies."""

    def __init__(self, distinct: dict[int, m.Match]) -> None:
        self.known: dict[int, tuple[int, ...]] = {}
        self._prefixes: dict[tuple[str, int, int], int] = {}
        self._masks: set[int] = set()
        self._few: dict[type, list[m.Match]] = {}
        for key, match in distinct.items():
            if isinstance(match, m.Address):
                if not match.negated:
                    self._prefixes[match.side, match.mask, match.value] = key
                    self._masks.add(match.mask)
            elif isinstance(match, m.Interface | m.Physdev):
                if match.wildcard and not match.negated:
                    self._few.setdefault(type(match), []).append(match)
            elif isinstance(match, m.CtState | m.AddrType):
                self._few.setdefault(type(match), []).append(match)
            elif isinstance(match, m.Ports) and match.ranges[0][0] != match.ranges[-1][1]:
                self._few.setdefault(m.Ports, []).append(match)
        # Each condition is compared with each of these: with too many, that would no longer be linear.
        self._few = {kind: found for kind, found in self._few.items() if len(found) <= _FEW}

    def than(self, match: m.Match) -> tuple[int, ...]:
        """The wider conditions, remembered in ``known`` by the identity of the match."""
        found = self.known[id(match)] = tuple(self._look(match))
        return found

    def _look(self, match: m.Match) -> Iterator[int]:
        if isinstance(match, m.Address):
            if not match.negated:
                for mask in self._masks:
                    if mask != match.mask and mask & match.mask == mask:
                        wider = self._prefixes.get((match.side, mask, match.value & mask))
                        if wider is not None:
                            yield wider
            return
        for other in self._few.get(type(match), ()):
            if other is not match and _implies(match, other):
                yield id(other)


def _implies(narrow: m.Match, wide: m.Match) -> bool:
    """Whether the first condition, not negated, cannot hold without the second. Both are of one type."""
    if getattr(narrow, "negated", False) or getattr(wide, "negated", False):
        return False
    if isinstance(narrow, m.Interface | m.Physdev) and isinstance(wide, m.Interface | m.Physdev):
        return narrow.direction == wide.direction and narrow.name.startswith(wide.name)
    if isinstance(narrow, m.CtState) and isinstance(wide, m.CtState):
        return narrow.states <= wide.states
    if isinstance(narrow, m.AddrType) and isinstance(wide, m.AddrType):
        same = narrow.side == wide.side and narrow.interface == wide.interface
        return same and narrow.types <= wide.types
    if isinstance(narrow, m.Ports) and isinstance(wide, m.Ports):
        return narrow.side == wide.side and all(
            any(low <= first and last <= high for low, high in wide.ranges) for first, last in narrow.ranges
        )
    return False
