"""Rules that count for one tenant: limits, quotas, numbers of connections.

Such a rule moves into the tenant's slot if it sees there what it saw in root: then no packet that it is about may be
left to root. Packets between tenants are, and those that root translates first. So the rule must be about packets to
the outside only, the patterns by which slots know tenants and the host must hold no address of anybody else's, and
nothing that slots leave to root may meet it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Rule
from netslot.rulesets.proof.conditions import interface_is
from netslot.rulesets.proof.places import Pattern, Places, cover
from netslot.rulesets.proof.tagged import FiledRuleset, without_names
from netslot.rulesets.splitting.publishing import leads_elsewhere, rewritten

MOST_PATTERNS = 16
"""More than these are no longer a few rules at the head of a slot's chain."""

_OPEN = frozenset(("ESTABLISHED", "RELATED"))


def is_count(match: m.Match) -> bool:
    """Whether its answer depends on what it was asked before."""
    return isinstance(match, m.Opaque) and match.stateful


def what_counts(rule: Rule) -> Hashable:
    """The same for the rules of all members of a class, and for no other of their rules that keeps another count."""
    words = (without_names(x) for x in rule.matches if isinstance(x, m.Opaque) and x.stateful)
    return tuple(words), rule.target


@dataclass(frozen=True)
class Counting:
    """What holds for all slots of a host in which counts of tenants' move.

    ``tenants`` and ``hosts``: exactly the addresses that slots leave to root, in patterns. ``first_only``: slots
    leave to root what belongs to translated connections. ``kept``: counts that root keeps.
    """

    tenants: tuple[Pattern, ...]
    hosts: tuple[Pattern, ...]
    first_only: bool
    kept: frozenset[Hashable] = frozenset()


def find_counting(filed: FiledRuleset, places: Places) -> Counting | None:
    """None where no count of one tenant's could move."""
    family = filed.ruleset.family
    chains = [items for (table, _), items in filed.chains.items() if table == "filter"]
    if not any(is_count(x) for items in chains for item in items for x in item.rule.matches):
        return None
    if family in places.guessed or leads_elsewhere(filed, places):
        return None
    tenants, hosts = cover(places.tenant_patterns(family)), cover(places.gateway_patterns(family))
    if not 0 < len(tenants) <= MOST_PATTERNS or len(hosts) > MOST_PATTERNS:
        return None
    return Counting(tuple(tenants), tuple(hosts), bool(rewritten(filed, places.link_owner.__contains__)))


def goes_outside(rule: Rule, places: Places) -> bool:
    """Whether it asks for a way out that is no tenant's."""
    return any(
        isinstance(x, m.Interface)
        and x.direction == "out"
        and not any(interface_is(x, name) != x.negated for name in places.link_owner)
        for x in rule.matches
    )


def only_first(rule: Rule) -> bool:
    """Whether it is about the first packets of connections alone. A SYN may belong to an open one."""
    return any(isinstance(x, m.CtState) and not x.negated and x.states == {"NEW"} for x in rule.matches)


def ends_open(rule: Rule, link: str) -> bool:
    """Whether no packet from this link that belongs to an open connection gets past it."""
    match rule.target, _but_for(rule, link):
        case t.Accept(), [m.CtState(states=states, negated=False)]:
            return states >= _OPEN
    return False


def ends_between(rule: Rule, link: str, places: Places) -> bool:
    """Whether no packet from this link to another tenant's gets past it."""
    asked = _but_for(rule, link)
    return isinstance(rule.target, t.Accept | t.Drop | t.Reject) and all(
        isinstance(x, m.Interface)
        and x.direction == "out"
        and all(interface_is(x, name) != x.negated for name in places.link_owner if name != link)
        for x in asked
    )


def _but_for(rule: Rule, link: str) -> list[m.Match]:
    """What it asks beside the link that packets come from."""
    return [
        x
        for x in rule.matches
        if not (isinstance(x, m.Interface) and x.direction == "in" and interface_is(x, link) != x.negated)
    ]


def never_both(one: Iterable[m.Match], other: Iterable[m.Match]) -> bool:
    """Whether no packet meets all of both."""
    others = list(other)
    return any(_apart(a, b) for a in one for b in others)


def _apart(a: m.Match, b: m.Match) -> bool:
    if getattr(a, "negated", False) or getattr(b, "negated", False):
        return False
    match a, b:
        case m.Protocol(), m.Protocol():
            return a.number != b.number
        case m.Address(), m.Address():
            return a.side == b.side and bool((a.value ^ b.value) & a.mask & b.mask)
        case m.Ports(), m.Ports():
            return {a.side, b.side} in ({"src"}, {"dst"}) and not any(
                low <= top and bottom <= high for low, high in a.ranges for bottom, top in b.ranges
            )
    return False
