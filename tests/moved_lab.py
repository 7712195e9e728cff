"""A host before and after its move into slots, played side by side: the same tenants, the same questions.

    before   outside [eth0] -- [eth0] root [tapN] -- [eth0] tenant          all rules in root
    after    outside [eth0] -- [eth0] root [tapN] -- slot -- [eth0] tenant  what ``netslot split`` wrote, by ``up``

A tenant behind a tap is a namespace whose eth0 is a tap too; frames are carried from one to the other, as a virtual
machine monitor does. It is configured in the same way on both hosts, and has to find its gateway by itself.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from lab import Net, nets
from netslot.kernel import netns, tun
from synthetic_host import SyntheticTenant

P = ParamSpec("P")
T = TypeVar("T")

OUTSIDE, UPLINK = "198.18.7.1", "198.18.7.2"
BEYOND = ("203.0.113.0/24", "192.0.2.0/24", "169.254.169.254/32")
"""Networks that are outside."""
CATCH_ALL = 7000
_PATIENCE = 1.5
_PORTS = (22, 8080, 8081, 8082)
_ADDRESS = re.compile(r"(?<![\d.:])(\d+\.\d+\.\d+\.\d+)(?:/(\d+))?")
_SIX = 0x2001_0DB8 << 96
_DISCOVERY = [f"-A INPUT -p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j ACCEPT" for kind in (133, 134, 135, 136)]


def mapped(text: str, family: int) -> str:
    """An address of the played host in this family."""
    return text if family == 4 else str(ipaddress.IPv6Address(_SIX | int(ipaddress.IPv4Address(text))))


def in_ipv6(rules: str) -> str:
    """IPv4 rules of the synthetic host, said of IPv6."""
    text = _ADDRESS.sub(lambda m: mapped(m[1], 6) + (f"/{96 + int(m[2])}" if m[2] else ""), rules)
    text = re.sub(r"--to-destination (\S+):(\d+)$", r"--to-destination [\1]:\2", text, flags=re.MULTILINE)
    text = text.replace("-p icmp -m icmp --icmp-type 8", "-p ipv6-icmp -m icmp6 --icmpv6-type 128")
    text = text.replace("-p icmp ", "-p ipv6-icmp ").replace("icmp-port-unreachable", "icmp6-port-unreachable")
    return text.replace("-A INPUT -i lo -j ACCEPT", "\n".join(["-A INPUT -i lo -j ACCEPT", *_DISCOVERY]))


class Inside:
    """A namespace that is there already, to work in."""

    def __init__(self, name: str) -> None:
        self._fd = netns.open_named(name)
        self._worker = netns.Worker(self._fd)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._worker.run(function, *args, **kwargs)

    def close(self) -> None:
        self._worker.close()
        os.close(self._fd)


Somewhere = Net | Inside


@dataclass
class Host:
    """``guests``: where each tenant's workload is, by the tenant's name."""

    root: Net
    outside: Net
    guests: dict[str, Somewhere] = field(default_factory=dict)


@contextlib.contextmanager
def bare() -> Iterator[Host]:
    """Root and outside, both families, without a rule."""
    with nets("root", "outside") as (root, outside):
        _wire(root, outside)
        yield Host(root, outside)


def _wire(root: Net, outside: Net) -> None:
    far, near = ((mapped(text, 6), text) for text in (OUTSIDE, UPLINK))
    for net in (root, outside):  # an address that is still being tried answers nobody
        net.sysctl(ipv6__conf__all__accept_dad=0, ipv6__conf__default__accept_dad=0)
    root.ip(
        f"link add eth0 type veth peer name eth0 netns {outside.name}",
        f"addr add {near[1]}/30 dev eth0",
        f"addr add {near[0]}/126 dev eth0 nodad",
        "link set eth0 up",
        *(f"route add {_network(each, 4)} via {far[1]}" for each in BEYOND),
        *(f"route add {_network(each, 6)} via {far[0]}" for each in BEYOND),
    )
    outside.ip(
        f"addr add {far[1]}/30 dev eth0",
        f"addr add {far[0]}/126 dev eth0 nodad",
        "link set eth0 up",
        *(f"route add local {_network(each, family)} dev lo" for each in BEYOND for family in (4, 6)),
        f"route add 10.64.0.0/12 via {near[1]}",
        f"route add {_network('10.64.0.0/12', 6)} via {near[0]}",
    )
    for net in (root, outside):
        net.sysctl(ipv4__icmp_ratelimit=0, ipv6__icmp__ratelimit=0)
    root.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        for protocol in ("tcp", "udp"):
            outside.sh(f"{tool} -t nat -A PREROUTING -p {protocol} -j REDIRECT --to-ports {CATCH_ALL}")
    for net in (root, outside):
        net.wait_for_carrier("eth0")


def _network(text: str, family: int) -> str:
    address, _, length = text.partition("/")
    return text if family == 4 else f"{mapped(address, 6)}/{96 + int(length)}"


def furnish(guest: Net, one: SyntheticTenant) -> None:
    """What a tenant's eth0 is configured as, wherever it is."""
    guest.ip(
        f"addr add {one.address}/30 dev eth0",
        f"addr add {mapped(one.address, 6)}/126 dev eth0 nodad",
        "link set eth0 up",
        f"route add default via {one.gateway}",
        f"route add default via {mapped(one.gateway, 6)}",
    )


@contextlib.contextmanager
def before(tenants: Sequence[SyntheticTenant], rules: Mapping[int, str], variant: str = "legacy") -> Iterator[Host]:
    """The host as operators build it, with these rules by family, loaded with this variant of iptables."""
    with bare() as host, nets(*(one.name for one in tenants)) as guests:
        for one, guest in zip(tenants, guests, strict=True):
            host.root.ip(
                f"link add {one.interface} type veth peer name eth0 netns {guest.name}",
                f"addr add {one.gateway}/30 dev {one.interface}",
                f"addr add {mapped(one.gateway, 6)}/126 dev {one.interface} nodad",
                f"link set {one.interface} up",
            )
            furnish(guest, one)
            guest.wait_for_carrier("eth0")
            host.guests[one.name] = guest
        for family, text in rules.items():
            load(host.root, "iptables" if family == 4 else "ip6tables", text, variant)
        yield host


def load(net: Net, tool: str, text: str, variant: str = "legacy") -> None:
    """Replace the tables that the text holds."""
    net.sh(f"{tool}-{variant}-restore <<'EOF'\n{text}\nEOF")


@contextlib.contextmanager
def moved_in(tenants: Sequence[SyntheticTenant], fields: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tenants' workloads in their slots, as what ``acquire`` said of each demands."""
    with contextlib.ExitStack() as held:
        found: dict[str, Somewhere] = {}
        pairs: list[tuple[int, int]] = []
        for one in tenants:
            slot = held.enter_context(contextlib.closing(Inside(fields[one.name]["netns"])))
            if fields[one.name]["tap"] is not None:
                guest = held.enter_context(Net(one.name))
                guest.run(tun.create_tap, "eth0", vnet_hdr=True)
                ends = (
                    slot.run(tun.open_tap, fields[one.name]["tap"], vnet_hdr=True),
                    guest.run(tun.open_tap, "eth0", vnet_hdr=True),
                )
                pairs.append(ends)
                furnish(guest, one)
                found[one.name] = guest
            elif "workload_netns" in fields[one.name]:
                inner = Inside(fields[one.name]["workload_netns"])
                found[one.name] = held.enter_context(contextlib.closing(inner))
            else:
                found[one.name] = slot
        held.enter_context(_carried(pairs))
        for place in found.values():
            if isinstance(place, Net):
                place.wait_for_carrier("eth0")
        yield found


@contextlib.contextmanager
def _carried(pairs: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Carry frames between each two descriptors; both are closed in the end."""
    other = {one: two for pair in pairs for one, two in (pair, pair[::-1])}
    stop, stopper = os.pipe()

    def carry() -> None:
        poll = select.poll()
        for fd in (*other, stop):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == stop:
                    return
                with contextlib.suppress(OSError):  # a link that is down loses frames
                    os.write(other[fd], os.read(fd, 70000))

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        os.write(stopper, b"x")
        thread.join()
        for fd in (*other, stop, stopper):
            os.close(fd)


# --- questions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Somebody (a tenant's name, ``outside``) asks for a port of an address."""

    who: str
    address: str
    port: int
    protocol: str = "tcp"

    @property
    def family(self) -> int:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


def questions(tenants: Sequence[SyntheticTenant]) -> list[Question]:
    """Both sides of every kind of rule, in both families: out, in, to the host, to each other, published."""
    found: list[Question] = []
    for family in (4, 6):
        for index, one in enumerate(tenants):
            place = 20 * one.klass
            targets = [
                (f"203.0.113.{place}", 1000 + place),
                (f"203.0.113.{place}", 1001 + place),
                (f"203.0.113.{place + 5}", 1005 + place),
                ("203.0.113.250", 443),
                ("203.0.113.7", 25),
                ("192.0.2.9", 80),
                ("192.0.2.200", 80),
                ("169.254.169.254", 80),
                (one.gateway, 53),
                (UPLINK, 53),
                (tenants[index - 1].gateway, 53),
                (tenants[index - 1].address, 8080 + tenants[index - 1].klass),
                (tenants[index - 2].address, 8080 + tenants[index - 2].klass),
                (tenants[index - 2].address, 22),
            ]
            found += [Question(one.name, mapped(address, family), port) for address, port in targets]
            udp = [(f"203.0.113.{place}", 1900), ("203.0.113.3", 53), (one.gateway, 53), (one.gateway, 123)]
            found += [Question(one.name, mapped(address, family), port, "udp") for address, port in udp]
            inward = [(one.address, port) for port in _PORTS]
            inward += [(UPLINK, 30000 + int(one.interface[3:])), (one.gateway, 53)]
            found += [Question("outside", mapped(address, family), port) for address, port in inward]
        found += [Question("outside", mapped(UPLINK, family), port) for port in (20000, 20059, 20060, 22)]
    return found


def ask(host: Host, asked: Sequence[Question]) -> dict[Question, str]:
    """What becomes of each: ``from ADDRESS`` when it is answered, as the other side sees it; refused; silent."""
    places: dict[str, Somewhere] = {**host.guests, "outside": host.outside}
    with _Servers(host):
        sockets = {}
        for question in asked:
            kind = socket.SOCK_STREAM if question.protocol == "tcp" else socket.SOCK_DGRAM
            sock = places[question.who].run(socket.socket, question.family, kind)
            sock.setblocking(False)
            failed = sock.connect_ex((question.address, question.port))
            if question.protocol == "udp":
                with contextlib.suppress(OSError):  # a rule in the slot's OUTPUT says so to the sender
                    sock.send(b"?")
            assert failed in (0, errno.EINPROGRESS, errno.EPERM), (question, os.strerror(failed))
            sockets[question] = sock
        time.sleep(_PATIENCE)
        answers = {question: _answer(sock, question) for question, sock in sockets.items()}
        for sock in sockets.values():
            sock.close()
    return answers


def _answer(sock: socket.socket, question: Question) -> str:
    try:
        return f"from {sock.recv(100).decode()}"
    except BlockingIOError:
        return "silent"
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return "silent"
        return "refused" if question.protocol == "tcp" else "silent"


class _Servers:
    """On every port that a question may reach: they answer with the address that they were asked from."""

    def __init__(self, host: Host) -> None:
        self._sockets: list[socket.socket] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            self._open(host.outside, family, CATCH_ALL)
            for port in (22, 53, 123, 20000, 20059, 20060):
                self._open(host.root, family, port)
            for guest in host.guests.values():
                for port in _PORTS:
                    self._open(guest, family, port)
        self._stop, self._stopper = os.pipe()

    def _open(self, where: Somewhere, family: int, port: int) -> None:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            sock = where.run(socket.socket, family, kind)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(("", port))
            if kind == socket.SOCK_STREAM:
                sock.listen(128)
            sock.setblocking(False)
            self._sockets.append(sock)

    def _serve(self) -> None:
        by_fd = {sock.fileno(): sock for sock in self._sockets}
        poll = select.poll()
        for fd in (*by_fd, self._stop):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop:
                    return
                with contextlib.suppress(OSError):  # who asked has gone
                    _serve_one(by_fd[fd])

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        os.write(self._stopper, b"x")
        self._thread.join()
        for sock in self._sockets:
            sock.close()
        os.close(self._stop)
        os.close(self._stopper)


def _serve_one(sock: socket.socket) -> None:
    if sock.type == socket.SOCK_DGRAM:
        _, peer = sock.recvfrom(100)
        sock.sendto(peer[0].encode(), peer)
        return
    connection, peer = sock.accept()
    with connection:
        connection.send(peer[0].encode())
