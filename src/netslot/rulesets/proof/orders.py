"""In which orders the rules of two tenants can stand, so that one pair of each two classes serves for all pairs.

Rules of a class's members are the same, and each member's are in the same order; how they stand among other tenants'
differs. For the n-th rule of a class in a chain the earliest and the latest place that a member's has says what is
always before it, always behind it, or now before and now behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from netslot.rulesets.proof.places import NOBODY
from netslot.rulesets.proof.tagged import Filed, FiledRuleset, Roles
from netslot.rulesets.proof.walker import Chooser

_Spans = dict[int, tuple[list[int], list[int]]]  # by class: earliest and latest places of the n-th rule


class Orders:
    """The orders of one ruleset. ``kinds``: the class of each tenant."""

    def __init__(self, filed: FiledRuleset, kinds: Sequence[int]) -> None:
        self._filed, self._kinds = filed, kinds
        self._spans: dict[tuple[str, str], _Spans] = {}
        self._numbers: dict[tuple[str, str], dict[int, int]] = {}
        self.rank = [0] * len(kinds)
        for place, items in filed.chains.items():
            if place not in filed.chain_owner:
                self._measure(place, items)

    def _measure(self, place: tuple[str, str], items: list[Filed]) -> None:
        counts: dict[int, int] = {}
        spans: _Spans = {}
        numbers: dict[int, int] = {}
        for item in items:
            who = item.tenant
            if who == NOBODY:
                continue
            number = numbers[item.position] = counts.get(who, 0)
            counts[who] = number + 1
            early, late = spans.setdefault(self._kinds[who], ([], []))
            if number == len(early):
                early.append(item.position)
                late.append(item.position)
            early[number] = min(early[number], item.position)
            late[number] = max(late[number], item.position)
            if number == 0 and place == ("filter", "FORWARD"):
                self.rank[who] = item.position
        self._spans[place], self._numbers[place] = spans, numbers

    def chooser(self, early: int, late: int) -> Chooser:
        """The rules for a walk where the one tenant's stand as early as its class's ever do, the other's as late."""

        def candidates(table: str, chain: str, roles: Roles) -> list[Filed]:
            found = self._filed.candidates(table, chain, roles)
            numbers, spans = self._numbers.get((table, chain)), self._spans.get((table, chain))
            if numbers is None or spans is None:
                return found

            def place(item: Filed) -> tuple[int, bool]:
                who = item.tenant
                if who not in (early, late):
                    return item.position, False
                return spans[self._kinds[who]][who == late][numbers[item.position]], who == late

            return sorted(found, key=place)

        return candidates
