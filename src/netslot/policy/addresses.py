"""Lists of prefixes flattened to the table that the egress filter searches; layout in bpf/filter.c.

Written for lists of 100,000: whatever can run inside the interpreter's own loops does.
"""

from __future__ import annotations

import operator
import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, compress, pairwise, repeat
from typing import Final

from netslot.spec.cidrs import LANES, TAILS, Packed, pack, sizes

DROP: Final = 0
ACCEPT: Final = 1
PORTS: Final = 2

_ONES = 0xFFFFFFFFFFFFFFFF
_RANGES_PER_BUCKET = 32
"""How many ranges a bucket holds on average: the look-up's last five steps, whatever the list's length."""


def table4(lists: Mapping[int, Sequence[str]], default: int) -> bytes:
    """The IPv4 table of lists by verdict; the longest prefix decides, ``default`` holds for all that is not listed.

    A prefix that is on two lists gets the lower verdict: DROP before all others. UsageError for what is no CIDR.
    """
    return table({verdict: pack(prefixes, 4) for verdict, prefixes in lists.items()}, default, 4)


def table6(lists: Mapping[int, Sequence[str]], default: int) -> bytes:
    """The IPv6 table, as :func:`table4`."""
    return table({verdict: pack(prefixes, 6) for verdict, prefixes in lists.items()}, default, 6)


def table(lists: Mapping[int, Packed], default: int, version: int) -> bytes:
    """The table of one family, whose prefixes have been taken apart already."""
    lane, words = LANES[version], 1 if version == 4 else 3
    given = [verdict for verdict, prefixes in lists.items() if prefixes.lanes]
    text = b"".join(_judged(lists[verdict].lanes, verdict, lane) for verdict in given).decode("latin-1")
    # Python sorts texts of such letters several times faster than bytes or large numbers.
    ordered = "".join(sorted([text[at : at + lane] for at in range(0, len(text), lane)])).encode("latin-1")
    if len(given) == 1 and given[0] != default:
        ranges = _union(ordered, given[0], default, version)
    else:
        ranges = _nested(ordered, default, version)
    cells = array("Q", ranges)
    if sys.byteorder == "little":
        cells.byteswap()
    head, padding = _index(cells[::words].tolist(), *((32, 32) if version == 4 else (64, 0)))
    ones = [0xFFFFFFFF << 32 | cells[-1] & 3] if version == 4 else [_ONES, _ONES, cells[-1]]
    return (array("Q", head) + cells + array("Q", ones * padding)).tobytes()


def _judged(lanes: bytes, verdict: int, lane: int) -> bytearray:
    found = bytearray(lanes)
    found[lane - 1 :: lane] = bytes([verdict]) * (len(lanes) // lane)
    return found


def _union(ordered: bytes, verdict: int, default: int, version: int) -> bytes:
    """With one verdict a prefix inside another, or beside it, makes no range of its own."""
    lane, tail = LANES[version], TAILS[version]
    count = len(ordered) // lane
    addresses = bytearray(ordered)
    for column in (lane - 2, lane - 1):
        addresses[column::lane] = bytes(count)
    past = int.from_bytes(addresses, "big") + sizes(ordered[lane - 2 :: lane], version)
    starts = struct.unpack(f"{lane}s" * count, addresses)
    reach = list(accumulate(struct.unpack(f"{lane}s" * count, past.to_bytes(lane * count, "big")), max))
    begins = [True, *map(operator.lt, reach, starts[1:])]
    runs = list(compress(starts, begins))
    bounds = [b""] * (2 * len(runs))
    bounds[::2], bounds[1::2] = runs, compress(reach, [*begins[1:], True])
    found = bytearray(b"".join(bounds))
    found[lane - 1 :: 2 * lane] = bytes([verdict]) * len(runs)
    found[2 * lane - 1 :: 2 * lane] = bytes([default]) * len(runs)
    if found[-lane]:  # the last one ends where the addresses do
        del found[-lane:]
    if any(found[: lane - tail]):
        found[:0] = bytes(lane - 1) + bytes([default])
    del found[::lane]
    return bytes(found)


def _nested(ordered: bytes, default: int, version: int) -> bytes:
    """A prefix sorts before the longer ones inside it, whose ranges interrupt its own."""
    lane, below = LANES[version], 8 * TAILS[version]
    bits = 8 * (lane - 1) - below
    end_of_all = 1 << bits
    ranges = [default]
    enclosing: list[tuple[int, int]] = []  # (end, verdict) of the prefixes that hold the current place
    previous = -1

    def emit(start: int, verdict: int) -> None:
        if ranges[-1] >> below == start:
            ranges[-1] = start << below | verdict
        elif ranges[-1] & 3 != verdict and start < end_of_all:
            ranges.append(start << below | verdict)

    def leave(place: int) -> None:
        while enclosing and enclosing[-1][0] <= place:
            end, _ = enclosing.pop()
            emit(end, enclosing[-1][1] if enclosing else default)

    for at in range(0, len(ordered), lane):
        key = int.from_bytes(ordered[at : at + lane], "big")
        if key >> 8 == previous:
            continue
        previous = key >> 8
        start = key >> below
        leave(start)
        emit(start, key & 3)
        enclosing.append((start + (1 << bits - (previous & 255)), key & 3))
    leave(end_of_all)
    return b"".join([each.to_bytes(lane - 1, "big") for each in ranges])


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
    lows = [max(0, at - 1) for at in map(bisect_left, repeat(keys), places)]
    lows.append(last)
    head, reach = [base, shift << 32 | buckets], last
    for low, following in pairwise(lows):
        step = (1 << (following - low).bit_length()) >> 1
        head.append(step << 32 | low)
        reach = max(reach, low + 2 * step - 1)
    head.append(last)
    return head, reach - last
