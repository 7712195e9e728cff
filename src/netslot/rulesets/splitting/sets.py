"""The root ruleset where tenants have no link of their own: nothing can move, and rules of many become sets.

Tenants behind one bridge are told apart by address alone, so their rules stay in root. Rules that differ in
addresses and ports only become one rule and a set; chains of tenants' own that say the same become one chain.
The rules then name no tenant, and are as many for ten tenants as for a thousand.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.ipsets import PREFIX, IpSet, Part
from netslot.rulesets.model import Chain, Family, Rule
from netslot.rulesets.proof.places import NOBODY, Places
from netslot.rulesets.proof.tagged import FiledRuleset
from netslot.rulesets.splitting.gathering import (
    NEUTRAL,
    Aim,
    Gatherer,
    Group,
    OwnChain,
    Shape,
    kind_of,
    parts_of,
)
from netslot.rulesets.splitting.plan import Fate, Plan
from netslot.rulesets.splitting.publishing import Maps
from netslot.rulesets.write import rule_text

_DEEPEST = 8
"""Own chains that call each other deeper than this are left as they are."""


class SetRules:
    """Makes rules with sets of one family's rules, and collects the sets."""

    def __init__(self, places: Places, family: Family) -> None:
        self._places, self._family = places, family
        self.sets: list[IpSet] = []

    def gather(self, rules: Sequence[tuple[Rule, int]]) -> list[tuple[str, list[Rule]]]:
        """Rules with their tenants, gathered: the text of each new rule, and the rules that it stands for."""
        gatherer = Gatherer(self._places, self._family, lambda rule, _: rule.target)
        found: list[tuple[str, list[Rule]]] = []
        for group in gatherer.gather(rules):
            members = [member.rule for member in group.members]
            if group.shape is None or isinstance(group.shape.aim, OwnChain):
                found += [(rule.text, [rule]) for rule in members]
            else:
                found.append((self.text(group, group.shape, group.shape.aim), members))
        return found

    def text(self, group: Group, shape: Shape, target: t.Target) -> str:
        """The rule that stands for a group."""
        kind, flags = kind_of(group.members, shape, self._family)
        elements = {part: None for member in group.members for part in parts_of(member, shape)}
        name = self.set(kind, tuple(elements))
        return rule_text((*shape.rest, m.SetMatch(name, flags)), target, self._family)

    def set(self, kind: str, elements: tuple[tuple[Part, ...], ...]) -> str:
        """The name of a set with these elements."""
        for known in self.sets:
            if known.kind == kind and known.elements == elements:
                return known.name
        name = f"{PREFIX}{len(self.sets)}" if self._family == 4 else f"{PREFIX}v6-{len(self.sets)}"
        self.sets.append(IpSet(name, kind, self._family, elements))
        return name


@dataclass
class _Twins:
    """Own chains that say the same, called on the same side of a packet: one chain called ``name``."""

    name: str
    sides: tuple[m.Side, ...]
    chains: dict[int, str] = field(default_factory=dict)  # by tenant


class SetsWriter:
    """Writes one family's root ruleset with sets."""

    def __init__(self, filed: FiledRuleset, places: Places, plan: Plan) -> None:
        self._filed, self._places, self._plan = filed, places, plan
        self._family: Family = filed.ruleset.family
        self._table = ""
        self._shapes: dict[Hashable, int] = {}
        self._shape_of: dict[tuple[str, str], int | None] = {}
        self._twins: dict[tuple[str, int, tuple[m.Side, ...]], _Twins] = {}
        self._written: dict[str, list[str]] = {}
        self.set_rules = SetRules(places, self._family)
        self.maps = Maps(places, self._family, plan)

    def write(self) -> str:
        """The text for iptables-restore."""
        lines: list[str] = []
        for table in self._filed.ruleset.tables.values():
            self._table, self._written = table.name, {}
            for chain in table.chains.values():
                if (table.name, chain.name) not in self._filed.chain_owner:
                    self._written[chain.name] = self._chain(chain)
            self._twin_chains()
            self._keep_called()
            lines.append(f"*{table.name}")
            for name in self._written:
                known = table.chains.get(name)
                lines.append(f":{name} {(known.policy if known is not None else None) or '-'} [0:0]")
            for name, texts in self._written.items():
                lines += [f"-A {name} {text}" if text else f"-A {name}" for text in texts]
            lines.append("COMMIT")
        return "\n".join(lines) + "\n"

    def _chain(self, chain: Chain) -> list[str]:
        items = self._filed.chains[self._table, chain.name]
        if self._table == "nat":
            self.maps.take(chain.name, items)
        left = [item for item in items if self._plan.fate(item.rule) != "mapped"]
        gatherer = Gatherer(self._places, self._family, self._aim)
        texts: list[str] = []
        for group in gatherer.gather([(item.rule, item.tenant) for item in left]):
            texts += self._group(chain.name, group)
        return texts

    def _group(self, chain: str, group: Group) -> list[str]:
        """The rule that stands for a group, or the group's rules as they were."""
        shape = group.shape
        if shape is None:
            for member in group.members:
                self._stay(chain, member.rule, member.tenant)
            return [member.rule.text for member in group.members]
        target = shape.aim
        if isinstance(target, OwnChain):
            chains = {
                x.tenant: x.rule.target.chain for x in group.members if isinstance(x.rule.target, t.Jump | t.Goto)
            }
            called = self._call(target.shape, shape.sides, chains)
            target = t.Goto(called) if target.goto else t.Jump(called)
        text = self.set_rules.text(group, shape, target)
        others = len(group.members) - 1
        why = "others of its kind would differ in addresses and ports only; a set lists these"
        if others:
            why = f"it differs from {others} more in addresses and ports only; a set lists these"
        for member in group.members:
            self._settle(chain, member.rule, "merged", "root, with a set", why)
        return [text]

    def _stay(self, chain: str, rule: Rule, tenant: int) -> None:
        why = "it names no tenant"
        if tenant != NOBODY:
            why = "no set can say for several tenants what it says of one"
        self._settle(chain, rule, "stayed", "root", why)

    def _settle(self, chain: str, rule: Rule, fate: Fate, to: str, why: str) -> None:
        self._plan.settle(self._family, self._table, chain, rule, fate, to, why)

    # tenants' own chains

    def _aim(self, rule: Rule, tenant: int) -> Aim | None:
        """The target, or what its chain says if that is the tenant's own; None if that cannot be one of many."""
        target = rule.target
        if not isinstance(target, t.Jump | t.Goto):
            return target
        if self._filed.chain_owner.get((self._table, target.chain)) != tenant:
            return target
        own = self._places.addresses(tenant, self._family)
        if len(own) != 1 or not all(self._own(x, tenant) for x in rule.matches if self._names_a_tenant(x)):
            return None
        shape = self._shape(target.chain, tenant, 0)
        return None if shape is None else OwnChain(shape, isinstance(target, t.Goto))

    def _shape(self, chain: str, tenant: int, depth: int) -> int | None:
        """The number of what a tenant's own chain says, its own names left out."""
        place = (self._table, chain)
        if place not in self._shape_of:
            words: list[Hashable] = []
            for item in self._filed.chains[place]:
                word = self._words(item.rule, tenant, depth)
                if word is None:
                    self._shape_of[place] = None
                    return None
                words.append(word)
            self._shape_of[place] = self._shapes.setdefault(tuple(words), len(self._shapes))
        return self._shape_of[place]

    def _words(self, rule: Rule, tenant: int, depth: int) -> Hashable | None:
        target: Hashable = rule.target
        if isinstance(rule.target, t.Jump | t.Goto):
            owner = self._filed.chain_owner.get((self._table, rule.target.chain), NOBODY)
            if owner not in (NOBODY, tenant) or depth == _DEEPEST:
                return None
            if owner == tenant:
                inner = self._shape(rule.target.chain, tenant, depth + 1)
                if inner is None:
                    return None
                target = (type(rule.target).__name__, inner)
        words: list[Hashable] = []
        for match in rule.matches:
            if isinstance(match, m.Opaque) and match.stateful and not isinstance(rule.target, NEUTRAL):
                return None
            own = self._own(match, tenant)
            if own is None and self._names_a_tenant(match):
                return None
            words.append(match if own is None else ("own", *own))
        return (tuple(words), target)

    def _names_a_tenant(self, match: m.Match) -> bool:
        if not isinstance(match, m.Address):
            return False
        return self._places.owner_of(match.value, match.mask, self._family) != NOBODY

    def _own(self, match: m.Match, tenant: int) -> tuple[m.Side, int] | None:
        """Side and mask, if it says that the address there is the tenant's."""
        if isinstance(match, m.Address) and not match.negated:
            for own in self._places.addresses(tenant, self._family):
                if (own.value, own.mask) == (match.value, match.mask):
                    return match.side, match.mask
        return None

    def _call(self, shape: int, sides: tuple[m.Side, ...], chains: Mapping[int, str]) -> str:
        """The chain that stands for these of the tenants."""
        name = f"{PREFIX}{len(self._twins)}"
        twins = self._twins.setdefault((self._table, shape, sides), _Twins(name, sides))
        why = f"{len(chains)} tenants' chains say the same; one chain says it for all"
        for tenant, chain in chains.items():
            twins.chains.setdefault(tenant, chain)
            for item in self._filed.chains[self._table, chain]:
                self._settle(chain, item.rule, "merged", f"root, chain {twins.name}", why)
        return twins.name

    def _twin_chains(self) -> None:
        """Write the chains that stand for many; their rules may call further ones."""
        while left := [
            one
            for (table, _, _), one in self._twins.items()
            if table == self._table and one.name not in self._written
        ]:
            for one in left:
                rows = zip(*(self._filed.chains[self._table, chain] for chain in one.chains.values()), strict=True)
                rules = [[item.rule for item in row] for row in rows]
                self._written[one.name] = [self._row(one, list(one.chains), row) for row in rules]

    def _row(self, twins: _Twins, tenants: list[int], rules: list[Rule]) -> str:
        """One rule of all twins. What led here needs not be asked again."""
        found: list[m.Match] = []
        for match in rules[0].matches:
            own = self._own(match, tenants[0])
            if own is None:
                found.append(match)
            elif own[0] not in twins.sides:
                found.append(self._pairs(twins.sides[0], own[0], tenants))
        target = rules[0].target
        if isinstance(target, t.Jump | t.Goto) and (self._table, target.chain) in self._filed.chain_owner:
            shape = self._shape_of[self._table, target.chain]
            assert shape is not None
            below = {
                tenant: rule.target.chain
                for tenant, rule in zip(tenants, rules, strict=True)
                if isinstance(rule.target, t.Jump | t.Goto)
            }
            target = replace(target, chain=self._call(shape, twins.sides, below))
        return rule_text(found, target, self._family)

    def _pairs(self, near: m.Side, far: m.Side, tenants: list[int]) -> m.Match:
        """The tenant's own address on the other side: each goes with the address that led here."""
        own = [self._places.addresses(tenant, self._family)[0] for tenant in tenants]
        elements = tuple(((one.value, one.mask), (one.value, one.mask)) for one in own)
        return m.SetMatch(self.set_rules.set("hash:net,net", elements), (near, far))

    def _keep_called(self) -> None:
        """Own chains that a rule which stays leads to, as they were; those that nothing leads to have no use."""
        chains = self._filed.chains
        owned = {chain for table, chain in self._filed.chain_owner if table == self._table}
        queue = [name for name in self._written if (self._table, name) in chains]
        while queue:
            for item in chains[self._table, queue.pop()]:
                target = item.rule.target
                if not isinstance(target, t.Jump | t.Goto) or self._plan.fate(item.rule) != "stayed":
                    continue
                if target.chain in owned and target.chain not in self._written:
                    self._written[target.chain] = [one.rule.text for one in chains[self._table, target.chain]]
                    for one in chains[self._table, target.chain]:
                        self._settle(target.chain, one.rule, "stayed", "root", "its chain is called from root")
                    queue.append(target.chain)
        for name in owned - self._written.keys():
            for item in chains[self._table, name]:
                if self._plan.fate(item.rule) is None:
                    self._settle(name, item.rule, "stayed", "nowhere", "no rule leads to its chain")
