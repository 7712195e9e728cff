"""The NAT programs, packet by packet, by test runs in the kernel (no link is involved)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

import packets as p
from netslot.errors import SpecError
from netslot.kernel import bpf, tc
from netslot.policy.bpf_parts import Nat, Place
from netslot.policy.tunnels import Arrival

GUEST, SLOT, PEER = "172.16.0.2", "10.201.0.9", "198.51.100.7"
GUEST6, SLOT6, PEER6 = "fd00:16::2", "fd5c:a7e:10:9::1", "2001:db8::7"
UNSPEC, SHOT = -1, 2
VALUES = {"slot": "0", "address": SLOT, "address6": SLOT6, "guest_address": GUEST, "guest_address6": GUEST6}


@pytest.fixture(scope="module")
def nat() -> Iterator[Nat]:
    part = Nat([VALUES])
    yield part
    part.close()


def run(nat: Nat, hook: int, packet: bytes, *, forwarded: bool = True) -> tuple[int, bytes]:
    """A test run cannot set the class id: it is 0, the number of the slot in ``VALUES``."""
    attachments = {a.place: a for a in nat.load(VALUES, {})}
    kind = p.ETH_P_IPV6 if packet[0] >> 4 == 6 else p.ETH_P_IP
    frame = p.ethernet("02:00:00:00:00:01", "02:00:00:00:00:02", kind, packet)
    # ingress_ifindex is the tenth word of struct __sk_buff.
    context = struct.pack("=10I", *[0] * 9, int(forwarded))
    result = bpf.prog_test_run(attachments[Place(hook, 20)].program, frame, context=context)
    return result.verdict, result.packet[14:]


def transports(source: str, destination: str) -> list[tuple[int, bytes]]:
    ping = (p.ICMPV6, p.icmp6(source, destination, 128, 0, b"\0\1\0\1", b"x" * 9))
    if ":" not in source:
        ping = (p.ICMP, p.icmp(8, 0, b"\0\1\0\1", b"x" * 9))
    return [
        (p.TCP, p.tcp(source, destination, 40000, 443, data=b"hello")),
        (p.UDP, p.udp(source, destination, 40000, 53, b"odd")),
        ping,
        (47, b"\0\0\x08\0some gre"),
    ]


def ip(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    return (p.ipv6 if ":" in source else p.ipv4)(source, destination, protocol, payload)


@pytest.mark.parametrize(("guest", "slot", "peer"), [(GUEST, SLOT, PEER), (GUEST6, SLOT6, PEER6)])
@pytest.mark.parametrize("which", range(4))
def test_both_directions_translate_with_right_checksums(
    nat: Nat, guest: str, slot: str, peer: str, which: int
) -> None:
    protocol, payload = transports(guest, peer)[which]
    verdict, out = run(nat, tc.EGRESS, ip(guest, peer, protocol, payload))
    assert verdict == UNSPEC
    sent = p.parse(out)
    assert (sent.source, sent.destination, sent.sound) == (slot, peer, True)

    protocol, payload = transports(peer, slot)[which]
    verdict, out = run(nat, tc.INGRESS, ip(peer, slot, protocol, payload))
    assert verdict == UNSPEC
    received = p.parse(out)
    assert (received.source, received.destination, received.sound) == (peer, guest, True)


def test_udp_without_checksum_stays_without(nat: Nat) -> None:
    packet = p.ipv4(GUEST, PEER, p.UDP, p.udp(GUEST, PEER, 1, 2, b"x", zero=True))
    verdict, out = run(nat, tc.EGRESS, packet)
    assert verdict == UNSPEC
    assert p.parse(out).payload[6:8] == b"\0\0"


def test_udp_checksum_never_becomes_zero(nat: Nat) -> None:
    """Find the payload whose translated checksum computes to 0: it must be sent as 0xffff."""
    seen = False
    for value in range(1 << 16):
        data = struct.pack(">H", value)
        datagram = p.udp(SLOT, PEER, 1, 2, data)
        if datagram[6:8] == b"\xff\xff":
            verdict, out = run(nat, tc.EGRESS, p.ipv4(GUEST, PEER, p.UDP, p.udp(GUEST, PEER, 1, 2, data)))
            assert verdict == UNSPEC
            assert p.parse(out).payload[6:8] == b"\xff\xff"
            seen = True
            break
    assert seen


@pytest.mark.parametrize("source", [SLOT, "172.16.0.3", "10.201.0.10", "127.0.0.1", "0.0.0.0", PEER])
def test_a_forwarded_packet_not_from_the_guest_is_dropped(nat: Nat, source: str) -> None:
    packet = p.ipv4(source, PEER, p.UDP, p.udp(source, PEER, 1, 2, b"x"))
    assert run(nat, tc.EGRESS, packet)[0] == SHOT


@pytest.mark.parametrize("source", [SLOT6, "fd00:16::3", "fe80::1", "::1", "::", "::ffff:172.16.0.2"])
def test_a_forwarded_ipv6_packet_not_from_the_guest_is_dropped(nat: Nat, source: str) -> None:
    packet = p.ipv6(source, PEER6, p.UDP, p.udp(source, PEER6, 1, 2, b"x"))
    assert run(nat, tc.EGRESS, packet)[0] == SHOT


def test_what_the_slot_itself_sends_keeps_its_source(nat: Nat) -> None:
    packet = p.ipv4(SLOT, PEER, p.UDP, p.udp(SLOT, PEER, 1, 2, b"x"))
    assert run(nat, tc.EGRESS, packet, forwarded=False) == (UNSPEC, packet)
    solicitation = p.icmp6(SLOT6, "ff02::1", 135, 0, bytes(4), p.pack("fe80::1"))
    packet = p.ipv6(SLOT6, "ff02::1", p.ICMPV6, solicitation, hops=255)
    assert run(nat, tc.EGRESS, packet, forwarded=False) == (UNSPEC, packet)
    assert run(nat, tc.EGRESS, packet)[0] == SHOT, "a guest's neighbour discovery must not leave the slot"


def test_the_guest_cannot_be_addressed_from_outside(nat: Nat) -> None:
    assert run(nat, tc.INGRESS, p.ipv4(PEER, GUEST, p.UDP, p.udp(PEER, GUEST, 1, 2, b"x")))[0] == SHOT
    assert run(nat, tc.INGRESS, p.ipv6(PEER6, GUEST6, p.UDP, p.udp(PEER6, GUEST6, 1, 2, b"x")))[0] == SHOT


def test_neighbour_discovery_for_the_slot_passes_untouched(nat: Nat) -> None:
    probe = p.ipv6("fe80::1", SLOT6, p.ICMPV6, p.icmp6("fe80::1", SLOT6, 135, 0, bytes(4), p.pack(SLOT6)), hops=255)
    assert run(nat, tc.INGRESS, probe) == (UNSPEC, probe)


@pytest.mark.parametrize("protocol", [p.TCP, p.UDP, p.ICMP])
def test_icmp_errors_are_translated_with_the_packet_they_quote(nat: Nat, protocol: int) -> None:
    """A router tells the guest about the guest's packet, which the router saw with the slot's address."""
    payload = {p.TCP: p.tcp, p.UDP: p.udp}.get(protocol)
    inner = payload(SLOT, PEER, 40000, 443) if payload is p.tcp else b""
    if protocol == p.UDP:
        inner = p.udp(SLOT, PEER, 40000, 443, b"data")
    if protocol == p.ICMP:
        inner = p.icmp(8, 0, b"\0\1\0\1", b"ping")
    quoted = p.ipv4(SLOT, PEER, protocol, inner)
    error = p.ipv4("192.0.2.1", SLOT, p.ICMP, p.icmp(3, 4, struct.pack(">HH", 0, 1400), quoted))
    verdict, out = run(nat, tc.INGRESS, error)
    assert verdict == UNSPEC
    outer = p.parse(out)
    assert (outer.destination, outer.sound) == (GUEST, True)
    about = p.parse(outer.payload[8:])
    assert (about.source, about.destination, about.sound) == (GUEST, PEER, True)

    # And the guest's own errors about packets that it received.
    quoted = p.ipv4(PEER, GUEST, p.UDP, p.udp(PEER, GUEST, 5, 6, b"x"))
    verdict, out = run(nat, tc.EGRESS, p.ipv4(GUEST, PEER, p.ICMP, p.icmp(3, 3, bytes(4), quoted)))
    outer = p.parse(out)
    about = p.parse(outer.payload[8:])
    assert (verdict, outer.source, outer.sound) == (UNSPEC, SLOT, True)
    assert (about.source, about.destination, about.sound) == (PEER, SLOT, True)


def test_icmp_errors_with_the_shortest_quote(nat: Nat) -> None:
    """RFC 792 quotes 8 bytes of transport: ports, but no TCP checksum."""
    quoted = p.ipv4(SLOT, PEER, p.TCP, p.tcp(SLOT, PEER, 40000, 443))[:28]
    verdict, out = run(nat, tc.INGRESS, p.ipv4("192.0.2.1", SLOT, p.ICMP, p.icmp(11, 0, bytes(4), quoted)))
    outer = p.parse(out)
    assert (verdict, outer.destination, outer.sound) == (UNSPEC, GUEST, True)
    assert p.checksum(outer.payload[8:28]) == 0
    assert p.parse(outer.payload[8:]).source == GUEST


def test_a_quote_of_somebody_elses_packet_is_left_alone(nat: Nat) -> None:
    quoted = p.ipv4("203.0.113.5", PEER, p.UDP, p.udp("203.0.113.5", PEER, 1, 2, b"x"))
    message = p.icmp(3, 3, bytes(4), quoted)
    verdict, out = run(nat, tc.INGRESS, p.ipv4("192.0.2.1", SLOT, p.ICMP, message))
    assert verdict == UNSPEC
    assert p.parse(out).payload == message


@pytest.mark.parametrize("inner", [p.TCP, p.UDP, p.ICMPV6])
def test_icmpv6_errors_are_translated_with_the_packet_they_quote(nat: Nat, inner: int) -> None:
    body = {
        p.TCP: p.tcp(SLOT6, PEER6, 1, 2),
        p.UDP: p.udp(SLOT6, PEER6, 1, 2, b"abc"),
        p.ICMPV6: p.icmp6(SLOT6, PEER6, 128, 0, bytes(4), b"ping"),
    }[inner]
    router = "2001:db8::1"
    quoted = p.ipv6(SLOT6, PEER6, inner, body)
    message = p.icmp6(router, SLOT6, 2, 0, struct.pack(">I", 1280), quoted)
    verdict, out = run(nat, tc.INGRESS, p.ipv6(router, SLOT6, p.ICMPV6, message))
    outer = p.parse(out)
    about = p.parse(outer.payload[8:])
    assert (verdict, outer.destination, outer.sound) == (UNSPEC, GUEST6, True)
    assert (about.source, about.sound) == (GUEST6, True)


def test_fragments(nat: Nat) -> None:
    """The first fragment's checksum is of the whole datagram; later ones change in the header only."""
    datagram = p.udp(GUEST, PEER, 1, 2, bytes(range(256)) * 8)
    pieces = []
    for start in range(0, len(datagram), 1024):
        part = datagram[start : start + 1024]
        more = start + 1024 < len(datagram)
        verdict, out = run(nat, tc.EGRESS, p.ipv4(GUEST, PEER, p.UDP, part, fragment=start, more=more))
        piece = p.parse(out)
        assert (verdict, piece.source, piece.sound) == (UNSPEC, SLOT, True)
        pieces.append(piece.payload)
    assert p.transport_sound(SLOT, PEER, p.UDP, b"".join(pieces))


def test_ipv6_fragments(nat: Nat) -> None:
    datagram = p.udp(GUEST6, PEER6, 1, 2, bytes(range(256)) * 8)
    pieces = []
    for start in range(0, len(datagram), 1024):
        part = p.fragment6(p.UDP, datagram[start : start + 1024], offset=start, more=start + 1024 < len(datagram))
        verdict, out = run(nat, tc.EGRESS, p.ipv6(GUEST6, PEER6, p.FRAGMENT, part))
        piece = p.parse(out)
        assert (verdict, piece.source) == (UNSPEC, SLOT6)
        pieces.append(piece.payload)
    assert p.transport_sound(SLOT6, PEER6, p.UDP, b"".join(pieces))


def test_a_first_fragment_too_short_for_its_checksum_is_dropped(nat: Nat) -> None:
    segment = p.tcp(GUEST, PEER, 1, 2)
    assert run(nat, tc.EGRESS, p.ipv4(GUEST, PEER, p.TCP, segment[:8], more=True))[0] == SHOT


def test_options_and_extension_headers_are_walked(nat: Nat) -> None:
    verdict, out = run(nat, tc.EGRESS, p.ipv4(GUEST, PEER, p.TCP, p.tcp(GUEST, PEER, 1, 2), options=b"\1" * 40))
    assert (verdict, p.parse(out).sound) == (UNSPEC, True)
    padding = struct.pack(">BB", p.UDP, 0) + b"\1\4\0\0\0\0"
    packet = p.ipv6(GUEST6, PEER6, p.HOPOPTS, padding + p.udp(GUEST6, PEER6, 1, 2, b"x"))
    verdict, out = run(nat, tc.EGRESS, packet)
    assert verdict == UNSPEC
    assert p.transport_sound(SLOT6, PEER6, p.UDP, out[48:])


def test_routing_headers_and_endless_extension_headers_are_dropped(nat: Nat) -> None:
    routing = struct.pack(">BBBBI", p.UDP, 2, 0, 1, 0) + p.pack(PEER6)
    datagram = p.udp(GUEST6, PEER6, 1, 2, b"x")
    assert run(nat, tc.EGRESS, p.ipv6(GUEST6, PEER6, p.ROUTING, routing + datagram))[0] == SHOT
    options = b"".join(struct.pack(">BB", p.HOPOPTS, 0) + b"\1\4\0\0\0\0" for _ in range(9))
    assert run(nat, tc.EGRESS, p.ipv6(GUEST6, PEER6, p.HOPOPTS, options + datagram))[0] == SHOT


VXLAN = 4789
TUNNELS = [(p.UDP, VXLAN), (47, 0), (p.UDP, 51820)]


def about(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    """An error that quotes a packet which its receiver has sent."""
    quoted = ip(destination, source, protocol, payload)
    if ":" in source:
        message = p.icmp6(source, destination, 2, 0, struct.pack(">I", 1280), quoted)
        return p.ipv6(source, destination, p.ICMPV6, message)
    return p.ipv4(source, destination, p.ICMP, p.icmp(3, 4, struct.pack(">HH", 0, 1400), quoted))


@pytest.mark.parametrize(("guest", "slot", "peer"), [(GUEST, SLOT, PEER), (GUEST6, SLOT6, PEER6)])
def test_the_packets_of_the_slots_tunnels_stay_the_slots(guest: str, slot: str, peer: str) -> None:
    """And the errors about those; all else is the guest's as ever, other ports and protocols included."""
    nat = Nat([VALUES], [Arrival(*each) for each in TUNNELS])
    own = [
        ip(peer, slot, p.UDP, p.udp(peer, slot, 50000, VXLAN, b"frame")),
        ip(peer, slot, 47, b"\0\0\x08\0some gre"),
        about(peer, slot, p.UDP, p.udp(slot, peer, 50000, VXLAN, b"frame")),
        about(peer, slot, p.UDP, p.udp(slot, peer, 51820, 40000, b"wireguard")),
        about(peer, slot, 47, b"\0\0\x08\0some gre"),
    ]
    for packet in own:
        assert run(nat, tc.INGRESS, packet) == (UNSPEC, packet)
    others = [
        ip(peer, slot, p.UDP, p.udp(peer, slot, VXLAN, 50000, b"a guest that asks such a port")),
        ip(peer, slot, p.TCP, p.tcp(peer, slot, 1, VXLAN)),
        about(peer, slot, p.UDP, p.udp(slot, peer, 1, 53, b"question")),
    ]
    for packet in others:
        verdict, out = run(nat, tc.INGRESS, packet)
        assert (verdict, p.parse(out).destination, p.parse(out).sound) == (UNSPEC, guest, True)
    nat.close()
    plain = Nat([VALUES])
    for packet in own:
        assert p.parse(run(plain, tc.INGRESS, packet)[1]).destination == guest, "without tunnels, all is the guest's"
    plain.close()


def test_more_tunnels_than_a_program_can_be_told_of_are_refused() -> None:
    with pytest.raises(SpecError, match="tunnels of 9 kinds and ports are more than 8"):
        Nat([VALUES], [Arrival(p.UDP, port) for port in range(1, 10)])
