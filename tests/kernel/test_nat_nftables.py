"""Stateless NAT with nftables alone, with real connections."""

from __future__ import annotations

import socket
from functools import partial

import lab
import packets as p
from netslot.policy import nat


def test_connections_both_ways_and_families_without_tracking() -> None:
    other = {**lab.VALUES, "address": "10.201.7.9", "address6": "fd5c:1:2::9"}
    third = {**lab.VALUES, "address": "10.201.99.101", "address6": "fd5c:77::1:9"}
    die = nat.cast([lab.VALUES, other, third])
    assert die.fallback is None
    with lab.slot() as (root, middle, guest):
        assert not lab.connects(guest, lab.OUTSIDE4)
        middle.run(die.stamp, lab.VALUES)
        for outside, own, inner in ((lab.OUTSIDE4, lab.SLOT4, lab.GUEST4), (lab.OUTSIDE6, lab.SLOT6, lab.GUEST6)):
            server = lab.Echo(root, outside)
            assert lab.connects(guest, outside)
            assert server.tcp.accept()[1][0] == own
            backwards = lab.Echo(guest, inner, 8000)
            assert lab.connects(root, own, 8000)
            server.close()
            backwards.close()
        assert middle.sh("conntrack -L 2>/dev/null", check=False) == ""


def test_fragments_and_udp_without_checksum_arrive() -> None:
    die = nat.cast([lab.VALUES])
    with lab.slot() as (root, middle, guest):
        middle.run(die.stamp, lab.VALUES)
        server = lab.Echo(root, lab.OUTSIDE4)
        sender = guest.socket(socket.SOCK_DGRAM)
        sender.sendto(b"x" * 4000, (lab.OUTSIDE4, 7000))
        assert server.udp.recvfrom(5000) == (b"x" * 4000, (lab.SLOT4, sender.getsockname()[1]))
        wire = lab.Wire(guest, "eth0")
        datagram = p.udp(lab.GUEST4, lab.OUTSIDE4, 5, 7000, b"zero", zero=True)
        packet = p.ipv4(lab.GUEST4, lab.OUTSIDE4, p.UDP, datagram)
        wire.send(p.ethernet(lab.MACS["in0"], lab.MACS["eth0"], p.ETH_P_IP, packet))
        assert server.udp.recvfrom(100) == (b"zero", (lab.SLOT4, 5))
        for sock in (sender, server, wire):
            sock.close()


def _ends_with(text: bytes, frame: bytes) -> bool:
    return frame.endswith(text)


def test_only_the_guest_leaves_and_only_by_the_slots_address_is_it_reached() -> None:
    die = nat.cast([lab.VALUES])
    with lab.slot() as (root, middle, guest):
        middle.run(die.stamp, lab.VALUES)
        wire, outside = lab.Wire(guest, "eth0"), lab.Wire(root, "slot1")
        for source in (lab.GUEST4, "172.16.0.3", lab.SLOT4, "10.201.0.9", lab.GUEST6, "fd00:16::3", lab.SLOT6):
            six = ":" in source
            datagram = p.udp(source, lab.OUTSIDE6 if six else lab.OUTSIDE4, 5, 9, source.encode())
            packet = (p.ipv6 if six else p.ipv4)(source, lab.OUTSIDE6 if six else lab.OUTSIDE4, p.UDP, datagram)
            kind = p.ETH_P_IPV6 if six else p.ETH_P_IP
            wire.send(p.ethernet(lab.MACS["in0"], lab.MACS["eth0"], kind, packet))
            seen = outside.received(partial(_ends_with, source.encode()), 0.2)
            assert (seen is not None) == (source in (lab.GUEST4, lab.GUEST6)), source
        datagram = p.udp(lab.ROOT4, lab.GUEST4, 5, 9, b"direct")
        packet = p.ipv4(lab.ROOT4, lab.GUEST4, p.UDP, datagram)
        outside.send(p.ethernet(lab.MACS["up0"], lab.MACS["slot1"], p.ETH_P_IP, packet))
        assert wire.received(lambda frame: b"direct" in frame, 0.2) is None
        wire.close()
        outside.close()
