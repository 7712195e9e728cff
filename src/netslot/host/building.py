"""``up`` and ``down``: make the kernel agree with the spec, touching nothing that is already right."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from netslot.errors import KernelError, NetslotError, RefusedError, SpecError, UsageError
from netslot.host import lint, root, root_forwarding, root_given, slots
from netslot.host.engine import Engine, read_tag
from netslot.host.ledger import SlotRecord, clock
from netslot.host.links import DOOMED_GROUP, ROOT_GROUP
from netslot.host.plan import SlotPlan, own_values, parse_tag
from netslot.host.slots import NotCleanError, Template, Workshop
from netslot.kernel import cgroupfs, netns, sockets
from netslot.kernel import rtnetlink as rt
from netslot.spec.model import HostSpec

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and how many there are to do."""

_BATCH = 50
_TOGETHER = 500
_DYING_SECONDS = 1.0


@dataclass(frozen=True)
class Summary:
    """What a host is. ``seconds`` is the time that building took, 0.0 when nothing was asked for."""

    slots: int
    free: int
    root_rules: int
    rules_per_slot: int
    rules_total: int
    seconds: float


def summary(engine: Engine, seconds: float = 0.0) -> Summary:
    """Numbers of the host as the ledger has them. Rules per slot are those of the class with the most."""
    counts = engine.ledger.counts()
    total = sum(counts.values())
    free = sum(count for (_, state), count in counts.items() if state == "free")
    snapshot = engine.root_snapshot
    root_rules = snapshot.rules if snapshot else 0
    by_class = {name: int(engine.ledger.get(f"rules:{name}") or 0) for name in {name for name, _ in counts}}
    all_rules = sum(by_class[name] * count for (name, _), count in counts.items())
    return Summary(total, free, root_rules, max(by_class.values(), default=0), root_rules + all_rules, seconds)


def up(
    engine: Engine,
    spec: HostSpec,
    *,
    slots_override: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    build: bool = True,
) -> Summary:
    """Build, adopt, restamp and remove slots until the host is as ``spec`` says.

    ``stop``, once set, ends the work after the slot at hand; what was built stays and the next ``up`` continues.
    Raises NetslotError then. Without ``build`` no slot is made that was not there: see :func:`refill`.
    """
    started = time.perf_counter()
    lint.refuse(spec)
    engine.run(lambda _: root_forwarding.current(spec))  # there is an uplink
    engine.run(lambda _: root_given.refuse(spec))
    ledger = engine.create()
    with engine.exclusive():
        before = {key: ledger.get(key) or "" for key in ("spec", "spec_digest")}
        _take_spec(engine, spec, slots_override)
        builder = _Builder(engine, progress, stop or threading.Event())
        try:
            for name in spec.classes:
                ledger.put(**{f"rules:{name}": str(sum(die.rules for die in engine.template(name).dies))})
            engine.run(builder.adopt)
            engine.run(builder.root)
        except SpecError:
            if before["spec"]:  # what a tool refuses must not become the spec of a running host
                ledger.put(**before)
            raise
        engine.write_identity()
        engine.run(builder.remove_surplus)
        engine.run(builder.refresh)
        if build:
            engine.run(builder.build_missing)
    return summary(engine, time.perf_counter() - started)


def _take_spec(engine: Engine, spec: HostSpec, slots_override: int | None) -> None:
    ledger = engine.ledger
    engine.recover_facts()
    if engine.root_netns is not None:
        ledger.put(root_netns=engine.root_netns)
    known = engine.ledger.get("spec_digest")
    if known and engine.ledger.slots():
        before = engine.spec
        if (before.prefix, before.addresses.pool) != (spec.prefix, spec.addresses.pool):
            raise UsageError(
                "prefix and pool of a host that has slots cannot change",
                hint="netslot down first, or another --state-dir",
            )
    engine.keep_spec(spec, slots_override)


class _Builder:
    """The steps of ``up``. Each may be repeated; each leaves a state that the next ``up`` or ``down`` recognises."""

    def __init__(self, engine: Engine, progress: Progress | None, stop: threading.Event) -> None:
        self.engine = engine
        self.ledger = engine.ledger
        self.spec = engine.spec
        self._progress = progress
        self._stop = stop

    def root(self, _: Workshop) -> None:
        """The static ruleset, and forwarding on the uplink."""
        before = self.engine.root_snapshot
        after = root.apply(self.spec, before, lambda planned: self.ledger.put(root=planned.dump()))
        self.ledger.put(root=after.dump())
        self.ledger.put(forwarding=root_forwarding.current(self.spec, self.ledger.get("forwarding")))
        root_forwarding.enable(self.spec)

    def adopt(self, workshop: Workshop) -> None:
        """Make the ledger agree with what is in the kernel. NetslotError when slots' names are taken by others."""
        known = {record.slot: record for record in self.ledger.slots()}
        pins = self.engine.pins()
        # A leased slot without its pin is left to verify: its tenant may still be at work in it.
        self.ledger.forget(
            number for number, record in known.items() if number not in pins and record.state != "leased"
        )
        found, foreign = [], []
        lost = not known and self.ledger.get("built") is None
        for number, name in pins.items():
            if number in known:
                continue
            tag = read_tag(name)
            if tag is None or tag[0] != self.engine.host_id:
                foreign.append(name)
            else:
                found.append((number, tag[2], tag[3]))
        if foreign:
            raise NetslotError(
                f"{foreign[0]} (and {len(foreign) - 1} more) are namespaces of somebody else",
                hint="use another prefix",
            )
        self._refuse_foreign_links(workshop)
        if lost:
            self.ledger.add(found, "unknown", "the ledger was lost: nobody knows whether this slot is leased")
        else:
            self.ledger.add(found)  # built by an `up` that was killed before it could write that down
        self.ledger.put(built="yes")

    def _refuse_foreign_links(self, workshop: Workshop) -> None:
        """Building removes a link that a dying slot left in root; one of that name must not be somebody else's."""
        deadline = time.monotonic() + _DYING_SECONDS
        while (link := self._residents_link(workshop)) is not None:
            # A slot whose `up` was killed before the link had its tag goes in a moment, and the link with it.
            if link.kind != "veth" or link.alias or time.monotonic() > deadline:
                raise NetslotError(
                    f"root has a link {link.name} already, which a slot of the roster is to have",
                    hint=f"ip link del {link.name}, once the tenant's workload no longer needs it",
                )
            time.sleep(_DYING_SECONDS / 100)
        for link in rt.links(workshop.root):
            digits = link.name.removeprefix(self.spec.prefix)
            if digits != link.name and digits.isdecimal() and link.group not in (ROOT_GROUP, DOOMED_GROUP):
                raise NetslotError(f"root's link {link.name} is not netslot's", hint="use another prefix")

    def _residents_link(self, workshop: Workshop) -> rt.Link | None:
        """A link of root's that is called as a resident's is to be, and is not this host's."""
        own = {one.link for each in self.spec.classes.values() for one in (each.residents or {}).values()}
        tagged = ((link, parse_tag(link.alias)) for link in rt.links(workshop.root) if link.name in own)
        return next((link for link, tag in tagged if tag is None or tag[0] != self.engine.host_id), None)

    def remove_surplus(self, workshop: Workshop) -> None:
        """Free slots that the spec no longer has go; leased ones stay until they are released."""
        self._remove(workshop, [one.slot for one in self.ledger.slots("free", "quarantined") if self._left(one)])
        built = {record.slot: record.class_name for record in self.ledger.slots()}
        for class_name, count in self.spec.surplus(built).items():
            spare = [r for r in self.ledger.slots("free", "quarantined") if r.class_name == class_name]
            self._remove(workshop, [record.slot for record in spare[-count:]] if count else [])

    def _left(self, record: SlotRecord) -> bool:
        """Whether a slot was some resident's who left the roster, or has other values now: it is built anew then."""
        each = self.spec.classes.get(record.class_name)
        if each is None or each.residents is None:
            return False
        resident = each.residents.get(record.slot)
        return resident is None or own_values(record.digest) != resident.digest

    def _remove(self, workshop: Workshop, doomed: Sequence[int]) -> None:
        claimed = self.ledger.claim_many(doomed, "free", "quarantined")
        for some in self._each("removing", list(batched(claimed, _TOGETHER))):
            remove(self.engine, workshop, some)
            self.ledger.forget(some)

    def refresh(self, workshop: Workshop) -> None:
        """Restamp free slots whose template changed; clean dirty ones; rebuild those in quarantine."""
        stale = [
            record
            for record in self.ledger.slots("free", "dirty", "quarantined")
            if self.spec.has(record.slot, record.class_name)
            and (record.state != "free" or record.digest != self.spec.digest(record.slot, record.class_name))
        ]
        if not stale:
            return
        processes = sockets.processes_by_namespace()
        taken = {record.slot for record in self.ledger.take_dirty()}
        try:
            for record in self._each("restamping", stale):
                # One after the other, so that the rest of the pool can be handed out meanwhile.
                if record.slot in taken or self.ledger.claim(record.slot, "free", "quarantined"):
                    with self.engine.holding(record.slot):
                        self._refresh(workshop, record, processes)
        finally:
            self.ledger.unclaim(taken | {record.slot for record in stale})

    def _refresh(self, workshop: Workshop, record: SlotRecord, processes: dict[int, list[int]]) -> None:
        plan = self.engine.plan(record.slot, record.class_name)
        template = self.engine.template(record.class_name)
        try:
            if record.state == "quarantined":
                rebuild(self.engine, plan, template, workshop)
            else:
                try:
                    slots.recycle(plan, template, workshop, lambda inode: processes.get(inode, []))
                except (NotCleanError, KernelError):
                    rebuild(self.engine, plan, template, workshop)
            self.ledger.settle(plan.number, plan.digest, ready_at=clock())
        except NetslotError as error:
            self.ledger.quarantine(plan.number, str(error))

    def build_missing(self, workshop: Workshop) -> None:
        built = {record.slot: record.class_name for record in self.ledger.slots()}
        wanted = self.spec.missing(built)
        names = set(netns.names())
        taken = [self.spec.name(number) for number, _ in wanted if self.spec.name(number) in names]
        if taken:
            raise NetslotError(f"/run/netns/{taken[0]} exists and is not netslot's", hint="use another prefix")
        done: list[tuple[int, str, str]] = []
        try:
            for number, class_name in self._each("building", wanted):
                plan = self.engine.plan(number, class_name)
                workshop.build(plan, self.engine.template(class_name))
                done.append((number, class_name, plan.digest))
                if len(done) == _BATCH:
                    self.ledger.add(done)
                    done = []
        finally:
            self.ledger.add(done)

    def build(self, workshop: Workshop, wanted: Sequence[tuple[int, str]], observe: Callable[[float], None]) -> int:
        """Build these, each to be handed out as soon as it is there; returns how many."""
        for count, (number, class_name) in enumerate(wanted):
            if self._stop.is_set():
                return count
            started = time.perf_counter()
            plan = self.engine.plan(number, class_name)
            workshop.build(plan, self.engine.template(class_name))
            self.ledger.add([(number, class_name, plan.digest)])
            observe(time.perf_counter() - started)
        return len(wanted)

    def _each(self, what: str, items: Sequence[T]) -> Iterator[T]:
        total = len(items)
        for count, item in enumerate(items):
            if self._stop.is_set():
                raise NetslotError(f"stopped while {what}: {count} of {total} done", hint="netslot up continues")
            if self._progress is not None:
                self._progress(what, count, total)
            yield item
        if self._progress is not None and total:
            self._progress(what, total, total)


def adopt(engine: Engine) -> None:
    """Make the ledger agree with what is in the kernel; no slot is touched."""
    with engine.exclusive():
        engine.run(_Builder(engine, None, threading.Event()).adopt)


def refill(engine: Engine, low: int, high: int, *, observe: Callable[[float], None], stop: threading.Event) -> int:
    """In each class with fewer than ``low`` free slots, build of those that the spec still wants until ``high`` are
    free. Returns how many were built; ``observe`` is told the seconds that each took."""
    ledger, wanted = engine.ledger, list[tuple[int, str]]()
    missing = engine.spec.missing({record.slot: record.class_name for record in ledger.slots()})
    if not missing:
        return 0
    counts = ledger.counts()
    for name in engine.spec.classes:
        free = counts.get((name, "free"), 0)
        if free < low:
            wanted += [each for each in missing if each[1] == name][: high - free]
    if not wanted:
        return 0
    with engine.exclusive():
        builder = _Builder(engine, None, stop)
        engine.run(builder.adopt)
        there = {record.slot for record in ledger.slots()}
        return engine.run(lambda w: builder.build(w, [each for each in wanted if each[0] not in there], observe))


def rebuild(engine: Engine, plan: SlotPlan, template: Template, workshop: Workshop) -> None:
    """Put a new slot in the place of one that cannot be cleaned."""
    remove(engine, workshop, [plan.number])
    workshop.build(plan, template)


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``items`` in runs of ``size``."""
    return (items[at : at + size] for at in range(0, len(items), size))


def remove(engine: Engine, workshop: Workshop, numbers: Sequence[int], ends: Mapping[int, int] | None = None) -> None:
    """Remove whatever there is of slots: links, pins, cgroups and who is in these. Absence is success.

    ``ends``: the index of root's end of the link by slot number, where somebody has just looked.
    """
    names = [engine.spec.name(number) for number in numbers]
    workshop.destroy(names, {engine.spec.name(number): index for number, index in (ends or {}).items()})
    for parent in {each.cgroup.parent for each in engine.spec.classes.values() if each.cgroup is not None}:
        for name in names:
            if cgroupfs.populated(f"{parent}/{name}"):
                cgroupfs.kill_and_wait(f"{parent}/{name}")
            cgroupfs.remove(f"{parent}/{name}", cgroupfs.CONTROLLERS)


def down(engine: Engine, *, force: bool = False, progress: Progress | None = None) -> int:
    """Remove the host: slots, root's rules, the state directory. Returns how many slots there were.

    RefusedError while slots are leased, unless ``force``; processes inside slots lose their network, and keep
    their namespace until they end.
    """
    ledger = engine.ledger
    with engine.serving(), engine.exclusive():
        engine.recover_facts()
        leases = ledger.leases()
        if leases and not force:
            raise RefusedError(
                f"{len(leases)} slots are leased, the first to {leases[0].owner}",
                hint="release them, or netslot down --force",
            )
        count = engine.run(lambda workshop: _take_down(engine, workshop, progress)) if ledger.get("spec") else 0
        state_dir = engine.state_dir
        engine.close()
        for pattern in ("ledger.db*", "facts.json", "identity", "lock", "*.lock", "netslot.sock"):
            for file in state_dir.glob(pattern):
                file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds files of somebody else's
        state_dir.rmdir()
    return count


def _with_cgroups(spec: HostSpec) -> set[int]:
    """The numbers of slots that have a cgroup, maybe nothing else: who built them died over it."""
    found = set[int]()
    for parent in {each.cgroup.parent for each in spec.classes.values() if each.cgroup is not None}:
        for place in cgroupfs.unified(parent).glob(f"{spec.prefix}*"):
            digits = place.name.removeprefix(spec.prefix)
            if digits.isdecimal():
                found.add(int(digits))
    return found


def _untagged(link: rt.Link, spec: HostSpec) -> int | None:
    """The number of the slot whose link this is, when its `up` was killed before the link had its tag."""
    digits = link.name.removeprefix(spec.prefix)
    ours = link.kind == "veth" and not link.alias and link.group == ROOT_GROUP and digits.isdecimal()
    return int(digits) if ours and link.name == spec.name(int(digits)) else None


def _take_down(engine: Engine, workshop: Workshop, progress: Progress | None) -> int:
    ledger, spec = engine.ledger, engine.spec
    known = {record.slot for record in ledger.slots()}
    for number, name in engine.pins().items():
        if number not in known:
            tag = read_tag(name)
            if tag is not None and tag[0] == engine.host_id:
                known.add(number)
    ends: dict[int, int] = {}
    for link in rt.links(workshop.root):
        tag = parse_tag(link.alias)
        if tag is not None and tag[0] == engine.host_id:
            ends[tag[1]] = link.ifindex
        elif (bare := _untagged(link, spec)) is not None:
            ends[bare] = link.ifindex
    known |= ends.keys() | _with_cgroups(spec)
    done = 0
    for some in batched(sorted(known), _TOGETHER):
        if progress is not None:
            progress("removing", done, len(known))
        remove(engine, workshop, some, ends)
        done += len(some)
    if progress is not None:
        progress("removing", done, len(known))
    for name in netns.names():
        digits = name.removeprefix(spec.prefix).removesuffix("-in")
        if name == f"{spec.prefix}{digits}-in" and digits.isdecimal():
            netns.unpin(name)
    for parent in {each.cgroup.parent for each in spec.classes.values() if each.cgroup is not None}:
        cgroupfs.remove(parent, cgroupfs.CONTROLLERS)
    snapshot = engine.root_snapshot
    if snapshot is not None:
        root.remove(snapshot)
    if not any(parse_tag(link.alias) for link in rt.links(workshop.root)):  # another host may need it here
        root_forwarding.restore(ledger.get("forwarding"))
    return len(known)
