"""Clients of the daemon, many at once, in a process of their own; raw HTTP, so that they cost little themselves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netslot.bench.statistics import percentile
from netslot.errors import NetslotError
from netslot.serve.client import connect, socket_path

_START_SECONDS = 60.0


def start_daemon(state_dir: Path) -> subprocess.Popen[bytes]:
    """``netslot serve`` for this host, answering."""
    run = "from netslot.cli.main import main; main()"
    command = [sys.executable, "-c", run, "--state-dir", str(state_dir), "serve"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + _START_SECONDS
    while (client := connect(state_dir)) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise NetslotError("the daemon does not start", hint="netslot serve says why")
        time.sleep(0.01)
    client.close()
    return process


@contextmanager
def daemon(state_dir: Path) -> Iterator[Path]:
    """The daemon for a while; gives its socket."""
    process = start_daemon(state_dir)
    try:
        yield socket_path(state_dir)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def one_by_one(path: Path, samples: int) -> dict[str, float]:
    """One client that acquires ``samples`` times, one after the other; then all leases are released."""
    return _apart(lambda: asyncio.run(_clients(path, 1, samples, 0.0)))


def many(path: Path, count: int, *, rounds: int, spread: float) -> dict[str, float]:
    """``count`` connected clients; each acquires once a round, at a time of its own within ``spread`` seconds."""
    return _apart(lambda: asyncio.run(_clients(path, count, rounds, spread)))


def _apart(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measure in a child, so that clients and daemon share no interpreter."""
    with tempfile.TemporaryFile("w+", encoding="ascii") as file:
        child = os.fork()
        if child == 0:
            try:
                json.dump(measure(), file)
                file.flush()
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise NetslotError("a client failed")
        file.seek(0)
        result: dict[str, float] = json.load(file)
        return result


async def _clients(path: Path, count: int, rounds: int, spread: float) -> dict[str, float]:
    ends = [await asyncio.open_unix_connection(str(path)) for _ in range(count)]
    times: list[float] = []
    for turn in range(rounds):
        one_round = [_acquire(end, f"{n} {turn}", spread * n / count) for n, end in enumerate(ends)]
        for seconds, lease in await asyncio.gather(*one_round):
            times.append(seconds)
            if count > 1:
                await _ask(ends[0], "DELETE", f"/v1/leases/{lease}")
        await asyncio.sleep(0.5 if count > 1 else 0.0)
    for lease in (await _ask(ends[0], "GET", "/v1/leases"))["leases"]:
        await _ask(ends[0], "DELETE", f"/v1/leases/{lease['lease']}")
    return {
        "samples": len(times),
        "p50_us": round(percentile(times, 0.5) * 1e6, 1),
        "p99_us": round(percentile(times, 0.99) * 1e6, 1),
    }


_End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _acquire(end: _End, owner: str, delay: float) -> tuple[float, str]:
    await asyncio.sleep(delay)
    started = time.perf_counter()
    answer = await _ask(end, "POST", "/v1/leases", json.dumps({"owner": owner}).encode())
    return time.perf_counter() - started, str(answer["lease"])


async def _ask(end: _End, method: str, target: str, body: bytes = b"") -> dict[str, Any]:
    reader, writer = end
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    status = int(answer[9:12])
    length = next(int(line[15:]) for line in answer.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    fields: dict[str, Any] = json.loads(await reader.readexactly(length))
    if status >= 400:
        raise NetslotError(f"{method} {target}: {fields['error']}")
    return fields
