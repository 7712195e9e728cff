"""Who jumps to whom: the chains of one table as a graph."""

from __future__ import annotations

from collections.abc import Iterator

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


def loop(table: Table) -> tuple[Chain, Rule] | None:
    """A jump, with the chain it stands in, by which a packet would come back to a chain that it is still in."""
    done: set[str] = set()
    within: dict[str, Iterator[Rule]] = {}  # the chains that the packet is in, each with the rules still to come
    for hook in BUILTIN_CHAINS:
        here = hook if hook in table.chains else ""
        while here:
            rules = within.setdefault(here, iter(table.chains[here].rules))
            for rule in rules:
                target = rule.target
                if not isinstance(target, Jump | Goto) or target.chain in done:
                    continue
                if target.chain in within:
                    return table.chains[here], rule
                here = target.chain
                break
            else:
                done.add(here)
                del within[here]
                here = next(reversed(within), "")
    return None


def depth(table: Table) -> int:
    """The longest chain of jumps from a built-in chain, counted in jumps."""
    below = _jumps_below(table)
    return max((below[chain.name] for chain in table.chains.values() if chain.builtin), default=0)


def deepest(table: Table) -> int:
    """The same from any chain."""
    return max(_jumps_below(table).values(), default=0)


def _jumps_below(table: Table) -> dict[str, int]:
    """For each chain how many jumps can follow one another from there; a jump that closes a loop is not counted."""
    below: dict[str, int] = {}
    open_: set[str] = set()
    left = list(table.chains)
    while left:  # depth first, without recursion: a chain stays on the list until those below it are known
        name = left[-1]
        if name in below:
            left.pop()
            continue
        targets = {rule.target.chain for rule in table.chains[name].rules if isinstance(rule.target, Jump | Goto)}
        unknown = [target for target in targets if target not in below and target not in open_ and target != name]
        if unknown and name not in open_:
            open_.add(name)
            left += unknown
            continue
        below[name] = max((1 + below[target] for target in targets if target in below), default=0)
        open_.discard(name)
        left.pop()
    return below
