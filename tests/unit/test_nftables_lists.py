"""Lists of networks and ports as set elements."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netslot.errors import UsageError
from netslot.kernel import netlink
from netslot.policy.nft_lists import interval_chunks, intervals, parse_port

networks4 = st.builds(
    lambda number, length: str(ipaddress.ip_network((number, length), strict=False)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
networks6 = st.builds(
    lambda number, length: str(ipaddress.IPv6Network((number, length), strict=False)),
    st.integers(0, 2**128 - 1),
    st.integers(0, 128),
)


def collapsed(networks: list[str]) -> list[tuple[int, int]]:
    """The same by the standard library: it merges only what makes a network, so join the rest."""
    found: list[tuple[int, int]] = []
    for network in ipaddress.collapse_addresses(map(ipaddress.IPv4Network, networks)):
        start, end = int(network.network_address), int(network.broadcast_address) + 1
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


@given(st.lists(networks4, max_size=40))
def test_networks_merge_as_the_standard_library_merges_them(networks: list[str]) -> None:
    assert list(zip(*intervals(networks, 4), strict=True)) == collapsed(networks)


@given(st.lists(networks6, max_size=20), st.integers(0, 2**128 - 1))
def test_an_address_is_in_an_interval_when_it_is_in_a_network(networks: list[str], number: int) -> None:
    starts, ends = intervals(networks, 6)
    address = ipaddress.IPv6Address(number)
    inside = any(address in ipaddress.IPv6Network(network) for network in networks)
    assert any(start <= number < end for start, end in zip(starts, ends, strict=True)) == inside


@pytest.mark.parametrize(
    ("networks", "expected"),
    [
        ([], []),
        (["0.0.0.0/0"], [(0, 1 << 32)]),
        (["0.0.0.0/1", "128.0.0.0/1"], [(0, 1 << 32)]),
        (["10.0.0.1"], [(0x0A000001, 0x0A000002)]),
        (["10.0.0.7/24"], [(0x0A000000, 0x0A000100)]),
        (["10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8"], [(0x0A000000, 0x0C000000)]),
        (["255.255.255.255", "0.0.0.0"], [(0, 1), (0xFFFFFFFF, 1 << 32)]),
    ],
)
def test_edges(networks: list[str], expected: list[tuple[int, int]]) -> None:
    assert list(zip(*intervals(networks, 4), strict=True)) == expected


@pytest.mark.parametrize("bad", ["10.0.0.0/33", "10.0.0/8", "x", "", "10.0.0.0/", "10.0.0.0/8/8", "fd00::/8"])
def test_what_is_no_network_is_named(bad: str) -> None:
    with pytest.raises(UsageError, match="is no IPv4 network"):
        intervals(["192.0.2.0/24", bad], 4)


def keys(chunks: list[bytes]) -> list[tuple[int, bool]]:
    """Key and whether it is an end, of every element."""
    found = []
    for chunk in chunks:
        for _, element in netlink.iter_attrs(chunk):
            parts = netlink.parse_attrs(element)
            found.append((int.from_bytes(netlink.parse_attrs(parts[1])[1], "big"), 3 in parts))
    return found


@given(st.lists(networks4, max_size=40))
def test_elements_are_starts_and_ends(networks: list[str]) -> None:
    starts, ends = intervals(networks, 4)
    found = keys(interval_chunks(starts, ends, 4))
    assert [key for key, is_end in found if not is_end] == starts
    dummy = [0] if starts and starts[0] else []
    assert [key for key, is_end in found if is_end] == dummy + [end for end in ends if end < 1 << 32]
    assert keys(interval_chunks(starts, ends, 4, descending=True)) == found[::-1]


def test_no_message_is_too_long() -> None:
    starts = list(range(0, 1_000_000, 10))
    chunks = interval_chunks(starts, [start + 5 for start in starts], 4)
    assert max(map(len, chunks)) <= 60_000
    assert len(keys(chunks)) == 200_000


@pytest.mark.parametrize(("text", "expected"), [("tcp:8080:80", (6, 8080, 80)), ("udp:53:65535", (17, 53, 65535))])
def test_ports(text: str, expected: tuple[int, int, int]) -> None:
    assert parse_port(text) == expected


@pytest.mark.parametrize(
    "bad", ["tcp:80", "tcp:0:80", "tcp:80:65536", "icmp:1:1", "tcp:a:80", "tcp:8 0:80", "", "::"]
)
def test_what_is_no_port_is_refused(bad: str) -> None:
    with pytest.raises(UsageError, match="is no published port"):
        parse_port(bad)
