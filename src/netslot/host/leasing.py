"""Leases: a slot handed out with a tenant's own parameters, changed while it runs, taken back and cleaned."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from netslot.errors import KernelError, NetslotError, RefusedError, UsageError
from netslot.host import building, slots
from netslot.host.engine import Engine
from netslot.host.ledger import LeaseRecord, SlotRecord, clock, is_alive
from netslot.host.plan import SlotPlan
from netslot.host.slots import NotCleanError, Workshop
from netslot.kernel import netns, sockets
from netslot.policy.base import Parameters, Values
from netslot.spec.parameters import Bound
from netslot.spec.roster import Resident

_POLL = 0.01


@dataclass(frozen=True)
class Lease:
    """A lease and all that a platform needs to attach its workload."""

    record: LeaseRecord
    plan: SlotPlan
    new: bool = False
    """Whether this call made the lease; not so when its owner held it already."""

    @property
    def slot(self) -> int:
        return self.record.slot

    @property
    def id(self) -> str:
        return self.record.lease

    @property
    def owner(self) -> str:
        return self.record.owner

    @property
    def netns(self) -> str:
        return self.plan.netns

    @property
    def netns_path(self) -> str:
        return str(netns.NETNS_DIR / self.plan.netns)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The machine output of ``acquire``."""
        return {
            "slot": self.slot,
            "class": self.record.class_name,
            "owner": self.owner,
            "lease": self.id,
            "params": dict(self.record.params),
            "acquired_at": datetime.fromtimestamp(self.record.acquired_at, UTC).isoformat(),
            "expires_at": (
                datetime.fromtimestamp(time.time() + self.record.expires_at - clock(), UTC).isoformat()
                if self.record.expires_at is not None
                else None
            ),
            **attachment_fields(self.plan),
        }


def attachment_fields(plan: SlotPlan) -> dict[str, Any]:
    """What a workload needs to know to attach to the slot; addresses without prefix lengths."""
    if plan.resident is not None:
        return _resident_fields(plan, plan.resident)
    values, attachment = plan.values, plan.of.attachment
    inner = plan.guest_if is not None
    gateway = values["gateway"] if inner else values["root_address"]
    guest = values["guest_address"] if inner else values["address"]
    length = int(values["guest_prefix_length"] if inner else values["prefix_length"])
    mac = attachment.guest_mac if inner else values["uplink_mac"]
    dns = [str(server) for server in plan.addresses.dns]
    tap = plan.guest_if if attachment.kind == "tap" else None
    fields: dict[str, Any] = {
        "netns": plan.netns,
        "netns_path": str(netns.NETNS_DIR / plan.netns),
        "attachment": attachment.kind,
        "tap": tap,
        "guest_address": guest,
        "gateway": gateway,
        "prefix_length": length,
        "slot_address": values["address"],
        "guest_mac": mac,
        "gateway_mac": attachment.gateway_mac if inner else values["root_mac"],
        "mtu": attachment.mtu,
        "cgroup": values.get("cgroup"),
        "dns": dns,
    }
    if plan.ipv6:
        fields |= {
            "guest_address6": values["guest_address6"] if inner else values["address6"],
            "gateway6": values["gateway6"] if inner else values["root_address6"],
            "slot_address6": values["address6"],
        }
    if plan.inner_netns is not None:
        fields["workload_netns"] = plan.inner_netns
        fields["workload_netns_path"] = str(netns.NETNS_DIR / plan.inner_netns)
    if tap is not None:
        mask = str(plan.addresses.guest.netmask)
        resolvers = ":".join(["", *dns[:2]]) if dns else ""
        fields["kernel_ip_argument"] = f"ip={guest}::{gateway}:{mask}::eth0:off{resolvers}"
        fields["firecracker"] = {"iface_id": "eth0", "host_dev_name": tap, "guest_mac": mac}
    return fields


def _resident_fields(plan: SlotPlan, resident: Resident) -> dict[str, Any]:
    """As :func:`attachment_fields`: the tenant has the addresses and gateways that the roster says."""
    attachment, values = plan.of.attachment, plan.values
    addresses, gateways = resident.first_addresses(), resident.first_gateways()
    guest = plan.wiring.guest
    tap = plan.guest_if if attachment.kind == "tap" else None
    fields: dict[str, Any] = {
        "tenant": resident.name,
        "netns": plan.netns,
        "netns_path": str(netns.NETNS_DIR / plan.netns),
        "attachment": attachment.kind,
        "tap": tap,
        "guest_address": addresses.get(4),
        "gateway": gateways.get(4),
        "prefix_length": 32,
        "slot_address": addresses.get(4),
        "guest_mac": values.get("guest_mac") if guest is not None else values["uplink_mac"],
        "gateway_mac": attachment.gateway_mac if guest is not None else values["root_mac"],
        "mtu": attachment.mtu,
        "cgroup": values.get("cgroup"),
        "dns": [str(server) for server in plan.addresses.dns],
    }
    if plan.ipv6:
        fields |= {
            "guest_address6": addresses.get(6),
            "gateway6": gateways.get(6) or (str(guest.own[0].ip) if guest is not None else None),
            "slot_address6": addresses.get(6),
        }
    if plan.inner_netns is not None:
        fields["workload_netns"] = plan.inner_netns
        fields["workload_netns_path"] = str(netns.NETNS_DIR / plan.inner_netns)
    if tap is not None:
        fields["firecracker"] = {"iface_id": "eth0", "host_dev_name": tap} | (
            {"guest_mac": resident.mac} if resident.mac is not None else {}
        )
    return fields


def split(bound: Mapping[str, Bound], plan: SlotPlan) -> tuple[Values, Parameters]:
    """Bound parameters as dies take them: scalars among the slot's values, lists apart."""
    scalars = {name: value for name, value in bound.items() if isinstance(value, str)}
    lists = {name: value for name, value in bound.items() if not isinstance(value, str)}
    return {**plan.values, **scalars}, lists


def acquire(
    engine: Engine,
    owner: str,
    *,
    class_name: str | None = None,
    params: Mapping[str, object] | None = None,
    wait: float = 0.0,
    ttl: float | None = None,
    uid: int | None = None,
) -> Lease | None:
    """Lease a slot to ``owner``; an owner that holds one gets the same again, and one of the roster its own.

    All parameters hold before this returns. None when no slot is free; with ``wait``, only after that many
    seconds, and those who ask are served in the order in which they came. UsageError for a class or parameter
    that the spec does not have.
    """
    request = Request(owner, class_name, params or {}, os.getuid() if uid is None else uid, ttl)
    deadline = time.monotonic() + wait
    ticket = engine.ledger.queue_up(queue_of(engine, owner, class_name)) if wait > 0 else None
    try:
        while True:
            lease = grant(engine, request, ticket)
            if lease is not None:
                return lease
            if end_overdue(engine) + recover(engine):
                continue
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL)
    finally:
        if ticket is not None:
            engine.ledger.leave_queue(ticket)


@dataclass(frozen=True)
class Request:
    """What is asked for: ``uid`` is the user who asks, ``holder`` the process that the lease is to end with."""

    owner: str
    class_name: str | None
    params: Mapping[str, object]
    uid: int
    ttl: float | None = None
    holder: str = ""


def class_of(engine: Engine, owner: str, name: str | None) -> tuple[str, int | None]:
    """The class ``name``, or where the owner's slot is if the roster has one, or the spec's first; and that slot.

    UsageError where the class's slots are others'.
    """
    spec = engine.spec
    own = spec.by_tenant.get(owner)
    if own is not None and name in (None, own[1]):
        return own[1], own[0]
    chosen = name or next((each.name for each in spec.classes.values() if each.residents is None), None)
    if chosen is None or (chosen in spec.classes and spec.classes[chosen].residents is not None):
        hint = "an owner gets the slot that the roster has under its name"
        raise UsageError(f"the roster has no slot for {owner}" + (f" in class {name}" if name else ""), hint=hint)
    return chosen, None


def queue_of(engine: Engine, owner: str, name: str | None) -> str:
    """Where to wait for a slot: with all who want one of the class, or alone for one's own."""
    chosen, own = class_of(engine, owner, name)
    return chosen if own is None else f"{chosen} {own}"


def grant(engine: Engine, request: Request, ticket: int | None = None) -> Lease | None:
    """Lease a slot if one is free and nobody stands before ``ticket``; None when not. Errors as :func:`acquire`.

    RefusedError when the owner has a lease of another user's, or of another class.
    """
    if not request.owner or len(request.owner) > 200:
        raise UsageError("an owner is a text of 1 to 200 characters")
    name, only = class_of(engine, request.owner, request.class_name)
    of = engine.class_spec(name)
    bound = of.bind(request.params)
    binding = any(bound[key] != of.parameters[key].default for key in request.params)
    record, new = engine.ledger.acquire(
        secrets.token_hex(8),
        request.owner,
        name,
        bound,
        uid=request.uid,
        binding=binding,
        ttl=request.ttl,
        holder=request.holder,
        ticket=ticket,
        only=only,
    )
    if record is None:
        return None
    if new and binding:
        _bind_new(engine, record, bound)
    if not new:
        _refuse_other(request, record)
        slot = engine.ledger.slot(record.slot)
        if slot is None or slot.state == "binding":
            return None  # another process is at it, or died over it
    return Lease(record, engine.plan(record.slot, record.class_name), new)


def _refuse_other(request: Request, record: LeaseRecord) -> None:
    if request.uid not in (0, record.uid):
        raise RefusedError(f"{request.owner} holds a lease of another user's")
    if request.class_name not in (None, record.class_name):
        raise RefusedError(
            f"{request.owner} holds slot {record.slot} of class {record.class_name}", hint="release it first"
        )


def end_overdue(engine: Engine, *, holders: bool = True) -> int:
    """End the leases whose time has run out or, with ``holders``, whose process has ended; returns how many.

    Their slots are dirty then.
    """
    over = engine.ledger.expired()
    if holders:
        over += [each for each in engine.ledger.held() if not is_alive(each.holder)]
    return sum(engine.ledger.release(each.lease) is not None for each in over)


def _bind_new(engine: Engine, record: LeaseRecord, bound: Mapping[str, Bound]) -> None:
    plan = engine.plan(record.slot, record.class_name)

    def put(_: Workshop) -> None:
        with engine.holding(record.slot):
            _bind(engine, plan, bound)

    try:
        engine.run(put)
    except BaseException:
        engine.ledger.release(record.lease)
        recover(engine)
        raise
    engine.ledger.bound(record.slot)


def _bind(engine: Engine, plan: SlotPlan, bound: Mapping[str, Bound]) -> None:
    values, lists = split(bound, plan)
    with slots.inside(plan):
        for die in engine.template(plan.of.name).dies:
            die.bind(values, lists)


def update(engine: Engine, lease: str, params: Mapping[str, object]) -> Lease:
    """Change a running lease's parameters, those named in ``params``; the others stay as they are.

    Every packet is judged by the old values or the new ones, and established connections stay. Written down
    first: after a crash in between, ``verify --repair`` puts the new values in force.
    """
    record = _existing(engine, lease)
    plan = engine.plan(record.slot, record.class_name)
    plan.of.bind(params)  # nonsense is refused before anything waits

    def change(_: Workshop) -> LeaseRecord:
        with engine.holding(record.slot):
            current = _existing(engine, lease)
            slot = engine.ledger.slot(record.slot)
            if slot is not None and slot.digest != plan.digest:
                raise RefusedError(
                    f"slot {record.slot} has the template of before the last reload",
                    hint="release it, acquire another",
                )
            before = plan.of.bind(current.params)
            after = plan.of.bind({**current.params, **params})
            engine.ledger.rebound(lease, after)
            try:
                _bind(engine, plan, after)
            except BaseException:
                engine.ledger.rebound(lease, before)
                _bind(engine, plan, before)
                raise
            return _existing(engine, lease)

    return Lease(engine.run(change), plan)


def _existing(engine: Engine, lease: str) -> LeaseRecord:
    record = engine.ledger.lease(lease=lease)
    if record is None:
        raise RefusedError(f"there is no lease {lease}", hint="netslot ls --state leased")
    return record


def release(engine: Engine, record: LeaseRecord, *, clean: bool = True) -> bool:
    """End a lease. With ``clean`` its slot is made ready for the next tenant at once, otherwise by :func:`recover`.

    False when it had ended already.
    """
    number = engine.ledger.release(record.lease)
    if number is None:
        return False
    if clean:
        recover(engine)
    return True


def recover(engine: Engine, *, most: int | None = None, observe: Callable[[float], None] | None = None) -> int:
    """Clean the dirty slots that nobody else is at, up to ``most``, and undo what dead processes left half done.

    Returns how many slots became free. A slot that cannot be cleaned is rebuilt, or else put in quarantine.
    ``observe`` is told the seconds that each took.
    """
    records = engine.ledger.take_dirty(most)
    if not records:
        return 0
    try:
        return engine.run(lambda workshop: _clean(engine, workshop, records, observe or (lambda _: None)))
    finally:
        engine.ledger.unclaim(record.slot for record in records)


def _clean(
    engine: Engine, workshop: Workshop, records: Sequence[SlotRecord], observe: Callable[[float], None]
) -> int:
    processes = sockets.processes_by_namespace()
    freed = 0
    for record in records:
        started = time.perf_counter()
        with engine.holding(record.slot):
            freed += clean_one(engine, workshop, record, processes)
        observe(time.perf_counter() - started)
    return freed


def clean_one(engine: Engine, workshop: Workshop, record: SlotRecord, processes: Mapping[int, list[int]]) -> bool:
    """Make one claimed slot as new; True when it is free again."""
    try:
        plan = engine.plan(record.slot, record.class_name)
    except UsageError:  # its class is gone from the spec, and so is the slot now
        building.remove(engine, workshop, [record.slot])
        engine.ledger.forget([record.slot])
        return False
    template = engine.template(record.class_name)
    try:
        slots.recycle(plan, template, workshop, lambda inode: processes.get(inode, []))
    except (NotCleanError, KernelError) as reason:
        engine.ledger.quarantine(record.slot, str(reason))
        try:
            building.rebuild(engine, plan, template, workshop)
        except NetslotError as error:
            engine.ledger.quarantine(record.slot, f"{reason}; and it cannot be rebuilt: {error}")
            return False
    engine.ledger.settle(record.slot, plan.digest, ready_at=clock() + engine.spec.hold_down)
    return True
