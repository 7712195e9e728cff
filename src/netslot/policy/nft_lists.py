"""List parameters of an nftables template: sets of CIDRs and maps of published ports, as set elements.

The user declares the set or map, empty, under the parameter's name (``NAME``, and ``NAME6`` for IPv6). Which
bytes an element has follows from the declared types. Elements can also be written as the kernel dumps them, so
that reading back is a comparison of bytes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from netslot.errors import SpecError, UsageError
from netslot.kernel import nf_attrs as attrs
from netslot.kernel.netlink import attr
from netslot.kernel.nf_attrs import SET
from netslot.policy.base import Values
from netslot.policy.nft_template import LARGEST_LIST, Item, Ruleset

CIDRS, PORTS = "cidrs", "ports"
KINDS = (CIDRS, PORTS)

# nft's numbers of data types (enum datatypes in its datatype.h); a concatenation has 6 bits for each field.
_IPV4, _IPV6, _PROTOCOL, _SERVICE = 7, 8, 12, 13
_TYPE_NAMES = {_IPV4: "ipv4_addr", _IPV6: "ipv6_addr", _PROTOCOL: "inet_proto", _SERVICE: "inet_service"}
_FIELD_SIZE = {_IPV4: 4, _IPV6: 16, _PROTOCOL: 1, _SERVICE: 2}
_TYPE_BITS = 6

_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
END_FLAG = attr(attrs.ELEM_FLAGS, struct.pack(">I", attrs.ELEM_INTERVAL_END))
"""How an encoded element ends that is the end of an interval."""

# nft's own mark for an interval that ends with the last address (NFTNL_UDATA_SET_ELEM_FLAGS, INTERVAL_OPEN).
_OPEN = attr(6, struct.pack("=BBI", 1, 4, 1))
_KEY_OFFSET = 12  # of the key's bytes in an element: three attribute headers


@dataclass(frozen=True, slots=True)
class ListSet:
    """One set or map of a template that a list parameter fills."""

    parameter: str
    kind: str
    item: Item
    index: int
    """The set's place among the template's sets."""

    @property
    def version(self) -> int:
        """The IP version of a set of networks."""
        return 4 if attrs.number(self.item.nodes, attrs.SET_KEY_LEN) == 4 else 6

    def chunks(self, entries: Sequence[str], values: Values) -> list[bytes]:
        """The elements for ``entries``, encoded, in pieces that fit one message each. UsageError for a bad entry."""
        if self.kind == CIDRS:
            return interval_chunks(*self._intervals(entries), self.version)
        return list(_packed(self._port_elements(entries, values)))

    def dumped(self, entries: Sequence[str], values: Values) -> bytes:
        """The same elements as the kernel dumps them: intervals from the highest down, all else in any order."""
        if self.kind == CIDRS:
            return b"".join(interval_chunks(*self._intervals(entries), self.version, descending=True))
        return b"".join(self._port_elements(entries, values))

    def _intervals(self, entries: Sequence[str]) -> tuple[list[int], list[int]]:
        own = [entry for entry in entries if (":" in entry) == (self.version == 6)]
        return intervals(own, self.version)

    def _port_elements(self, entries: Sequence[str], values: Values) -> list[bytes]:
        keys, data = self.key_fields(), self.data_fields()
        found: dict[bytes, bytes] = {}
        for entry in entries:
            protocol, outer, inner = parse_port(entry)
            own = {"ipv4": values.get("address", ""), "ipv6": values.get("address6", "")}
            guest = {"ipv4": values.get("guest_address", ""), "ipv6": values.get("guest_address6", "")}
            key = _fields(keys, protocol, outer, own)
            value = _fields(data, protocol, inner, guest)
            if found.setdefault(key, value) != value:
                raise UsageError(
                    f"parameter {self.parameter}: {entry!r} publishes a port that is published already",
                    hint=f"give the map {self.item.name} a key with inet_proto, or take another outer port",
                )
        return [
            attr(1, attr(1, attr(1, key)) + (attr(2, attr(1, found[key])) if data else b"")) for key in sorted(found)
        ]

    def key_fields(self) -> list[int]:
        """The data types of the key, field by field."""
        return _types(attrs.number(self.item.nodes, attrs.SET_KEY_TYPE))

    def data_fields(self) -> list[int]:
        """The data types of what a map gives; [] for a set."""
        if not self.item.set_flags() & attrs.SET_MAP:
            return []
        return _types(attrs.number(self.item.nodes, attrs.SET_DATA_TYPE))


def find(template: Ruleset, lists: Mapping[str, str], file: str, optional: Container[str] = ()) -> list[ListSet]:
    """The sets of a template that parameters fill. SpecError for one that is missing or declared otherwise.

    Parameters in ``optional`` serve other sections of the spec, and may have no set.
    """
    found: list[ListSet] = []
    for parameter, kind in lists.items():
        if kind not in KINDS:
            raise SpecError(
                f"a list parameter is of type {' or '.join(KINDS)}, not {kind!r}", file=file, key=parameter
            )
        own = [
            ListSet(parameter, kind, item, index)
            for index, item in enumerate(template.items[SET])
            if item.name in (parameter, f"{parameter}6") and not item.set_flags() & attrs.SET_ANONYMOUS
        ]
        if not own and parameter not in optional:
            form = "set {} {{ type ipv4_addr; flags interval; }}" if kind == CIDRS else _PORT_FORM
            raise SpecError(
                f"no set or map named {parameter}", file=file, key=parameter, hint=f"declare {form.format(parameter)}"
            )
        for entry in own:
            _check(entry, file)
        found += own
    return found


def check_versions(lists: Sequence[ListSet], content: Mapping[str, Sequence[str]]) -> None:
    """UsageError for a network of an IP version that the rules declare no set for: it would be left out unsaid."""
    for parameter in {entry.parameter for entry in lists if entry.kind == CIDRS}:
        versions = {entry.version for entry in lists if entry.parameter == parameter}
        for text in content.get(parameter, ()) if len(versions) < 2 else ():
            if (6 if ":" in text else 4) not in versions:
                name = f"{parameter}6" if ":" in text else parameter
                raise UsageError(
                    f"parameter {parameter}: the rules have no set for {text}",
                    hint=f"declare set {name} {{ type ipv{'6' if ':' in text else '4'}_addr; flags interval; }}",
                )


_PORT_FORM = "map {} {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}"


def _check(entry: ListSet, file: str) -> None:
    item, flags = entry.item, entry.item.set_flags()
    if item.elements:
        raise SpecError(
            f"{item.name} is filled by the parameter {entry.parameter} and must be declared empty",
            file=file,
            key=entry.parameter,
            hint="give the parameter a default instead",
        )
    try:
        keys, data = entry.key_fields(), entry.data_fields()
    except ValueError:
        keys, data = [], []
    if entry.kind == CIDRS:
        good = keys in ([_IPV4], [_IPV6]) and bool(flags & attrs.SET_INTERVAL) and not flags & attrs.SET_MAP
        form = f"set {item.name} {{ type ipv4_addr; flags interval; }} (or ipv6_addr)"
    else:
        services = keys.count(_SERVICE) == 1 and keys.count(_PROTOCOL) <= 1 and len(keys) == len(set(keys))
        results = len(data) == len(set(data)) and _PROTOCOL not in data and bool(data) == bool(flags & attrs.SET_MAP)
        good = services and results and not flags & (attrs.SET_INTERVAL | attrs.SET_EVAL | attrs.SET_TIMEOUT_FLAG)
        form = _PORT_FORM.format(item.name)
    if not good:
        raise SpecError(
            f"{item.name} cannot take {entry.kind}", file=file, key=entry.parameter, hint=f"declare {form}"
        )


def _types(number: int) -> list[int]:
    """The fields of a data type. ValueError for one that no list can fill."""
    found: list[int] = []
    while number:
        found.insert(0, number & ((1 << _TYPE_BITS) - 1))
        number >>= _TYPE_BITS
    if any(kind not in _TYPE_NAMES for kind in found):
        raise ValueError(found)
    return found


def parse_port(entry: str) -> tuple[int, int, int]:
    """``tcp:8080:80`` as protocol number, outer and inner port. UsageError when it is not of that form."""
    parts = entry.split(":")
    if len(parts) == 3 and parts[0] in _PROTOCOLS and all(part.isascii() and part.isdigit() for part in parts[1:]):
        outer, inner = int(parts[1]), int(parts[2])
        if 0 < outer < 65536 and 0 < inner < 65536:
            return _PROTOCOLS[parts[0]], outer, inner
    raise UsageError(f"{entry!r} is no published port", hint="write PROTOCOL:OUTER:INNER, as in tcp:8080:80")


def _fields(kinds: Sequence[int], protocol: int, port: int, addresses: Mapping[str, str]) -> bytes:
    """A key or a value: each field of a concatenation takes a multiple of four bytes, a single one its own size."""
    parts: list[bytes] = []
    for kind in kinds:
        if kind == _PROTOCOL:
            part = bytes((protocol,))
        elif kind == _SERVICE:
            part = struct.pack(">H", port)
        else:
            part = _address(addresses["ipv4" if kind == _IPV4 else "ipv6"], kind)
        parts.append(part.ljust((len(part) + 3) & ~3, b"\0") if len(kinds) > 1 else part)
    return b"".join(parts)


def _address(text: str, kind: int) -> bytes:
    family = socket.AF_INET if kind == _IPV4 else socket.AF_INET6
    try:
        return socket.inet_pton(family, text.partition("/")[0])
    except OSError as error:
        raise UsageError(
            f"the slot has no {_TYPE_NAMES[kind]} to publish a port on (its value is {text!r})",
            hint="declare the map for the family that the slots have",
        ) from error


def _packed(elements: Sequence[bytes]) -> Iterator[bytes]:
    chunk: list[bytes] = []
    size = 0
    for element in elements:
        if size + len(element) > LARGEST_LIST:
            yield b"".join(chunk)
            chunk, size = [], 0
        chunk.append(element)
        size += len(element)
    if chunk:
        yield b"".join(chunk)


def intervals(cidrs: Sequence[str], version: int) -> tuple[list[int], list[int]]:
    """Starts and ends (one past the last address) of the addresses in ``cidrs``, ascending, merged.

    Adjacent networks become one interval. Host bits may be set; a bare address is one address.
    Raises UsageError for what is not a CIDR of this IP version.
    """
    bits, family = (32, socket.AF_INET) if version == 4 else (128, socket.AF_INET6)
    texts = [text if "/" in text else f"{text}/{bits}" for text in cidrs]
    parts = "/".join(texts).split("/") if texts else []
    free_bits = {str(length): bits - length for length in range(bits + 1)}
    try:
        if len(parts) != 2 * len(texts):
            raise KeyError
        packed = b"".join(map(socket.inet_pton, repeat(family), parts[::2]))
        free = list(map(free_bits.__getitem__, parts[1::2]))
    except (OSError, KeyError):
        bad = next(text for text in cidrs if not _is_cidr(text, family, free_bits))
        raise UsageError(f"{bad!r} is no IPv{version} network", hint="write 192.0.2.0/24 or 2001:db8::/32") from None
    if version == 4:
        numbers: Sequence[int] = struct.unpack(f">{len(free)}I", packed)
    else:
        numbers = [int.from_bytes(packed[at : at + 16], "big") for at in range(0, len(packed), 16)]
    # One number for network and size: pairs take three times as long to sort.
    return _merge(sorted([(number >> size << size) << 8 | size for number, size in zip(numbers, free, strict=True)]))


def _is_cidr(text: str, family: int, lengths: Container[str]) -> bool:
    address, slash, length = text.partition("/")
    try:
        socket.inet_pton(family, address)
    except OSError:
        return False
    return not slash or length in lengths


def _merge(networks: Sequence[int]) -> tuple[list[int], list[int]]:
    """``networks`` are sorted: first address << 8 | free bits."""
    starts: list[int] = []
    ends: list[int] = []
    last = -1
    for network in networks:
        start = network >> 8
        end = start + (1 << (network & 255))
        if start > last:
            ends.append(last)
            starts.append(start)
            last = end
        elif end > last:
            last = end
    ends.append(last)
    return starts, ends[1:]


def interval_chunks(
    starts: Sequence[int], ends: Sequence[int], version: int, *, descending: bool = False
) -> list[bytes]:
    """The elements of a set of intervals, as nft writes them, from the lowest up: each start with its end.

    An interval that reaches the last address has no end, and there is an end at zero when nothing starts there.
    The kernel takes an end only after its start, and dumps them from the highest down.
    """
    if not starts:
        return []
    size = 4 if version == 4 else 16
    low = [_element(bytes(size), END_FLAG)] if starts[0] else []
    high: list[bytes] = []
    if ends[-1] == 1 << (8 * size):
        high = [_element(starts[-1].to_bytes(size, "big"), _OPEN)]
        starts, ends = starts[:-1], ends[:-1]
    if descending:
        return [*high, *_interval_pairs(starts[::-1], ends[::-1], size, end_first=True), *low]
    return list(_packed([*low, *_interval_pairs(starts, ends, size, end_first=False), *high]))


def _element(key: bytes, more: bytes) -> bytes:
    return attr(1, attr(1, attr(1, key)) + more)


def _interval_pairs(starts: Sequence[int], ends: Sequence[int], size: int, *, end_first: bool) -> list[bytes]:
    """Both elements of every interval, as pieces of many: the bytes are set column by column, not one by one."""
    end, start = _element(bytes(size), END_FLAG), _element(bytes(size), b"")
    order = [(end, ends), (start, starts)] if end_first else [(start, starts), (end, ends)]
    stride = len(end) + len(start)
    data = bytearray(b"".join(form for form, _ in order) * len(starts))
    for offset, numbers in ((_KEY_OFFSET, order[0][1]), (len(order[0][0]) + _KEY_OFFSET, order[1][1])):
        packed = _big_endian(numbers, size)
        for byte in range(size):
            data[offset + byte :: stride] = packed[byte::size]
    step = LARGEST_LIST // 2 // stride * stride
    return [bytes(data[at : at + step]) for at in range(0, len(data), step)]


def _big_endian(numbers: Sequence[int], size: int) -> bytes:
    if size == 4:
        return struct.pack(f">{len(numbers)}I", *numbers)
    return b"".join(number.to_bytes(size, "big") for number in numbers)
