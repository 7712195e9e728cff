"""One slot the usual ways: a shell script of ``ip`` and ``iptables`` commands, and a chain of CNI plugins."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from netslot.bench.shapes import run_tool
from netslot.bench.tenants import SLOT_IPTABLES
from netslot.errors import NetslotError
from netslot.host.plan import SlotPlan
from netslot.spec.render import render

CNI_PATH = Path("/usr/lib/cni")
CNI_PLUGINS = ("ptp", "firewall", "portmap")
_CNI_STATE = "/run/cni"


def script(plan: SlotPlan) -> str:
    """The commands that make what ``plan`` says: a tap attachment, IPv4."""
    name, values = plan.netns, plan.values
    root, own = plan.pair
    inside = f"ip -n {name}"
    rules = render(SLOT_IPTABLES, values, file="bench.rules")
    far_end = f"peer name up0 netns {name} address {values['uplink_mac']}"
    return f"""set -e
ip netns add {name}
ip netns exec {name} sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv4.ip_forward=1
ip link add {plan.root_if} address {values["root_mac"]} type veth {far_end}
{inside} tuntap add dev tap0 mode tap
ip netns exec {name} iptables-legacy-restore <<'RULES'
{rules}RULES
{inside} link set lo up
{inside} address add {own} dev up0
{inside} link set up0 up
{inside} route add default via {root.ip}
{inside} neigh add {root.ip} lladdr {values["root_mac"]} dev up0 nud permanent
{inside} address add {plan.addresses.gateway}/30 dev tap0
{inside} link set tap0 up
{inside} neigh add {plan.addresses.guest.ip} lladdr {values["guest_mac"]} dev tap0 nud permanent
ip address add {root} dev {plan.root_if}
ip neigh add {own.ip} lladdr {values["uplink_mac"]} dev {plan.root_if} nud permanent
ip link set {plan.root_if} group 100 up
"""


def build_by_script(plan: SlotPlan) -> float:
    """Run the script in the calling thread's namespace; the seconds it took."""
    return run_tool(["sh"], script(plan))


def cni_missing() -> list[str]:
    """Which plugins of the chain are not installed."""
    return [name for name in (*CNI_PLUGINS, "host-local") if not (CNI_PATH / name).exists()]


def build_by_cni(name: str, number: int) -> float:
    """Make a namespace and have the plugins connect it to the calling thread's; the seconds it took.

    Each container gets an address, masquerading, firewall rules and one published port.
    """
    start = time.perf_counter()
    run_tool(["ip", "netns", "add", name], "")
    environment = {
        **os.environ,
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": name,
        "CNI_NETNS": f"/run/netns/{name}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(CNI_PATH),
    }
    result: object = None
    for plugin, settings in _cni_chain(number).items():
        config: dict[str, object] = {"cniVersion": "0.4.0", "name": "bench", "type": plugin, **settings}
        if result is not None:
            config["prevResult"] = result
        result = _run_plugin(plugin, config, environment)
    return time.perf_counter() - start


def _cni_chain(number: int) -> dict[str, dict[str, object]]:
    address_plan = {
        "type": "host-local",
        "ranges": [[{"subnet": "10.210.0.0/16"}]],
        "dataDir": _CNI_STATE,
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    port = {"hostPort": 20_000 + number, "containerPort": 8080, "protocol": "tcp"}
    return {
        "ptp": {"ipMasq": True, "ipam": address_plan},
        "firewall": {"backend": "iptables"},
        "portmap": {"capabilities": {"portMappings": True}, "runtimeConfig": {"portMappings": [port]}},
    }


def _run_plugin(plugin: str, config: dict[str, object], environment: dict[str, str]) -> object:
    done = subprocess.run(
        [str(CNI_PATH / plugin)],
        input=json.dumps(config),
        text=True,
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise NetslotError(f"CNI plugin {plugin}: {(done.stdout or done.stderr).strip()[:400]}")
    return json.loads(done.stdout)
