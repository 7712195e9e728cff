"""How tenants' rules stand to each other between two common rules of a chain.

Of two tenants, a packet from the one to the other meets rules about what the one sends and rules about what the other
gets. Which come first may be the same for all pairs, or follow from the order of the tenants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

from netslot.rulesets.proof.tagged import Filed, FiledRuleset

Side = Literal["in", "out"]
Mode = Literal["in", "out", "order", "mixed"]


@dataclass(frozen=True, slots=True)
class Standing:
    """One segment: the rules of a chain between two that name no tenant.

    ``mode``: rules about what tenants send come first (``in``), or those about what they get (``out``); all rules of
    one tenant before all of the next, as in ``tenants`` (``order``); or neither.
    """

    table: str
    chain: str
    segment: int
    mode: Mode
    tenants: tuple[int, ...] = ()


def side_of(item: Filed) -> Side | None:
    """Whether a tenant's rule is about what it sends or about what it gets; None for both, or for two tenants."""
    sent = any(role in ("in", "src") for role, _ in item.tags)
    got = any(role in ("out", "dst", "to") for role, _ in item.tags)
    if sent == got or len({who for _, who in item.tags}) > 1:
        return None
    return "in" if sent else "out"


def standings(filed: FiledRuleset) -> Iterator[Standing]:
    """All segments in which rules of both kinds stand; a tenant's own chains have none."""
    for (table, chain), items in filed.chains.items():
        if (table, chain) in filed.chain_owner:
            continue
        tagged = (item for item in items if item.tags)
        for segment, group in groupby(tagged, key=lambda item: item.segment):
            found = _standing(list(group))
            if found is not None:
                yield Standing(table, chain, segment, *found)


def _standing(items: list[Filed]) -> tuple[Mode, tuple[int, ...]] | None:
    sides = [side_of(item) for item in items]
    if None in sides:
        return "mixed", ()
    if len(set(sides)) == 1:
        return None
    turns = sum(one != other for one, other in pairwise(sides))
    if turns == 1:
        return ("in" if sides[0] == "in" else "out"), ()
    people = [who for who, _ in groupby(item.tenant for item in items)]
    return ("order", tuple(people)) if len(people) == len(set(people)) else ("mixed", ())
