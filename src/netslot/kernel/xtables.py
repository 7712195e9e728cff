"""Legacy xtables: read and replace a table of the calling thread's namespace as the bytes the kernel keeps.

Layouts: linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h, linux/netfilter/x_tables.h,
native byte order, 64-bit pointers. A *blob* is a table's entries one after another, in the order of hooks and
chains; what these calls give out has the kernel's own fields (rule counters, ``comefrom``) zeroed unless said.
No lock file is taken: a namespace that only netslot writes needs none, and the kernel replaces a table atomically.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from netslot.errors import KernelError

TABLES = ("raw", "mangle", "nat", "filter", "security")
"""Every table there is, in the order in which a packet meets them."""

HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
"""Base chains by hook number (enum nf_inet_hooks)."""

VERDICT_DROP = -1
VERDICT_ACCEPT = -2
"""A standard target's verdict: -(NF_DROP) - 1 and -(NF_ACCEPT) - 1; what is not negative is a jump's offset."""

COUNTER_SIZE = 16  # struct xt_counters: u64 packets, u64 bytes

_SO_GET_INFO = 64  # IPT_BASE_CTL, the same numbers in both families
_SO_GET_ENTRIES = 65
_SO_SET_REPLACE = 64
_SO_SET_ADD_COUNTERS = 65

_INFO = struct.Struct("=32sI5I5III")  # struct ipt_getinfo
_ENTRIES = struct.Struct("=32sI4x")  # struct ipt_get_entries, without the table
_REPLACE = struct.Struct("@32sIII5I5IIP")  # struct ipt_replace, without the table
_COUNTERS_INFO = struct.Struct("=32sI4x")  # struct xt_counters_info, without the counters
_OFFSETS = struct.Struct("=HH")  # target_offset, next_offset of an entry
_HEAD = struct.Struct("=H29sB")  # struct xt_entry_match and xt_entry_target: size, name, revision
_VERDICT = struct.Struct("=i")

_libc = ctypes.CDLL(None, use_errno=True)
_getsockopt = _libc.getsockopt
_getsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between IPv4 and IPv6: names, socket level, and where an entry keeps its fields."""

    tool: str
    """The command people know: ``iptables``, ``ip6tables``."""
    domain: int
    level: int
    offsets_at: int
    """Offset in an entry of target_offset and next_offset."""
    private_at: int
    """Offset of what the kernel writes for itself: ``comefrom``, then the counters, up to the entry's end."""
    head: int
    """Size of an entry before its matches."""
    names: str
    """The file that lists the tables which exist in a namespace."""

    @property
    def private(self) -> int:
        """How many bytes at ``private_at`` are the kernel's own."""
        return self.head - self.private_at


IPV4 = Family("iptables", socket.AF_INET, socket.SOL_IP, 88, 92, 112, "ip_tables_names")
IPV6 = Family("ip6tables", socket.AF_INET6, 41, 140, 144, 168, "ip6_tables_names")
FAMILIES = (IPV4, IPV6)


class Info(NamedTuple):
    """Shape of a table. Offsets are in bytes from the blob's start; a hook that is not valid has 0."""

    valid_hooks: int
    hook_entry: tuple[int, ...]
    underflow: tuple[int, ...]
    entries: int
    size: int


class Part(NamedTuple):
    """One match or the target of an entry; ``at`` is where its data begins in the blob."""

    name: str
    revision: int
    at: int
    size: int


def open_socket(family: Family) -> socket.socket:
    """A socket of the calling thread's namespace to make the calls on; it keeps working from any thread."""
    try:
        return socket.socket(family.domain, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise KernelError(f"{family.tool}: socket", error.errno or errno.EIO) from error


def existing_tables(family: Family) -> list[str]:
    """The tables that exist in the calling thread's namespace, without bringing any to life.

    Asking the socket for a table that is not there makes the kernel create it, hooks and all
    (xt_find_table_lock); the file only lists. A kernel without the family has no file and no tables.
    """
    try:
        fd = os.open(f"/proc/thread-self/net/{family.names}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        return os.read(fd, 4096).decode("ascii").split()
    finally:
        os.close(fd)


def get_info(sock: socket.socket, family: Family, table: str) -> Info:
    """The table's shape; creates the table when the kernel knows it and the namespace has none yet.

    KernelError ENOENT or ENOPROTOOPT: this kernel has no such table or no such family.
    """
    buffer = bytearray(_INFO.size)
    _INFO.pack_into(buffer, 0, table.encode(), *([0] * 13))
    _get(sock, family, _SO_GET_INFO, buffer, table)
    fields = _INFO.unpack(buffer)
    return Info(fields[1], fields[2:7], fields[7:12], fields[12], fields[13])


def get_entries(sock: socket.socket, family: Family, table: str, size: int) -> bytearray | None:
    """The table's blob with its counters and ``comefrom``, or None when its size is not ``size`` bytes."""
    buffer = bytearray(_ENTRIES.size + size)
    _ENTRIES.pack_into(buffer, 0, table.encode(), size)
    try:
        _get(sock, family, _SO_GET_ENTRIES, buffer, table)
    except KernelError as error:
        if error.errno == errno.EAGAIN:
            return None
        raise
    del buffer[: _ENTRIES.size]
    return buffer


def read_table(sock: socket.socket, family: Family, table: str) -> tuple[Info, bytearray]:
    """Shape and blob, counters and all; tried again when somebody replaced the table in between."""
    while True:
        info = get_info(sock, family, table)
        blob = get_entries(sock, family, table, info.size)
        if blob is not None:
            return info, blob


def replace(
    sock: socket.socket, family: Family, table: str, info: Info, blob: bytes | bytearray, present: int
) -> bytes | None:
    """Put a whole table in force at once. Returns the old table's final counters, 16 bytes an entry.

    ``present`` is the number of entries that the caller believes the old table to have; None is returned, and
    nothing changed, when it has another number. New rules start with zero counters whatever the blob says
    (translate_table allocates them afresh).
    """
    counters = bytearray(present * COUNTER_SIZE)
    where = ctypes.addressof(ctypes.c_char.from_buffer(counters))
    header = _REPLACE.pack(
        table.encode(), info.valid_hooks, info.entries, info.size, *info.hook_entry, *info.underflow, present, where
    )
    try:
        sock.setsockopt(family.level, _SO_SET_REPLACE, header + blob)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return None
        raise _refused(family, f"replace table {table}", error.errno) from error
    return bytes(counters)


def add_counters(sock: socket.socket, family: Family, table: str, counters: bytes | bytearray) -> bool:
    """Add to every entry's counters; False when the table no longer has that many entries."""
    header = _COUNTERS_INFO.pack(table.encode(), len(counters) // COUNTER_SIZE)
    try:
        sock.setsockopt(family.level, _SO_SET_ADD_COUNTERS, header + counters)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EINVAL):
            return False
        raise _refused(family, f"add counters to table {table}", error.errno) from error
    return True


def entry_offsets(family: Family, blob: bytes | bytearray) -> list[int]:
    """Where each entry of a blob begins."""
    offsets, at, end = [], 0, len(blob)
    while at < end:
        offsets.append(at)
        at += _OFFSETS.unpack_from(blob, at + family.offsets_at)[1]
    return offsets


def entry_size(family: Family, blob: bytes | bytearray, at: int) -> int:
    size: int = _OFFSETS.unpack_from(blob, at + family.offsets_at)[1]
    return size


def parts(family: Family, blob: bytes | bytearray, at: int) -> Iterator[Part]:
    """The matches of the entry at ``at``, then its target."""
    target_offset, next_offset = _OFFSETS.unpack_from(blob, at + family.offsets_at)
    position = at + family.head
    while position < at + next_offset:
        size, name, revision = _HEAD.unpack_from(blob, position)
        yield Part(name.split(b"\0", 1)[0].decode(), revision, position + _HEAD.size, size - _HEAD.size)
        position += size
        if position > at + target_offset:
            return


def target(family: Family, blob: bytes | bytearray, at: int) -> Part:
    """The target of the entry at ``at``."""
    position = at + _OFFSETS.unpack_from(blob, at + family.offsets_at)[0]
    size, name, revision = _HEAD.unpack_from(blob, position)
    return Part(name.split(b"\0", 1)[0].decode(), revision, position + _HEAD.size, size - _HEAD.size)


def verdict(blob: bytes | bytearray, part: Part) -> int:
    """The verdict of a standard target (the one whose name is empty)."""
    value: int = _VERDICT.unpack_from(blob, part.at)[0]
    return value


def set_verdict(blob: bytearray, at: int, value: int) -> None:
    """Write a standard target's verdict; ``at`` is its Part's."""
    _VERDICT.pack_into(blob, at, value)


def text(blob: bytes | bytearray, part: Part) -> str:
    """A part's data as text up to the first NUL: the chain's name in an ERROR target."""
    return bytes(blob[part.at : part.at + part.size]).split(b"\0", 1)[0].decode(errors="replace")


def _get(sock: socket.socket, family: Family, option: int, buffer: bytearray, table: str) -> None:
    length = ctypes.c_uint(len(buffer))
    data = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    if _getsockopt(sock.fileno(), family.level, option, data, ctypes.byref(length)) == -1:
        raise _refused(family, f"read table {table}", ctypes.get_errno())


def _refused(family: Family, operation: str, number: int | None) -> KernelError:
    number = number or errno.EIO
    hint = None
    if number == errno.EPERM:
        hint = "this needs CAP_NET_ADMIN in the slot's user namespace"
    elif number in (errno.ENOENT, errno.ENOPROTOOPT):
        hint = "this kernel may lack the table or a match or target in it; see `netslot check`"
    return KernelError(f"{family.tool}: {operation}", number, hint=hint)
