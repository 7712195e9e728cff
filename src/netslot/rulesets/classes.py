"""Tenants whose rules are the same up to their names and addresses form a class.

Each tenant's rules are written in words that name the tenant only by place ("its first interface", "its
address plus one", "its second chain"); tenants with equal words are one class. Rules of one chain keep their
order; how tenants' rules are interleaved does not matter. Linear in the number of rules.

Counted as a tenant's own names are: its interfaces, addresses, MACs and chains, a neighbour in its small
network that no other rules name (a gateway), the port that is published for it, addresses that are
translated for it alone, and marks, zones and sets that no other tenant's rules use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets import values
from netslot.rulesets.attribute import Attribution, Directory
from netslot.rulesets.model import Chain, Family, Rule, Table
from netslot.rulesets.tenants import Tenant

_NEIGHBOUR = 8  # addresses: a /29, the largest network that a tenant's own address is taken from

_LINK_LOCAL = 0xFE80 >> 6  # fe80::/10

Token = Hashable


def classes_of(attribution: Attribution) -> list[int]:
    """The class of each tenant, numbered from 0 in the order of the tenants."""
    namer = _Namer(attribution)
    numbers: dict[Token, int] = {}
    result = []
    grouped = attribution.rules_of()
    for index, tenant in enumerate(attribution.tenants):
        words = namer.words(index, tenant, grouped[index])
        result.append(numbers.setdefault(words, len(numbers)))
        grouped[index] = []
    return result


class _Namer:
    def __init__(self, attribution: Attribution) -> None:
        self._owned = attribution.chain_owner
        self._tenants = attribution.tenants
        self._private, self.common = _names_by_use(attribution)

    def words(self, index: int, tenant: Tenant, rules: list[tuple[Family, Table, Chain, Rule]]) -> Token:
        by_chain: dict[tuple[Family, str, str], list[Rule]] = {}
        for family, table, chain, rule in rules:
            by_chain.setdefault((family, table.name, chain.name), []).append(rule)
        one = _OneTenant(self, index, tenant, _published_ports(rule for *_, rule in rules))
        found: list[Token] = []
        common = [key for key in by_chain if self._owned.get(key) != index]
        for key in common:
            found.append((*key, *(one.rule(key, rule) for rule in by_chain[key])))
        # A tenant's chains are numbered as its rules come to them; chains that nothing jumps to come last.
        done = 0
        while done < len(one.chains):
            key = one.chains[done]
            done += 1
            found.append((done, *(one.rule(key, rule) for rule in by_chain.get(key, ()))))
        rest = [key for key in by_chain if key not in one.numbers and self._owned.get(key) == index]
        for key in rest:
            found.append(("unused", *(one.rule(key, rule) for rule in by_chain[key])))
        return tuple(found)

    def near(self, family: Family, value: int, index: int) -> int:
        """The distance from the tenant's address; 0 if it is too far to be a neighbour."""
        for address in self._tenants[index].addresses:
            if address.family == family and abs(value - address.value) < _NEIGHBOUR:
                return value - address.value
        return 0

    def is_own_chain(self, key: tuple[Family, str, str], index: int) -> bool:
        return self._owned.get(key) == index

    def is_private(self, name: Token) -> bool:
        return name in self._private


class _OneTenant:
    """Translates one tenant's rules."""

    def __init__(self, namer: _Namer, index: int, tenant: Tenant, ports: frozenset[int]) -> None:
        self._ports = ports
        self._namer = namer
        self._index = index
        self._interfaces = {name: place for place, name in enumerate(sorted(tenant.interfaces))}
        self._macs = {mac: place for place, mac in enumerate(tenant.macs)}
        self._addresses = {(a.family, a.value, a.mask): place for place, a in enumerate(tenant.addresses)}
        self._own: dict[Token, int] = {}
        self._names = (*tenant.interfaces, *(values.address_text(a.value, a.family) for a in tenant.addresses))
        self.chains: list[tuple[Family, str, str]] = []
        self.numbers: dict[tuple[Family, str, str], int] = {}

    def rule(self, key: tuple[Family, str, str], rule: Rule) -> Token:
        published = type(rule.target) is t.Dnat
        common = () if published else self._namer.common
        found: list[Token] = [
            id(match) if id(match) in common else self._match(match, key[0], published) for match in rule.matches
        ]
        found.append(self._target(rule.target, key))
        return tuple(found)

    def _private(self, name: Token) -> Token:
        """The tenant's own n-th name of this kind, or the name itself if others use it too."""
        if not self._namer.is_private(name):
            return name
        return "own", self._own.setdefault(name, len(self._own))

    def _match(self, match: m.Match, family: Family, published: bool) -> Token:
        match match:
            case m.Interface() | m.Physdev():
                place = self._interfaces.get(match.name)
                if place is None or match.wildcard:
                    return id(match)
                return type(match).__name__, match.direction, place, match.negated
            case m.Address() | m.CtAddress():
                return self._address(match, family, published)
            case m.Mac():
                return "mac", self._macs.get(match.address, match.address), match.negated
            case m.Ports() if match.side == "dst" and (published or self._published(match)):
                return "published", match.module, match.negated
            case m.Mark() | m.Connmark():
                return type(match).__name__, self._private(("mark", match.value, match.mask)), match.negated
            case m.SetMatch():
                name = self._private(("set", match.name))
                return "set", name, match.flags, match.negated, match.options
            case m.Opaque():
                return match.module, tuple(self._text(word) for word in match.words)
        return id(match)

    def _published(self, match: m.Ports) -> bool:
        """Whether it asks for ports that rules publish for this tenant, in a rule that leads there."""
        return all(low == high and low in self._ports for low, high in match.ranges)

    def _address(self, match: m.Address | m.CtAddress, family: Family, published: bool) -> Token:
        place = self._addresses.get((family, match.value, match.mask))
        head = (type(match).__name__, match.side, match.negated)
        if place is not None:
            return *head, "own", place
        distance = self._namer.near(family, match.value, self._index)
        if distance and self._namer.is_private(id(match)):
            return *head, "near", distance, match.mask
        if family == 6 and match.mask == values.ALL_ONES[6] and match.value >> 118 == _LINK_LOCAL:
            name = self._private(id(match))  # made of the tenant's MAC
            return id(match) if name == id(match) else (*head, name)
        if published and match.side == "dst":
            return *head, self._private(("address", family, match.value))
        return id(match)

    def _text(self, word: str) -> str:
        for place, name in enumerate(self._names):
            if name in word:
                word = word.replace(name, f"\0{place}\0")
        return word

    def _target(self, target: t.Target, key: tuple[Family, str, str]) -> Token:
        match target:
            case t.Jump() | t.Goto():
                return type(target).__name__, self._chain((key[0], key[1], target.chain))
            case t.Dnat() | t.Snat():
                return self._translation(target, key[0])
            case t.SetMark() | t.SetConnmark():
                return type(target).__name__, self._private(("mark", target.value, target.mask))
            case t.CtTarget():
                return "CT", self._private(("zone", target.words))
        return target

    def _chain(self, key: tuple[Family, str, str]) -> Token:
        if not self._namer.is_own_chain(key, self._index):
            return key[2]
        if key not in self.numbers:
            self.numbers[key] = len(self.chains)
            self.chains.append(key)
        return self.numbers[key]

    def _translation(self, target: t.Dnat | t.Snat, family: Family) -> Token:
        address: Token = target.to.address
        if target.to.address is not None and target.to.address[0] == target.to.address[1]:
            value = target.to.address[0]
            place = self._addresses.get((family, value, values.ALL_ONES[family]))
            address = ("own", place) if place is not None else self._private(("address", family, value))
        to = target.to
        return type(target).__name__, address, to.ports, to.base_port, to.flags


def _published_ports(rules: Iterable[Rule]) -> frozenset[int]:
    """The ports that DNAT rules ask for, one by one."""
    return frozenset(
        low
        for rule in rules
        if type(rule.target) is t.Dnat
        for match in rule.matches
        if isinstance(match, m.Ports) and match.side == "dst" and not match.negated
        for low, high in match.ranges
        if low == high
    )


def _names_by_use(attribution: Attribution) -> tuple[set[Token], set[int]]:
    """Names that one tenant's rules alone use, and matches that say the same in the rules of several owners.

    The first: marks, zones, sets, translated addresses, and (by identity) matches. The second by identity:
    they name no tenant, so that they stand for themselves in everybody's rules.
    """
    users: dict[Token, int] = {}
    shared: set[Token] = set()
    matches: dict[int, tuple[m.Match, Family]] = {}
    for ruleset in attribution.dump.rulesets:
        for _, _, rule in ruleset.rules():
            owner = attribution.owner[rule]
            for match in rule.matches:
                key = id(match)
                if users.setdefault(key, owner) != owner and key not in shared:
                    shared.add(key)
                    matches[key] = match, ruleset.family
            for name in _names_in(rule, ruleset.family):
                if users.setdefault(name, owner) != owner:
                    shared.add(name)
    directory = Directory(attribution.tenants)
    common = {key for key, (match, family) in matches.items() if not _names_tenant(match, family, directory)}
    return {name for name, owner in users.items() if owner >= 0 and name not in shared}, common


def _names_tenant(match: m.Match, family: Family, directory: Directory) -> bool:
    match match:
        case m.Interface() | m.Physdev():
            return match.name in directory.by_interface
        case m.Address() | m.CtAddress():
            return directory.by_address(family, match.value, match.mask) >= 0
        case m.Mac():
            return match.address in directory.by_mac
    return isinstance(match, m.Opaque)


def _names_in(rule: Rule, family: Family) -> list[Token]:
    found: list[Token] = []
    target = rule.target
    if isinstance(target, t.SetMark | t.SetConnmark):
        found.append(("mark", target.value, target.mask))
    elif isinstance(target, t.CtTarget):
        found.append(("zone", target.words))
    elif isinstance(target, t.Dnat | t.Snat):
        if target.to.address is not None and target.to.address[0] == target.to.address[1]:
            found.append(("address", family, target.to.address[0]))
        found += [("address", family, x.value) for x in rule.matches if isinstance(x, m.Address) and x.side == "dst"]
    for match in rule.matches:
        if type(match) is m.Mark or type(match) is m.Connmark:
            found.append(("mark", match.value, match.mask))
        elif type(match) is m.SetMatch:
            found.append(("set", match.name))
    return found
