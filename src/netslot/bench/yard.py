"""Slots for benchmarks: netslot's own, built by the code that ``netslot up`` runs, with the benchmark's rules."""

from __future__ import annotations

import os
from pathlib import Path

from netslot.bench.field import Guest
from netslot.bench.tenants import GATEWAY, GUEST, SLOT_PREFIX, UPLINK
from netslot.host.plan import SlotPlan
from netslot.host.slots import Template, Workshop
from netslot.kernel import netns
from netslot.policy.base import Die
from netslot.spec.load import parse
from netslot.spec.model import HostSpec

HOST_ID = "bench"

_SPEC = f"""
prefix = "{{prefix}}"
uplink = "{UPLINK}"

[addresses]
pool = "10.201.0.0/16"
guest = "{GUEST}/30"
gateway = "{GATEWAY}"

[class.machine]
slots = {{slots}}
[class.machine.attachment]
kind = "tap"

[class.container]
slots = 1
[class.container.attachment]
kind = "veth"
interface = "tap0"
"""


def host_spec(slots: int, prefix: str = SLOT_PREFIX) -> HostSpec:
    """``slots`` sandboxes with a tap each; in those of class ``container`` a guest can live."""
    return parse(_SPEC.format(slots=slots, prefix=prefix), Path("bench.toml"))


def plan_of(spec: HostSpec, number: int, kind: str = "machine") -> SlotPlan:
    return SlotPlan(spec, spec.classes[kind], number, HOST_ID)


def may_make_taps() -> bool:
    return os.access("/dev/net/tun", os.R_OK | os.W_OK)


class Yard:
    """Makes slots in the calling :class:`netns.Worker` thread's namespace."""

    def __init__(self, slots: int) -> None:
        self.spec = host_spec(slots)
        self.workshop = Workshop()
        self._empty_kind = "machine" if may_make_taps() else "container"

    def close(self) -> None:
        self.workshop.close()

    def build(self, number: int, die: Die, *, with_guest: bool = False) -> None:
        """Make slot ``number`` with the rules of ``die``: with a tap, or with a guest's namespace behind it.

        Where /dev/net/tun cannot be used, as in many containers, every slot is one that a guest can live in.
        """
        plan = plan_of(self.spec, number, "container" if with_guest else self._empty_kind)
        self.workshop.build(plan, Template(early=(die,), late=()))

    def guest(self, number: int) -> Guest:
        """The guest of a slot that was built with one."""
        plan = plan_of(self.spec, number, "container")
        assert plan.inner_netns is not None
        return Guest(number, netns.open_named(plan.inner_netns))
