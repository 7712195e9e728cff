"""A tenant never sees the last one: nothing of a real tenant's traffic is there after a release.

The workload is a container's (attachment veth), so that it can do what a hostile guest can: open sockets, change its
addresses, fill neighbour tables. The slot is the same before and after; the outside is never told of the release.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from hostlab import OUTSIDE, PlayedHost, played
from lab import Net
from netslot.host.host import Host
from netslot.host.leasing import Lease
from netslot.kernel import conntrack, netns


@dataclass
class Scene:
    """A host of one slot, so that the next tenant gets what the last one had."""

    lab: PlayedHost
    host: Host
    outside: Net
    lease: Lease

    def next_tenant(self) -> None:
        """The lease ends, and somebody else gets the slot."""
        self.host.release(lease=self.lease.id)
        lease = self.host.lease("the next", wait=5)
        assert lease.slot == self.lease.slot
        self.lease = lease

    @contextmanager
    def inside(self, name: str) -> Iterator[netns.Worker]:
        """A thread in a namespace, as ``ip netns`` knows it."""
        fd = netns.open_named(name)
        try:
            with netns.Worker(fd) as worker:
                yield worker
        finally:
            os.close(fd)

    def guest_socket(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the workload's."""
        with self.inside(self.lease.fields["workload_netns"]) as worker:
            return worker.run(socket.socket, socket.AF_INET, kind)

    def sh(self, command: str, *, where: str = "slot") -> str:
        """A shell command in the slot's namespace, or in the workload's."""
        name = self.lease.netns if where == "slot" else self.lease.fields["workload_netns"]
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{name}", "sh", "-c", command], capture_output=True, text=True, check=True
        )
        return done.stdout

    def connections(self) -> int:
        """Entries of the slot's own connection tracking."""
        with self.inside(self.lease.netns) as worker:
            return worker.run(conntrack.count)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with played(slots=1, kind="veth") as lab, lab.host() as host:
        host.up(lab.spec)
        yield Scene(lab, host, lab.outside, host.lease("the last"))


def listen(net: Net, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = net.socket(kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((OUTSIDE, 7000))
    sock.settimeout(1)
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def test_an_open_tcp_connection_ends_with_the_lease(scene: Scene) -> None:
    with listen(scene.outside) as server, scene.guest_socket() as client:
        client.settimeout(2)
        client.connect((OUTSIDE, 7000))
        far, peer = server.accept()
        far.settimeout(0.3)
        client.send(b"last tenant's")
        assert far.recv(100) == b"last tenant's"
        assert scene.connections() == 1
        scene.next_tenant()
        assert scene.connections() == 0
        far.send(b"late")  # half open: the outside still believes in it
        with pytest.raises((TimeoutError, ConnectionError)):
            far.recv(100)
        assert OUTSIDE not in scene.sh("ss -Htan", where="guest")
        # The same port is the next tenant's own: what was in flight must not reach it.
        with scene.guest_socket() as own:
            own.settimeout(2)
            own.bind(("0.0.0.0", peer[1]))
            own.connect((OUTSIDE, 7000))
            again, _ = server.accept()
            with again:
                again.send(b"yours")
                assert own.recv(100) == b"yours"
        far.close()


def test_a_udp_stream_from_outside_stops_at_the_release(scene: Scene) -> None:
    with listen(scene.outside, socket.SOCK_DGRAM) as server, scene.guest_socket(socket.SOCK_DGRAM) as client:
        client.bind(("0.0.0.0", 5000))
        client.sendto(b"?", (OUTSIDE, 7000))
        _, peer = server.recvfrom(100)
        server.sendto(b"!", peer)
        client.settimeout(1)
        assert client.recv(100) == b"!"
        ended = threading.Event()

        def stream() -> None:
            while not ended.wait(0.001):
                server.sendto(b"for the last one", peer)

        thread = threading.Thread(target=stream)
        thread.start()
        try:
            scene.next_tenant()
            with scene.guest_socket(socket.SOCK_DGRAM) as own:
                own.bind(("0.0.0.0", 5000))
                own.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    own.recv(100)
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize("where", ["slot", "guest"])
def test_a_listening_socket_is_gone(scene: Scene, where: str) -> None:
    name = scene.lease.netns if where == "slot" else scene.lease.fields["workload_netns"]
    with scene.inside(name) as worker:
        left = worker.run(socket.socket, socket.AF_INET, socket.SOCK_STREAM)
    with left:
        left.bind(("0.0.0.0", 8080))
        left.listen()
        scene.next_tenant()
        assert "8080" not in scene.sh("ss -Htan", where=where)
        new = scene.lease.netns if where == "slot" else scene.lease.fields["workload_netns"]
        with scene.inside(new) as worker, worker.run(socket.socket, socket.AF_INET, socket.SOCK_STREAM) as own:
            own.bind(("0.0.0.0", 8080))
            own.listen()


HARM = {
    "a neighbour": (
        "slot",
        "ip neigh add 172.16.0.3 lladdr 02:de:ad:00:00:01 dev {guest}",
        "ip neigh show",
        "02:de:ad",
    ),
    "a route": ("slot", "ip route add 198.51.100.0/24 dev {guest}", "ip route show table all", "198.51.100.0"),
    "an address": ("slot", "ip addr add 198.51.100.9/32 dev lo", "ip addr", "198.51.100.9"),
    "a link": ("slot", "ip link add left type veth peer name left2", "ip link", "left"),
    "a queue": ("slot", "tc qdisc add dev up0 root pfifo limit 7", "tc qdisc show dev up0", "limit 7p"),
    "a sysctl": ("slot", "sysctl -qw net.ipv4.conf.up0.rp_filter=2", "sysctl net.ipv4.conf.up0.rp_filter", "= 2"),
    "a rule": ("slot", "nft add table ip left", "nft list tables", "left"),
    "an allowed network": ("slot", "nft add element inet slot allow {{ 9.9.9.9 }}", "nft list ruleset", "9.9.9.9"),
    "a policy rule": ("slot", "ip rule add from 9.9.9.9 table 9", "ip rule", "9.9.9.9"),
    "the guest's neighbour": (
        "guest",
        "ip neigh add 172.16.0.9 lladdr 02:de:ad:00:00:02 dev eth0",
        "ip neigh",
        "02:de",
    ),
    "the guest's route": ("guest", "ip route add 198.51.100.0/24 dev eth0", "ip route", "198.51.100.0"),
    "the guest's address": ("guest", "ip addr add 198.51.100.9/32 dev eth0", "ip addr", "198.51.100.9"),
}


@pytest.mark.parametrize("what", HARM)
def test_what_the_last_one_left_is_gone(scene: Scene, what: str) -> None:
    where, harm, look, trace = HARM[what]
    guest = scene.host.engine.plan(1, "default").guest_if
    scene.sh(harm.format(guest=guest), where=where)
    assert trace in scene.sh(look, where=where)
    scene.next_tenant()
    assert trace not in scene.sh(look, where=where)


def test_counters_start_at_nought(scene: Scene) -> None:
    with listen(scene.outside) as server, scene.guest_socket() as client:
        client.settimeout(2)
        client.connect((OUTSIDE, 7000))
        server.accept()[0].close()
    counter = "nft list chain inet slot forward | grep counter"
    assert "packets 0" not in scene.sh(counter)
    scene.next_tenant()
    assert "packets 0 bytes 0" in scene.sh(counter)


def test_a_process_left_inside_loses_the_network(scene: Scene) -> None:
    path = scene.lease.netns_path
    left = subprocess.Popen(["nsenter", f"--net={path}", "sleep", "100"])
    try:
        while os.stat(f"/proc/{left.pid}/ns/net").st_ino != os.stat(path).st_ino:
            continue
        scene.next_tenant()
        assert os.stat(f"/proc/{left.pid}/ns/net").st_ino != os.stat(scene.lease.netns_path).st_ino
        links = subprocess.run(
            ["nsenter", "-t", str(left.pid), "-n", "ip", "-br", "link"], capture_output=True, text=True, check=True
        )
        assert "up0" not in links.stdout
    finally:
        left.kill()
        left.wait()
