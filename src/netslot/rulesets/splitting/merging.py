"""Rules of many tenants that say the same, as one rule that names none of them.

A rule is *generalised* by saying of every name that it is the packet's own tenant's: the link becomes any slot's
link; the tenant's own source address is dropped where spoofed sources were dropped before, else it becomes the
pool; the host's address on the tenant's link becomes "an address of the link it came in by".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Family
from netslot.rulesets.proof.tagged import Filed, FiledRuleset, Role
from netslot.rulesets.splitting.naming import Naming
from netslot.rulesets.splitting.plan import CannotSplit

General = tuple[tuple[m.Match, ...], t.Target]

_MOST_CLASSES = 16
"""More kinds of tenants than this in one place of a chain are no longer a few slot-agnostic rules."""


class Generaliser:
    """Generalises rules of one family; remembers copies of tenants' own chains, one per class."""

    def __init__(self, filed: FiledRuleset, naming: Naming, spoofing: Callable[[int], bool]) -> None:
        self._filed, self._naming, self._spoofing = filed, naming, spoofing
        self._family: Family = filed.ruleset.family

    def rule(self, table: str, chain: str, item: Filed, tenant: int) -> General:
        """The rule without its link conditions, which the caller adds; CannotSplit if it names the tenant else."""
        rule = item.rule
        if isinstance(rule.target, t.Jump | t.Goto):
            owner = self._filed.chain_owner.get((table, rule.target.chain))
            if owner == tenant:
                raise CannotSplit("it leads to a chain of the tenant's own")
        found: list[m.Match] = []
        roles = {role for role, _ in item.tags}
        for match in rule.matches:
            if isinstance(match, m.Interface) and self._naming.places.link_owner.get(match.name) == tenant:
                if match.negated:
                    raise CannotSplit("it is about every link but the tenant's")
                continue
            if isinstance(match, m.Address):
                found += self._address(match, tenant, roles, chain)
            else:
                found.append(match)
        if isinstance(rule.target, t.Dnat) and ("to", tenant) in item.tags:
            raise CannotSplit("it leads to one tenant's address")
        return tuple(found), rule.target

    def _address(self, match: m.Address, tenant: int, roles: set[Role], chain: str) -> list[m.Match]:
        places, pattern = self._naming.places, (match.value, match.mask)
        names = self._naming.names(tenant, self._family)
        if pattern not in names:
            return [match]
        if pattern[0] in places.gateways[self._family][tenant]:
            if match.side == "dst" and not match.negated and "in" in roles and chain == "INPUT":
                return [m.AddrType("dst", frozenset(("LOCAL",)), interface="in")]
            raise CannotSplit("it names the host's address on the tenant's link")
        if len(places.addresses(tenant, self._family)) > 1:
            raise CannotSplit("it names one of several addresses of the tenant")
        pool = self._naming.pool(self._family)
        if match.side == "src" and "in" in roles and not self._spoofing(tenant):
            if match.negated:
                raise CannotSplit("it is about spoofed sources, which the slot drops")
            return []
        if match.side == "dst" and "out" in roles and not match.negated:
            return []
        if pool is None or match.negated:
            raise CannotSplit("it names the tenant's address")
        return [m.Address(match.side, *pool)]


def alike(lists: Sequence[tuple[General, ...]]) -> bool:
    return all(one == lists[0] for one in lists)


def merged(lists: dict[int, tuple[General, ...]], naming: Naming, roles: set[Role], family: Family) -> list[General]:
    """One list for all classes: with the link of any slot if all say the same, else with each class's group."""
    direction: m.Direction | None = "in" if "in" in roles else "out" if "out" in roles else None
    values = list(lists.values())
    if alike(values):
        near = [] if direction is None else [naming.link(direction)]
        return [((*near, *matches), target) for matches, target in values[0]]
    if direction is None:
        raise CannotSplit("classes of tenants differ here, and nothing tells whose packet it is")
    if len(lists) > _MOST_CLASSES:
        raise CannotSplit("it differs from tenant to tenant")
    found: list[General] = []
    for number, rules in lists.items():
        found += [((naming.class_link(direction, number), *matches), target) for matches, target in rules]
    return found
