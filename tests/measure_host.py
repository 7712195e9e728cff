"""A whole host of the sandbox example: what ``up`` costs, and whether all slots can talk at once.

As root or where user namespaces are allowed: ``python tests/measure_host.py [SLOTS]`` (default 4,000).
Everything happens in throwaway namespaces. Prints the time and the peak memory of ``up``, how many processes it
started, how many of one TCP connection per slot, all opened at once, succeeded, the time of ``verify`` and of
``down``, and what is left.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from netslot import Host
from netslot.bench.stage import play
from netslot.kernel import netns
from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import Socket

SPEC = Path(__file__).parents[1] / "examples/sandbox/netslot.toml"
PORT = 8080


def outside() -> int:
    """A namespace with a server in it, joined to this one by eth0; returns its descriptor."""
    commands = """
        ip link set lo up
        ip netns add outside
        ip link add eth0 type veth peer name eth0 netns outside
        ip address add 198.51.100.1/24 dev eth0
        ip link set eth0 up
        ip -n outside address add 198.51.100.2/24 dev eth0
        ip -n outside link set eth0 up
    """
    for command in commands.strip().splitlines():
        subprocess.run(command.split(), check=True)
    return netns.open_named("outside")


def listen(fd: int) -> socket.socket:
    """A listening socket in the outside namespace; the kernel completes connections to it by itself."""

    def make() -> socket.socket:
        server = socket.create_server(("198.51.100.2", PORT), backlog=8192)
        server.setblocking(False)
        return server

    return netns.run_in(fd, make)


def connect_all(names: list[str]) -> tuple[int, float]:
    """Open one connection from each slot, all at once; returns how many succeeded and the seconds it took."""

    def start() -> list[socket.socket]:
        clients = []
        for name in names:
            fd = netns.open_named(name)
            with netns.entered(fd):
                client = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            os.close(fd)
            clients.append(client)
        return clients

    with netns.Worker() as worker:
        clients = worker.run(start)
    began = time.perf_counter()
    waiting = {client.fileno(): client for client in clients}
    poll = select.epoll()
    for client in clients:
        client.connect_ex(("198.51.100.2", PORT))
        poll.register(client.fileno(), select.EPOLLOUT)
    good = 0
    while waiting and time.perf_counter() - began < 20:
        for fd, _ in poll.poll(1):
            good += waiting.pop(fd).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            poll.unregister(fd)
    seconds = time.perf_counter() - began
    for client in clients:
        client.close()
    return good, seconds


def main() -> int:
    """Play the host; the exit status is 0 when every slot could talk and nothing was left."""
    slots = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    started = 0

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal started
        started += event in ("subprocess.Popen", "os.fork", "os.posix_spawn")

    fd = outside()
    server = listen(fd)
    sys.addaudithook(count)
    with tempfile.TemporaryDirectory() as state, Host(Path(state) / "host") as host:
        summary = host.up(SPEC, slots=slots)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"up: {summary.slots} slots in {summary.seconds:.1f} s, {peak:.0f} MiB at most, {started} processes")
        good, seconds = connect_all([slot.netns for slot in host.slots()])
        print(f"all at once: {good} of {slots} connections succeeded in {seconds:.2f} s")
        report = host.verify()
        print(f"verify: {report.checked} slots in {report.seconds:.2f} s, {len(report.drift)} differences")
        began = time.perf_counter()
        host.down()
        print(f"down: {time.perf_counter() - began:.1f} s")
    with Socket() as sock:
        left = [link.name for link in rt.links(sock) if link.name not in ("lo", "eth0")]
    left += [name for name in netns.names() if name != "outside"]
    print(f"left: {left or 'nothing'}")
    server.close()
    return int(good != slots or bool(left))


if __name__ == "__main__":
    sys.exit(play(main))
