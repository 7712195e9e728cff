"""nf_tables objects as trees of attributes: parse, encode, what is volatile, what a dump says that a batch may not.

The kernel marks few of its nested attributes as nested, so which ones are is written down here, by the
layouts of linux/netfilter/nf_tables.h. Attributes that are not listed are leaves; that is always safe, since
a leaf is carried along byte for byte.

User data (comments, declared types) is nft's own list of one-byte type, one-byte length, value
(libnftnl: struct nftnl_udata); it is parsed too, because a comment may differ in length between slots.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from netslot.kernel.netlink import NLA_TYPE_MASK

TABLE, CHAIN, SET, ELEMENT, OBJECT, FLOWTABLE, RULE = (
    "table",
    "chain",
    "set",
    "element",
    "object",
    "flowtable",
    "rule",
)

CHAIN_TABLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_FLAGS = 1, 3, 4, 5, 10
SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_ID = 3, 4, 5, 6, 10
OBJECT_TYPE = 3
RULE_TABLE, RULE_CHAIN, RULE_HANDLE, RULE_EXPRESSIONS, RULE_COMPAT, RULE_POSITION = 1, 2, 3, 4, 5, 6
ELEM_KEY, ELEM_FLAGS, ELEM_TIMEOUT, ELEM_EXPIRATION, ELEM_KEY_END = 1, 3, 4, 5, 10
EXPR_NAME, EXPR_DATA = 1, 2

SET_ANONYMOUS, SET_INTERVAL, SET_MAP, SET_TIMEOUT_FLAG, SET_EVAL = 0x1, 0x4, 0x8, 0x10, 0x20
CHAIN_BINDING = 0x4
ELEM_INTERVAL_END = 0x1

_NLATTR = struct.Struct("=HH")
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value that depends on the slot: ``render`` makes its bytes, ``names`` are the variables it reads."""

    render: Callable[[Mapping[str, str]], bytes]
    names: frozenset[str]


class Node(NamedTuple):
    """One attribute. ``kind`` keeps its flag bits; ``value`` is the bytes, the children, or a slot's own leaf."""

    kind: int
    value: bytes | tuple[Node, ...] | Leaf
    records: bool = False
    """The children are user data records rather than netlink attributes."""


Nodes: TypeAlias = tuple[Node, ...]
Schema: TypeAlias = Mapping[int, object]

_LEAVES: Schema = {}
_DATA: Schema = {2: _LEAVES}  # NFTA_DATA_VERDICT
_EXPR = "expression"  # its data is laid out as its name says
_RECORDS = "user data"
_EXPRESSIONS: Schema = {1: _EXPR}

_BY_EXPRESSION: Mapping[bytes, Schema] = {
    b"immediate": {2: _DATA},
    b"cmp": {3: _DATA},
    b"range": {3: _DATA, 4: _DATA},
    b"bitwise": {4: _DATA, 5: _DATA, 7: _DATA},
    b"dynset": {7: _EXPR, 10: _EXPRESSIONS},
}
_SCHEMAS: Mapping[str, Schema] = {
    TABLE: {6: _RECORDS},
    CHAIN: {CHAIN_HOOK: {4: _LEAVES}, 8: _LEAVES, 12: _RECORDS},
    SET: {9: {2: {1: _LEAVES}}, 13: _RECORDS, 17: _EXPR, 18: _EXPRESSIONS},
    ELEMENT: {1: _DATA, 2: _DATA, 6: _RECORDS, 7: _EXPR, 10: _DATA, 11: _EXPRESSIONS},
    OBJECT: {4: _LEAVES, 8: _RECORDS},
    FLOWTABLE: {3: {3: _LEAVES}},
    RULE: {RULE_EXPRESSIONS: _EXPRESSIONS, RULE_COMPAT: _LEAVES, 7: _RECORDS},
}

# Attributes that differ between two slots that hold the same: handles, positions, numbers of users and
# elements, time left. The last two sets of the kernel's are newer than the headers: 20 counts a set's elements.
_VOLATILE: Mapping[str, frozenset[int]] = {
    TABLE: frozenset({3, 4}),
    CHAIN: frozenset({2, 6, 8}),
    SET: frozenset({16, 19, 20}),
    ELEMENT: frozenset({ELEM_EXPIRATION}),
    OBJECT: frozenset({5, 6}),
    FLOWTABLE: frozenset({4, 5}),
    RULE: frozenset({RULE_HANDLE, RULE_POSITION}),
}
# The same inside stateful expressions and objects, which packets change: counter, quota (consumed), last.
_STATE: Mapping[bytes, frozenset[int]] = {
    b"counter": frozenset({1, 2}),
    b"quota": frozenset({4}),
    b"last": frozenset({1, 2}),
}
_OBJECT_STATE = {1: b"counter", 2: b"quota"}  # NFT_OBJECT_COUNTER, NFT_OBJECT_QUOTA
_QUOTA_FLAGS = 2  # its bit 1 says that the quota is used up
_SET_LAST_INPUT = 18  # newer attributes (type of set, number of elements) are refused as input

# Dropped on the way from a dump to a batch.
_NOT_INPUT: Mapping[str, frozenset[int]] = {
    TABLE: frozenset({3, 4, 5, 7}),
    CHAIN: frozenset({2, 6, 9}),
    SET: frozenset({14, 16}),
    ELEMENT: frozenset({ELEM_EXPIRATION, 8}),
    OBJECT: frozenset({5, 6, 7}),
    FLOWTABLE: frozenset({4, 5, 6}),
    RULE: frozenset({RULE_HANDLE, RULE_POSITION, 8}),
}


def parse(what: str, data: bytes, offset: int = 0) -> Nodes:
    """The attributes of one object of the sort ``what``, from ``offset`` on."""
    return _parse(data, offset, len(data), _SCHEMAS[what])


def _parse(data: bytes, offset: int, end: int, schema: Schema) -> Nodes:
    nodes: list[Node] = []
    while offset + 4 <= end:
        length, kind = _NLATTR.unpack_from(data, offset)
        if length < 4:
            break
        nodes.append(_node(kind, data, offset + 4, offset + length, schema.get(kind & NLA_TYPE_MASK)))
        offset += (length + 3) & ~3
    return tuple(nodes)


def _node(kind: int, data: bytes, start: int, end: int, schema: object) -> Node:
    if schema is None:
        return Node(kind, data[start:end])
    if schema is _RECORDS:
        records = _records(data[start:end])
        return Node(kind, data[start:end]) if records is None else Node(kind, records, records=True)
    if schema is _EXPR:
        outer = _parse(data, start, end, _LEAVES)
        return Node(kind, tuple(_expression_data(outer, node) for node in outer))
    assert isinstance(schema, Mapping)
    return Node(kind, _parse(data, start, end, schema))


def _expression_data(expression: Nodes, node: Node) -> Node:
    if node.kind & NLA_TYPE_MASK != EXPR_DATA:
        return node
    assert isinstance(node.value, bytes)
    schema = _BY_EXPRESSION.get(expression_name(expression), _LEAVES)
    return Node(node.kind, _parse(node.value, 0, len(node.value), schema))


def _records(data: bytes) -> Nodes | None:
    """The user data records, or None when ``data`` is not a list of such."""
    nodes: list[Node] = []
    offset = 0
    while offset < len(data):
        if offset + 2 > len(data) or offset + 2 + data[offset + 1] > len(data):
            return None
        nodes.append(Node(data[offset], data[offset + 2 : offset + 2 + data[offset + 1]]))
        offset += 2 + data[offset + 1]
    return tuple(nodes)


def expression_name(expression: Nodes) -> bytes:
    """``cmp``, ``payload``, ... of one expression's attributes."""
    return leaf(expression, EXPR_NAME).rstrip(b"\0")


def leaf(nodes: Nodes, kind: int) -> bytes:
    """The bytes of the attribute of a type; b"" when it is absent."""
    for node in nodes:
        if node.kind & NLA_TYPE_MASK == kind and isinstance(node.value, bytes):
            return node.value
    return b""


def children(nodes: Nodes, kind: int) -> Nodes:
    """The attributes inside the attribute of a type; () when it is absent."""
    for node in nodes:
        if node.kind & NLA_TYPE_MASK == kind and isinstance(node.value, tuple):
            return node.value
    return ()


def number(nodes: Nodes, kind: int) -> int:
    """The big-endian number in the attribute of a type; 0 when it is absent."""
    return int.from_bytes(leaf(nodes, kind), "big")


def text(nodes: Nodes, kind: int) -> str:
    """The string in the attribute of a type; "" when it is absent."""
    return leaf(nodes, kind).rstrip(b"\0").decode(errors="replace")


def encode(nodes: Nodes) -> bytes:
    """The attributes as the kernel takes them, padded. Every leaf must be bytes (see :func:`fill`)."""
    parts: list[bytes] = []
    for node in nodes:
        value = _value(node)
        parts.append(_NLATTR.pack(len(value) + 4, node.kind) + value + _PAD[len(value) & 3])
    return b"".join(parts)


def _value(node: Node) -> bytes:
    if isinstance(node.value, bytes):
        return node.value
    assert isinstance(node.value, tuple)
    if node.records:
        return b"".join(bytes((record.kind, len(_value(record)))) + _value(record) for record in node.value)
    return encode(node.value)


def leaves(nodes: Nodes) -> tuple[Leaf, ...]:
    """The values that depend on the slot, in order."""
    found: tuple[Leaf, ...] = ()
    for node in nodes:
        if isinstance(node.value, Leaf):
            found += (node.value,)
        elif isinstance(node.value, tuple):
            found += leaves(node.value)
    return found


def variables(nodes: Nodes) -> frozenset[str]:
    """The names of the variables that the attributes depend on."""
    return frozenset().union(*(each.names for each in leaves(nodes)))


def fill(nodes: Nodes, values: Iterator[bytes]) -> Nodes:
    """The same attributes with the next of ``values`` in place of each leaf that depends on the slot."""
    return tuple(
        Node(node.kind, next(values))
        if isinstance(node.value, Leaf)
        else Node(node.kind, fill(node.value, values), node.records)
        if isinstance(node.value, tuple)
        else node
        for node in nodes
    )


class Form:
    """Encoded attributes with holes of fixed size, where a slot's own values go."""

    def __init__(self, nodes: Nodes, values: Sequence[bytes]) -> None:
        """``values`` are one slot's, as for :func:`fill`; they tell the sizes."""
        self._holes: list[tuple[int, int]] = []
        self._data = self._encode(nodes, iter(values), 0, records=False)

    def filled(self, values: Sequence[bytes]) -> bytes | None:
        """The encoded attributes of another slot; None when a value is of another size."""
        data = bytearray(self._data)
        for (offset, size), value in zip(self._holes, values, strict=True):
            if len(value) != size:
                return None
            data[offset : offset + size] = value
        return bytes(data)

    def _encode(self, nodes: Nodes, values: Iterator[bytes], offset: int, *, records: bool) -> bytes:
        parts: list[bytes] = []
        head = 2 if records else 4
        for node in nodes:
            if isinstance(node.value, Leaf):
                value = next(values)
                self._holes.append((offset + head, len(value)))
            elif isinstance(node.value, tuple):
                value = self._encode(node.value, values, offset + head, records=node.records)
            else:
                value = node.value
            if records:
                parts.append(bytes((node.kind, len(value))) + value)
            else:
                parts.append(_NLATTR.pack(len(value) + 4, node.kind) + value + _PAD[len(value) & 3])
            offset += len(parts[-1])
        return b"".join(parts)


def mask(what: str, nodes: Nodes) -> bytes:
    """As long as ``encode(nodes)``: zero bits where slots that hold the same may differ, ones elsewhere."""
    return b"".join(
        _mask(node, wild=node.kind & NLA_TYPE_MASK in _VOLATILE[what], state=_object_state(what, nodes, node))
        for node in nodes
    )


def _object_state(what: str, nodes: Nodes, node: Node) -> bytes | None:
    if what != OBJECT or node.kind & NLA_TYPE_MASK != 4:
        return None
    return _OBJECT_STATE.get(number(nodes, OBJECT_TYPE))


def _mask(node: Node, *, wild: bool = False, state: bytes | None = None) -> bytes:
    """``state`` names the stateful expression whose data the node is."""
    if isinstance(node.value, tuple) and not node.records and not wild:
        name = expression_name(node.value) if _is_expression(node.value) else None
        inner = b"".join(_child_mask(child, name, state) for child in node.value)
        return b"\xff" * 4 + inner
    size = len(_value(node))
    return b"\xff" * 4 + (bytes(size) if wild else b"\xff" * size) + _PAD[size & 3]


def _child_mask(child: Node, expression: bytes | None, state: bytes | None) -> bytes:
    kind = child.kind & NLA_TYPE_MASK
    if expression is not None and kind == EXPR_DATA and expression in _STATE:
        return _mask(child, state=expression)
    if state == b"quota" and kind == _QUOTA_FLAGS:
        return b"\xff" * 7 + b"\xfd"
    return _mask(child, wild=state is not None and kind in _STATE[state])


def steady(what: str, nodes: Nodes) -> Nodes:
    """The same attributes with zeros in what differs between two slots that hold the same.

    The state that packets change is kept: a ruleset may be loaded with it.
    """
    return tuple(
        Node(node.kind, bytes(len(node.value)))
        if node.kind & NLA_TYPE_MASK in _VOLATILE[what] and isinstance(node.value, bytes)
        else node
        for node in nodes
    )


def _is_expression(nodes: Nodes) -> bool:
    return len(nodes) == 2 and nodes[0].kind == EXPR_NAME and nodes[1].kind & NLA_TYPE_MASK == EXPR_DATA


def expressions(nodes: Nodes) -> Iterator[tuple[bytes, Nodes]]:
    """Name and data of every expression below ``nodes``, also of those inside others."""
    for node in nodes:
        if not isinstance(node.value, tuple) or node.records:
            continue
        if _is_expression(node.value):
            yield expression_name(node.value), children(node.value, EXPR_DATA)
        yield from expressions(node.value)


def as_input(what: str, nodes: Nodes) -> Nodes:
    """What of a dumped object the kernel takes back as a new one."""
    dropped = _NOT_INPUT[what]
    kept = tuple(
        _input_node(node)
        for node in nodes
        if node.kind & NLA_TYPE_MASK not in dropped
        and not (what == SET and node.kind & NLA_TYPE_MASK > _SET_LAST_INPUT)
    )
    return kept + _compat(kept) if what == RULE else kept


def _input_node(node: Node) -> Node:
    if not isinstance(node.value, tuple) or node.records:
        return node
    if _is_expression(node.value) and expression_name(node.value) in _INPUT_FORM:
        name, data = node.value
        assert isinstance(data.value, tuple)
        return Node(node.kind, (name, Node(data.kind, _INPUT_FORM[expression_name(node.value)](data.value))))
    return Node(node.kind, tuple(_input_node(child) for child in node.value))


def _exthdr_input(data: Nodes) -> Nodes:
    """Writing an option takes no flags; stripping one takes type and operation alone (nft_exthdr.c, *_init)."""
    kinds = {node.kind & NLA_TYPE_MASK for node in data}
    dreg, offset, length, flags, sreg = 1, 3, 4, 5, 7
    if sreg in kinds:
        return tuple(node for node in data if node.kind & NLA_TYPE_MASK != flags)
    if dreg not in kinds:
        return tuple(node for node in data if node.kind & NLA_TYPE_MASK not in (offset, length, flags))
    return data


def _osf_input(data: Nodes) -> Nodes:
    """Flags must be those of a version match, or not be there (nft_osf.c, nft_osf_init)."""
    flags = 3
    return tuple(node for node in data if node.kind & NLA_TYPE_MASK != flags or number(data, flags))


def _dynset_input(data: Nodes) -> Nodes:
    """No timeout is dumped as zero, and refused for a set without timeouts (nft_dynset.c, nft_dynset_init)."""
    timeout = 6
    return tuple(node for node in data if node.kind & NLA_TYPE_MASK != timeout or number(data, timeout))


_INPUT_FORM: Mapping[bytes, Callable[[Nodes], Nodes]] = {
    b"dynset": _dynset_input,
    b"exthdr": _exthdr_input,
    b"osf": _osf_input,
}


def _compat(rule: Nodes) -> Nodes:
    """NFTA_RULE_COMPAT for a rule with x_tables matches or targets, which the dump leaves out.

    Such extensions check the protocol that the rule is limited to. It is read from the rule itself: a
    comparison of one byte with the transport protocol loaded just before.
    """
    found = list(expressions(rule))
    if not any(name in (b"match", b"target") for name, _ in found):
        return ()
    loaded = False
    for name, data in found:
        if loaded and name == b"cmp":
            value = leaf(children(data, 3), 1) or b"\0"
            inverted = number(data, 2)  # NFT_CMP_EQ is 0, NFT_CMP_NEQ 1
            return (
                Node(
                    RULE_COMPAT | 0x8000,
                    (Node(1, struct.pack(">I", value[0])), Node(2, struct.pack(">I", 2 if inverted else 0))),
                ),
            )
        loaded = _loads_protocol(name, data)
    return ()


def _loads_protocol(name: bytes, data: Nodes) -> bool:
    if name == b"meta":
        l4proto = 16
        return number(data, 2) == l4proto and leaf(data, 1) != b""
    network_header = 1
    return (
        name == b"payload"
        and number(data, 2) == network_header
        and number(data, 3) in (6, 9)  # next header of IPv6, protocol of IPv4
        and number(data, 4) == 1
    )
