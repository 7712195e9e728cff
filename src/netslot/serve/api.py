"""The daemon's operations. Each handler has the name of its operation in :mod:`netslot.serve.wire`."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, ParamSpec, TypeVar

from aiohttp import web

from netslot.errors import NetslotError, RefusedError, UsageError
from netslot.host import leasing
from netslot.host.host import Host
from netslot.host.leasing import Lease
from netslot.host.ledger import LeaseRecord, SlotRecord, identify
from netslot.serve import metrics as figures
from netslot.serve.answers import ForbiddenError, MissingError, answer, read_body
from netslot.serve.holders import Holders, open_holder
from netslot.serve.metrics import Metrics
from netslot.serve.openapi import description
from netslot.serve.peers import Peer, peer_of
from netslot.serve.upkeep import Upkeep
from netslot.serve.wire import OPERATIONS, AcquireBody, UpdateBody, VerifyBody

P = ParamSpec("P")
T = TypeVar("T")

_POLL = 0.02  # for slots whose rest ends, and those that other processes free


class Api:
    """Answers requests.

    What only reads or writes the ledger is done at once, in less time than it takes to hand it to a thread. What
    touches the kernel goes to a thread, one after the other.
    """

    def __init__(self, host: Host, upkeep: Upkeep, metrics: Metrics, changed: asyncio.Event) -> None:
        self._host = host
        self._engine = host.engine
        self._upkeep = upkeep
        self._metrics = metrics
        self._front = ThreadPoolExecutor(1, thread_name_prefix="binding")
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changed = changed  # set when slots have become free
        self._description = description()
        self.holders = Holders(self._holder_ended)

    def routes(self) -> list[web.RouteDef]:
        return [web.route(each.method, each.path, getattr(self, each.name)) for each in OPERATIONS]

    def close(self) -> None:
        """Finish the calls at hand."""
        self.holders.close()
        self._front.shutdown()

    async def do(self, call: Callable[P, T], *arguments: P.args, **_: P.kwargs) -> T:
        """Call in the thread for what touches the kernel."""
        return await asyncio.get_running_loop().run_in_executor(self._front, call, *arguments)

    def adopt_holders(self) -> None:
        for record in self._engine.ledger.held():
            self.holders.adopt(record)

    def _holder_ended(self, lease: str) -> None:
        self._metrics.ended.labels(why="holder").inc()
        self._front.submit(self._end, lease)

    # --- leases --------------------------------------------------------------------------------------

    async def acquire(self, request: web.Request) -> web.Response:
        body, peer = await read_body(request, AcquireBody), peer_of(request)
        pidfd, holder = self._open_holder(peer, body.holder_pid)
        try:
            wanted = leasing.Request(body.owner, body.class_name, body.params, peer.uid, body.ttl, holder)
            lease = await self._grant(wanted)
            if lease is None:
                self._upkeep.clean_soon()
                self._upkeep.build_soon()
                lease = await self._wait(wanted, body.wait) if body.wait else None
            if lease is None:
                self._metrics.refused.inc()
                raise RefusedError("no slot is free", hint='wait for one with "wait": SECONDS')
            if pidfd >= 0:
                self._hold(lease, pidfd, holder)
                pidfd = -1
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        return answer(lease.fields, 201 if lease.new else 200)

    async def _grant(self, wanted: leasing.Request, ticket: int | None = None) -> Lease | None:
        if not wanted.params:
            return self._grant_here(wanted, ticket)
        future = self._front.submit(self._grant_here, wanted, ticket)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:  # the caller is gone, or its time is up
            future.add_done_callback(self._give_back)
            raise

    def _grant_here(self, wanted: leasing.Request, ticket: int | None) -> Lease | None:
        started = time.perf_counter()
        lease = leasing.grant(self._engine, wanted, ticket)
        if lease is not None and lease.new:
            self._metrics.acquire.observe(time.perf_counter() - started)
        return lease

    def _give_back(self, future: Future[Lease | None]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        lease = future.result()
        if lease is not None and lease.new:
            self._front.submit(self._end, lease.id)

    async def _wait(self, wanted: leasing.Request, seconds: float) -> Lease | None:
        """A lease as soon as a slot is free, in order of arrival; None when ``seconds`` have passed."""
        ledger, name = self._engine.ledger, leasing.queue_of(self._engine, wanted.owner, wanted.class_name)
        ticket = ledger.queue_up(name)
        self._metrics.waiting.inc()
        try:
            async with asyncio.timeout(seconds), self._turns[name]:
                while True:
                    self._changed.clear()
                    lease = await self._grant(wanted, ticket)
                    if lease is not None:
                        return lease
                    try:
                        await asyncio.wait_for(self._changed.wait(), _POLL)
                    except TimeoutError:
                        continue
        except TimeoutError:
            return None
        finally:
            self._metrics.waiting.dec()
            ledger.leave_queue(ticket)

    def _open_holder(self, peer: Peer, pid: int | None) -> tuple[int, str]:
        """A pidfd and the process's identity, (-1, '') for no holder."""
        if pid is None:
            return -1, ""
        pidfd, holder = open_holder(pid)
        if not peer.may_name(pid) or identify(pid) != holder:
            os.close(pidfd)
            raise ForbiddenError(f"process {pid} is not yours")
        return pidfd, holder

    def _hold(self, lease: Lease, pidfd: int, holder: str) -> None:
        if lease.record.holder != holder:
            self._engine.ledger.hold(lease.id, holder)
        self.holders.watch(lease.id, pidfd)

    async def leases(self, request: web.Request) -> web.Response:
        peer, owner, slot = peer_of(request), request.query.get("owner"), request.query.get("slot")
        chosen = [
            lease.fields
            for lease in await asyncio.to_thread(self._host.leases)
            if peer.may_touch(lease.record.uid) and owner in (None, lease.owner) and slot in (None, str(lease.slot))
        ]
        return answer({"leases": chosen})

    async def lease(self, request: web.Request) -> web.Response:
        return answer(self._fields(self._own(request)))

    def _fields(self, record: LeaseRecord) -> dict[str, Any]:
        current = self._engine.ledger.lease(lease=record.lease) or record
        return Lease(current, self._engine.plan(record.slot, record.class_name)).fields

    def _own(self, request: web.Request) -> LeaseRecord:
        """The lease of the request's path, if it is the caller's."""
        name = request.match_info["lease"]
        record = self._engine.ledger.lease(lease=name)
        if record is None:
            raise MissingError(f"there is no lease {name}")
        if not peer_of(request).may_touch(record.uid):
            raise ForbiddenError("the lease is another user's")
        return record

    async def update(self, request: web.Request) -> web.Response:
        record, body = self._own(request), await read_body(request, UpdateBody)
        pidfd, holder = self._open_holder(peer_of(request), body.holder_pid)
        try:
            if body.params:
                await self.do(leasing.update, self._engine, record.lease, body.params)
            if body.ttl is not None:
                self._engine.ledger.renew(record.lease, body.ttl)
            if pidfd >= 0:
                self._engine.ledger.hold(record.lease, holder)
                self.holders.watch(record.lease, pidfd)
                pidfd = -1
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        return answer(self._fields(record))

    async def renew(self, request: web.Request) -> web.Response:
        return await self.update(request)

    async def release(self, request: web.Request) -> web.Response:
        record = self._own(request)
        released = self._end(record.lease)
        self.holders.forget(record.lease)
        return answer({"slot": record.slot, "released": released})

    def _end(self, lease: str) -> bool:
        released = self._engine.ledger.release(lease) is not None
        self._upkeep.clean_soon()
        return released

    # --- slots ---------------------------------------------------------------------------------------

    async def slots(self, request: web.Request) -> web.Response:
        peer, state = peer_of(request), request.query.get("state")
        found, leases = await asyncio.to_thread(lambda: (self._host.slots(), self._host.leases()))
        mine = {lease.slot for lease in leases if peer.may_touch(lease.record.uid)}
        chosen = [each for each in found if state in (None, each.state)]
        return answer({"slots": [_visible(each.fields, each.number in mine) for each in chosen]})

    async def slot(self, request: web.Request) -> web.Response:
        record, peer = self._slot(request), peer_of(request)
        slot, lease = self._host.slot(record.slot), self._engine.ledger.lease(slot=record.slot)
        return answer(_visible(slot.fields, lease is not None and peer.may_touch(lease.uid)))

    async def take_back(self, request: web.Request) -> web.Response:
        record = self._slot(request)
        _admin(request)
        released = self._take_back(record.slot)
        return answer({"slot": record.slot, "released": released})

    def _take_back(self, number: int) -> bool:
        lease = self._engine.ledger.lease(slot=number)
        done = self._end(lease.lease) if lease is not None else self._engine.ledger.abandon(number)
        self._upkeep.clean_soon()
        return done

    def _slot(self, request: web.Request) -> SlotRecord:
        text = request.match_info["slot"]
        if not text.isdecimal():
            raise UsageError(f"{text!r} is no slot's number")
        record = self._engine.ledger.slot(int(text))
        if record is None:
            raise MissingError(f"there is no slot {text}")
        return record

    # --- the host ------------------------------------------------------------------------------------

    async def verify(self, request: web.Request) -> web.Response:
        _admin(request)
        body = await read_body(request, VerifyBody)
        return answer(asdict(await asyncio.to_thread(lambda: self._upkeep.verify(body.slots, repair=body.repair))))

    async def health(self, _: web.Request) -> web.Response:
        try:
            counts = self._engine.ledger.counts()
        except NetslotError as error:
            counts, problem = {}, str(error)
        else:
            problem = "; ".join(f"{name}: {text}" for name, text in self._upkeep.problems.items())
        by_state = {state: sum(n for (_, each), n in counts.items() if each == state) for state in ("free", "leased")}
        fields = {"ok": not problem, "reloading": self._upkeep.reloading, **by_state, "problem": problem or None}
        return answer(fields, 503 if problem else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        text = await asyncio.to_thread(self._metrics.text)
        if (number := request.query.get("slot")) is not None:
            record = self._engine.ledger.slot(int(number) if number.isdecimal() else 0)
            if record is None:
                raise MissingError(f"there is no slot {number}")
            plan = self._engine.plan(record.slot, record.class_name)
            text += await asyncio.to_thread(
                lambda: self._engine.run(lambda _: figures.traffic(plan) + figures.usage(plan))
            )
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def openapi(self, _: web.Request) -> web.Response:
        return answer(self._description)


def _visible(fields: dict[str, Any], own: bool) -> dict[str, Any]:
    return fields if own else {name: value for name, value in fields.items() if name != "owner"}


def _admin(request: web.Request) -> None:
    if not peer_of(request).is_admin:
        raise ForbiddenError("only root may do this")
