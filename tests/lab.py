"""Small honest classes to play with: namespaces that are removed again, and raw sockets inside them."""

from __future__ import annotations

import itertools
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, Self, TypeVar

from netslot.kernel import netns

P = ParamSpec("P")
T = TypeVar("T")
_numbers = itertools.count(1)


class Place:
    """A network namespace that is there already, as ``/run/netns`` knows it, and a way to work inside."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = netns.open_named(name)
        self.worker = netns.Worker(self.fd)

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function inside."""
        return self.worker.run(function, *args, **kwargs)

    def sh(self, command: str, *, check: bool = True) -> str:
        """Run a shell command inside; its output."""
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", "sh", "-c", command], capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stderr}{done.stdout}")
        return done.stdout

    def ip(self, *commands: str) -> None:
        """Run ``ip`` commands inside, as one batch."""
        batch = "\n".join(commands)
        subprocess.run(
            ["ip", "-n", self.name, "-batch", "-"], input=batch, text=True, check=True, capture_output=True
        )

    def sysctl(self, **values: object) -> None:
        """Set net.* sysctls inside; dots are written as ``__``."""
        for name, value in values.items():
            self.sh(f"sysctl -q -w net.{name.replace('__', '.')}={value}")

    def wait_for_carrier(self, link: str) -> None:
        """IPv6 holds its routes back until the kernel has noticed the carrier, which may take a second."""
        for _ in range(300):
            if "state UP" in self.sh(f"ip link show {link}"):
                return
            time.sleep(0.01)
        raise AssertionError(f"{link} in {self.name} has no carrier")

    def socket(self, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
        return self.run(socket.socket, family, kind)

    def close(self) -> None:
        self.worker.close()
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Net(Place):
    """A network namespace with a name of its own; ``lo`` is up. :meth:`close` removes it."""

    def __init__(self, role: str) -> None:
        name = f"lab-{role}-{os.getpid()}-{next(_numbers)}"
        netns.create(name)
        super().__init__(name)
        self.ip("link set lo up")

    def close(self) -> None:
        super().close()
        netns.unpin(self.name)


class Wire:
    """A raw socket on one link: sends whole frames, sees all that arrive there."""

    def __init__(self, net: Place, link: str) -> None:
        self._socket = net.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind((link, 0))
        self._socket.setblocking(False)

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def drain(self) -> None:
        """Forget what has arrived so far."""
        while self.received(lambda _: True, 0.001) is not None:
            continue

    def received(self, wanted: Callable[[bytes], bool], timeout: float = 1.0) -> bytes | None:
        """The first incoming frame that ``wanted`` says yes to, within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._socket], [], [], left)[0]:
                return None
            frame, address = self._socket.recvfrom(65536)
            outgoing = 4
            if address[2] != outgoing and wanted(frame):
                return frame
        return None

    def close(self) -> None:
        self._socket.close()


@contextmanager
def nets(*roles: str) -> Iterator[list[Net]]:
    """Several namespaces, removed in any case."""
    made: list[Net] = []
    try:
        for role in roles:
            made.append(Net(role))
        yield made
    finally:
        for net in made:
            net.close()


SLOT4, ROOT4, GUEST4, GATEWAY4, OUTSIDE4 = "10.201.0.1", "10.201.0.0", "172.16.0.2", "172.16.0.1", "198.51.100.7"
SLOT6, ROOT6, GUEST6, GATEWAY6, OUTSIDE6 = "fd5c:1::1", "fd5c:1::", "fd00:16::2", "fd00:16::1", "2001:db8::7"
VALUES = {
    "slot": "1",
    "uplink_if": "up0",
    "guest_if": "in0",
    "address": SLOT4,
    "address6": SLOT6,
    "root_address": ROOT4,
    "root_address6": ROOT6,
    "guest_address": GUEST4,
    "guest_address6": GUEST6,
    "gateway": GATEWAY4,
    "gateway6": GATEWAY6,
}


MACS = {name: f"02:00:00:00:00:0{number}" for number, name in enumerate(("slot1", "up0", "in0", "eth0"), 1)}


def _link(name: str, own: list[str], neighbours: dict[str, str]) -> list[str]:
    """Addresses, and permanent neighbours at the MACs of the named links."""
    return [
        f"link set {name} addrgenmode none",
        f"link set {name} up",
        *(f"addr add {address} dev {name}{' nodad' if ':' in address else ''}" for address in own),
        *(f"neigh add {address} lladdr {MACS[peer]} dev {name}" for address, peer in neighbours.items()),
    ]


@contextmanager
def slot() -> Iterator[tuple[Net, Net, Net]]:
    """Root, slot and guest namespaces wired as a slot is; root also owns the outside's addresses.

    root [slot1] -- [up0] slot [in0] -- [eth0] guest, with permanent neighbours and no link-local addresses.
    """
    with nets("root", "slot", "guest") as (root, middle, guest):
        root.ip(
            f"link add slot1 address {MACS['slot1']} type veth"
            f" peer name up0 address {MACS['up0']} netns {middle.name}",
            f"addr add {OUTSIDE4}/32 dev lo",
            f"addr add {OUTSIDE6}/128 dev lo nodad",
            *_link("slot1", [f"{ROOT4}/31", f"{ROOT6}/127"], {SLOT4: "up0", SLOT6: "up0"}),
        )
        middle.ip(
            f"link add in0 address {MACS['in0']} type veth peer name eth0 address {MACS['eth0']} netns {guest.name}",
            *_link("up0", [f"{SLOT4}/31", f"{SLOT6}/127"], {ROOT4: "slot1", ROOT6: "slot1"}),
            *_link("in0", [f"{GATEWAY4}/30", f"{GATEWAY6}/64"], {GUEST4: "eth0", GUEST6: "eth0"}),
            f"route add default via {ROOT4}",
            f"route add default via {ROOT6}",
        )
        middle.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        guest.ip(
            *_link("eth0", [f"{GUEST4}/30", f"{GUEST6}/64"], {GATEWAY4: "in0", GATEWAY6: "in0"}),
            f"route add default via {GATEWAY4}",
            f"route add default via {GATEWAY6}",
        )
        for net, link in ((root, "slot1"), (middle, "up0"), (middle, "in0"), (guest, "eth0")):
            net.wait_for_carrier(link)
        yield root, middle, guest


class Echo:
    """TCP and UDP on one port in a namespace: TCP answers with the peer's address, UDP sends back what came."""

    def __init__(self, net: Net, address: str, port: int = 7000) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.tcp = net.socket(family=family)
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.tcp.bind((address, port))
        self.tcp.listen(1024)
        self.udp = net.socket(socket.SOCK_DGRAM, family)
        self.udp.bind((address, port))
        self.udp.settimeout(1)

    def close(self) -> None:
        self.tcp.close()
        self.udp.close()


def connects(net: Place, address: str, port: int = 7000, timeout: float = 0.5) -> bool:
    """Whether a TCP connection from inside ``net`` is taken up."""
    with net.socket(family=socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.settimeout(timeout)
        return sock.connect_ex((address, port)) == 0
