"""Rules of root's nat table that differ only in numbers, as one rule with a map; and what root rewrites at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.lent import one_address
from netslot.rulesets.proof.places import Places
from netslot.rulesets.proof.tagged import Filed, FiledRuleset
from netslot.rulesets.published import Published
from netslot.rulesets.splitting.plan import Plan
from netslot.rulesets.values import ALL_ONES


def can_be_mapped(rule: Rule, places: Places, ones: int) -> bool:
    """``[-i outside] [-d one address] -p tcp|udp --dport one -j DNAT --to-destination one[:one]`` and no more,

    or ``[-i outside] -d one -j DNAT --to-destination one``, or ``[-o outside] -s one -j SNAT --to-source one``.
    """
    target = rule.target
    if not isinstance(target, t.Dnat | t.Snat):
        return False
    to = target.to
    if to.address is None or to.flags or to.base_port is not None or to.address[0] != to.address[1]:
        return False
    near, side = ("in", "dst") if isinstance(target, t.Dnat) else ("out", "src")
    kinds: list[str] = []
    for match in rule.matches:
        if isinstance(match, m.Interface) and match.direction == near:
            fits = not match.wildcard and not match.negated and match.name in places.outside
        elif isinstance(match, m.Address) and match.side == side:
            fits = match.mask == ones and not match.negated
        elif isinstance(match, m.Protocol):
            fits = match.number in (6, 17) and not match.negated
        elif isinstance(match, m.Ports) and match.side == "dst":
            fits = not match.negated and len(match.ranges) == 1 and match.ranges[0][0] == match.ranges[0][1]
        else:
            fits = False
        if not fits:
            return False
        kinds.append(type(match).__name__)
    if sorted(set(kinds)) != sorted(kinds):
        return False
    if isinstance(target, t.Dnat) and {"Protocol", "Ports"} <= set(kinds):
        return to.ports is None or to.ports[0] == to.ports[1]
    return to.ports is None and "Address" in kinds and not {"Protocol", "Ports"} & set(kinds)


def key(rule: Rule) -> tuple[m.Match, ...]:
    """What a packet must be for the rule: two rules with the same key, and the second is never met."""
    return tuple(sorted(rule.matches, key=lambda match: type(match).__name__))


def mapped(items: list[Filed], places: Places, ones: int) -> tuple[list[Filed], list[Rule], bool]:
    """The rules of a nat chain that go into maps, those of them that count, and whether maps come before the chain.

    All or none: a map stands before the chain or behind it, and nothing may come between.
    """
    tagged = [item for item in items if item.tags]
    fitting = [item for item in tagged if can_be_mapped(item.rule, places, ones)]
    shapes = {tuple(type(match).__name__ for match in key(item.rule)) for item in fitting}
    if not fitting or len(fitting) != len(tagged) or len(shapes) != 1:
        return [], [], True
    common = sum(not item.tags for item in items)
    segments = {item.segment for item in fitting}
    if segments not in ({0}, {common}):
        return [], [], True
    first_of: dict[tuple[m.Match, ...], Rule] = {}
    for item in fitting:
        first_of.setdefault(key(item.rule), item.rule)
    return fitting, list(first_of.values()), segments == {0}


class Maps:
    """The maps of one family's nat table, as they are found."""

    def __init__(self, places: Places, family: Family, plan: Plan) -> None:
        self._places, self._family, self._plan = places, family, plan
        self.published = Published()

    def take(self, chain: str, items: list[Filed]) -> None:
        """Map what of the nat table's chain can be; each such rule's fate is settled."""
        if chain not in ("PREROUTING", "POSTROUTING"):
            return
        fitting, rules, first = mapped(items, self._places, ALL_ONES[self._family])
        if not fitting:
            return
        self.published.rules[chain], self.published.first[chain] = rules, first
        why = "it gives an address or a port of the host's to one tenant; one rule with a map says it for all"
        for item in fitting:
            self._plan.settle(self._family, "nat", chain, item.rule, "mapped", "root, in a map", why)


_REWRITES = (t.Dnat, t.Redirect, t.Netmap, t.Notrack, t.CtTarget)
_MANY = 8


def rewritten(filed: FiledRuleset, links: Callable[[str], bool]) -> list[tuple[m.Match, ...]]:
    """What root changes of tenants' packets before FORWARD sees them: for each kind, which packets that are.

    ``links``: whether an interface is a tenant's. Where there would be many kinds, one that says less.
    """
    found: dict[tuple[m.Match, ...], None] = {}
    for rule in _changing(filed, links):
        region = tuple(x for x in rule.matches if isinstance(x, m.Address | m.Protocol | m.Ports))
        found[tuple(x for x in region if not (isinstance(x, m.Address) and x.side == "src"))] = None
    if len(found) > _MANY:
        found = dict.fromkeys(_with_hulls(list(found)))
    if len(found) > _MANY:
        found = {tuple(x for x in region if isinstance(x, m.Protocol)): None for region in found}
    return list(found)


def leads_elsewhere(filed: FiledRuleset, places: Places) -> bool:
    """Whether what root changes of tenants' packets before FORWARD may lead anywhere but to tenants and the host."""
    family = filed.ruleset.family
    tenants = {a.value for each in places.tenants for a in each.addresses if a.family == family}
    targets = (rule.target for rule in _changing(filed, places.link_owner.__contains__))
    return any(
        not isinstance(to, t.Redirect) and not (isinstance(to, t.Dnat) and one_address(to) in tenants)
        for to in targets
    )


def _changing(filed: FiledRuleset, links: Callable[[str], bool]) -> Iterator[Rule]:
    for (table, chain), items in filed.chains.items():
        if table not in ("raw", "mangle", "nat") or (
            chain != "PREROUTING" and filed.policy(table, chain) is not None
        ):
            continue
        for item in items:
            if isinstance(item.rule.target, _REWRITES) and _may_be_tenants(item.rule, links):
                yield item.rule


def _with_hulls(regions: list[tuple[m.Match, ...]]) -> list[tuple[m.Match, ...]]:
    """Regions that differ in one range of ports, as one that spans them all."""
    spans: dict[tuple[m.Match, ...], tuple[int, int, tuple[m.Match, ...]]] = {}
    others: list[tuple[m.Match, ...]] = []
    for region in regions:
        ports = [x for x in region if isinstance(x, m.Ports)]
        if len(ports) != 1 or ports[0].negated or len(ports[0].ranges) != 1:
            others.append(region)
            continue
        key = tuple(replace(x, ranges=()) if x is ports[0] else x for x in region)
        low, high = ports[0].ranges[0]
        known = spans.get(key, (low, high, region))
        spans[key] = min(low, known[0]), max(high, known[1]), region
    spanned = [
        tuple(replace(x, ranges=((low, high),)) if isinstance(x, m.Ports) else x for x in region)
        for low, high, region in spans.values()
    ]
    return [*others, *spanned]


def _may_be_tenants(rule: Rule, links: Callable[[str], bool]) -> bool:
    return all(
        x.negated or x.wildcard or x.direction == "out" or links(x.name)
        for x in rule.matches
        if isinstance(x, m.Interface)
    )
