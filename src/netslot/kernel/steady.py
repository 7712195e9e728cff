"""What of an rtnetlink message says how links, addresses, routes and neighbours are configured, as masks.

The rest (counters, timestamps, carriers, queues) changes by itself. Two messages of one layout that agree under
their mask are parsed to the same record by :mod:`netslot.kernel.rtnetlink`, which looks at nothing else.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias, Union

from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import NLA_TYPE_MASK, Message

Kept: TypeAlias = Mapping[int, Union["Kept", slice]]
"""Attributes that count: the whole value or part of it, or those of them inside a nested one."""

WHOLE: Final = slice(None)
_ATTR = struct.Struct("=HH")


class View(NamedTuple):
    """What counts of messages of one type: ``header`` is the mask of the fixed part before the attributes."""

    header: bytes
    kept: Kept


Views: TypeAlias = Mapping[int, View]


def views(*, index: bool = True, ipv4_conf: slice = WHOLE, ipv6_conf: slice = WHOLE) -> Views:
    """The views by message type (RTM_NEW*). Without ``index`` it does not count which link is meant.

    The slices say which bytes count of a link's arrays of sysctls.
    """
    link = b"\xff" * 4 if index else bytes(4)
    up, cloned = struct.pack("=I", rt.IFF_UP | rt.IFF_SET), struct.pack("=I", rt.RTM_F_CLONED)
    conf: Kept = {socket.AF_INET: {rt.IFLA_INET_CONF: ipv4_conf}, socket.AF_INET6: {rt.IFLA_INET6_CONF: ipv6_conf}}
    names = (rt.IFLA_ADDRESS, rt.IFLA_IFNAME, rt.IFLA_MTU, rt.IFLA_IFALIAS, rt.IFLA_GROUP, rt.IFLA_TXQLEN)
    route = (rt.RTA_DST, rt.RTA_GATEWAY, rt.RTA_PRIORITY, rt.RTA_TABLE, *((rt.RTA_OIF,) if index else ()))
    return {
        rt.RTM_NEWLINK: View(
            b"\xff" * 4 + link + up + bytes(4),
            {
                **dict.fromkeys(names, WHOLE),
                rt.IFLA_LINKINFO: {rt.IFLA_INFO_KIND: WHOLE},
                rt.IFLA_XDP: {rt.IFLA_XDP_ATTACHED: WHOLE},
                rt.IFLA_AF_SPEC: conf,
            },
        ),
        rt.RTM_NEWADDR: View(b"\xff" * 4 + link, dict.fromkeys((rt.IFA_ADDRESS, rt.IFA_LOCAL), WHOLE)),
        rt.RTM_NEWROUTE: View(b"\xff" * 8 + cloned, dict.fromkeys(route, WHOLE)),
        rt.RTM_NEWNEIGH: View(b"\xff" * 4 + link + b"\xff" * 4, dict.fromkeys((rt.NDA_DST, rt.NDA_LLADDR), WHOLE)),
    }


def mask(message: Message, views: Views) -> tuple[bytes, list[tuple[int, int]]]:
    """The mask over the message's payload, and where the values that count begin and end."""
    view = views[message.type]
    found = bytearray(len(message.payload))
    found[: len(view.header)] = view.header
    places = []
    for start, end, counts in _walk(message.payload, len(view.header), len(found), view.kept):
        found[start:end] = b"\xff" * (end - start)
        if counts:
            places.append((start, end))
    return bytes(found), places


def _walk(data: bytes, at: int, end: int, kept: Kept) -> Iterator[tuple[int, int, bool]]:
    """(begin, end, False) of every attribute's header, (begin, end, True) of every value that counts."""
    while at + _ATTR.size <= end:
        size, kind = _ATTR.unpack_from(data, at)
        if size < _ATTR.size:
            return
        yield at, at + _ATTR.size, False
        what = kept.get(kind & NLA_TYPE_MASK)
        if isinstance(what, slice):
            first, last, _ = what.indices(size - _ATTR.size)
            yield at + _ATTR.size + first, at + _ATTR.size + last, True
        elif what is not None:
            yield from _walk(data, at + _ATTR.size, at + size, what)
        at += (size + 3) & ~3
