"""Stateless NAT with nftables alone, with real connections."""

from __future__ import annotations

import socket
import struct
import time
from functools import partial

import pytest

import lab
import packets as p
from netslot.policy import nat, nftables
from netslot.policy.tunnels import Arrival


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


def _far(root: lab.Net, far: lab.Net) -> None:
    """Move the outside's addresses behind a link of root's that is narrower."""
    root.ip(
        f"addr del {lab.OUTSIDE4}/32 dev lo",
        f"addr del {lab.OUTSIDE6}/128 dev lo",
        f"link add out type veth peer name in netns {far.name}",
        "link set out addrgenmode none",
        "addr add fe80::1/64 dev out nodad",  # neighbours are asked for from here
        "addr add 198.51.100.1/24 dev out",
        "addr add 2001:db8::1/64 dev out nodad",
        "link set out up mtu 1300",
    )
    root.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    far.ip(
        "link set in addrgenmode none",
        "addr add fe80::2/64 dev in nodad",
        f"addr add {lab.OUTSIDE4}/24 dev in",
        f"addr add {lab.OUTSIDE6}/64 dev in nodad",
        "link set in up mtu 1500",
        "route add default via 198.51.100.1",
        "route add default via 2001:db8::1",
    )
    root.wait_for_carrier("out")


@pytest.mark.parametrize("version", [4, 6])
def test_path_mtu_discovery_through_nat(version: int) -> None:
    """Root's 'too big' quotes the translated packet; the guest must believe that it is about its own."""
    outside, family = ((lab.OUTSIDE4, socket.AF_INET), (lab.OUTSIDE6, socket.AF_INET6))[version == 6]
    level, discover, mtu = (socket.IPPROTO_IP, 10, 14) if version == 4 else (socket.IPPROTO_IPV6, 23, 24)
    die = nat.cast([lab.VALUES])
    assert die.fallback is None
    with lab.slot() as (root, middle, guest), lab.Net("far") as far:
        middle.run(die.stamp, lab.VALUES)
        assert middle.run(die.read, lab.VALUES, {}) == []
        _far(root, far)
        with guest.socket(socket.SOCK_DGRAM, family) as sender:
            sender.setsockopt(level, discover, 2)  # IP_PMTUDISC_DO
            sender.connect((outside, 9))
            sender.send(bytes(1400))
            deadline = time.monotonic() + 3
            while sender.getsockopt(level, mtu) != 1300 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert sender.getsockopt(level, mtu) == 1300
        server = lab.Echo(far, outside)
        with guest.socket(family=family) as client:
            client.settimeout(3)
            client.connect((outside, 7000))
            peer, _ = server.tcp.accept()
            client.sendall(bytes(100_000))
            peer.settimeout(3)
            got = 0
            while got < 100_000:
                got += len(peer.recv(100_000))
            peer.close()
        server.close()


@pytest.mark.parametrize("version", [4, 6])
def test_errors_of_others_and_of_the_guest_are_believed(version: int) -> None:
    """'Port unreachable' in both directions reaches the socket that sent the datagram: refused, not lost."""
    outside, own = ((lab.OUTSIDE4, lab.SLOT4), (lab.OUTSIDE6, lab.SLOT6))[version == 6]
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    die = nat.cast([lab.VALUES])
    with lab.slot() as (root, middle, guest):
        middle.run(die.stamp, lab.VALUES)
        for sender, address in ((guest, outside), (root, own)):
            with sender.socket(socket.SOCK_DGRAM, family) as sock:
                sock.settimeout(2)
                sock.connect((address, 9))
                sock.send(b"x")
                with pytest.raises(ConnectionRefusedError):
                    sock.recv(10)


@pytest.mark.parametrize("quoted", [20, 28, 60])
def test_what_an_error_quotes_is_right_to_the_last_sum(quoted: int) -> None:
    """By hand, with a quote cut short: addresses, the quoted header's checksum and the message's own."""
    die = nat.cast([lab.VALUES])
    with lab.slot() as (root, middle, guest):
        middle.run(die.stamp, lab.VALUES)
        outside, inside = lab.Wire(root, "slot1"), lab.Wire(guest, "eth0")
        for sender, receiver, source, target, wanted in (
            (outside, inside, lab.OUTSIDE4, lab.SLOT4, lab.GUEST4),
            (inside, outside, lab.GUEST4, lab.OUTSIDE4, lab.SLOT4),
        ):
            told = (target, source) if sender is outside else (lab.OUTSIDE4, lab.GUEST4)
            inner = p.ipv4(*told, p.UDP, p.udp(*told, 5, 9, bytes(40)))[:quoted]
            body = struct.pack(">BBHI", 11, 0, 0, 0) + inner
            body = body[:2] + struct.pack(">H", p.checksum(body)) + body[4:]
            macs = ("up0", "slot1") if sender is outside else ("in0", "eth0")
            packet = p.ipv4(source, target, 1, body)
            sender.send(p.ethernet(lab.MACS[macs[0]], lab.MACS[macs[1]], p.ETH_P_IP, packet))
            frame = receiver.received(lambda f: f[12:14] == b"\x08\x00" and f[23] == 1, 1)
            assert frame is not None
            message = frame[34:]
            assert p.checksum(message[: 8 + quoted]) == 0, "the message's checksum"
            header = message[8:28]
            assert p.checksum(header) == 0, "the quoted header's"
            place = 12 if sender is outside else 16
            assert socket.inet_ntoa(header[place : place + 4]) == wanted
        outside.close()
        inside.close()


def test_fragments_of_ipv6_arrive() -> None:
    die = nat.cast([lab.VALUES])
    with lab.slot() as (root, middle, guest):
        middle.run(die.stamp, lab.VALUES)
        server = lab.Echo(root, lab.OUTSIDE6)
        sender = guest.socket(socket.SOCK_DGRAM, socket.AF_INET6)
        sender.sendto(b"x" * 4000, (lab.OUTSIDE6, 7000))
        data, address = server.udp.recvfrom(5000)
        assert (data, address[0]) == (b"x" * 4000, lab.SLOT6)
        server.udp.sendto(b"y" * 4000, address)
        sender.settimeout(2)
        assert sender.recv(5000) == b"y" * 4000
        sender.close()
        server.close()


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("version", [4, 6])
def test_the_packets_of_the_slots_tunnels_stay_the_slots(version: int, tracked: bool) -> None:
    """And the errors about those; another port is the guest's."""
    die = nftables.cast(
        nat.nft_text(ipv6=True, tracked=tracked, own=[Arrival(p.UDP, 4789), Arrival(47)]),
        samples=[lab.VALUES],
        finish=nat.correct_checksums,
    )
    source, target = (lab.ROOT4, lab.SLOT4) if version == 4 else (lab.ROOT6, lab.SLOT6)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    inner = p.udp(target, source, 5, 4789, bytes(40))
    if version == 4:
        quoted = p.ipv4(target, source, p.UDP, inner)
        error = p.ipv4(source, target, p.ICMP, p.icmp(3, 4, struct.pack(">HH", 0, 1400), quoted))
    else:
        quoted = p.ipv6(target, source, p.UDP, inner)
        error = p.ipv6(source, target, p.ICMPV6, p.icmp6(source, target, 2, 0, struct.pack(">I", 1280), quoted))
    with lab.slot() as (root, middle, guest):
        middle.run(die.stamp, lab.VALUES)
        sender = root.socket(socket.SOCK_DGRAM, family)
        end = middle.socket(socket.SOCK_DGRAM, family)
        end.bind(("0.0.0.0" if version == 4 else "::", 4789))
        end.settimeout(2)
        inside, wire = lab.Wire(guest, "eth0"), lab.Wire(root, "slot1")
        sender.sendto(b"frame", (target, 4789))
        assert end.recv(100) == b"frame"
        kind = p.ETH_P_IP if version == 4 else p.ETH_P_IPV6
        wire.send(p.ethernet(lab.MACS["up0"], lab.MACS["slot1"], kind, error))
        sender.sendto(b"the guest's", (target, 4790))
        frames = []
        while (frame := inside.received(lambda f: f[12:14] == struct.pack(">H", kind), 1)) is not None:
            frames.append(frame)
            if frame.endswith(b"the guest's"):
                break
        assert any(frame.endswith(b"the guest's") for frame in frames)
        assert not any(bytes(40) in frame for frame in frames), "an error about a tunnel's packet is not the guest's"
        for sock in (sender, end, inside, wire):
            sock.close()
