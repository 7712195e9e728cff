"""Links, addresses, routes, neighbours and rules by rtnetlink: requests as values, dumps as values.

The builders return :class:`netslot.kernel.netlink.Request`, so that one datagram can carry everything that a
slot needs. Layouts: linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/neighbour.h, linux/fib_rules.h.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import NamedTuple, Protocol, TypeAlias

from netslot.errors import KernelError
from netslot.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    Request,
    Socket,
    attr,
    attr_str,
    attr_u8,
    attr_u32,
    iter_attrs,
    nested,
    parse_attrs,
)

Address: TypeAlias = IPv4Address | IPv6Address
Interface: TypeAlias = IPv4Interface | IPv6Interface
Network: TypeAlias = IPv4Network | IPv6Network

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_GETRULE = 34

RTNLGRP_LINK = 1

IFF_UP = 1
IFF_SET = 0x80 | 0x100 | 0x200
"""IFF_NOARP, IFF_PROMISC, IFF_ALLMULTI: what somebody may set on a link beside IFF_UP. The kernel reports the last
two as they were set by such a request, not as packet sockets want them (dev_get_flags() in net/core/dev.c)."""

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK = 1, 3, 4, 5
IFLA_LINKINFO, IFLA_IFALIAS, IFLA_AF_SPEC, IFLA_GROUP, IFLA_NET_NS_FD = 18, 20, 26, 27, 28
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES = 31, 32
VETH_INFO_PEER = 1
IFLA_INET_CONF = 1
IPV4_DEVCONF_FORWARDING, IPV4_DEVCONF_PROXY_ARP, IPV4_DEVCONF_ACCEPT_REDIRECTS = 1, 3, 4
IPV4_DEVCONF_RP_FILTER, IPV4_DEVCONF_ACCEPT_SOURCE_ROUTE = 8, 9
IPV4_DEVCONF_ARP_IGNORE, IPV4_DEVCONF_ARP_ACCEPT = 19, 21
IFLA_TXQLEN, IFLA_OPERSTATE = 13, 16
IF_OPER_DORMANT = 5
IFLA_EXT_MASK, IFLA_CARRIER = 29, 33
IFLA_XDP, IFLA_XDP_FD, IFLA_XDP_ATTACHED = 43, 1, 2
RTEXT_FILTER_SKIP_STATS = 8
IFLA_INET6_CONF, IFLA_INET6_ADDR_GEN_MODE = 2, 8
IN6_ADDR_GEN_MODE_NONE = 1

IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200

RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_TABLE = 1, 4, 5, 6, 7, 15
RT_TABLE_MAIN, RT_TABLE_LOCAL = 254, 255
RTPROT_KERNEL, RTPROT_STATIC = 2, 4
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
RTNH_F_ONLINK = 4
RTN_UNICAST, RTN_MULTICAST = 1, 5

NDA_DST, NDA_LLADDR = 1, 2
NDA_IFINDEX = 8
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_PROXY = 0x08
RTM_F_CLONED = 0x200

_IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFADDR = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_INDEX = struct.Struct("=i")  # at the same place in the first three
_ONE_QUEUE = (attr_u32(IFLA_NUM_TX_QUEUES, 1), attr_u32(IFLA_NUM_RX_QUEUES, 1))
_SIOCGIFINDEX = 0x8933
_IFNAMSIZ = 16


def mac_bytes(mac: str) -> bytes:
    """``02:00:00:00:00:01`` as six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


class _Socket(Protocol):
    def fileno(self) -> int: ...


def link_index(sock: _Socket, name: str) -> int:
    """The index of link ``name`` in the namespace of ``sock``, any socket; KernelError ENODEV when absent.

    An ioctl (netdevice(7), SIOCGIFINDEX): a hash look-up, about a tenth of the cost of RTM_GETLINK.
    """
    request = struct.pack(f"{_IFNAMSIZ}si20x", name.encode(), 0)
    try:
        answer = fcntl.ioctl(sock, _SIOCGIFINDEX, request)
    except OSError as error:
        raise KernelError(f"look up link {name}", error.errno or 0) from error
    return int(struct.unpack_from("=i", answer, _IFNAMSIZ)[0])


def veth(
    name: str,
    peer: str,
    *,
    peer_netns: int | None = None,
    index: int = 0,
    peer_index: int = 0,
    mac: str | None = None,
    peer_mac: str | None = None,
    mtu: int | None = None,
    peer_group: int | None = None,
) -> Request:
    """Make a veth pair: ``name`` in the socket's namespace, ``peer`` born in the namespace ``peer_netns`` (fd).

    Both ends start down. An index of 0 lets the kernel choose; it honours ``peer_index`` only beside an ``index``
    (veth_newlink() in drivers/net/veth.c). Unasked, a pair would get a queue for each processor, of which the kernel
    then turns off all but one, each time waiting for packets to leave them (veth_init_queues()).
    """
    own, far = [attr_str(IFLA_IFNAME, name), *_ONE_QUEUE], [attr_str(IFLA_IFNAME, peer), *_ONE_QUEUE]
    if peer_netns is not None:
        far.append(attr_u32(IFLA_NET_NS_FD, peer_netns))
    if peer_group is not None:
        far.append(attr_u32(IFLA_GROUP, peer_group))
    for attrs, address in ((own, mac), (far, peer_mac)):
        if address is not None:
            attrs.append(attr(IFLA_ADDRESS, mac_bytes(address)))
        if mtu is not None:
            attrs.append(attr_u32(IFLA_MTU, mtu))
    peer_body = _IFINFO.pack(0, 0, peer_index, 0, 0) + b"".join(far)
    info = nested(
        IFLA_LINKINFO,
        attr_str(IFLA_INFO_KIND, "veth"),
        nested(IFLA_INFO_DATA, attr(VETH_INFO_PEER, peer_body)),
    )
    payload = _IFINFO.pack(0, 0, index, 0, 0) + b"".join(own) + info
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, payload, f"make veth {name} / {peer}")


def set_link(
    index: int,
    *,
    up: bool | None = None,
    mac: str | None = None,
    mtu: int | None = None,
    group: int | None = None,
    alias: str | None = None,
    ipv4: Mapping[int, int] | None = None,
    quiet_ipv6: bool = False,
    dormant: bool = False,
) -> Request:
    """Change a link. ``up`` also takes back the other flags that somebody may have set (IFF_SET).

    ``ipv4`` holds per-device settings by IPV4_DEVCONF_* number: what ``net.ipv4.conf.DEV.*`` sets, without a
    look-up in /proc/sys. ``quiet_ipv6`` gives the link no link-local address when it comes up
    (IN6_ADDR_GEN_MODE_NONE). ``dormant``, of a link that is down: until its carrier is noticed it counts as not
    ready, so that IPv6 does its work for a link that comes up once, then, and not twice (addrconf_notify()).
    """
    attrs: list[bytes] = []
    if mac is not None:
        attrs.append(attr(IFLA_ADDRESS, mac_bytes(mac)))
    if mtu is not None:
        attrs.append(attr_u32(IFLA_MTU, mtu))
    if group is not None:
        attrs.append(attr_u32(IFLA_GROUP, group))
    if alias is not None:
        attrs.append(attr(IFLA_IFALIAS, alias.encode()))
    if dormant:
        attrs.append(attr_u8(IFLA_OPERSTATE, IF_OPER_DORMANT))
    families: list[bytes] = []
    if ipv4 is not None:
        conf = nested(IFLA_INET_CONF, *(attr_u32(number, value) for number, value in ipv4.items()))
        families.append(nested(socket.AF_INET, conf))
    if quiet_ipv6:
        families.append(nested(socket.AF_INET6, attr_u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE)))
    if families:
        attrs.append(nested(IFLA_AF_SPEC, *families))
    flags, change = (0, 0) if up is None else (IFF_UP if up else 0, IFF_UP | IFF_SET)
    payload = _IFINFO.pack(0, 0, index, flags, change) + b"".join(attrs)
    return Request(RTM_SETLINK, 0, payload, f"change link {index}")


def get_link(index: int) -> Request:
    """Ask for a link without its statistics."""
    payload = _IFINFO.pack(0, 0, index, 0, 0) + attr_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    return Request(RTM_GETLINK, 0, payload, f"read link {index}")


def restore_queueing(index: int, queue_length: int) -> list[Request]:
    """Give a link back its length of queue, and take an XDP program away. EBUSY when a BPF link holds the program."""
    head = _IFINFO.pack(0, 0, index, 0, 0)
    no_program = nested(IFLA_XDP, attr(IFLA_XDP_FD, struct.pack("=i", -1)))
    length = attr_u32(IFLA_TXQLEN, queue_length)
    return [
        Request(RTM_SETLINK, 0, head + length, f"set the queue length of link {index}"),
        Request(RTM_SETLINK, 0, head + no_program, f"detach XDP of link {index}", (errno.EOPNOTSUPP,)),
    ]


def delete_link(index: int, name: str = "") -> Request:
    """Remove a link (and, of a veth, its peer); by name when ``index`` is 0."""
    payload = _IFINFO.pack(0, 0, index, 0, 0) + (attr_str(IFLA_IFNAME, name) if not index else b"")
    return Request(RTM_DELLINK, 0, payload, f"delete link {name or index}")


def delete_group(group: int) -> Request:
    """Remove all links of an interface group (and, of veths, their peers) in one step."""
    payload = _IFINFO.pack(0, 0, 0, 0, 0) + attr_u32(IFLA_GROUP, group)
    return Request(RTM_DELLINK, 0, payload, f"delete links of group {group:#x}")


def _family(address: Address | Interface | Network) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def add_address(index: int, address: Interface, *, alone: bool = False) -> Request:
    """Give a link an address; of IPv6 without duplicate address detection, so that it is usable at once, and
    ``alone`` without a route to the rest of its network."""
    flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE if alone else IFA_F_NODAD
    return _address(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, address, "add", flags)


def delete_address(index: int, address: Interface) -> Request:
    return _address(RTM_DELADDR, 0, index, address, "delete")


def _address(
    kind: int, flags: int, index: int, address: Interface, verb: str, address_flags: int = IFA_F_NODAD
) -> Request:
    packed = address.packed
    attrs = attr(IFA_LOCAL, packed) + attr(IFA_ADDRESS, packed)
    if address.version == 6:
        attrs += attr_u32(IFA_FLAGS, address_flags)
    payload = _IFADDR.pack(_family(address), address.network.prefixlen, 0, 0, index) + attrs
    return Request(kind, flags, payload, f"{verb} address {address} on link {index}")


def add_route(
    destination: Network,
    *,
    index: int = 0,
    gateway: Address | None = None,
    onlink: bool = False,
    metric: int = 0,
    table: int = RT_TABLE_MAIN,
) -> Request:
    """A static unicast route; ``onlink`` lets the gateway be a neighbour that no route covers.

    Many IPv4 device routes with one metric share 256 hash chains of the kernel (fib_info_hashfn() in
    net/ipv4/fib_semantics.c folds the device index to 8 bits), so that adding one walks N / 256 entries;
    a metric of its own for each keeps the cost flat.
    """
    header = _route_header(destination, table, RTPROT_STATIC, _scope(destination, gateway), RTN_UNICAST, onlink)
    attrs = _route_attrs(destination, index, gateway, table)
    if metric:
        attrs += attr_u32(RTA_PRIORITY, metric)
    flags = NLM_F_CREATE | NLM_F_REPLACE
    return Request(RTM_NEWROUTE, flags, header + attrs, f"add route {destination}")


def delete_route(
    destination: Network,
    *,
    index: int = 0,
    gateway: Address | None = None,
    table: int = RT_TABLE_MAIN,
    kind: int = RTN_UNICAST,
) -> Request:
    """Remove a route of any metric."""
    scope = RT_SCOPE_NOWHERE if destination.version == 4 else RT_SCOPE_UNIVERSE
    header = _route_header(destination, table, 0, scope, kind, False)
    payload = header + _route_attrs(destination, index, gateway, table)
    return Request(RTM_DELROUTE, 0, payload, f"delete route {destination}")


def _scope(destination: Network, gateway: Address | None) -> int:
    return RT_SCOPE_LINK if gateway is None and destination.version == 4 else RT_SCOPE_UNIVERSE


def _route_header(destination: Network, table: int, protocol: int, scope: int, kind: int, onlink: bool) -> bytes:
    family, length = _family(destination), destination.prefixlen
    short_table = table if table < 256 else 0
    return _RTMSG.pack(family, length, 0, 0, short_table, protocol, scope, kind, RTNH_F_ONLINK if onlink else 0)


def _route_attrs(destination: Network, index: int, gateway: Address | None, table: int) -> bytes:
    attrs = attr_u32(RTA_TABLE, table)
    if destination.prefixlen:
        attrs += attr(RTA_DST, destination.network_address.packed)
    if index:
        attrs += attr_u32(RTA_OIF, index)
    if gateway is not None:
        attrs += attr(RTA_GATEWAY, gateway.packed)
    return attrs


def add_neighbour(index: int, address: Address, mac: str) -> Request:
    """A permanent neighbour entry; these are not counted against gc_thresh3 (net/core/neighbour.c)."""
    header = _NDMSG.pack(_family(address), index, NUD_PERMANENT, 0, 0)
    payload = header + attr(NDA_DST, address.packed) + attr(NDA_LLADDR, mac_bytes(mac))
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, payload, f"add neighbour {address}")


def add_proxy(index: int, address: Address) -> Request:
    """Answer neighbour discovery for ``address`` on a link, on behalf of somebody behind another one (proxy_ndp)."""
    payload = _NDMSG.pack(_family(address), index, NUD_PERMANENT, NTF_PROXY, 0) + attr(NDA_DST, address.packed)
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, payload, f"answer for {address} on link {index}")


def delete_neighbour(index: int, address: Address) -> Request:
    payload = _NDMSG.pack(_family(address), index, 0, 0, 0) + attr(NDA_DST, address.packed)
    return Request(RTM_DELNEIGH, 0, payload, f"delete neighbour {address}")


class Link(NamedTuple):
    """A link as the kernel reports it."""

    ifindex: int
    name: str
    up: bool
    flags: int
    """Those of IFF_SET."""
    carrier: bool
    mac: str
    mtu: int
    group: int
    alias: str
    kind: str
    queue_length: int
    xdp: int
    """How an XDP program is attached (XDP_ATTACHED_*); 0 when none is."""
    ipv4_conf: bytes
    """``net.ipv4.conf.NAME.*``: an array of 32-bit numbers, IPV4_DEVCONF_* from 1."""
    ipv6_conf: bytes
    """``net.ipv6.conf.NAME.*``: an array of 32-bit numbers, DEVCONF_* from 0."""

    def ipv4_settings(self) -> dict[int, int]:
        """``ipv4_conf`` in the form that :func:`set_link` takes."""
        numbers = struct.unpack(f"={len(self.ipv4_conf) // 4}I", self.ipv4_conf)
        return dict(enumerate(numbers, 1))


def parse_link(message: Message) -> Link:
    """The link of an RTM_NEWLINK or RTM_DELLINK message."""
    return _parse_link(message.payload)


@functools.lru_cache(maxsize=256)
def _parse_link(payload: bytes) -> Link:
    """Much of what slots hold is the same in all of them, so that parsing it once is enough; here and below."""
    _, _, index, flags, _ = _IFINFO.unpack_from(payload)
    attrs = parse_attrs(payload, _IFINFO.size)
    ipv4_conf, ipv6_conf = _settings(attrs.get(IFLA_AF_SPEC, b""))
    return Link(
        ifindex=index,
        name=_text(attrs.get(IFLA_IFNAME, b"")),
        up=bool(flags & IFF_UP),
        flags=flags & IFF_SET,
        carrier=attrs.get(IFLA_CARRIER) == b"\1",
        mac=attrs.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=_u32(attrs.get(IFLA_MTU)),
        group=_u32(attrs.get(IFLA_GROUP)),
        alias=_text(attrs.get(IFLA_IFALIAS, b"")),
        kind=_link_kind(attrs.get(IFLA_LINKINFO, b"")),
        queue_length=_u32(attrs.get(IFLA_TXQLEN)),
        xdp=parse_attrs(attrs.get(IFLA_XDP, b"")).get(IFLA_XDP_ATTACHED, b"\0")[0],
        ipv4_conf=ipv4_conf,
        ipv6_conf=ipv6_conf,
    )


@functools.lru_cache(maxsize=256)
def _link_kind(info: bytes) -> str:
    return _text(parse_attrs(info).get(IFLA_INFO_KIND, b""))


@functools.lru_cache(maxsize=256)
def _settings(families: bytes) -> tuple[bytes, bytes]:
    found = parse_attrs(families)
    ipv4 = parse_attrs(found.get(socket.AF_INET, b"")).get(IFLA_INET_CONF, b"")
    return ipv4, parse_attrs(found.get(socket.AF_INET6, b"")).get(IFLA_INET6_CONF, b"")


def links(sock: Socket) -> list[Link]:
    """All links of the socket's namespace."""
    return [parse_link(message) for message in dump_links(sock)]


def dump_links(sock: Socket) -> list[Message]:
    """What :func:`links` parses, and the like below: for those who compare bytes."""
    payload = _IFINFO.pack(0, 0, 0, 0, 0) + attr_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    return sock.dump(RTM_GETLINK, payload, "list links")


def link_name(message: Message) -> str:
    """The name alone of an RTM_NEWLINK message."""
    return _text(
        next((value for kind, value in iter_attrs(message.payload, _IFINFO.size) if kind == IFLA_IFNAME), b"")
    )


def peer(message: Message) -> int:
    """The index of a veth's other end, in the namespace that it is in; 0 for a link without (IFLA_LINK)."""
    found = (value for kind, value in iter_attrs(message.payload, _IFINFO.size) if kind == IFLA_LINK)
    return _u32(next(found, None))


class AddressRecord(NamedTuple):
    """An address on a link (its index), with the prefix length that the kernel reports."""

    link: int
    address: bytes
    prefix_length: int


def addresses(sock: Socket) -> list[AddressRecord]:
    """All addresses of the socket's namespace, both families, packed in network byte order."""
    return [parse_address(message) for message in dump_addresses(sock)]


def dump_addresses(sock: Socket) -> list[Message]:
    return sock.dump(RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, 0), "list addresses")


def parse_address(message: Message) -> AddressRecord:
    """The address of an RTM_NEWADDR message."""
    _, length, _, _, index = _IFADDR.unpack_from(message.payload)
    attrs = parse_attrs(message.payload, _IFADDR.size)
    return AddressRecord(index, attrs.get(IFA_LOCAL) or attrs[IFA_ADDRESS], length)


class RouteRecord(NamedTuple):
    """A route: the parts that say where packets go."""

    family: int
    table: int
    kind: int
    destination: bytes
    prefix_length: int
    link: int
    gateway: bytes
    metric: int
    protocol: int


def routes(sock: Socket) -> list[RouteRecord]:
    """All routes of the socket's namespace, cached ones (RTM_F_CLONED) left out."""
    return parse_routes(dump_routes(sock))


def parse_routes(messages: Iterable[Message]) -> list[RouteRecord]:
    """The routes of RTM_NEWROUTE messages, cached ones left out."""
    found = (_parse_route(message.payload) for message in messages)
    return [record for record in found if record is not None]


def delete_routes(sock: Socket, unwanted: Callable[[RouteRecord], bool]) -> list[Request]:
    """What removes the routes that are ``unwanted``: the kernel takes back the message that it sent."""
    return [
        Request(RTM_DELROUTE, 0, message.payload, "delete route", (errno.ESRCH,))
        for message in dump_routes(sock)
        if (record := _parse_route(message.payload)) is not None and unwanted(record)
    ]


def dump_routes(sock: Socket) -> list[Message]:
    return sock.dump(RTM_GETROUTE, _RTMSG.pack(0, 0, 0, 0, 0, 0, 0, 0, 0), "list routes")


@functools.lru_cache(maxsize=1024)
def _parse_route(payload: bytes) -> RouteRecord | None:
    family, length, _, _, short_table, protocol, _, kind, flags = _RTMSG.unpack_from(payload)
    if flags & RTM_F_CLONED:
        return None
    attrs = parse_attrs(payload, _RTMSG.size)
    return RouteRecord(
        family=family,
        table=_u32(attrs.get(RTA_TABLE)) or short_table,
        kind=kind,
        destination=attrs.get(RTA_DST, b""),
        prefix_length=length,
        link=_u32(attrs.get(RTA_OIF)),
        gateway=attrs.get(RTA_GATEWAY, b""),
        metric=_u32(attrs.get(RTA_PRIORITY)),
        protocol=protocol,
    )


class NeighbourRecord(NamedTuple):
    """A neighbour entry; ``permanent`` ones are those that somebody configured."""

    link: int
    address: bytes
    mac: str
    permanent: bool


def neighbours(sock: Socket, index: int = 0) -> list[NeighbourRecord]:
    """All neighbour entries of the socket's namespace that have a MAC or are permanent, multicast ones left out."""
    return [parse_neighbour(message) for message in dump_neighbours(sock, index)]


def dump_neighbours(sock: Socket, index: int = 0) -> list[Message]:
    payload = _NDMSG.pack(0, 0, 0, 0, 0) + (attr_u32(NDA_IFINDEX, index) if index else b"")
    answers = sock.dump(RTM_GETNEIGH, payload, "list neighbours")
    return [answer for answer in answers if not _NDMSG.unpack_from(answer.payload)[2] & NUD_NOARP]


def get_neighbour(index: int, address: bytes) -> Request:
    """Ask for one neighbour entry: a hash look-up.

    A dump would walk the one table that all namespaces share (neigh_dump_table() in net/core/neighbour.c).
    """
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    payload = _NDMSG.pack(family, index, 0, 0, 0) + attr(NDA_DST, address)
    return Request(RTM_GETNEIGH, 0, payload, f"read a neighbour of link {index}", (errno.ENOENT, errno.ENODEV))


def parse_neighbour(message: Message) -> NeighbourRecord:
    """The entry of an RTM_NEWNEIGH message."""
    _, link, state, _, _ = _NDMSG.unpack_from(message.payload)
    attrs = parse_attrs(message.payload, _NDMSG.size)
    return NeighbourRecord(
        link, attrs.get(NDA_DST, b""), attrs.get(NDA_LLADDR, b"").hex(":"), bool(state & NUD_PERMANENT)
    )


def message_link(message: Message) -> int:
    """The index of the link that a link, address, neighbour or route is of; 0 for a route without."""
    if message.type != RTM_NEWROUTE:
        return int(_INDEX.unpack_from(message.payload, 4)[0])
    attrs = iter_attrs(message.payload, _RTMSG.size)
    return next((_u32(value) for kind, value in attrs if kind == RTA_OIF), 0)


def _u32(value: bytes | None) -> int:
    return int.from_bytes(value, sys.byteorder) if value else 0


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
