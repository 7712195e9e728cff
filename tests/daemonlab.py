"""The daemon of a played host, as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hostlab import NETSLOT, PlayedHost
from netslot.serve.client import Client, connect

T = TypeVar("T")


class Daemon:
    """``netslot serve``, started and answering."""

    def __init__(self, host: PlayedHost, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.host = host
        command = [NETSLOT, "--state-dir", str(host.state_dir), "--root-netns", host.root.name, "serve", *arguments]
        self.log = Path(host.spec.parent / "daemon.log")
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **(environment or {})}
            )

    def client(self) -> Client:
        """A connection; waits until the daemon answers."""

        def connected() -> Client | None:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            return connect(self.host.state_dir)

        return eventually(connected)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)


@contextmanager
def serving(host: PlayedHost, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Daemon]:
    """A daemon that is ended in any case."""
    daemon = Daemon(host, *arguments, environment=environment)
    try:
        daemon.client().close()
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.kill()


def eventually(call: Callable[[], T | None], seconds: float = 20.0) -> T:
    """The first answer of ``call`` that is not empty."""
    deadline = time.monotonic() + seconds
    while True:
        found = call()
        if found:
            return found
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.02)
