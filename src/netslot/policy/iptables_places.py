"""Where a slot's own values sit in the bytes that the tool made, and how they are written there. Pure.

Nothing here knows how any match or target lays out its data. The tool is asked for the same rules with other
values; the bytes that differ are explained by the words of the rule file that differ, each through one of a few
ways in which numbers, addresses and texts are kept. What cannot be explained is said so, and is not stamped.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from netslot.spec.render import render, variables_in

Values: TypeAlias = Mapping[str, str]
Encoder: TypeAlias = Callable[[str], bytes]
"""Text as written in the rule file to bytes; ValueError when the text is not of that kind or does not fit."""

_MATCH_LIMIT_SCALE = 10_000  # XT_LIMIT_SCALE, linux/netfilter/xt_limit.h
_HASHLIMIT_SCALE = 1_000_000  # XT_HASHLIMIT_SCALE_v2, linux/netfilter/xt_hashlimit.h
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Unexplained(Exception):
    """Bytes differ between values in a way that no encoding of the words explains; the text says where."""


def _integer(form: str, *, inverted: bool = False) -> Encoder:
    packer = struct.Struct(form)
    limit = 1 << (8 * packer.size)

    def encode(text: str) -> bytes:
        value = int(text, 0) if text.startswith("0x") else int(text)
        if not 0 <= value < limit:
            raise ValueError(text)
        return packer.pack(limit - 1 - value if inverted else value)

    return encode


def _network(domain: int, part: str) -> Encoder:
    """Of ``address`` or ``address/length``: network, mask, last address, or address, in network byte order."""

    def encode(text: str) -> bytes:
        address, slash, _ = text.partition("/")
        if part == "address" or (not slash and part == "network"):
            return _address(domain, address)
        kind = ipaddress.IPv4Network if domain == socket.AF_INET else ipaddress.IPv6Network
        network = kind(text, strict=False)
        found = {"network": network.network_address, "mask": network.netmask, "last": network.broadcast_address}
        return found[part].packed

    return encode


def _address(domain: int, text: str) -> bytes:
    if domain == socket.AF_INET and text.count(".") != 3:
        raise ValueError(text)  # inet_pton agrees; said here because inet_aton-style forms are not the tool's
    try:
        return socket.inet_pton(domain, text.strip("[]"))
    except OSError as error:
        raise ValueError(text) from error


def _prefix_mask(bits: int) -> Encoder:
    """A prefix length standing alone as the mask it means."""

    def encode(text: str) -> bytes:
        length = int(text)
        if not 0 <= length <= bits:
            raise ValueError(text)
        return (((1 << length) - 1) << (bits - length)).to_bytes(bits // 8, "big")

    return encode


def _prefix_length(text: str) -> bytes:
    """The length that stands in ``address/length``."""
    address, _, length = text.partition("/")
    socket_family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _address(socket_family, address)
    return _byte(length)


def _mac(text: str) -> bytes:
    if len(text) != 17:
        raise ValueError(text)
    return bytes.fromhex(text.replace(":", ""))


def _rate(scale: int, form: str) -> Encoder:
    """``5/sec``, ``5`` as the tools keep it: the time between two packets, in 1/``scale`` of a second."""
    packer = struct.Struct(form)

    def encode(text: str) -> bytes:
        number, _, unit = text.partition("/")
        if unit and unit not in ("s", "sec", "second", "m", "min", "minute", "h", "hour", "d", "day"):
            raise ValueError(text)
        try:
            return packer.pack(scale * _SECONDS[unit[:1] or "s"] // int(number))
        except (struct.error, ZeroDivisionError) as error:
            raise ValueError(text) from error

    return encode


def _interface_mask(text: str) -> bytes:
    """How an interface name is compared: every byte and the end, or only up to ``+``."""
    raw = text.encode()
    if not 0 < len(raw) < 16:
        raise ValueError(text)
    significant = len(raw) - 1 if raw.endswith(b"+") else len(raw) + 1
    return (b"\xff" * significant).ljust(16, b"\0")


def _text(text: str) -> bytes:
    return text.encode()


_byte = _integer("=B")

ENCODERS: Final[dict[str, Encoder]] = {
    "u8": _byte,
    "prefix length": _prefix_length,
    "u16": _integer("=H"),
    "be16": _integer(">H"),
    "u32": _integer("=I"),
    "be32": _integer(">I"),
    "not32": _integer("=I", inverted=True),
    "u64": _integer("=Q"),
    "rate": _rate(_MATCH_LIMIT_SCALE, "=I"),
    "hashlimit rate": _rate(_HASHLIMIT_SCALE, "=Q"),
    "ipv4": _network(socket.AF_INET, "network"),
    "ipv4 address": _network(socket.AF_INET, "address"),
    "ipv4 mask": _network(socket.AF_INET, "mask"),
    "ipv4 last": _network(socket.AF_INET, "last"),
    "ipv4 length": _prefix_mask(32),
    "mac": _mac,
    "ipv6": _network(socket.AF_INET6, "network"),
    "ipv6 address": _network(socket.AF_INET6, "address"),
    "ipv6 mask": _network(socket.AF_INET6, "mask"),
    "ipv6 last": _network(socket.AF_INET6, "last"),
    "ipv6 length": _prefix_mask(128),
    "interface mask": _interface_mask,
    "text": _text,
}
"""From narrow to wide. Of several that explain the same bytes the first is taken, which is safe because values
that the tool accepts were tried up to the largest: one that does not fit is refused by the tool too."""


@dataclass(frozen=True, slots=True)
class Place:
    """``width`` bytes at each of ``offsets`` hold ``template`` (words with variables) as ``encoder`` writes it."""

    template: str
    encoder: str
    width: int
    offsets: tuple[int, ...]

    @property
    def names(self) -> frozenset[str]:
        """The variables that the words use."""
        return variables_in(self.template)

    def encode(self, values: Values) -> bytes:
        """The bytes for ``values``; ValueError when not of the kind, or longer than what the tool was tried with."""
        text = values.get(self.template[2:-1])  # most templates are one variable, which needs no search for more
        if text is None or self.template[0] != "$":
            text = render(self.template, values, file="rule")
        raw = ENCODERS[self.encoder](text)
        if len(raw) > self.width:
            raise ValueError(f"longer than {self.width} bytes")
        return raw.ljust(self.width, b"\0")


@dataclass(frozen=True, slots=True)
class Sample:
    """The tool's bytes for one choice of values."""

    values: Values
    blob: bytes


def words(text: str) -> list[str]:
    """The words of a rule file as the tool sees them: split at blanks, double quotes taken off."""
    found = []
    for line in text.splitlines():
        for match in re.finditer(r'(?:"(?:\\.|[^"\\])*"|[^\s"])+', line):
            found.append(re.sub(r'"((?:\\.|[^"\\])*)"', lambda quoted: re.sub(r"\\(.)", r"\1", quoted[1]), match[0]))
    return found


def atoms(text: str) -> list[str]:
    """Every word that uses variables, and the parts of it that rules keep apart: ``a/b``, ``a:b``, ``a-b``, ``a,b``.

    Variables are not looked into: their values may hold these signs too.
    """
    seen: dict[str, None] = {}
    queue = [word for word in words(text) if variables_in(word)]
    while queue:
        atom = queue.pop(0)
        if atom in seen or not variables_in(atom):
            continue
        seen[atom] = None
        bare = re.sub(r"\$\{[^}]*\}", lambda match: "\0" * len(match[0]), atom)
        for sign in ",/-:=+!":
            if sign in bare:
                queue += _split(atom, bare, sign)
    return list(seen)


def _split(atom: str, bare: str, sign: str) -> Iterator[str]:
    start = 0
    for part in bare.split(sign):
        yield atom[start : start + len(part)]
        start += len(part) + 1


def explain(base: Sample, others: Sequence[Sample], candidates: Iterable[str]) -> list[Place]:
    """Places that turn ``base`` into every one of ``others``; Unexplained when there is a byte they leave out.

    ``others`` differ from the base in one variable, which all ``candidates`` (atoms) use.
    """
    if any(len(sample.blob) != len(base.blob) for sample in others):
        raise Unexplained("the number of rules or their kind depends on a value")
    rendered = {atom: [render(atom, sample.values, file="rule") for sample in (base, *others)] for atom in candidates}
    encoded = _encodings(rendered)
    samples = [base.blob, *(sample.blob for sample in others)]
    places: dict[tuple[str, str, int], list[int]] = {}
    done = 0
    for at in _differences(samples):
        if at < done:
            continue
        found = _match(at, samples, encoded, done)
        if found is None:
            raise Unexplained(f"byte {at} follows a value in a way that is not known")
        atom, encoder, width, start = found
        places.setdefault((atom, encoder, width), []).append(start)
        done = start + width
    return [Place(*key, tuple(offsets)) for key, offsets in places.items()]


def _differences(samples: Sequence[bytes]) -> Iterator[int]:
    """Offsets of the bytes that are not the same in all samples, in order."""
    base = int.from_bytes(samples[0], "little")
    mixed = 0
    for sample in samples[1:]:
        mixed |= base ^ int.from_bytes(sample, "little")
    for at, byte in enumerate(mixed.to_bytes(len(samples[0]), "little")):
        if byte:
            yield at


def _encodings(rendered: Mapping[str, Sequence[str]]) -> list[tuple[str, str, list[bytes]]]:
    """(atom, encoder, bytes by sample) for all that can be encoded in every sample; whole words come first."""
    found = []
    for name, encoder in ENCODERS.items():
        for atom, texts in rendered.items():
            try:
                raw = [encoder(text) for text in texts]
            except ValueError:
                continue
            width = max(map(len, raw))
            found.append((atom, name, [part.ljust(width, b"\0") for part in raw]))
    return found


def _match(
    at: int, samples: Sequence[bytes], encoded: Iterable[tuple[str, str, list[bytes]]], floor: int
) -> tuple[str, str, int, int] | None:
    for atom, name, raw in encoded:
        width = len(raw[0])
        for start in range(at, max(floor, at - width + 1) - 1, -1):
            if all(sample[start : start + width] == part for sample, part in zip(samples, raw, strict=True)):
                return atom, name, width, start
    return None


def merge(places: Iterable[Place]) -> tuple[Place, ...]:
    """One place for each way of writing; Unexplained when two ways claim the same byte."""
    joined: dict[tuple[str, str], tuple[int, set[int]]] = {}
    for place in places:
        width, offsets = joined.get((place.template, place.encoder), (0, set()))
        joined[place.template, place.encoder] = max(width, place.width), offsets | set(place.offsets)
    spans = sorted((offset, offset + width) for width, offsets in joined.values() for offset in offsets)
    for (_, end), (start, _) in itertools.pairwise(spans):
        if start < end:
            raise Unexplained(f"two values share byte {start}")
    return tuple(Place(*key, width, tuple(sorted(offsets))) for key, (width, offsets) in joined.items())


def apply(blob: bytearray, places: Iterable[Place], values: Values) -> bytearray:
    """Write ``values`` into every place, in the blob itself; ValueError as :meth:`Place.encode`."""
    for place in places:
        raw = place.encode(values)
        width = place.width
        for offset in place.offsets:
            blob[offset : offset + width] = raw
    return blob
