"""Traffic control: the clsact hook point, BPF filters on it, token bucket queues.

Everything acts on links of the calling thread's namespace. Filters and queues live as long as their link, so
nothing is left when a slot goes. Layouts: linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h.
"""

from __future__ import annotations

import errno
import functools
import struct
from typing import Final, NamedTuple

from netslot.errors import KernelError
from netslot.kernel import netlink
from netslot.kernel.netlink import Request

_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _DELTFILTER, _GETTFILTER = 44, 45, 46
_CREATE = netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE

_TCMSG = struct.Struct("=BxxxiIII")
_U32 = struct.Struct("=I")
_TCA_KIND, _TCA_OPTIONS, _TCA_STATS2 = 1, 2, 7
_TCA_STATS_BASIC, _TCA_STATS_QUEUE = 1, 3

_ROOT = 0xFFFFFFFF
_CLSACT = 0xFFFFFFF1
_CLSACT_HANDLE = 0xFFFF0000
INGRESS: Final = 0xFFFFFFF2
"""Packets that the link hands to its namespace."""
EGRESS: Final = 0xFFFFFFF3
"""Packets that its namespace sends through the link."""

_ETH_P_ALL = 0x0300  # in network byte order
_BPF_CLASSID, _BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_TAG, _BPF_ID = 3, 6, 7, 8, 10, 11
_BPF_DIRECT_ACTION = 1
LARGEST_NUMBER: Final = 0xFFFF
"""The largest class id that a program sees whole."""

_TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_TBF_QOPT = struct.Struct("=BBHhHI12xIII")
_LINKLAYER_ETHERNET = 1
_TICK_SHIFT = 6  # PSCHED_SHIFT: the kernel counts buckets in 64 ns


_KIND_BPF = netlink.attr_str(_TCA_KIND, "bpf")
_KIND_CLSACT = netlink.attr_str(_TCA_KIND, "clsact")


class Filter(NamedTuple):
    """One BPF filter of a link; ``tag`` and ``program`` (an id) are what the kernel says of its program."""

    hook: int
    priority: int
    handle: int
    name: str
    tag: bytes
    program: int
    number: int


class Queue(NamedTuple):
    """One queueing discipline; of a token bucket the rate (bytes a second), the bucket's depth (nanoseconds at that
    rate, to 64 of them) and how many bytes may wait, else 0."""

    kind: str
    handle: int
    parent: int
    rate: int
    depth: int
    limit: int
    packets: int
    drops: int


def add_clsact(link: int) -> Request:
    """Give ``link`` (an interface index) the hook points; success when it has them.

    Best while the link is down: if it is up, the kernel first waits for packets to leave it (qdisc_graft() in
    net/sched/sch_api.c, dev_deactivate_many()). The first filter on each then waits until an RCU grace period has
    passed since (mini_qdisc_pair_swap() in net/sched/sch_generic.c).
    """
    payload = _TCMSG.pack(0, link, _CLSACT_HANDLE, _CLSACT, 0) + _KIND_CLSACT
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    return Request(_NEWQDISC, flags, payload, f"tc qdisc add clsact on link {link}", (errno.EEXIST,))


def del_clsact(link: int) -> Request:
    """Take the hook points away with all filters on them; absence is success."""
    payload = _TCMSG.pack(0, link, _CLSACT_HANDLE, _CLSACT, 0)
    return Request(_DELQDISC, 0, payload, f"tc qdisc del clsact on link {link}", (errno.EINVAL, errno.ENOENT))


def set_filter(
    link: int, hook: int, priority: int, program: int, name: str, *, number: int = 0, handle: int = 1
) -> Request:
    """Attach a program (descriptor) in direct-action mode, or put it in the place of the one at ``priority``.

    Replacing is atomic: each packet meets the old program or the new one. Filters run in the order of their
    priorities, until one gives a verdict other than TC_ACT_UNSPEC. ``number`` is the filter's class id, which
    the program can read as ``tc_classid`` (cls_bpf sets it before each run): a constant of this attachment's own.
    Of its 32 bits the program sees the lower 16 (struct qdisc_skb_cb in include/net/sch_generic.h).
    """
    head, operation = _filter_head(link, hook, priority, program, name, handle)
    return Request(_NEWTFILTER, _CREATE, head + _U32.pack(number), operation)


@functools.lru_cache(maxsize=1024)
def _filter_head(link: int, hook: int, priority: int, program: int, name: str, handle: int) -> tuple[bytes, str]:
    """All but the number at the end: the same bytes for thousands of slots."""
    options = netlink.nested(
        _TCA_OPTIONS,
        netlink.attr_u32(_BPF_FD, program),
        netlink.attr_str(_BPF_NAME, name),
        netlink.attr_u32(_BPF_FLAGS, _BPF_DIRECT_ACTION),
        netlink.attr_u32(_BPF_CLASSID, 0),
    )
    payload = _TCMSG.pack(0, link, handle, hook, priority << 16 | _ETH_P_ALL) + _KIND_BPF + options
    return payload[: -_U32.size], f"tc filter {name} on link {link}"


def del_filter(link: int, hook: int, priority: int) -> Request:
    """Detach whatever is at ``priority``; absence is success."""
    payload = _TCMSG.pack(0, link, 0, hook, priority << 16 | _ETH_P_ALL)
    ignore = (errno.ENOENT, errno.EINVAL)
    return Request(_DELTFILTER, 0, payload, f"tc filter del {priority} on link {link}", ignore)


def filters(socket: netlink.Socket, link: int) -> list[Filter]:
    """The filters on both hook points of ``link``, in the order they run; kinds other than bpf have no tag."""
    found: list[Filter] = []
    for hook in (INGRESS, EGRESS):
        request = _TCMSG.pack(0, link, 0, hook, 0)
        try:
            answers = socket.dump(_GETTFILTER, request, f"tc filter show on link {link}")
        except KernelError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # the link has no clsact
                continue
            raise
        for answer in answers:
            _, _, handle, _, info = _TCMSG.unpack_from(answer.payload)
            attributes = netlink.parse_attrs(answer.payload, _TCMSG.size)
            if not handle:
                continue  # the head of a priority, not a filter
            options = netlink.parse_attrs(attributes.get(_TCA_OPTIONS, b""))
            kind = attributes[_TCA_KIND].rstrip(b"\0").decode()
            name = options.get(_BPF_NAME, b"").rstrip(b"\0").decode() or kind
            number = struct.unpack("=I", options[_BPF_ID])[0] if _BPF_ID in options else 0
            given = struct.unpack("=I", options.get(_BPF_CLASSID, bytes(4)))[0]
            found.append(Filter(hook, info >> 16, handle, name, options.get(_BPF_TAG, b""), number, given))
    return sorted(found)


def set_token_bucket(link: int, rate: int, burst: int, limit: int) -> Request:
    """Shape what ``link`` sends to ``rate`` bytes a second, or change the shape in place.

    ``burst`` is the bucket in bytes and must hold at least one packet with its headers; ``limit`` bytes wait
    at most, and what comes on top is dropped.
    """
    rate32 = min(rate, 0xFFFFFFFF)
    options = _TBF_QOPT.pack(0, _LINKLAYER_ETHERNET, 0, -1, 0, rate32, limit, 0, 0)
    attributes = [netlink.attr(_TBF_PARMS, options), netlink.attr_u32(_TBF_BURST, burst)]
    if rate > rate32:
        attributes.append(netlink.attr(_TBF_RATE64, struct.pack("=Q", rate)))
    payload = (
        _TCMSG.pack(0, link, 0x10000, _ROOT, 0)
        + netlink.attr_str(_TCA_KIND, "tbf")
        + netlink.nested(_TCA_OPTIONS, *attributes)
    )
    return Request(_NEWQDISC, _CREATE, payload, f"tc qdisc tbf on link {link}")


def del_root_queue(link: int) -> Request:
    """Give ``link`` back its default queue; absence is success."""
    payload = _TCMSG.pack(0, link, 0, _ROOT, 0)
    return Request(_DELQDISC, 0, payload, f"tc qdisc del root of link {link}", (errno.ENOENT, errno.EINVAL))


def queues(socket: netlink.Socket, link: int) -> list[Queue]:
    """The queueing disciplines of one link, clsact among them."""
    found: list[Queue] = []
    for answer in socket.dump(_GETQDISC, _TCMSG.pack(0, link, 0, 0, 0), "tc qdisc show"):
        _, index, handle, parent, _ = _TCMSG.unpack_from(answer.payload)
        if index != link:
            continue
        attributes = netlink.parse_attrs(answer.payload, _TCMSG.size)
        kind = attributes[_TCA_KIND].rstrip(b"\0").decode()
        shape = _token_bucket(attributes.get(_TCA_OPTIONS, b"")) if kind == "tbf" else (0, 0, 0)
        found.append(Queue(kind, handle, parent, *shape, *_statistics(attributes.get(_TCA_STATS2, b""))))
    return found


def _token_bucket(options: bytes) -> tuple[int, int, int]:
    attributes = netlink.parse_attrs(options)
    fields = _TBF_QOPT.unpack_from(attributes[_TBF_PARMS])
    rate, limit, ticks = int(fields[5]), int(fields[6]), int(fields[7])
    if _TBF_RATE64 in attributes:
        rate = int(struct.unpack("=Q", attributes[_TBF_RATE64])[0])
    return rate, ticks << _TICK_SHIFT, limit


def _statistics(attribute: bytes) -> tuple[int, int]:
    statistics = netlink.parse_attrs(attribute)
    basic = statistics.get(_TCA_STATS_BASIC, bytes(12))
    queue = statistics.get(_TCA_STATS_QUEUE, bytes(20))
    packets = struct.unpack_from("=QI", basic)[1]
    drops = struct.unpack_from("=5I", queue)[2]  # qlen, backlog, drops, requeues, overlimits
    return int(packets), int(drops)
