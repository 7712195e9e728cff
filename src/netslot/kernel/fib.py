"""Routes and routing rules in full: kinds, tables, several gateways, selectors; written and read back as values.

Everything that netslot's policies add carries netslot's own protocol number, as every routing program has one
(rtnetlink(7), rtm_protocol), so that it can be told from what others added. Layouts: linux/rtnetlink.h,
linux/fib_rules.h.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, TypeAlias

from netslot.kernel import netlink
from netslot.kernel.netlink import Request

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

PROTOCOL: Final = 78
"""The mark of netslot's routes and rules (RTPROT_*, of which iproute2's rt_protos gives 78 to nobody)."""

MAIN_TABLE: Final = 254
UNICAST: Final = 1
KINDS: Final = {"unicast": UNICAST, "blackhole": 6, "unreachable": 7, "prohibit": 8}
ACTIONS: Final = {"table": 1, "blackhole": 6, "unreachable": 7, "prohibit": 8}

_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWRULE, RTM_DELRULE, _GETRULE = 32, 33, 34
_BY_KERNEL = 2  # RTPROT_KERNEL, linux/rtnetlink.h

_RTMSG = struct.Struct("=BBBBBBBBI")
_NEXTHOP = struct.Struct("=HBBi")
_RULE = struct.Struct("=BBBBBBBBI")
_DST, _OIF, _GATEWAY, _PRIORITY, _PREFSRC, _METRICS, _MULTIPATH, _TABLE = 1, 4, 5, 6, 7, 8, 9, 15
_METRIC_MTU = 2
_ONLINK = 4
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_IPV6_METRIC = 1024
"""What the kernel makes of metric 0 in IPv6 (IP6_RT_PRIO_USER)."""

_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK = 1, 2, 3, 6, 10
_FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL, _FRA_IP_PROTO, _FRA_DPORTS = 15, 16, 21, 22, 24
_FRA_DPORT_MASK = 29  # all ones with a single port (Linux 6.15)
_INVERT = 2  # FIB_RULE_INVERT
_FRA_SUPPRESS_PREFIXLEN = 14  # a dump always has it: -1 for none
_FIELDS: Final = frozenset(
    {_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL}
    | {_FRA_IP_PROTO, _FRA_DPORTS, _FRA_DPORT_MASK, _FRA_SUPPRESS_PREFIXLEN}
)


@dataclass(frozen=True, slots=True)
class Route:
    """One route; ``device`` is an interface index, 0 for the kinds that drop."""

    destination: Network
    kind: int = UNICAST
    gateways: tuple[Address, ...] = ()
    device: int = 0
    source: Address | None = None
    table: int = MAIN_TABLE
    metric: int = 0
    mtu: int = 0
    onlink: bool = False

    def __str__(self) -> str:
        kind = next(name for name, number in KINDS.items() if number == self.kind)
        table = "" if self.table == MAIN_TABLE else f" table {self.table}"
        return f"{'' if self.kind == UNICAST else kind + ' '}{self.destination}{table}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One routing rule of one family (socket.AF_INET or AF_INET6)."""

    family: int
    priority: int
    action: int = 1
    table: int = 0
    source: Network | None = None
    destination: Network | None = None
    mark: int | None = None
    input: str = ""
    protocol: int = 0
    ports: tuple[int, int] | None = None
    beyond: bytes = b""
    """The kernel's message, of a rule that says what the fields above have no place for."""

    def __str__(self) -> str:
        return f"IPv{4 if self.family == socket.AF_INET else 6} rule {self.priority}"


def family(address: Address | Network) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


@functools.lru_cache(maxsize=1024)
def add_route(route: Route) -> Request:
    """Refused with EEXIST where a route of the same destination, table and metric is."""
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    return Request(_NEWROUTE, flags, _route_payload(route), f"add route {route}")


def delete_route(route: Route) -> Request:
    """Remove netslot's route of this destination, table, metric and kind; absence is success."""
    return Request(_DELROUTE, 0, _route_payload(route), f"delete route {route}", (errno.ESRCH,))


def _route_payload(route: Route) -> bytes:
    scope = _SCOPE_LINK if route.kind == UNICAST and not route.gateways else _SCOPE_UNIVERSE
    flags = _ONLINK if route.onlink and len(route.gateways) == 1 else 0
    to = route.destination
    head = _RTMSG.pack(
        family(to), to.prefixlen, 0, 0, route.table if route.table < 256 else 0, PROTOCOL, scope, route.kind, flags
    )
    parts = [head, netlink.attr_u32(_TABLE, route.table)]
    if to.prefixlen:
        parts.append(netlink.attr(_DST, to.network_address.packed))
    if route.metric:
        parts.append(netlink.attr_u32(_PRIORITY, route.metric))
    if route.source is not None:
        parts.append(netlink.attr(_PREFSRC, route.source.packed))
    if route.mtu:
        parts.append(netlink.nested(_METRICS, netlink.attr_u32(_METRIC_MTU, route.mtu)))
    if len(route.gateways) > 1:
        hops = b"".join(_next_hop(route, gateway) for gateway in route.gateways)
        parts.append(netlink.attr(_MULTIPATH, hops))
    elif route.kind == UNICAST:
        parts += [netlink.attr(_GATEWAY, gateway.packed) for gateway in route.gateways]
        parts.append(netlink.attr_u32(_OIF, route.device))
    return b"".join(parts)


def _next_hop(route: Route, gateway: Address) -> bytes:
    attribute = netlink.attr(_GATEWAY, gateway.packed)
    return _NEXTHOP.pack(_NEXTHOP.size + len(attribute), _ONLINK if route.onlink else 0, 0, route.device) + attribute


def routes(sock: netlink.Socket) -> list[Route]:
    """netslot's own routes of both families, in all tables."""
    found: list[Route] = []
    for version in (socket.AF_INET, socket.AF_INET6):
        head = _RTMSG.pack(version, 0, 0, 0, 0, 0, 0, 0, 0)
        for answer in sock.dump(_GETROUTE, head, "list routes"):
            if answer.payload[5] == PROTOCOL:
                found.append(_parse_route(answer.payload))
    return found


def _parse_route(payload: bytes) -> Route:
    version, length, _, _, table, _, _, kind, flags = _RTMSG.unpack_from(payload)
    attrs = netlink.parse_attrs(payload, _RTMSG.size)
    address = attrs.get(_DST, bytes(4 if version == socket.AF_INET else 16))
    device = _u32(attrs.get(_OIF)) if kind == UNICAST else 0  # IPv6 says 'lo' for the kinds that drop
    gateways = [attrs[_GATEWAY]] if _GATEWAY in attrs else []
    offset, hops = 0, attrs.get(_MULTIPATH, b"")
    while offset < len(hops):
        size, flags, _, device = _NEXTHOP.unpack_from(hops, offset)
        gateways.append(netlink.parse_attrs(hops[: offset + size], offset + _NEXTHOP.size)[_GATEWAY])
        offset += (size + 3) & ~3
    metric = _u32(attrs.get(_PRIORITY))
    return Route(
        destination=ip_network((address, length)),
        kind=kind,
        gateways=tuple(ip_address(gateway) for gateway in gateways),
        device=device,
        source=ip_address(attrs[_PREFSRC]) if _PREFSRC in attrs else None,
        table=_u32(attrs.get(_TABLE)) or table,
        metric=0 if version == socket.AF_INET6 and metric == _IPV6_METRIC else metric,
        mtu=_u32(netlink.parse_attrs(attrs.get(_METRICS, b"")).get(_METRIC_MTU)),
        onlink=bool(flags & _ONLINK),
    )


@functools.lru_cache(maxsize=1024)
def add_rule(rule: Rule) -> Request:
    """Refused with EEXIST where the same rule is."""
    return Request(_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL, _rule_payload(rule), f"add {rule}")


def delete_rule(rule: Rule) -> Request:
    """Remove netslot's rule; absence is success."""
    return Request(RTM_DELRULE, 0, rule.beyond or _rule_payload(rule), f"delete {rule}", (errno.ENOENT,))


def _rule_payload(rule: Rule) -> bytes:
    lengths = [0 if net is None else net.prefixlen for net in (rule.destination, rule.source)]
    head = _RULE.pack(rule.family, *lengths, 0, rule.table if rule.table < 256 else 0, 0, 0, rule.action, 0)
    parts = [head, netlink.attr_u32(_FRA_PRIORITY, rule.priority), netlink.attr_u8(_FRA_PROTOCOL, PROTOCOL)]
    if rule.table:
        parts.append(netlink.attr_u32(_FRA_TABLE, rule.table))
    for kind, net in ((_FRA_DST, rule.destination), (_FRA_SRC, rule.source)):
        if net is not None:
            parts.append(netlink.attr(kind, net.network_address.packed))
    if rule.mark is not None:
        parts += [netlink.attr_u32(_FRA_FWMARK, rule.mark), netlink.attr_u32(_FRA_FWMASK, 0xFFFFFFFF)]
    if rule.input:
        parts.append(netlink.attr_str(_FRA_IIFNAME, rule.input))
    if rule.protocol:
        parts.append(netlink.attr_u8(_FRA_IP_PROTO, rule.protocol))
    if rule.ports is not None:
        parts.append(netlink.attr(_FRA_DPORTS, struct.pack("=HH", *rule.ports)))
    return b"".join(parts)


def rules(sock: netlink.Socket) -> list[Rule]:
    """netslot's own rules of both families."""
    found: list[Rule] = []
    for version in (socket.AF_INET, socket.AF_INET6):
        for answer in sock.dump(_GETRULE, _RULE.pack(version, 0, 0, 0, 0, 0, 0, 0, 0), "list rules"):
            rule, protocol = parse_rule(answer.payload)
            if protocol == PROTOCOL:
                found.append(rule)
    return found


KERNEL_RULES: Final = tuple(
    Rule(family, priority, table=table)
    for family, rules in ((socket.AF_INET, 3), (socket.AF_INET6, 2))
    for priority, table in ((0, 255), (32766, MAIN_TABLE), (32767, 253))[:rules]
)
"""What every namespace begins with: look into the tables local, main and (IPv4) default."""


def add_kernel_rule(rule: Rule) -> Request:
    """Put back one of :data:`KERNEL_RULES`."""
    head, rest = _rule_payload(rule)[: _RULE.size], (rule.priority, rule.table)
    attributes = [
        netlink.attr_u32(kind, value) for kind, value in zip((_FRA_PRIORITY, _FRA_TABLE), rest, strict=True)
    ]
    by_kernel = netlink.attr_u8(_FRA_PROTOCOL, _BY_KERNEL)
    return Request(_NEWRULE, netlink.NLM_F_CREATE, head + b"".join(attributes) + by_kernel, f"add {rule}")


def parse_rule(payload: bytes) -> tuple[Rule, int]:
    """The rule of an RTM_NEWRULE message, and the protocol number of whoever made it."""
    attrs = netlink.parse_attrs(payload, _RULE.size)
    rule = _parse_rule(payload, attrs)
    beyond = bool(attrs.keys() - _FIELDS) or bool(payload[3]) or bool(payload[8] & _INVERT)  # payload[3]: TOS
    none = b"\xff" * 4
    beyond = beyond or none != attrs.get(_FRA_SUPPRESS_PREFIXLEN, none) or none != attrs.get(_FRA_FWMASK, none)
    return (replace(rule, beyond=payload) if beyond else rule), attrs.get(_FRA_PROTOCOL, b"\0")[0]


def _parse_rule(payload: bytes, attrs: dict[int, bytes]) -> Rule:
    version, to_length, from_length, _, table, _, _, action, _ = _RULE.unpack_from(payload)

    def network(kind: int, length: int) -> Network | None:
        return ip_network((attrs[kind], length)) if kind in attrs else None

    return Rule(
        family=version,
        priority=_u32(attrs.get(_FRA_PRIORITY)),
        action=action,
        table=_u32(attrs.get(_FRA_TABLE)) or table,
        source=network(_FRA_SRC, from_length),
        destination=network(_FRA_DST, to_length),
        mark=_u32(attrs[_FRA_FWMARK]) if _FRA_FWMARK in attrs else None,
        input=attrs.get(_FRA_IIFNAME, b"").rstrip(b"\0").decode(),
        protocol=attrs.get(_FRA_IP_PROTO, b"\0")[0],
        ports=struct.unpack("=HH", attrs[_FRA_DPORTS]) if _FRA_DPORTS in attrs else None,
    )


def _u32(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0
