"""bpf(2): maps, programs, attachments to cgroups, test runs.

Layouts: union bpf_attr in linux/bpf.h; every field is native-endian and unused tail bytes are zero.
Descriptors that functions return are the caller's to close. Nothing here is pinned: a map lives as long as a
program that uses it, and a program as long as what it is attached to.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from netslot.errors import HostError, KernelError
from netslot.kernel import sys

MAP_TYPE_HASH: Final = 1
MAP_TYPE_ARRAY: Final = 2
MAP_TYPE_LPM_TRIE: Final = 11

F_NO_PREALLOC: Final = 1
F_RDONLY_PROG: Final = 1 << 7
F_MMAPABLE: Final = 1 << 10

PROG_TYPE_SCHED_CLS: Final = 3
PROG_TYPE_CGROUP_SKB: Final = 8
PROG_TYPE_CGROUP_SOCK: Final = 9
PROG_TYPE_CGROUP_SOCK_ADDR: Final = 18

F_ALLOW_MULTI: Final = 1 << 1
F_REPLACE: Final = 1 << 2

_SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351, "loongarch64": 280}

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD = 0, 1, 2, 3, 5
_PROG_ATTACH, _PROG_DETACH, _PROG_TEST_RUN = 8, 9, 10
_PROG_BY_ID, _MAP_BY_ID, _OBJ_INFO, _PROG_QUERY = 13, 14, 15, 16
_MAP_FREEZE, _MAP_LOOKUP_BATCH, _MAP_UPDATE_BATCH = 22, 24, 26
_LINK_BY_ID, _LINK_NEXT_ID, _LINK_DETACH = 30, 31, 34

TCX_HOOKS: Final = {"ingress": 46, "egress": 47}
"""Hook points of a link beside tc's own (Linux 6.6), by enum bpf_attach_type."""
_QUERY = struct.Struct("=IIIIQIIQQQQ")
_LINK_INFO = struct.Struct("=IIIIQII32x")

_PROG_INFO = struct.Struct("=II8sIIQQQIIQ16sII")
_MAP_INFO = struct.Struct("=IIIIII16s")


def _bpf(command: int, attributes: bytes | ctypes.Array[ctypes.c_char], operation: str) -> int:
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise HostError(f"the number of bpf(2) on {platform.machine()} is not known to netslot")
    if isinstance(attributes, bytes):
        attributes = ctypes.create_string_buffer(attributes, len(attributes))
    size = ctypes.sizeof(attributes)
    result = sys.syscall(number, ctypes.c_int(command), attributes, ctypes.c_uint(size))
    return sys.check(result, operation)


def _address(buffer: ctypes.Array[ctypes.c_char] | bytes) -> int:
    """Where a buffer's bytes are; the caller keeps the buffer alive over the call."""
    if isinstance(buffer, bytes):
        return ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p).value or 0
    return ctypes.addressof(buffer)


def _name(text: str) -> bytes:
    """A BPF object name: 15 of [A-Za-z0-9_.] and a NUL."""
    return text.encode()[:15].ljust(16, b"\0")


def map_create(kind: int, key_size: int, value_size: int, max_entries: int, *, flags: int = 0, name: str = "") -> int:
    """Make a map; returns its descriptor, close-on-exec."""
    attributes = struct.pack("=IIIIIII16s", kind, key_size, value_size, max_entries, flags, 0, 0, _name(name))
    return _bpf(_MAP_CREATE, attributes, f"bpf map_create {name}")


def map_update(fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """Set one element. For per-CPU maps ``value`` holds one 8-byte aligned value per possible CPU."""
    _bpf(_MAP_UPDATE, struct.pack("=IIQQQ", fd, 0, _address(key), _address(value), flags), "bpf map_update")


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> None:
    """Set ``count`` elements whose keys and values lie one after another in the two buffers (Linux 5.6)."""
    attributes = struct.pack("=QQQQIIQQ", 0, 0, _address(keys), _address(values), count, fd, 0, 0)
    _bpf(_MAP_UPDATE_BATCH, attributes, f"bpf map_update_batch of {count}")


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """One element's value, or None. For per-CPU maps ``value_size`` is 8-aligned size x possible CPUs."""
    value = ctypes.create_string_buffer(value_size)
    try:
        _bpf(_MAP_LOOKUP, struct.pack("=IIQQQ", fd, 0, _address(key), _address(value), 0), "bpf map_lookup")
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def map_delete(fd: int, key: bytes) -> None:
    """Remove one element; absence is success."""
    try:
        _bpf(_MAP_DELETE, struct.pack("=IIQQQ", fd, 0, _address(key), 0, 0), "bpf map_delete")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise


def map_items(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes]]:
    """All elements of a map that is not per-CPU, a few thousand per call (Linux 5.6, LPM tries 6.1)."""
    count = 4096
    keys, values = ctypes.create_string_buffer(count * key_size), ctypes.create_string_buffer(count * value_size)
    places = [ctypes.create_string_buffer(max(key_size, 8)) for _ in range(2)]
    first, done = True, False
    while not done:
        request = struct.pack(
            "=QQQQIIQQ",
            0 if first else _address(places[0]),
            _address(places[1]),
            _address(keys),
            _address(values),
            count,
            fd,
            0,
            0,
        )
        attributes = ctypes.create_string_buffer(request, len(request))
        try:
            _bpf(_MAP_LOOKUP_BATCH, attributes, "bpf map_lookup_batch")
        except KernelError as error:
            if error.errno != errno.ENOENT:  # which says that these were the last
                raise
            done = True
        found = struct.unpack_from("=I", attributes.raw, 32)[0]
        for i in range(found):
            yield (
                keys.raw[i * key_size : (i + 1) * key_size],
                values.raw[i * value_size : (i + 1) * value_size],
            )
        places.reverse()
        first = False


def map_freeze(fd: int) -> None:
    """Forbid further writes from user space: the verifier then takes an F_RDONLY_PROG map's content as constant."""
    _bpf(_MAP_FREEZE, struct.pack("=I", fd), "bpf map_freeze")


def prog_load(kind: int, instructions: bytes, license: str, *, name: str = "", attach_type: int = 0) -> int:
    """Verify and load a program; returns its descriptor.

    Raises KernelError whose detail is the end of the verifier's log: the line that says what it refused.
    """
    text = license.encode() + b"\0"

    def attributes(log: ctypes.Array[ctypes.c_char] | None) -> bytes:
        return struct.pack(
            "=IIQQIIQII16sII",
            kind,
            len(instructions) // 8,
            _address(instructions),
            _address(text),
            1 if log else 0,
            len(log) if log else 0,
            _address(log) if log else 0,
            0,
            0,
            _name(name),
            0,
            attach_type,
        )

    operation = f"bpf prog_load {name}"
    try:
        return _bpf(_PROG_LOAD, attributes(None), operation)
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise
        refused = error
    log = ctypes.create_string_buffer(1 << 20)
    try:
        return _bpf(_PROG_LOAD, attributes(log), operation)
    except KernelError as error:
        lines = [line for line in log.value.decode(errors="replace").splitlines() if line]
        reason = [line for line in lines if not line.startswith(("processed ", "verification time"))][-3:]
        detail = "; ".join([os.strerror(refused.errno), *reason])
        raise KernelError(operation, error.errno, detail=detail) from error


class ProgramInfo(NamedTuple):
    """What the kernel tells of a program. ``tag`` is a digest of its instructions, map descriptors left out."""

    id: int
    kind: int
    tag: bytes
    name: str
    map_ids: tuple[int, ...]


class MapInfo(NamedTuple):
    """What the kernel tells of a map; sizes in bytes."""

    id: int
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


def prog_info(fd: int) -> ProgramInfo:
    """Identity of a loaded program."""
    ids = (ctypes.c_uint32 * 64)()
    info = ctypes.create_string_buffer(_PROG_INFO.size)
    _PROG_INFO.pack_into(info, 0, 0, 0, b"", 0, 0, 0, 0, 0, 0, 64, ctypes.addressof(ids), b"", 0, 0)
    _bpf(_OBJ_INFO, struct.pack("=IIQ", fd, len(info), _address(info)), "bpf prog_info")
    kind, number, tag, _, _, _, _, _, _, maps, _, name, _, _ = _PROG_INFO.unpack(info.raw)
    return ProgramInfo(number, kind, tag, name.rstrip(b"\0").decode(), tuple(ids[:maps]))


def map_info(fd: int) -> MapInfo:
    """Identity and shape of a map."""
    info = ctypes.create_string_buffer(_MAP_INFO.size)
    _bpf(_OBJ_INFO, struct.pack("=IIQ", fd, len(info), _address(info)), "bpf map_info")
    kind, number, key, value, entries, flags, name = _MAP_INFO.unpack(info.raw)
    return MapInfo(number, kind, key, value, entries, flags, name.rstrip(b"\0").decode())


def prog_by_id(number: int) -> int:
    """A descriptor of the loaded program with this id; ENOENT when it is gone."""
    return _bpf(_PROG_BY_ID, struct.pack("=III", number, 0, 0), f"bpf prog_by_id {number}")


def map_by_id(number: int) -> int:
    """A descriptor of the map with this id; ENOENT when it is gone."""
    return _bpf(_MAP_BY_ID, struct.pack("=III", number, 0, 0), f"bpf map_by_id {number}")


def prog_attach(target: int, program: int, attach_type: int, *, replace: int = 0) -> None:
    """Attach to a cgroup (descriptor of its directory), beside what others attached.

    ``replace`` is a descriptor of an attached program whose place is taken, atomically. The attachment lives
    as long as the cgroup.
    """
    flags = F_ALLOW_MULTI | (F_REPLACE if replace else 0)
    _bpf(_PROG_ATTACH, struct.pack("=IIIII", target, program, attach_type, flags, replace), "bpf prog_attach")


def prog_detach(target: int, program: int, attach_type: int) -> None:
    """Undo :func:`prog_attach`; absence is success."""
    try:
        _bpf(_PROG_DETACH, struct.pack("=IIIII", target, program, attach_type, 0, 0), "bpf prog_detach")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise


def prog_query(target: int, attach_type: int) -> tuple[int, ...]:
    """Ids of the programs attached to a cgroup itself (not those it inherits), in the order they run."""
    ids = (ctypes.c_uint32 * 64)()
    query = ctypes.create_string_buffer(
        struct.pack("=IIIIQI", target, attach_type, 0, 0, ctypes.addressof(ids), 64), 32
    )
    _bpf(_PROG_QUERY, query, "bpf prog_query")
    return tuple(ids[: struct.unpack_from("=I", query.raw, 24)[0]])


class Attached(NamedTuple):
    """A program on a link's tcx hook (ids); ``link`` is 0 unless a BPF link holds it there."""

    program: int
    link: int


def tcx_query(index: int, hook: int) -> list[Attached]:
    """The programs on a tcx hook of link ``index``, which the kernel runs before tc's own filters.

    None where the kernel has no such hooks; and none where only the machine's own root may ask, as in a user
    namespace, where nobody may attach one either (bpf_net_capable() in linux/bpf.h). The kernel fills in the whole
    structure, whatever size it was told.
    """
    programs, links = (ctypes.c_uint32 * 64)(), (ctypes.c_uint32 * 64)()
    head = (index, hook, 0, 0, ctypes.addressof(programs), 64, 0, 0, ctypes.addressof(links), 0, 0)
    query = ctypes.create_string_buffer(_QUERY.pack(*head), _QUERY.size)
    try:
        _bpf(_PROG_QUERY, query, "bpf query tcx")
    except KernelError as error:
        if error.errno in (errno.EINVAL, errno.EPERM):
            return []
        raise
    count = _QUERY.unpack(query.raw)[5]
    return [Attached(*pair) for pair in zip(programs[:count], links[:count], strict=True)]


def link_detach(number: int) -> None:
    """Take what a BPF link (id) holds from its place, whoever keeps the link; absence is success."""
    try:
        fd = _bpf(_LINK_BY_ID, struct.pack("=III", number, 0, 0), f"bpf link_by_id {number}")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return
    try:
        _bpf(_LINK_DETACH, struct.pack("=I", fd), f"bpf link_detach {number}")
    finally:
        os.close(fd)


def cgroup_links(place: int, program: int, attach_type: int) -> list[int]:
    """The BPF links (ids) that hold ``program`` (an id) at the cgroup with inode ``place``."""
    found: list[int] = []
    number = 0
    while True:
        request = ctypes.create_string_buffer(struct.pack("=III", number, 0, 0), 12)
        try:
            _bpf(_LINK_NEXT_ID, request, "bpf link_next_id")
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return found
            raise
        number = struct.unpack_from("=I", request.raw, 4)[0]
        try:
            fd = _bpf(_LINK_BY_ID, struct.pack("=III", number, 0, 0), f"bpf link_by_id {number}")
        except KernelError as error:
            if error.errno == errno.ENOENT:  # gone since
                continue
            raise
        try:
            info = ctypes.create_string_buffer(_LINK_INFO.size)
            _bpf(_OBJ_INFO, struct.pack("=IIQ", fd, len(info), _address(info)), "bpf link_info")
        finally:
            os.close(fd)
        _, _, held, _, where, kind, _ = _LINK_INFO.unpack(info.raw)
        if (held, where, kind) == (program, place, attach_type):
            found.append(number)


class TestRun(NamedTuple):
    """A program's answer to one packet; ``nanoseconds`` is the mean of one run."""

    verdict: int
    packet: bytes
    nanoseconds: int


def prog_test_run(fd: int, packet: bytes, *, context: bytes = b"", repeat: int = 1) -> TestRun:
    """Run a program on ``packet`` (from the Ethernet header on) without any device (BPF_PROG_TEST_RUN).

    ``context`` is the beginning of a struct __sk_buff for the fields that may be set.
    """
    output = ctypes.create_string_buffer(len(packet) + 256)
    head = struct.pack("=IIIIQQII", fd, 0, len(packet), len(output), _address(packet), _address(output), repeat, 0)
    tail = struct.pack("=IIQQ", len(context), 0, _address(context) if context else 0, 0)
    attributes = ctypes.create_string_buffer(head + tail, len(head) + len(tail))
    _bpf(_PROG_TEST_RUN, attributes, "bpf prog_test_run")
    _, verdict, _, size, _, _, _, duration = struct.unpack_from("=IIIIQQII", attributes.raw)
    return TestRun(ctypes.c_int32(verdict).value, output.raw[:size], duration)
