"""Who is where: tenants' links and addresses, the host's own addresses, the interfaces to the outside.

A dump holds rules, not links and routes. What it does not hold is assumed here, in one place, and every
assumption has its sentence in ``Places.assumptions`` for the reader of a proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Dump, Family, Ruleset
from netslot.rulesets.proof.named import asked_for_in_input, named_links
from netslot.rulesets.proof.terms import Number, Truth, any_of, both, either, masked_equal, negate
from netslot.rulesets.tenants import Tenant, TenantAddress
from netslot.rulesets.values import ALL_ONES, address_text, network_text

Pattern = tuple[int, int]  # value, mask

NOBODY = -1

_UNKNOWN_HOST: Mapping[Family, int] = {4: 0xC6120001, 6: 0x20010002 << 96 | 1}
"""198.18.0.1 and 2001:2::1, of the benchmarking ranges: stand for a host address that no rule names."""


_LOOPBACK: Mapping[Family, Pattern] = {4: (127 << 24, 0xFF << 24), 6: (1, ALL_ONES[6])}
_GROUPS: Mapping[Family, tuple[Pattern, ...]] = {
    4: ((0xE << 28, 0xF << 28), (ALL_ONES[4], ALL_ONES[4])),
    6: ((0xFF << 120, 0xFF << 120),),
}
_LINK_LOCAL: Pattern = (0xFE80 << 112, 0xFFC0 << 112)


def is_loopback(address: Number, family: Family) -> Truth:
    """127.0.0.0/8 or ::1."""
    return _member(address, (_LOOPBACK[family],), family)


def is_group(address: Number, family: Family) -> Truth:
    """Multicast, or the broadcast of all ones: for whoever hears it, and not forwarded."""
    return _member(address, _GROUPS[family], family)


def stays_on_link(address: Number, family: Family) -> Truth:
    """What the host hears though it is none of the addresses that rules name, and never forwards."""
    return _member(address, (*_GROUPS[family], *((_LINK_LOCAL,) if family == 6 else ())), family)


@dataclass(frozen=True)
class Places:
    """``gateways[family][tenant]``: the host's addresses on that tenant's link; ``hosts``: its other ones.

    A tenant has one link of its own, or none: then it may be behind any interface, together with others.
    ``left_out``: those who can't be told apart by the rules, and why; their rules are the host's own.
    ``uplinks``: interfaces by which rules let tenants' packets out: no tenant is behind them.
    ``strangers``: links that no rule names but by a wildcard, and that no tenant's packets leave by. ``stems``: the
    wildcards that name tenants' links, and nothing else.
    """

    tenants: tuple[Tenant, ...]
    gateways: Mapping[Family, tuple[tuple[int, ...], ...]]
    hosts: Mapping[Family, tuple[int, ...]]
    outside: tuple[str, ...]
    groups: Mapping[str, int]
    guessed: frozenset[Family] = frozenset()
    left_out: tuple[tuple[str, str], ...] = ()
    uplinks: frozenset[str] = frozenset()
    strangers: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()

    @cached_property
    def link_owner(self) -> dict[str, int]:
        return {name: index for index, tenant in enumerate(self.tenants) for name in tenant.interfaces}

    def is_slots_group(self, value: int, mask: int) -> bool:
        """Whether some slot's link is in this group, and so no other link is. One bit is no group."""
        if mask not in self._slot_groups:
            self._slot_groups[mask] = frozenset(group & mask for group in self.groups.values())
        return mask.bit_count() > 1 and value in self._slot_groups[mask]

    @cached_property
    def _slot_groups(self) -> dict[int, frozenset[int]]:
        return {}

    @cached_property
    def _by_mask(self) -> dict[Family, list[tuple[int, dict[int, int]]]]:
        found: dict[Family, dict[int, dict[int, int]]] = {4: {}, 6: {}}
        for index, tenant in enumerate(self.tenants):
            for address in tenant.addresses:
                found[address.family].setdefault(address.mask, {})[address.value] = index
        return {family: sorted(masks.items(), reverse=True) for family, masks in found.items()}

    def owner_of(self, value: int, mask: int, family: Family) -> int:
        """The tenant whose address (or network) holds all of ``value/mask``."""
        for own, owners in self._by_mask[family]:
            if own & mask == own:
                found = owners.get(value & own)
                if found is not None:
                    return found
        return NOBODY

    def link(self, tenant: int) -> str:
        """The tenant's own link, '' if it has none."""
        return next(iter(self.tenants[tenant].interfaces), "")

    @cached_property
    def inside(self) -> tuple[str, ...]:
        """The interfaces that rules name and that tenants without a link of their own may be behind."""
        return tuple(name for name in self.outside if name not in self.uplinks)

    @cached_property
    def linked(self) -> bool:
        """Whether every tenant has a link of its own."""
        return all(tenant.interfaces for tenant in self.tenants)

    def addresses(self, tenant: int, family: Family) -> tuple[TenantAddress, ...]:
        return tuple(a for a in self.tenants[tenant].addresses if a.family == family)

    def is_tenants(self, address: Number, tenant: int, family: Family) -> Truth:
        width = 32 if family == 4 else 128
        return any_of(masked_equal(address, a.mask, a.value, width) for a in self.addresses(tenant, family))

    def is_any_tenants(self, address: Number, family: Family) -> Truth:
        if isinstance(address, int):
            return self.owner_of(address, ALL_ONES[family], family) != NOBODY
        return _member(address, self._cover[family], family)

    def is_local(self, address: Number, family: Family) -> Truth:
        """One of the host's own addresses, loopback included."""
        if isinstance(address, int):
            return address in self._local[family] or is_loopback(address, family)
        return either(_member(address, self._local_cover[family], family), is_loopback(address, family))

    def is_local_on(self, address: Number, interface: str, family: Family) -> Truth:
        owner = self.link_owner.get(interface, NOBODY)
        own = self.hosts[family] if owner == NOBODY else self.gateways[family][owner]
        ones = ALL_ONES[family]
        return _member(address, [(value, ones) for value in own], family)

    def is_spare(self, address: Number, family: Family) -> Truth:
        """In the pool of tenants' addresses or gateways, but nobody's: neither a tenant's nor the host's."""
        inside = _member(address, self.pools(family), family)
        if inside is False:
            return False
        taken = any_of((self.is_any_tenants(address, family), self.is_local(address, family)))
        return both(inside, negate(taken))

    def pool(self, family: Family) -> Pattern | None:
        """The bits that all tenants' addresses share: the narrowest pattern that holds them all."""
        return self._pools[family]

    def gateway_pool(self, family: Family) -> Pattern | None:
        """The same of the host's addresses on tenants' links."""
        return self._gateway_pools[family]

    def tenant_patterns(self, family: Family) -> list[Pattern]:
        """Every address and network of a tenant's."""
        return [(a.value, a.mask) for each in self.tenants for a in each.addresses if a.family == family]

    def gateway_patterns(self, family: Family) -> list[Pattern]:
        """Every address of the host's on a tenant's link."""
        return [(value, ALL_ONES[family]) for own in self.gateways[family] for value in own]

    def pools(self, family: Family) -> list[Pattern]:
        return [pool for pool in (self.pool(family), self.gateway_pool(family)) if pool is not None]

    @cached_property
    def _gateway_pools(self) -> dict[Family, Pattern | None]:
        return {family: common_pattern(self.gateway_patterns(family)) for family in self.gateways}

    @cached_property
    def _pools(self) -> dict[Family, Pattern | None]:
        families: tuple[Family, ...] = (4, 6)
        return {family: common_pattern(self.tenant_patterns(family)) for family in families}

    @cached_property
    def _cover(self) -> dict[Family, list[Pattern]]:
        return {
            family: cover([(value, mask) for mask, owners in masks for value in owners])
            for family, masks in self._by_mask.items()
        }

    @cached_property
    def _local(self) -> dict[Family, frozenset[int]]:
        return {f: frozenset(self.hosts[f]).union(*self.gateways[f]) for f in self.hosts}

    @cached_property
    def _local_cover(self) -> dict[Family, list[Pattern]]:
        return {f: cover([(value, ALL_ONES[f]) for value in own]) for f, own in self._local.items()}

    def assumptions(self, families: Sequence[Family]) -> list[str]:
        """What a proof over these places takes for granted, in sentences."""
        said = [
            "a connection is in the same state for the slot's tracking as for root's",
            "no packet comes in under an address of the host's (the kernel drops it), ends its life on the way, or "
            "is a fragment where connections are tracked (tracking puts them together)",
        ]
        if self.linked:
            out = " or ".join(self.outside)
            said = [
                "a packet goes out by a tenant's link exactly when its destination is that tenant's address",
                f"what tenants send elsewhere goes out by {out}, the interfaces that the ruleset names",
                *said,
            ]
        elif self.uplinks:
            said.append(f"no tenant is behind {' or '.join(sorted(self.uplinks))}, by which rules let tenants out")
        if self.stems:
            names = " and ".join(f"{stem}+" for stem in self.stems)
            said.append(f"every link that {names} means is a tenant's, or is named by another rule")
        for family in families:
            if family in self.guessed:
                said.append(f"the host has IPv{family} addresses, and none of them is in a network that a rule names")
            else:
                texts = [address_text(a, family) for a in sorted(self._local[family])]
                shown = ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
                said.append(
                    f"the host's own IPv{family} addresses are {shown}; gateways are on the tenant's own link"
                )
            pools = " and ".join(network_text(*pool, family) for pool in self.pools(family))
            if pools and self.linked:
                said.append(
                    f"addresses of {pools} that are nobody's are no source of packets from the host or outside"
                )
        return said


def _member(address: Number, patterns: Iterable[Pattern], family: Family) -> Truth:
    width = 32 if family == 4 else 128
    return any_of(masked_equal(address, mask, value, width) for value, mask in patterns)


def common_pattern(patterns: Sequence[Pattern]) -> Pattern | None:
    """The narrowest value/mask that holds all of them; None when there are none."""
    if not patterns:
        return None
    value, mask = patterns[0]
    for other, bits in patterns[1:]:
        mask &= bits & ~(value ^ other)
    return value & mask, mask


def cover(patterns: Sequence[Pattern]) -> list[Pattern]:
    """Exactly the union, in few patterns: pairs that differ in one masked bit are joined, bit by bit."""
    current = set(patterns)
    differing = _differing(current)
    bits = sorted({bit for mask in {mask for _, mask in current} for bit in _bits(differing & mask)})
    for bit in bits:
        for value, mask in list(current):
            twin = (value ^ bit, mask)
            if mask & bit and not value & bit and twin in current:
                current -= {(value, mask), twin}
                current.add((value, mask & ~bit))
    return sorted(current)


def _differing(patterns: set[Pattern]) -> int:
    first = next(iter(patterns), (0, 0))[0]
    found = 0
    for value, _ in patterns:
        found |= value ^ first
    return found


def _bits(number: int) -> list[int]:
    return [1 << place for place in range(number.bit_length()) if number >> place & 1]


def survey(dump: Dump, tenants: Sequence[Tenant], host_addresses: Sequence[tuple[Family, int]] = ()) -> Places:
    """Read from the rules what they say about the host: its interfaces, its addresses on tenants' links.

    ``host_addresses`` are further addresses of the host that somebody knows.
    """
    tenants, left_out = _distinct(tenants, _bridge_ports(dump))
    bare = Places(tenants, {}, {}, (), {})
    gateways: dict[Family, tuple[tuple[int, ...], ...]] = {}
    hosts: dict[Family, tuple[int, ...]] = {}
    guessed: set[Family] = set()
    for family in (4, 6):
        key: Family = 4 if family == 4 else 6
        ruleset = dump.family(key)
        found: dict[int, set[int]] = {}  # address: tenants in whose INPUT rules it stands, NOBODY for global ones
        for value, link, _ in asked_for_in_input(ruleset) if ruleset is not None else ():
            if bare.owner_of(value, ALL_ONES[key], key) == NOBODY:
                found.setdefault(value, set()).add(bare.link_owner.get(link, NOBODY))
        own: list[list[int]] = [[] for _ in tenants]
        common = [value for number, value in host_addresses if number == key]
        for value, owners in found.items():
            if len(owners) == 1 and NOBODY not in owners:
                own[next(iter(owners))].append(value)
            elif value not in common:
                common.append(value)
        if not common and not any(own):
            common, guessed = [_UNKNOWN_HOST[key]], guessed | {key}
        gateways[key] = tuple(tuple(values) for values in own)
        hosts[key] = tuple(common)
    links = bare.link_owner
    named = named_links(dump.rulesets)
    leaving, entering = named.samples(links)
    outside = (*(name for name in named.exact if name not in links and name != "lo"), *leaving) or ("uplink0",)
    uplinks = frozenset(_uplinks(dump, bare)) - links.keys()
    stems = named.stems_of(links)
    return Places(tenants, gateways, hosts, outside, {}, frozenset(guessed), left_out, uplinks, entering, stems)


def widened(places: Places, rulesets: Mapping[Family, Ruleset]) -> Places:
    """The places with all that these rules name too: what only one side of a comparison tells apart is told apart."""
    named = named_links(rulesets.values())
    known = {*places.outside, *places.strangers, "lo"}
    leaving, entering = named.samples(places.link_owner)
    fresh = [name for name in (*named.exact, *leaving) if name not in known and name not in places.link_owner]
    hosts = dict(places.hosts)
    for family, ruleset in rulesets.items():
        for value, _, _ in asked_for_in_input(ruleset):
            taken = places.is_local(value, family) or places.owner_of(value, ALL_ONES[family], family) != NOBODY
            if not taken and value not in hosts[family]:
                hosts[family] = (*hosts[family], value)
    strangers = (*places.strangers, *(name for name in entering if name not in {*known, *fresh}))
    return replace(places, outside=(*places.outside, *fresh), strangers=strangers, hosts=hosts)


def _uplinks(dump: Dump, bare: Places) -> Iterator[str]:
    """Interfaces that stand as the way out in a rule about one tenant's packets, or that hide tenants' addresses."""
    for ruleset in dump.rulesets:
        pool = bare.pool(ruleset.family)
        for _, _, rule in ruleset.rules():
            out = [x for x in rule.matches if isinstance(x, m.Interface) and x.direction == "out"]
            source = [x for x in rule.matches if isinstance(x, m.Address) and x.side == "src" and not x.negated]
            if not source or not out or out[0].negated or out[0].wildcard:
                continue
            if any(isinstance(x, m.Address) and x.side == "dst" for x in rule.matches):
                continue
            one = bare.owner_of(source[0].value, source[0].mask, ruleset.family) != NOBODY
            hides = isinstance(rule.target, t.Masquerade | t.Snat) and pool is not None
            if one or (hides and pool is not None and not (pool[0] ^ source[0].value) & source[0].mask):
                yield out[0].name


def _bridge_ports(dump: Dump) -> frozenset[str]:
    """Links that rules name as a bridge's ports. What comes by one is bridged, and from a slot it would be routed:
    there ``physdev`` matches nothing (net/netfilter/xt_physdev.c: it asks what the bridge has noted)."""
    return frozenset(
        match.name
        for ruleset in dump.rulesets
        for _, _, rule in ruleset.rules()
        for match in rule.matches
        if isinstance(match, m.Physdev) and not match.wildcard
    )


def _distinct(
    tenants: Sequence[Tenant], ports: frozenset[str]
) -> tuple[tuple[Tenant, ...], tuple[tuple[str, str], ...]]:
    """The tenants that have addresses and not several links; a link that several are behind is nobody's own, and
    neither is a bridge's port."""
    behind = Counter(name for tenant in tenants for name in tenant.interfaces)
    kept: list[Tenant] = []
    left_out: list[tuple[str, str]] = []
    for tenant in tenants:
        own = tuple(name for name in tenant.interfaces if behind[name] == 1 and name not in ports)
        if len(own) > 1:
            left_out.append((tenant.name, "more than one link; a slot has one"))
        elif not tenant.addresses:
            left_out.append((tenant.name, "no address is known, so it is not known which packets go to it"))
        else:
            kept.append(replace(tenant, interfaces=own))
    return tuple(kept), tuple(left_out)
