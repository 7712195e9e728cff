"""What a slot costs to build: by netslot, by a bare loop of system calls, by a script, by CNI plugins."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from netslot.bench import commands, machine, slot_rules
from netslot.bench.field import prepare_root, quiet_ipv6
from netslot.bench.floor import Floor
from netslot.bench.full_slots import FullSlots
from netslot.bench.statistics import median
from netslot.bench.yard import host_spec, may_make_taps, plan_of
from netslot.errors import HostError, UsageError
from netslot.host.slots import Template, Workshop
from netslot.kernel import netns, sys

Say = Callable[[str], None]

DEFAULT_METHODS = ("netslot", "floor", "script", "cni")
METHODS = (*DEFAULT_METHODS, "policies")
_EDGE = 500
_MEMORY = ("Slab", "Percpu")


@dataclass(frozen=True, slots=True)
class Plan:
    """``chunk`` slots are built by each method in turn, so that both meet the same conditions.

    The script makes ``script_samples`` slots on an empty host and as many beside all others; the plugins
    connect ``cni_slots`` containers, of which the first and the last quarter are told apart.
    """

    slots: int
    methods: tuple[str, ...] = DEFAULT_METHODS
    chunk: int = 50
    script_samples: int = 30
    cni_slots: int = 60

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise UsageError(f"unknown method {unknown[0]}", hint=f"methods are {', '.join(METHODS)}")
        if not 2 <= self.slots <= 30_000:
            raise UsageError(f"{self.slots} slots: between 2 and 30,000 can be measured")
        if self.chunk < 1 or self.script_samples < 1 or self.cni_slots < 2:
            raise UsageError("chunk and script samples must be 1 or more, CNI slots 2 or more")


@dataclass(slots=True)
class _Run:
    """One method's times, slot by slot, in seconds, and the kernel memory that its slots took, in KiB."""

    method: str
    times: list[float] = field(default_factory=list)
    memory_kib: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    edge: int = _EDGE
    note: str | None = None

    def build(self, count: int, one: Callable[[int], object]) -> None:
        """Time ``one(0)`` to ``one(count - 1)``."""
        before = machine.memory_kib(*_MEMORY)
        times = self.times
        for place in range(count):
            start = time.perf_counter()
            one(place)
            times.append(time.perf_counter() - start)
        self.memory_kib += machine.memory_kib(*_MEMORY) - before

    def result(self) -> dict[str, Any]:
        count = len(self.times)
        edge = max(1, min(self.edge, count // 2))
        return {
            "method": self.method,
            "slots": count,
            "us_per_slot": _mean_us(self.times),
            "p50_us": round(median(self.times) * 1e6, 1),
            "first_500_us": _mean_us(self.times[:edge]),
            "last_500_us": _mean_us(self.times[-edge:]),
            "kib_per_slot": round(self.memory_kib / count, 1),
            "phases": {name: round(seconds / count * 1e6, 1) for name, seconds in self.phases.items()},
            "edge_slots": edge,
            "note": self.note,
        }


def _mean_us(times: Sequence[float]) -> float:
    return round(sum(times) / len(times) * 1e6, 1)


def measure_provision(plan: Plan, say: Say = lambda _: None) -> dict[str, Any]:
    """Measure on the stage that the calling process is on; the result is what ``bench provision --json`` prints."""
    if not may_make_taps():
        raise HostError("cannot use /dev/net/tun, which a slot's tap needs", hint="modprobe tun, or run as root")
    facts = machine.facts()
    waited = machine.wait_until_quiet()
    if waited > 3:
        say(f"waited {waited:.0f} s for the kernel to clean up older namespaces")
    runs: list[_Run] = []
    wanted = set(plan.methods)
    if wanted & {"netslot", "floor", "script", "policies"}:
        runs += _side_by_side(plan, wanted, say)
    if "cni" in wanted:
        runs += _cni(plan, say)
    return {"machine": facts, "waited_s": round(waited, 1), "runs": [run.result() for run in runs]}


def _side_by_side(plan: Plan, wanted: set[str], say: Say) -> list[_Run]:
    """netslot and the bare loop in turns, each with a root namespace of its own; the script beside netslot's."""
    with (
        netns.Worker(name="netslot-bench") as first,
        netns.Worker(name="netslot-floor") as second,
        _other_host() as third,
    ):
        first.run(prepare_root)
        second.run(_other_root)
        third.run(quiet_ipv6)
        script = _Script(plan)
        builders: list[tuple[netns.Worker, _Ours | _Bare | _Full]] = []
        builders += [(first, _Ours(plan))] if "netslot" in wanted else []
        builders += [(second, _Bare(plan))] if "floor" in wanted else []
        builders += [(third, _Full(plan))] if "policies" in wanted else []
        for worker, builder in builders:
            worker.run(builder.open)
        if "script" in wanted:
            first.run(script.sample, 0)
        done = 0
        while done < plan.slots and builders:
            size = min(plan.chunk, plan.slots - done)
            for worker, builder in builders if done // plan.chunk % 2 else reversed(builders):
                worker.run(builder.chunk, done, size)
            done += size
            if done % 500 < size:
                say(f"{done} of {plan.slots} slots built by each method")
        if "script" in wanted:
            first.run(script.sample, plan.slots)
        for worker, builder in builders:
            worker.run(builder.close)
        return [builder.run for _, builder in builders] + ([script.run] if "script" in wanted else [])


def _other_root() -> None:
    """One more root namespace; the thread does not go back."""
    sys.unshare(sys.CLONE_NEWNET)
    quiet_ipv6()


@contextlib.contextmanager
def _other_host() -> Iterator[netns.Worker]:
    """A worker with a root namespace of its own to call home."""

    def unshared() -> int:
        sys.unshare(sys.CLONE_NEWNET)
        return netns.open_own()

    with netns.Worker() as worker:
        root = worker.run(unshared)
    try:
        with netns.Worker(root, name="netslot-full") as worker:
            yield worker
    finally:
        os.close(root)


class _Ours:
    """netslot's own way of building a slot."""

    def __init__(self, plan: Plan) -> None:
        self.run = _Run("netslot")
        self._spec = host_spec(plan.slots)
        self._die = slot_rules.cast_backend("iptables-legacy")

    def open(self) -> None:
        self._workshop = Workshop()
        self._template = Template(early=(self._die,), late=())

    def chunk(self, done: int, size: int) -> None:
        workshop, template, spec = self._workshop, self._template, self._spec
        self.run.build(size, lambda place: workshop.build(plan_of(spec, done + place + 1), template))

    def close(self) -> None:
        self.run.phases = dict(self._workshop.seconds)
        self._workshop.close()


class _Full:
    """The same with all policies in each slot."""

    def __init__(self, plan: Plan) -> None:
        self.run = _Run("policies", note="iptables, nf_tables, bpf, cgroup, routes and rates in each slot")
        self._slots = FullSlots(plan.slots)

    def open(self) -> None:
        self._slots.open()

    def chunk(self, done: int, size: int) -> None:
        self.run.build(size, lambda place: self._slots.build(done + place + 1))

    def close(self) -> None:
        self.run.phases = dict(self._slots.workshop.seconds)
        self._slots.close()


class _Bare:
    """The bare loop. What it sends is worked out before each chunk, off the clock."""

    def __init__(self, plan: Plan) -> None:
        self.run = _Run("floor")
        self._spec = host_spec(plan.slots, prefix="bare")
        self._die = slot_rules.cast_backend("iptables-legacy")

    def open(self) -> None:
        self._floor = Floor()

    def chunk(self, done: int, size: int) -> None:
        plans = [plan_of(self._spec, done + place + 1) for place in range(size)]
        prepared = self._floor.prepare(plans, self._die)
        gc.collect()
        self.run.build(size, lambda place: self._floor.build(prepared[place]))

    def close(self) -> None:
        self.run.phases = dict(self._floor.seconds)
        self._floor.close()


class _Script:
    """Samples of the script: on the empty host, and on the full one."""

    def __init__(self, plan: Plan) -> None:
        self._samples = plan.script_samples
        self._spec = host_spec(2 * plan.script_samples, prefix="script")
        note = f"{self._samples} slots on an empty host, {self._samples} beside {plan.slots} slots"
        self.run = _Run("script", edge=self._samples, note=note)

    def sample(self, beside: int) -> None:
        first = 1 if not beside else 1 + self._samples
        # The far end of netslot's addresses, so that the two never meet on the host that they share.
        plans = [plan_of(self._spec, 32_000 + first + place) for place in range(self._samples)]
        self.run.build(self._samples, lambda place: commands.build_by_script(plans[place]))


def _cni(plan: Plan, say: Say) -> list[_Run]:
    missing = commands.cni_missing()
    if missing:
        say(f"CNI plugins are not measured: {', '.join(missing)} not in {commands.CNI_PATH}")
        return []
    note = f"{' + '.join(commands.CNI_PLUGINS)}, {plan.cni_slots} containers on an empty host"
    run = _Run("cni", edge=max(1, plan.cni_slots // 4), note=note)

    def act() -> None:
        sys.unshare(sys.CLONE_NEWNET)
        quiet_ipv6()
        run.build(plan.cni_slots, lambda place: commands.build_by_cni(f"cni{place}", place))

    with netns.Worker(name="netslot-cni") as worker:
        worker.run(act)
    return [run]
