"""Tables of ``bench skew --policy`` and ``bench nat`` for people."""

from __future__ import annotations

from typing import Any

from netslot.bench.report import machine_line, microseconds, table

_WORDS = {
    "root-ip-rules": "root: one ip rule for each tenant",
    "slots-routes": "slots: rule and table in each",
    "root-filter-per-tenant": "root: a filter for each tenant on the uplink",
    "root-program-hash": "root: one program with a hash of all tenants",
    "slots-bpf": "slots: the filter on each one's own link",
    "root-cgroup-rules": "root: one rule for each tenant's cgroup",
    "slots-cgroup": "slots: the rule in each",
}


def policy_table(result: dict[str, Any]) -> str:
    """One line for each arrangement."""
    rows: list[tuple[str, ...]] = [("TCP connect, p50 in µs", "first", "middle", "last", "last/first", "add")]
    for shape in result["shapes"]:
        positions = shape["positions"]
        first, middle, last = positions[0], positions[len(positions) // 2], positions[-1]
        rows.append(
            (
                _WORDS[shape["shape"]],
                *(microseconds(position["p50_us"]) for position in (first, middle, last)),
                f"{last['p50_us'] / first['p50_us']:.2f}",
                microseconds(shape["add_tenant_us"]),
            )
        )
    drivers = [f"  add, {_WORDS[s['shape']]}: {s['add_tenant_driver']}" for s in result["shapes"]]
    text = f"{result['slots']} tenants; {result['samples']} connections of each that is measured."
    return "\n".join([*table(rows), "", text, *drivers, machine_line(result["machine"])])


def nat_table(result: dict[str, Any]) -> str:
    """One line for each kind of NAT."""
    rows: list[tuple[str, ...]] = [("NAT in the slot", "set up µs", "connect p50", "p99", "connects/s", "bytes each")]
    names = {"bpf": "stateless, bpf", "nftables": "stateless, nftables", "conntrack": "tracked, iptables"}
    rows += [
        (
            names[kind["nat"]],
            microseconds(kind["setup_us"]),
            microseconds(kind["p50_us"]),
            microseconds(kind["p99_us"]),
            f"{kind['connections_per_second']:,}",
            f"{kind['bytes_per_connection']:,}",
        )
        for kind in result["kinds"]
    ]
    tools = ", ".join(f"{tool} {microseconds(taken)} µs" for tool, taken in result["tools_us"].items())
    text = f"Running a tool twice for the tracked one: {tools} a slot."
    return "\n".join([*table(rows), "", text, machine_line(result["machine"])])
