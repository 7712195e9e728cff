"""Tunnel links by rtnetlink: what the kernel is told of each kind, and whether a link is what was told.

Kinds are the kernel's own names. Layouts: linux/if_link.h (IFLA_VXLAN_*, IFLA_GENEVE_*), linux/if_tunnel.h
(IFLA_GRE_*, IFLA_IPTUN_*).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple, TypeAlias

from netslot.kernel import netlink
from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import Message, Request

Address: TypeAlias = IPv4Address | IPv6Address

VERSIONS: Final[Mapping[str, frozenset[int]]] = {
    "vxlan": frozenset({4, 6}),
    "geneve": frozenset({4, 6}),
    "gre": frozenset({4}),
    "gretap": frozenset({4}),
    "ipip": frozenset({4}),
    "sit": frozenset({4}),
    "ip6gre": frozenset({6}),
    "ip6gretap": frozenset({6}),
    "ip6tnl": frozenset({6}),
    "wireguard": frozenset(),
}
"""The kinds, and the IP versions that their ends may have; WireGuard's ends are its peers'."""

ETHERNET: Final = frozenset(("vxlan", "geneve", "gretap", "ip6gretap"))
"""Those that carry Ethernet frames: who is at the other end is asked for by ARP and neighbour discovery."""

FALLBACK: Final = frozenset(
    ("tunl0", "gre0", "gretap0", "erspan0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0")
)
"""Links that the kernel puts into every namespace when it loads a kind of tunnel, and that cannot be removed
(net.core.fb_tunnels_only_for_init_net)."""

_MANAGED: Final = {"ip6gre": 13, "ip6gretap": 13, "ip6tnl": 8}
"""The attribute with flags, to which the kernel adds what it has found out (IP6_TNL_F_CAP_*)."""

_TTL = 64
_KEY = 0x2000  # GRE_KEY in network order, linux/if_tunnel.h
_IGNORE_LIMIT = 1  # IP6_TNL_F_IGN_ENCAP_LIMIT, linux/ip6_tunnel.h: no destination option in front of each packet
_IFINFO = struct.Struct("=BxHiII")

Data: TypeAlias = Mapping[int, bytes]
"""Attributes of one kind by number, as they are written and as the kernel gives them back."""


class End(NamedTuple):
    """One tunnel, worked out. ``number`` is a VXLAN or Geneve identifier or a GRE key, ``port`` a UDP port."""

    local: Address | None
    remote: Address | None
    number: int | None
    port: int


def data(kind: str, end: End) -> Data:
    """What the kernel is told of a tunnel."""
    if kind == "vxlan":
        return _vxlan(end)
    if kind == "geneve":
        assert end.remote is not None
        remote = 2 if end.remote.version == 4 else 7
        return {1: _u32(end.number or 1), remote: end.remote.packed, 5: struct.pack(">H", end.port or 6081)}
    if kind in ("gre", "gretap", "ip6gre", "ip6gretap"):
        return _gre(end, six=kind.startswith("ip6"))
    if kind in ("ipip", "sit", "ip6tnl"):
        return _ip(kind, end)
    return {}


def _vxlan(end: End) -> Data:
    assert end.remote is not None
    six = end.remote.version == 6
    found = {1: _u32(end.number or 1), 16 if six else 2: end.remote.packed, 15: struct.pack(">H", end.port or 4789)}
    return found | ({17 if six else 4: end.local.packed} if end.local is not None else {})


def _gre(end: End, *, six: bool) -> Data:
    found = {6: _packed(end.local, six), 7: _packed(end.remote, six), 8: bytes([_TTL])}
    if end.number is not None:
        key = struct.pack(">I", end.number)
        found |= {2: struct.pack(">H", _KEY), 3: struct.pack(">H", _KEY), 4: key, 5: key}
    return found | ({13: _u32(_IGNORE_LIMIT)} if six else {10: b"\1"})


def _ip(kind: str, end: End) -> Data:
    six = kind == "ip6tnl"
    found = {2: _packed(end.local, six), 3: _packed(end.remote, six), 4: bytes([_TTL])}
    return found | ({8: _u32(_IGNORE_LIMIT), 9: b"\0"} if six else {10: b"\1"})


def _packed(address: Address | None, six: bool) -> bytes:
    return address.packed if address is not None else bytes(16 if six else 4)


def _u32(number: int) -> bytes:
    return struct.pack("=I", number)


def add(name: str, kind: str, told: Data, *, mtu: int, alias: str) -> Request:
    """Make a tunnel; EOPNOTSUPP when the kernel has no such kind, EEXIST when it has one between these ends."""
    attributes = [netlink.attr_str(rt.IFLA_IFNAME, name)]
    if mtu:
        attributes.append(netlink.attr_u32(rt.IFLA_MTU, mtu))
    attributes.append(netlink.attr(rt.IFLA_IFALIAS, alias.encode()))
    info = [netlink.attr_str(rt.IFLA_INFO_KIND, kind)]
    if told:
        info.append(
            netlink.nested(rt.IFLA_INFO_DATA, *(netlink.attr(number, value) for number, value in told.items()))
        )
    attributes.append(netlink.nested(rt.IFLA_LINKINFO, *info))
    payload = _IFINFO.pack(0, 0, 0, 0, 0) + b"".join(attributes)
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    return Request(rt.RTM_NEWLINK, flags, payload, f"make {kind} tunnel {name}")


def is_as_told(message: Message, kind: str, told: Data) -> bool:
    """Whether the link of an RTM_NEWLINK message was made with ``told``."""
    attrs = netlink.parse_attrs(message.payload, _IFINFO.size)
    info = netlink.parse_attrs(attrs.get(rt.IFLA_LINKINFO, b""))
    found = netlink.parse_attrs(info.get(rt.IFLA_INFO_DATA, b""))
    managed = _MANAGED.get(kind)
    return all(found.get(number) == value for number, value in told.items() if number != managed)
