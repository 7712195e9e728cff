"""A host to play with: root and outside namespaces, a spec in a directory of its own, and workloads in its slots."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab
import packets as p
from netslot.host.building import Summary
from netslot.host.host import Host
from netslot.kernel import netns, tun

EXAMPLES = Path(__file__).parent.parent / "examples"
ROOT, SERVER = "198.51.100.254", "198.51.100.7"
METADATA, PRIVATE = "169.254.169.254", "10.9.9.9"
PORT = 9000
_VNET_HEADER = bytes(10)
_PATIENCE = 0.4


@dataclass
class Scene:
    """A root namespace with an uplink to the outside, and the host that lives there. ``spec`` may be rewritten."""

    root: lab.Net
    outside: lab.Net
    spec: Path
    host: Host

    def up(self, slots: int = 2) -> Summary:
        return self.host.up(self.spec, slots=slots)

    def rewrite(self, file: str, old: str, new: str) -> None:
        """Change a file of the spec; ``old`` must be there."""
        path = self.spec.parent / file
        text = path.read_text()
        assert old in text, f"{old!r} is not in {file}"
        path.write_text(text.replace(old, new, 1))

    def rules(self) -> str:
        """Root's rules in every backend, without counters and dates."""
        text = self.root.sh("nft -s list ruleset; iptables-legacy-save; ip6tables-legacy-save")
        lines = (line.partition(" [")[0] if line.startswith(":") else line for line in text.splitlines())
        return "\n".join(line for line in lines if line and not line.startswith("#"))

    def reaches(self, slot: int, address: str = SERVER, port: int = PORT) -> bool:
        """Whether a datagram of the slot's workload gets to the outside, and the answer back to it; tried twice."""
        with workload(self.host.attachment(slot)) as guest, self.outside.socket(socket.SOCK_DGRAM) as server:
            server.bind((address, port))
            server.settimeout(_PATIENCE)
            return any(self._answered(guest, server, address, port) for _ in range(2))

    def _answered(self, guest: SocketGuest | TapGuest, server: socket.socket, address: str, port: int) -> bool:
        if not guest.send(address, port):
            return False
        try:
            _, peer = server.recvfrom(100)
        except TimeoutError:
            return False
        server.sendto(b"answer", peer)
        return guest.receive() == b"answer"


class SocketGuest:
    """A workload with sockets of its own: a container, or a process in the slot."""

    def __init__(self, fields: dict[str, Any]) -> None:
        fd = netns.open_named(fields.get("workload_netns") or fields["netns"])
        try:
            self._socket = netns.run_in(fd, socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        finally:
            os.close(fd)
        self._socket.settimeout(_PATIENCE)

    def send(self, address: str, port: int) -> bool:
        try:
            self._socket.sendto(b"question", (address, port))
        except OSError:  # rules in OUTPUT answer the caller itself
            return False
        return True

    def receive(self) -> bytes | None:
        try:
            return self._socket.recv(100)
        except OSError:
            return None

    def close(self) -> None:
        self._socket.close()


def _wait_until_running(link: str) -> None:
    """The kernel sends nothing to a tap before it has noticed that somebody holds it, which may take a second."""
    get_flags, running = 0x8913, 0x40
    deadline = time.monotonic() + 3
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        while time.monotonic() < deadline:
            answer = fcntl.ioctl(sock, get_flags, struct.pack("16s24x", link.encode()))
            if struct.unpack_from("16xH", answer)[0] & running:
                return
            time.sleep(0.005)
    raise AssertionError(f"{link} does not run")


class TapGuest:
    """A microVM: what it sends and gets are frames on the tap's descriptor."""

    def __init__(self, fields: dict[str, Any]) -> None:
        fd = netns.open_named(fields["netns"])
        try:
            self._fd = netns.run_in(fd, tun.open_tap, fields["tap"], vnet_hdr=True)
            netns.run_in(fd, _wait_until_running, fields["tap"])
        finally:
            os.close(fd)
        self._fields = fields

    def send(self, address: str, port: int) -> bool:
        own, fields = self._fields["guest_address"], self._fields
        packet = p.ipv4(own, address, p.UDP, p.udp(own, address, 4000, port, b"question"))
        frame = p.ethernet(fields["gateway_mac"], fields["guest_mac"], p.ETH_P_IP, packet)
        os.write(self._fd, _VNET_HEADER + frame)
        return True

    def receive(self) -> bytes | None:
        while select.select([self._fd], [], [], _PATIENCE)[0]:
            frame = os.read(self._fd, 4096)[len(_VNET_HEADER) :]
            if frame[12:14] == b"\x08\x00" and (packet := p.parse(frame[14:])).protocol == p.UDP:
                assert packet.destination == self._fields["guest_address"]
                return packet.payload[8:]
        return None

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def workload(fields: dict[str, Any]) -> Iterator[SocketGuest | TapGuest]:
    """The workload of a slot, by what its attachment says."""
    guest = TapGuest(fields) if fields["tap"] else SocketGuest(fields)
    try:
        yield guest
    finally:
        guest.close()


@contextmanager
def stage() -> Iterator[tuple[lab.Net, lab.Net]]:
    """Root and outside, wired; the outside also has addresses that no slot may reach."""
    with lab.nets("root", "outside") as (root, outside):
        root.ip(
            f"link add eth0 type veth peer name eth0 netns {outside.name}",
            f"addr add {ROOT}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {SERVER}",
        )
        outside.ip(
            f"addr add {SERVER}/24 dev eth0",
            *(f"addr add {address}/32 dev lo" for address in (METADATA, PRIVATE)),
            "link set eth0 up",
        )
        for net in (root, outside):
            net.wait_for_carrier("eth0")
        yield root, outside


@contextmanager
def scene(example: str, directory: Path) -> Iterator[Scene]:
    """A host of an example spec (``sandbox/netslot.toml``), copied so that tests may change it; not built yet."""
    source = EXAMPLES / example
    copy = directory / source.parent.name
    shutil.copytree(source.parent, copy)
    spec = copy / source.name
    spec.write_text(re.sub('hold_down = ".*"', 'hold_down = "0s"', spec.read_text()))
    with stage() as (root, outside), Host(directory / "state", root_netns=root.name) as host:
        try:
            yield Scene(root, outside, spec, host)
        finally:
            if host.exists:
                host.down(force=True)
