"""Packets written and read by hand, for tests that must send what no honest sender would."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

ETH_P_IP = 0x0800
ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD
ICMP, TCP, UDP, ICMPV6, FRAGMENT, HOPOPTS, ROUTING = 1, 6, 17, 58, 44, 0, 43


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071) of ``data``; 0 over data that holds its own right checksum."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pack(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def pseudo(source: str, destination: str, protocol: int, length: int) -> bytes:
    """What a transport checksum covers besides the transport's own bytes."""
    ends = pack(source) + pack(destination)
    if ":" in source:
        return ends + struct.pack(">IxxxB", length, protocol)
    return ends + struct.pack(">xBH", protocol, length)


def udp(source: str, destination: str, sport: int, dport: int, data: bytes, *, zero: bool = False) -> bytes:
    """A UDP datagram; ``zero`` leaves it without a checksum."""
    length = 8 + len(data)
    head = struct.pack(">HHHH", sport, dport, length, 0)
    value = checksum(pseudo(source, destination, UDP, length) + head + data) or 0xFFFF
    return struct.pack(">HHHH", sport, dport, length, 0 if zero else value) + data


def tcp(source: str, destination: str, sport: int, dport: int, *, flags: int = 2, data: bytes = b"") -> bytes:
    """A TCP segment; the flags are SYN unless said otherwise."""
    head = struct.pack(">HHIIBBHHH", sport, dport, 1000, 0, 5 << 4, flags, 8192, 0, 0)
    value = checksum(pseudo(source, destination, TCP, len(head) + len(data)) + head + data)
    return head[:16] + struct.pack(">H", value) + head[18:] + data


def icmp(kind: int, code: int, rest: bytes, data: bytes = b"") -> bytes:
    """An ICMP message; ``rest`` is the second word of its header."""
    body = struct.pack(">BBH", kind, code, 0) + rest + data
    return body[:2] + struct.pack(">H", checksum(body)) + body[4:]


def icmp6(source: str, destination: str, kind: int, code: int, rest: bytes, data: bytes = b"") -> bytes:
    body = struct.pack(">BBH", kind, code, 0) + rest + data
    value = checksum(pseudo(source, destination, ICMPV6, len(body)) + body)
    return body[:2] + struct.pack(">H", value) + body[4:]


def ipv4(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    fragment: int = 0,
    more: bool = False,
    options: bytes = b"",
    ttl: int = 64,
    ident: int = 7,
) -> bytes:
    """An IPv4 packet; ``fragment`` is the offset in bytes, ``options`` are padded to whole words."""
    options += bytes(-len(options) % 4)
    size = 20 + len(options)
    offset = fragment // 8 | (0x2000 if more else 0)
    head = struct.pack(">BBHHHBBH", 0x40 | size // 4, 0, size + len(payload), ident, offset, ttl, protocol, 0)
    head += pack(source) + pack(destination) + options
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def ipv6(source: str, destination: str, protocol: int, payload: bytes, *, hops: int = 64) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(payload), protocol, hops) + pack(source) + pack(destination) + payload


def fragment6(protocol: int, payload: bytes, *, offset: int = 0, more: bool = False, ident: int = 9) -> bytes:
    """A fragment header and what follows it."""
    return struct.pack(">BBHI", protocol, 0, offset & 0xFFF8 | more, ident) + payload


def ethernet(destination: str, source: str, kind: int, payload: bytes) -> bytes:
    return bytes.fromhex(destination.replace(":", "") + source.replace(":", "")) + struct.pack(">H", kind) + payload


@dataclass(frozen=True)
class Packet:
    """What the tests look at of a received IP packet."""

    source: str
    destination: str
    protocol: int
    payload: bytes
    fragment: int
    sound: bool
    """Header and transport checksums are right (a transport checksum is not looked at in fragments)."""


def parse(packet: bytes) -> Packet:
    """Take an IP packet (without its Ethernet header) apart."""
    if packet[0] >> 4 == 6:
        return _parse6(packet)
    size = (packet[0] & 15) * 4
    length, offset, protocol = struct.unpack_from(">2xH2xHxB", packet)
    source, destination = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
    payload = packet[size:length]
    sound = checksum(packet[:size]) == 0
    if not offset & 0x3FFF:
        sound &= transport_sound(source, destination, protocol, payload)
    return Packet(source, destination, protocol, payload, (offset & 0x1FFF) * 8, sound)


def _parse6(packet: bytes) -> Packet:
    length, protocol = struct.unpack_from(">4xHB", packet)
    source = socket.inet_ntop(socket.AF_INET6, packet[8:24])
    destination = socket.inet_ntop(socket.AF_INET6, packet[24:40])
    payload = packet[40 : 40 + length]
    fragment, whole = 0, True
    if protocol == FRAGMENT:
        protocol, offset = struct.unpack_from(">BxH", payload)
        fragment, whole, payload = offset & 0xFFF8, not offset, payload[8:]
    sound = not whole or transport_sound(source, destination, protocol, payload)
    return Packet(source, destination, protocol, payload, fragment, sound)


def transport_sound(source: str, destination: str, protocol: int, payload: bytes) -> bool:
    """Whether a whole transport payload's checksum is right; a UDP checksum of 0 is right in IPv4."""
    if protocol == ICMP:
        return checksum(payload) == 0
    if protocol == UDP and payload[6:8] == b"\0\0":
        return ":" not in source
    if protocol in (TCP, UDP, ICMPV6):
        return checksum(pseudo(source, destination, protocol, len(payload)) + payload) == 0
    return True
