"""Which bytes hold which variable: found from casts alone, proven on values that no cast had."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netslot.errors import UsageError
from netslot.kernel.nf_attrs import Leaf
from netslot.policy.patches import Unexplained, Unpatchable, explain

SLOTS = [1, 2, 777, 3999]


def values(slot: int) -> dict[str, str]:
    return {
        "slot": str(slot),
        "netns": f"slot{slot}",
        "address": str(ipaddress.ip_address("10.200.0.0") + slot),
        "address6": str(ipaddress.ip_address("fd00:1::") + (slot << 64)),
        "network": f"{ipaddress.ip_address('10.100.0.0') + 4 * slot}/30",
        "mac": f"02:00:00:00:{slot // 256:02x}:{slot % 256:02x}",
        "same": "5",
    }


def packed(slot: int, name: str) -> bytes:
    return ipaddress.ip_address(values(slot)[name]).packed


CASES: dict[str, Callable[[int], bytes]] = {
    "number, big": lambda s: struct.pack(">I", s),
    "number, native": lambda s: struct.pack("=I", s),
    "number, 16 bits": lambda s: struct.pack(">H", s),
    "end of an interval": lambda s: struct.pack(">H", s + 1),
    "milliseconds": lambda s: struct.pack(">Q", s * 1000),
    "mebibytes": lambda s: struct.pack(">Q", s << 20),
    "address": lambda s: packed(s, "address"),
    "address in the middle": lambda s: b"\1\2" + packed(s, "address") + b"\0\0",
    "two addresses": lambda s: packed(s, "address") + packed(s, "address6"),
    "after the address": lambda s: (ipaddress.ip_address(values(s)["address"]) + 1).packed,
    "network of 24": lambda s: ipaddress.ip_network(values(s)["address"] + "/24", False).network_address.packed,
    "after that network": lambda s: (
        (ipaddress.ip_network(values(s)["address"] + "/24", False).broadcast_address + 1).packed
    ),
    "three bytes of it": lambda s: packed(s, "address")[:3],
    "own network": lambda s: ipaddress.ip_network(values(s)["network"]).network_address.packed,
    "last of own network": lambda s: ipaddress.ip_network(values(s)["network"]).broadcast_address.packed,
    "address6": lambda s: packed(s, "address6"),
    "mac": lambda s: bytes.fromhex(values(s)["mac"].replace(":", "")),
    "interface name": lambda s: values(s)["netns"].encode().ljust(16, b"\0"),
    "start of a name": lambda s: values(s)["netns"].encode(),
    "string": lambda s: f"rule 1 of {values(s)['netns']}, number {s}".encode() + b"\0",
    "constant field": lambda s: struct.pack(">HH", 5, s),
}


@pytest.mark.parametrize("name", CASES)
def test_an_encoding_is_found(name: str) -> None:
    make = CASES[name]
    leaf = explain([make(slot) for slot in SLOTS], [values(slot) for slot in SLOTS])
    for slot in (3, 9, 10, 99, 100, 255, 256, 1234, 4000):
        assert leaf.render(values(slot)) == make(slot)


@given(st.integers(1, 60000), st.binary(max_size=6), st.binary(max_size=6))
def test_what_is_around_does_not_matter(slot: int, before: bytes, after: bytes) -> None:
    made = [before + packed(each, "address") + after for each in SLOTS]
    leaf = explain(made, [values(each) for each in SLOTS])
    assert leaf.render(values(slot)) == before + packed(slot, "address") + after
    assert leaf.names <= {"address", "slot", "netns", "network", "mac", "address6"}


def test_the_variable_that_fits_all_casts_is_taken() -> None:
    """In slots 1 and 2 the last byte of the address is the slot's number; in slot 3999 it is not."""
    leaf = explain([packed(slot, "address") for slot in SLOTS], [values(slot) for slot in SLOTS])
    assert leaf.names == {"address"}


@pytest.mark.parametrize("make", [lambda s: struct.pack(">I", s * s), lambda s: b"x" * (s % 5 + 1), lambda s: b""])
def test_what_nothing_explains_is_said(make: Callable[[int], bytes]) -> None:
    leaves = [make(slot) for slot in SLOTS]
    if len(set(leaves)) == 1:
        leaves[0] = b"other"
    with pytest.raises(Unexplained):
        explain(leaves, [values(slot) for slot in SLOTS])


def found(name: str) -> Leaf:
    make = CASES[name]
    return explain([make(slot) for slot in SLOTS], [values(slot) for slot in SLOTS])


def test_a_value_of_another_kind_is_refused() -> None:
    with pytest.raises(Unpatchable):
        found("address").render({**values(1), "address": "not an address"})
    with pytest.raises(Unpatchable):
        found("number, 16 bits").render({**values(1), "slot": "70000"})


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises((Unpatchable, UsageError)):
        found("interface name").render({**values(1), "netns": "n" * 17})
