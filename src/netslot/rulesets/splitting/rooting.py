"""The root ruleset that remains: common rules as they were, tenants' rules merged, and the doors to the slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Chain, Family, Rule
from netslot.rulesets.proof.places import NOBODY
from netslot.rulesets.proof.tagged import Filed, FiledRuleset
from netslot.rulesets.splitting.merging import General, Generaliser, merged
from netslot.rulesets.splitting.naming import Naming
from netslot.rulesets.splitting.plan import CannotSplit, Plan
from netslot.rulesets.splitting.publishing import key, mappable
from netslot.rulesets.splitting.slots import Matches
from netslot.rulesets.write import rule_text

FROM, UNDECIDED = "netslot-from", "netslot-undecided"

Drops = Mapping[int, bool]


class RootWriter:
    """Writes one family's root ruleset. ``kinds[tenant]`` is its class; ``first[class]`` its representative."""

    def __init__(
        self,
        filed: FiledRuleset,
        naming: Naming,
        plan: Plan,
        kinds: list[int],
        shared: Mapping[Matches, Rule],
        spoofing: Callable[[int], bool],
        early: frozenset[str],
        inward_here: bool,
    ) -> None:
        self._filed, self._naming, self._plan, self._kinds = filed, naming, plan, kinds
        self._family: Family = filed.ruleset.family
        self._general = Generaliser(filed, naming, spoofing)
        self._shared = list(shared)
        self._early = early  # tables whose tenants' drops before routing went into the slots
        self._inward_here = inward_here  # root, not the slot, decides about packets to a tenant
        self._first = {kind: tenant for tenant, kind in reversed(list(enumerate(kinds)))}
        self.published: list[Rule] = []
        self.published_first = True
        self.added = 0

    def write(self) -> str:
        """The text for iptables-restore."""
        lines: list[str] = []
        for table in self._filed.ruleset.tables.values():
            bodies = {chain.name: self._chain(table.name, chain) for chain in table.chains.values()}
            gone = {name for name in bodies if self._gone(table.name, name)}
            lines.append(f"*{table.name}")
            if table.name == "filter" and "FORWARD" in bodies:
                bodies |= self._doors()
            for name in bodies:
                chain = table.chains.get(name)
                policy = chain.policy if chain is not None else None
                if name not in gone:
                    lines.append(f":{name} {policy or '-'} [0:0]")
            for name, rules in bodies.items():
                if name not in gone:
                    lines += [f"-A {name} {text}" if text else f"-A {name}" for text in rules]
            lines.append("COMMIT")
        return "\n".join(lines) + "\n"

    def _gone(self, table: str, name: str) -> bool:
        """A tenant's own chain that no remaining rule leads to."""
        if (table, name) not in self._filed.chain_owner:
            return False
        return not self._stays_called(table, name)

    @cached_property
    def _callers(self) -> dict[tuple[str, str], list[tuple[str, Filed]]]:
        """For each chain the rules that lead there, each with its chain."""
        found: dict[tuple[str, str], list[tuple[str, Filed]]] = {}
        for (table, chain), items in self._filed.chains.items():
            for item in items:
                if isinstance(item.rule.target, t.Jump | t.Goto):
                    found.setdefault((table, item.rule.target.chain), []).append((chain, item))
        return found

    def _chain(self, table: str, chain: Chain) -> list[str]:
        items = self._filed.chains[table, chain.name]
        owner = self._filed.chain_owner.get((table, chain.name), NOBODY)
        if owner != NOBODY:
            return self._own_chain(table, chain.name, items)
        self._map(table, chain.name, items)
        body: list[str] = []
        if table == "filter" and chain.name == "FORWARD":
            body.append(self._text(((self._naming.link("in"),), t.Jump(FROM))))
            if not self._inward_here:
                body.append(self._text(((self._naming.link("out"),), t.Accept())))
        undecided = False
        pending: list[Filed] = []
        for item in items:
            if item.tags:
                pending.append(item)
                continue
            if pending and table == "filter" and chain.name == "FORWARD" and not undecided:
                body += self._undecided_jump()
                undecided = True
            body += self._segment(table, chain.name, pending)
            pending = []
            body.append(item.rule.text)
            self._stay(table, chain.name, item.rule)
        if pending and table == "filter" and chain.name == "FORWARD" and not undecided:
            body += self._undecided_jump()
        return body + self._segment(table, chain.name, pending)

    def _own_chain(self, table: str, chain: str, items: list[Filed]) -> list[str]:
        for item in items:
            if table == "filter" and not self._stays_called(table, chain):
                self._move(table, chain, item.rule)
            else:
                self._plan.settle(
                    self._family, table, chain, item.rule, "stayed", "", "its chain is called from root"
                )
        return [item.rule.text for item in items]

    def _stays_called(self, table: str, chain: str) -> bool:
        """Whether a rule that stays in root leads to this chain. Callers are settled first: built-in chains lead."""
        return any(self._plan.fate(item.rule) == "stayed" for _, item in self._callers.get((table, chain), ()))

    def _stay(self, table: str, chain: str, rule: Rule) -> None:
        why = "it names no tenant"
        if any(isinstance(x, m.Opaque) and x.stateful for x in rule.matches):
            why = "it keeps a count that all tenants share"
        elif table == "nat":
            why = "it translates addresses that live in root"
        elif isinstance(rule.target, t.SetMark):
            why = "it sets a mark that root's routing may read"
        self._plan.settle(self._family, table, chain, rule, "stayed", "root", why)

    def _move(self, table: str, chain: str, rule: Rule) -> None:
        why = "it decides about one tenant's packets, which its slot sees first or last"
        self._plan.settle(self._family, table, chain, rule, "moved", f"slot {table}", why)

    def _map(self, table: str, chain: str, items: list[Filed]) -> None:
        if (table, chain) != ("nat", "PREROUTING"):
            return
        ones = (1 << (32 if self._family == 4 else 128)) - 1
        fitting, self.published_first = mappable(items, self._naming.places, ones)
        seen: set[tuple[m.Match, ...]] = set()
        for item in fitting:
            name = key(item.rule)
            if name not in seen:
                seen.add(name)
                self.published.append(item.rule)
            why = "a port is published before routing has chosen the tenant; one rule with a map says it for all"
            self._plan.settle(self._family, table, chain, item.rule, "mapped", "root, in a map", why)

    def _segment(self, table: str, chain: str, pending: list[Filed]) -> list[str]:
        """Tenants' rules between two common ones: moved, merged, or as they were."""
        left = [item for item in pending if self._plan.fate(item.rule) != "mapped"]
        if not left:
            return []
        reachable = table == "filter" and (chain == "FORWARD" or self._only_forward(chain))
        early = table in self._early and chain == "PREROUTING"
        kept: list[str] = []
        rest: list[Filed] = []
        for item in left:
            linked = any(role in ("in", "out") for role, _ in item.tags)
            inward = not any(role in ("in", "src") for role, _ in item.tags)
            if reachable and inward and self._inward_here:
                rest.append(item)
            elif (reachable or early) and linked:
                self._move(table, chain, item.rule)
            elif reachable:
                why = "it names an address only, so it may meet packets that come in elsewhere"
                self._plan.settle(self._family, table, chain, item.rule, "stayed", "root", why)
                kept.append(item.rule.text)
            else:
                rest.append(item)
        return kept + self._merge(table, chain, rest)

    def _only_forward(self, chain: str) -> bool:
        """Whether FORWARD alone leads to this user chain."""
        if self._filed.policy("filter", chain) is not None:
            return False
        callers = {name for name, _ in self._callers.get(("filter", chain), ())}
        return all(name == "FORWARD" or self._only_forward(name) for name in callers)

    def _merge(self, table: str, chain: str, items: list[Filed]) -> list[str]:
        if not items:
            return []
        by_tenant: dict[int, list[Filed]] = {}
        for item in items:
            by_tenant.setdefault(item.tenant, []).append(item)
        try:
            general = self._by_class(table, chain, by_tenant)
        except CannotSplit as reason:
            for item in items:
                self._plan.settle(self._family, table, chain, item.rule, "stayed", "root", str(reason))
            return [item.rule.text for item in items]
        for item in items:
            why = f"all tenants' rules of this kind say the same; {len(general)} rules say it once"
            self._plan.settle(self._family, table, chain, item.rule, "merged", "root", why)
        self.added += len(general)
        return [self._text(one) for one in general]

    def _by_class(self, table: str, chain: str, by_tenant: Mapping[int, list[Filed]]) -> list[General]:
        """What each class says here; members of a class say the same."""
        roles = {role for items in by_tenant.values() for item in items for role, _ in item.tags}
        if any(len({who for _, who in item.tags}) > 1 for items in by_tenant.values() for item in items):
            raise CannotSplit("it names two tenants")
        lists: dict[int, tuple[General, ...]] = {}
        for kind, tenant in self._first.items():
            mine = by_tenant.get(tenant, [])
            lists[kind] = tuple(self._general.rule(table, chain, item, tenant) for item in mine)
        return merged(lists, self._naming, roles, self._family)

    def _undecided(self) -> dict[int, tuple[General, ...]]:
        """For each class its own rules that may decide what its slots leave to root."""
        regions = [list(region) for region in self._shared]
        regions += [[m.Address("dst", *pool)] for pool in self._naming.places.pools(self._family)]
        lists: dict[int, tuple[General, ...]] = {}
        for kind, tenant in self._first.items():
            found: list[General] = []
            for matches, target in self._flat("FORWARD", tenant, ()):
                if any(_overlap(matches, region) for region in regions):
                    found.append((matches, target))
            lists[kind] = tuple(found)
        return lists

    def _flat(self, chain: str, tenant: int, above: tuple[m.Match, ...]) -> list[General]:
        """The tenant's own outward rules, those of its own chains with the conditions that led there."""
        here = frozenset((tenant,))
        found: list[General] = []
        for item in self._filed.candidates("filter", chain, {"in": here, "src": here}):
            owned = self._filed.chain_owner.get(("filter", chain)) == tenant
            if not item.tags and not owned:
                continue
            target = item.rule.target
            if isinstance(target, t.Jump):
                general = tuple(
                    x for x in item.rule.matches if not isinstance(x, m.Interface) or x.direction == "out"
                )
                found += self._flat(target.chain, tenant, (*above, *self._stripped(general, tenant)))
            elif isinstance(target, t.Accept | t.Drop | t.Reject):
                general, _ = self._general.rule("filter", chain, item, tenant)
                found.append(((*above, *general), target))
            else:
                raise CannotSplit("the tenant's own chains return or go to others, so root cannot repeat them")
        return found

    def _stripped(self, matches: tuple[m.Match, ...], tenant: int) -> tuple[m.Match, ...]:
        names = self._naming.names(tenant, self._family)
        return tuple(x for x in matches if not (isinstance(x, m.Address) and (x.value, x.mask) in names))

    def _undecided_jump(self) -> list[str]:
        return [self._text(((self._naming.link("in"),), t.Jump(UNDECIDED)))]

    def _doors(self) -> dict[str, list[str]]:
        """What slots have let pass: to another slot, undecided, or out."""
        other = t.Return() if self._inward_here else t.Accept()
        general: list[General] = [((self._naming.link("out"),), other)]
        pools = self._naming.places.pools(self._family)
        general += [((m.Address("dst", *pool),), t.Return()) for pool in pools]
        general += [(region, t.Return()) for region in self._shared]
        general += [((m.Interface("out", name),), t.Accept()) for name in self._naming.places.outside]
        try:
            undecided = merged(self._undecided(), self._naming, {"in"}, self._family)
        except CannotSplit as reason:
            self._plan.refusals.append(f"what slots leave to root cannot be decided there: {reason}")
            undecided = []
        self.added += len(general) + len(undecided) + 3
        return {FROM: [self._text(one) for one in general], UNDECIDED: [self._text(one) for one in undecided]}

    def _text(self, one: General) -> str:
        return rule_text(one[0], one[1], self._family)


def _overlap(one: tuple[m.Match, ...], other: list[m.Match]) -> bool:
    """Whether a packet can meet both, as far as addresses and protocols tell."""
    for a in one:
        for b in other:
            if isinstance(a, m.Address) and isinstance(b, m.Address) and a.side == b.side:
                if not a.negated and not b.negated and (a.value ^ b.value) & a.mask & b.mask:
                    return False
            elif isinstance(a, m.Protocol) and isinstance(b, m.Protocol):
                if not a.negated and not b.negated and a.number != b.number:
                    return False
            elif isinstance(a, m.Ports) and isinstance(b, m.Ports) and a.side == b.side != "either":  # noqa: SIM102
                if not a.negated and not b.negated and not _meet(a.ranges, b.ranges):
                    return False
    return True


def _meet(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= end and start <= high for low, high in one for start, end in other)
