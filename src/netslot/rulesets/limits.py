"""How far a ruleset is from limits that the kernel enforces. Only limits that stand in its source are here."""

from __future__ import annotations

from dataclasses import dataclass

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.attribute import Attribution
from netslot.rulesets.graph import depth
from netslot.rulesets.interfaces import Kind, kind
from netslot.rulesets.model import Ruleset, Table


@dataclass(frozen=True, slots=True)
class Limit:
    """``used`` of ``limit``, in ``unit``; ``source`` is where the kernel says so."""

    name: str
    used: int
    limit: int
    unit: str
    source: str

    @property
    def share(self) -> float:
        return self.used / self.limit


_LEGACY_TABLE = 512 << 20
_SMALLEST_RULE = 112 + 40  # struct ipt_entry and struct xt_standard_target; IPv6: 168 + 40
_SMALLEST_RULE_V6 = 168 + 40


def limits_of(attribution: Attribution) -> list[Limit]:
    """The limits that a ruleset of this kind comes near to, the nearest first."""
    found: list[Limit] = []
    for ruleset in attribution.dump.rulesets:
        tables = list(ruleset.tables.values())
        largest = max(tables, key=_rules)
        rule = _SMALLEST_RULE if ruleset.family == 4 else _SMALLEST_RULE_V6
        found.append(
            Limit(
                f"size of the IPv{ruleset.family} {largest.name} table with iptables-legacy, at the least",
                _rules(largest) * rule,
                _LEGACY_TABLE,
                "bytes",
                "XT_MAX_TABLE_SIZE, net/netfilter/x_tables.c",
            )
        )
        deepest = max(depth(table) for table in tables)
        if deepest:
            found.append(
                Limit(
                    "jumps below one another with iptables-nft",
                    deepest,
                    16,
                    "jumps",
                    "NFT_JUMP_STACK_SIZE, include/net/netfilter/nf_tables.h",
                )
            )
        found += _numbers(ruleset)
    ports = _bridge_ports(attribution)
    if ports:
        found.append(
            Limit(
                "ports of one bridge, if all tenants are on one",
                ports,
                1024,
                "ports",
                "BR_PORT_BITS, net/bridge/br_private.h",
            )
        )
    return sorted(found, key=lambda limit: -limit.share)


def _rules(table: Table) -> int:
    return sum(len(chain.rules) for chain in table.chains.values())


def _numbers(ruleset: Ruleset) -> list[Limit]:
    """Published ports of one address, and connection tracking zones: both are 16 bits."""
    ports: set[tuple[int | None, str, int]] = set()
    zones: set[int] = set()
    for _, _, rule in ruleset.rules():
        target = rule.target
        if type(target) is t.Dnat:
            dst = next((x.value for x in rule.matches if isinstance(x, m.Address) and x.side == "dst"), None)
            for match in rule.matches:
                if isinstance(match, m.Ports) and match.side == "dst" and not match.negated:
                    low, high = match.ranges[0]
                    ports |= {(dst, match.module, port) for port in range(low, high + 1)}
        elif type(target) is t.CtTarget and target.zone is not None:
            zones.add(target.zone)
    found = []
    if ports:
        counts: dict[tuple[int | None, str], int] = {}
        for dst, module, _ in ports:
            counts[dst, module] = counts.get((dst, module), 0) + 1
        busiest = max(counts.values())
        found.append(
            Limit("published ports of one address and protocol", busiest, 65535, "ports", "16 bits in TCP and UDP")
        )
    if zones:
        source = "u16 id, include/net/netfilter/nf_conntrack_zones.h"
        found.append(Limit("connection tracking zones", len(zones), 65535, "zones", source))
    return found


def _bridge_ports(attribution: Attribution) -> int:
    """Guests' interfaces that rules know as bridge ports."""
    ports: set[str] = set()
    for ruleset in attribution.dump.rulesets:
        for _, _, rule in ruleset.rules():
            for match in rule.matches:
                if type(match) is m.Physdev and not match.wildcard and kind(match.name) is Kind.GUEST:
                    ports.add(match.name)
    return len(ports)
