"""Whether it matters between two tenants whose rules stand first.

Where it does, no rule that stands for all tenants can say what their rules say: the order is part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import z3

from netslot.rulesets.proof.journey import Journey, Side, Way
from netslot.rulesets.proof.limits import Limits
from netslot.rulesets.proof.places import NOBODY, Places
from netslot.rulesets.proof.scenarios import Cast, cast
from netslot.rulesets.proof.solving import Unknowns, differences
from netslot.rulesets.proof.tagged import Filed, FiledRuleset, Roles
from netslot.rulesets.proof.terms import any_of
from netslot.rulesets.proof.walker import Chooser

_MOST_CLASSES = 16
"""More kinds of tenants than this are not merged anyway."""


def order_matters(filed: FiledRuleset, places: Places, kinds: Sequence[int]) -> bool:
    """Whether some packet between two tenants fares differently when the other's rules stand first."""
    if len(set(kinds)) > _MOST_CLASSES:
        return False
    players = cast(kinds)
    return any(_differs(filed, places, way) for way in _between(players, places))


def _between(players: Cast, places: Places) -> Iterator[Way]:
    for tenant in players.first:
        for partner in players.partners(tenant):
            for source in (tenant, NOBODY):
                yield Way(places.link(tenant), places.outside[0], tenant, partner, source)


def _chooser(filed: FiledRuleset, late: int) -> Chooser:
    """Between two common rules one tenant's rules come last. Merging keeps common rules where they are."""

    def candidates(table: str, chain: str, roles: Roles) -> list[Filed]:
        found = filed.candidates(table, chain, roles)
        return sorted(found, key=lambda item: (item.segment, not item.tags, item.tenant == late, item.position))

    return candidates


def _differs(filed: FiledRuleset, places: Places, way: Way) -> bool:
    family = filed.ruleset.family
    unknowns = Unknowns(family)
    flow = unknowns.flow()
    sides = [Side(filed, places, choose=_chooser(filed, late)) for late in (way.receiver, way.sender)]
    one, other = (Journey(side, way, unknowns.number).travel(flow.copy()) for side in sides)
    wrong = any_of(differences(one, other, lenient=True).values())
    if wrong is False:
        return False
    solver = z3.Solver()
    solver.set("timeout", 5_000)
    limits = Limits(places, sides[0], family)
    solver.add(*unknowns.sane(flow), *limits.of(way, flow, one, other), *limits.whose(way, flow), wrong)
    return bool(solver.check() == z3.sat)
