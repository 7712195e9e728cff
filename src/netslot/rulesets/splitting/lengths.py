"""How many rules a forwarded packet can be tested against, at most: each chain to its end, by the longest jumps."""

from __future__ import annotations

from netslot.rulesets import targets as t
from netslot.rulesets.model import Ruleset, Table

ON_THE_WAY = ("PREROUTING", "FORWARD", "POSTROUTING")


def longest(ruleset: Ruleset) -> int:
    """Over all tables."""
    return sum(_below(table, name) for table in ruleset.tables.values() for name in ON_THE_WAY)


def longest_after(root: Ruleset, door: str, slot: int, first: int) -> int:
    """Over root and slots, for a packet that a slot decides about, and for one that root decides about.

    ``door``: the chain that takes the first kind past FORWARD's rules. ``slot``: the rules of a slot; ``first``:
    those of them that stand before packets are let pass which root decides about.
    """
    everything = longest(root)
    forwarding = root.tables.get("filter")
    if forwarding is None or door not in forwarding.chains:
        return everything
    past = 1 + len(forwarding.chains[door].rules)
    return max(everything - _below(forwarding, "FORWARD") + past + slot, everything + first)


def _below(table: Table, start: str) -> int:
    known: dict[str, int] = {}

    def below(name: str, above: frozenset[str]) -> int:
        if name not in known:
            rules = table.chains[name].rules
            targets = {rule.target.chain for rule in rules if isinstance(rule.target, t.Jump | t.Goto)} - above
            deeper = (below(chain, above | {name}) for chain in targets if chain in table.chains)
            known[name] = len(rules) + max(deeper, default=0)
        return known[name]

    return below(start, frozenset()) if start in table.chains else 0
