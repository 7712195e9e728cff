"""WireGuard links by generic netlink: keys and peers. Layouts: linux/wireguard.h, linux/genetlink.h.

Nobody but the kernel runs: its handshakes and packets leave from the namespace that the link was made in.
"""

from __future__ import annotations

import base64
import binascii
import errno
import functools
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, TypeAlias

from netslot.errors import HostError, KernelError
from netslot.kernel import netlink
from netslot.kernel.netlink import Request, attr, attr_str, attr_u32, nested, parse_attrs

Network: TypeAlias = IPv4Network | IPv6Network

KEY_BYTES: Final = 32
_GENERIC = 16  # NETLINK_GENERIC
_CONTROL, _GETFAMILY = 0x10, 3
_FAMILY_ID, _FAMILY_NAME = 1, 2
_HEADER = struct.Struct("=BBH")
_GET, _SET = 0, 1
_IFINDEX, _PRIVATE_KEY, _FLAGS, _LISTEN_PORT, _PEERS = 1, 3, 5, 6, 8
_PEER_KEY, _PEER_SHARED, _PEER_FLAGS, _PEER_ENDPOINT, _PEER_KEEPALIVE, _PEER_ALLOWED = 1, 2, 3, 4, 5, 9
_ALLOWED_FAMILY, _ALLOWED_ADDRESS, _ALLOWED_MASK = 1, 2, 3
_REPLACE_PEERS, _REPLACE_ALLOWED = 1, 2


@dataclass(frozen=True, slots=True)
class Peer:
    """Who may be at the other end. ``endpoint`` is where it was first sought: it may move by itself."""

    key: bytes
    shared: bytes = bytes(KEY_BYTES)
    endpoint: tuple[str, int] | None = None
    keepalive: int = 0
    allowed: frozenset[Network] = frozenset()

    def fixed(self) -> Peer:
        """Without what changes by itself."""
        return Peer(self.key, self.shared, None, self.keepalive, self.allowed)


@dataclass(frozen=True, slots=True)
class Config:
    """A link's own key, the UDP port that it listens on (0: any), its peers."""

    key: bytes
    port: int
    peers: tuple[Peer, ...]


def key(text: str) -> bytes:
    """A key as ``wg genkey`` writes it; the final ``=`` may be left out. ValueError for what is none."""
    try:
        found = base64.b64decode(text.rstrip("=") + "=", validate=True)
    except binascii.Error as error:
        raise ValueError("not a WireGuard key: 44 characters of base64") from error
    if len(found) != KEY_BYTES:
        raise ValueError("not a WireGuard key: 44 characters of base64")
    return found


def configure(index: int, config: Config) -> None:
    """Give a link its key and its peers, and only these."""
    peers = [nested(number, *_peer(peer)) for number, peer in enumerate(config.peers)]
    attributes = [
        attr_u32(_IFINDEX, index),
        attr(_PRIVATE_KEY, config.key),
        attr_u32(_FLAGS, _REPLACE_PEERS),
        attr(_LISTEN_PORT, struct.pack("=H", config.port)),
        nested(_PEERS, *peers),
    ]
    with netlink.Socket(_GENERIC) as sock:
        payload = _HEADER.pack(_SET, 1, 0) + b"".join(attributes)
        sock.execute([Request(_family(), 0, payload, f"configure WireGuard link {index}")])


def _peer(peer: Peer) -> list[bytes]:
    allowed = sorted(peer.allowed, key=str)
    attributes = [
        attr(_PEER_KEY, peer.key),
        attr(_PEER_SHARED, peer.shared),
        attr_u32(_PEER_FLAGS, _REPLACE_ALLOWED),
        attr(_PEER_KEEPALIVE, struct.pack("=H", peer.keepalive)),
        nested(_PEER_ALLOWED, *(nested(number, *_allowed(network)) for number, network in enumerate(allowed))),
    ]
    if peer.endpoint is not None:
        attributes.append(attr(_PEER_ENDPOINT, _sockaddr(*peer.endpoint)))
    return attributes


def _allowed(network: Network) -> list[bytes]:
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    return [
        attr(_ALLOWED_FAMILY, struct.pack("=H", family)),
        attr(_ALLOWED_ADDRESS, network.network_address.packed),
        attr(_ALLOWED_MASK, bytes([network.prefixlen])),
    ]


def _sockaddr(address: str, port: int) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    if ":" in address:
        head = struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", port, 0)
        return head + socket.inet_pton(socket.AF_INET6, address) + bytes(4)
    return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(address) + bytes(8)


def read(index: int) -> Config:
    """What a link holds; peers' endpoints are left out."""
    with netlink.Socket(_GENERIC) as sock:
        answers = sock.dump(
            _family(), _HEADER.pack(_GET, 1, 0) + attr_u32(_IFINDEX, index), f"read WireGuard link {index}"
        )
    own, port, peers = b"", 0, list[Peer]()
    for answer in answers:  # a link with many peers takes several
        attrs = parse_attrs(answer.payload, _HEADER.size)
        own = attrs.get(_PRIVATE_KEY, own)
        port = struct.unpack("=H", attrs[_LISTEN_PORT])[0] if _LISTEN_PORT in attrs else port
        for _, content in netlink.iter_attrs(attrs.get(_PEERS, b"")):
            _add(peers, parse_attrs(content))
    return Config(own, port, tuple(peers))


def _add(peers: list[Peer], attrs: dict[int, bytes]) -> None:
    allowed = frozenset(_network(parse_attrs(each)) for _, each in netlink.iter_attrs(attrs.get(_PEER_ALLOWED, b"")))
    if peers and peers[-1].key == attrs[_PEER_KEY]:  # continued from the message before
        last = peers[-1]
        peers[-1] = Peer(last.key, last.shared, None, last.keepalive, last.allowed | allowed)
        return
    keepalive = struct.unpack("=H", attrs.get(_PEER_KEEPALIVE, b"\0\0"))[0]
    peers.append(Peer(attrs[_PEER_KEY], attrs.get(_PEER_SHARED, bytes(KEY_BYTES)), None, keepalive, allowed))


def _network(attrs: dict[int, bytes]) -> Network:
    return ip_network((attrs[_ALLOWED_ADDRESS], attrs[_ALLOWED_MASK][0]))


@functools.cache
def _family() -> int:
    """The number of WireGuard's generic netlink family; HostError when the kernel has none."""
    payload = _HEADER.pack(_GETFAMILY, 1, 0) + attr_str(_FAMILY_NAME, "wireguard")
    try:
        with netlink.Socket(_GENERIC) as sock:
            (answer,) = sock.execute([Request(_CONTROL, 0, payload, "look up WireGuard")])
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        raise HostError("the kernel has no WireGuard", hint="modprobe wireguard, or a kernel that has it") from error
    return int(struct.unpack("=H", parse_attrs(answer.payload, _HEADER.size)[_FAMILY_ID])[0])


def differences(wanted: Config, found: Config) -> Sequence[str]:
    """In words, and no keys but public ones in them."""
    what = ["the private key is another one"] if wanted.key != found.key else []
    if wanted.port and wanted.port != found.port:
        what.append(f"it listens on port {found.port}, not {wanted.port}")
    peers, there = ({peer.key: peer.fixed() for peer in config.peers} for config in (wanted, found))
    for number in sorted(peers.keys() | there.keys()):
        if peers.get(number) != there.get(number):
            verb = "missing" if number not in there else "not the slot's" if number not in peers else "changed"
            what.append(f"peer {base64.b64encode(number).decode()} {verb}")
    return what
