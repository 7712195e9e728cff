"""Lists of prefixes flattened to the table that the egress filter searches; layout in bpf/filter.c.

Written for lists of 100,000: whatever can run inside the interpreter's own loops does.
"""

from __future__ import annotations

import socket
import struct
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise, repeat
from typing import Final, TypeAlias

from netslot.errors import UsageError

DROP: Final = 0
ACCEPT: Final = 1
PORTS: Final = 2

_RANGES_PER_BUCKET = 32
"""How many ranges a bucket holds on average: the look-up's last five steps, whatever the list's length."""

Prefixes: TypeAlias = Sequence[str]
"""CIDRs of one family, as ``192.0.2.0/24`` or ``2001:db8::/32``; without a length, one address."""

_Ranges: TypeAlias = list[int]
"""start << below | verdict, in ascending order, the first from 0, each up to the next one's start."""


def table4(lists: Mapping[int, Prefixes], default: int) -> bytes:
    """The IPv4 table of lists by verdict; the longest prefix decides, ``default`` holds for all that is not listed.

    A prefix that is on two lists gets the lower verdict: DROP before all others. UsageError for what is no CIDR.
    """
    keys: list[float] = []
    for verdict, prefixes in lists.items():
        packed, masks, lengths = _parse(prefixes, socket.AF_INET, 32)
        networks = array("I", packed)
        networks.byteswap()
        keys += [(n & m) * 1024.0 + (k + verdict) for n, m, k in zip(networks, masks, lengths, strict=True)]
    # 42 bits fit a double exactly, and Python sorts doubles in half the time of integers.
    ranges = _ranges(list(map(int, sorted(keys))), 32, 32, len(lists) == 1, default)
    head, padding = _index(ranges, 32, 32)
    return array("Q", head + ranges + [0xFFFFFFFF << 32 | ranges[-1] & 3] * padding).tobytes()


def table6(lists: Mapping[int, Prefixes], default: int) -> bytes:
    """The IPv6 table, as :func:`table4`."""
    keys: list[int] = []
    for verdict, prefixes in lists.items():
        packed, masks, lengths = _parse(prefixes, socket.AF_INET6, 128)
        halves = struct.unpack(f">{len(packed) // 8}Q", packed)
        networks = [upper << 64 | lower for upper, lower in zip(halves[::2], halves[1::2], strict=True)]
        keys += [(n & m) << 10 | k | verdict for n, m, k in zip(networks, masks, lengths, strict=True)]
    ranges = _ranges(sorted(keys), 128, 2, len(lists) == 1, default)
    head, padding = _index([each >> 66 for each in ranges], 64, 0)
    ones = 0xFFFFFFFFFFFFFFFF
    cells = array("Q", head)
    for each in ranges:
        cells.extend((each >> 66, each >> 2 & ones, each & 3))
    cells.extend([ones, ones, ranges[-1] & 3] * padding)
    return cells.tobytes()


def _parse(prefixes: Prefixes, family: int, bits: int) -> tuple[bytes, list[int], list[int]]:
    """Addresses in network order, netmasks, and prefix lengths x 4 (the two lowest bits are the verdict's)."""
    if not prefixes:
        return b"", [], []
    parts = "/".join(prefixes).split("/")
    if len(parts) != 2 * len(prefixes):
        prefixes = [text if "/" in text else f"{text}/{bits}" for text in prefixes]
        parts = "/".join(prefixes).split("/")
        if len(parts) != 2 * len(prefixes):
            odd = next(text for text in prefixes if text.count("/") != 1)
            raise UsageError(f"{odd!r} is no CIDR", hint="write 192.0.2.0/24")
    masks = {str(length): ((1 << length) - 1) << (bits - length) for length in range(bits + 1)}
    lengths = {str(length): length * 4 for length in range(bits + 1)}
    try:
        packed = b"".join(map(socket.inet_pton, repeat(family), parts[::2]))
        return packed, list(map(masks.__getitem__, parts[1::2])), list(map(lengths.__getitem__, parts[1::2]))
    except (OSError, KeyError):
        odd = next(text for text in prefixes if not _is_prefix(text, family, lengths))
        raise UsageError(f"{odd!r} is no IPv{4 if bits == 32 else 6} CIDR", hint="write 192.0.2.0/24") from None


def _is_prefix(text: str, family: int, lengths: Mapping[str, int]) -> bool:
    address, _, length = text.partition("/")
    try:
        socket.inet_pton(family, address)
    except OSError:
        return False
    return length in lengths


def _ranges(keys: list[int], bits: int, below: int, one_verdict: bool, default: int) -> _Ranges:
    """Flatten sorted keys (network << 10 | length << 2 | verdict)."""
    sizes = [1 << (bits - length) for length in range(bits + 1)]
    if one_verdict and keys and (keys[0] & 3) != default:
        return _union(keys, sizes, below, default)
    return _nested(keys, sizes, below, default)


def _union(keys: list[int], sizes: list[int], below: int, default: int) -> _Ranges:
    """With one verdict a prefix inside another changes nothing."""
    verdict = keys[0] & 3
    spans = [size << below for size in sizes]
    ranges: _Ranges = []
    end = -1
    for key in keys:
        start = key >> 10 << below
        if start > end:
            ranges += (end | default, start | verdict)
            end = start + spans[(key & 1023) >> 2]
        elif start == end:
            end += spans[(key & 1023) >> 2]
    ranges.append(end | default)
    ranges[0] = default
    if ranges[1] >> below == 0:
        del ranges[0]
    if end == spans[0]:
        del ranges[-1]
    return ranges


def _nested(keys: list[int], sizes: list[int], below: int, default: int) -> _Ranges:
    """A prefix sorts before the longer ones inside it, whose ranges interrupt its own."""
    ranges = [default]
    enclosing: list[tuple[int, int]] = []  # (end, verdict) of the prefixes that hold the current place
    previous = -1

    def emit(start: int, verdict: int) -> None:
        if ranges[-1] >> below == start:
            ranges[-1] = start << below | verdict
        elif ranges[-1] & 3 != verdict and start < sizes[0]:
            ranges.append(start << below | verdict)

    def leave(place: int) -> None:
        while enclosing and enclosing[-1][0] <= place:
            end, _ = enclosing.pop()
            emit(end, enclosing[-1][1] if enclosing else default)

    for key in keys:
        if key >> 2 == previous:
            continue
        previous = key >> 2
        start = key >> 10
        leave(start)
        emit(start, key & 3)
        enclosing.append((start + sizes[(key & 1023) >> 2], key & 3))
    leave(sizes[0])
    return ranges


def _index(keys: list[int], bits: int, below: int) -> tuple[list[int], int]:
    """The table's head, and how many ranges beyond the end the longest search may probe.

    ``keys`` are the ranges' starts, with ``below`` more bits under each.
    """
    base = keys[1] >> below if len(keys) > 1 else 0
    span = (keys[-1] >> below) - base + 1
    wanted = max(1, len(keys) // _RANGES_PER_BUCKET)
    shift = min(max(0, span.bit_length() - wanted.bit_length()), bits - 1)
    buckets = (span + (1 << shift) - 1) >> shift
    last = len(keys) - 1
    # With equal keys (upper halves of IPv6 addresses) the search must begin before the first of them.
    places = range(base << below, (base << below) + (buckets << shift + below), 1 << shift + below)
    lows = [max(0, bisect_left(keys, place) - 1) for place in places]
    lows.append(last)
    head, reach = [base, shift << 32 | buckets], last
    for low, following in pairwise(lows):
        step = (1 << (following - low).bit_length()) >> 1
        head.append(step << 32 | low)
        reach = max(reach, low + 2 * step - 1)
    head.append(last)
    return head, reach - last
