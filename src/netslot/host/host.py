"""The library's face: a host, its slots, its leases. What the command line does, Python can do with these.

Everything is safe to call from any thread; no caller's thread is ever moved into another namespace. From
asyncio, use ``asyncio.to_thread``.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netslot.errors import RefusedError, UsageError
from netslot.host import building, execution, leasing, showing, verifying
from netslot.host.building import Progress, Summary
from netslot.host.engine import DEFAULT_STATE_DIR, Engine
from netslot.host.leasing import Lease
from netslot.host.ledger import LeaseRecord, SlotRecord
from netslot.host.verifying import Report
from netslot.kernel import netns
from netslot.spec import roster
from netslot.spec.load import load
from netslot.spec.model import HostSpec


@dataclass(frozen=True)
class Slot:
    """One slot of a host, as it was when it was asked for."""

    number: int
    class_name: str
    state: str
    reason: str
    netns: str
    netns_path: str
    address: str
    owner: str | None
    tenant: str | None = None
    """Whose slot it is, where it is one of the roster's."""

    @property
    def fields(self) -> dict[str, Any]:
        """The machine output of ``ls``."""
        fields: dict[str, Any] = {
            "slot": self.number,
            "netns": self.netns,
            "netns_path": self.netns_path,
            "address": self.address,
            "state": self.state,
            "class": self.class_name,
        }
        if self.tenant is not None:
            fields["tenant"] = self.tenant
        if self.owner is not None:
            fields["owner"] = self.owner
        if self.reason:
            fields["reason"] = self.reason
        return fields


class Host:
    """One host, known by its state directory.

    ``root_netns`` names the namespace that is the host's root, as ``ip netns`` knows it; by default the caller's own.
    """

    def __init__(self, state_dir: str | Path = DEFAULT_STATE_DIR, *, root_netns: str | None = None) -> None:
        self._engine = Engine(Path(state_dir), root_netns)

    def close(self) -> None:
        """Let go of descriptors and threads; slots and leases stay."""
        self._engine.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """For netslot's own daemon and benchmarks; not part of the stable interface."""
        return self._engine

    @property
    def exists(self) -> bool:
        """Whether there is a host here since the machine was booted."""
        return self._engine.exists

    @property
    def spec(self) -> HostSpec:
        """The spec as ``up`` took it last."""
        return self._engine.spec

    # --- building ------------------------------------------------------------------------------------

    def up(
        self,
        spec: str | Path,
        *,
        slots: int | None = None,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> Summary:
        """Make the host as the spec file says: build, adopt, restamp, remove; what is right is not touched.

        ``slots`` overrides the number in a spec without classes. Set ``stop`` from another thread to end early.
        """
        loaded = load(Path(spec).resolve(), slots=slots)
        return building.up(self._engine, loaded, slots_override=slots, progress=progress, stop=stop)

    def down(self, *, force: bool = False, progress: Progress | None = None) -> int:
        """Remove the host with all it made; returns how many slots it had. RefusedError while slots are leased."""
        return building.down(self._engine, force=force, progress=progress)

    def status(self) -> Summary:
        """How many slots and rules there are."""
        return building.summary(self._engine)

    def counts(self) -> dict[tuple[str, str], int]:
        """How many slots there are by (class, state)."""
        return self._engine.ledger.counts()

    # --- slots ---------------------------------------------------------------------------------------

    def slots(self) -> list[Slot]:
        """All slots by number."""
        owners = {lease.slot: lease.owner for lease in self._engine.ledger.leases()}
        return [self._slot(record, owners.get(record.slot)) for record in self._engine.ledger.slots()]

    def slot(self, number: int) -> Slot:
        """One slot. UsageError when there is none of that number."""
        lease = self._engine.ledger.lease(slot=number)
        return self._slot(self._record(number), lease.owner if lease else None)

    def _record(self, number: int) -> SlotRecord:
        record = self._engine.ledger.slot(number)
        if record is None:
            raise UsageError(f"there is no slot {number}", hint="netslot ls lists them")
        return record

    def _slot(self, record: SlotRecord, owner: str | None) -> Slot:
        spec = self._engine.spec
        name = spec.name(record.slot)
        resident = spec.resident(record.slot, record.class_name)
        if resident is not None:
            address = roster.plain(resident.addresses[0])
        elif spec.addresses.pool is not None:
            address = str(spec.addresses.pair(record.slot)[1].ip)
        else:
            address = ""  # its tenant has left the roster
        path, tenant = str(netns.NETNS_DIR / name), resident.name if resident is not None else None
        return Slot(record.slot, record.class_name, record.state, record.reason, name, path, address, owner, tenant)

    def number(self, slot: str) -> int:
        """The number of a slot that is named by number or by the tenant whose it is. UsageError for neither."""
        own = self._engine.spec.by_tenant.get(slot)
        if own is not None:
            return own[0]
        if slot.isdecimal() and int(slot) > 0:
            return int(slot)
        raise UsageError(f"there is no slot {slot}", hint="netslot ls lists them")

    def attachment(self, number: int) -> dict[str, Any]:
        """What a workload needs to attach to a slot: names, addresses, MACs."""
        record = self._record(number)
        return leasing.attachment_fields(self._engine.plan(number, record.class_name))

    def show(self, number: int) -> dict[str, Any]:
        """Everything about a slot: links, addresses, rules with counters, lease, attachment."""
        slot = self.slot(number)
        lease = self.find(slot=number)
        plan = self._engine.plan(number, slot.class_name)
        inspection = self._engine.run(lambda _: showing.inspect(plan))
        fields = slot.fields | self.attachment(number)
        if lease is not None:
            fields |= lease.fields
        return fields | inspection

    def execute(
        self, number: int, command: Sequence[str], *, as_tenant: bool = False, user: tuple[int, int] | None = None
    ) -> int:
        """Run a command as :meth:`start` does, wait for it, and return its exit status (negative: by a signal)."""
        return self.start(number, command, as_tenant=as_tenant, user=user).wait()

    def start(
        self, number: int, command: Sequence[str], *, as_tenant: bool = False, user: tuple[int, int] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command in the slot, and in its cgroup where it has one.

        In a ``veth`` slot the command runs in the workload's namespace. It keeps the caller's user and capabilities,
        which is for looking around. ``as_tenant`` is how a ``process`` slot's workload must run, so that it can
        neither change the slot's rules nor pass them by: without any capability, never to get one, as ``user``
        (numeric user and group), by default one that no other slot's tenant has.
        """
        plan = self._engine.plan(number, self._record(number).class_name)
        own = execution.tenant_user(plan)
        return execution.start(plan, command, (user or (own, own)) if as_tenant else None)

    # --- leases --------------------------------------------------------------------------------------

    @contextmanager
    def acquire(self, owner: str, **options: Any) -> Iterator[Lease]:
        """Lease a slot for the length of a block; arguments as :meth:`lease`. RefusedError when none is free."""
        lease = self.lease(owner, **options)
        try:
            yield lease
        finally:
            self.release(lease=lease.id)

    def lease(
        self,
        owner: str,
        *,
        class_name: str | None = None,
        params: Mapping[str, object] | None = None,
        wait: float = 0.0,
        ttl: float | None = None,
        uid: int | None = None,
    ) -> Lease:
        """Lease a slot until it is released; see :func:`netslot.host.leasing.acquire`. Seconds for the times."""
        lease = leasing.acquire(
            self._engine, owner, class_name=class_name, params=params, wait=wait, ttl=ttl, uid=uid
        )
        if lease is None:
            raise RefusedError("no slot is free", hint="wait with --wait, or build more with netslot up")
        return lease

    def update(self, lease: str, params: Mapping[str, object]) -> Lease:
        """Change a running lease's parameters."""
        return leasing.update(self._engine, lease, params)

    def find(self, *, lease: str | None = None, owner: str | None = None, slot: int | None = None) -> Lease | None:
        """The lease with this id, of this owner, or of this slot."""
        record = self._engine.ledger.lease(lease=lease, owner=owner, slot=slot)
        return self._lease(record) if record is not None else None

    def leases(self) -> list[Lease]:
        """All leases by slot."""
        return [self._lease(record) for record in self._engine.ledger.leases()]

    def _lease(self, record: LeaseRecord) -> Lease:
        return Lease(record, self._engine.plan(record.slot, record.class_name))

    def release(
        self, *, lease: str | None = None, owner: str | None = None, slot: int | None = None, clean: bool = True
    ) -> int | None:
        """End a lease and make its slot ready for the next tenant; returns the slot, or None when there is no lease.

        ``slot`` also takes back a slot of state ``unknown``.
        """
        record = self._engine.ledger.lease(lease=lease, owner=owner, slot=slot)
        if record is not None:
            return record.slot if leasing.release(self._engine, record, clean=clean) else None
        if slot is not None and self._engine.ledger.abandon(slot):
            leasing.recover(self._engine)
            return slot
        return None

    # --- truth ---------------------------------------------------------------------------------------

    def verify(
        self,
        *,
        slots: Iterable[int] | None = None,
        repair: bool = False,
        thorough: bool = False,
        progress: Progress | None = None,
    ) -> Report:
        """Compare the kernel with what it should hold; see :func:`netslot.host.verifying.verify`."""
        return verifying.verify(self._engine, numbers=slots, repair=repair, thorough=thorough, progress=progress)
