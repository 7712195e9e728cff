"""Stateless NAT against connection-tracked NAT in the slot: set-up, latency, connections a second, memory."""

from __future__ import annotations

import functools
import itertools
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from netslot.bench import machine, measure
from netslot.bench.field import Guest, Place, add_guest, add_place, prepare_root
from netslot.bench.measure import Client, Samples
from netslot.bench.shapes import run_tool
from netslot.bench.statistics import median
from netslot.bench.tenants import GATEWAY, GUEST, SERVER
from netslot.bench.yard import may_make_taps
from netslot.errors import UsageError
from netslot.host.plan import GUEST as GUEST_LINK
from netslot.host.plan import UPLINK
from netslot.kernel import netlink, netns, tun
from netslot.policy import bpf, iptables, nat
from netslot.policy.base import Die, Values
from netslot.spec.policies import BpfSection

_TOOL_RUNS = 20
_LINKS = IPv4Address("10.201.0.0")
_TRACKED = """\
*nat
-A POSTROUTING -s ${guest_address}/32 -o up0 -j SNAT --to-source ${address}
-A PREROUTING -d ${address}/32 -i up0 -j DNAT --to-destination ${guest_address}
COMMIT
"""
_TOOLS = ("iptables-legacy", "iptables-nft")
_COMMANDS = (
    "-t nat -A POSTROUTING -s {guest} -o up0 -j SNAT --to-source {own}",
    "-t nat -A PREROUTING -d {own} -i up0 -j DNAT --to-destination {guest}",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """``samples`` connects of each kind; ``connections`` flows for the memory; ``setups`` slots of each kind."""

    samples: int = 1000
    rounds: int = 10
    connections: int = 20_000
    setups: int = 100
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.samples, self.rounds, self.connections, self.setups) < 1 or self.connections > 40_000:
            raise UsageError("samples, rounds and setups must be 1 or more, connections 1 to 40,000")


@dataclass(slots=True)
class _Kind:
    """One way of NAT, with a slot of its own and a guest behind it."""

    name: str
    die: Die
    guest: Guest
    at_birth: Sequence[netlink.Request] = ()
    samples: Samples = field(default_factory=Samples)
    rates: list[float] = field(default_factory=list)
    setup_us: list[float] = field(default_factory=list)
    uplink_us: list[float] = field(default_factory=list)
    """Making the uplink, together with what the NAT wants then."""
    bytes_per_connection: float = 0.0

    def result(self) -> dict[str, Any]:
        return {
            "nat": self.name,
            "setup_us": round(median(self.setup_us), 1),
            **{key: value for key, value in self.samples.summary(0).items() if key != "slot"},
            "connections_per_second": round(median(self.rates)),
            "bytes_per_connection": round(self.bytes_per_connection),
        }


def measure_nat(plan: Plan, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure on the stage that the calling process is on.

    ``{"machine", "kinds": [{"nat", "setup_us", "p50_us", "p99_us", "connections_per_second",
    "bytes_per_connection", ...}], "tools_us"}``: the last is what running `iptables` for the same NAT takes, by
    the tool's name. Set-up is timed as it happens in a slot that is built, before its links are up.
    """
    facts = machine.facts()
    with netns.Worker(name="netslot-bench") as worker:
        return {"machine": facts, **worker.run(_run, plan, say)}


def _run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    prepare_root()
    samples = [_values(number) for number in (1, 77, 5002)]
    dies: dict[str, Die] = {
        "bpf": bpf.cast(BpfSection(), nat=True, samples=samples, defaults={}, links={"up0": UPLINK}),
        "nftables": nat.cast(samples),
        "conntrack": iptables.cast(_TRACKED, samples=samples, file="bench.rules"),
    }
    kinds = [_furnish(name, die, number) for number, (name, die) in enumerate(dies.items(), 1)]
    tools = _time_setups(plan, kinds)
    say(f"{plan.setups} slots of each kind set up")
    client = Client()
    measure.pin_thread()
    try:
        dice = random.Random(plan.seed)
        for number in range(plan.rounds):
            guests, taken = [kind.guest for kind in kinds], [kind.samples for kind in kinds]
            client.block(guests, taken, max(1, plan.samples // plan.rounds), dice, least=5, budget_s=10.0)
            dice.shuffle(kinds)
            for kind in kinds:
                kind.rates.append(_connections_per_second(client, kind.guest))
            say(f"round {number + 1} of {plan.rounds} measured")
    finally:
        client.close()
    for kind in kinds:
        kind.bytes_per_connection = _memory(kind.guest, plan.connections)
    order = list(dies)
    kinds.sort(key=lambda kind: order.index(kind.name))
    return {"kinds": [kind.result() for kind in kinds], "tools_us": tools}


def _place(number: int) -> Place:
    address = _LINKS + 2 * number
    return Place(f"slot{number}", f"slot{number}", str(address), str(address + 1))


def _values(number: int) -> Values:
    return {
        "slot": str(number),
        "uplink_if": "up0",
        "guest_if": "tap0",
        "address": _place(number).address,
        "root_address": _place(number).root_address,
        "guest_address": GUEST,
        "gateway": GATEWAY,
    }


def _furnish(name: str, die: Die, number: int) -> _Kind:
    at_birth = die.at_birth(_values(number)) if isinstance(die, bpf.BpfDie) else ()
    add_place(_place(number), at_birth=at_birth)
    guest = add_guest(_place(number), number)
    _in_slot(number, die.stamp)
    return _Kind(name, die, guest, at_birth)


def _in_slot(number: int, act: Callable[[Values], None]) -> float:
    """Seconds that ``act`` took in a slot, which has a socket for its links as when it is built."""
    inside, values = netns.open_named(_place(number).netns), _values(number)
    try:
        with netns.entered(inside), netlink.Socket() as sock, netlink.lent(sock):
            start = time.perf_counter()
            act(values)
            return time.perf_counter() - start
    finally:
        os.close(inside)


def _time_setups(plan: Plan, kinds: list[_Kind]) -> dict[str, float]:
    """Set up each kind in fresh slots, turn by turn; returns what running each tool for the same took, in µs, at the
    median. As when a slot is built: its links are there and down, the workload's is made before rules and programs,
    and what these ask for together with the uplink counts as what it adds to that."""
    tools: dict[str, list[float]] = {tool: [] for tool in _TOOLS}
    numbers = itertools.count(len(kinds) + 1)

    def fresh(act: Callable[[Values], None], at_birth: Sequence[netlink.Request] = ()) -> tuple[float, float]:
        number = next(numbers)
        uplink = add_place(_place(number), up=False, at_birth=at_birth)
        if may_make_taps():
            _in_slot(number, _make_tap)
        return uplink * 1e6, _in_slot(number, act) * 1e6

    for turn in range(plan.setups):
        for kind in kinds:
            uplink, stamp = fresh(kind.die.stamp, kind.at_birth)
            kind.uplink_us.append(uplink)
            kind.setup_us.append(stamp)
        if turn < _TOOL_RUNS:
            for tool, times in tools.items():
                times.append(fresh(functools.partial(_run_tool, tool))[1])
    plain = median([us for kind in kinds if not kind.at_birth for us in kind.uplink_us])
    for kind in kinds:
        if kind.at_birth:
            added = max(0.0, median(kind.uplink_us) - plain)
            kind.setup_us = [us + added for us in kind.setup_us]
    return {tool: round(median(times), 1) for tool, times in tools.items()}


def _make_tap(values: Values) -> None:
    tun.create_tap(values["guest_if"], index=GUEST_LINK)


def _run_tool(tool: str, values: Values) -> None:
    for command in _COMMANDS:
        words = command.format(guest=values["guest_address"], own=values["address"]).split()
        run_tool([tool, *words], "")


def _connections_per_second(client: Client, guest: Guest, seconds: float = 0.1) -> float:
    """Connections opened, accepted and closed one after the other."""
    start = time.perf_counter()
    count = 0
    while (took := time.perf_counter() - start) < seconds:
        client.tcp_connect_us(guest)
        count += 1
    return count / took


def _memory(guest: Guest, connections: int) -> float:
    """Bytes of kernel memory per flow that has sent one datagram. All go through one raw socket, which is all that
    the sender itself keeps."""
    with netns.entered(guest.netns):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    with raw:
        raw.sendto(_datagram(1), (SERVER, 9))
        before = machine.memory_kib("SUnreclaim")
        for port in range(20_000, 20_000 + connections):
            raw.sendto(_datagram(port), (SERVER, 7777))
        return (machine.memory_kib("SUnreclaim") - before) * 1024 / connections


def _datagram(port: int) -> bytes:
    """One byte over UDP, without a checksum."""
    return struct.pack(">HHHHB", port, 7777, 9, 0, 0)
