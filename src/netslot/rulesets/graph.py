"""Who jumps to whom: the chains of one table as a graph."""

from __future__ import annotations

from netslot.rulesets.model import BUILTIN_CHAINS, Chain, Rule, Table
from netslot.rulesets.targets import Goto, Jump

References = dict[str, list[tuple[Chain, Rule]]]


def references(table: Table) -> References:
    """For each chain that is jumped to: the rules that do, in order, each with the chain it stands in."""
    found: References = {}
    for chain, rule in table.rules():
        target = rule.target
        if type(target) is Jump or type(target) is Goto:
            found.setdefault(target.chain, []).append((chain, rule))
    return found


def reachable(table: Table, hooks: tuple[str, ...] = BUILTIN_CHAINS) -> set[str]:
    """The chains that a packet can come to from these built-in chains on, themselves included."""
    seen = {name for name in hooks if name in table.chains}
    left = list(seen)
    while left:
        for rule in table.chains[left.pop()].rules:
            target = rule.target
            if isinstance(target, Jump | Goto) and target.chain not in seen:
                seen.add(target.chain)
                left.append(target.chain)
    return seen


def depth(table: Table) -> int:
    """The longest chain of jumps from a built-in chain, counted in jumps (the kernel refuses loops)."""
    known: dict[str, int] = {}

    def below(name: str, above: frozenset[str]) -> int:
        if name in above or name not in table.chains:
            return 0
        if name not in known:
            targets = {rule.target.chain for rule in table.chains[name].rules if isinstance(rule.target, Jump | Goto)}
            known[name] = max((1 + below(chain, above | {name}) for chain in targets), default=0)
        return known[name]

    return max((below(chain.name, frozenset()) for chain in table.chains.values() if chain.builtin), default=0)
