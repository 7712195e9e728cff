"""The journal of a move: one line for each step, on the disk before the step is taken.

A line that a crash has torn is cut off when the journal is read: its step has not begun. Every step can be taken
again, so that it is enough to know which ones may have been begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from netslot.errors import NetslotError

State = Literal["none", "slots", "root", "done", "rolling back"]
_STATES: Mapping[str, State] = {
    "begin": "slots",
    "slots": "slots",
    "root": "root",
    "done": "done",
    "back": "rolling back",
}
_WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Moved:
    """A tenant whose namespace may have been changed.

    ``cookie`` tells the namespace from a later one of the same name. ``counters``: what the tables that were there
    had counted, by tool and table, as hexadecimal struct xt_counters.
    """

    netns: str
    cookie: int
    link: str
    counters: Mapping[str, str]


@dataclass
class Journal:
    """``state``: the last step of all that was begun. ``links``: each link's group before it was changed.

    ``prints``: the fingerprint of what each tenant's namespace held when it had been given its rules.
    ``sets``: the IP sets that root's new rules bring.
    """

    path: Path
    state: State = "none"
    variant: Literal["legacy", "nft"] = "legacy"
    digest: str = ""
    slots: dict[str, Moved] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)
    prints: dict[str, str] = field(default_factory=dict)
    sets: tuple[str, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> Journal:
        """Read what there is; ``none`` where no move was begun. To be called by the holder of the lock only."""
        journal = cls(directory / "journal")
        try:
            data = journal.path.read_bytes()
        except FileNotFoundError:
            return journal
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(journal.path, whole)
        for line in data[:whole].splitlines():
            journal._learn(json.loads(line))
        return journal

    def _learn(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        self.state = _STATES.get(step, self.state)
        if step == "begin":
            self.variant, self.digest = line["variant"], line["digest"]
            self.sets = tuple(line["sets"])
        elif step == "slot":
            fields = ("netns", "cookie", "link", "counters")
            self.slots[line["tenant"]] = Moved(*(line[name] for name in fields))
            self.prints.pop(line["tenant"], None)
        elif step == "stamped":
            self.prints[line["tenant"]] = line["print"]
        elif step == "group":
            self.links.setdefault(line["link"], line["was"])

    def write(self, *lines: Mapping[str, Any]) -> None:
        """Add lines; they are on the disk when this returns. A crash leaves the first few of them, or all."""
        fresh = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            os.fsync(file.fileno())
        if fresh:
            _sync_directory(self.path.parent)
        for line in lines:
            self._learn(line)

    def forget(self) -> None:
        """The end of it: the journal first, so that what is left of the other files means nothing."""
        self.path.unlink()
        for path in self.path.parent.iterdir():
            path.unlink()
        self.state, self.slots, self.links, self.prints, self.sets = "none", {}, {}, {}, ()


def put(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[int]:
    """Hold a lock file, and lend its descriptor: a child that has it holds the lock too, also when we are killed.

    Waits a little for such a child to end. NetslotError, with ``busy`` as its text, when somebody keeps it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NetslotError(busy, hint="wait for it to end") from None
                time.sleep(0.02)
        yield fd
    finally:
        os.close(fd)
