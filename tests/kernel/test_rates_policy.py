"""Rates in a slot, with load: bandwidth both ways, packets, new connections, connections in all."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

import lab
from netslot.errors import SpecError
from netslot.policy import nftables, rates
from netslot.spec.policies import Rate, RatesSection

Slot = tuple[lab.Net, lab.Net, lab.Net]
VALUES = {**lab.VALUES, "speed": "16M", "open": "20"}


@pytest.fixture
def slot() -> Iterator[Slot]:
    with lab.slot() as (root, middle, guest):
        root.ip(f"route add {lab.GUEST4} via {lab.SLOT4}")
        yield root, middle, guest


def table(section: RatesSection) -> rates.WithNumbers:
    samples = [{**VALUES, **rates.numbers(section, VALUES)}]
    text = rates.nft_text(section, inner=True)
    die = nftables.cast(text, samples=samples, scalars=rates.bindable(section), file="rates")
    assert die.fallback is None
    return rates.WithNumbers(die, section)


def transfer(sender: lab.Net, receiver: lab.Net, address: str, size: int) -> float:
    """Seconds that a TCP transfer of ``size`` bytes takes."""
    server = receiver.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last one may be in TIME_WAIT
    server.bind((address, 7100))
    server.listen()
    client = sender.socket()
    client.connect((address, 7100))
    peer, _ = server.accept()
    start, got = time.monotonic(), 0
    client.setblocking(False)
    data, sent = bytes(65536), 0
    peer.settimeout(5)
    while got < size:
        if sent < size:
            try:
                sent += client.send(data[: size - sent])
            except BlockingIOError:
                time.sleep(0)
        got += len(peer.recv(1 << 20))
    took = time.monotonic() - start
    for sock in (server, client, peer):
        sock.close()
    return took


def test_bandwidth_is_held_in_both_directions_and_rebound(slot: Slot) -> None:
    root, middle, guest = slot
    section = RatesSection(egress=Rate(bandwidth="${speed}"), ingress=Rate(bandwidth="${speed}"))
    die = rates.cast(section, values=VALUES)
    megabyte = 1_000_000
    free = transfer(guest, root, lab.OUTSIDE4, 4 * megabyte)
    middle.run(die.stamp, VALUES)
    assert middle.run(die.read, VALUES, {}) == []
    for sender, receiver, address in ((guest, root, lab.OUTSIDE4), (root, guest, lab.GUEST4)):
        held = transfer(sender, receiver, address, 4 * megabyte)
        assert held > 4 * megabyte * 8 / 19e6, "16 Mbit/s, and the burst of 64 KiB on top"
        assert held > 2 * free
    faster = {**VALUES, "speed": "800M"}
    middle.run(die.bind, faster, {})
    assert middle.run(die.read, faster, {}) == []
    assert [d.where for d in middle.run(die.read, VALUES, {})] == ["rates up0", "rates in0"]
    assert transfer(guest, root, lab.OUTSIDE4, 4 * megabyte) < held / 2
    middle.sh("tc qdisc del dev up0 root")
    assert [str(d) for d in middle.run(die.read, faster, {})] == ["rates up0: the token bucket is missing"]
    middle.run(die.reset, VALUES)
    assert middle.run(die.read, VALUES, {}) == []


def test_packets_are_held_in_both_directions(slot: Slot) -> None:
    root, middle, guest = slot
    section = RatesSection(egress=Rate(packets=100, packet_burst=50), ingress=Rate(packets=100, packet_burst=30))
    die = table(section)
    middle.run(die.stamp, VALUES)
    assert middle.run(die.read, VALUES, {}) == []
    for sender, receiver, address, burst in ((guest, root, lab.OUTSIDE4, 50), (root, guest, lab.GUEST4, 30)):
        sink = receiver.socket(socket.SOCK_DGRAM)
        sink.bind((address, 7200))
        sink.settimeout(0.2)
        with sender.socket(socket.SOCK_DGRAM) as out:
            start = time.monotonic()
            for _ in range(1000):
                out.sendto(b"x", (address, 7200))
            took = time.monotonic() - start
        received = 0
        try:
            while sink.recv(10):
                received += 1
        except TimeoutError:
            sink.close()
        assert burst <= received <= burst + 100 * took + 10


def test_new_connections_are_limited(slot: Slot) -> None:
    root, middle, guest = slot
    die = table(RatesSection(new_connections=2, new_connections_burst=10))
    middle.run(die.stamp, VALUES)
    server = lab.Echo(root, lab.OUTSIDE4)
    start = time.monotonic()
    taken = sum(lab.connects(guest, lab.OUTSIDE4, timeout=0.05) for _ in range(30))
    assert 10 <= taken <= 10 + 2 * (time.monotonic() - start) + 1 < 30
    server.close()


def test_connections_are_limited_per_slot_and_the_limit_is_rebound() -> None:
    """One slot at its limit, another beside it not: each counts its own."""
    die = table(RatesSection(connections="${open}"))
    with lab.slot() as (root, middle, guest), lab.slot() as (other_root, other_middle, other_guest):
        held = []
        for net, inside, outside in ((middle, guest, root), (other_middle, other_guest, other_root)):
            net.run(die.stamp, VALUES)
            outside.ip(f"route add {lab.GUEST4} via {lab.SLOT4}")
            held.append(lab.Echo(outside, lab.OUTSIDE4))
            sockets = [inside.socket() for _ in range(30)]
            for sock in sockets:
                sock.settimeout(0.05)
            if net is middle:
                assert [sock.connect_ex((lab.OUTSIDE4, 7000)) for sock in sockets].count(0) == 20
                assert middle.run(die.read, VALUES, {}) == []
                middle.run(die.bind, {**VALUES, "open": "25"}, {})
                again = inside.socket()
                again.settimeout(0.5)
                assert again.connect_ex((lab.OUTSIDE4, 7000)) == 0
                sockets.append(again)
            else:
                assert sockets[0].connect_ex((lab.OUTSIDE4, 7000)) == 0, "the neighbour has all of its own left"
            for sock in sockets:
                sock.close()
        for echo in held:
            echo.close()


def test_a_wrong_rate_is_refused() -> None:
    with pytest.raises(SpecError, match=r"rates.egress.bandwidth: '10X' is no quantity"):
        rates.cast(RatesSection(egress=Rate(bandwidth="10X")), values=VALUES)
    with pytest.raises(SpecError, match=r"rates.connections: 'many' is no quantity"):
        rates.cast(RatesSection(connections="many"), values=VALUES)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (RatesSection(egress=Rate(bandwidth=0)), "egress.bandwidth: 0 is not from 8000"),
        (RatesSection(egress=Rate(bandwidth="999999T")), "egress.bandwidth: 999999000000000000 is not from 8000"),
        (RatesSection(ingress=Rate(bandwidth="10M", burst=100)), "ingress.burst: 100 is not from 1514"),
        (RatesSection(egress=Rate(bandwidth="8k", burst="1M")), "egress.burst: 1000000 bytes are too many for 8000"),
        (RatesSection(egress=Rate(packets=0)), "egress.packets: 0 is not from 1"),
        (RatesSection(egress=Rate(packets=9, packet_burst=0)), "egress.packet_burst: 0 is not from 1"),
        (RatesSection(new_connections=0), "new_connections: 0 is not from 1"),
        (RatesSection(connections="99G"), "connections: 99000000000 is not from 0 to 4294967295"),
    ],
)
def test_what_the_kernel_cannot_count_is_refused(section: RatesSection, key: str) -> None:
    """A lease may bring the same: of a bucket of 65,536 s the kernel made one of 115 bytes, which verify named."""
    with pytest.raises(SpecError, match=f"rates.{key}"):
        rates.cast(section, values=VALUES)


@pytest.mark.parametrize("bits", [8_000, 200_000_000_000])
def test_the_slowest_and_the_fastest_rate_are_held_as_told(slot: Slot, bits: int) -> None:
    _, middle, _ = slot
    die = rates.cast(RatesSection(egress=Rate(bandwidth=bits), ingress=Rate(bandwidth=bits)), values=VALUES)
    middle.run(die.stamp, VALUES)
    assert middle.run(die.read, VALUES, {}) == []
