"""Ports published for tenants: rules of nat PREROUTING that differ only in numbers, as one rule with a map."""

from __future__ import annotations

from collections.abc import Callable

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Rule
from netslot.rulesets.proof.places import Places
from netslot.rulesets.proof.tagged import Filed, FiledRuleset


def can_be_mapped(rule: Rule, places: Places, ones: int) -> bool:
    """``[-i outside] [-d one address] -p tcp|udp --dport one -j DNAT --to-destination one[:one]`` and no more."""
    target = rule.target
    if (
        not isinstance(target, t.Dnat)
        or target.to.address is None
        or target.to.flags
        or target.to.base_port is not None
    ):
        return False
    low, high = target.to.address
    single = target.to.ports is None or target.to.ports[0] == target.to.ports[1]
    if low != high or not single:
        return False
    kinds: list[str] = []
    for match in rule.matches:
        if isinstance(match, m.Interface) and match.direction == "in":
            fits = not match.wildcard and not match.negated and match.name in places.outside
        elif isinstance(match, m.Address) and match.side == "dst":
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
    return sorted(set(kinds)) == sorted(kinds) and {"Protocol", "Ports"} <= set(kinds)


def key(rule: Rule) -> tuple[m.Match, ...]:
    """What a packet must be for the rule: two rules with the same key, and the second is never met."""
    return tuple(sorted(rule.matches, key=lambda match: type(match).__name__))


def mappable(items: list[Filed], places: Places, ones: int) -> tuple[list[Filed], bool]:
    """The rules of nat PREROUTING that go into the map, and whether the map comes before iptables' own rules.

    All or none: a map stands before the chain or behind it, and nothing may come between.
    """
    tagged = [item for item in items if item.tags]
    fitting = [item for item in tagged if can_be_mapped(item.rule, places, ones)]
    shapes = {tuple(type(match).__name__ for match in key(item.rule)) for item in fitting}
    if not fitting or len(fitting) != len(tagged) or len(shapes) != 1:
        return [], True
    common = sum(not item.tags for item in items)
    segments = {item.segment for item in fitting}
    if segments == {0}:
        return fitting, True
    if segments == {common}:
        return fitting, False
    return [], True


_REWRITES = (t.Dnat, t.Redirect, t.Netmap, t.Notrack, t.CtTarget)
_MANY = 8


def rewritten(filed: FiledRuleset, links: Callable[[str], bool]) -> list[tuple[m.Match, ...]]:
    """What root changes of tenants' packets before FORWARD sees them: for each kind, which packets that are.

    ``links``: whether an interface is a tenant's. Where there would be many kinds, one that says less.
    """
    found: dict[tuple[m.Match, ...], None] = {}
    for (table, chain), items in filed.chains.items():
        if table not in ("raw", "mangle", "nat") or (
            chain != "PREROUTING" and filed.policy(table, chain) is not None
        ):
            continue
        for item in items:
            if isinstance(item.rule.target, _REWRITES) and _may_be_tenants(item.rule, links):
                region = tuple(x for x in item.rule.matches if isinstance(x, m.Address | m.Protocol | m.Ports))
                found[tuple(x for x in region if not (isinstance(x, m.Address) and x.side == "src"))] = None
    if len(found) > _MANY:
        found = {tuple(x for x in region if isinstance(x, m.Protocol)): None for region in found}
    return list(found)


def _may_be_tenants(rule: Rule, links: Callable[[str], bool]) -> bool:
    return all(
        x.negated or x.wildcard or x.direction == "out" or links(x.name)
        for x in rule.matches
        if isinstance(x, m.Interface)
    )
