"""Traffic that does not stop: ``python migration_traffic.py PLAN``, in the mount namespace of the test.

PLAN is JSON: what is tried, again and again, in sweeps (see :class:`Plan` in migration_lab). Prints ``ready`` when
everything that may go through has gone through once. A line on stdin wakes connections that were
silent so far. When stdin is closed it prints what it has seen, as JSON:

    sweeps     when each sweep began, by the monotonic clock, and the end of the last
    lost       lines (connections that stay open) that failed, by name, with why
    refused    new connections and questions that should have been answered and were not, by name, with how often
    breaches   what went through although it is denied, by name, with how often
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import select
import socket
import sys
import time
from typing import Any

from netslot.kernel import sys as kernel

PATIENCE = 2.0
"""Seconds after which what should have gone through has not; a test lets more than that pass in each state."""
_NEWNET = kernel.CLONE_NEWNET


def inside(place: str) -> None:
    fd = os.open(f"/run/netns/{place}", os.O_RDONLY)
    kernel.setns(fd, _NEWNET)
    os.close(fd)


def opened(place: str, address: str, kind: int) -> socket.socket:
    inside(place)
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


class Traffic:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.lost: dict[str, str] = {}
        self._asked: dict[str, Any] = {}
        self.refused: collections.Counter[str] = collections.Counter()
        self.breaches: collections.Counter[str] = collections.Counter()
        self.deadline = time.monotonic() + 10 * PATIENCE
        self.servers: dict[tuple[str, str, int], socket.socket] = {}
        self.lines = {name: self.line(one) for name, one in plan["lines"].items()}
        self.sleepers = {name: self.line(one)[::-1] for name, one in plan["lines"].items()}
        self.calls = {name: (one, self.server(one)) for name, one in plan["calls"].items()}
        self.questions = {name: self.question(one) for name, one in plan["questions"].items()}
        self.deaf: dict[tuple[str, str, int], socket.socket] = {}
        self.denied = {name: self.denied_sender(one) for name, one in plan["denied"].items()}
        self.knocks = {name: (one, self.server(one)) for name, one in plan["knocks"].items()}
        self.knocking: list[tuple[str, socket.socket]] = []

    def left(self) -> float:
        """Seconds that what is tried now may take: all together have PATIENCE, and each a moment."""
        return max(0.05, self.deadline - time.monotonic())

    # what is tried

    def server(self, one: dict[str, Any]) -> socket.socket:
        key = (one["far"], one["answer"], one["answer_port"])
        if key not in self.servers:
            server = opened(one["far"], one["answer"], socket.SOCK_STREAM)
            server.bind(key[1:])
            server.listen(256)
            self.servers[key] = server
        return self.servers[key]

    def call(self, one: dict[str, Any], server: socket.socket) -> tuple[socket.socket, socket.socket]:
        near = opened(one["near"], one["address"], socket.SOCK_STREAM)
        near.settimeout(self.left())
        server.settimeout(self.left())
        try:
            near.connect((one["address"], one["port"]))
            far, _ = server.accept()
        except OSError:
            near.close()
            raise
        return near, far

    def line(self, one: dict[str, Any]) -> tuple[socket.socket, socket.socket]:
        return self.call(one, self.server(one))

    def question(self, one: dict[str, Any]) -> tuple[socket.socket, socket.socket]:
        far = opened(one["far"], one["answer"], socket.SOCK_DGRAM)
        far.bind((one["answer"], one["answer_port"]))
        near = opened(one["near"], one["address"], socket.SOCK_DGRAM)
        near.connect((one["address"], one["port"]))
        return near, far

    def denied_sender(self, one: dict[str, Any]) -> tuple[socket.socket, tuple[str, int]]:
        key = (one["far"], one["answer"], one["answer_port"])
        if key not in self.deaf:
            self.deaf[key] = opened(one["far"], one["answer"], socket.SOCK_DGRAM)
            self.deaf[key].bind(key[1:])
            self.deaf[key].setblocking(False)
        near = opened(one["near"], one["address"], socket.SOCK_DGRAM)
        near.bind((one["source"], 0))
        near.setblocking(False)
        return near, (one["address"], one["port"])

    def wake(self) -> None:
        """Lines that were silent say something, first the end that could not begin a connection."""
        self.exchange("a line", {f"{name}, asleep": pair for name, pair in self.sleepers.items()})

    # one sweep

    def sweep(self) -> None:
        self.send_denied()
        self.knock()
        self.exchange("a line", {name: pair for name, pair in self.lines.items() if name not in self.lost})
        self.exchange("a question", self.questions)
        self.deadline = time.monotonic() + PATIENCE
        for name, (one, server) in self.calls.items():
            try:
                near, far = self.call(one, server)
            except OSError as error:
                self.refused[f"{name}: {error}"] += 1
                continue
            near.close()
            far.close()
        self.collect()

    def send_denied(self) -> None:
        for name, (sock, where) in self.denied.items():
            # The slot's own OUTPUT tells the sender; an ICMP error of an earlier one may be pending.
            with contextlib.suppress(PermissionError, ConnectionRefusedError, BlockingIOError):
                sock.sendto(name.encode(), where)

    def knock(self) -> None:
        for name, (one, _) in self.knocks.items():
            sock = opened(one["near"], one["address"], socket.SOCK_STREAM)
            sock.setblocking(False)
            if sock.connect_ex((one["address"], one["port"])) in (errno.EINPROGRESS, 0):
                self.knocking.append((name, sock))
            else:
                sock.close()

    def exchange(self, what: str, pairs: dict[str, tuple[socket.socket, socket.socket]]) -> None:
        """A word from the near end to the far one and another back, of all pairs at once."""
        late: dict[str, str] = {}
        word = os.urandom(8)
        self.deadline = time.monotonic() + PATIENCE
        for step, (giver, taker) in enumerate(((0, 1), (1, 0))):
            peers: dict[str, Any] = {}
            for name, pair in pairs.items():
                try:
                    if what == "a line":
                        pair[giver].sendall(word)
                    elif step == 0:
                        pair[0].send(word)
                    else:
                        pair[1].sendto(word, self._asked[name])
                except (OSError, KeyError) as error:
                    late[name] = f"{error!r}"
            for name, pair in pairs.items():
                if name in late:
                    continue
                pair[taker].settimeout(self.left())
                try:
                    heard, peers[name] = pair[taker].recvfrom(64)
                    if heard != word:
                        late[name] = f"heard {heard!r}, not {word!r}"
                except OSError as error:
                    late[name] = f"{error!r}"
            if step == 0:
                self._asked = peers
        for name, why in late.items():
            if what == "a line":
                self.lost[name] = why
            else:
                self.refused[f"{name}: {why}"] += 1

    def collect(self) -> None:
        for sock in self.deaf.values():
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.breaches[sock.recv(64).decode()] += 1
        if self.knocking:
            poll = select.poll()
            names = {}
            for name, sock in self.knocking:
                poll.register(sock, select.POLLOUT)
                names[sock.fileno()] = name, sock
            for fd, _ in poll.poll(0):
                name, sock = names[fd]
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    self.breaches[name] += 1
        while len(self.knocking) > 3 * len(self.knocks):  # a refusal may take a moment, a breach does not
            self.knocking.pop(0)[1].close()


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        plan = json.load(file)
    traffic = Traffic(plan)
    traffic.sweep()
    if plan.get("strict", True) and (traffic.lost or traffic.refused):
        sys.exit(f"before anything: {traffic.lost} {dict(traffic.refused)}")
    print("ready", flush=True)
    sweeps = [time.monotonic()]
    while True:
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                break
            traffic.wake()
        traffic.sweep()
        sweeps.append(time.monotonic())
    time.sleep(0.2)
    traffic.collect()
    answer = {"lost": traffic.lost, "refused": traffic.refused, "breaches": traffic.breaches, "sweeps": sweeps}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
