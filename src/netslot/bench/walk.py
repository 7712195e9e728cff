"""What the walk over a host's rules costs in time, on this machine: ``netslot audit --measure``.

The dump is loaded in a namespace of its own, with the first, the middle and the last tenant as namespaces
behind it and a server outside. What would end a measurement is taken out without changing how many rules are
tested: DROP, REJECT and translations become ACCEPT, logging becomes counting, sets and unknown conditions
become a mark that no packet has.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from netslot.bench import stage
from netslot.errors import HostError, NetslotError
from netslot.kernel import netlink, netns
from netslot.kernel import rtnetlink as rt
from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.audit import Audit
from netslot.rulesets.interfaces import Kind, kind
from netslot.rulesets.model import Rule, Ruleset, Table
from netslot.rulesets.traffic import unnamed_addresses, unnamed_port
from netslot.rulesets.write import rule_text, write

_CONNECTS = 40
_ADDED_RULES = 3
_VARIANTS = ("iptables-legacy", "iptables-nft")
_ROOT_SIDE, _OUTSIDE = IPv4Interface("192.0.0.9/31"), IPv4Interface("192.0.0.8/31")
_GATEWAY = IPv4Address("192.0.0.10")
_ROOT_MAC = "02:00:00:00:00:01"
_NEVER = m.Mark(0xDEADBEEF, 0xFFFFFFFF)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_PATIENCE = struct.pack("ll", 5, 0)
_DEFAULT = IPv4Network("0.0.0.0/0")


@dataclass(frozen=True, slots=True)
class _Subject:
    """A tenant that is measured: its position (from 1), the link on the host's side and its address."""

    position: int
    name: str
    link: str
    address: str


def measure(result: Audit) -> list[str]:
    """Sentences for a person. Raises HostError without the tools or privileges for it."""
    ruleset = result.attribution.dump.family(4)
    if ruleset is None:
        raise HostError("--measure needs IPv4 rules", hint="give the output of iptables-save")
    subjects = _subjects(result)
    tools = [tool for tool in _VARIANTS if shutil.which(tool)]
    if not tools:
        raise HostError("neither iptables-legacy nor iptables-nft is installed", hint="install iptables")
    text = write(passable(ruleset))
    peer, _ = unnamed_addresses(ruleset)
    server = (str(IPv4Address(peer)), unnamed_port(ruleset))
    read, written = os.pipe()
    status = stage.play(lambda: _act(written, tools, text, _uplink(ruleset), subjects, server))
    os.close(written)
    with os.fdopen(read) as pipe:
        figures = pipe.read()
    if status or not figures:
        raise NetslotError(
            "the measurement failed", hint="the lines above say why; the audit itself needs no --measure"
        )
    return list(_sentences(json.loads(figures), subjects))


def passable(ruleset: Ruleset) -> Ruleset:
    """A ruleset with as many tests for each packet, that lets every packet through."""
    tables = {}
    for table in ruleset.tables.values():
        chains = {
            chain.name: replace(
                chain,
                policy="ACCEPT" if chain.builtin else None,
                rules=tuple(_passable_rule(rule, ruleset) for rule in chain.rules),
            )
            for chain in table.chains.values()
        }
        tables[table.name] = Table(table.name, chains)
    return Ruleset(ruleset.family, tables)


def _passable_rule(rule: Rule, ruleset: Ruleset) -> Rule:
    matches = tuple(_NEVER if isinstance(x, m.SetMatch | m.Opaque | m.Owner) else x for x in rule.matches)
    target = rule.target
    if isinstance(target, t.TERMINAL):
        target = t.Accept()
    elif isinstance(target, t.Log | t.Modify | t.CtTarget | t.Notrack | t.OpaqueTarget):
        target = t.NoTarget()
    elif matches == rule.matches:
        return replace(rule, counters=None)
    return replace(rule, text=rule_text(matches, target, ruleset.family), counters=None)


def _subjects(result: Audit) -> list[_Subject]:
    """The first, the middle and the last tenant, with the link that their packets come from."""
    tenants = result.attribution.tenants
    subjects: list[_Subject] = []
    for index in sorted({0, len(tenants) // 2, len(tenants) - 1}) if tenants else []:
        tenant = tenants[index]
        link = next((name for name in tenant.interfaces if len(name) <= 15), f"nstenant{len(subjects)}")
        own = next((a for a in tenant.addresses if a.family == 4), None)
        # In a small network the host has the first address as a rule: the guest is taken to have the second.
        value = None if own is None else own.value + (2 if own.mask != 0xFFFFFFFF else 0)
        address = str(IPv4Address(value)) if value is not None else f"192.0.0.{20 + len(subjects)}"
        subjects.append(_Subject(index + 1, tenant.name, link, address))
    return subjects or [_Subject(0, "any packet", "nstenant0", "192.0.0.20")]


def _uplink(ruleset: Ruleset) -> str:
    """The name by which rules know the uplink, if one does."""
    for _, _, rule in ruleset.rules():
        for match in rule.matches:
            if not isinstance(match, m.Interface) or match.direction != "out" or match.wildcard:
                continue
            if kind(match.name) is Kind.HOST and match.name != "lo":
                return match.name
    return "nsuplink"


def _act(
    pipe: int, tools: list[str], text: str, uplink: str, subjects: list[_Subject], server: tuple[str, int]
) -> int:
    """In the child, whose namespace plays the root namespace."""
    rules = Path("/run/rules")
    rules.write_text(text, encoding="utf-8", errors="surrogateescape")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
    with netns.Worker() as worker:
        field = worker.run(_Field, uplink, subjects, server)
        figures: dict[str, object] = {"none": worker.run(field.connect_us)}
        for tool in tools:
            _run([f"{tool}-restore", str(rules)])
            connect = worker.run(field.connect_us)
            add = [_timed([tool, "-A", "FORWARD", "-s", "192.0.0.250", "-j", "ACCEPT"]) for _ in range(_ADDED_RULES)]
            figures[tool] = {"connect_us": connect, "add_ms": statistics.median(add)}
            _clear(tool, text)
        os.write(pipe, json.dumps(figures).encode())
    return 0


def _clear(tool: str, text: str) -> None:
    tables = [line[1:] for line in text.splitlines() if line.startswith("*")]
    empty = "".join(f"*{table}\nCOMMIT\n" for table in tables)
    _run([f"{tool}-restore"], empty)


def _run(command: list[str], text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        detail = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise NetslotError(f"{' '.join(command[:1])} refused the rules: {detail}")


def _timed(command: list[str]) -> float:
    start = time.perf_counter()
    _run(command)
    return (time.perf_counter() - start) * 1e3


class _Field:
    """Tenants' namespaces around the calling worker's own, and a server outside. Lives on a worker's thread."""

    def __init__(self, uplink: str, subjects: list[_Subject], server: tuple[str, int]) -> None:
        self._server = server
        outside = self._namespace()
        with netlink.Socket() as sock:
            sock.execute([rt.veth(uplink, "up0", peer_netns=outside)])
            self._up(sock, uplink, _ROOT_SIDE)
            far = IPv4Network(f"{server[0]}/32")
            sock.execute([rt.set_link(1, up=True), rt.add_route(far, gateway=_OUTSIDE.ip)])
        with netns.entered(outside), netlink.Socket() as sock:
            self._up(sock, "up0", _OUTSIDE)
            sock.execute(
                [
                    rt.set_link(1, up=True),
                    rt.add_address(1, IPv4Interface(f"{server[0]}/32")),
                    rt.add_route(_DEFAULT, gateway=_ROOT_SIDE.ip),
                ]
            )
            self._listener = socket.create_server(server, backlog=64)
        self._tenants = [self._tenant(subject) for subject in subjects]

    @staticmethod
    def _namespace() -> int:
        with netns.fresh():
            return netns.open_own()

    @staticmethod
    def _up(sock: netlink.Socket, link: str, address: IPv4Interface | None = None) -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            index = rt.link_index(probe, link)
        requests = [rt.add_address(index, address)] if address is not None else []
        sock.execute([*requests, rt.set_link(index, up=True)])
        return index

    def _tenant(self, subject: _Subject) -> int:
        """A namespace with the tenant's address behind the tenant's link."""
        inside = self._namespace()
        with netlink.Socket() as sock:
            sock.execute([rt.veth(subject.link, "eth0", peer_netns=inside, mac=_ROOT_MAC)])
            index = self._up(sock, subject.link)
            sock.execute([rt.add_route(IPv4Network(f"{subject.address}/32"), index=index)])
        with netns.entered(inside), netlink.Socket() as sock:
            index = self._up(sock, "eth0", IPv4Interface(f"{subject.address}/32"))
            sock.execute(
                [
                    rt.add_neighbour(index, _GATEWAY, _ROOT_MAC),
                    rt.add_route(_DEFAULT, index=index, gateway=_GATEWAY, onlink=True),
                ]
            )
        return inside

    def connect_us(self) -> list[float]:
        """For each tenant the median time of a connect(2) to the server, in µs; tenants take turns."""
        samples: list[list[float]] = [[] for _ in self._tenants]
        for turn in range(_CONNECTS + 2):
            for place, tenant in enumerate(self._tenants):
                took = self._connect(tenant)
                if turn >= 2:  # the first two resolve neighbours and fill caches
                    samples[place].append(took)
        return [statistics.median(times) for times in samples]

    def _connect(self, tenant: int) -> float:
        with netns.entered(tenant):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            start = time.perf_counter_ns()
            try:
                sock.connect(self._server)
            except OSError as error:
                raise NetslotError(f"no way through the loaded rules: {error.strerror}") from error
            took = time.perf_counter_ns() - start
            self._listener.accept()[0].close()
        return took / 1e3


def _sentences(figures: dict[str, object], subjects: list[_Subject]) -> Iterator[str]:
    bare = figures["none"]
    assert isinstance(bare, list)
    yield f"measured here: a TCP connect through the host takes {statistics.median(bare):,.0f} us without rules"
    for tool, found in figures.items():
        if isinstance(found, dict):
            times = ", ".join(
                f"tenant {subject.position:,} {took:,.0f} us" if subject.position else f"{took:,.0f} us"
                for subject, took in zip(subjects, found["connect_us"], strict=True)
            )
            added = f"adding one rule takes {found['add_ms']:,.0f} ms"
            yield f"measured here: with these rules in {tool}, {times}; {added}"
