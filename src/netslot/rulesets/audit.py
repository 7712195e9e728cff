"""What a ruleset costs: the numbers that a person decides by.

    result = audit(dump)                 # or audit(dump, tenants)
    result.as_dict()                     # the machine output of the command

R is the number of rules of a tenant (they may differ: least, median, most), N the number of tenants, G the
number of rules that belong to no single tenant. All rules together are the sum of the tenants' rules plus G.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.attribute import BY_SET, Attribution, attribute
from netslot.rulesets.classes import classes_of
from netslot.rulesets.flaws import Flaw, find_dead, find_flaws
from netslot.rulesets.graph import reachable, references
from netslot.rulesets.limits import Limit, limits_of
from netslot.rulesets.model import Dump, Family
from netslot.rulesets.tenants import Tenant
from netslot.rulesets.traffic import ANY_PACKET, Walks, walk_all


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing. ``kind`` is a word to sort by; ``rules`` how many rules it is about."""

    kind: str
    text: str
    rules: int = 0


@dataclass(frozen=True, slots=True)
class Walked:
    """How many rules one tenant's packet is tested against. ``position`` counts tenants from 1."""

    tested: int
    tenant: str
    position: int


@dataclass(frozen=True, slots=True)
class ChainCost:
    """One built-in chain, with the chains that it jumps to. ``median`` is the tenant in the middle by cost."""

    family: Family
    table: str
    chain: str
    rules: int
    states: dict[str, dict[str, Walked]]  # new, established -> first, median, worst


@dataclass(frozen=True, slots=True)
class Audit:
    attribution: Attribution
    classes: list[int]
    walks: Walks
    chains: list[ChainCost]
    flaws: list[Flaw]
    limits: list[Limit]
    findings: list[Finding]

    @property
    def rules(self) -> int:
        return self.attribution.dump.rule_count()

    @property
    def tenants(self) -> int:
        return len(self.attribution.tenants)

    @property
    def class_count(self) -> int:
        return len(set(self.classes))

    def rules_per_tenant(self) -> dict[str, int]:
        """Least, median and most rules of a tenant; zeros where there is none."""
        counts = sorted(self.attribution.counts()[0]) or [0]
        return {"min": counts[0], "median": counts[len(counts) // 2], "max": counts[-1]}

    def global_rules(self) -> int:
        """Rules that are no single tenant's: global and shared ones together."""
        _, common, shared = self.attribution.counts()
        return common + shared

    def as_dict(self) -> dict[str, object]:
        """The machine output: the keys of the command's contract."""
        return {
            "rules": self.rules,
            "tenants": self.tenants,
            "rules_per_tenant": self.rules_per_tenant(),
            "global_rules": self.global_rules(),
            "longest_walk": self.walks.longest,
            "classes": self.class_count,
            "chains": [_chain_dict(chain) for chain in self.chains],
            "dead": [_flaw_dict(flaw) for flaw in self.flaws],
            "findings": [
                {"kind": finding.kind, "text": finding.text, "rules": finding.rules} for finding in self.findings
            ],
        }


def audit(dump: Dump, tenants: Sequence[Tenant] | None = None) -> Audit:
    """Audit a dump. Linear in rules plus tenants."""
    attribution = attribute(dump, tenants)
    walks = walk_all(attribution)
    flaws = [*find_dead(attribution), *find_flaws(dump)]
    limits = limits_of(attribution)
    chains = _chain_costs(attribution, walks)
    findings = [
        *_growing(attribution, chains),
        *_what_next(attribution),
        *_from_flaws(flaws),
        *_idle_chains(dump),
        *_near(limits),
        *_unknown(attribution),
    ]
    return Audit(attribution, classes_of(attribution), walks, chains, flaws, limits, findings)


def _chain_costs(attribution: Attribution, walks: Walks) -> list[ChainCost]:
    """The built-in chains in which some packet meets a rule, the costliest first."""
    costs: list[ChainCost] = []
    names = [tenant.name for tenant in attribution.tenants] or [ANY_PACKET.name]
    for ruleset in attribution.dump.rulesets:
        for table in ruleset.tables.values():
            for chain in table.chains.values():
                counts = walks.chains.get((ruleset.family, table.name, chain.name))
                if counts is None or not any(map(any, counts.values())):
                    continue
                states = {state.lower(): _spread(tested, names) for state, tested in counts.items() if any(tested)}
                costs.append(ChainCost(ruleset.family, table.name, chain.name, len(chain.rules), states))
    return sorted(costs, key=lambda cost: -max(state["worst"].tested for state in cost.states.values()))


def _spread(tested: list[int], names: list[str]) -> dict[str, Walked]:
    order = sorted(range(len(tested)), key=tested.__getitem__)
    chosen = {"first": 0, "median": order[len(order) // 2], "worst": order[-1]}
    return {what: Walked(tested[index], names[index], index + 1) for what, index in chosen.items()}


def _growing(attribution: Attribution, chains: list[ChainCost]) -> list[Finding]:
    """Built-in chains in which rules of different tenants stand in one line, which every packet walks along."""
    found = []
    many = len(attribution.tenants)
    for cost in chains:
        in_line = _rules_in_line(attribution, cost)
        if many >= 2 and in_line >= many:
            worst = max(state["worst"].tested for state in cost.states.values())
            found.append(
                Finding(
                    "grows",
                    f"{cost.table} {cost.chain}: {in_line:,} rules of {many:,} tenants stand in one line, about "
                    f"{in_line / many:.0f} of each; a packet is tested against up to {worst:,} rules",
                    in_line,
                )
            )
    return found


def _rules_in_line(attribution: Attribution, cost: ChainCost) -> int:
    """Tenants' rules in the built-in chain, and in chains below it that are no single tenant's."""
    table = next(r for r in attribution.dump.rulesets if r.family == cost.family).tables[cost.table]
    count = 0
    for name in reachable(table, (cost.chain,)):
        if (cost.family, cost.table, name) not in attribution.chain_owner:
            count += sum(attribution.owner[rule] >= 0 for rule in table.chains[name].rules)
    return count


def _what_next(attribution: Attribution) -> list[Finding]:
    """What one more tenant costs: as much as the one in the middle of those that have rules."""
    per_tenant, _, _ = attribution.counts()
    if not any(per_tenant):
        return []
    named = [tenant for tenant, rules in enumerate(per_tenant) if rules]
    median = sorted(named, key=per_tenant.__getitem__)[len(named) // 2]
    changed = {
        (ruleset.family, table.name): sum(len(chain.rules) for chain in table.chains.values())
        for ruleset in attribution.dump.rulesets
        for table in ruleset.tables.values()
        if any(attribution.owner[rule] == median for _, rule in table.rules())
    }
    names = ", ".join(dict.fromkeys(name for _, name in changed))
    return [
        Finding(
            "one more",
            f"one more tenant like {attribution.tenants[median].name} adds {_rules(per_tenant[median])} to "
            f"{names}; iptables-legacy copies a whole table for each change, {_rules(max(changed.values()))} "
            "in the largest of these",
            per_tenant[median],
        )
    ]


def _from_flaws(flaws: list[Flaw]) -> list[Finding]:
    counts = Counter(flaw.kind for flaw in flaws)
    texts = {
        "dead": "about tenants that are not in the list: {}",
        "unreachable": "never applied, as an earlier rule takes all packets or nothing jumps to the chain: {}",
        "duplicate": "repeating an earlier rule of the chain: {}",
    }
    return [
        Finding(kind, text.format(_rules(counts[kind])), counts[kind]) for kind, text in texts.items() if counts[kind]
    ]


def _rules(count: int) -> str:
    return "1 rule" if count == 1 else f"{count:,} rules"


def _idle_chains(dump: Dump) -> list[Finding]:
    """Chains without rules that are jumped to, and chains that nothing jumps to."""
    jumps = unused = 0
    for ruleset in dump.rulesets:
        for table in ruleset.tables.values():
            refs = references(table)
            for chain in table.chains.values():
                if not chain.builtin and chain.name not in refs:
                    unused += 1
                elif not chain.builtin and not chain.rules:
                    jumps += len(refs[chain.name])
    found = []
    if jumps:
        found.append(Finding("empty", f"jumps to a chain that has no rules: {_rules(jumps)}", jumps))
    if unused:
        found.append(Finding("unused", f"user chains that nothing jumps to: {unused}"))
    return found


def _near(limits: list[Limit]) -> list[Finding]:
    return [
        Finding("limit", f"{limit.name}: {limit.used:,} of {limit.limit:,} {limit.unit} ({limit.source})")
        for limit in limits
        if limit.share >= 0.5
    ]


def _unknown(attribution: Attribution) -> list[Finding]:
    """What the dump does not say, so that nobody takes silence for an answer."""
    found = [Finding("note", note) for ruleset in attribution.dump.rulesets for note in ruleset.notes]
    by_set = sum(why.startswith(BY_SET) for why in attribution.why.values())
    if by_set:
        text = f"decided by ipsets, whose members are not in the dump (name tenants with --tenants): {_rules(by_set)}"
        found.append(Finding("sets", text, by_set))
    found += _known_by_half(attribution)
    modules: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for ruleset in attribution.dump.rulesets:
        for _, _, rule in ruleset.rules():
            modules.update(x.module for x in rule.matches if isinstance(x, m.Opaque))
            if isinstance(rule.target, t.OpaqueTarget):
                targets[rule.target.name] += 1
    if modules:
        names = ", ".join(f"{name} ({count:,})" for name, count in modules.most_common(6))
        found.append(Finding("opaque", f"conditions that are taken as perhaps true: {names}", sum(modules.values())))
    if targets:
        names = ", ".join(f"{name} ({count:,})" for name, count in targets.most_common(6))
        found.append(Finding("opaque", f"targets whose verdict is not known: {names}", sum(targets.values())))
    families = {ruleset.family for ruleset in attribution.dump.rulesets}
    if len(families) == 1:
        other = 6 if 4 in families else 4
        found.append(Finding("family", f"the dump has no IPv{other} rules; the host may have some"))
    return found


def _known_by_half(attribution: Attribution) -> list[Finding]:
    """Where rules name links and addresses but never both together, one guest is counted as two."""
    if not attribution.found_in_dump:
        return []
    links = sum(bool(tenant.interfaces) and not tenant.addresses for tenant in attribution.tenants)
    addresses = sum(bool(tenant.addresses) and not tenant.interfaces for tenant in attribution.tenants)
    if not links or not addresses:
        return []
    text = (
        f"tenants known by the link alone: {links:,}, by the address alone: {addresses:,}; no rule says which belong "
        "together, and they may be the same (name them with --tenants)"
    )
    return [Finding("halves", text)]


def _chain_dict(cost: ChainCost) -> dict[str, object]:
    return {
        "family": cost.family,
        "table": cost.table,
        "chain": cost.chain,
        "rules": cost.rules,
        **{
            state: {
                what: {"tested": one.tested, "tenant": one.tenant, "position": one.position}
                for what, one in spread.items()
            }
            for state, spread in cost.states.items()
        },
    }


def _flaw_dict(flaw: Flaw) -> dict[str, object]:
    return {
        "kind": flaw.kind,
        "family": flaw.family,
        "table": flaw.table,
        "chain": flaw.chain,
        "line": flaw.rule.line,
        "rule": flaw.rule.text,
        "reason": flaw.reason,
    }
