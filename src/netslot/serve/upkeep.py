"""What goes on behind the daemon's answers: cleaning, building, verifying, each on a thread and an engine of its own.

None of it shares a worker thread with acquires, so these wait for none of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from netslot.errors import NetslotError
from netslot.host import building, leasing, verifying
from netslot.host.engine import Engine
from netslot.host.verifying import Report
from netslot.serve.metrics import Metrics
from netslot.spec.load import load

log = logging.getLogger("netslot")

_TICK = 0.25
_BATCH = 16
_RETRY_QUARANTINED = 30.0
_VERIFY_TICK = 5.0


@dataclass(frozen=True)
class Settings:
    """``spec`` is read at SIGHUP, and at the start; None for the file that the host was made from.

    With ``low`` and ``high``, slots are built when fewer than ``low`` of a class are free, until ``high`` are;
    otherwise all at once. ``verify_seconds`` is how long one round of verifying all slots takes; 0 for never.
    """

    spec: Path | None = None
    low: int | None = None
    high: int | None = None
    verify_seconds: float = 300.0


class Upkeep:
    """The background work of one host. ``freed`` is called, on some thread, when slots have become free."""

    def __init__(self, engine: Engine, metrics: Metrics, settings: Settings, freed: Callable[[], None]) -> None:
        self._metrics = metrics
        self._settings = settings
        self._freed = freed
        self._cleaner, self._builder, self._verifier = engine.beside(), engine.beside(), engine.beside()
        self._ending = threading.Event()
        self._dirty, self._wanted, self._due = threading.Event(), threading.Event(), threading.Event()
        self._reload = threading.Event()
        self._verifying = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._position = 0
        self._quarantine_due = 0.0
        self.problems: dict[str, str] = {}

    # --- from outside --------------------------------------------------------------------------------

    def start(self, *, reload: bool) -> None:
        """Begin; with ``reload``, put the spec file in force first."""
        if reload:
            self._reload.set()
        works = [("cleaning", self._clean, self._dirty), ("building", self._build, self._wanted)]
        if self._settings.verify_seconds > 0:
            works.append(("verifying", self._verify_share, self._due))
        for name, work, wake in works:
            thread = threading.Thread(target=self._repeat, args=(name, work, wake), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End after the slot at hand."""
        self._ending.set()
        for event in (self._dirty, self._wanted, self._due):
            event.set()
        for thread in self._threads:
            thread.join()
        for engine in (self._cleaner, self._builder, self._verifier):
            engine.close()

    def clean_soon(self) -> None:
        """A slot has become dirty."""
        self._dirty.set()

    def build_soon(self) -> None:
        """Free slots have run out."""
        self._wanted.set()

    def reload(self) -> None:
        """Put the spec file in force: new and free slots get its template, leased ones when they are released."""
        self._reload.set()
        self._wanted.set()

    @property
    def reloading(self) -> bool:
        return self._reload.is_set()

    def verify(self, slots: Iterable[int] | None, *, repair: bool, with_root: bool = True) -> Report:
        """As :func:`netslot.host.verifying.verify`; after the share that is being verified."""
        with self._verifying:
            report = verifying.verify(self._verifier, numbers=slots, repair=repair, with_root=with_root)
        self._metrics.drift.inc(len(report.drift))
        self._metrics.repaired.inc(report.repaired)
        for each in report.drift:
            log.warning("drift: %s", each)
        return report

    # --- the threads ---------------------------------------------------------------------------------

    def _repeat(self, name: str, work: Callable[[], float], wake: threading.Event) -> None:
        """Call ``work`` again and again; it returns the seconds until it wants to be called again."""
        while not self._ending.is_set():
            wake.clear()
            try:
                pause = work()
                self.problems.pop(name, None)
            except (NetslotError, OSError) as error:
                if self.problems.get(name) != str(error):
                    log.error("%s: %s", name, error)
                self.problems[name] = str(error)
                pause = 1.0
            wake.wait(pause)

    def _clean(self) -> float:
        engine = self._cleaner
        if ended := leasing.end_overdue(engine, holders=False):
            self._metrics.ended.labels(why="time").inc(ended)
        if time.monotonic() >= self._quarantine_due:
            stuck = [record.slot for record in engine.ledger.slots("quarantined")]
            engine.ledger.unclaim(engine.ledger.claim_many(stuck, "quarantined"))
            self._quarantine_due = time.monotonic() + _RETRY_QUARANTINED
        freed = leasing.recover(engine, most=_BATCH, observe=self._metrics.recycle.observe)
        if freed:
            self._freed()
        return 0.0 if freed else _TICK

    def _build(self) -> float:
        engine, settings = self._builder, self._settings
        everything = settings.low is None or settings.high is None
        if self._reload.is_set():
            spec = load(settings.spec or engine.spec.file, slots=engine.slots_override)
            try:
                building.up(engine, spec, slots_override=engine.slots_override, stop=self._ending, build=everything)
            finally:
                self._reload.clear()
                self._freed()
            log.info("the spec %s is in force", spec.file)
        if sum(engine.ledger.counts().values()) < engine.spec.slots:
            low, high = (engine.spec.slots,) * 2 if everything else (settings.low or 0, settings.high or 0)
            observe = self._metrics.build.observe
            if building.refill(engine, low, high, observe=observe, stop=self._ending):
                self._freed()
        return 1.0

    def _verify_share(self) -> float:
        started = time.perf_counter()
        numbers = [record.slot for record in self._verifier.ledger.slots()]
        share = max(1, round(len(numbers) * _VERIFY_TICK / self._settings.verify_seconds))
        if self._position >= len(numbers):
            self._position = 0
        chosen = numbers[self._position : self._position + share]
        self.verify(chosen, repair=True, with_root=self._position == 0)
        self._position += share
        self._metrics.verify.observe(time.perf_counter() - started)
        return _VERIFY_TICK
