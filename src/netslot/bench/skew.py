"""What a tenant's position costs, and what adding a tenant costs, for each arrangement of rules."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from netslot.bench import machine, measure, shapes
from netslot.bench.field import Guest, Place, add_guest, add_place, prepare_root
from netslot.bench.measure import Client, Samples
from netslot.bench.shapes import Shape
from netslot.bench.slot_rules import BACKENDS, bare_nat, cast_backend
from netslot.bench.statistics import median
from netslot.bench.tenants import GUEST, RULES_PER_TENANT, SLOT_PREFIX, Tenant
from netslot.errors import UsageError
from netslot.kernel import netns
from netslot.policy.base import Die

Say = Callable[[str], None]

ROOT_SHAPES = (
    "root-iptables-legacy-flat",
    "root-iptables-nft-flat",
    "root-iptables-legacy-chains",
    "root-nft-table-per-tenant",
    "root-nft-sets",
    "root-nft-verdict-map",
)
SLOT_SHAPES = tuple(f"slots-{backend}" for backend in BACKENDS)
SHAPES = ("none", "nat-only", *ROOT_SHAPES, *SLOT_SHAPES)

_POOLS = {"slot": "10.201.0.0", "plain": "10.203.0.0", "twin": "10.208.0.0"}
_OWN_LINKS = IPv4Address("100.64.0.0")
_BLOCK_S = 2.5
_LEAST_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """``samples`` of each tenant and shape, taken in ``rounds`` in which the shapes come in a new order."""

    slots: int
    shapes: tuple[str, ...] = SHAPES
    positions: int = 5
    samples: int = 400
    rounds: int = 8
    add_times: int = 5
    seed: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.shapes if name not in SHAPES]
        if unknown:
            raise UsageError(f"unknown shape {unknown[0]}", hint=f"shapes are {', '.join(SHAPES)}")
        if not 3 <= self.slots <= 30_000:
            raise UsageError(f"{self.slots} slots: between 3 and 30,000 can be measured")
        if self.positions < 2 or self.samples < 1 or self.rounds < 1 or self.add_times < 1:
            raise UsageError("positions must be 2 or more; samples, rounds and additions 1 or more")


@dataclass(slots=True)
class _Run:
    """One shape as it is measured: the arrangement of root, its guests and what they gave."""

    name: str
    root: Shape
    guests: list[Guest]
    samples: list[Samples] = field(default_factory=list)
    add: dict[str, float] = field(default_factory=dict)
    load_s: float | None = None

    def __post_init__(self) -> None:
        self.samples = [Samples() for _ in self.guests]

    def result(self) -> dict[str, Any]:
        positions = [s.summary(guest.slot) for guest, s in zip(self.guests, self.samples, strict=True)]
        driver = next(iter(self.add), None)
        entry: dict[str, Any] = {"shape": self.name, "root_rules": self.root.root_rules, "positions": positions}
        entry["add_tenant_us"] = round(self.add[driver], 1) if driver else None
        entry["add_tenant_driver"] = driver
        entry["add_tenant_by_driver_us"] = {name: round(us, 1) for name, us in self.add.items()}
        entry["tenants"] = self.root.tenants or None
        entry["load_s"] = None if self.load_s is None else round(self.load_s, 3)
        entry["note"] = self.root.note
        return entry


def spread(slots: int, positions: int) -> list[int]:
    """``positions`` slot numbers from 1 to ``slots``, evenly spaced, first and last included."""
    count = min(positions, slots)
    if count == 1:
        return [slots]
    return sorted({1 + round(place * (slots - 1) / (count - 1)) for place in range(count)})


def measure_skew(plan: Plan, say: Say = lambda _: None) -> dict[str, Any]:
    """Measure on the stage that the calling process is on; the result is what ``bench skew --json`` prints."""
    facts = machine.facts()
    start = time.monotonic()
    with netns.Worker(name="netslot-bench") as worker:
        results = worker.run(_Bench(plan, say).run)
    return {
        "machine": facts,
        "slots": plan.slots,
        "rules_per_tenant": RULES_PER_TENANT,
        "samples": plan.samples,
        "seconds": round(time.monotonic() - start, 1),
        "shapes": results,
    }


class _Bench:
    """The state of one measurement; all of it runs on one worker thread whose namespace plays root."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self._plan = plan
        self._say = say
        self._dice = random.Random(plan.seed)
        self._positions = spread(plan.slots, plan.positions)
        self._bare: dict[int, Guest] = {}
        self._dies: dict[str, Die] = {}

    def run(self) -> list[dict[str, Any]]:
        allowed = os.sched_getaffinity(0)
        measure.pin_thread()
        prepare_root()
        self._cast()
        self._fill()
        os.sched_setaffinity(0, allowed)  # tools are children of this thread: they may run anywhere
        client = Client()
        try:
            runs = self._prepare()
            self._rounds(client, [run for run in runs if not run.root.legacy])
            for run in runs:
                if run.root.legacy:
                    self._legacy(client, run)
        finally:
            client.close()
        order = {name: place for place, name in enumerate(SHAPES)}
        return [run.result() for run in sorted(runs, key=lambda run: order[run.name])]

    def _wanted(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._plan.shapes]

    def _cast(self) -> None:
        for name in self._wanted(SLOT_SHAPES):
            backend = name.removeprefix("slots-")
            self._dies[backend] = cast_backend(backend)

    def _fill(self) -> None:
        """Build every slot with its rules: one backend after the other in turn, where several are measured."""
        if not self._dies:
            return
        dies = list(self._dies.values())
        start = time.monotonic()
        for number in range(1, self._plan.slots + 1):
            place = _place(f"{SLOT_PREFIX}{number}", "slot", number)
            add_place(place)
            _stamp(place, dies[number % len(dies)])
        self._say(f"{self._plan.slots} slots with their rules built in {time.monotonic() - start:.1f} s")

    def _prepare(self) -> list[_Run]:
        runs = [run for name in self._wanted(SHAPES) for run in self._runs(name)]
        if self._dies:
            self._load(_Run("static", shapes.static_root(), []))
        return runs

    def _runs(self, name: str) -> Iterator[_Run]:
        count = self._plan.slots
        if name == "none":
            yield _Run(name, shapes.no_rules(), [self._plain_guest(slot) for slot in self._positions])
            return
        if name in SLOT_SHAPES:
            backend = name.removeprefix("slots-")
            guests = [self._slot_guest(slot, backend) for slot in self._positions]
            yield _Run(name, shapes.static_root(), guests)
            return
        if name == "root-nft-table-per-tenant":
            shape = shapes.load_tables(count)
            shape.switch(False)
            yield _Run(name, shape, [self._bare_guest(slot) for slot in spread(shape.tenants, self._plan.positions)])
            return
        run = _Run(name, shapes.make(name, count), [self._bare_guest(slot) for slot in self._positions])
        if not run.root.legacy:
            self._load(run)
        yield run

    def _load(self, run: _Run) -> None:
        run.load_s = run.root.load()
        self._say(f"{run.name}: {run.root.root_rules} rules loaded in {run.load_s:.1f} s")
        if not run.root.legacy:
            run.root.switch(False)

    def _rounds(self, client: Client, runs: list[_Run]) -> None:
        """Shapes of one arrangement of root are measured together, their tenants shuffled among each other."""
        groups: dict[str, list[_Run]] = {}
        for run in runs:
            groups.setdefault(run.root.name, []).append(run)
        plan = self._plan
        for number in range(plan.rounds):
            order = list(groups.values())
            self._dice.shuffle(order)
            for group in order:
                with _switched(group[0].root):
                    self._block(client, group, _share(plan.samples, plan.rounds, number))
            self._say(f"round {number + 1} of {plan.rounds} measured")
        for group in groups.values():
            with _switched(group[0].root):
                for run in group:
                    self._time_additions(run)

    def _legacy(self, client: Client, run: _Run) -> None:
        self._load(run)
        self._block(client, [run], self._plan.samples)
        self._time_additions(run)
        run.root.unload()

    def _block(self, client: Client, group: list[_Run], count: int) -> None:
        guests = [guest for run in group for guest in run.guests]
        samples = [one for run in group for one in run.samples]
        with _pinned():
            client.block(guests, samples, count, self._dice, least=_LEAST_SAMPLES, budget_s=_BLOCK_S * len(group))

    def _time_additions(self, run: _Run) -> None:
        times = self._plan.add_times
        if run.name in SLOT_SHAPES:
            backend = run.name.removeprefix("slots-")
            run.add["netslot stamp"] = median(self._stamp_times(backend, 10 * times))
        elif run.name == "root-nft-verdict-map":
            run.add["netlink, netslot's code"] = median(shapes.verdict_map_netlink_us(run.root, 4 * times))
        if run.root.more:
            run.add[" ".join(run.root.add_tool)] = median(run.root.add_tenant_us(times))

    def _stamp_times(self, backend: str, times: int) -> list[float]:
        """µs of a stamp in each of ``times`` fresh namespaces."""
        taken = []
        values = {"guest_address": GUEST, "address": str(IPv4Address(_POOLS["slot"]) + 1)}
        for _ in range(times):
            with netns.fresh():
                start = time.perf_counter()
                self._dies[backend].stamp(values)
                taken.append((time.perf_counter() - start) * 1e6)
        return taken

    def _plain_guest(self, slot: int) -> Guest:
        place = _place(f"plain{slot}", "plain", slot)
        add_place(place)
        own_link = IPv4Network((int(_OWN_LINKS) + 2 * slot, 31))
        return add_guest(place, slot, own_link)

    def _bare_guest(self, slot: int) -> Guest:
        """The guest of a tenant whose rules are in root; its place has the source NAT and nothing else."""
        if slot not in self._bare:
            tenant = Tenant(slot)
            place = Place(tenant.interface, tenant.interface, tenant.root_address, tenant.address)
            add_place(place)
            guest = add_guest(place, slot)
            _stamp(place, bare_nat())
            self._bare[slot] = guest
        return self._bare[slot]

    def _slot_guest(self, slot: int, backend: str) -> Guest:
        letter = "abc"[BACKENDS.index(backend)]
        place = _place(f"{SLOT_PREFIX}{slot}{letter}", "twin", 3 * slot + BACKENDS.index(backend))
        add_place(place)
        guest = add_guest(place, slot)
        _stamp(place, self._dies[backend])
        return guest


def _share(total: int, parts: int, part: int) -> int:
    """How many of ``total`` fall to one of ``parts``."""
    return total // parts + (part < total % parts)


def _place(name: str, pool: str, number: int) -> Place:
    base = IPv4Address(_POOLS[pool]) + 2 * number
    return Place(name, name, str(base), str(base + 1))


def _stamp(place: Place, die: Die) -> None:
    inside = netns.open_named(place.netns)
    try:
        with netns.entered(inside):
            die.stamp({"guest_address": GUEST, "address": place.address})
    finally:
        os.close(inside)


@contextmanager
def _switched(shape: Shape) -> Iterator[None]:
    if shape.tables:
        shape.switch(True)
    yield
    if shape.tables:
        shape.switch(False)


@contextmanager
def _pinned() -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    measure.pin_thread()
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
