"""Trees of attributes: bytes in, the same bytes out; masks and forms as long as what they are for."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from netslot.kernel import nf_attrs as attrs
from netslot.kernel.netlink import attr, nested
from netslot.kernel.nf_attrs import CHAIN, RULE, SET, Form, Leaf, Node


def expression(name: str, *data: bytes) -> bytes:
    return nested(1, attr(1, name.encode() + b"\0"), nested(2, *data))


def rule(*expressions: bytes, handle: int = 7, comment: bytes = b"") -> bytes:
    records = attr(7, bytes((0, len(comment))) + comment) if comment else b""
    head = attr(1, b"fw\0") + attr(2, b"input\0") + attr(3, struct.pack(">Q", handle))
    return head + nested(4, *expressions) + records


COUNTER = expression("counter", attr(1, struct.pack(">Q", 500)), attr(2, struct.pack(">Q", 5)))
COMPARE = expression("cmp", attr(1, bytes(4)), attr(2, bytes(4)), nested(3, attr(1, b"\x0a\0\0\1")))


@given(st.binary(max_size=30), st.integers(0, 2**63))
def test_what_is_parsed_is_written_back(comment: bytes, handle: int) -> None:
    data = rule(COUNTER, COMPARE, handle=handle, comment=comment)
    nodes = attrs.parse(RULE, data)
    assert attrs.encode(nodes) == data
    assert len(attrs.mask(RULE, nodes)) == len(data)


def masked(data: bytes) -> int:
    mask = attrs.mask(RULE, attrs.parse(RULE, data))
    return int.from_bytes(data, "big") & int.from_bytes(mask, "big")


def test_handles_and_counters_are_masked_and_nothing_else() -> None:
    busy = expression("counter", attr(1, struct.pack(">Q", 9)), attr(2, struct.pack(">Q", 1)))
    other = expression("cmp", attr(1, bytes(4)), attr(2, bytes(4)), nested(3, attr(1, b"\x0a\0\0\2")))
    assert masked(rule(COUNTER, COMPARE)) == masked(rule(busy, COMPARE, handle=99))
    assert masked(rule(COUNTER, COMPARE)) != masked(rule(COUNTER, other))


def test_a_quota_is_compared_but_for_what_is_used() -> None:
    def quota(limit: int, flags: int, used: int) -> bytes:
        parts = (
            attr(1, struct.pack(">Q", limit)),
            attr(2, struct.pack(">I", flags)),
            attr(4, struct.pack(">Q", used)),
        )
        return rule(expression("quota", *parts))

    assert masked(quota(100, 1, 0)) == masked(quota(100, 3, 100))  # used up: bit 1 of the flags
    assert masked(quota(100, 1, 0)) != masked(quota(100, 0, 0))
    assert masked(quota(100, 1, 0)) != masked(quota(101, 1, 0))


def kinds(nodes: attrs.Nodes) -> list[int]:
    return [node.kind & 0x3FFF for node in nodes]


def test_what_the_kernel_does_not_take_back_is_dropped() -> None:
    chain = attrs.parse(CHAIN, b"".join(attr(kind, bytes(4)) for kind in (1, 3, 2, 5, 7, 6)))
    assert kinds(attrs.as_input(CHAIN, chain)) == [1, 3, 5, 7]
    declared = attrs.parse(SET, b"".join(attr(kind, bytes(4)) for kind in (1, 2, 16, 3, 4, 5, 19, 20)))
    assert kinds(attrs.as_input(SET, declared)) == [1, 2, 3, 4, 5]


def test_options_are_written_and_stripped_in_the_form_of_input() -> None:
    def given_back(*present: int) -> list[int]:
        data = rule(expression("exthdr", *(attr(kind, bytes(4)) for kind in present)))
        (_, found), *_ = attrs.expressions(attrs.as_input(RULE, attrs.parse(RULE, data)))
        return kinds(found)

    assert given_back(1, 2, 3, 4, 5, 6) == [1, 2, 3, 4, 5, 6]  # load
    assert given_back(2, 3, 4, 5, 6, 7) == [2, 3, 4, 6, 7]  # set
    assert given_back(2, 3, 4, 5, 6) == [2, 6]  # strip


def test_extensions_get_the_protocol_that_the_rule_is_limited_to() -> None:
    load = expression("meta", attr(2, struct.pack(">I", 16)), attr(1, struct.pack(">I", 1)))
    tcp = expression("cmp", attr(1, bytes(4)), attr(2, bytes(4)), nested(3, attr(1, b"\6")))
    extension = expression("match", attr(1, b"tcpmss\0"), attr(2, bytes(4)), attr(3, bytes(8)))
    plain = attrs.as_input(RULE, attrs.parse(RULE, rule(load, tcp)))
    compat = attrs.as_input(RULE, attrs.parse(RULE, rule(load, tcp, extension)))
    assert attrs.RULE_COMPAT not in kinds(plain)
    assert attrs.number(attrs.children(compat, attrs.RULE_COMPAT), 1) == 6


@given(st.binary(min_size=4, max_size=4), st.binary(min_size=3, max_size=3))
def test_a_form_is_filled_as_the_tree_would_be(address: bytes, name: bytes) -> None:
    own = (Leaf(lambda _: b"", frozenset({"address"})), Leaf(lambda _: b"", frozenset({"name"})))
    nodes = (
        Node(1, b"fw\0"),
        Node(4, (Node(1, own[0]), Node(2, b"xyz"))),
        Node(7, (Node(0, own[1]), Node(3, b"!")), records=True),
    )
    form = Form(nodes, (b"abcd", b"efg"))
    assert form.filled((address, name)) == attrs.encode(attrs.fill(nodes, iter((address, name))))
    assert form.filled((address, name + b"!")) is None
