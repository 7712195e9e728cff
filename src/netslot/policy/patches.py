"""From several casts of one template to one: which bytes hold which variable, in which encoding.

A template is cast with the values of several slots. Where the bytes of the casts differ, a variable is
written: as a number of some width and byte order, as an address (whole, masked to a prefix, or the address
after the prefix, which is how an interval ends), or as text. An explanation counts only when it gives the
right bytes for every cast; what nothing explains is reported, and the template is not stamped.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from netslot.errors import UsageError
from netslot.kernel.nf_attrs import Leaf, Node, Nodes

Values: TypeAlias = Mapping[str, str]

_SCALES = (1, 1000, 1024, 60_000, 3_600_000, 86_400_000, 1 << 20, 1 << 30)
"""What a number may be multiplied by: s, m, h, d as milliseconds; kbytes, mbytes, gbytes as bytes."""

_PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132, "udplite": 136, "dccp": 33}
_FIXED_TEXT = (16, 32)
"""Sizes of fields that hold a NUL-padded name: IFNAMSIZ, and the set names of x_tables."""


class Unpatchable(Exception):
    """A value that the found encodings cannot express: it is not of the kind that the casts had."""


class Unexplained(Exception):
    """Bytes that differ between casts and that no variable explains."""


class _Encoding(NamedTuple):
    variable: str
    name: str
    encode: Callable[[str], bytes]


class _Patch(NamedTuple):
    offset: int
    size: int
    encoding: _Encoding


def unify(casts: Sequence[Nodes], values: Sequence[Values]) -> Nodes:
    """One tree for the same object in every cast, with a :class:`Leaf` wherever they differ. Raises Unexplained."""
    first = casts[0]
    if all(cast == first for cast in casts[1:]):
        return first
    if any(len(cast) != len(first) for cast in casts):
        raise Unexplained("the number of attributes depends on the values")
    return tuple(_unify_node([cast[i] for cast in casts], values) for i in range(len(first)))


def _unify_node(nodes: Sequence[Node], values: Sequence[Values]) -> Node:
    first = nodes[0]
    if all(node == first for node in nodes[1:]):
        return first
    if any(node.kind != first.kind or node.records != first.records for node in nodes):
        raise Unexplained("the kinds of attributes depend on the values")
    trees = [node.value for node in nodes if isinstance(node.value, tuple)]
    if trees:
        if len(trees) != len(nodes):
            raise Unexplained("the kinds of attributes depend on the values")
        return Node(first.kind, unify(trees, values), first.records)
    leaves = [node.value for node in nodes if isinstance(node.value, bytes)]
    return Node(first.kind, explain(leaves, values))


def explain(leaves: Sequence[bytes], values: Sequence[Values]) -> Leaf:
    """How ``leaves[i]`` comes from ``values[i]``, for all i. Raises Unexplained."""
    found = _explain_text(leaves, values)
    if found is None and len({len(leaf) for leaf in leaves}) == 1:
        found = _explain_fixed(leaves, values)
    if found is None:
        raise Unexplained(" / ".join(leaf.hex() for leaf in leaves[:2]))
    return found


def _explain_fixed(leaves: Sequence[bytes], values: Sequence[Values]) -> Leaf | None:
    """Patches at fixed offsets; the longest encoding that covers the next differing byte is taken."""
    size, first = len(leaves[0]), leaves[0]
    patches: list[_Patch] = []
    position = 0
    while position < size:
        if all(leaf[position] == first[position] for leaf in leaves):
            position += 1
            continue
        floor = patches[-1].offset + patches[-1].size if patches else 0
        patch = _patch_at(leaves, values, position, floor)
        if patch is None:
            return None
        patches.append(patch)
        position = patch.offset + patch.size

    def render(slot: Values) -> bytes:
        data = bytearray(first)
        for offset, length, encoding in patches:
            value = _encode(encoding, slot)
            if len(value) != length:
                raise Unpatchable(encoding.variable)
            data[offset : offset + length] = value
        return bytes(data)

    return Leaf(render, frozenset(patch.encoding.variable for patch in patches))


def _patch_at(leaves: Sequence[bytes], values: Sequence[Values], position: int, floor: int) -> _Patch | None:
    """The longest encoding of a variable that covers ``position`` in all leaves, from ``floor`` on."""
    best: _Patch | None = None
    best_size = 0
    for encoding, samples in _encodings(values):
        size = len(samples[0])
        if size <= best_size:
            continue
        for offset in range(max(floor, position - size + 1), min(position, len(leaves[0]) - size) + 1):
            if all(leaf[offset : offset + size] == sample for leaf, sample in zip(leaves, samples, strict=True)):
                best, best_size = _Patch(offset, size, encoding), size
                break
    return best


def _encodings(values: Sequence[Values]) -> Iterator[tuple[_Encoding, list[bytes]]]:
    """Every encoding that fits a variable whose values differ, with its bytes for each cast."""
    for name in values[0]:
        texts = [slot[name] for slot in values]
        if len(set(texts)) == 1:
            continue
        for label, encode in _binary_encodings(texts[0]):
            try:
                samples = [encode(text) for text in texts]
            except (Unpatchable, ValueError, OverflowError):
                continue
            if len({len(sample) for sample in samples}) == 1 and len(set(samples)) > 1:
                yield _Encoding(name, label, encode), samples


def _encode(encoding: _Encoding, slot: Values) -> bytes:
    try:
        return encoding.encode(slot[encoding.variable])
    except (ValueError, OverflowError) as error:
        raise Unpatchable(encoding.variable) from error


Encoder: TypeAlias = tuple[str, Callable[[str], bytes]]


def _binary_encodings(sample: str) -> list[Encoder]:
    """The encodings that make sense for a value of this kind, told by one sample."""
    yielded = [("text", str.encode), *((f"text{size}", _padded(size)) for size in _FIXED_TEXT)]
    if (mac := _mac(sample)) is not None and mac:
        return [*yielded, ("mac", _require_mac)]
    if sample in _PROTOCOLS:
        return [*yielded, ("protocol", lambda text: bytes((_PROTOCOLS[_known_protocol(text)],)))]
    if whole_number(sample) is not None:
        return yielded + list(_number_encodings())
    try:
        width = ipaddress.ip_interface(sample).max_prefixlen
    except ValueError:
        return yielded
    return yielded + list(_address_encodings(width, "/" in sample))


def whole_number(text: str) -> int | None:
    """The number that a value is, in decimal or with 0x; None when it is something else."""
    try:
        return int(text, 0)
    except ValueError:
        return None


def _padded(size: int) -> Callable[[str], bytes]:
    def encode(text: str) -> bytes:
        data = text.encode()
        if len(data) >= size:
            raise Unpatchable(text)
        return data.ljust(size, b"\0")

    return encode


def _mac(text: str) -> bytes | None:
    parts = text.split(":")
    if len(parts) != 6 or any(len(part) != 2 for part in parts):
        return None
    try:
        return bytes.fromhex("".join(parts))
    except ValueError:
        return None


def _require_mac(text: str) -> bytes:
    data = _mac(text)
    if data is None:
        raise Unpatchable(text)
    return data


def _known_protocol(text: str) -> str:
    if text not in _PROTOCOLS:
        raise Unpatchable(text)
    return text


def _number_encodings() -> Iterator[Encoder]:
    def encoder(scale: int, delta: int, size: int, order: str) -> Callable[[str], bytes]:
        big = order == "big"
        return lambda text: (int(text, 0) * scale + delta).to_bytes(size, "big" if big else "little")

    for delta in (0, 1, -1):  # an interval's end is the number after it
        for scale in _SCALES if delta == 0 else (1,):
            for size in (8, 4, 2, 1):
                for order in ("big", "little") if size > 1 else ("big",):
                    yield f"{order}{8 * size}*{scale}{delta:+}", encoder(scale, delta, size, order)
    yield "not32", lambda text: (0xFFFFFFFF ^ int(text, 0)).to_bytes(4, "little")


def _address_encodings(width: int, is_prefix: bool) -> Iterator[Encoder]:
    """The address, its network by the value's own prefix length or by any other, and what follows that network."""

    family = socket.AF_INET if width == 32 else socket.AF_INET6

    def parse(text: str) -> tuple[int, int]:
        address, slash, length = text.partition("/")
        if bool(slash) != is_prefix or (slash and not (length.isdigit() and int(length) <= width)):
            raise Unpatchable(text)
        try:
            return int.from_bytes(socket.inet_pton(family, address), "big"), int(length or width)
        except OSError as error:
            raise Unpatchable(text) from error

    def encoder(length: int | None, after: int, keep: int) -> Callable[[str], bytes]:
        def encode(text: str) -> bytes:
            address, own = parse(text)
            block = 1 << (width - (own if length is None else length))
            # `after` is 0 for the network itself, 1 for the address behind it, -1 for its last address.
            number = address // block * block + (block if after else 0) - (1 if after < 0 else 0)
            return number.to_bytes(width // 8, "big")[:keep]

        return encode

    lengths: list[int | None] = [width, *([None] if is_prefix else []), *range(width - 1, 0, -1)]
    for length in lengths:
        for after in (0, 1, -1):
            yield f"address/{length}{after:+}", encoder(length, after, width // 8)
    for keep in range(width // 8 - 1, 0, -1):  # nft compares a prefix of whole bytes with as many bytes
        yield f"address[:{keep}]", encoder(width, 0, keep)
        if is_prefix:
            yield f"network[:{keep}]", encoder(None, 0, keep)
    if is_prefix:

        def netmask(text: str) -> bytes:
            _, own = parse(text)
            return (((1 << own) - 1) << (width - own)).to_bytes(width // 8, "big")

        yield "netmask", netmask
        yield "bare", lambda text: text.partition("/")[0].encode()


def _explain_text(leaves: Sequence[bytes], values: Sequence[Values]) -> Leaf | None:
    """Text with the values written out in it, NUL-terminated, NUL-padded to a fixed size, or neither."""
    texts = [leaf.rstrip(b"\0") for leaf in leaves]
    sizes = {len(leaf) for leaf in leaves}
    tails = {len(leaf) - len(text) for leaf, text in zip(leaves, texts, strict=True)}
    fixed = 0
    if len(sizes) == 1 and (sizes <= set(_FIXED_TEXT) or not tails <= {0, 1}):
        fixed = sizes.pop()
    elif len(tails) != 1:
        return None
    names = [name for name in values[0] if len({slot[name] for slot in values}) > 1]
    parts = _split_text(texts, names, [{name: slot[name].encode() for name in names} for slot in values])
    if parts is None:
        return None
    tail = bytes(tails.pop()) if not fixed else b""

    def render(slot: Values) -> bytes:
        data = b"".join(part if isinstance(part, bytes) else slot[part].encode() for part in parts) + tail
        if fixed and len(data) > fixed:
            named = ", ".join(sorted({part for part in parts if isinstance(part, str)}))
            raise UsageError(f"the value of {named} is too long: {data.decode()!r} has more than {fixed} bytes")
        return data.ljust(fixed, b"\0")

    return Leaf(render, frozenset(part for part in parts if isinstance(part, str)))


def _split_text(
    texts: Sequence[bytes], names: Sequence[str], values: Sequence[Mapping[str, bytes]]
) -> list[bytes | str] | None:
    """Constant bytes and variable names that, put together, give every text; None when there is no such list."""
    dead: set[tuple[int, ...]] = set()

    def step(at: tuple[int, ...]) -> list[bytes | str] | None:
        if all(position == len(text) for position, text in zip(at, texts, strict=True)):
            return []
        if at in dead:
            return None
        for name in sorted(names, key=lambda name: -len(values[0][name])):
            own = [slot[name] for slot in values]
            if all(text.startswith(value, pos) for text, value, pos in zip(texts, own, at, strict=True)):
                rest = step(tuple(pos + len(value) for pos, value in zip(at, own, strict=True)))
                if rest is not None:
                    return [name, *rest]
        following = {text[pos : pos + 1] for text, pos in zip(texts, at, strict=True)}
        if len(following) == 1 and following != {b""}:
            rest = step(tuple(pos + 1 for pos in at))
            if rest is not None:
                byte = following.pop()
                return [byte + rest[0], *rest[1:]] if rest and isinstance(rest[0], bytes) else [byte, *rest]
        dead.add(at)
        return None

    return step(tuple(0 for _ in texts))
