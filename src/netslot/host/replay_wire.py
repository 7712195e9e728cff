"""The bytes of packets that a replay sends, and what it reads in those that come out.

Every packet carries a tag of eight bytes before all else, by which it is known again wherever it is seen, also inside
the ICMP error that answers it. Only a TCP reset carries none: it is known by the ends that it answers.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from netslot.rulesets.model import Family
from netslot.rulesets.proof.flow import ICMP

TCP, UDP = 6, 17
SYN, RST, ACK = 2, 4, 16
ERRORS: Mapping[Family, tuple[int, ...]] = {4: (3, 4, 5, 11, 12), 6: (1, 2, 3, 4)}
ECHO: Mapping[Family, tuple[int, int]] = {4: (8, 0), 6: (128, 129)}
"""Request and reply."""

TAG = 8
_MARK = b"nslt"


class Seen(NamedTuple):
    """A packet as it was read. ``answer``: (type, code) of an ICMP error about the tagged packet or of an echo
    reply, else None."""

    number: int | None
    proto: int
    src: int
    dst: int
    sport: int
    dport: int
    flags: int
    answer: tuple[int, int] | None


def tag(number: int) -> bytes:
    """The tag of the packet with this number."""
    return _MARK + struct.pack(">I", number)


def header_size(family: Family) -> int:
    return 20 if family == 4 else 40


def is_error(family: Family, values: Mapping[str, int]) -> bool:
    """Whether it is an ICMP error."""
    return values["proto"] == ICMP[family] and values["icmp_type"] in ERRORS[family]


def natural_length(family: Family, values: Mapping[str, int]) -> int:
    """Bytes of the shortest packet with these values that still carries a tag."""
    if is_error(family, values):
        return header_size(family) + 8 + header_size(family) + 20 + TAG
    return header_size(family) + (20 if values["proto"] == TCP else 8) + TAG


def written(family: Family, values: Mapping[str, int], mark: bytes, seq: int = 1, ack: int = 1) -> bytes:
    """The packet from its IP header on. ``values`` as the model's flow names them; padded to their ``length``."""
    room = values["length"] - natural_length(family, values)
    content = mark + b"\0" * max(0, room)
    proto = values["proto"]
    if proto == TCP:
        ends = struct.pack(">HHIIBB", values["sport"], values["dport"], seq, ack, 5 << 4, values["flags"])
        body, place = ends + struct.pack(">HHH", 8192, 0, 0) + content, 16
    elif proto == UDP:
        body, place = struct.pack(">HHHH", values["sport"], values["dport"], 8 + len(content), 0) + content, 6
    elif is_error(family, values):
        body = struct.pack(">BBHI", values["icmp_type"], values["icmp_code"], 0, 0) + _quoted(family, values, content)
        place = 2
    else:
        body = struct.pack(">BBHHH", values["icmp_type"], values["icmp_code"], 0, values["sport"], 1) + content
        place = 2
    covered = body if proto == ICMP[4] else _pseudo(family, values, len(body)) + body
    body = body[:place] + struct.pack(">H", checksum(covered) or 0xFFFF) + body[place + 2 :]
    return _header(family, values, len(body)) + body


def _quoted(family: Family, values: Mapping[str, int], content: bytes) -> bytes:
    """The packet that an ICMP error is about: it went the other way, between the ends that ``values`` name."""
    inner = {
        **values,
        "src": values["dst"],
        "dst": values["src"],
        "sport": values["dport"],
        "dport": values["sport"],
        "proto": values.get("quoted", UDP),
        "ttl": 60,
        "icmp_type": ECHO[family][0],
        "icmp_code": 0,
        "length": 0,
    }
    if inner["proto"] == ICMP[family]:
        inner["sport"] = values["sport"]
    return written(family, inner, b"\0" * (12 if inner["proto"] != TCP else 0) + content, 100)


def _pseudo(family: Family, values: Mapping[str, int], length: int) -> bytes:
    ends = _ends(family, values)
    if family == 4:
        return ends + struct.pack(">HH", values["proto"], length)
    return ends + struct.pack(">II", length, values["proto"])


def _ends(family: Family, values: Mapping[str, int]) -> bytes:
    size = 4 if family == 4 else 16
    return values["src"].to_bytes(size, "big") + values["dst"].to_bytes(size, "big")


def _header(family: Family, values: Mapping[str, int], length: int) -> bytes:
    ends = _ends(family, values)
    if family == 6:
        first = 6 << 28 | values["dscp"] << 22
        return struct.pack(">IHBB", first, length, values["proto"], values["ttl"]) + ends
    head = struct.pack(">BBHHHBBH", 0x45, values["dscp"] << 2, 20 + length, 0, 0, values["ttl"], values["proto"], 0)
    head += ends
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~int(total) & 0xFFFF


def read_frame(frame: bytes) -> tuple[Family, Seen] | None:
    """An Ethernet frame; None when it holds no IP packet."""
    kind = frame[12:14]
    if kind == b"\x08\0":
        return 4, read(4, frame[14:])
    return (6, read(6, frame[14:])) if kind == b"\x86\xdd" else None


def read(family: Family, data: bytes) -> Seen:
    """A packet from its IP header on."""
    size = (data[0] & 15) * 4 if family == 4 else 40
    proto = data[9] if family == 4 else data[6]
    ends = (data[12:16], data[16:20]) if family == 4 else (data[8:24], data[24:40])
    src, dst = (int.from_bytes(end, "big") for end in ends)
    return read_body(family, proto, src, dst, data[size:])


def read_body(family: Family, proto: int, src: int, dst: int, body: bytes) -> Seen:
    """What follows the IP header, as a raw socket of IPv6 gives it."""
    sport = dport = flags = 0
    answer = None
    if proto in (TCP, UDP) and len(body) >= 8:
        sport, dport = struct.unpack_from(">HH", body)
        flags = body[13] if proto == TCP and len(body) > 13 else 0
    elif proto == ICMP[family] and len(body) >= 8:
        if body[0] in ERRORS[family]:
            answer = (body[0], body[1])
        else:
            sport = int.from_bytes(body[4:6], "big")
            answer = (body[0], body[1]) if body[0] == ECHO[family][1] else None
    place = body.find(_MARK)
    number = None
    if place >= 0 and len(body) >= place + TAG:
        number = int.from_bytes(body[place + 4 : place + TAG], "big")
    return Seen(number, proto, src, dst, sport, dport, flags, answer)
