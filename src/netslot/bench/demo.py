"""The story in one minute: the same tenants, once with all rules in root, once with each tenant's in a slot."""

from __future__ import annotations

from typing import Any

from netslot.bench import report, shapes, skew
from netslot.bench.report import duration, table

_LEGACY = ("none", "root-iptables-legacy-flat", "slots-iptables-legacy")
_NFT = ("none", "root-iptables-nft-flat", "slots-iptables-nft")


def measure_demo(slots: int, say: skew.Say) -> dict[str, Any]:
    """A skew result of three shapes; iptables-nft stands in on a kernel without the legacy tables."""
    chosen = _NFT if shapes.legacy_refusal() else _LEGACY
    plan = skew.Plan(slots, chosen, samples=200, rounds=4, add_times=3)
    return skew.measure_skew(plan, say)


def story(result: dict[str, Any]) -> str:
    """Before and after, for people."""
    nothing, before, after = result["shapes"]
    at = before["positions"]
    named = [at[0]["slot"], at[len(at) // 2]["slot"], at[-1]["slot"]]
    heading = ("", "rules in root", "longest walk", *(f"tenant {slot:,}" for slot in named), "add a tenant")
    rows = [
        heading,
        _row("before: all tenants' rules in root", before),
        _row("after:  each tenant's rules in its slot", after),
        _row("(no rules at all)", nothing),
    ]
    last = at[-1]["p50_us"] / after["positions"][-1]["p50_us"]
    adding = before["add_tenant_us"] / after["add_tenant_us"]
    return "\n".join(
        [
            f"{result['slots']:,} tenants with {result['rules_per_tenant']} rules each. "
            "TCP connect through the host, median:",
            "",
            *(f"  {line}" for line in table(rows)),
            "",
            f"The last tenant waits {report.skew_of(before):.2g} times as long as the first before, "
            f"{report.skew_of(after):.2f} times after.",
            f"After, the last tenant connects {last:.2g} times faster, and a tenant's rules are in force "
            f"{adding:,.0f} times sooner.",
            f"Measured in {result['seconds']:.0f} s on {report.machine_line(result['machine'])}",
        ]
    )


def _row(name: str, shape: dict[str, Any]) -> tuple[str, ...]:
    positions = shape["positions"]
    chosen = (positions[0], positions[len(positions) // 2], positions[-1])
    added = shape["add_tenant_us"]
    return (
        name,
        f"{shape['root_rules']:,}",
        f"{shape['root_rules'] + shape['slot_rules']:,}",
        *(duration(position["p50_us"]) for position in chosen),
        "" if added is None else duration(added),
    )
