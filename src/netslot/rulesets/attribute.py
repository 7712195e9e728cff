"""Whose rule is it? Every rule belongs to one tenant, to nobody (global), or is shared, with the reason.

    attribution = attribute(dump)                    # tenants found in the dump
    attribution = attribute(dump, tenants)           # tenants that somebody names
    attribution.owner[rule]                          # index into attribution.tenants, GLOBAL or SHARED
    attribution.why[rule]                            # one clause of reason, for shared rules

A rule is a tenant's when it stands in a chain that only this tenant's rules jump to, or when it names this
tenant (interface, address, MAC, published address, mark that only this tenant's rules set) and no other.
It is shared when it names several tenants, covers them by a prefix, a wildcard or a bridge, decides by a set
whose members the dump does not show, or stands in a chain that several tenants' rules jump to.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets import values
from netslot.rulesets.discover import discover
from netslot.rulesets.graph import References, references
from netslot.rulesets.interfaces import Kind, kind
from netslot.rulesets.model import Chain, Dump, Family, Rule, Table
from netslot.rulesets.tenants import Tenant, TenantAddress

GLOBAL = -1
SHARED = -2

BY_SET = "decides by the set"

ChainKey = tuple[Family, str, str]  # family, table, chain


@dataclass(frozen=True, slots=True)
class Attribution:
    """``chain_owner`` says whose chain a user chain is; built-in and unowned chains are not in it."""

    dump: Dump
    tenants: tuple[Tenant, ...]
    owner: Mapping[Rule, int]
    why: Mapping[Rule, str]
    chain_owner: Mapping[ChainKey, int]
    found_in_dump: bool

    def rules_of(self) -> list[list[tuple[Family, Table, Chain, Rule]]]:
        """For each tenant its rules, in the order of the dump."""
        grouped: list[list[tuple[Family, Table, Chain, Rule]]] = [[] for _ in self.tenants]
        for ruleset in self.dump.rulesets:
            for table, chain, rule in ruleset.rules():
                index = self.owner[rule]
                if index >= 0:
                    grouped[index].append((ruleset.family, table, chain, rule))
        return grouped

    def counts(self) -> tuple[list[int], int, int]:
        """Rules of each tenant; global rules; shared rules."""
        per_tenant = [0] * len(self.tenants)
        common = shared = 0
        for index in self.owner.values():
            if index >= 0:
                per_tenant[index] += 1
            elif index == SHARED:
                shared += 1
            else:
                common += 1
        return per_tenant, common, shared


def attribute(dump: Dump, tenants: Sequence[Tenant] | None = None) -> Attribution:
    """Attribute every rule of the dump. Linear in the number of rules."""
    people = tuple(discover(dump) if tenants is None else tenants)
    directory = Directory(people)
    owner: dict[Rule, int] = {}
    why: dict[Rule, str] = {}
    chains: dict[ChainKey, int] = {}
    for ruleset in dump.rulesets:
        naming = _Naming(directory, ruleset.family)
        for table in ruleset.tables.values():
            worker = _TableOwners(naming, table, references(table))
            worker.assign(owner, why)
            chains.update({(ruleset.family, table.name, name): who for name, who in worker.owned_chains().items()})
    _follow_marks(dump, owner)
    _add_bridges(dump, people, owner, why)
    ordered = _first_named(people, owner)
    renumber = {old: new for new, old in enumerate(ordered)}
    return Attribution(
        dump,
        tuple(people[old] for old in ordered),
        {rule: renumber.get(index, index) for rule, index in owner.items()},
        why,
        {key: renumber[index] for key, index in chains.items()},
        tenants is None,
    )


def _first_named(people: tuple[Tenant, ...], owner: Mapping[Rule, int]) -> list[int]:
    """Tenants in the order in which their first rule stands; those without rules last."""
    return list(dict.fromkeys([*(index for index in owner.values() if index >= 0), *range(len(people))]))


class Directory:
    """Tenants by what identifies them."""

    def __init__(self, tenants: Sequence[Tenant]) -> None:
        self.tenants = tenants
        self.by_interface = {name: i for i, tenant in enumerate(tenants) for name in tenant.interfaces}
        self.by_mac = {mac: i for i, tenant in enumerate(tenants) for mac in tenant.macs}
        self._by_address = {
            (address.family, address.value, address.mask): i
            for i, tenant in enumerate(tenants)
            for address in tenant.addresses
        }
        self._masks: dict[Family, list[int]] = {}
        for family in (4, 6):
            found = {mask for number, _, mask in self._by_address if number == family}
            self._masks[4 if family == 4 else 6] = sorted(found, reverse=True)
        self._starts: dict[Family, list[int]] = {
            4: sorted(value for family, value, _ in self._by_address if family == 4),
            6: sorted(value for family, value, _ in self._by_address if family == 6),
        }
        self._names = sorted(self.by_interface)

    def by_address(self, family: Family, value: int, mask: int) -> int:
        """The tenant whose address or small network holds all of ``value/mask``; GLOBAL if none does."""
        for own in self._masks[family]:
            if own & mask == own:
                found = self._by_address.get((family, value & own, own))
                if found is not None:
                    return found
        return GLOBAL

    def addresses_in(self, family: Family, low: int, high: int) -> int:
        """How many tenants' addresses begin in this range."""
        starts = self._starts[family]
        return bisect_right(starts, high) - bisect_left(starts, low)

    def interfaces_like(self, stem: str) -> int:
        """How many tenants' interfaces begin with the stem."""
        return bisect_left(self._names, stem + "\U0010ffff") - bisect_left(self._names, stem)


class _Naming:
    """What each distinct match says about tenants; keyed by identity, which the parser shares."""

    def __init__(self, directory: Directory, family: Family) -> None:
        self.directory = directory
        self._family: Family = family
        self._known: dict[int, tuple[int, bool, str]] = {}

    def of_match(self, match: m.Match) -> tuple[int, bool, str]:
        """(tenant or GLOBAL, whether by a negated match, reason if it covers several)."""
        found = self._known.get(id(match))
        if found is None:
            found = self._known[id(match)] = self._look(match)
        return found

    def of_target(self, target: t.Target) -> int:
        if isinstance(target, t.Dnat) and target.to.address is not None:
            low, high = target.to.address
            if low == high:
                return self.directory.by_address(self._family, low, values.ALL_ONES[self._family])
        return GLOBAL

    def _look(self, match: m.Match) -> tuple[int, bool, str]:
        match match:
            case m.Address() | m.CtAddress():
                return self._address(match)
            case m.Interface() | m.Physdev():
                if match.wildcard:
                    count = self.directory.interfaces_like(match.name)
                    return GLOBAL, False, f"{match.name}+ covers {_people(count)}" if count else ""
                return self.directory.by_interface.get(match.name, GLOBAL), match.negated, ""
            case m.Mac():
                return self.directory.by_mac.get(match.address, GLOBAL), match.negated, ""
            case m.IpRange():
                count = self.directory.addresses_in(self._family, match.low, match.high)
                return GLOBAL, False, f"its address range covers {_people(count)}" if count else ""
            case m.SetMatch():
                return GLOBAL, False, f"{BY_SET} {match.name}, whose members are not in the dump"
        return GLOBAL, False, ""

    def _address(self, match: m.Address | m.CtAddress) -> tuple[int, bool, str]:
        who = self.directory.by_address(self._family, match.value, match.mask)
        if who >= 0:
            return who, match.negated, ""
        last = match.value | (match.mask ^ values.ALL_ONES[self._family])
        count = self.directory.addresses_in(self._family, match.value, last)
        prefix = values.network_text(match.value, match.mask, self._family)
        return GLOBAL, False, f"{prefix} covers {_people(count)}" if count else ""


def _people(count: int) -> str:
    return "one tenant" if count == 1 else f"{count} tenants"


class _TableOwners:
    """Owners of the chains and rules of one table."""

    def __init__(self, naming: _Naming, table: Table, refs: References) -> None:
        self._naming = naming
        self._table = table
        self._refs = refs
        self._chains: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._publishing = self._publishers()

    def owned_chains(self) -> dict[str, int]:
        return {name: who for name, who in self._chains.items() if who >= 0}

    def assign(self, owner: dict[Rule, int], why: dict[Rule, str]) -> None:
        for chain in self._table.chains.values():
            who = self._chain(chain.name, ())
            if who >= 0:
                for rule in chain.rules:
                    owner[rule] = who
                continue
            for rule in chain.rules:
                index, reason = self._named(rule)
                if index == GLOBAL and who == SHARED:
                    index, reason = SHARED, self._reasons[chain.name]
                owner[rule] = index
                if reason:
                    why[rule] = reason

    def _publishers(self) -> dict[str, int]:
        """Chains that publish ports for one tenant each, side by side in one chain: the portmap plugin's CNI-DN-...

        By itself such a chain proves nothing: every engine's chain is one while one container publishes a port.
        """
        for_one: dict[str, int] = {}
        for chain in self._table.chains.values():
            people = {self._naming.of_target(rule.target) for rule in chain.rules if type(rule.target) is t.Dnat}
            if len(people) == 1 and GLOBAL not in people and chain.name in self._refs:
                people.update(self._named_by_matches(rule)[0] for rule in chain.rules)
                people -= {GLOBAL, SHARED}
                if len(people) == 1:
                    for_one[chain.name] = people.pop()
        beside: dict[str, set[int]] = {}
        for name, who in for_one.items():
            for caller, _ in self._refs[name]:
                beside.setdefault(caller.name, set()).add(who)
        return {
            name: who
            for name, who in for_one.items()
            if all(len(beside[caller.name]) > 1 for caller, _ in self._refs[name])
        }

    def _named(self, rule: Rule) -> tuple[int, str]:
        """Who is named by the rule, or else by all that the chain says which it jumps to."""
        index, reason = self._named_by_matches(rule)
        if index == GLOBAL and isinstance(rule.target, t.Jump | t.Goto):
            return self._publishing.get(rule.target.chain, GLOBAL), ""
        return index, reason

    def _named_by_matches(self, rule: Rule) -> tuple[int, str]:
        """Who is named by the rule itself. A negated name counts only where no other does."""
        named: set[int] = set()
        negated: set[int] = set()
        cover = ""
        for match in rule.matches:
            who, is_negated, reason = self._naming.of_match(match)
            if who >= 0:
                (negated if is_negated else named).add(who)
            cover = cover or reason
        if type(rule.target) is t.Dnat:
            who = self._naming.of_target(rule.target)
            if who >= 0:
                named.add(who)
        named = named or negated
        if len(named) == 1:
            return named.pop(), ""
        if named:
            names = sorted(self._naming.directory.tenants[who].name for who in named)
            return SHARED, f"names {' and '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        return (SHARED, cover) if cover else (GLOBAL, "")

    def _chain(self, name: str, above: tuple[str, ...]) -> int:
        """Whose chain it is, by the rules that jump to it."""
        if name in self._chains:
            return self._chains[name]
        jumps = self._refs.get(name, [])
        if name in above or self._table.chains[name].builtin:
            return GLOBAL
        owners: dict[int, None] = {}
        for caller, rule in jumps:
            who, _ = self._named(rule)
            calling = self._chain(caller.name, (*above, name))
            # In a tenant's own chain every rule is the tenant's, whomever else it names.
            owners[calling if calling >= 0 or who == GLOBAL else who] = None
        self._chains[name] = result = self._verdict(name, list(owners))
        return result

    def _verdict(self, name: str, owners: list[int]) -> int:
        if len(owners) == 1 and owners[0] != SHARED:
            return owners[0]
        people = [who for who in owners if who >= 0]
        if not people and SHARED not in owners:
            return GLOBAL
        count = _people(len(people)) if people else "shared rules"
        others = " and common rules" if people and len(people) < len(owners) else ""
        self._reasons[name] = f"stands in {name}, which rules of {count}{others} jump to"
        if not people:
            self._reasons[name] = f"stands in {name}, which shared rules jump to"
        return SHARED


def _follow_marks(dump: Dump, owner: dict[Rule, int]) -> None:
    """A rule that nobody is named in, but that matches a mark which one tenant alone sets, is that tenant's.

    Only where two tenants or more have marks of their own: on a host with one tenant every mark would seem so.
    """
    setters: dict[tuple[int, int], set[int]] = {}
    readers: list[tuple[Rule, tuple[int, int]]] = []
    for ruleset in dump.rulesets:
        for _, _, rule in ruleset.rules():
            target = rule.target
            if isinstance(target, t.SetMark | t.SetConnmark) and target.value:
                setters.setdefault((target.value, target.mask), set()).add(owner[rule])
            elif owner[rule] == GLOBAL:
                for match in rule.matches:
                    if isinstance(match, m.Mark | m.Connmark) and not match.negated:
                        readers.append((rule, (match.value, match.mask)))
    own = {mark: min(who) for mark, who in setters.items() if len(who) == 1 and min(who) >= 0}
    if len(set(own.values())) < 2:
        return
    for rule, mark in readers:
        if mark in own:
            owner[rule] = own[mark]


def _add_bridges(dump: Dump, people: tuple[Tenant, ...], owner: dict[Rule, int], why: dict[Rule, str]) -> None:
    """A common rule about a bridge that tenants' rules name too is shared by the tenants on it."""
    on_bridge: dict[str, set[int]] = {}
    common: list[tuple[Rule, str]] = []
    own = {name for tenant in people for name in tenant.interfaces}
    kinds: dict[str, bool] = {}
    for rule, name in _named_interfaces(dump):
        if name not in kinds:
            kinds[name] = name not in own and kind(name) is Kind.BRIDGE
        if kinds[name]:
            if owner[rule] >= 0:
                on_bridge.setdefault(name, set()).add(owner[rule])
            elif owner[rule] == GLOBAL:
                common.append((rule, name))
    for rule, name in common:
        if name in on_bridge and owner[rule] == GLOBAL:
            owner[rule] = SHARED
            why[rule] = f"speaks of {name}, on which {_people(len(on_bridge[name]))} can be seen"


def _named_interfaces(dump: Dump) -> Iterator[tuple[Rule, str]]:
    for ruleset in dump.rulesets:
        for _, _, rule in ruleset.rules():
            for match in rule.matches:
                if type(match) is m.Interface and not match.wildcard:
                    yield rule, match.name


__all__ = ["GLOBAL", "SHARED", "Attribution", "Directory", "Tenant", "TenantAddress", "attribute"]
