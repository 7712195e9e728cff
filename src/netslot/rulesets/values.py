"""From the text of one option's value to numbers, and back. Every function raises ValueError on nonsense."""

from __future__ import annotations

import ipaddress

from netslot.rulesets.model import Family

ALL_ONES = {4: (1 << 32) - 1, 6: (1 << 128) - 1}
MARK_BITS = (1 << 32) - 1


class NameNotNumber(ValueError):
    """The value is a name (host, service, group) that only the machine it came from can turn into a number."""


def address(text: str, family: Family) -> int:
    """A literal address. NameNotNumber when it looks like a host name."""
    try:
        return int(ipaddress.IPv4Address(text)) if family == 4 else int(ipaddress.IPv6Address(text))
    except ValueError:
        if _looks_like_name(text):
            raise NameNotNumber(text) from None
        raise ValueError(f"'{text}' is not an IPv{family} address") from None


def _looks_like_name(text: str) -> bool:
    return ":" not in text and any(c.isalpha() for c in text) and text[0].isalnum()


def network(text: str, family: Family) -> tuple[int, int]:
    """``A``, ``A/len`` or ``A/mask`` to (value, mask), with the bits outside the mask cleared as iptables does."""
    literal, slash, suffix = text.partition("/")
    ones = ALL_ONES[family]
    value = address(literal, family)
    if not slash:
        return value, ones
    if suffix.isdigit() and "." not in suffix:
        width, length = (32 if family == 4 else 128), int(suffix)
        if length > width:
            raise ValueError(f"'{text}' has a prefix length over {width}")
        mask = ones ^ ((1 << (width - length)) - 1)
    else:
        mask = address(suffix, family)
    return value & mask, mask


def address_text(value: int, family: Family) -> str:
    return str(ipaddress.IPv4Address(value) if family == 4 else ipaddress.IPv6Address(value))


def prefix_length(mask: int, family: Family) -> int | None:
    """The length if the mask is a prefix, else None."""
    inverted = mask ^ ALL_ONES[family]
    if inverted & (inverted + 1):
        return None
    return (32 if family == 4 else 128) - inverted.bit_length()


def network_text(value: int, mask: int, family: Family) -> str:
    """As iptables-save prints it: a prefix length where the mask is one, else the mask."""
    length = prefix_length(mask, family)
    suffix = address_text(mask, family) if length is None else str(length)
    return f"{address_text(value, family)}/{suffix}"


def number(text: str, highest: int) -> int:
    """Decimal, 0x hexadecimal or 0 octal, as strtoul reads it with base 0."""
    try:
        value = int(text, 8 if text[:1] == "0" and text.isdigit() else 0)
    except ValueError:
        raise ValueError(f"'{text}' is not a number") from None
    if not 0 <= value <= highest:
        raise ValueError(f"{text} is outside 0..{highest}")
    return value


def masked(text: str) -> tuple[int, int]:
    """``VALUE[/MASK]`` of marks and groups."""
    value, slash, mask = text.partition("/")
    return number(value, MARK_BITS), number(mask, MARK_BITS) if slash else MARK_BITS


def masked_text(value: int, mask: int) -> str:
    return f"{value:#x}" if mask == MARK_BITS else f"{value:#x}/{mask:#x}"


def span(text: str, highest: int, separator: str = ":") -> tuple[int, int]:
    """``A``, ``A:B``, ``A:`` or ``:B``."""
    low, found, high = text.partition(separator)
    if not found:
        value = _plain(low, highest)
        return value, value
    first = _plain(low, highest) if low else 0
    last = _plain(high, highest) if high else highest
    if first > last:
        raise ValueError(f"the range {text} ends before it begins")
    return first, last


def _plain(text: str, highest: int) -> int:
    if text and _looks_like_name(text) and not text.startswith("0x"):
        raise NameNotNumber(text)
    return number(text, highest)


def span_text(low: int, high: int, separator: str = ":") -> str:
    return str(low) if low == high else f"{low}{separator}{high}"


def address_span(text: str, family: Family) -> tuple[int, int]:
    """``A`` or ``A-B``."""
    low, dash, high = text.partition("-")
    first = address(low, family)
    last = address(high, family) if dash else first
    if first > last:
        raise ValueError(f"the range {text} ends before it begins")
    return first, last
