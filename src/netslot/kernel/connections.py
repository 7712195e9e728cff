"""Tracked connections one by one: list them, and tell another namespace of them (ctnetlink).

Layouts: linux/netfilter/nfnetlink_conntrack.h. Works in the calling thread's network namespace.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from netslot.errors import KernelError
from netslot.kernel import netlink
from netslot.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Request, attr, attr_be32, nested, parse_attrs

_CTNETLINK = 1 << 8
_NEW, _GET = _CTNETLINK | 0, _CTNETLINK | 1
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT = 1, 2, 3, 4, 7
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_ADDRESSES: dict[int, tuple[int, int]] = {socket.AF_INET: (1, 2), socket.AF_INET6: (3, 4)}  # CTA_IP_V*_SRC, _DST
_PROTO_NUM, _PORTS, _ICMP, _ICMP6 = 1, (2, 3), (4, 5, 6), (7, 8, 9)
_SEEN_REPLY, _ASSURED, _CONFIRMED = 2, 4, 8
_TCP, _TCP_STATE, _TCP_FLAGS = 1, 1, (4, 5)
_BE_LIBERAL = 0x08  # IP_CT_TCP_FLAG_BE_LIBERAL: do not judge by windows that were never seen

_ECHO = {8: 0, 0: 8, 128: 129, 129: 128}


class Tuple(NamedTuple):
    """One direction of a connection. ``first``, ``second``: ports; for ICMP the id, and type << 8 | code."""

    family: int
    protocol: int
    src: bytes
    dst: bytes
    first: int
    second: int

    def inverse(self) -> Tuple:
        """The other direction, where nothing is translated."""
        if self.protocol in (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6):
            kind, code = self.second >> 8, self.second & 0xFF
            return self._replace(src=self.dst, dst=self.src, second=_ECHO.get(kind, kind) << 8 | code)
        return self._replace(src=self.dst, dst=self.src, first=self.second, second=self.first)


class Connection(NamedTuple):
    """``timeout`` in seconds; ``tcp_state`` as the kernel numbers them, None for other protocols."""

    original: Tuple
    reply: Tuple
    status: int
    timeout: int
    tcp_state: int | None

    def untranslated(self, tenant: Iterable[bytes]) -> Connection | None:
        """As the namespace of a tenant with these addresses sees it; None when it is not the tenant's."""
        own = set(tenant)
        if self.original.src in own:
            return self._replace(reply=self.original.inverse())
        if self.reply.src in own:
            return self._replace(original=self.reply.inverse())
        return None


def connections(family: int) -> list[Connection]:
    """All connections of one address family that the namespace tracks."""
    with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
        messages = sock.dump(_GET, struct.pack("=BBH", family, 0, 0), "list tracked connections")
        return [found for message in messages if (found := _parse(message.payload, family)) is not None]


def _parse(payload: bytes, family: int) -> Connection | None:
    attrs = parse_attrs(payload, 4)
    original, reply = (_tuple(attrs.get(kind, b""), family) for kind in (_TUPLE_ORIG, _TUPLE_REPLY))
    if original is None or reply is None:
        return None
    info = parse_attrs(parse_attrs(attrs.get(_PROTOINFO, b"")).get(_TCP, b""))
    state = info.get(_TCP_STATE)
    return Connection(
        original,
        reply,
        int.from_bytes(attrs.get(_STATUS, b"")),
        int.from_bytes(attrs.get(_TIMEOUT, b"")),
        state[0] if state else None,
    )


def _tuple(data: bytes, family: int) -> Tuple | None:
    attrs = parse_attrs(data)
    ends, proto = parse_attrs(attrs.get(_TUPLE_IP, b"")), parse_attrs(attrs.get(_TUPLE_PROTO, b""))
    src, dst = (ends.get(kind) for kind in _ADDRESSES[family])
    if src is None or dst is None or _PROTO_NUM not in proto:
        return None
    number = proto[_PROTO_NUM][0]
    for kinds in (_ICMP, _ICMP6):
        if kinds[0] in proto:
            word = proto[kinds[1]][0] << 8 | proto[kinds[2]][0]
            return Tuple(family, number, src, dst, int.from_bytes(proto[kinds[0]]), word)
    first, second = (int.from_bytes(proto.get(kind, b"")) for kind in _PORTS)
    return Tuple(family, number, src, dst, first, second)


def tell(found: Iterable[Connection]) -> int:
    """Make the namespace track these connections. Returns how many it had not known.

    A connection that it has picked up in the middle counts as answered afterwards if it is in ``found``: a rule
    about established connections matches it, in whichever direction its next packet goes.
    """
    made = 0
    with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
        for connection in found:
            try:
                sock.execute([_new(connection)])
                made += 1
            except KernelError as error:
                if error.errno != errno.EEXIST:
                    raise
                sock.execute([_answered(connection)])
    return made


def _answered(connection: Connection) -> Request:
    """Set the marks that only ever get set. EBUSY: it has more of them already (ctnetlink_change_status)."""
    payload = _header(connection) + _tuple_attr(_TUPLE_ORIG, connection.original)
    payload += attr_be32(_STATUS, connection.status & (_SEEN_REPLY | _ASSURED) | _CONFIRMED)
    return Request(_NEW, 0, payload, "mark a connection as answered", (errno.EBUSY, errno.ENOENT))


def _header(connection: Connection) -> bytes:
    return struct.pack("=BBH", connection.original.family, 0, 0)


def _new(connection: Connection) -> Request:
    status = connection.status & (_SEEN_REPLY | _ASSURED) | _CONFIRMED
    attrs = [
        _tuple_attr(_TUPLE_ORIG, connection.original),
        _tuple_attr(_TUPLE_REPLY, connection.reply),
        attr_be32(_STATUS, status),
        attr_be32(_TIMEOUT, max(connection.timeout, 1)),
    ]
    if connection.tcp_state is not None:
        liberal = bytes((_BE_LIBERAL, _BE_LIBERAL))
        flags = (attr(kind, liberal) for kind in _TCP_FLAGS)
        attrs.append(nested(_PROTOINFO, nested(_TCP, attr(_TCP_STATE, bytes((connection.tcp_state,))), *flags)))
    payload = _header(connection) + b"".join(attrs)
    return Request(_NEW, NLM_F_CREATE | NLM_F_EXCL, payload, "track a connection")


def _tuple_attr(kind: int, one: Tuple) -> bytes:
    src, dst = _ADDRESSES[one.family]
    number = attr(_PROTO_NUM, bytes((one.protocol,)))
    if one.protocol in (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6):
        kinds = _ICMP if one.protocol == socket.IPPROTO_ICMP else _ICMP6
        parts = [
            attr(kinds[0], struct.pack(">H", one.first)),
            attr(kinds[1], bytes((one.second >> 8,))),
            attr(kinds[2], bytes((one.second & 0xFF,))),
        ]
    else:
        parts = [
            attr(kind_, struct.pack(">H", port)) for kind_, port in zip(_PORTS, (one.first, one.second), strict=True)
        ]
    return nested(
        kind, nested(_TUPLE_IP, attr(src, one.src), attr(dst, one.dst)), nested(_TUPLE_PROTO, number, *parts)
    )
