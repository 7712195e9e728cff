"""Skew by position for what is not firewall rules: BPF programs, cgroups, routing rules.

For each policy the usual shared arrangement in the root namespace, which all tenants' packets walk, and the one
in which each tenant's state is in its own slot. Every tenant's packets take the same way in both.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Protocol

from netslot.bench import machine, measure
from netslot.bench.field import Guest, Place, add_guest, add_place, prepare_root
from netslot.bench.measure import Client, Samples
from netslot.bench.shapes import run_tool
from netslot.bench.skew import spread
from netslot.bench.statistics import median
from netslot.errors import UsageError
from netslot.kernel import bpf, cgroupfs, fib, netlink, netns, tc
from netslot.policy import bpf as bpf_policy
from netslot.policy import bpf_parts, routes
from netslot.policy.base import Values
from netslot.spec.policies import BpfFilter, BpfSection, Route, RouteRule, RoutesSection

POLICIES = ("bpf", "cgroup", "routes")

_LINKS = IPv4Address("10.201.0.0")
_GUESTS = IPv4Address("100.64.0.0")
_UPLINK, _GATEWAY = "eth0", "198.51.100.2"
_TABLES = 1000
"""Tenant k's own table in root is _TABLES + k."""
_ROUND_S = 4.0


@dataclass(frozen=True, slots=True)
class Plan:
    """``samples`` of each of ``positions`` tenants among ``slots``, in ``rounds`` that alternate between shapes."""

    policy: str
    slots: int
    positions: int = 5
    samples: int = 300
    rounds: int = 6
    seed: int = 1

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"unknown policy {self.policy!r}", hint=f"policies are {', '.join(POLICIES)}")
        if not 3 <= self.slots <= 8000 or self.positions < 2 or self.samples < 1 or self.rounds < 1:
            raise UsageError("3 to 8,000 slots, 2 positions or more, 1 sample and 1 round or more")


class _Shape(Protocol):
    """One arrangement. ``switch`` puts it in force, or out of it; ``add_us`` times adding one more tenant."""

    name: str
    root_rules: int

    def switch(self, on: bool) -> None: ...

    def add_us(self) -> tuple[str, float]: ...


@dataclass(slots=True)
class _Run:
    shape: _Shape
    guests: list[Guest]
    samples: list[Samples] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        driver, microseconds = self.shape.add_us()
        return {
            "shape": self.shape.name,
            "root_rules": self.shape.root_rules,
            "positions": [s.summary(guest.slot) for guest, s in zip(self.guests, self.samples, strict=True)],
            "add_tenant_us": round(microseconds, 1),
            "add_tenant_driver": driver,
        }


def measure_policy(plan: Plan, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure on the stage that the calling process is on; the result has the form of ``bench skew --json``."""
    facts = machine.facts()
    start = time.monotonic()
    with netns.Worker(name="netslot-bench") as worker:
        shapes = worker.run(_run, plan, say)
    return {
        "machine": facts,
        "slots": plan.slots,
        "policy": plan.policy,
        "samples": plan.samples,
        "seconds": round(time.monotonic() - start, 1),
        "shapes": shapes,
    }


def _run(plan: Plan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    prepare_root()
    with ExitStack() as stack:
        make = {"bpf": _bpf_shapes, "routes": _route_shapes, "cgroup": _cgroup_shapes}[plan.policy]
        runs, client = make(plan, say, stack)
        for run in runs:
            run.samples = [Samples() for _ in run.guests]
        measure.pin_thread()
        dice = random.Random(plan.seed)
        for number in range(plan.rounds):
            order = list(runs)
            dice.shuffle(order)
            for run in order:
                run.shape.switch(True)
                count = max(1, plan.samples // plan.rounds)
                client.block(run.guests, run.samples, count, dice, least=5, budget_s=_ROUND_S)
                run.shape.switch(False)
            say(f"round {number + 1} of {plan.rounds} measured")
        return [run.result() for run in runs]


def place(number: int) -> Place:
    """Where tenant ``number`` is."""
    address = _LINKS + 2 * number
    return Place(f"slot{number}", f"slot{number}", str(address), str(address + 1))


def guest_address(number: int) -> str:
    """The address of tenant ``number``'s workload, which root knows the way to."""
    return str(_GUESTS + 2 * number + 1)


def _values(number: int) -> dict[str, str]:
    where = place(number)
    return {
        "uplink_if": "up0",
        "guest_if": "tap0",
        "address": where.address,
        "root_address": where.root_address,
        "guest_address": guest_address(number),
        "tenant": f"t{number}",
    }


class _Stamp(Protocol):
    """As much of a die as is measured here."""

    def stamp(self, values: Values) -> None: ...


def _stamp(die: _Stamp, number: int) -> None:
    inside = netns.open_named(place(number).netns)
    try:
        with netns.entered(inside):
            die.stamp(_values(number))
    finally:
        os.close(inside)


def _populate(plan: Plan, die: _Stamp, say: Callable[[str], None], *, guests: bool = True) -> list[Guest]:
    """All slots with their die, and guests behind the measured ones."""
    start = time.monotonic()
    for number in range(1, plan.slots + 1):
        add_place(place(number))
        _stamp(die, number)
    say(f"{plan.slots} slots built in {time.monotonic() - start:.1f} s")
    if not guests:
        return []
    positions = spread(plan.slots, plan.positions)
    return [add_guest(place(number), number, IPv4Network((int(_GUESTS) + 2 * number, 31))) for number in positions]


class _InSlots:
    """Nothing in root: what each tenant needs was stamped into its slot."""

    root_rules = 0

    def __init__(self, name: str, die: _Stamp, number: int, driver: str = "netslot stamp") -> None:
        self.name = name
        self._driver = driver
        self._die = die
        self._number = number

    def switch(self, on: bool) -> None:
        """The state of a slot concerns nobody else, so it stays in force."""

    def add_us(self) -> tuple[str, float]:
        taken = []
        for extra in range(1, 16):
            where = place(self._number + extra)
            add_place(where)
            inside = netns.open_named(where.netns)
            with netns.entered(inside):
                start = time.perf_counter()
                self._die.stamp(_values(self._number + extra))
                taken.append((time.perf_counter() - start) * 1e6)
            os.close(inside)
        return self._driver, median(taken)


# --- routes: one ip rule per tenant in root ------------------------------------------------------------


class _SharedRules:
    """``ip rule add from TENANT lookup TABLE``, one per tenant, each table with a default of its own."""

    name = "root-ip-rules"

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.root_rules = slots

    def requests(self, number: int, remove: bool) -> list[netlink.Request]:
        tenant = IPv4Network(f"{guest_address(number)}/32")
        rule = fib.Rule(socket.AF_INET, number, table=_TABLES + number, source=tenant)
        route = fib.Route(
            IPv4Network("0.0.0.0/0"),
            gateways=(IPv4Address(_GATEWAY),),
            device=_index(_UPLINK),
            table=_TABLES + number,
        )
        if remove:
            return [fib.delete_rule(rule), fib.delete_route(route)]
        return [fib.add_route(route), fib.add_rule(rule)]

    def switch(self, on: bool) -> None:
        with netlink.Socket() as sock:
            for number in range(1, self._slots + 1):
                sock.execute(self.requests(number, remove=not on))

    def add_us(self) -> tuple[str, float]:
        self.switch(True)
        taken = []
        with netlink.Socket() as sock:
            for _ in range(15):
                requests = self.requests(self._slots + 1, remove=False)
                start = time.perf_counter()
                sock.execute(requests)
                taken.append((time.perf_counter() - start) * 1e6)
                sock.execute(self.requests(self._slots + 1, remove=True))
        self.switch(False)
        return "netlink, netslot's code", median(taken)


def _index(link: str) -> int:
    return socket.if_nametoindex(link)


def _route_shapes(plan: Plan, say: Callable[[str], None], stack: ExitStack) -> tuple[list[_Run], Client]:
    section = RoutesSection(
        routes=(Route("default", via="${root_address}", table=100),),
        rules=(RouteRule(priority=100, table=100, source="${guest_address}/32"),),
    )
    die = routes.cast(section, values=_values(1), defaults={})
    guests = _populate(plan, die, say)
    runs = [_Run(_SharedRules(plan.slots), guests), _Run(_InSlots("slots-routes", die, plan.slots), guests)]
    return runs, _client(stack)


def _client(stack: ExitStack) -> Client:
    client = Client()
    stack.callback(client.close)
    return client


# --- bpf: programs on the uplink, for each tenant or for all of them --------------------------------------


class _FilterPerTenant:
    """Each tenant's own program on root's uplink: it judges its tenant's packets and passes on all others."""

    name = "root-filter-per-tenant"
    root_rules = 0

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._programs = [_tenant_program(number) for number in range(1, slots + 2)]

    def switch(self, on: bool) -> None:
        link = _index(_UPLINK)
        with netlink.Socket() as sock:
            if not on:
                sock.execute([tc.del_clsact(link)])
                return
            sock.execute([tc.add_clsact(link)])
            # Of one priority the filter that was added last runs first.
            for number in range(self._slots, 0, -1):
                sock.execute([self._request(link, number)])

    def _request(self, link: int, number: int) -> netlink.Request:
        return tc.set_filter(link, tc.EGRESS, 1, self._programs[number - 1], f"t{number}", handle=number)

    def add_us(self) -> tuple[str, float]:
        self.switch(True)
        link, taken = _index(_UPLINK), []
        with netlink.Socket() as sock:
            for _ in range(15):
                start = time.perf_counter()
                program = _tenant_program(self._slots + 1)
                sock.execute([tc.set_filter(link, tc.EGRESS, 1, program, "one more", handle=self._slots + 1)])
                taken.append((time.perf_counter() - start) * 1e6)
                os.close(program)
        self.switch(False)
        return "netlink, netslot's code", median(taken)


def _tenant_program(number: int) -> int:
    """``return source == tenant ? TC_ACT_OK : TC_ACT_UNSPEC``."""
    address = int(IPv4Address(guest_address(number)))
    signed = address - (1 << 32) if address >> 31 else address
    code = struct.pack("=BBhi", 0xBF, 0x16, 0, 0)  # r6 = skb, where the next instruction expects it
    code += struct.pack("=BBhi", 0x20, 0, 0, 26)  # r0 = ntohl(word at the IPv4 source)
    code += struct.pack("=BBhi", 0x16, 0, 2, signed)  # if w0 == address, skip two
    code += struct.pack("=BBhiBBhi", 0xB4, 0, 0, -1, 0x95, 0, 0, 0)
    code += struct.pack("=BBhiBBhi", 0xB4, 0, 0, 0, 0x95, 0, 0, 0)
    return bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, code, "GPL", name="tenant")


class _SharedProgram:
    """One program on root's uplink, with all tenants in a hash: the strongest rival."""

    name = "root-program-hash"
    root_rules = 0

    def __init__(self, slots: int) -> None:
        source = bpf_parts.built_in("shared")
        self._map = bpf_parts.create_map(source.maps["tenants"], "tenants", slots + 16)
        self._program = bpf_parts.load_program(source, "find_tenant", {"tenants": self._map})
        self._slots = slots
        for number in range(1, slots + 1):
            self._add(number)

    def _add(self, number: int) -> None:
        bpf.map_update(self._map, IPv4Address(guest_address(number)).packed, struct.pack("=I", number))

    def switch(self, on: bool) -> None:
        link = _index(_UPLINK)
        with netlink.Socket() as sock:
            attach = [tc.add_clsact(link), tc.set_filter(link, tc.EGRESS, 1, self._program, self.name)]
            sock.execute(attach if on else [tc.del_clsact(link)])

    def add_us(self) -> tuple[str, float]:
        taken = []
        for extra in range(1, 16):
            start = time.perf_counter()
            self._add(self._slots + extra)
            taken.append((time.perf_counter() - start) * 1e6)
        return "one map element", median(taken)


def _bpf_shapes(plan: Plan, say: Callable[[str], None], stack: ExitStack) -> tuple[list[_Run], Client]:
    section = BpfSection(filter=BpfFilter(allow="allow"))
    die = bpf_policy.cast(section, samples=[_values(1)], defaults={"allow": ["203.0.113.0/24", "198.51.100.0/24"]})
    guests = _populate(plan, die, say)
    runs = [
        _Run(_FilterPerTenant(plan.slots), guests),
        _Run(_SharedProgram(plan.slots), guests),
        _Run(_InSlots("slots-bpf", die, plan.slots), guests),
    ]
    return runs, _client(stack)


# --- cgroup: tenant-tagged rules over a flat hierarchy -------------------------------------------------


_CGROUPS = "netslot-test-bench-"


@contextmanager
def _hierarchy(slots: int) -> Iterator[str]:
    """One cgroup per tenant, side by side; removed at the end, or by the next run if this one is killed."""
    parent, held = cgroupfs.claim(_CGROUPS)
    try:
        for number in range(1, slots + 2):
            cgroupfs.create(f"{parent}/t{number}", ())
        yield parent
    finally:
        for number in range(1, slots + 2):
            cgroupfs.remove(f"{parent}/t{number}", ())
        cgroupfs.remove(parent, ())
        os.close(held)


class _TaggedRules:
    """Tenants' processes in the root namespace, told apart by one rule each that matches their cgroup."""

    name = "root-cgroup-rules"

    def __init__(self, slots: int, parent: str) -> None:
        self._slots = slots
        self._parent = parent
        self.root_rules = slots

    def _rule(self, number: int) -> str:
        return f"-A OUTPUT -m cgroup --path {self._parent}/t{number} -j ACCEPT\n"

    def switch(self, on: bool) -> None:
        rules = "".join(self._rule(number) for number in range(1, self._slots + 1)) if on else ""
        run_tool(["iptables-legacy-restore"], f"*filter\n{rules}COMMIT\n")

    def add_us(self) -> tuple[str, float]:
        self.switch(True)
        text = f"*filter\n{self._rule(self._slots + 1)}COMMIT\n"
        taken = [run_tool(["iptables-legacy-restore", "--noflush"], text) * 1e6 for _ in range(5)]
        self.switch(False)
        return "iptables-legacy-restore --noflush", median(taken)


class CgroupClient(Client):
    """Opens each socket from inside the tenant's cgroup, which is what the rules match."""

    def __init__(self, parent: str) -> None:
        super().__init__()
        self._parent = parent
        self._home = _own_cgroup()

    def block(
        self,
        guests: Sequence[Guest],
        samples: Sequence[Samples],
        count: int,
        dice: random.Random,
        *,
        least: int,
        budget_s: float,
    ) -> None:
        """As the other clients, but tenant by tenant: moving between cgroups is no part of a connect."""
        order = list(range(len(guests)))
        try:
            for chunk in range(0, count, 10):
                dice.shuffle(order)
                for which in order:
                    cgroupfs.enter(f"{self._parent}/t{guests[which].slot}", ())
                    self.tcp_connect_us(guests[which])
                    for _ in range(min(10, count - chunk)):
                        samples[which].tcp_us.append(self.tcp_connect_us(guests[which]))
                        samples[which].udp_us.append(self.udp_round_trip_us(guests[which]))
        finally:
            cgroupfs.enter(self._home, ())


def _own_cgroup() -> str:
    """This process's cgroup in the unified hierarchy."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        return next(line.strip().partition("::")[2] for line in file if line.startswith("0::")).lstrip("/")


class _CgroupRule:
    """A slot's own rule that matches its own cgroup, by the real tool: the match holds a pointer, not a name."""

    rules = 1
    fallback = "the cgroup match is resolved when it is loaded"

    def __init__(self, parent: str) -> None:
        self._parent = parent

    def stamp(self, values: Values) -> None:
        rule = f"-A OUTPUT -m cgroup --path {self._parent}/{values['tenant']} -j ACCEPT"
        run_tool(["iptables-legacy-restore"], f"*filter\n{rule}\nCOMMIT\n")


def _cgroup_shapes(plan: Plan, say: Callable[[str], None], stack: ExitStack) -> tuple[list[_Run], Client]:
    parent = stack.enter_context(_hierarchy(plan.slots + 16))
    die = _CgroupRule(parent)
    _populate(plan, die, say, guests=False)
    positions = spread(plan.slots, plan.positions)
    root = netns.open_own()
    inside = [Guest(number, netns.open_named(place(number).netns)) for number in positions]
    runs = [
        _Run(_TaggedRules(plan.slots, parent), [Guest(number, root) for number in positions]),
        _Run(_InSlots("slots-cgroup", die, plan.slots, driver="iptables-legacy-restore"), inside),
    ]
    client = CgroupClient(parent)
    stack.callback(client.close)
    return runs, client
