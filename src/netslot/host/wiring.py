"""Who has which address on a slot's links, and what is routed where: worked out from the spec, for both kinds.

Numbered slots have a pair of the pool on the link to root, and the same two addresses everywhere on the link to the
workload. A resident's slot (:mod:`netslot.spec.roster`) stands between root and a tenant that keeps its addresses:

    root [gateways] -- [slot] -- [addresses] workload

Root keeps the gateways, because its INPUT rules are about them, and routes the tenant's addresses to the slot. The
slot has none of either: packets to an address of its own would end there, unseen by root's rules or by the tenant.
It answers the tenant's ARP and neighbour discovery in place of root (proxy_arp, proxy_ndp), and both ends name each
other by next hops that are on no link.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import TypeAlias

from netslot.spec.model import ClassSpec, HostSpec
from netslot.spec.roster import Resident

Address: TypeAlias = IPv4Address | IPv6Address
Interface: TypeAlias = IPv4Interface | IPv6Interface
Network: TypeAlias = IPv4Network | IPv6Network

METRIC = 1 << 16
"""Added to a slot's number it is the metric of root's routes to a resident. Each has its own, since routes to devices
that share one share 256 hash chains of the kernel too (decision 0004)."""

_ROOT_HOP: dict[int, Address] = {4: IPv4Address("169.254.110.1"), 6: IPv6Address("fe80::6e73:1")}
_SLOT_HOP: dict[int, Address] = {4: IPv4Address("169.254.110.2"), 6: IPv6Address("fe80::6e73:2")}
"""What a resident's slot calls root's end of the link, and root the slot's. Neither address is on any link."""
_SLOT_LINK_LOCAL = IPv6Interface("fe80::1/64")
"""On a resident's link to its slot: neighbour discovery asks from a link-local address (ndisc_send_ns())."""


@dataclass(frozen=True)
class GuestLink:
    """The link to the workload. ``proxied`` are root's addresses that the slot answers neighbour discovery for."""

    own: tuple[Interface, ...] = ()
    """The slot's addresses on it."""
    neighbours: tuple[Address, ...] = ()
    """The workload's, whose MAC is known."""
    routes: tuple[Network, ...] = ()
    proxied: tuple[IPv6Address, ...] = ()
    mac: str = ""
    """The workload's."""
    inner: tuple[Interface, ...] = ()
    """A container's addresses on its end."""
    hops: tuple[tuple[Address, bool], ...] = ()
    """A container's default gateways, and whether no network on the link holds them."""


@dataclass(frozen=True)
class Wiring:
    """One slot's addresses and routes. ``guest`` is None where a process has no link of its own."""

    own: tuple[Interface, ...]
    """The slot's, on its end of the link to root."""
    hops: tuple[Address, ...]
    """Root, as the slot calls it: its default gateways."""
    onlink: bool
    root: tuple[Interface, ...]
    """Root's, on its end."""
    far: tuple[Address, ...]
    """The slot, as root calls it."""
    routes: tuple[tuple[Network, Address, int], ...]
    """What root routes to the slot by which next hop, with which metric. IPv6 addresses of root's bring no route."""
    guest: GuestLink | None


def wiring(spec: HostSpec, of: ClassSpec, number: int, resident: Resident | None) -> Wiring:
    """The wiring of slot ``number``."""
    if resident is not None:
        return _resident(of, number, resident)
    plan = spec.addresses
    pairs: list[tuple[Interface, Interface]] = [plan.pair(number)]
    routes: tuple[tuple[Network, Address, int], ...] = ()
    if plan.pool6 is not None:
        pairs.append(plan.pair6(number))
        routes = ((plan.network6(number), pairs[1][1].ip, 0),)
    root, own = zip(*pairs, strict=True)
    return Wiring(
        own, tuple(each.ip for each in root), False, root, tuple(each.ip for each in own), routes, _shared(spec, of)
    )


@lru_cache(maxsize=64)
def _shared(spec: HostSpec, of: ClassSpec) -> GuestLink | None:
    """The link to the workload of numbered slots: the same in every slot of a class."""
    if of.guest_interface is None:
        return None
    plan = spec.addresses
    gateways: list[Interface] = [IPv4Interface((plan.gateway, plan.guest.network.prefixlen))]
    guests: list[Interface] = [plan.guest]
    if plan.pool6 is not None:
        gateways.append(IPv6Interface((plan.gateway6, plan.guest6.network.prefixlen)))
        guests.append(plan.guest6)
    return GuestLink(
        own=tuple(gateways),
        neighbours=tuple(each.ip for each in guests),
        mac=of.attachment.guest_mac,
        inner=tuple(guests),
        hops=tuple((each.ip, False) for each in gateways),
    )


def _resident(of: ClassSpec, number: int, one: Resident) -> Wiring:
    versions = [version for version in (4, 6) if any(each.version == version for each in one.addresses)]
    hosts = tuple(_host(each) for each in one.addresses if each.prefixlen == each.max_prefixlen)
    process = of.guest_interface is None
    return Wiring(
        own=hosts if process else (),
        hops=tuple(_ROOT_HOP[version] for version in versions),
        onlink=True,
        root=tuple(_on_root(each) for each in one.gateways if not _on_link(each)),
        far=tuple(_SLOT_HOP[version] for version in versions),
        routes=tuple((each, _SLOT_HOP[each.version], METRIC + number) for each in one.addresses),
        guest=None if process else _guest_link(of, one, versions, hosts),
    )


def _guest_link(of: ClassSpec, one: Resident, versions: list[int], hosts: tuple[Interface, ...]) -> GuestLink:
    """A resident's workload has the addresses that it always had, and finds its gateways where it always did."""
    here = [IPv6Interface((each, 64)) for each in one.gateways if isinstance(each, IPv6Address) and _on_link(each)]
    known = one.mac or (of.attachment.guest_mac if of.attachment.kind == "veth" else None)
    first: dict[int, Address] = {each.version: each for each in reversed(one.gateways)}
    return GuestLink(
        own=tuple(here or [_SLOT_LINK_LOCAL]) if 6 in versions else (),
        neighbours=tuple(each.ip for each in hosts) if known is not None else (),
        routes=one.addresses,
        proxied=tuple(each for each in one.gateways if isinstance(each, IPv6Address) and not _on_link(each)),
        mac=known or of.attachment.guest_mac,
        inner=hosts,
        hops=tuple((first.get(version, _ROOT_HOP[version]), True) for version in versions),
    )


def _on_link(address: Address) -> bool:
    """Whether it is an address that cannot be routed, so that the slot must have it itself."""
    return address.version == 6 and address.is_link_local


def _host(network: Network) -> Interface:
    if isinstance(network, IPv4Network):
        return IPv4Interface((network.network_address, 32))
    return IPv6Interface((network.network_address, 128))


def _on_root(address: Address) -> Interface:
    return IPv4Interface((address, 32)) if isinstance(address, IPv4Address) else IPv6Interface((address, 128))
