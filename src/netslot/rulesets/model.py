"""What a ruleset is made of. Everything here is frozen, and safe to share between rules and threads.

    Dump      ── what one text held: a Ruleset for IPv4, for IPv6, or both
    Ruleset   ── family, tables by name
    Table     ── name, chains by name, in the order of the dump
    Chain     ── name, policy (None for a user chain), counters, rules
    Rule      ── matches, target, comment, counters, line, text

The conditions are in :mod:`netslot.rulesets.matches`, what happens then in :mod:`netslot.rulesets.targets`.

How to read a rule: it applies to a packet when *every* match in ``matches`` is true. Then its target acts.
``matches`` holds no entry for a condition that is always true (a comment, ``-p all``, ``-s 0.0.0.0/0``,
``-i +``, a bare ``-m tcp``), so a rule without conditions has ``matches == ()``.

Two rules that say the same thing hold the *same* Match and Target objects: the parser shares them within one
dump, so that ``is`` is a fast first test and 4,000 tenants' copies cost one object. ``==`` compares values.

``family`` (4 or 6) stands on the Ruleset and not on each match. What is not modelled is kept word for word:
``Opaque`` for a match, ``OpaqueTarget`` for a target. The same Opaque on the same packet gives the same
answer, unless it is ``stateful``: then it depends on earlier packets, possibly of other tenants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from netslot.rulesets.matches import Match
from netslot.rulesets.targets import Target

Family = Literal[4, 6]
Counters: TypeAlias = tuple[int, int]  # packets, bytes

BUILTIN_CHAINS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One rule. Compared by identity: two rules that say the same thing are still two rules.

    ``text`` is the rule as the dump wrote it, after ``-A CHAIN ``; writing it back is word for word.
    ``line`` counts from 1 in the parsed text. ``counters`` is None when the dump had none for it.
    """

    matches: tuple[Match, ...]
    target: Target
    text: str
    line: int = 0
    comment: str = ""
    counters: Counters | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """``policy`` is ``ACCEPT`` or ``DROP`` for a built-in chain and None for a user chain."""

    name: str
    policy: str | None
    rules: tuple[Rule, ...] = ()
    counters: Counters | None = None
    line: int = 0

    @property
    def builtin(self) -> bool:
        return self.policy is not None


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One table. ``chains`` keeps the dump's order."""

    name: str
    chains: Mapping[str, Chain]
    line: int = 0

    def rules(self) -> Iterator[tuple[Chain, Rule]]:
        for chain in self.chains.values():
            for rule in chain.rules:
                yield chain, rule


@dataclass(frozen=True, slots=True, eq=False)
class Ruleset:
    """All tables of one address family. ``notes``: what the dump's comments say that it leaves out; ``tool``: which
    variant of iptables wrote it, as far as they say."""

    family: Family
    tables: Mapping[str, Table]
    notes: tuple[str, ...] = ()
    tool: Literal["", "legacy", "nft"] = ""

    def rules(self) -> Iterator[tuple[Table, Chain, Rule]]:
        """Every rule, in the order of the dump."""
        for table in self.tables.values():
            for chain, rule in table.rules():
                yield table, chain, rule

    def rule_count(self) -> int:
        return sum(len(chain.rules) for table in self.tables.values() for chain in table.chains.values())


@dataclass(frozen=True, slots=True, eq=False)
class Dump:
    """What one text (or an IPv4 and an IPv6 text together) held. At least one family is present."""

    rulesets: tuple[Ruleset, ...]

    def family(self, number: Family) -> Ruleset | None:
        """The ruleset of that family, or None."""
        return next((ruleset for ruleset in self.rulesets if ruleset.family == number), None)

    def rule_count(self) -> int:
        return sum(ruleset.rule_count() for ruleset in self.rulesets)
