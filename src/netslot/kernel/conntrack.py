"""Connection tracking of the namespace that the calling thread is in, by ctnetlink (nfnetlink_conntrack.h)."""

from __future__ import annotations

import struct

from netslot.kernel import netlink
from netslot.kernel.netlink import Request

_SUBSYS_CTNETLINK = 1
_CT_DELETE, _CT_GET_STATS = 2, 5
_STATS_GLOBAL_ENTRIES = 1
_NFGENMSG = struct.pack("=BBH", 0, 0, 0)


def _kind(message: int) -> int:
    return _SUBSYS_CTNETLINK << 8 | message


def count() -> int:
    """How many connections the namespace tracks."""
    with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
        request = Request(_kind(_CT_GET_STATS), 0, _NFGENMSG, "count tracked connections")
        for answer in sock.execute([request]):
            entries = netlink.parse_attrs(answer.payload, 4).get(_STATS_GLOBAL_ENTRIES)
            if entries is not None:
                return int.from_bytes(entries, "big")
    return 0


def flush() -> None:
    """Forget all connections of the namespace.

    The kernel walks its one hash table for all namespaces, unless this one has no entries at all
    (nf_ct_iterate_cleanup_net() in net/netfilter/nf_conntrack_core.c).
    """
    with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
        sock.execute([Request(_kind(_CT_DELETE), 0, _NFGENMSG, "forget tracked connections")])
