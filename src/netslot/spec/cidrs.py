"""Lists of CIDRs, taken apart once: up to 100,000 of them, so whatever can run inside the interpreter's loops does.

Packed, each prefix is a *lane* of bytes in network order: a zero for what carries over, the address, and a tail whose
last two bytes are the prefix length and room for a verdict. One big integer holds all lanes of a list, so that one
operation on it is one on every prefix.
"""

from __future__ import annotations

import operator
import socket
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from itertools import repeat
from typing import Final, NamedTuple

from netslot.errors import UsageError

TAILS: Final = {4: 4, 6: 8}
"""Bytes behind the address, by IP version."""
LANES: Final = {4: 1 + 4 + TAILS[4], 6: 1 + 16 + TAILS[6]}
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}


class Packed(NamedTuple):
    """The lanes of one family's prefixes, bits beyond the length cleared; ``exact`` if none of these was set."""

    lanes: bytes
    exact: bool


class Cidrs(tuple[str, ...]):
    """CIDRs of both families as they were given, and packed. UsageError names one that is none."""

    @cached_property
    def packed(self) -> dict[int, Packed]:
        six = [text for text in self if ":" in text]
        four = [text for text in self if ":" not in text] if six else self
        return {4: pack(four, 4), 6: pack(six, 6)}


def cidrs(texts: Iterable[str]) -> Cidrs:
    """``texts``, or the same object if they have been taken apart already."""
    return texts if isinstance(texts, Cidrs) else Cidrs(texts)


def pack(texts: Sequence[str], version: int) -> Packed:
    """Prefixes of one family; without a length, one address. UsageError names what is none."""
    try:
        return _pack(texts, version)
    except (OSError, ValueError, KeyError):
        odd = next((text for text in texts if not _is_prefix(text, version)), "")
        raise UsageError(f"{odd!r} is no IPv{version} CIDR", hint="write 192.0.2.0/24 or 2001:db8::/32") from None


def _is_prefix(text: str, version: int) -> bool:
    try:
        _pack([text], version)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _pack(texts: Sequence[str], version: int) -> Packed:
    if not texts:
        return Packed(b"", True)
    if not all(map(operator.contains, texts, repeat("/"))):
        texts = [text if "/" in text else f"{text}/{8 * _width(version)}" for text in texts]
    parts = "/".join(texts).split("/")
    if len(parts) != 2 * len(texts):
        raise ValueError("more than one length")
    packed = b"".join(map(socket.inet_pton, repeat(_FAMILIES[version]), parts[::2]))
    lengths = bytes(map(_lengths(version).__getitem__, parts[1::2]))
    width, lane = _width(version), LANES[version]
    lanes = bytearray(lane * len(texts))
    for column in range(width):
        lanes[1 + column :: lane] = packed[column::width]
    number = int.from_bytes(lanes, "big")
    one = int.from_bytes((1 << 8 * TAILS[version]).to_bytes(lane, "big") * len(texts), "big")
    beyond = number & sizes(lengths, version) - one
    lanes = bytearray((number ^ beyond).to_bytes(len(lanes), "big"))
    lanes[lane - 2 :: lane] = lengths
    return Packed(bytes(lanes), not beyond)


def sizes(lengths: bytes, version: int) -> int:
    """How many addresses each prefix has: lanes that may be added to those of addresses."""
    lane = LANES[version]
    found = bytearray(lane * len(lengths))
    for column, digits in enumerate(_size_digits(version)):
        found[column::lane] = lengths.translate(digits)
    return int.from_bytes(found, "big")


def _width(version: int) -> int:
    return 4 if version == 4 else 16


@cache
def _lengths(version: int) -> dict[str, int]:
    return {str(length): length for length in range(8 * _width(version) + 1)}


@cache
def _size_digits(version: int) -> list[bytes]:
    """For each byte of a size, the first one the highest: its value by prefix length."""
    width = _width(version)
    every = [(1 << max(0, 8 * width - length)).to_bytes(1 + width, "big") for length in range(256)]
    return [bytes(size[column] for size in every) for column in range(1 + width)]
