"""Parameters: the kinds there are, and whether a value is one of a kind.

Values arrive from whoever may acquire a slot and end up in rules, so each kind accepts only what cannot mean
anything else there.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from netslot.errors import UsageError
from netslot.spec.cidrs import Cidrs
from netslot.spec.document import ParameterKind

Bound: TypeAlias = str | tuple[str, ...]
"""A checked value: lists are tuples, everything else is the text that stands in rules."""

LIST_KINDS: Final = frozenset(("cidrs", "ports"))
PORT_FIELDS: Final = ("proto", "outer", "inner")
"""A rule of iptables that uses ``${NAME.proto}`` and the like stands once for each published port."""

_SCALES: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_RATE = re.compile(r"([0-9]+)(|k|M|G|Ki|Mi|Gi)")
_TEXT = re.compile(r"[A-Za-z0-9_.:/@+-]{1,64}")
_PORT = re.compile(r"(tcp|udp|sctp):([0-9]{1,5}):([0-9]{1,5})")
_EXAMPLES: Final = {
    "rate": "20M",
    "address": "192.0.2.1",
    "mark": "0x10",
    "int": "8",
    "text": "blue-7",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One declared parameter; ``default`` is a checked value of its kind."""

    name: str
    kind: ParameterKind
    default: Bound
    min: int | None = None
    max: int | None = None

    @property
    def is_list(self) -> bool:
        return self.kind in LIST_KINDS

    def check(self, value: object) -> Bound:
        """``value`` as it goes into rules. UsageError says what was expected."""
        return check(self.name, self.kind, value, self.min, self.max)


def check(name: str, kind: ParameterKind, value: object, low: int | None = None, high: int | None = None) -> Bound:
    """``value`` of a parameter ``name``, checked and in the form that rules take. UsageError when it is wrong.

    A list may be given as one text with commas, as on a command line.
    """
    if kind in LIST_KINDS:
        items = [item for item in value.split(",") if item] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(issubclass(each, str) for each in set(map(type, items))):
            raise UsageError(f"parameter {name}: expected a list of texts, got {value!r}")
        return _cidrs(name, items) if kind == "cidrs" else _ports(name, items)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"parameter {name}: expected {kind}, got {value!r}")
    text = str(value)
    try:
        return _scalar(kind, text, low, high)
    except ValueError as error:
        raise UsageError(f"parameter {name}: {text!r} is no {kind}", hint=f"for example {_EXAMPLES[kind]}") from error


def _scalar(kind: ParameterKind, text: str, low: int | None, high: int | None) -> str:
    if kind == "rate":
        if (match := _RATE.fullmatch(text)) is None:
            raise ValueError(text)
        return str(int(match[1]) * _SCALES[match[2]])
    if kind == "address":
        return str(ipaddress.ip_address(text))
    if kind == "text":
        if not _TEXT.fullmatch(text):
            raise ValueError(text)
        return text
    number = int(text, 0)
    low, high = (0, 0xFFFFFFFF) if kind == "mark" else (low, high)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(text)
    return hex(number) if kind == "mark" else str(number)


def _cidrs(name: str, items: Sequence[str]) -> Cidrs:
    found = Cidrs(items)
    if not _are_networks(found):
        raise _not_a_network(name, next(item for item in items if not _are_networks(Cidrs((item,)))))
    return found


def _are_networks(items: Cidrs) -> bool:
    """Whether each is an address, alone or with a length that leaves no bit of it out."""
    try:
        return all(packed.exact for packed in items.packed.values())
    except UsageError:
        return False


def _not_a_network(name: str, item: str) -> UsageError:
    try:
        hint = f"the network that holds it is {ipaddress.ip_network(item, strict=False)}"
    except ValueError:
        hint = "for example 192.0.2.0/24 or 2001:db8::/32"
    return UsageError(f"parameter {name}: {item!r} is no network", hint=hint)


def _ports(name: str, items: Sequence[str]) -> tuple[str, ...]:
    seen: set[tuple[str, int]] = set()
    for item in items:
        match = _PORT.fullmatch(item)
        if match is None or not all(0 < int(port) < 65536 for port in match.groups()[1:]):
            raise UsageError(
                f"parameter {name}: {item!r} is no published port",
                hint="PROTOCOL:OUTER:INNER, for example tcp:8080:80",
            )
        outer = (match[1], int(match[2]))
        if outer in seen:
            raise UsageError(f"parameter {name}: {match[1]} port {match[2]} is published twice")
        seen.add(outer)
    return tuple(items)
