"""What a hostile tenant sends: each act is given a mark of 8 bytes that its packets carry."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

import packets as p
from attack_lab import HOST, HOST6, OUTSIDE, OUTSIDE6, Scene
from netslot.kernel import conntrack

Act = Callable[[Scene, bytes], None]
EVIL = "0e:00:00:00:66:66"
METADATA, METADATA6 = "169.254.169.254", "fd00:ec2::254"
SEGMENTS = 4
ROUTING_TYPES = {"0": 0, "2": 2, "3 (RPL)": 3, "4 (segments)": SEGMENTS}
IP_IN_ETHERNET = {False: p.ETH_P_IP, True: p.ETH_P_IPV6}


def number(mark: bytes) -> int:
    """A number of this attack's own, for ports and fragments' identifiers."""
    return struct.unpack_from(">H", mark, 2)[0] + 2000  # type: ignore[no-any-return]


def outside(six: bool) -> str:
    return OUTSIDE6 if six else OUTSIDE


def resolve(scene: Scene, to: str) -> str:
    """An address, or one of the slot's variables; of the neighbour's with ``its.`` before."""
    if to.startswith("its."):
        return scene.victim.values[to.removeprefix("its.")]
    return scene.values.get(to, to)


def ip(source: str, to: str, protocol: int, payload: bytes) -> bytes:
    return p.ipv6(source, to, protocol, payload) if ":" in to else p.ipv4(source, to, protocol, payload)


def datagram(scene: Scene, to: str, mark: bytes, *, port: int = 9, source: str = "", data: bytes = b"") -> bytes:
    source = source or scene.own(":" in to)
    return ip(source, to, p.UDP, p.udp(source, to, number(mark), port, mark + data))


def segment(source: str, to: str, mark: bytes, port: int) -> bytes:
    """The SYN of a connection, with data; the mark is whole in any fragment that holds nothing else."""
    return ip(source, to, p.TCP, p.tcp(source, to, number(mark), port, data=bytes(4) + mark * 4))


def cut(packet: bytes, size: int, ident: int) -> list[bytes]:
    """An IPv4 or IPv6 packet in fragments of ``size`` bytes of payload."""
    six = packet[0] >> 4 == 6
    head, payload = (packet[:40], packet[40:]) if six else (packet[:20], packet[20:])
    protocol = head[6] if six else head[9]
    parts = [(start, payload[start : start + size]) for start in range(0, len(payload), size)]
    return [piece(packet, protocol, part, at, at + size < len(payload), ident) for at, part in parts]


def piece(packet: bytes, protocol: int, part: bytes, at: int, more: bool, ident: int) -> bytes:
    """One fragment with the addresses of ``packet``."""
    ends = p.parse(packet)
    if packet[0] >> 4 == 6:
        body = p.fragment6(protocol, part, offset=at, more=more, ident=ident)
        return p.ipv6(ends.source, ends.destination, p.FRAGMENT, body)
    return p.ipv4(ends.source, ends.destination, protocol, part, fragment=at, more=more, ident=ident)


# --- to somebody -------------------------------------------------------------------------------------


def udp(to: str, port: int = 9, *, source: str = "", source_mac: str | None = None, to_mac: str | None = None) -> Act:
    def act(scene: Scene, mark: bytes) -> None:
        packet = datagram(scene, resolve(scene, to), mark, port=port, source=resolve(scene, source))
        scene.send(packet, source_mac=source_mac, to_mac=to_mac)

    return act


def tcp(to: str, port: int, size: int = 0) -> Act:
    """In fragments of ``size`` bytes unless that is 0."""

    def act(scene: Scene, mark: bytes) -> None:
        to_whom = resolve(scene, to)
        packet = segment(scene.own(":" in to_whom), to_whom, mark, port)
        scene.send(*(cut(packet, size, number(mark)) if size else [packet]))

    return act


def overlapping(six: bool) -> Act:
    """A harmless port in the first fragment, and a second one that would write another over it."""

    def act(scene: Scene, mark: bytes) -> None:
        good, bad = (segment(scene.own(six), outside(six), mark, port) for port in (9, 25))
        head = 40 if six else 20
        pieces = [(good[head : head + 24], 0, True), (bad[head + 16 :], 16, True), (bad[head:][:24], 0, True)]
        pieces += [(good[head + 48 :], 48, False)]
        scene.send(*(piece(good, p.TCP, part, at, more, number(mark)) for part, at, more in pieces))

    return act


def hidden_port(scene: Scene, mark: bytes) -> None:
    """The first fragment holds an options header only; the port is in the second."""
    whole = segment(scene.own(True), OUTSIDE6, mark, 25)
    options = struct.pack(">BB", p.TCP, 0) + b"\1\4" + bytes(4)
    scene.send(piece(whole, 60, options, 0, True, number(mark)))
    scene.send(piece(whole, 60, whole[40:], 8, False, number(mark)))


def tiny(six: bool) -> Act:
    """A first fragment with the ports and no more of TCP."""
    return tcp(outside(six), 9, 8)


def unfinished(six: bool) -> Act:
    """Fragments of datagrams that never come to an end."""

    def act(scene: Scene, mark: bytes) -> None:
        whole = datagram(scene, outside(six), mark, data=bytes(1000))
        scene.send(*(cut(whole, 512, number(mark) + at)[0] for at in range(20)))

    return act


# --- headers -----------------------------------------------------------------------------------------


def options4(to: str, port: int, options: bytes) -> Act:
    def act(scene: Scene, mark: bytes) -> None:
        body = p.tcp(scene.own(False), to, number(mark), port, data=mark)
        scene.send(p.ipv4(scene.own(False), to, p.TCP, body, options=options))

    return act


def chain6(port: int, headers: Sequence[tuple[int, bytes]]) -> Act:
    """TCP behind IPv6 extension headers: (type, content without its first two bytes)."""

    def act(scene: Scene, mark: bytes) -> None:
        body = p.tcp(scene.own(True), OUTSIDE6, number(mark), port, data=mark)
        following = p.TCP
        for kind, content in reversed(headers):
            size = len(content) + 2
            assert size % 8 == 0
            units = size // 4 - 2 if kind == AUTHENTICATION else size // 8 - 1
            body = struct.pack(">BB", following, units) + content + body
            following = kind
        scene.send(p.ipv6(scene.own(True), OUTSIDE6, following, body))

    return act


AUTHENTICATION, EXPERIMENT = 51, 253
PADDING = b"\1\4" + bytes(4)
MANY_OPTIONS = b"\x1e\0" * 255
"""255 options that a host is to skip."""


def source_route(kind: int, first: str, then: str) -> Act:
    """Loose (131) or strict (137) source routing by way of ``first``."""

    def act(scene: Scene, mark: bytes) -> None:
        hop, to = scene.gateway(False) if first == "gateway" else resolve(scene, first), resolve(scene, then)
        option = struct.pack(">BBB", kind, 7, 4) + p.pack(to)
        body = p.udp(scene.own(False), to, number(mark), 80, mark, zero=True)
        scene.send(p.ipv4(scene.own(False), hop, p.UDP, body, options=option))

    return act


def routing_header(kind: int, first: str, then: str) -> Act:
    """An IPv6 routing header: to ``first``, which is to pass it on to ``then``.

    What follows has no checksum, which connection tracking would find wrong at one hop or the other.
    """

    def act(scene: Scene, mark: bytes) -> None:
        hop, to = scene.gateway(True) if first == "gateway" else resolve(scene, first), resolve(scene, then)
        segments = p.pack(to) + (p.pack(hop) if kind == SEGMENTS else b"")
        last = len(segments) // 16 - 1
        header = struct.pack(">BBBBI", EXPERIMENT, len(segments) // 8, kind, 1, last << 24) + segments
        scene.send(p.ipv6(scene.own(True), hop, p.ROUTING, header + mark))

    return act


# --- control -----------------------------------------------------------------------------------------


def redirect(to: str) -> Act:
    """An ICMP redirect: the way to the outside is through me."""

    def act(scene: Scene, mark: bytes) -> None:
        victim = resolve(scene, to)
        own, six = scene.own(":" in victim), ":" in victim
        quoted = ip(victim, outside(six), p.UDP, p.udp(victim, outside(six), 1, 2, mark))
        if not six:
            scene.send(p.ipv4(own, victim, p.ICMP, p.icmp(5, 1, p.pack(own), quoted)))
            return
        option = struct.pack(">BBHI", 4, (8 + len(quoted)) // 8, 0, 0) + quoted
        message = p.icmp6(own, victim, 137, 0, bytes(4), p.pack(own) + p.pack(OUTSIDE6) + option)
        scene.send(p.ipv6(own, victim, p.ICMPV6, message, hops=255))

    return act


def error_about(six: bool, *, neighbours: bool) -> Act:
    """An ICMP error that says of a connection of the host's, or of a neighbour's behind the host's address, that its
    packets are too big."""

    def act(scene: Scene, mark: bytes) -> None:
        host, to, port = HOST6 if six else HOST, outside(six), number(mark)
        if neighbours:
            scene.honest.packet(ip(scene.its_own(six), to, p.UDP, p.udp(scene.its_own(six), to, port, 443, b"")))
        else:
            with scene.root.socket(socket.SOCK_DGRAM, socket.AF_INET6 if six else socket.AF_INET) as sock:
                sock.bind((host, port))
                sock.sendto(b"", (to, 443))
        quoted = ip(host, to, p.UDP, p.udp(host, to, port, 443, mark))
        own = scene.own(six)
        if six:
            scene.send(p.ipv6(own, host, p.ICMPV6, p.icmp6(own, host, 2, 0, struct.pack(">I", 1280), quoted)))
        else:
            scene.send(p.ipv4(own, host, p.ICMP, p.icmp(3, 4, struct.pack(">HH", 0, 600), quoted)))

    return act


def arp(scene: Scene, kind: int, sender: str, target: str, *, mac: str = EVIL, to_mac: str = "") -> None:
    """An ARP frame: ``sender`` is at ``mac``; a request (1) or a reply (2) about ``target``."""
    own_mac, next_mac = scene.macs()
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, kind) + bytes.fromhex(mac.replace(":", ""))
    body += p.pack(sender) + bytes(6) + p.pack(target)
    scene.sender.frame(p.ethernet(to_mac or next_mac, own_mac, p.ETH_P_ARP, body))


def advertise(scene: Scene, address: str) -> None:
    """An unsolicited neighbour advertisement that overrides: ``address`` is at another MAC."""
    gateway, own = scene.gateway(True), scene.own(True)
    option = b"\2\1" + bytes.fromhex(EVIL.replace(":", ""))
    message = p.icmp6(own, gateway, 136, 0, struct.pack(">I", 0x20000000), p.pack(address) + option)
    ethernet6(scene, p.ipv6(own, gateway, p.ICMPV6, message, hops=255))


def ask(scene: Scene, source: str, asked: str) -> None:
    """An honest ARP request."""
    arp(scene, 1, source, asked, mac=scene.macs()[0])


def solicit(scene: Scene, source: str, asked: str, *, mac: str = EVIL) -> None:
    """A neighbour solicitation to the next hop: whoever gets it makes an entry for ``source``."""
    gateway = scene.gateway(True)
    option = b"\1\1" + bytes.fromhex(mac.replace(":", ""))
    message = p.icmp6(source, gateway, 135, 0, bytes(4), p.pack(asked) + option)
    ethernet6(scene, p.ipv6(source, gateway, p.ICMPV6, message, hops=255))


def answer(address: str) -> Callable[[bytes], bool]:
    """Knows the frame that says where ``address`` is."""

    def check(frame: bytes) -> bool:
        kind, body = struct.unpack_from(">H", frame, 12)[0], frame[14:]
        if kind == p.ETH_P_ARP:
            return body[6:8] == b"\0\2" and body[14:18] == p.pack(address)[:4] and ":" not in address
        return kind == p.ETH_P_IPV6 and body[6] == p.ICMPV6 and body[40] == 136 and body[48:64] == p.pack(address)

    return check


def ethernet6(scene: Scene, packet: bytes, to_mac: str = "") -> None:
    own_mac, next_mac = scene.macs()
    scene.sender.frame(p.ethernet(to_mac or next_mac, own_mac, p.ETH_P_IPV6, packet))


def advertise_router(scene: Scene, mark: bytes) -> None:
    """The tenant says that it is a router, so that everything is sent to it."""
    message = p.icmp6("fe80::66", "ff02::1", 134, 0, struct.pack(">BBH", 64, 0, 1800), bytes(8))
    ethernet6(scene, p.ipv6("fe80::66", "ff02::1", p.ICMPV6, message, hops=255), "33:33:00:00:00:01")


# --- frames ------------------------------------------------------------------------------------------


def framed(six: bool, wrap: Callable[[bytes, int], bytes]) -> Act:
    """A datagram to the outside in a frame for root that ``wrap`` makes of the packet and its Ethernet type."""

    def act(scene: Scene, mark: bytes) -> None:
        ends = bytes.fromhex((scene.values["root_mac"] + scene.macs()[0]).replace(":", ""))
        scene.sender.frame(ends + wrap(datagram(scene, outside(six), mark), IP_IN_ETHERNET[six]))

    return act


def tagged(*tags: tuple[int, int]) -> Callable[[bytes, int], bytes]:
    """VLAN tags: (Ethernet type, id)."""

    def wrap(packet: bytes, kind: int) -> bytes:
        return b"".join(struct.pack(">HH", each, vlan) for each, vlan in tags) + struct.pack(">H", kind) + packet

    return wrap


def priority(six: bool, port: int, tags: int) -> Act:
    """A connection in a frame whose VLAN tags say 0, which is no VLAN, but a priority."""

    def act(scene: Scene, mark: bytes) -> None:
        own_mac, next_mac = scene.macs()
        ends = bytes.fromhex((next_mac + own_mac).replace(":", ""))
        packet = segment(scene.own(six), outside(six), mark, port)
        scene.sender.frame(ends + tagged(*[(0x8100, 0)] * tags)(packet, IP_IN_ETHERNET[six]))

    return act


def snap(packet: bytes, kind: int) -> bytes:
    """IEEE 802.3 with LLC and SNAP."""
    body = b"\xaa\xaa\x03\0\0\0" + struct.pack(">H", kind) + packet
    return struct.pack(">H", len(body)) + body


def dhcp_offer(six: bool) -> Act:
    """To whoever asks for an address on the same link."""

    def act(scene: Scene, mark: bytes) -> None:
        own = scene.own(six)
        to, mac = ("ff02::1:2", "33:33:00:01:00:02") if six else ("255.255.255.255", "ff:ff:ff:ff:ff:ff")
        offer = p.udp(own, to, 547 if six else 67, 546 if six else 68, b"\2\1\6\0" + bytes(232) + mark)
        scene.send(ip(own, to, p.UDP, offer), to_mac=mac)

    return act


# --- much --------------------------------------------------------------------------------------------

FLOOD = {False: b"\x5a\xa5flood4", True: b"\x5a\xa5flood6"}


def limit(scene: Scene) -> int:
    """How many connections the rules allow at once."""
    return 2048 if scene.plan.guest_if else 1024


def connections(six: bool) -> Act:
    """More connections than that, none of which was there before."""

    def act(scene: Scene, mark: bytes) -> None:
        scene.slot.run(conntrack.flush)
        own, to = scene.own(six), outside(six)
        for port in range(10_000, 10_000 + limit(scene) + 100):
            if port % 64 == 0:
                for watch in scene.seen.values():
                    watch.keep()
            scene.send(ip(own, to, p.UDP, p.udp(own, to, port, 9, FLOOD[six])))

    return act


def opened(scene: Scene, six: bool) -> int:
    """How many of them came out; then they are forgotten, for the sake of the next attack."""
    count = sum(FLOOD[six] in frame for frame in scene.seen["link"].keep())
    scene.slot.run(conntrack.flush)
    return count


def bound(six: bool, *, own: bool = False) -> Act:
    """A datagram from an address that the socket is bound to though nobody here has it, which takes no capability."""
    family, level, freebind = (socket.AF_INET6, 41, 78) if six else (socket.AF_INET, 0, 15)

    def act(scene: Scene, mark: bytes) -> None:
        source = scene.own(six) if own else ("2001:db8:66::1" if six else "192.0.2.66")
        with scene.slot.run(socket.socket, family, socket.SOCK_DGRAM) as sock, suppress(OSError):
            sock.setsockopt(level, freebind, 1)
            sock.bind((source, number(mark)))
            sock.sendto(mark, (outside(six), 9))

    return act
