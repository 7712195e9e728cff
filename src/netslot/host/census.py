"""A host's own linear walks and shared tables, counted: what grows with tenants besides firewall rules.

Everything is read from the calling thread's network namespace by netlink and /proc, and nothing is changed.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from netslot.kernel import netlink, nf_attrs, nf_tables
from netslot.kernel import rtnetlink as rt

Network = IPv4Network | IPv6Network

_HOOKS = ("prerouting", "input", "forward", "output", "postrouting", "ingress", "egress")
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_HOOKNUM = 1  # NFTA_HOOK_HOOKNUM
_NDMSG = struct.Struct("=BxxxiHBB")  # family, ifindex, state, flags, type
_RTMSG = struct.Struct("=BBBBBBBBI")


@dataclass(frozen=True, slots=True)
class Census:
    """``base_chains`` counts nftables base chains per (family, hook); ``gc_thresh3`` is None where it cannot be seen.

    ``neighbours`` are the entries that count against gc_thresh3: all but permanent and NOARP ones, of this
    namespace; the table itself is one for all namespaces. ``local_routes`` are IPv6 routes of fe80::/10 and
    ff00::/8, which stand beside one another for all links. ``routed`` are the networks that the main table sends
    to a link without a gateway: the addresses behind it.
    """

    links: frozenset[str]
    routed: dict[str, tuple[Network, ...]]
    ip_rules: int
    base_chains: dict[tuple[str, str], int]
    neighbours: int
    gc_thresh3: int | None
    local_routes: int
    mounts: int


def take() -> Census:
    """Count. Raises KernelError when the kernel refuses a dump."""
    with netlink.Socket() as sock:
        links = sock.dump(rt.RTM_GETLINK, bytes(16), "list links")
        rules = sum(
            len(sock.dump(rt.RTM_GETRULE, bytes([family]) + bytes(11), "list routing rules"))
            for family in (socket.AF_INET, socket.AF_INET6)
        )
        neighbours = sum(map(_counts_as_neighbour, sock.dump(rt.RTM_GETNEIGH, bytes(_NDMSG.size), "list neighbours")))
        routes = sock.dump(rt.RTM_GETROUTE, bytes([socket.AF_INET6]) + bytes(11), "list IPv6 routes")
        routes_v4 = sock.dump(rt.RTM_GETROUTE, bytes([socket.AF_INET]) + bytes(11), "list IPv4 routes")
    by_index = {link.ifindex: link.name for link in map(rt.parse_link, links)}
    return Census(
        links=frozenset(by_index.values()),
        routed=_routed([*routes_v4, *routes], by_index),
        ip_rules=rules,
        base_chains=_base_chains(),
        neighbours=neighbours,
        gc_thresh3=_gc_thresh3(),
        local_routes=sum(map(_is_link_local, routes)),
        mounts=len(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()),
    )


def _counts_as_neighbour(message: netlink.Message) -> bool:
    _, _, state, _, _ = _NDMSG.unpack_from(message.payload)
    return not state & (rt.NUD_PERMANENT | rt.NUD_NOARP)


def _is_link_local(message: netlink.Message) -> bool:
    length = message.payload[1]
    destination = netlink.parse_attrs(message.payload, _RTMSG.size).get(rt.RTA_DST, b"")
    if length < 8 or len(destination) != 16:
        return False
    return destination[0] == 0xFF or (length >= 10 and destination[0] == 0xFE and destination[1] & 0xC0 == 0x80)


def _routed(routes: list[netlink.Message], links: dict[int, str]) -> dict[str, tuple[Network, ...]]:
    found: dict[str, list[Network]] = {}
    for message in routes:
        if _is_link_local(message):
            continue
        _, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(message.payload)
        attrs = netlink.parse_attrs(message.payload, _RTMSG.size)
        destination, out = attrs.get(rt.RTA_DST), attrs.get(rt.RTA_OIF)
        if table != rt.RT_TABLE_MAIN or kind != rt.RTN_UNICAST or destination is None or out is None:
            continue
        name = links.get(int.from_bytes(out, sys.byteorder), "")
        if rt.RTA_GATEWAY not in attrs:
            found.setdefault(name, []).append(ip_network((destination, length)))
    return {name: tuple(networks) for name, networks in found.items()}


def _base_chains() -> dict[tuple[str, str], int]:
    counts: Counter[tuple[str, str]] = Counter()
    with nf_tables.Socket() as sock:
        for message in netlink.split(sock.dump_bytes(nf_tables.GETCHAIN, 0, b"", "list nftables chains")):
            family = message.payload[0]
            attrs = netlink.parse_attrs(message.payload, 4)
            hook = netlink.parse_attrs(attrs.get(nf_attrs.CHAIN_HOOK, b""))
            if _HOOKNUM in hook:
                number = int.from_bytes(hook[_HOOKNUM], "big")
                name = _HOOKS[number] if number < len(_HOOKS) and family != 5 else "ingress"
                counts[_FAMILIES.get(family, str(family)), name] += 1
    return dict(counts)


def _gc_thresh3() -> int | None:
    path = Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3")
    return int(path.read_text(encoding="ascii")) if path.exists() else None
