"""What ``show`` says of a slot: links, addresses, routes, and rules with counters as their own tools print them."""

from __future__ import annotations

import errno
import shutil
import subprocess
from ipaddress import ip_address
from typing import Any

from netslot.errors import KernelError
from netslot.host import slots
from netslot.host.plan import SlotPlan
from netslot.kernel import cgroupfs, conntrack
from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import Socket
from netslot.policy import bpf, bpf_parts


def inspect(plan: SlotPlan) -> dict[str, Any]:
    """Read the slot. Runs on a worker thread, and runs the rules' tools in the slot, for people to read."""
    with slots.inside(plan):
        with Socket() as sock:
            links, addresses, routes = rt.links(sock), rt.addresses(sock), rt.routes(sock)
        names = {link.ifindex: link.name for link in links}
        fields: dict[str, Any] = {
            "links": [
                {
                    "name": link.name,
                    "up": link.up,
                    "carrier": link.carrier,
                    "mac": link.mac,
                    "mtu": link.mtu,
                    "addresses": [
                        f"{ip_address(each.address)}/{each.prefix_length}"
                        for each in addresses
                        if each.link == link.ifindex
                    ],
                }
                for link in links
            ],
            "routes": [_route(route, names) for route in routes if route.table != rt.RT_TABLE_LOCAL],
            "connections": conntrack.count(),
            "rules": _rules(plan),
        }
        fields |= counted(plan)
    if (path := plan.values.get("cgroup")) is not None:
        fields["usage"] = cgroupfs.usage(path)._asdict()
    return fields


def counted(plan: SlotPlan) -> dict[str, Any]:
    """What the BPF counters say, by hook and verdict; nothing where the slot has none."""
    if plan.of.bpf is None or not plan.of.bpf.counters:
        return {}
    try:
        found = {
            f"{prefix}{direction}": each.by_verdict()
            for link, prefix in ((bpf_parts.UPLINK, ""), (bpf_parts.GUEST, "guest/"))
            if link in bpf.hooked(plan.of.bpf, nat=False)
            for direction, each in zip(("egress", "ingress"), bpf.traffic(plan.values, link), strict=True)
        }
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return {}  # somebody has taken them away, which verify tells
    return {"traffic": found}


def _route(route: rt.RouteRecord, names: dict[int, str]) -> str:
    target = f"{ip_address(route.destination)}/{route.prefix_length}" if route.destination else "default"
    via = f" via {ip_address(route.gateway)}" if route.gateway else ""
    table = f" table {route.table}" if route.table != rt.RT_TABLE_MAIN else ""
    return f"{target}{via} dev {names.get(route.link, route.link)}{table}"


def _rules(plan: SlotPlan) -> dict[str, list[str]]:
    """Rules by tool, each as the tool prints it with counters; only of tools that this slot's policies use."""
    commands = {"nft": ["nft", "list", "ruleset"]}
    if plan.of.rules is not None and plan.of.rules.backend.startswith("iptables"):
        variant = plan.of.rules.backend.removeprefix("iptables-")
        families = ["iptables"] + (["ip6tables"] if plan.of.rules.ipv6 is not None else [])
        saves = {family: [f"{family}-{variant}-save", "-c"] for family in families}
        tunnels = plan.of.routes is not None and plan.of.routes.tunnels
        alone = plan.of.nat.kind == "rules" and plan.of.rates is None and not tunnels
        commands = saves if alone else commands | saves
    found = {}
    for tool, command in commands.items():
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
        if lines:
            found[tool] = lines
    return found
