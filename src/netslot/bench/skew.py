"""What a tenant's position costs, and what adding a tenant costs, for each arrangement of rules."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from netslot.bench import machine, measure, shapes
from netslot.bench.field import Guest, Place, add_guest, add_place, prepare_root
from netslot.bench.measure import Client, Samples
from netslot.bench.shapes import LegacyTable, Shape
from netslot.bench.slot_rules import BACKENDS, cast_backend
from netslot.bench.statistics import median
from netslot.bench.tenants import GUEST, RULES_PER_TENANT, SLOT_NFT_NAT, Tenant
from netslot.bench.yard import Yard
from netslot.errors import NetslotError, UsageError
from netslot.kernel import netns
from netslot.policy.base import Die
from netslot.spec.render import render

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

_PLAIN_POOL = IPv4Address("10.203.0.0")
_OWN_LINKS = IPv4Address("100.64.0.0")
_BLOCK_S = 0.6
_LEAST_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """``samples`` of each tenant and shape, taken in ``rounds`` in which the shapes come in a new order."""

    slots: int
    shapes: tuple[str, ...] = SHAPES
    positions: int = 5
    samples: int = 400
    rounds: int = 20
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
    guests: list[Guest] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    add: dict[str, float] = field(default_factory=dict)
    load_s: float | None = None
    slot_rules: int = 0
    legacy_tables: list[LegacyTable] = field(default_factory=list)

    def seat(self, guests: list[Guest]) -> None:
        self.guests = guests
        self.samples = [Samples() for _ in guests]

    def result(self) -> dict[str, Any]:
        positions = [s.summary(guest.slot) for guest, s in zip(self.guests, self.samples, strict=True)]
        driver = next(iter(self.add), None)
        entry: dict[str, Any] = {"shape": self.name, "root_rules": self.root.root_rules, "positions": positions}
        entry["add_tenant_us"] = round(self.add[driver], 1) if driver else None
        entry["add_tenant_driver"] = driver
        entry["add_tenant_by_driver_us"] = {name: round(us, 1) for name, us in self.add.items()}
        entry["slot_rules"] = self.slot_rules
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
    skipped: dict[str, str] = {}
    if any("legacy" in name for name in plan.shapes) and (refusal := shapes.legacy_refusal()):
        skipped = {name: refusal for name in plan.shapes if "legacy" in name}
        plan = replace(plan, shapes=tuple(name for name in plan.shapes if name not in skipped))
    bench = _Bench(plan, say)
    with netns.Worker(name="netslot-bench") as worker:
        results = worker.run(bench.run)
    return {
        "machine": facts,
        "slots": plan.slots,
        "rules_per_tenant": RULES_PER_TENANT,
        "samples": plan.samples,
        "seconds": round(time.monotonic() - start, 1),
        "shapes": results,
        "skipped": {**skipped, **bench.skipped},
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
        self._inhabited: dict[str, list[int]] = {}
        self._yard: Yard | None = None
        self.skipped: dict[str, str] = {}
        """Shapes that the tool or the kernel refused, with the reason."""

    def run(self) -> list[dict[str, Any]]:
        allowed = os.sched_getaffinity(0)
        measure.pin_thread()
        prepare_root()
        self._cast()
        os.sched_setaffinity(0, allowed)  # tools are children of this thread: they may run anywhere
        loaded = self._load_shapes()
        self._fill()
        client = Client()
        try:
            runs = [self._settle(name, run) for name, run in loaded.items()]
            self._rounds(client, [run for run in runs if not run.root.legacy])
            for run in runs:
                if run.root.legacy:
                    self._legacy(client, run)
        finally:
            client.close()
            if self._yard is not None:
                self._yard.close()
        return [run.result() for run in runs]

    def _wanted(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._plan.shapes]

    def _cast(self) -> None:
        for name in self._wanted(SLOT_SHAPES):
            backend = name.removeprefix("slots-")
            self._dies[backend] = cast_backend(backend)

    def _fill(self) -> None:
        """Build every slot with its rules. Where several backends are measured, slots take turns with them."""
        backends = list(self._dies)
        if not backends:
            return
        turns = len(backends)
        for place, backend in enumerate(backends):
            members = range(1 + place, self._plan.slots + 1, turns)
            self._inhabited[backend] = [members[at - 1] for at in spread(len(members), self._plan.positions)]
        yard = Yard(self._plan.slots)
        start = time.monotonic()
        for number in range(1, self._plan.slots + 1):
            backend = backends[(number - 1) % turns]
            yard.build(number, self._dies[backend], with_guest=number in self._inhabited[backend])
        self._say(f"{self._plan.slots} slots with their rules built in {time.monotonic() - start:.1f} s")
        self._yard = yard

    def _load_shapes(self) -> dict[str, _Run]:
        """Load all arrangements of root while there are no links yet, switched off."""
        count = self._plan.slots
        runs = {}
        for name in self._wanted(SHAPES):
            if name in SLOT_SHAPES:
                die = self._dies[name.removeprefix("slots-")]
                runs[name] = _Run(name, shapes.static_root(), slot_rules=die.rules)
            elif name == "none":
                runs[name] = _Run(name, shapes.no_rules())
            else:
                try:
                    runs[name] = self._load_rival(name, count)
                except NetslotError as error:
                    # A tool may not send as much at once as a large shape needs, without CAP_NET_ADMIN outside.
                    self.skipped[name] = error.message
                    self._say(f"{name} is left out: {error}")
        if self._dies:
            self._load(_Run("static", shapes.static_root()))
        return runs

    def _load_rival(self, name: str, count: int) -> _Run:
        if name == "root-nft-table-per-tenant":
            run = _Run(name, shapes.load_tables(count))
            run.root.switch(False)
            return run
        run = _Run(name, shapes.make(name, count))
        self._load(run)
        return run

    def _load(self, run: _Run) -> None:
        if run.root.legacy:
            run.legacy_tables, run.load_s = run.root.load_legacy()
        else:
            run.load_s = run.root.load()
            run.root.switch(False)
        self._say(f"{run.name}: {run.root.root_rules} rules loaded in {run.load_s:.1f} s")

    def _settle(self, name: str, run: _Run) -> _Run:
        """Give a shape its guests."""
        if name in SLOT_SHAPES:
            assert self._yard is not None
            guests = [self._yard.guest(slot) for slot in self._inhabited[name.removeprefix("slots-")]]
        elif name == "none":
            guests = [self._plain_guest(slot) for slot in self._positions]
        else:
            last = run.root.tenants or self._plan.slots
            guests = [self._bare_guest(slot) for slot in spread(last, self._plan.positions)]
        run.seat(guests)
        return run

    def _rounds(self, client: Client, runs: list[_Run]) -> None:
        """Every round measures every shape. Blocks are of one shape: each then has the caches to as few tenants."""
        groups: dict[str, list[_Run]] = {}
        for run in runs:
            groups.setdefault(run.root.name, []).append(run)
        plan = self._plan
        for number in range(plan.rounds):
            order = list(groups.values())
            self._dice.shuffle(order)
            for group in order:
                self._dice.shuffle(group)
                with _switched(group[0].root):
                    for run in group:
                        self._block(client, run, _share(plan.samples, plan.rounds, number))
            self._say(f"round {number + 1} of {plan.rounds} measured")
        for group in groups.values():
            with _switched(group[0].root):
                for run in group:
                    self._time_additions(run)

    def _legacy(self, client: Client, run: _Run) -> None:
        """Legacy tables cannot be switched off without a trace, so they come when all else has been measured."""
        for table in run.legacy_tables:
            table.put()
        self._block(client, run, self._plan.samples, budget_s=_BLOCK_S * self._plan.rounds)
        self._time_additions(run)

    def _block(self, client: Client, run: _Run, count: int, budget_s: float = _BLOCK_S) -> None:
        for guest in run.guests:
            if client.lets_denied_through(guest) != (run.name in ("none", "nat-only")):
                raise NetslotError(f"shape {run.name}: the rules of tenant {guest.slot} are not in force")
        with _pinned():
            client.block(run.guests, run.samples, count, self._dice, least=_LEAST_SAMPLES, budget_s=budget_s)

    def _time_additions(self, run: _Run) -> None:
        times = self._plan.add_times
        if run.name in SLOT_SHAPES:
            backend = run.name.removeprefix("slots-")
            run.add["netslot stamp"] = median(self._stamp_times(backend, 10 * times))
        elif run.name == "root-nft-verdict-map":
            run.add["netlink, netslot's code"] = median(shapes.verdict_map_netlink_us(run.root, 4 * times))
        if run.root.more:
            run.add[" ".join(run.root.tool)] = median(run.root.add_tenant_us(times))

    def _stamp_times(self, backend: str, times: int) -> list[float]:
        """µs of a stamp in each of ``times`` fresh namespaces."""
        taken = []
        values = {"guest_address": GUEST, "address": "10.201.0.3"}
        for _ in range(times):
            with netns.fresh():
                start = time.perf_counter()
                self._dies[backend].stamp(values)
                taken.append((time.perf_counter() - start) * 1e6)
        return taken

    def _plain_guest(self, slot: int) -> Guest:
        base = _PLAIN_POOL + 2 * slot
        place = Place(f"plain{slot}", f"plain{slot}", str(base), str(base + 1))
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
            _source_nat(place)
            self._bare[slot] = guest
        return self._bare[slot]


def _share(total: int, parts: int, part: int) -> int:
    """How many of ``total`` fall to one of ``parts``."""
    return total // parts + (part < total % parts)


def _source_nat(place: Place) -> None:
    """The NAT that a slot's rules have too, loaded by the tool."""
    inside = netns.open_named(place.netns)
    try:
        with netns.entered(inside):
            shapes.run_tool(shapes.NFT, render(SLOT_NFT_NAT, {"address": place.address}, file="bench.nft"))
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
