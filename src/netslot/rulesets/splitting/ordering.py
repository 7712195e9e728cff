"""Whose rules stand first, kept without naming anybody: every tenant's link has a number, and root compares two.

Where the verdict on a packet between two tenants depends on whose rules stand first, no rule for all tenants says
what theirs say. But there are only two orders: the sender's rules first, or the receiver's. So root holds both, once
for all tenants, and which of the two a packet meets follows from the numbers of the links by which it comes and goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from netslot.rulesets.model import Family
from netslot.rulesets.proof.standing import Mode, standings
from netslot.rulesets.proof.tagged import FiledRuleset

BITS = 16
"""How many bits a link's number has, and so half the rules that compare two."""


@dataclass(frozen=True)
class Ordering:
    """``modes``: for each segment of a family's filter chains which rules come first. ``numbers``: each tenant's
    place, if any segment asks for it."""

    modes: Mapping[tuple[Family, str, int], Mode]
    numbers: Mapping[int, int]


def find_ordering(filed: Iterable[FiledRuleset], tenants: int) -> Ordering | None:
    """None where tenants' rules of different segments stand in different orders, or are too many."""
    modes: dict[tuple[Family, str, int], Mode] = {}
    rows: list[tuple[int, ...]] = []
    for one in filed:
        for standing in standings(one):
            if standing.table == "filter":
                modes[one.ruleset.family, standing.chain, standing.segment] = standing.mode
                rows.append(standing.tenants)
    longest = max(rows, key=len, default=())
    order = {who: number for number, who in enumerate(longest)}
    for row in rows:
        numbers = [order.get(who, -1) for who in row]
        if -1 in numbers or numbers != sorted(numbers):
            return None
    if tenants > 1 << BITS:
        return None
    rest = (who for who in range(tenants) if who not in order)
    return Ordering(modes, (order | {who: len(order) + n for n, who in enumerate(rest)}) if order else {})
