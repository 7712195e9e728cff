"""A host whose slots have all five policies: built, used, changed behind netslot's back, verified, recycled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import lab
from netslot.host.host import Host
from netslot.kernel import cgroupfs
from netslot.serve import metrics

PARENT = f"netslot-test-{os.getpid()}"
PREFIX = f"ap{os.getpid() % 100000}x"
SPEC = f"""\
slots = 3
prefix = "{PREFIX}"
uplink = "eth0"
[addresses]
pool = "10.201.0.0/24"
[attachment]
kind = "veth"
[rules]
backend = "iptables-legacy"
ipv4 = "slot.rules"
[root]
backend = "nftables"
[nat]
kind = "bpf"
[parameters.allow]
type = "cidrs"
default = ["198.51.100.0/24", "2001:db8::/32"]
[parameters.blocked]
type = "cidrs"
default = []
[parameters.speed]
type = "rate"
default = "80M"
[bpf]
counters = true
[bpf.filter]
allow = "allow"
[cgroup]
parent = "{PARENT}"
cpu = 1
memory = "64Mi"
pids = 50
[[routes.routes]]
to = "@blocked"
kind = "blackhole"
[[routes.routes]]
to = "default"
via = "${{root_address}}"
table = 100
[[routes.rules]]
priority = 100
table = 100
mark = 7
[rates]
connections = 100
[rates.egress]
bandwidth = "${{speed}}"
packets = 5000
"""
RULES = """\
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
-A FORWARD -i ${guest_if} -s ${guest_address} -j ACCEPT
-A FORWARD -i ${uplink_if} -d ${guest_address} -j ACCEPT
COMMIT
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[tuple[Host, lab.Net]]:
    """The host, and a namespace outside behind its uplink."""
    (tmp_path / "netslot.toml").write_text(SPEC)
    (tmp_path / "slot.rules").write_text(RULES)
    with lab.nets("root", "outside") as (root, outside):
        root.ip(
            f"link add eth0 type veth peer name eth0 netns {outside.name}",
            "addr add 198.51.100.1/24 dev eth0",
            "link set eth0 up",
        )
        root.sysctl(ipv4__ip_forward=1)
        outside.ip("addr add 198.51.100.7/24 dev eth0", "link set eth0 up")
        with Host(tmp_path / "state", root_netns=root.name) as made:
            made.up(tmp_path / "netslot.toml")
            try:
                yield made, outside
            finally:
                made.down(force=True)
    assert not (cgroupfs.unified_root() / PARENT).exists()


def inside(slot: int, command: str) -> str:
    where = ["nsenter", f"--net=/run/netns/{PREFIX}{slot}", "sh", "-c", command]
    return subprocess.run(where, capture_output=True, text=True, check=True).stdout


CHANGES = {
    "a rule": "iptables-legacy -D FORWARD 1",
    "a rule of the rates": "nft delete table inet netslot_rates",
    "a BPF program": "tc filter del dev up0 egress prio 20",
    "the BPF filter's program": "tc filter del dev up0 egress prio 3",
    "a token bucket": "tc qdisc del dev up0 root",
    "a route": "ip route del default table 100",
    "a routing rule": "ip rule del priority 100",
    "a foreign route of ours": "ip route add blackhole 192.0.2.0/24 proto 78",
    "a limit": f"echo 99 > {cgroupfs.directory(f'{PARENT}/{PREFIX}2', 'pids')}/pids.max",
}


def test_verify_finds_any_change_in_any_policy_and_repairs_it(host: tuple[Host, lab.Net]) -> None:
    made, _ = host
    assert made.verify().drift == []
    for name, command in CHANGES.items():
        inside(2, command)
        found = made.verify().drift
        assert found, f"{name} was changed and not found"
        assert all("slot 2" in str(drift) for drift in found), found
        made.verify(repair=True)
        assert made.verify().drift == [], name


def test_what_a_slot_uses_is_shown_and_counted(host: tuple[Host, lab.Net]) -> None:
    made, _ = host
    process = made.start(1, ["sleep", "30"])
    try:
        shown = made.show(1)["usage"]
        plan = made.engine.plan(1, made.slot(1).class_name)
        lines = metrics.usage(plan).decode().splitlines()
    finally:
        process.kill()
        process.wait()
    assert shown["processes"] == 1
    assert 'netslot_slot_processes{slot="1"} 1' in lines
    assert any(line.startswith('netslot_slot_cpu_seconds_total{slot="1"}') for line in lines)


def test_a_lease_binds_all_of_them_and_recycling_undoes_it(host: tuple[Host, lab.Net]) -> None:
    made, outside = host
    server = lab.Echo(outside, "198.51.100.7")
    lease = made.lease(
        owner="one", params={"allow": ["198.51.100.7/32"], "speed": "8M", "blocked": ["203.0.113.0/24"]}
    )
    netns_name = f"{PREFIX}{lease.slot}"

    def connects() -> bool:
        where = ["nsenter", f"--net=/run/netns/{netns_name}-in", "bash", "-c", ": < /dev/tcp/198.51.100.7/7000"]
        return subprocess.run(where, capture_output=True, timeout=5, check=False).returncode == 0

    assert connects()
    assert "blackhole 203.0.113.0/24" in inside(lease.slot, "ip route show table all proto 78")
    assert "rate 8Mbit" in inside(lease.slot, "tc qdisc show dev up0")
    made.update(lease.id, {"allow": ["192.0.2.1/32"]})
    with pytest.raises(subprocess.TimeoutExpired):
        connects()
    assert made.verify().drift == []
    made.release(owner="one")
    assert "203.0.113.0/24" not in inside(lease.slot, "ip route show table all proto 78")
    assert "rate 80Mbit" in inside(lease.slot, "tc qdisc show dev up0")
    assert made.verify().drift == []
    server.close()
