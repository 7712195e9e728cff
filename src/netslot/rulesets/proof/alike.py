"""Whether two rulesets say the same rule for rule, so that no question has to be put to the solver.

Sets are rules already (``ipsets.expanded``). Where tenants share bridges and hardly a rule can be merged, what is
left to compare is the same text in other words; asking about every pair of tenants would take hours to say so.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import groupby

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.graph import reachable
from netslot.rulesets.model import Chain, Rule, Ruleset

_ENDS = (t.Accept, t.Drop, t.Reject, t.Return)


def alike(one: Ruleset, other: Ruleset) -> bool:
    """True only if every chain that a packet can come to has the same policy and the same rules on both sides."""
    return _words(one) == _words(other)


def _words(ruleset: Ruleset) -> dict[tuple[str, str], Hashable]:
    return {
        (table.name, name): (table.chains[name].policy, _chain(table.chains[name]))
        for table in ruleset.tables.values()
        for name in reachable(table)
        if table.chains[name].rules or table.chains[name].policy != "ACCEPT"
    }


def _chain(chain: Chain) -> tuple[Hashable, ...]:
    """Neighbours that end the walk in the same way are a set: whichever of them applies, the same happens."""
    found: list[Hashable] = []
    for target, rules in groupby(chain.rules, key=lambda rule: rule.target):
        conditions = [_conditions(rule) for rule in rules]
        free = isinstance(target, _ENDS) and all(isinstance(x, frozenset) for x in conditions)
        found.append((target, frozenset(conditions) if free else tuple(conditions)))
    return tuple(found)


def _conditions(rule: Rule) -> frozenset[m.Match] | tuple[m.Match, ...]:
    """All of them must hold, in whatever order; but a condition that counts counts what came as far as to it."""
    if any(isinstance(match, m.Opaque) and match.stateful for match in rule.matches):
        return rule.matches
    return frozenset(rule.matches)
