"""The tables of the egress filter, searched here as bpf/filter.c searches them."""

from __future__ import annotations

import ipaddress
import random
import struct

import pytest

from netslot.errors import UsageError
from netslot.policy.addresses import ACCEPT, DROP, PORTS, table4, table6


def search(table: bytes, address: int, version: int) -> int:
    """The verdict, and an assertion for each read that it is inside the table."""
    cells: tuple[int, ...] = struct.unpack(f"={len(table) // 8}Q", table)
    width, key = (1, address) if version == 4 else (3, address >> 64)
    base, shape = cells[0], cells[1]
    buckets, shift = shape & 0xFFFFFFFF, shape >> 32
    ranges, low, step = 3 + buckets, 0, 0
    if key >= base:
        place = cells[2 + min((key - base) >> shift, buckets)]
        low, step = place & 0xFFFFFFFF, place >> 32

    def start(index: int) -> int:
        at = ranges + index * width
        return cells[at] >> 32 if version == 4 else cells[at] << 64 | cells[at + 1]

    steps = 0
    while step:
        if start(low + step) <= address:
            low += step
        step >>= 1
        steps += 1
    assert steps <= 20, "the program gives up after 20 steps"
    at = ranges + low * width
    return cells[at] & 0xFFFFFFFF if version == 4 else cells[at + 2]


def verdict(lists: dict[int, list[str]], default: int, address: int, version: int) -> int:
    kind = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    best, answer = -1, default
    for value in sorted(lists):
        for text in lists[value]:
            network = ipaddress.ip_network(text)
            if kind(address) in network and network.prefixlen > best:
                best, answer = network.prefixlen, value
    return answer


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(40))
def test_every_boundary_of_random_lists(version: int, seed: int) -> None:
    chance = random.Random(seed)
    bits, build = (32, table4) if version == 4 else (128, table6)
    make = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    centre = chance.getrandbits(bits)

    def prefix() -> str:
        length = chance.choice([0, 1, 7, bits // 2, bits - 9, bits - 5, bits - 2, bits])
        number = (centre + chance.getrandbits(chance.choice([3, 10, bits]))) % (1 << bits)
        number = number >> (bits - length) << (bits - length) if length else 0
        return f"{make(number)}/{length}"

    verdicts = chance.choice([[ACCEPT], [DROP], [DROP, ACCEPT], [DROP, PORTS], [DROP, ACCEPT, PORTS]])
    lists = {value: [prefix() for _ in range(chance.choice([0, 1, 3, 50]))] for value in verdicts}
    default = chance.choice([DROP, ACCEPT])
    table = build(lists, default)
    asked = {0, (1 << bits) - 1, centre}
    for value in lists.values():
        for text in value[:12]:
            network = ipaddress.ip_network(text)
            first, last = int(network.network_address), int(network.broadcast_address)
            asked |= {first, last, max(0, first - 1), min((1 << bits) - 1, last + 1)}
    for address in asked:
        assert search(table, address, version) == verdict(lists, default, address, version)


def test_a_long_list_is_searched_in_few_steps_and_stays_small() -> None:
    chance = random.Random(7)
    prefixes = [f"{ipaddress.IPv4Address(chance.getrandbits(24) << 8)}/24" for _ in range(20_000)]
    table = table4({ACCEPT: prefixes}, DROP)
    assert len(table) < 20 * len(prefixes)
    for text in prefixes[:300]:
        assert search(table, int(ipaddress.ip_network(text).network_address) + 5, 4) == ACCEPT


def test_an_address_alone_is_one_address() -> None:
    assert table4({ACCEPT: ["192.0.2.7", "10.0.0.0/8"]}, DROP) == table4(
        {ACCEPT: ["192.0.2.7/32", "10.0.0.0/8"]}, DROP
    )
    assert table6({ACCEPT: ["2001:db8::7"]}, DROP) == table6({ACCEPT: ["2001:db8::7/128"]}, DROP)


def test_a_list_that_is_dense_in_one_place_is_searched_too() -> None:
    prefixes = [f"10.{n >> 8}.{n & 255}.0/25" for n in range(30_000)] + ["223.255.255.255/32"]
    table = table4({ACCEPT: prefixes}, DROP)
    assert [search(table, int(ipaddress.IPv4Address(text)), 4) for text in ("10.0.7.1", "10.0.7.129")] == [
        ACCEPT,
        DROP,
    ]
    assert search(table, int(ipaddress.IPv4Address("223.255.255.255")), 4) == ACCEPT


@pytest.mark.parametrize("wrong", ["10.0.0.0/33", "10.0.0/8", "x/8", "10.0.0.0/8/8", "::/0"])
def test_what_is_no_ipv4_prefix_is_named(wrong: str) -> None:
    with pytest.raises(UsageError) as raised:
        table4({ACCEPT: ["192.0.2.0/24", wrong]}, DROP)
    assert repr(wrong) in str(raised.value)


@pytest.mark.parametrize("texts", [["10.0.0.0/8/1.2.3.4", "24"], ["1.2.3.4", "24/10.0.0.0/8"], ["1.2.3.4\0/24"]])
def test_texts_that_are_prefixes_only_together_are_none(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="is no IPv4 CIDR"):
        table4({ACCEPT: texts}, DROP)


def test_bits_beyond_the_length_are_no_part_of_a_prefix() -> None:
    assert table4({ACCEPT: ["10.1.2.3/8"]}, DROP) == table4({ACCEPT: ["10.0.0.0/8"]}, DROP)
    assert table6({ACCEPT: ["2001:db8::7/32"]}, DROP) == table6({ACCEPT: ["2001:db8::/32"]}, DROP)


def test_what_lies_inside_or_beside_another_prefix_makes_no_range() -> None:
    whole = table4({ACCEPT: ["0.0.0.0/0"]}, DROP)
    assert table4({ACCEPT: ["128.0.0.0/1", "0.0.0.0/1", "10.0.0.0/8", "0.0.0.0/1"]}, DROP) == whole
    assert table4({ACCEPT: ["0.0.0.0/0"], DROP: []}, DROP) == whole
