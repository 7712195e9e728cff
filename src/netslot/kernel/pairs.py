"""Which links are the two ends of one pair, when each is in a namespace of its own (rtnetlink, if_link.h).

A link of a pair names its other end by index and, if that is elsewhere, by the number under which its own
namespace knows the other's. Works in the network namespace of the socket.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from netslot.kernel import netlink, rtnetlink
from netslot.kernel.netlink import Request

_IFINFO_SIZE = 16
_IFLA_LINK, _IFLA_MASTER, _IFLA_LINK_NETNSID = 5, 10, 37
_RTM_GETNSID, _NETNSA_NSID, _NETNSA_FD = 90, 1, 3
_HERE = -1


@dataclass(frozen=True, slots=True)
class End:
    """A link. ``peer``: index of the pair's other end, 0 for none; ``namespace``: number of its, -1 for this one."""

    name: str
    index: int
    group: int
    master: int
    peer: int
    namespace: int


def ends(sock: netlink.Socket) -> list[End]:
    """All links of the namespace. Every namespace that has a pair's other end has a number afterwards."""
    return [_end(message) for message in rtnetlink.dump_links(sock)]


def _end(message: netlink.Message) -> End:
    link = rtnetlink.parse_link(message)
    attrs = netlink.parse_attrs(message.payload, _IFINFO_SIZE)
    master, peer = (int.from_bytes(attrs.get(kind, b""), "little") for kind in (_IFLA_MASTER, _IFLA_LINK))
    return End(link.name, link.ifindex, link.group, master, peer, _number(attrs.get(_IFLA_LINK_NETNSID)))


def number(sock: netlink.Socket, fd: int) -> int:
    """The number under which the namespace knows that of ``fd``; -1 when it knows it by none."""
    request = Request(_RTM_GETNSID, 0, b"\0\0\0\0" + netlink.attr_u32(_NETNSA_FD, fd), "number of a namespace")
    for answer in sock.execute([request]):
        return _number(netlink.parse_attrs(answer.payload, 4).get(_NETNSA_NSID))
    return _HERE


def _number(data: bytes | None) -> int:
    return _HERE if data is None else int(struct.unpack("=i", data)[0])
