"""The ethtool ioctl, for the one thing that rtnetlink cannot have for less."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct

from netslot.errors import KernelError
from netslot.kernel.netlink import Socket

SIOCETHTOOL, _GLINK = 0x8946, 0x0A  # linux/sockios.h, linux/ethtool.h
_REQUEST = struct.Struct("16sP16x")  # struct ifreq
_VALUE = ctypes.create_string_buffer(struct.pack("=II", _GLINK, 0))
"""struct ethtool_value. The kernel leaves the command in it; what it answers is not asked for."""


def notice_carrier(sock: Socket | socket.socket, name: str) -> None:
    """Have the kernel act now on a carrier of link ``name`` that came or went, as ``sock`` sees it.

    A link that was just connected drops what is sent by it until then (its queue is noop_qdisc). By itself the kernel
    gets to it when a worker of its own has the lock of all links. It works off at most 100 of the less urgent changes
    a second (a tap's birth is one), and each veth that comes up walks the list of those that wait
    (net/core/link_watch.c, __linkwatch_run_queue()): a host that makes more taps a second slows down with each.

    ETHTOOL_GLINK calls linkwatch_sync_dev() (ethtool_op_get_link() in net/ethtool/ioctl.c). So does RTM_GETLINK, but
    for a link of root's that walks the numbers of all slots besides. KernelError ENODEV when the link is absent.
    """
    try:
        fcntl.ioctl(sock, SIOCETHTOOL, glink_request(name))
    except OSError as error:
        raise KernelError(f"notice the carrier of link {name}", error.errno or 0) from error


def glink_request(name: str) -> bytes:
    """The argument of SIOCETHTOOL that asks for the carrier of link ``name``."""
    return _REQUEST.pack(name.encode(), ctypes.addressof(_VALUE))
