"""The floor under provisioning: the kernel objects of a slot by bare system calls, with nothing left to decide.

Every byte that goes to the kernel is worked out before the clock starts, so the loop below holds only the calls
themselves. What it makes is what :meth:`netslot.host.slots.Workshop.build` makes: a test compares the two.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from netslot.errors import KernelError
from netslot.host import links
from netslot.host.plan import GUEST, UPLINK, SlotPlan
from netslot.kernel import ethtool, netlink, netns, sys, xtables
from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import NLM_F_ACK, NLM_F_REQUEST, Request
from netslot.policy.base import Die
from netslot.policy.nft_cast import in_scratch
from netslot.spec.document import AttachmentSection

_ANY_INDEX = 0x7EADBEEF
_REPLACE = struct.Struct("@32sIII5I5IIP")  # struct ipt_replace, linux/netfilter_ipv4/ip_tables.h
_EMPTY_ENTRIES = {"raw": 3, "mangle": 6, "nat": 5, "filter": 4, "security": 4}
_PROCFS_USES = 64
_RECEIVE = 1 << 16

_TUNSETIFF, _TUNSETPERSIST, _TUNSETIFINDEX = 0x400454CA, 0x400454CB, 0x400454DA  # linux/if_tun.h
_TUNSETOWNER, _TUNSETGROUP = 0x400454CC, 0x400454CE
_TAP_FLAGS, _VNET_HDR, _MULTI_QUEUE = 0x9002, 0x4000, 0x0100  # IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL
_SIOCGIFINDEX = 0x8933
_IPT_SO_SET_REPLACE = 64

_ANSWER = struct.Struct("=HHI")  # type, flags, sequence number of struct nlmsghdr
_STATUS = struct.Struct("=i")
_ANY_INDEX_BYTES = struct.pack("=I", _ANY_INDEX)
_GUEST_BYTES = struct.pack("=I", GUEST)

PHASES = ("namespace", "sysctls", "veth", "guest link", "rules", "addresses", "root side", "pin")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The bytes of one slot, in the order in which they are used."""

    path: bytes
    veth: bytes
    tap: bytes
    tap_user: int | None
    tap_group: int | None
    tables: tuple[bytes, ...]
    slot_side: bytes
    root_name: bytes
    root_sysctl: bytes
    root_side: bytes
    carriers: tuple[bytes, bytes, bytes]
    """The requests that have the carriers of the tap and of the two ends of the link to root noticed."""


class Floor:
    """Makes slots in the calling :class:`netns.Worker` thread's namespace; ``seconds`` is the time by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._home = netns.open_own()
        self._root = _route_socket()
        self._ioctl = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._counters = ctypes.create_string_buffer(16 * max(_EMPTY_ENTRIES.values()))
        self._procfs, self._uses = sys.open_procfs(), 0

    def close(self) -> None:
        self._root.close()
        self._ioctl.close()
        os.close(self._home)
        os.close(self._procfs)

    def prepare(self, plans: Sequence[SlotPlan], die: Die) -> list[Prepared]:
        """Work out the bytes of every slot: a ``tap`` attachment, IPv4, rules in legacy tables."""
        tables = in_scratch(lambda: [self._tables(plan, die) for plan in plans])
        return [self._prepare(plan, blobs) for plan, blobs in zip(plans, tables, strict=True)]

    def _tables(self, plan: SlotPlan, die: Die) -> tuple[bytes, ...]:
        """The arguments of IPT_SO_SET_REPLACE, read back after a stamp in the calling thread's namespace."""
        die.stamp(plan.values)
        found = []
        with xtables.open_socket(xtables.IPV4) as sock:
            for table in xtables.existing_tables(xtables.IPV4):
                info, blob = xtables.read_table(sock, xtables.IPV4, table)
                header = _REPLACE.pack(
                    table.encode(),
                    info.valid_hooks,
                    info.entries,
                    info.size,
                    *info.hook_entry,
                    *info.underflow,
                    _EMPTY_ENTRIES[table],
                    ctypes.addressof(self._counters),
                )
                found.append(header + bytes(blob))
        return tuple(found)

    def _prepare(self, plan: SlotPlan, tables: tuple[bytes, ...]) -> Prepared:
        values, attachment = plan.values, plan.of.attachment
        assert plan.guest_if is not None
        pair = rt.veth(
            plan.uplink_if,
            plan.root_if,
            index=UPLINK,
            mac=values["uplink_mac"],
            mtu=attachment.mtu,
            peer_netns=self._home,
            peer_mac=values["root_mac"],
            peer_group=links.ROOT_GROUP,
        )
        return Prepared(
            path=os.fsencode(netns.NETNS_DIR / plan.netns),
            veth=_bytes([pair]),
            tap=struct.pack("16sH22x", plan.guest_if.encode(), _tap_flags(attachment)),
            tap_user=attachment.user,
            tap_group=attachment.group,
            tables=tables,
            slot_side=_bytes(links.slot_side(plan, born=True)),
            root_name=struct.pack("16si20x", plan.root_if.encode(), 0),
            root_sysctl=f"sys/net/ipv6/conf/{plan.root_if}/disable_ipv6".encode(),
            root_side=_bytes(links.root_side(plan, _ANY_INDEX, born=True)),
            carriers=(
                ethtool.glink_request(plan.guest_if),
                ethtool.glink_request(plan.root_if),
                ethtool.glink_request(plan.uplink_if),
            ),
        )

    def build(self, slot: Prepared) -> None:
        """Make one slot. KernelError or OSError when a call fails; what was made before it stays."""
        start = time.perf_counter()
        sys.unshare(sys.CLONE_NEWNET)
        at = self._lap("namespace", start)
        self._set(b"sys/net/ipv6/conf/all/disable_ipv6")
        at = self._lap("sysctls", at)
        route = _route_socket()
        _send(route, slot.veth)
        at = self._lap("veth", at)
        self._make_tap(slot)
        fcntl.ioctl(route, ethtool.SIOCETHTOOL, slot.carriers[0])
        at = self._lap("guest link", at)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            for table in slot.tables:
                raw.setsockopt(socket.SOL_IP, _IPT_SO_SET_REPLACE, table)
        at = self._lap("rules", at)
        _send(route, slot.slot_side)
        at = self._lap("addresses", at)
        os.close(os.open(slot.path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        sys.mount("/proc/thread-self/ns/net", os.fsdecode(slot.path), "none", sys.MS_BIND)
        at = self._lap("pin", at)
        sys.setns(self._home, sys.CLONE_NEWNET)
        answer = fcntl.ioctl(self._ioctl, _SIOCGIFINDEX, slot.root_name)
        self._set(slot.root_sysctl)
        _send(self._root, slot.root_side.replace(_ANY_INDEX_BYTES, answer[16:20]))
        fcntl.ioctl(self._ioctl, ethtool.SIOCETHTOOL, slot.carriers[1])
        fcntl.ioctl(route, ethtool.SIOCETHTOOL, slot.carriers[2])
        route.close()
        self._lap("root side", at)

    def _make_tap(self, slot: Prepared) -> None:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFINDEX, _GUEST_BYTES)
        fcntl.ioctl(fd, _TUNSETIFF, slot.tap)
        if slot.tap_user is not None:
            fcntl.ioctl(fd, _TUNSETOWNER, slot.tap_user)
        if slot.tap_group is not None:
            fcntl.ioctl(fd, _TUNSETGROUP, slot.tap_group)
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        os.close(fd)

    def _set(self, path: bytes) -> None:
        """Write 1 to a sysctl, by a procfs of our own that is replaced before its dentry chains grow long."""
        self._uses += 1
        if self._uses > _PROCFS_USES:
            os.close(self._procfs)
            self._procfs, self._uses = sys.open_procfs(), 1
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._procfs)
        os.write(fd, b"1")
        os.close(fd)

    def _lap(self, phase: str, start: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] += now - start
        return now


def _tap_flags(attachment: AttachmentSection) -> int:
    flags = _TAP_FLAGS
    flags |= _VNET_HDR if attachment.vnet_hdr else 0
    return flags | (_MULTI_QUEUE if attachment.multi_queue else 0)


def _bytes(requests: Sequence[Request]) -> bytes:
    """The requests as one datagram, of which the last message asks for an answer and has sequence number 1."""
    parts = [netlink.message(r.kind, r.flags | NLM_F_REQUEST, r.payload) for r in requests[:-1]]
    last = requests[-1]
    return b"".join([*parts, netlink.message(last.kind, last.flags | NLM_F_REQUEST | NLM_F_ACK, last.payload, 1)])


def _route_socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, netlink.NETLINK_ROUTE)


def _send(sock: socket.socket, data: bytes) -> None:
    """Send a datagram made by :func:`_bytes` and wait for the answer to its last message."""
    sock.send(data)
    while True:
        answer = sock.recv(_RECEIVE)
        kind, _, seq = _ANSWER.unpack_from(answer, 4)
        if kind == netlink.NLMSG_ERROR:
            status = _STATUS.unpack_from(answer, netlink.HEADER_SIZE)[0]
            if status:
                raise KernelError("bare loop", -status)
            if seq == 1:
                return
