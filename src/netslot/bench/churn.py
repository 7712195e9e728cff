"""Many clients acquire and release while clients and daemon are killed: nothing is leased twice, nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netslot.bench import machine
from netslot.bench.clients import start_daemon
from netslot.bench.leases import leased_host, measure_recycle
from netslot.errors import NetslotError
from netslot.host.host import Host
from netslot.host.ledger import is_alive, myself
from netslot.kernel import netns, nf_tables
from netslot.kernel import rtnetlink as rt
from netslot.serve.client import connect

Say = Callable[[str], None]

_CLIENT_DIES_EVERY, _DAEMON_DIES_EVERY = 0.5, 10.0
_PATIENCE = 60.0


@dataclass(frozen=True)
class Plan:
    """``cycles`` acquires and releases by ``clients`` processes on a host of ``slots``."""

    slots: int
    cycles: int
    clients: int = 100
    recycled: int = 200


def measure_churn(plan: Plan, say: Say = lambda _: None) -> dict[str, Any]:
    """What a recycle costs beside a rebuild; then the churn, and what is left of the host after it."""
    result: dict[str, Any] = {"machine": machine.facts(), "slots": plan.slots, "clients": plan.clients}
    with leased_host(plan.slots) as (host, _):
        result |= measure_recycle(host, min(plan.recycled, plan.slots))
        before, generation = _kernel(host), _generation(host)
        state_dir = host.engine.state_dir
        marks = state_dir.parent / "marks"
        marks.mkdir()
        host.close()  # clients are forked from here, and SQLite must not be open then
        result |= _Churn(plan, state_dir, marks, say).play()
        _settle(host, state_dir)
        result["leased_twice"] = len(list(marks.glob("twice *")))
        result["drift"] = [str(each) for each in host.verify().drift]
        result["slots_lost"] = plan.slots - sum(n for (_, state), n in host.counts().items() if state == "free")
        result["leaked"] = sorted(_kernel(host) ^ before)
        result["root_generations"] = _generation(host) - generation
    return result


def _kernel(host: Host) -> set[str]:
    """Pins and root's links, by name."""
    links = host.engine.run(lambda workshop: {link.name for link in rt.links(workshop.root)})
    return links | {f"pin {name}" for name in netns.names()}


def _generation(host: Host) -> int:
    """How often the root namespace's nf_tables rules were changed."""

    def read(_: object) -> int:
        with nf_tables.Socket() as sock:
            return sock.generation()

    return host.engine.run(read)


def _settle(host: Host, state_dir: Path) -> None:
    """Let a last daemon end the leases of clients that are gone."""
    process = start_daemon(state_dir)
    deadline = time.monotonic() + _PATIENCE
    while any(state != "free" for _, state in host.counts()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.wait()


class _Churn:
    def __init__(self, plan: Plan, state_dir: Path, marks: Path, say: Say) -> None:
        self._plan, self._state_dir, self._marks, self._say = plan, state_dir, marks, say
        self._chance = random.Random(1)
        self._daemon = start_daemon(state_dir)
        self._clients: list[int] = []
        self._killed = {"clients": 0, "daemon": 0}
        self._next_number = 0

    def play(self) -> dict[str, Any]:
        """Keep the clients at it until together they have done what was planned."""
        started = time.monotonic()
        for _ in range(self._plan.clients):
            self._clients.append(self._client())
        next_client, next_daemon = started + _CLIENT_DIES_EVERY, started + _DAEMON_DIES_EVERY
        while (done := self._done()) < self._plan.cycles:
            time.sleep(0.1)
            now = time.monotonic()
            if now >= next_client:
                self._kill_client()
                next_client = now + _CLIENT_DIES_EVERY
            if now >= next_daemon:
                self._say(f"{done} of {self._plan.cycles} cycles")
                self._kill_daemon()
                next_daemon = time.monotonic() + _DAEMON_DIES_EVERY
        seconds = time.monotonic() - started
        for client in self._clients:
            os.kill(client, signal.SIGKILL)
            os.waitpid(client, 0)
        self._daemon.terminate()
        self._daemon.wait()
        cycles = self._done()
        return {
            "cycles": cycles,
            "seconds": round(seconds, 1),
            "cycles_per_second": round(cycles / seconds, 1),
            "clients_killed": self._killed["clients"],
            "daemons_killed": self._killed["daemon"],
        }

    def _done(self) -> int:
        return sum(file.stat().st_size for file in self._marks.glob("done *"))

    def _kill_client(self) -> None:
        place = self._chance.randrange(len(self._clients))
        os.kill(self._clients[place], signal.SIGKILL)
        os.waitpid(self._clients[place], 0)
        self._clients[place] = self._client()
        self._killed["clients"] += 1

    def _kill_daemon(self) -> None:
        self._daemon.kill()
        self._daemon.wait()
        self._killed["daemon"] += 1
        self._daemon = start_daemon(self._state_dir)

    def _client(self) -> int:
        self._next_number += 1
        child = os.fork()
        if child == 0:
            try:
                _be_client(self._state_dir, self._marks, self._next_number)
            finally:
                os._exit(1)
        return child


def _be_client(state_dir: Path, marks: Path, number: int) -> None:
    """Acquire and release for ever; a byte in a file of one's own for each cycle."""
    done = os.open(marks / f"done {number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    chance, turn = random.Random(number), 0
    while True:
        turn += 1
        try:
            client = connect(state_dir)
            if client is None:
                time.sleep(0.05)
                continue
            with client:
                while True:
                    turn += 1
                    params = {"allow": ["192.0.2.0/24"]} if chance.random() < 0.2 else {}
                    lease = client.acquire(f"{number} {turn}", params=params, wait=20, holder_pid=os.getpid())
                    mark = _take(marks, int(lease["slot"]))
                    time.sleep(chance.random() / 100)
                    mark.unlink()
                    client.release(lease["lease"])
                    os.write(done, b".")
        except NetslotError:
            time.sleep(0.02)  # the daemon was killed


def _take(marks: Path, slot: int) -> Path:
    """Mark a slot as this process's. One that a living process has marked is leased twice."""
    mark = marks / f"slot {slot}"
    try:
        fd = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if is_alive(mark.read_text(encoding="ascii")):
            (marks / f"twice {slot} {time.time_ns()}").touch()
        fd = os.open(mark, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, myself().encode())
    os.close(fd)
    return mark


def churn_lines(result: dict[str, Any]) -> str:
    """``bench churn`` for people."""
    recycle = result["recycle"]
    return "\n".join(
        [
            f"recycle p50 {recycle['p50_us']:,.0f} µs, p99 {recycle['p99_us']:,.0f} µs; destroy and build "
            f"{result['rebuild_us']:,.0f} µs: {result['times_cheaper']} times cheaper",
            f"{result['cycles']} cycles by {result['clients']} clients in {result['seconds']} s; "
            f"{result['clients_killed']} clients and {result['daemons_killed']} daemons killed",
            f"leased twice {result['leased_twice']}, slots lost {result['slots_lost']}, "
            f"drift {len(result['drift'])}, leaked {len(result['leaked'])}, "
            f"changes of root's ruleset {result['root_generations']}",
        ]
    )
