"""Verify: read everything back, compare it with the dies, say in words what differs, and repair what is netslot's."""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from netslot.errors import KernelError, NetslotError, RefusedError
from netslot.host import building, leasing, links, root, root_given, slots, strange
from netslot.host.engine import Engine
from netslot.host.ledger import LeaseRecord, SlotRecord, State
from netslot.host.plan import SlotPlan
from netslot.host.slots import Workshop
from netslot.kernel.netlink import Socket
from netslot.policy.base import Die, Difference, Parameters, Values
from netslot.policy.cgroup import CgroupDie

ROOT = "root"

_THOROUGH = 250
"""Slots to look at thoroughly at once: that takes 0.1 ms more each with few slots on the host, 0.45 ms with 4,000,
mostly for the walk of the neighbour table that all namespaces share."""
_WORKERS_SECONDS = 0.5
"""How long a run that finds something waits, in all, for the kernel to finish what it does by itself: IPv6 adds an
address's local route when a worker gets to it (addrconf_dad_work() in net/ipv6/addrconf.c)."""
_VERIFIED: tuple[State, ...] = ("free", "leased", "unknown")


@dataclass(frozen=True)
class Report:
    """``drift`` is what was found, repaired or not; ``repaired`` how many places (slots, the root) were put right."""

    slots: int
    checked: int
    drift: list[Difference]
    repaired: int
    unrepaired: int
    seconds: float


def verify(
    engine: Engine,
    *,
    numbers: Iterable[int] | None = None,
    repair: bool = False,
    with_root: bool = True,
    thorough: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Compare the root ruleset and the slots (all, or ``numbers``) with what they should be.

    Slots that are being bound or cleaned are passed over, and leased ones that still have an earlier template:
    they get the present one when they are released. ``repair`` puts right what is netslot's own: leased
    slots keep their connections where that is possible. What no policy knows of (:mod:`netslot.host.strange`) is
    looked for in all slots if they are few or ``thorough`` is said, else in a share of them, each time another.
    """
    started = time.perf_counter()
    wanted = None if numbers is None else set(numbers)
    records = engine.ledger.slots(*_VERIFIED)
    check = _Check(engine, repair)
    spec = check.spec
    chosen = [
        record
        for record in records
        if (wanted is None or record.slot in wanted)
        and spec.has(record.slot, record.class_name)
        and (record.state == "free" or record.digest == spec.digest(record.slot, record.class_name))
    ]
    check.shares = 1 if thorough else -(-len(chosen) // _THOROUGH) or 1
    check.templates = {name: engine.template(name) for name in {record.class_name for record in chosen}}
    if with_root:
        engine.run(check.root)
    engine.run(lambda workshop: check.slots(workshop, chosen, progress))
    return Report(
        len(records), len(chosen), check.drift, check.repaired, check.unrepaired, time.perf_counter() - started
    )


class _Check:
    def __init__(self, engine: Engine, repair: bool) -> None:
        self._engine = engine
        # Taken once: the engine asks the ledger each time whether it still has them.
        self.spec = engine.spec
        self.templates: dict[str, slots.Template] = {}
        self.shares = 1
        self._host_id = engine.host_id
        self._repair = repair
        self.drift: list[Difference] = []
        self.repaired = 0
        self.unrepaired = 0
        leases = {lease.slot: lease for lease in engine.ledger.leases()}
        self._leases = leases
        self._patient_until: float | None = None

    def root(self, _: Workshop) -> None:
        """The root ruleset."""
        snapshot = self._engine.root_snapshot
        if snapshot is None:
            return
        given = root_given.differences(self.spec)  # not netslot's to repair
        self.drift += given
        self.unrepaired += bool(given)
        found = root.differences(snapshot)
        self.drift += found
        if found and self._repair:
            ledger = self._engine.ledger
            after = root.apply(self._engine.spec, snapshot, lambda planned: ledger.put(root=planned.dump()))
            ledger.put(root=after.dump())
            self._count(not root.differences(after))
        elif found:
            self.unrepaired += 1

    def slots(
        self,
        workshop: Workshop,
        records: Sequence[SlotRecord],
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        """Each slot inside, and root's end of its link."""
        ends = links.ask_root(workshop.root)
        turn = random.randrange(self.shares)
        for count, record in enumerate(records):
            if progress is not None and not count % 100:
                progress("verifying", count, len(records))
            plan = self._plan(record)
            values, lists = self._bound(plan, self._leases.get(record.slot))
            thorough = record.slot % self.shares == turn
            found = self._differences(plan, values, lists, ends.get(plan.root_if), thorough)
            if not found:
                continue
            with self._engine.holding(record.slot):
                self._look_again(workshop, record.slot)

    def _look_again(self, workshop: Workshop, number: int) -> None:
        """What looked wrong may have been a slot in change: look while nobody else works on it, then mend it."""
        ledger = self._engine.ledger
        record = ledger.slot(number)
        if record is None or record.state not in _VERIFIED:
            return
        resting = self._repair and record.state == "free"
        if resting and not ledger.claim(number, "free"):
            return  # just acquired: the next round sees to it
        before = self.unrepaired
        try:
            self._compare(workshop, record)
        finally:
            if resting and self.unrepaired == before:
                ledger.settle(number, record.digest, ready_at=record.ready_at)
            elif resting:
                ledger.quarantine(number, "; ".join(map(str, self.drift[-3:])))

    def _compare(self, workshop: Workshop, record: SlotRecord) -> None:
        plan = self._plan(record)
        values, lists = self._bound(plan, self._engine.ledger.lease(slot=record.slot))
        found = self._look(plan, workshop, values, lists)
        while found and plan.ipv6 and self._patient():
            time.sleep(_WORKERS_SECONDS / 25)
            found = self._look(plan, workshop, values, lists)
        self.drift += [Difference(f"slot {record.slot}: {each.where}", each.what) for each in found]
        if found and self._repair:
            self._mend(workshop, plan, record, values, lists)
        elif found:
            self.unrepaired += 1

    def _patient(self) -> bool:
        """Whether what looks wrong is looked at again."""
        now = time.monotonic()
        if self._patient_until is None:
            self._patient_until = now + _WORKERS_SECONDS
        return now < self._patient_until

    def _plan(self, record: SlotRecord) -> SlotPlan:
        return SlotPlan(self.spec, self.spec.classes[record.class_name], record.slot, self._host_id)

    def _bound(self, plan: SlotPlan, lease: LeaseRecord | None) -> tuple[Values, Parameters]:
        return leasing.split(plan.of.bind(lease.params if lease is not None else {}), plan)

    def _look(self, plan: SlotPlan, workshop: Workshop, values: Values, lists: Parameters) -> list[Difference]:
        return self._differences(plan, values, lists, links.ask_root(workshop.root).get(plan.root_if))

    def _differences(
        self, plan: SlotPlan, values: Values, lists: Parameters, end: links.Answers | None, thorough: bool = True
    ) -> list[Difference]:
        template = self.templates[plan.of.name]
        assert template.expectation is not None
        found = []
        if end is None:
            found.append(Difference(f"root link {plan.root_if}", "missing"))
        else:
            found += [Difference(f"root {where}", what) for where, what in template.expectation.root_drift(plan, end)]
        try:
            with slots.inside(plan):
                found += template.differences(plan, values, lists, thorough=thorough)
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
            found.append(Difference(f"namespace {plan.netns}", "missing"))
        return found

    def _look_settled(
        self, plan: SlotPlan, workshop: Workshop, values: Values, lists: Parameters
    ) -> list[Difference]:
        """What is left of a mended slot's drift, once IPv6 has had the time to do its part in links made anew."""
        until = time.monotonic() + _WORKERS_SECONDS
        while (left := self._look(plan, workshop, values, lists)) and plan.ipv6 and time.monotonic() < until:
            time.sleep(_WORKERS_SECONDS / 25)
        return left

    def _mend(
        self, workshop: Workshop, plan: SlotPlan, record: SlotRecord, values: Values, lists: Parameters
    ) -> None:
        template = self.templates[plan.of.name]
        try:
            try:
                mend(plan, template, workshop, values, lists)
            except (KernelError, slots.NotCleanError):
                building.rebuild(self._engine, plan, template, workshop)
                rebind(plan, template, values, lists)
            left = self._look_settled(plan, workshop, values, lists)
            if left and record.state == "free":  # nobody's connections are in it
                building.rebuild(self._engine, plan, template, workshop)
                left = self._look_settled(plan, workshop, values, lists)
        except NetslotError as error:
            self.drift.append(Difference(f"slot {record.slot}", f"cannot be repaired: {error}"))
            self._count(False)
            return
        self._count(not left)

    def _count(self, success: bool) -> None:
        self.repaired += success
        self.unrepaired += not success


def mend(plan: SlotPlan, template: slots.Template, workshop: Workshop, values: Values, lists: Parameters) -> None:
    """Put links and policies of a slot in use right, with its lease's parameters."""
    assert template.expectation is not None
    wanted = template.expectation.slot(plan)
    with contextlib.ExitStack() as held:
        with slots.inside(plan):
            slot = held.enter_context(Socket())
            strange.clear(plan, slot, links.ask(plan, slot))
            slots.mend_links(plan, wanted, workshop, slot)
            for die in template.dies:
                if die.read(values, lists):
                    _mend_policy(die, plan, values, lists)
        if (end := links.ask_root(workshop.root).get(plan.root_if)) is not None:
            workshop.root.execute(links.clear_root(template.expectation.root(plan), end))
        workshop.open_root_side(plan, slot)


def _mend_policy(die: Die, plan: SlotPlan, values: Values, lists: Parameters) -> None:
    """In place if that is enough: a reset empties what counts, and ends the processes of a cgroup."""
    try:
        die.bind(values, lists)
    except KernelError as error:
        if error.errno == errno.EBUSY and isinstance(die, CgroupDie):
            raise RefusedError(f"the tenant uses more than its limit allows: {error}") from error
    else:
        if not die.read(values, lists):
            return
    die.reset(plan.values)
    die.bind(values, lists)


def rebind(plan: SlotPlan, template: slots.Template, values: Values, lists: Parameters) -> None:
    """Put a lease's parameters in force in a slot that was just built again."""
    with slots.inside(plan):
        for die in template.dies:
            die.bind(values, lists)
