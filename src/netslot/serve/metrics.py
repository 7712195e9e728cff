"""Figures in Prometheus form. Gauges are read from the ledger when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from netslot.host import showing, slots
from netslot.host.engine import Engine
from netslot.host.ledger import STATES
from netslot.host.plan import SlotPlan
from netslot.kernel import cgroupfs

_FAST = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1.0)
_SLOW = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
_TRAFFIC = ("packets", "drops")


class Metrics:
    """All figures of one daemon."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Slots(engine))
        new: dict[str, Any] = {"registry": self._registry}
        self.acquire = Histogram(
            "netslot_acquire_seconds", "Granting a lease, without waiting.", buckets=_FAST, **new
        )
        self.recycle = Histogram("netslot_recycle_seconds", "Making a slot as new.", buckets=_SLOW, **new)
        self.build = Histogram("netslot_build_seconds", "Building a slot.", buckets=_SLOW, **new)
        self.verify = Histogram("netslot_verify_seconds", "Verifying one share of the slots.", buckets=_SLOW, **new)
        self.refused = Counter("netslot_acquire_refused", "Requests that found no free slot.", **new)
        self.ended = Counter("netslot_leases_ended", "Leases ended by the daemon.", ["why"], **new)
        self.drift = Counter("netslot_drift_found", "Differences found.", **new)
        self.repaired = Counter("netslot_drift_repaired", "Slots, and times the root ruleset, repaired.", **new)
        self.waiting = Gauge("netslot_waiting", "Requests that wait for a slot.", **new)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Slots(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        counts = self._engine.ledger.counts()
        gauge = GaugeMetricFamily("netslot_slots", "Slots by class and state.", labels=("class", "state"))
        for name in sorted({name for name, _ in counts}):
            for state in STATES:
                gauge.add_metric((name, state), counts.get((name, state), 0))
        yield gauge
        snapshot = self._engine.root_snapshot
        root = "Rules that netslot has in the root namespace."
        yield GaugeMetricFamily("netslot_root_rules", root, value=snapshot.rules if snapshot else 0)


def traffic(plan: SlotPlan) -> bytes:
    """Packets and drops of a slot's links, and what its BPF counters say, as more lines for :meth:`Metrics.text`.

    Runs on a worker thread.
    """
    with slots.inside(plan), open("/proc/thread-self/net/dev", encoding="ascii") as file:
        rows = [line.replace(":", " ").split() for line in file.readlines()[2:]]
        counted = showing.counted(plan).get("traffic", {})
    lines = []
    for row in rows:
        for direction, start in (("receive", 1), ("transmit", 9)):
            figures = {"packets": row[start + 1], "drops": row[start + 3]}
            for name in _TRAFFIC:
                labels = f'slot="{plan.number}",link="{row[0]}",direction="{direction}"'
                lines.append(f"netslot_slot_{name}_total{{{labels}}} {figures[name]}")
    typed = [f"# TYPE netslot_slot_{name}_total counter" for name in _TRAFFIC]
    by_name = [[line for line in lines if line.startswith(f"netslot_slot_{name}")] for name in _TRAFFIC]
    return (
        "\n".join(part for head, body in zip(typed, by_name, strict=True) for part in (head, *body)) + "\n"
    ).encode() + _counted(plan.number, counted)


def _counted(number: int, by_hook: dict[str, dict[str, dict[str, int]]]) -> bytes:
    """What passed the uplink or the link to the workload, and what programs dropped there."""
    lines: list[str] = []
    for link, unit in product(("uplink", "guest"), ("packets", "bytes")):
        name = f"netslot_slot_{link}_{unit}_total"
        hooks = [hook for hook in by_hook if hook.startswith("guest/") == (link == "guest")]
        lines += [f"# TYPE {name} counter"] if hooks else []
        for hook in hooks:
            for verdict, amounts in by_hook[hook].items():
                labels = f'slot="{number}",direction="{hook.removeprefix("guest/")}",verdict="{verdict}"'
                lines.append(f"{name}{{{labels}}} {amounts[unit]}")
    return "".join(f"{line}\n" for line in lines).encode()


def usage(plan: SlotPlan) -> bytes:
    """What the slot's cgroup uses and waits for, in the same form; nothing for a slot without one."""
    path = plan.values.get("cgroup")
    if path is None:
        return b""
    lines = []
    for name, value in cgroupfs.usage(path)._asdict().items():
        if value is not None:
            kind = "counter" if name == "cpu_seconds" else "gauge"
            metric = f"netslot_slot_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# TYPE {metric} {kind}", f'{metric}{{slot="{plan.number}"}} {value}']
    return ("\n".join(lines) + "\n").encode()
