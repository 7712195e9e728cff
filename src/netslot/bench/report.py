"""Results of the benchmarks as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from netslot.bench.statistics import median

_WORDS = {
    "none": "no rules at all",
    "nat-only": "NAT only, as all below have it",
    "root-iptables-legacy-flat": "root, iptables-legacy, flat",
    "root-iptables-nft-flat": "root, iptables-nft, flat",
    "root-iptables-legacy-chains": "root, a chain per tenant (iptables-legacy)",
    "root-nft-table-per-tenant": "root, an nftables table per tenant",
    "root-nft-sets": "root, nftables sets",
    "root-nft-verdict-map": "root, nftables verdict map",
    "slots-iptables-legacy": "slots, iptables-legacy",
    "slots-iptables-nft": "slots, iptables-nft",
    "slots-nftables": "slots, nftables",
}


def words(shape: str) -> str:
    """A shape's name for people."""
    return _WORDS.get(shape, shape)


def typical_us(shape: dict[str, Any]) -> float:
    """The median over a shape's tenants of their p50."""
    return median([position["p50_us"] for position in shape["positions"]])


def skew_of(shape: dict[str, Any]) -> float:
    """How many times slower the last tenant is than the first."""
    positions = shape["positions"]
    return float(positions[-1]["p50_us"] / positions[0]["p50_us"])


def skew_table(result: dict[str, Any]) -> str:
    """``bench skew`` for people: one line a shape, then what the figures mean."""
    rows: list[tuple[str, ...]] = [
        ("TCP connect through the host, p50 in µs", "rules in root", "first", "middle", "last", "last/first", "add")
    ]
    rows += [_skew_row(shape) for shape in result["shapes"]]
    lines = table(rows)
    lines += [
        "",
        f"{result['slots']} tenants with {result['rules_per_tenant']} rules each; tenants: "
        + ", ".join(str(position["slot"]) for position in result["shapes"][0]["positions"])
        + f"; {result['samples']} connections each. 'add' is the time to put one tenant's rules in force.",
    ]
    lines += [f"  {words(shape['shape'])}: {shape['note']}" for shape in result["shapes"] if shape["note"]]
    lines += [
        f"  add, {words(s['shape'])}: {s['add_tenant_driver']}" for s in result["shapes"] if s["add_tenant_driver"]
    ]
    lines += [f"  not measured: {words(name)}: {reason}" for name, reason in result["skipped"].items()]
    lines += ratios(result)
    return "\n".join([*lines, machine_line(result["machine"])])


def _skew_row(shape: dict[str, Any]) -> tuple[str, ...]:
    positions = shape["positions"]
    at = (positions[0], positions[len(positions) // 2], positions[-1])
    added = shape["add_tenant_us"]
    return (
        words(shape["shape"]),
        f"{shape['root_rules']:,}",
        *(microseconds(position["p50_us"]) for position in at),
        f"{skew_of(shape):.2f}",
        "" if added is None else duration(added),
    )


def ratios(result: dict[str, Any]) -> list[str]:
    """Slots against the shapes that they are to be compared with, as far as those were measured."""
    by_name = {shape["shape"]: shape for shape in result["shapes"]}
    lines = []
    for name, shape in by_name.items():
        if not name.startswith("slots-"):
            continue
        against = [
            f"{typical_us(shape) / typical_us(by_name[other]):.2f} of {words(other).split(',', 1)[0]}"
            if other != "root-nft-verdict-map"
            else f"{typical_us(shape) / typical_us(by_name[other]):.2f} of the verdict map"
            for other in ("none", "nat-only", "root-nft-verdict-map")
            if other in by_name
        ]
        if against:
            lines.append(f"  {words(name)}: p50 is {', '.join(against)}")
    return lines


def provision_table(result: dict[str, Any]) -> str:
    """``bench provision`` for people: one line a method, then the phases of netslot and of the bare loop."""
    rows: list[tuple[str, ...]] = [
        ("one slot", "slots", "µs a slot", "p50", "first 500", "last 500", "last/first", "KiB a slot")
    ]
    for run in result["runs"]:
        rows.append(
            (
                run["method"],
                f"{run['slots']:,}",
                f"{run['us_per_slot']:,.0f}",
                f"{run['p50_us']:,.0f}",
                f"{run['first_500_us']:,.0f}",
                f"{run['last_500_us']:,.0f}",
                f"{run['last_500_us'] / run['first_500_us']:.2f}",
                "" if run["kib_per_slot"] is None else f"{run['kib_per_slot']:,.0f}",
            )
        )
    lines = table(rows)
    phased = [run for run in result["runs"] if run["phases"]]
    if phased:
        names = list(dict.fromkeys(name for run in phased for name in run["phases"]))
        lines += ["", *table([("phase, µs a slot", *(run["method"] for run in phased)), *_phase_rows(phased, names)])]
    lines += [f"  {run['method']}: {run['note']}" for run in result["runs"] if run.get("note")]
    return "\n".join([*lines, machine_line(result["machine"])])


def _phase_rows(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    return [
        (name, *("" if name not in run["phases"] else f"{run['phases'][name]:,.0f}" for run in runs))
        for name in names
    ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under a heading: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def machine_line(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    hz = f"HZ={facts['hz']}" if facts["hz"] else "HZ unknown"
    tools = ", ".join(text for text in facts["tools"].values() if text)
    return f"{facts['kernel']}, {facts['cores']} cores ({facts['cpu'] or 'unknown'}), {hz}; {tools}"


def microseconds(us: float) -> str:
    """µs without false precision."""
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def duration(us: float) -> str:
    """A duration in the unit that suits it."""
    if us < 1000:
        return f"{us:.0f} µs"
    return f"{us / 1e3:.1f} ms" if us < 1e6 else f"{us / 1e6:.1f} s"
