"""A host whose slots have all five policies: built, used, changed behind netslot's back, verified, recycled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
-A OUTPUT -p udp -m udp --dport 9 -m cgroup --path ${cgroup} -j DROP
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


_CGROUP = f"{PARENT}/{PREFIX}2"
_TOOL = f"{sys.executable} {Path(__file__).parents[1] / 'strange_program.py'}"
CHANGES = {
    "a rule": ("iptables-legacy -D FORWARD 1", "iptables filter FORWARD"),
    "a rule of the rates": ("nft delete table inet netslot_rates", "nftables inet netslot_rates"),
    "a limit of the rates": (
        "nft flush chain inet netslot_rates leave; nft add rule inet netslot_rates leave"
        " oifname up0 limit rate over 9/second burst 500 packets counter drop",
        "nftables inet netslot_rates leave: rule 1 of 1 changed",
    ),
    "a BPF program": ("tc filter del dev up0 egress prio 20", "bpf up0 egress 20: program netslot/nat is missing"),
    "the BPF filter's program": ("tc filter del dev up0 egress prio 3", "bpf up0 egress 3"),
    "all BPF programs": ("tc qdisc del dev up0 clsact", "bpf up0 ingress 20: program netslot/nat is missing"),
    "a foreign filter": (
        "tc filter add dev up0 egress prio 27 u32 match u32 0 0 flowid 1:1",
        "bpf up0 egress 27: program u32 is not the slot's",
    ),
    "a program before ours": (f"{_TOOL} egress up0", "link up0 tcx egress: program [0-9]+ not the slot's"),
    "a program on the cgroup": (
        f"{_TOOL} cgroup 1 {cgroupfs.unified(_CGROUP)}",
        f"cgroup {_CGROUP} cgroup/egress: program strange not the slot's",
    ),
    "a token bucket": ("tc qdisc del dev up0 root", "rates up0: the token bucket is missing"),
    "another queue": ("tc qdisc replace dev up0 root pfifo limit 5", "link up0: queue pfifo .* not the slot's"),
    "the bandwidth": (
        "tc qdisc change dev up0 root tbf rate 81mbit burst 100000 limit 600000",
        "rates up0: 81000000 bits",
    ),
    "the burst": (
        "tc qdisc change dev up0 root tbf rate 80mbit burst 90000 limit 600000",
        "rates up0: a burst of (89|90)[0-9]* bytes, not 100000",
    ),
    "the queue": (
        "tc qdisc change dev up0 root tbf rate 80mbit burst 100000 limit 500000",
        "rates up0: 500000 bytes may wait, not 600000",
    ),
    "a route": ("ip route del default table 100", "routes: 0.0.0.0/0 table 100 is missing"),
    "another gateway": (
        "ip route replace default via 10.99.9.9 dev up0 onlink table 100 proto 78",
        "routes: 0.0.0.0/0 table 100 is missing",
    ),
    "a foreign route in our table": (
        "ip route add 203.0.113.0/24 dev up0 table 100",
        "route table 100: 203.0.113.0/24",
    ),
    "a routing rule": ("ip rule del priority 100", "routes: IPv4 rule 100 is missing"),
    "a foreign routing rule": (
        "ip rule add from 10.0.0.0/8 lookup 100",
        "routing rules: IPv4 rule 99 not the slot's",
    ),
    "a foreign rule of ours": (
        "ip -6 rule add pref 5 lookup 100 proto 78",
        "routes: IPv6 rule 5 should not be there",
    ),
    "a foreign route of ours": (
        "ip route add blackhole 192.0.2.0/24 proto 78",
        "routes: blackhole 192.0.2.0/24 should not be there",
    ),
    "a limit": (
        f"echo 99 > {cgroupfs.directory(_CGROUP, 'pids')}/pids.max",
        "cgroup .*: pids: pids.max is 99, not 50",
    ),
    "a limit taken away": (
        f"echo max > {cgroupfs.directory(_CGROUP, 'pids')}/pids.max",
        "cgroup .*: pids: pids.max is max, not 50",
    ),
}


@pytest.mark.parametrize("leased", [False, True], ids=["free", "leased"])
def test_verify_finds_any_change_in_any_policy_and_repairs_it(host: tuple[Host, lab.Net], leased: bool) -> None:
    """In a leased slot everything is repaired around the tenant: the process in it lives on."""
    made, _ = host
    assert made.verify().drift == []
    leases = [made.lease(f"tenant {number}") for number in range(3)] if leased else []
    process = made.start(2, ["sleep", "300"]) if leased else None
    for name, (command, words) in CHANGES.items():
        inside(2, command)
        found = "\n".join(map(str, made.verify().drift))
        assert re.search(f"slot 2: {words}", found), f"{name}: {found or 'not found'}"
        assert all("slot 2" in line for line in found.splitlines()), found
        assert made.verify(repair=True).unrepaired == 0, name
        assert made.verify().drift == [], name
        assert process is None or process.poll() is None, f"{name}: the tenant's process was killed"
    if process is not None:
        process.kill()
        process.wait()
    for number in range(len(leases)):
        made.release(owner=f"tenant {number}")


def test_what_others_hold_by_a_bpf_link_is_taken_from_its_place(host: tuple[Host, lab.Net]) -> None:
    made, _ = host
    for arguments, words in (
        (f"cgroup 0 {cgroupfs.unified(_CGROUP)}", "cgroup/ingress: program strange not the slot's"),
        ("ingress up0", "link up0 tcx ingress: program"),
    ):
        command = ["nsenter", f"--net=/run/netns/{PREFIX}2", *_TOOL.split(), *arguments.split(), "held"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            found = made.verify(repair=True)
            assert words in str(found.drift[0])
            assert found.unrepaired == 0
            assert made.verify().drift == []
            holder.communicate("\n")


def test_a_frozen_tenant_stays_frozen_and_a_limit_that_cannot_be_lowered_is_told(host: tuple[Host, lab.Net]) -> None:
    """Freezing is one write, and nobody's drift while somebody is inside."""
    made, _ = host
    lease = made.lease("tenant")
    assert lease is not None
    path = f"{PARENT}/{PREFIX}{lease.slot}"
    process = made.start(lease.slot, ["sleep", "300"])
    cgroupfs.freeze(path, True)
    assert made.verify(repair=True).drift == []
    assert cgroupfs.read(cgroupfs.unified(path) / "cgroup.freeze") == "1"
    cgroupfs.kill_and_wait(path)
    process.wait()
    assert "is frozen, and nobody is in it" in str(made.verify(repair=True).drift)
    assert made.verify().drift == []
    made.release(owner="tenant")


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


def test_what_passes_and_what_programs_drop_is_shown_and_counted(host: tuple[Host, lab.Net]) -> None:
    made, _ = host
    name = f"{PREFIX}1"
    send = "echo x > /dev/udp/{}/9"
    for address in ("198.51.100.7", "203.0.113.9", "203.0.113.9"):  # on the filter's list, and not
        where = ["nsenter", f"--net=/run/netns/{name}-in", "bash", "-c", send.format(address)]
        subprocess.run(where, check=True, capture_output=True)
    plan = made.engine.plan(1, made.slot(1).class_name)
    egress = made.show(1)["traffic"]["egress"]
    assert (egress["passed"]["packets"], egress["dropped"]["packets"]) == (1, 2)
    assert egress["dropped"]["bytes"] == 2 * (14 + 20 + 8 + 2)
    line = 'netslot_slot_uplink_packets_total{slot="1",direction="egress",verdict="dropped"} 2'
    assert line in made.engine.run(lambda _: metrics.traffic(plan)).decode().splitlines()
    inside(1, "tc qdisc del dev up0 clsact")
    assert "traffic" not in made.show(1)
    assert b"uplink" not in made.engine.run(lambda _: metrics.traffic(plan))
    made.verify(repair=True)


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


def test_a_rule_matches_the_slots_cgroup_also_after_recycling(host: tuple[Host, lab.Net]) -> None:
    """Recycling makes the cgroup anew, and the rule must mean the new one."""
    made, _ = host
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.7', 9))"
    command = f'{sys.executable} -c "{send}"'
    for _ in range(2):
        lease = made.lease(owner="one")
        entrance = cgroupfs.unified(f"{PARENT}/{PREFIX}{lease.slot}") / "cgroup.procs"
        inside(lease.slot, command)
        refused = inside(lease.slot, f"echo $$ > {entrance}; {command} 2>&1 || true")
        assert "PermissionError" in refused
        made.release(owner="one")
    assert made.verify().drift == []
