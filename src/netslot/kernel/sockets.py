"""Sockets and processes inside namespaces: counted, and sockets of dead tenants ended."""

from __future__ import annotations

import errno
import os
import re
import socket
import struct

from netslot.kernel.netlink import NETLINK_SOCK_DIAG, Request, Socket

_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_ALL_STATES = 0xFFFFFFFF
_BOUND_INACTIVE = 1 << 13
_REQUEST = struct.Struct("=BBBxI48s")  # family, protocol, extensions, states, struct inet_diag_sockid
_MESSAGE = struct.Struct("=BBBB48s")  # family, state, timer, retrans, struct inet_diag_sockid
_IN_USE = re.compile(r"^(TCP|UDP|UDPLITE|RAW|TCP6|UDP6|UDPLITE6|RAW6): inuse (\d+)(?:.* tw (\d+))?", re.MULTILINE)


def in_use() -> dict[str, int]:
    """Internet sockets of the calling thread's namespace by protocol, those in TIME_WAIT included, where any.

    From ``/proc/net/sockstat``, whose counters are the namespace's own: no table of sockets is walked.
    """
    counts: dict[str, int] = {}
    for name in ("sockstat", "sockstat6"):
        try:
            with open(f"/proc/thread-self/net/{name}", encoding="ascii") as file:
                text = file.read()
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for protocol, used, waiting in _IN_USE.findall(text):
            total = int(used) + int(waiting or 0)
            if total:
                counts[protocol] = total
    return counts


def destroy_all() -> None:
    """End every TCP and UDP socket of the namespace, also those in TIME_WAIT (sock_diag(7), SOCK_DESTROY)."""
    gone = (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP)
    with Socket(NETLINK_SOCK_DIAG) as sock:
        for family in (socket.AF_INET, socket.AF_INET6):
            for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                request = _REQUEST.pack(family, protocol, 0, _ALL_STATES, bytes(48))
                found = sock.dump(_SOCK_DIAG_BY_FAMILY, request, "list sockets")
                doomed = [_MESSAGE.unpack_from(message.payload)[4] for message in found]
                for identity in doomed:
                    body = _REQUEST.pack(family, protocol, 0, _ALL_STATES, identity)
                    sock.execute([Request(_SOCK_DESTROY, 0, body, "end a socket", gone)])


def bound() -> int:
    """How many TCP ports are held by sockets that are neither connected nor listening, as those that were ended are.

    They count as used nowhere else, and their processes may be outside (TCPF_BOUND_INACTIVE, since Linux 6.8).
    """
    families = (socket.AF_INET, socket.AF_INET6)
    requests = [_REQUEST.pack(family, socket.IPPROTO_TCP, 0, _BOUND_INACTIVE, bytes(48)) for family in families]
    with Socket(NETLINK_SOCK_DIAG) as sock:
        return sum(len(sock.dump(_SOCK_DIAG_BY_FAMILY, request, "list bound sockets")) for request in requests)


def processes_by_namespace() -> dict[int, list[int]]:
    """Process ids by the inode of their network namespace, of all processes that may be looked at."""
    found: dict[int, list[int]] = {}
    with os.scandir("/proc") as entries:
        for entry in entries:
            if not entry.name.isdecimal():
                continue
            try:
                target = os.readlink(f"/proc/{entry.name}/ns/net")
            except OSError:
                continue  # it ended meanwhile, or is a zombie, or another user's
            found.setdefault(int(target[5:-1]), []).append(int(entry.name))
    return found
