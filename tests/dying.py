"""Processes that are killed after a chosen step of what they do, as kill -9 or the kernel would."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys as python
import threading
import traceback
from collections.abc import Callable
from typing import Any

from netslot.kernel import netlink, sys, xtables

_EVENTS = frozenset(("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "subprocess.Popen"))
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _Steps:
    """Counts what changes something outside the process, and kills the process when there were ``last``."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._count = 0
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self._count += 1
            if self._count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Count netlink messages, system calls through libc, exchanged tables, commits, changed files, processes."""
        send, check, connect = netlink.Socket._send, sys.check, sqlite3.connect
        honest_run = subprocess.run
        steps = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
                if sql == "COMMIT":
                    steps.step()
                try:
                    return super().execute(sql, *rest)
                finally:
                    if sql == "COMMIT":
                        steps.step()

        def counted_send(this: netlink.Socket, data: bytes, operation: str) -> None:
            send(this, data, operation)
            if not _is_dump(data):
                self.step()

        def counted_check(result: int, operation: str) -> int:
            if not operation.startswith("setns"):
                self.step()
            return check(result, operation)

        def run(*arguments: Any, **options: Any) -> Any:
            try:
                return honest_run(*arguments, **options)
            finally:
                if not _reads(arguments[0]):
                    steps.step()

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "subprocess.Popen" and _reads(arguments[1]):
                return
            if event in _EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
                self.step()

        def stepping(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                try:
                    return call(*arguments, **options)
                finally:
                    steps.step()

            return counted

        # Also after what is done by others: a tool that ends, a table that is exchanged, a page on disk.
        subprocess.run = run
        xtables.replace = stepping(xtables.replace)
        xtables.add_counters = stepping(xtables.add_counters)
        os.fsync = stepping(os.fsync)
        netlink.Socket._send = counted_send  # type: ignore[assignment, method-assign]
        sys.check = counted_check
        sqlite3.connect = lambda *a, **k: connect(*a, **{"factory": Connection, **k})
        python.addaudithook(audit)


def _reads(command: Any) -> bool:
    """Whether a tool only looks."""
    return str(command[0]).endswith("-save")


def _is_dump(data: bytes) -> bool:
    return int.from_bytes(data[6:8], python.byteorder) & netlink.NLM_F_DUMP == netlink.NLM_F_DUMP


def dies_at(step: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that is killed after its ``step``-th step; False when it ended before that.

    The caller must have no ledger open: SQLite's locks do not survive a fork.
    """
    child = os.fork()
    if child == 0:
        try:
            _Steps(step).install()
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child failed at step {step}"
    return status != 0
