"""How many rules the kernel really tests a packet against: a rule that only counts stands before each rule.

The counters are exact (net/ipv4/netfilter/ip_tables.c adds one whenever a rule's conditions hold, and a rule without
conditions holds for every packet that comes to it). What the host itself sends is dropped before it meets any rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from netslot.host import tables
from netslot.host.replay import set_contents, staged
from netslot.host.replay_links import Scene
from netslot.host.replay_stage import Rules, Sent, Stage, inside
from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.attribute import Attribution
from netslot.rulesets.model import Ruleset, Table
from netslot.rulesets.proof.places import Places
from netslot.rulesets.traffic import unnamed_addresses, unnamed_port
from netslot.rulesets.write import write

_PROBE = "-m comment --comment probe"
_COUNT = re.compile(r"\[(\d+):\d+\] -A (\S+) -m comment --comment probe$")
_SILENCE = "table inet silence {\n chain out {\n type filter hook output priority -450; policy drop;\n }\n}\n"
_SYN, _ACK = 2, 16
WAYS = ("out", "in", "host")
UPLINKS = ("eth0", "unnamed0")
"""An uplink that rules name, and one that none does: what a dump leaves open."""

Counts = dict[tuple[str, str], int]
"""Tests by table and built-in chain, the chains that it jumps to included."""


def instrumented(ruleset: Ruleset) -> str:
    """The ruleset with a counting rule before each rule."""
    lines = []
    for line in write(ruleset).splitlines():
        if line.startswith("-A "):
            lines.append(f"-A {line.split()[1]} {_PROBE}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _reached(table: Table, hook: str) -> set[str]:
    found: set[str] = set()
    left = [hook]
    while left:
        name = left.pop()
        if name not in found and name in table.chains:
            found.add(name)
            left += [r.target.chain for r in table.chains[name].rules if isinstance(r.target, t.Jump | t.Goto)]
    return found


def counted(ruleset: Ruleset, saved: str) -> Counts:
    """What the counters say. Only where no chain belongs to two hooks of a table."""
    by_chain: dict[tuple[str, str], int] = {}
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif found := _COUNT.search(line):
            key = table, found[2]
            by_chain[key] = by_chain.get(key, 0) + int(found[1])
    counts: Counts = {}
    for each in ruleset.tables.values():
        for chain in each.chains.values():
            if chain.builtin:
                counts[each.name, chain.name] = sum(
                    by_chain.get((each.name, name), 0) for name in _reached(each, chain.name)
                )
    return counts


@dataclass
class Gauge:
    """One host with its instrumented rules."""

    stage: Stage
    ruleset: Ruleset
    places: Places
    uplink: str
    _number: int = 0

    def walk(self, tenant: int, way: str, state: str) -> Counts:
        """The tests that one packet meets: TCP between a tenant, a peer and a port that no rule names, the host."""
        text = instrumented(self.ruleset)
        entry, values = self._packet(tenant, way)
        self.stage.forget()
        if state == "ESTABLISHED":
            self.stage.let_everything_pass(Rules({4: text}))
            back = values | {x: values[y] for x, y in (("src", "dst"), ("dst", "src"))} | {"flags": _SYN | _ACK}
            self._send(entry, values, 100, 0)
            self._send(self._far(tenant, way), back, 300, 109)
            values["flags"] = _ACK
        self.stage.load(Rules({4: text}))
        self._send(entry, values, 109, 309)
        return counted(self.ruleset, str(inside(self.stage.root, tables.save, "legacy", 4)))

    def published(self, tenant: int) -> int | None:
        """The host's port that leads to this tenant, the last one where there are several."""
        own = self.places.addresses(tenant, 4)[0].value
        found = None
        for _, _, rule in self.ruleset.rules():
            to = rule.target.to.address if isinstance(rule.target, t.Dnat) else None
            if to == (own, own):
                found = next((x.ranges[0][0] for x in rule.matches if isinstance(x, m.Ports)), None)
        return found

    def _far(self, tenant: int, way: str) -> str:
        return {"out": self.uplink, "in": self.places.link(tenant), "host": ""}[way]

    def _packet(self, tenant: int, way: str) -> tuple[str, dict[str, int]]:
        peer, host = unnamed_addresses(self.ruleset)
        port = unnamed_port(self.ruleset)
        own = self.places.addresses(tenant, 4)[0].value
        published = self.published(tenant)
        to, dport = (own, port) if published is None else (host, published)
        ends = {"out": (own, peer), "in": (peer, to), "host": (own, host)}[way]
        values = dict.fromkeys(("icmp_type", "icmp_code", "dscp", "reply", "fragment", "state"), 0)
        values |= {"src": ends[0], "dst": ends[1], "proto": 6, "sport": port, "dport": dport if way == "in" else port}
        values |= {"flags": _SYN, "length": 48, "ttl": 64}
        return (self.uplink if way == "in" else self.places.link(tenant)), values

    def _send(self, entry: str, values: Mapping[str, int], seq: int, ack: int) -> None:
        self._number += 1
        self.stage.send(Sent(self._number, 4, entry, values), seq, ack)
        self.stage.settle((), grace=0.003)


@contextmanager
def gauge(attribution: Attribution, uplink: str) -> Iterator[Gauge]:
    """Build the host that the walk has in mind: every tenant behind its link, an address that no rule names."""
    ruleset = attribution.dump.family(4)
    assert ruleset is not None
    _, host = unnamed_addresses(ruleset)
    people = attribution.tenants
    places = Places(
        people, {4: tuple(() for _ in people), 6: tuple(() for _ in people)}, {4: (host,), 6: ()}, (uplink,), {}
    )
    scene = Scene(places, tuple(range(len(people))), (4,), set_contents(attribution.dump, places))
    with staged(scene, "w", None) as stage:
        inside(stage.root, tables.nft, _SILENCE)
        yield Gauge(stage, ruleset, places, uplink)


def most(found: Iterable[Counts]) -> Counts:
    """The largest of each."""
    result: Counts = {}
    for counts in found:
        for key, count in counts.items():
            result[key] = max(result.get(key, 0), count)
    return result
