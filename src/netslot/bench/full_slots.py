"""Slots with all five policies: what one costs to build beside one with iptables alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from netslot.bench.tenants import GATEWAY, GUEST, SLOT_IPTABLES, UPLINK
from netslot.bench.yard import HOST_ID
from netslot.host import templates
from netslot.host.plan import SlotPlan
from netslot.host.slots import Workshop
from netslot.kernel import cgroupfs
from netslot.policy.cgroup import CgroupDie
from netslot.spec.load import load

_SPEC = f"""
slots = {{slots}}
prefix = "full"
uplink = "{UPLINK}"
[addresses]
pool = "10.201.0.0/16"
guest = "{GUEST}/30"
gateway = "{GATEWAY}"
[attachment]
kind = "tap"
[rules]
backend = "iptables-legacy"
ipv4 = "slot.rules"
[nat]
kind = "bpf"
[parameters.allow]
type = "cidrs"
default = ["198.51.100.0/24", "203.0.113.0/24"]
[bpf]
counters = true
[bpf.filter]
allow = "allow"
[cgroup]
parent = "{{parent}}"
cpu = 1
memory = "64Mi"
pids = 50
[[routes.routes]]
to = "192.0.2.0/24"
kind = "blackhole"
[[routes.routes]]
to = "default"
via = "${{{{root_address}}}}"
table = 100
[[routes.rules]]
priority = 100
table = 100
mark = 7
[rates]
connections = 100
[rates.egress]
bandwidth = "80M"
packets = 5000
"""
"""The benchmark's iptables rules; NAT, counters and a filter in BPF; limits by cgroup; two routes and a rule; limits
of bandwidth, packets and connections (a token bucket, and an nf_tables table)."""


_CGROUPS = "netslot-bench-"


class FullSlots:
    """Makes them, once opened on a :class:`netns.Worker` thread, whose home is their root namespace."""

    def __init__(self, slots: int) -> None:
        self._parent, self._held = cgroupfs.claim(_CGROUPS)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "netslot.toml"
            file.write_text(_SPEC.format(slots=slots, parent=self._parent), encoding="utf-8")
            (file.parent / "slot.rules").write_text(SLOT_IPTABLES.partition("*nat")[0], encoding="utf-8")
            self._spec = load(file)
        (self._class,) = self._spec.classes.values()
        self._template = templates.cast(self._spec, self._class, HOST_ID)
        self._built: list[SlotPlan] = []

    def open(self) -> None:
        self.workshop = Workshop()

    def build(self, number: int) -> None:
        plan = SlotPlan(self._spec, self._class, number, HOST_ID)
        self._built.append(plan)
        self.workshop.build(plan, self._template)

    def close(self) -> None:
        """Remove the cgroups: all else goes with the namespaces."""
        self.workshop.close()
        (die,) = (die for die in self._template.dies if isinstance(die, CgroupDie))
        for plan in self._built:
            die.remove(plan.values)
        cgroupfs.remove(self._parent, die.controllers)
        os.close(self._held)
