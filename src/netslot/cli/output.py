"""How the verbs print: JSON, tables, progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows in columns; numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(name), *(len(row[at]) for row in texts)]) for at, name in enumerate(header)]
    numeric = [bool(rows) and all(isinstance(row[at], int | float) for row in rows) for at in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), *(line(row) for row in texts)])


class Progress:
    """A line on standard error with rate and time left; silent where that is no terminal."""

    def __init__(self) -> None:
        self._what = ""
        self._started = 0.0
        self._printed = 0.0
        self._shown = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._started, self._printed = what, now, 0.0
        if not self._shown or (now - self._printed < 0.1 and done != total):
            return
        self._printed = now
        seconds = now - self._started
        rate = done / seconds if seconds > 0 else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate and done != total else ""
        bar = "#" * (30 * done // max(total, 1))
        click.echo(f"\r{what} [{bar:30}] {done}/{total} slots, {rate:.0f}/s{left}   ", err=True, nl=done == total)
