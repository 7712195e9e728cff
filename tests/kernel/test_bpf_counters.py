"""The counters of the bpf policy: slots share programs and maps, and yet count apart."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

import lab
from netslot.kernel import netlink, tc
from netslot.policy import bpf as policy
from netslot.policy.bpf import BpfDie
from netslot.policy.bpf_counters import GROUP, Traffic
from netslot.spec.policies import BpfSection

FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(86)


def values(slot: int) -> dict[str, str]:
    return {"slot": str(slot), "uplink_if": "up0"}


def make_link(net: lab.Net) -> None:
    """A pair of links, so that what leaves by one comes in by the other."""
    net.ip("link add up0 type veth peer name far0")
    net.sysctl(ipv6__conf__all__disable_ipv6=1)
    net.ip("link set up0 up", "link set far0 up")


def send(net: lab.Net, link: str, count: int) -> None:
    def act() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((link, 0))
            for _ in range(count):
                raw.send(FRAME)

    net.run(act)


def both(net: lab.Net, die: BpfDie, slot: int) -> tuple[int, int, int, int]:
    """Packets seen and passed on the way out, and on the way in."""
    out, back = net.run(policy.traffic, values(slot))
    assert out.bytes == out.packets * len(FRAME)
    assert back.passed_bytes == back.passed_packets * len(FRAME)
    return out.packets, out.passed_packets, back.packets, back.passed_packets


@pytest.fixture
def die() -> Iterator[BpfDie]:
    made = policy.cast(BpfSection(counters=True), samples=[values(1)], defaults={})
    yield made
    made.close()


def test_neighbours_count_apart_and_start_from_zero(die: BpfDie) -> None:
    slots = (1, 2, GROUP - 1, GROUP + 1, 70_000)
    with lab.nets(*(f"s{slot}" for slot in slots)) as nets:
        for slot, net in zip(slots, nets, strict=True):
            make_link(net)
            net.run(die.stamp, values(slot))
            assert both(net, die, slot) == (0, 0, 0, 0)
        for times, net in enumerate(nets, 1):
            send(net, "up0", times)
            send(net, "far0", 10 * times)
        for times, (slot, net) in enumerate(zip(slots, nets, strict=True), 1):
            assert both(net, die, slot) == (times, times, 10 * times, 10 * times)
            assert net.run(die.read, values(slot), {}) == []
        nets[0].run(die.reset, values(1))
        assert both(nets[0], die, 1) == (0, 0, 0, 0)
        assert both(nets[1], die, 2) == (2, 2, 20, 20), "the neighbour's stay"
        send(nets[0], "up0", 3)
        assert both(nets[0], die, 1) == (3, 3, 0, 0)


def test_a_slot_outlives_the_die_and_moves_to_another(die: BpfDie) -> None:
    with lab.nets("slot") as (net,):
        make_link(net)
        gone = policy.cast(BpfSection(counters=True), samples=[values(1)], defaults={})
        net.run(gone.stamp, values(1))
        gone.close()
        send(net, "up0", 4)
        assert both(net, die, 1) == (4, 4, 0, 0), "another process reads what is attached"
        assert net.run(die.read, values(1), {}) == []
        net.run(die.reset, values(1))
        assert net.run(policy.traffic, values(1)) == (Traffic(0, 0, 0, 0), Traffic(0, 0, 0, 0))


def test_read_finds_a_counter_that_counts_elsewhere(die: BpfDie) -> None:
    other = policy.cast(BpfSection(counters=True), samples=[values(1)], defaults={})
    with lab.nets("slot") as (net,):
        make_link(net)
        net.run(die.stamp, values(1))
        net.run(other.stamp, values(2))
        assert {d.what for d in net.run(die.read, values(1), {})} == {
            f"program netslot/count works with number {8 + stand}, not {4 + stand}" for stand in range(4)
        }
        net.run(die.reset, values(1))
        net.run(replace_one, other)
        assert [str(d) for d in net.run(die.read, values(1), {})] == [
            "bpf up0 counters: the counting programs are not one"
        ]
    other.close()


def replace_one(other: BpfDie) -> None:
    """Put another's program in the last place on the way out: it counts for the same slot, in another map."""
    attachment = other._parts[0].load(values(1), {})[1]
    with netlink.Socket() as sock:
        place = attachment.place
        link = socket.if_nametoindex("up0")
        sock.execute(
            [
                tc.set_filter(
                    link, place.hook, place.priority, attachment.program, attachment.name, number=attachment.number
                )
            ]
        )
