"""The maps of users' programs that parameters fill: what each should hold, as bytes, and how it comes to hold it."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from netslot.errors import KernelError, SpecError
from netslot.kernel import bpf, elf
from netslot.policy import bpf_parts
from netslot.spec.policies import BpfProgram

_FILLED: Final[Mapping[int, tuple[str, tuple[str, ...]]]] = {
    bpf.MAP_TYPE_ARRAY: ("an array", ("int", "rate", "mark")),
    bpf.MAP_TYPE_HASH: ("a hash", ("ports",)),
    bpf.MAP_TYPE_LPM_TRIE: ("an LPM trie", ("cidrs",)),
}
"""Kinds of maps, and of the parameters that may fill them."""

_IPV4_KEY, _IPV6_KEY = 8, 20  # a prefix length in 32 bits, and the address
_PORT_KEY = 4


def check(section: BpfProgram, specs: Mapping[str, elf.MapSpec], kinds: Mapping[str, str] | None, key: str) -> None:
    """SpecError for a map that its parameter cannot fill; ``kinds`` are those of all parameters."""
    for name, parameter in section.maps.items():
        spec, place = specs[name], f"{key}.maps.{name}"
        if spec.kind not in _FILLED:
            raise SpecError(
                f"map {name} is of a kind that no parameter fills", key=place, hint="array, hash, LPM trie"
            )
        what, fit = _FILLED[spec.kind]
        sizes = {bpf.MAP_TYPE_HASH: (_PORT_KEY,), bpf.MAP_TYPE_LPM_TRIE: (_IPV4_KEY, _IPV6_KEY)}.get(spec.kind)
        if sizes is not None and spec.key_size not in sizes:
            expected = " or ".join(str(size) for size in sizes)
            raise SpecError(f"map {name} has keys of {spec.key_size} bytes, not {expected}", key=place)
        if kinds is not None and kinds.get(parameter) not in fit:
            kind = kinds.get(parameter, "unknown")
            raise SpecError(f"map {name} is {what}: {' or '.join(fit)} fills it, not {kind}", key=place)


def elements(spec: elf.MapSpec, listed: Sequence[str]) -> dict[bytes, bytes]:
    """What a map should hold: a number in an array, CIDRs in a trie, ports in a hash; values of ones.

    ValueError for what does not go in.
    """
    if spec.kind == bpf.MAP_TYPE_ARRAY:
        number = int(listed[0], 0) if listed else 0
        try:
            packed = number.to_bytes(spec.value_size, sys.byteorder, signed=number < 0)
        except OverflowError:
            raise ValueError(f"{number} does not fit {spec.value_size} bytes") from None
        rest = {struct.pack("=I", index): bytes(spec.value_size) for index in range(1, spec.max_entries)}
        return {bytes(4): packed} | rest
    one = (1).to_bytes(spec.value_size, sys.byteorder)
    if spec.kind == bpf.MAP_TYPE_LPM_TRIE:
        six = spec.key_size == _IPV6_KEY
        family = socket.AF_INET6 if six else socket.AF_INET
        found = {_prefix(text, family): one for text in listed if (":" in text) == six}
    else:
        found = dict.fromkeys(bpf_parts.services(listed), one)
    if len(found) > spec.max_entries:
        raise ValueError(f"{len(found)} entries, and there is room for {spec.max_entries}")
    return found


def _prefix(text: str, family: int) -> bytes:
    address, _, length = text.partition("/")
    packed = socket.inet_pton(family, address)
    return struct.pack("=I", int(length or len(packed) * 8)) + packed


def items(program: int, name: str, key_size: int, value_size: int) -> dict[bytes, bytes] | None:
    """What map ``name`` of the program with that number holds; None when it has no such map."""
    try:
        fd = bpf_parts.map_of(program, name)
    except KernelError:
        return None
    try:
        return dict(bpf.map_items(fd, key_size, value_size))
    finally:
        os.close(fd)


def ids(program: int) -> dict[str, int]:
    """The kernel's numbers of the maps that a program uses, by name; none of a program that is gone."""
    try:
        fd = bpf.prog_by_id(program)
    except KernelError:
        return {}
    numbers = bpf.prog_info(fd).map_ids
    os.close(fd)
    found: dict[str, int] = {}
    for number in numbers:
        fd = bpf.map_by_id(number)
        found[bpf.map_info(fd).name] = number
        os.close(fd)
    return found


def update(fd: int, spec: elf.MapSpec, wanted: Mapping[bytes, bytes]) -> None:
    """Make a map hold ``wanted``: what is new first, then without what is not wanted any more.

    The other way round where there is no room for both.
    """
    present = dict(bpf.map_items(fd, spec.key_size, spec.value_size))
    stale = [key for key in present if key not in wanted] if spec.kind != bpf.MAP_TYPE_ARRAY else []
    if len(wanted) + len(stale) > spec.max_entries:
        _delete(fd, stale)
        stale = []
    for key, value in wanted.items():
        if present.get(key) != value:
            bpf.map_update(fd, key, value)
    _delete(fd, stale)


def _delete(fd: int, keys: Sequence[bytes]) -> None:
    for key in keys:
        bpf.map_delete(fd, key)
