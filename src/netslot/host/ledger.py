"""The ledger: the durable record of slots and leases of one boot.

SQLite in WAL mode, so that several processes use it at once without a daemon. Each method is one transaction.
The kernel is the truth about what exists; the ledger says who holds what.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from netslot.errors import NetslotError

State = Literal["free", "binding", "leased", "dirty", "quarantined", "unknown"]
"""free: ready. binding: parameters are being put in force. leased: held. dirty: released, to be cleaned.
quarantined: could not be cleaned. unknown: found in the kernel without a record; kept, never handed out."""

STATES: Final[tuple[str, ...]] = get_args(State)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS slots (
    slot INTEGER PRIMARY KEY, class TEXT NOT NULL, state TEXT NOT NULL, digest TEXT NOT NULL,
    ready_at REAL NOT NULL, reason TEXT NOT NULL DEFAULT '', process TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS slots_by_state ON slots (class, state, ready_at);
CREATE TABLE IF NOT EXISTS leases (
    lease TEXT PRIMARY KEY, slot INTEGER NOT NULL UNIQUE, owner TEXT NOT NULL UNIQUE, class TEXT NOT NULL,
    params TEXT NOT NULL, uid INTEGER NOT NULL, acquired_at REAL NOT NULL, expires_at REAL,
    holder TEXT NOT NULL DEFAULT '') WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS queue (
    ticket INTEGER PRIMARY KEY AUTOINCREMENT, class TEXT NOT NULL, process TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS leases_by_expiry ON leases (expires_at) WHERE expires_at IS NOT NULL;
"""

_BUSY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """One slot. ``ready_at`` is a time of :func:`clock`: a free slot is handed out only after it."""

    slot: int
    class_name: str
    state: State
    digest: str
    ready_at: float
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """One lease. ``acquired_at`` is a Unix time; ``expires_at`` is of :func:`clock`, None for a lease without an end.

    ``holder`` is the process with which the lease ends, as :func:`identify` names it, or empty.
    """

    lease: str
    slot: int
    owner: str
    class_name: str
    params: Mapping[str, Any]
    uid: int
    acquired_at: float
    expires_at: float | None
    holder: str = ""


def clock() -> float:
    """Seconds since boot. Setting the machine's clock neither ends leases nor keeps slots from being handed out."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def identify(pid: int) -> str:
    """What tells a process from every other of this boot: its id and when it started (proc(5), field 22)."""
    return f"{pid}:{_started(pid)}"


def myself() -> str:
    """This process, as :func:`identify` names it."""
    return identify(os.getpid())


def is_alive(process: str) -> bool:
    """Whether the process that :func:`identify` named still runs."""
    pid, _, started = process.partition(":")
    return pid.isdecimal() and started != _GONE and _started(int(pid)) == started


_GONE = "gone"


def _started(pid: int) -> str:
    """Clock ticks since boot, as text; ``gone`` when it has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return _GONE
    return _GONE if fields[0] in "ZX" else fields[19]


class LedgerError(NetslotError):
    """The ledger could not be read or written."""


class Ledger:
    """The ledger of one state directory, usable by any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise _failure(path, error) from error

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # some errors, such as a full disk, end it themselves
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise _failure(self.path, error) from error

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise _failure(self.path, error) from error

    # --- what is known of the host -------------------------------------------------------------------

    def get(self, key: str) -> str | None:
        """A fact about the host (``spec``, ``host``, ``boot`` ...), or None."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def put(self, **facts: str) -> None:
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", facts.items())

    # --- slots ---------------------------------------------------------------------------------------

    def slots(self, *states: State) -> list[SlotRecord]:
        """All slots by number, or those in ``states``."""
        where = f" WHERE state IN ({','.join('?' * len(states))})" if states else ""
        query = "SELECT slot, class, state, digest, ready_at, reason FROM slots"
        return [SlotRecord(*row) for row in self._rows(f"{query}{where} ORDER BY slot", *states)]

    def slot(self, number: int) -> SlotRecord | None:
        query = "SELECT slot, class, state, digest, ready_at, reason FROM slots WHERE slot = ?"
        rows = self._rows(query, number)
        return SlotRecord(*rows[0]) if rows else None

    def counts(self) -> dict[tuple[str, str], int]:
        """How many slots there are by (class, state)."""
        rows = self._rows("SELECT class, state, count(*) FROM slots GROUP BY class, state")
        return {(name, state): count for name, state, count in rows}

    def add(self, slots: Iterable[tuple[int, str, str]], state: State = "free", reason: str = "") -> None:
        """Record slots (number, class, digest) that were built or found; known ones are left as they are."""
        now = clock() if state == "free" else 0.0
        with self._transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO slots VALUES (?, ?, ?, ?, ?, ?, '')",
                [(number, name, state, digest, now, reason) for number, name, digest in slots],
            )

    def forget(self, slots: Iterable[int]) -> None:
        """Drop slots that no longer exist, and their leases."""
        numbers = [(number,) for number in slots]
        with self._transaction() as db:
            db.executemany("DELETE FROM slots WHERE slot = ?", numbers)
            db.executemany("DELETE FROM leases WHERE slot = ?", numbers)

    def claim(self, number: int, *states: State) -> bool:
        """Take a slot out of ``states`` into ``dirty``, so that nobody else works on it; False if not in one."""
        return bool(self.claim_many([number], *states))

    def claim_many(self, numbers: Iterable[int], *states: State) -> list[int]:
        """As :meth:`claim` for many slots in one transaction; returns those that were taken."""
        marks = ",".join("?" * len(states))
        query = f"UPDATE slots SET state = 'dirty', process = ? WHERE slot = ? AND state IN ({marks})"
        with self._transaction() as db:
            return [number for number in numbers if db.execute(query, (myself(), number, *states)).rowcount]

    def take_dirty(self, most: int | None = None) -> list[SlotRecord]:
        """Claim the dirty slots that no living process is at, up to ``most``; a binding whose process died ends."""
        unfinished = "SELECT slot, process, state FROM slots WHERE state IN ('dirty', 'binding')"
        if not self._rows(f"{unfinished} LIMIT 1"):
            return []
        with self._transaction() as db:
            taken: list[int] = []
            for number, process, _state in db.execute(unfinished).fetchall():
                if is_alive(process):
                    continue
                if len(taken) == most:
                    break
                db.execute("DELETE FROM leases WHERE slot = ?", (number,))
                db.execute("UPDATE slots SET state = 'dirty', process = ? WHERE slot = ?", (myself(), number))
                taken.append(number)
        return [record for number in taken if (record := self.slot(number)) is not None]

    def unclaim(self, numbers: Iterable[int]) -> None:
        """Leave claimed slots dirty for whoever comes next."""
        with self._transaction() as db:
            query = "UPDATE slots SET process = '' WHERE slot = ? AND state = 'dirty' AND process = ?"
            db.executemany(query, [(number, myself()) for number in numbers])

    def settle(self, number: int, digest: str, *, ready_at: float) -> None:
        """A dirty slot was cleaned: it is free, with template ``digest``, from ``ready_at`` (:func:`clock`) on."""
        with self._transaction() as db:
            db.execute(
                "UPDATE slots SET state = 'free', digest = ?, ready_at = ?, reason = '', process = '' WHERE slot = ?",
                (digest, ready_at, number),
            )

    def quarantine(self, number: int, reason: str) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE slots SET state = 'quarantined', reason = ?, process = '' WHERE slot = ?", (reason, number)
            )

    # --- leases --------------------------------------------------------------------------------------

    def acquire(
        self,
        lease: str,
        owner: str,
        class_name: str,
        params: Mapping[str, Any],
        *,
        uid: int,
        binding: bool,
        ttl: float | None = None,
        holder: str = "",
        ticket: int | None = None,
        only: int | None = None,
    ) -> tuple[LeaseRecord | None, bool]:
        """Give ``owner`` the slot of ``class_name`` that has been free longest, or ``only`` this one.

        Returns the lease and whether it is new: an owner that holds one gets the same again. ``binding`` leaves
        the slot in that state until :meth:`bound`. (None, False) when no slot is ready, or somebody stands before
        ``ticket`` in the queue for the class.
        """
        now = clock()
        expires = now + ttl if ttl is not None else None
        with self._transaction() as db:
            row = db.execute(f"{_LEASES} WHERE owner = ?", (owner,)).fetchone()
            if row is not None:
                return _lease(row), False
            if only is None and not _is_first(db, class_name, ticket):
                return None, False
            row = db.execute(
                "SELECT slot FROM slots WHERE class = ? AND state = 'free' AND ready_at <= ?"
                f"{'' if only is None else ' AND slot = ?'} ORDER BY ready_at LIMIT 1",
                (class_name, now, *([] if only is None else [only])),
            ).fetchone()
            if row is None:
                return None, False
            number = row[0]
            state = "binding" if binding else "leased"
            process = myself() if binding else ""
            db.execute("UPDATE slots SET state = ?, process = ? WHERE slot = ?", (state, process, number))
            record = LeaseRecord(lease, number, owner, class_name, params, uid, time.time(), expires, holder)
            db.execute(
                "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    lease,
                    number,
                    owner,
                    class_name,
                    json.dumps(dict(params)),
                    uid,
                    record.acquired_at,
                    expires,
                    holder,
                ),
            )
        return record, True

    def bound(self, number: int) -> None:
        """The parameters of a new lease are in force."""
        with self._transaction() as db:
            db.execute(
                "UPDATE slots SET state = 'leased', process = '' WHERE slot = ? AND state = 'binding'", (number,)
            )

    def rebound(self, lease: str, params: Mapping[str, Any]) -> None:
        """The parameters of a running lease were changed."""
        with self._transaction() as db:
            db.execute("UPDATE leases SET params = ? WHERE lease = ?", (json.dumps(dict(params)), lease))

    def renew(self, lease: str, ttl: float | None) -> bool:
        """Set when the lease ends, from now; None for never. False when there is no such lease."""
        expires = clock() + ttl if ttl is not None else None
        with self._transaction() as db:
            return db.execute("UPDATE leases SET expires_at = ? WHERE lease = ?", (expires, lease)).rowcount > 0

    def hold(self, lease: str, holder: str) -> None:
        """Set the process with which a lease ends."""
        with self._transaction() as db:
            db.execute("UPDATE leases SET holder = ? WHERE lease = ?", (holder, lease))

    def release(self, lease: str) -> int | None:
        """End a lease: its slot becomes dirty and is returned; None when there is no such lease."""
        with self._transaction() as db:
            row = db.execute("DELETE FROM leases WHERE lease = ? RETURNING slot", (lease,)).fetchone()
            if row is None:
                return None
            db.execute("UPDATE slots SET state = 'dirty', process = '' WHERE slot = ?", (row[0],))
            return int(row[0])

    def abandon(self, number: int) -> bool:
        """Declare a slot of state ``unknown`` to be nobody's: it becomes dirty. False when it was not unknown."""
        with self._transaction() as db:
            query = "UPDATE slots SET state = 'dirty', process = '' WHERE slot = ? AND state = 'unknown'"
            return db.execute(query, (number,)).rowcount > 0

    def queue_up(self, class_name: str) -> int:
        """Take a place in the queue for slots of a class; it lasts until :meth:`leave_queue` or the process's end."""
        with self._transaction() as db:
            query = "INSERT INTO queue (class, process) VALUES (?, ?) RETURNING ticket"
            return int(db.execute(query, (class_name, myself())).fetchone()[0])

    def leave_queue(self, ticket: int) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM queue WHERE ticket = ?", (ticket,))

    def lease(
        self, *, lease: str | None = None, owner: str | None = None, slot: int | None = None
    ) -> LeaseRecord | None:
        """The lease with this id, of this owner, or of this slot."""
        column, value = next(
            (name, value) for name, value in (("lease", lease), ("owner", owner), ("slot", slot)) if value is not None
        )
        rows = self._rows(f"{_LEASES} WHERE {column} = ?", value)
        return _lease(rows[0]) if rows else None

    def leases(self) -> list[LeaseRecord]:
        return [_lease(row) for row in self._rows(f"{_LEASES} ORDER BY slot")]

    def expired(self) -> list[LeaseRecord]:
        """Leases whose time has run out."""
        return [_lease(row) for row in self._rows(f"{_LEASES} WHERE expires_at <= ?", clock())]

    def held(self) -> list[LeaseRecord]:
        """Leases that end with a process."""
        return [_lease(row) for row in self._rows(f"{_LEASES} WHERE holder != ''")]


_LEASES = "SELECT lease, slot, owner, class, params, uid, acquired_at, expires_at, holder FROM leases"


def _lease(row: tuple[Any, ...]) -> LeaseRecord:
    lease, slot, owner, class_name, params, uid, acquired_at, expires_at, holder = row
    return LeaseRecord(lease, slot, owner, class_name, json.loads(params), uid, acquired_at, expires_at, holder)


def _is_first(db: sqlite3.Connection, class_name: str, ticket: int | None) -> bool:
    """Whether ``ticket`` is next in the queue for a class, or nobody waits. Places of dead processes are given up."""
    query = "SELECT ticket, process FROM queue WHERE class = ? ORDER BY ticket LIMIT 1"
    while (first := db.execute(query, (class_name,)).fetchone()) is not None:
        if first[0] == ticket:
            return True
        if is_alive(first[1]):
            return False
        db.execute("DELETE FROM queue WHERE ticket = ?", (first[0],))
    return True


def _failure(path: Path, error: sqlite3.Error) -> LedgerError:
    damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    hint = (
        f"move {path} away; `netslot up` rebuilds it from the kernel"
        if damaged
        else "is the state directory writable, and is there space left on it?"
    )
    return LedgerError(f"ledger {path}: {error}", hint=hint)
