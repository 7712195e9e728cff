"""What becomes of each rule, and why. Every rule of the dump ends up in exactly one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from netslot.rulesets.model import Family, Rule

Fate = Literal["moved", "merged", "mapped", "stayed", "refused"]

FATES: tuple[Fate, ...] = ("moved", "merged", "mapped", "stayed", "refused")


@dataclass(frozen=True, slots=True)
class Entry:
    """One rule's fate. ``to``: where it went, in words."""

    family: Family
    table: str
    chain: str
    rule: Rule
    fate: Fate
    to: str
    why: str


@dataclass
class Plan:
    """Fates by rule; ``refusals`` that concern no single rule; ``notes`` for the reader."""

    entries: dict[Rule, Entry] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def settle(self, family: Family, table: str, chain: str, rule: Rule, fate: Fate, to: str, why: str) -> None:
        """The first refusal wins over everything; otherwise the last word counts."""
        known = self.entries.get(rule)
        if known is not None and known.fate == "refused":
            return
        self.entries[rule] = Entry(family, table, chain, rule, fate, to, why)

    def of(self, fate: Fate) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.fate == fate]

    def fate(self, rule: Rule) -> Fate | None:
        entry = self.entries.get(rule)
        return entry.fate if entry is not None else None


class CannotSplit(Exception):
    """This rule cannot be carried over; the text says why."""
