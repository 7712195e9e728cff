"""The playing field: a host's root namespace, a server outside, tenants' namespaces, and guests behind them.

Every packet of a measurement takes the same way in all shapes:

    guest ──veth── tenant's namespace ──veth── root namespace ──veth── outside (server)

The field lives on a :mod:`netslot.bench.stage`, whose own network namespace plays the root namespace. All
calls run on one :class:`netslot.kernel.netns.Worker` thread.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from netslot.bench.tenants import GATEWAY, GUEST, SERVER, UPLINK
from netslot.host.plan import UPLINK as UPLINK_INDEX
from netslot.kernel import netlink, netns
from netslot.kernel import rtnetlink as rt

_UPLINK_ROOT, _UPLINK_OUTSIDE = "198.51.100.1", "198.51.100.2"
_DEFAULT = IPv4Network("0.0.0.0/0")


@dataclass(frozen=True, slots=True)
class Place:
    """A tenant's place on the host: its root-side link, the /31 of that link, and its namespace's name."""

    netns: str
    interface: str
    root_address: str
    address: str


@dataclass(frozen=True, slots=True)
class Guest:
    """A namespace with a workload's address, behind the place of a tenant. ``netns`` is an open descriptor."""

    slot: int
    netns: int


def prepare_root() -> None:
    """Make the calling thread's fresh namespace a router with an uplink; the far end is in a namespace
    that is pinned as ``outside``."""
    _forward()
    quiet_ipv6()
    netns.create("outside")
    outside = netns.open_named("outside")
    with netlink.Socket() as sock:
        sock.execute([rt.veth(UPLINK, "up", peer_netns=outside)])
        index = _link_index(UPLINK)
        sock.execute(
            [
                rt.set_link(1, up=True),
                rt.add_address(index, IPv4Interface(f"{_UPLINK_ROOT}/24")),
                rt.set_link(index, up=True),
                rt.add_route(_DEFAULT, gateway=IPv4Address(_UPLINK_OUTSIDE)),
            ]
        )
    with netns.entered(outside):
        _end_point("up", f"{_UPLINK_OUTSIDE}/24", _UPLINK_ROOT, extra=f"{SERVER}/32")
    os.close(outside)


def _forward() -> None:
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")


def quiet_ipv6() -> None:
    """No IPv6 in the calling thread's namespace: links would otherwise pay for routes that nobody uses."""
    for name in ("all", "default"):
        path = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        if path.exists():
            path.write_text("1", encoding="ascii")


def add_place(place: Place, *, up: bool = True, at_birth: Sequence[netlink.Request] = ()) -> float:
    """Make a tenant's namespace with its link to the root namespace, which the calling thread is in.

    Unless ``up``, both ends are left as they were born, which is when a slot gets its policies. ``at_birth`` is asked
    for together with the link; returns the seconds that both took.
    """
    netns.create(place.netns)
    inside, home = netns.open_named(place.netns), netns.open_own()
    try:
        with netns.entered(inside), netlink.Socket() as sock:
            start = time.perf_counter()
            sock.execute([rt.veth("up0", place.interface, index=UPLINK_INDEX, peer_netns=home), *at_birth])
            seconds = time.perf_counter() - start
        if not up:
            return seconds
        with netlink.Socket() as sock:
            index = _link_index(place.interface)
            sock.execute(
                [
                    rt.add_address(index, IPv4Interface(f"{place.root_address}/31")),
                    rt.set_link(index, up=True, quiet_ipv6=True),
                ]
            )
        with netns.entered(inside):
            _end_point("up0", f"{place.address}/31", place.root_address)
        return seconds
    finally:
        os.close(inside)
        os.close(home)


def add_guest(place: Place, slot: int, own_link: IPv4Network | None = None) -> Guest:
    """Put a guest behind a place. Its address is the same behind all places, unless ``own_link`` is a /31 for
    its link, which the root namespace then knows the way to: for a tenant without NAT."""
    gateway, address = f"{GATEWAY}/30", f"{GUEST}/30"
    if own_link is not None:
        gateway, address = f"{own_link[0]}/31", f"{own_link[1]}/31"
    inside = netns.open_named(place.netns)
    with netns.fresh():
        guest = netns.open_own()
    with netns.entered(inside), netlink.Socket() as sock:
        sock.execute([rt.veth("tap0", "eth0", peer_netns=guest)])
        index = _link_index("tap0")
        sock.execute(
            [
                rt.add_address(index, IPv4Interface(gateway)),
                rt.set_link(index, up=True),
            ]
        )
        _forward()
    os.close(inside)
    with netns.entered(guest):
        _end_point("eth0", address, gateway.split("/")[0])
    if own_link is not None:
        with netlink.Socket() as sock:
            sock.execute([rt.add_route(own_link, gateway=IPv4Address(place.address))])
    return Guest(slot, guest)


def _end_point(link: str, address: str, gateway: str, extra: str | None = None) -> None:
    """Bring up ``link`` of the calling thread's namespace with an address and a default route.

    ``extra`` is one more address, on the loopback link.
    """
    quiet_ipv6()
    with netlink.Socket() as sock:
        index = _link_index(link)
        requests = [
            rt.set_link(1, up=True),
            rt.add_address(index, IPv4Interface(address)),
            rt.set_link(index, up=True),
            rt.add_route(_DEFAULT, gateway=IPv4Address(gateway)),
        ]
        if extra is not None:
            requests.append(rt.add_address(1, IPv4Interface(extra)))
        sock.execute(requests)


def _link_index(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return rt.link_index(sock, name)
