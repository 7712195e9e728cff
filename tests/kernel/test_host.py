"""Hosts of the example specs, built in a throwaway root namespace: what they let through, and what ``up`` touches."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import host_lab
import lab
from host_lab import METADATA, PRIVATE, SERVER, Scene, scene
from netslot.errors import NetslotError, SpecError
from netslot.host.host import Host
from netslot.host.plan import SlotPlan
from netslot.host.slots import Template, Workshop
from netslot.kernel import netns
from netslot.kernel.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Message, Socket
from netslot.spec.load import load as load_spec

SPECS = sorted(str(path.relative_to(host_lab.EXAMPLES)) for path in host_lab.EXAMPLES.glob("*/netslot*.toml"))
SANDBOX, CONTAINER, PROCESS = "sandbox/netslot.toml", "container/netslot.toml", "process/netslot.toml"
LINK, NEIGHBOUR, IPV4_ADDRESS, IPV4_ROUTE = 1, 3, 5, 7
NFTABLES = 7


@contextmanager
def heard(name: str, *, without_links: bool = False) -> Iterator[list[Message]]:
    """What the kernel says about changes to a namespace's links, addresses, routes, neighbours and nft rules."""
    fd = netns.open_named(name)
    messages: list[Message] = []
    if not without_links:
        wait_until_settled(name)
    route, rules = netns.run_in(fd, Socket, NETLINK_ROUTE), netns.run_in(fd, Socket, NETLINK_NETFILTER)
    os.close(fd)
    with route, rules:
        for group in () if without_links else (LINK, NEIGHBOUR, IPV4_ADDRESS, IPV4_ROUTE):
            route.join(group)
        rules.join(NFTABLES)
        yield messages
        for source in (route, rules):
            while found := source.receive(0.01):
                messages += found


def wait_until_settled(name: str) -> None:
    """The kernel notices carriers up to a second later, and says so then."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        links = json.loads(subprocess.run(["ip", "-n", name, "-j", "link"], capture_output=True, check=True).stdout)
        if all((link["operstate"] == "DOWN") == ("LOWER_UP" not in link["flags"]) for link in links):
            return
        time.sleep(0.02)
    raise AssertionError(f"links in {name} do not settle: {links}")


def inside(slot: int, command: str) -> str:
    """What a shell command prints in a slot."""
    where = ["nsenter", f"--net=/run/netns/slot{slot}", "sh", "-c", command]
    return subprocess.run(where, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("spec", SPECS)
def test_an_example_lets_through_what_it_should(spec: str, tmp_path: Path) -> None:
    with scene(spec, tmp_path) as host:
        before = host.rules()
        summary = host.up(2)
        assert (summary.slots, summary.free) == (2, 2)
        assert summary.rules_total == summary.root_rules + 2 * summary.rules_per_slot
        assert host.reaches(1)
        assert host.reaches(2)
        assert not host.reaches(1, METADATA, 80), "the metadata service"
        assert not host.reaches(1, PRIVATE), "a private network"
        assert host.host.verify().drift == []
        host.host.down()
        assert tables(host.rules()) == tables(before)
        assert not host.host.exists


@contextmanager
def alone_on_a_cpu() -> Iterator[None]:
    """Before the kernel's workers, of which one notices carriers some time later (net/core/link_watch.c)."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, cpus)


@pytest.mark.parametrize("pool6", ["", 'pool6 = "fd5c:7::/48"'])
def test_a_slot_carries_packets_as_soon_as_it_is_there(pool6: str, tmp_path: Path) -> None:
    file = tmp_path / "netslot.toml"
    attachment = '[attachment]\nkind = "process"\n'
    file.write_text(f'slots = 60\nuplink = "eth0"\n[addresses]\npool = "10.201.0.0/16"\n{pool6}\n{attachment}')
    spec = load_spec(file)
    (of,) = spec.classes.values()
    with lab.nets("root") as (root,), alone_on_a_cpu():
        listener = root.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind(("0.0.0.0", 9))
        listener.settimeout(2)
        workshop = root.run(Workshop)
        for number in range(1, 61):
            plan = SlotPlan(spec, of, number, "abcdef12")
            root.run(workshop.build, plan, Template((), ()))
            fd = netns.open_named(plan.netns)
            with netns.run_in(fd, socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(plan.netns.encode(), (plan.values["root_address"], 9))
            os.close(fd)
            assert listener.recv(64) == plan.netns.encode()
        listener.close()
        root.run(workshop.destroy, [f"slot{number}" for number in range(1, 61)])
        root.run(workshop.close)


def tables(text: str) -> list[str]:
    """Rules, without legacy tables that are empty: the kernel keeps those once they were used."""
    empty = {f":{name} ACCEPT" for name in ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")}
    found: list[str] = []
    table: list[str] = []
    for line in text.splitlines():
        if line.startswith("*"):
            table = [line]
        elif line == "COMMIT":
            found += table if set(table[1:]) - empty else []
        elif table and line[0] in ":-":
            table.append(line)
        else:
            found.append(line)
    return found


@pytest.mark.parametrize("spec", [SANDBOX, "sandbox/netslot6-nft.toml", CONTAINER, PROCESS])
def test_up_again_touches_nothing(spec: str, tmp_path: Path) -> None:
    with scene(spec, tmp_path) as host:
        host.up(3)
        before = host.rules(), inside(2, "iptables-legacy-save | grep -v '^#'; nft list ruleset"), pins()
        with heard(host.root.name) as root, heard("slot2") as slot:
            assert host.up(3).slots == 3
        assert not root
        assert not slot
        assert before == (host.rules(), inside(2, "iptables-legacy-save | grep -v '^#'; nft list ruleset"), pins())


def pins() -> dict[str, int]:
    """The namespaces, by name, and which they are."""
    return {name: os.stat(netns.NETNS_DIR / name).st_ino for name in netns.names()}


def test_more_slots_are_added_and_fewer_taken_away(tmp_path: Path) -> None:
    with scene(PROCESS, tmp_path) as host:
        host.up(2)
        two = pins()
        with heard("slot1") as slot:
            assert host.up(4).slots == 4
        assert not slot
        assert pins().items() > two.items()
        assert host.reaches(4)
        lease = host.host.lease("tenant")
        assert host.up(1).slots in (1, 2)
        left = {slot.number: slot.state for slot in host.host.slots()}
        assert left[lease.slot] == "leased"
        assert set(pins()) >= {f"slot{number}" for number in left}
        assert not {"slot3", "slot4"} & set(pins())
        host.host.release(lease=lease.id)


def test_a_changed_template_restamps_free_slots_and_leased_ones_when_they_are_released(tmp_path: Path) -> None:
    rule = "--dports 25,465,587"
    with scene(SANDBOX, tmp_path) as host:
        host.up(3)
        lease = host.host.lease("tenant")
        free = next(slot.number for slot in host.host.slots() if slot.state == "free")
        root = host.rules()
        host.rewrite("slot.rules", rule, "--dports 25,465,587,2525")
        with heard(f"slot{lease.slot}") as leased:
            host.up(3)
        assert not leased
        assert "587,2525" in inside(free, "iptables-legacy-save")
        assert "587,2525" not in inside(lease.slot, "iptables-legacy-save")
        assert host.rules() == root, "slots' templates are no business of root"
        host.host.release(lease=lease.id)
        assert "587,2525" in inside(lease.slot, "iptables-legacy-save")
        assert host.host.verify().drift == []


def test_a_changed_root_file_replaces_chains_that_went(tmp_path: Path) -> None:
    with scene(SANDBOX, tmp_path) as host:
        host.up(1)
        assert ":ssh" in host.rules()
        rules = host.spec.parent / "root.rules"
        text = rules.read_text()
        rules.write_text("\n".join(line for line in text.splitlines() if "ssh" not in line) + "\n")
        host.up(1)
        assert ":ssh" not in host.rules()
        assert "-A FORWARD -j NETSLOT-slot-FWD" in host.rules()
        assert host.reaches(1)
        assert host.host.verify().drift == []


def test_a_slot_in_quarantine_is_rebuilt(tmp_path: Path) -> None:
    with scene(PROCESS, tmp_path) as host:
        host.up(2)
        before = pins()
        host.host.engine.ledger.quarantine(2, "a test says so")
        assert host.host.status().free == 1
        assert host.up(2).free == 2
        after = pins()
        assert after["slot2"] != before["slot2"]
        assert after["slot1"] == before["slot1"]
        assert host.reaches(2)


def test_all_slots_exchange_packets_at_once(tmp_path: Path) -> None:
    count = 40
    with scene(PROCESS, tmp_path) as host:
        host.up(count)
        with host.outside.socket() as server:
            server.bind((SERVER, 80))
            server.listen(count)
            clients = [connecting(number) for number in range(1, count + 1)]
            try:
                pending = {client.fileno(): client for client in clients}
                while pending:
                    ready = select.select([], list(pending), [], 3)[1]
                    assert ready, f"{len(pending)} of {count} slots cannot connect"
                    for fd in ready:
                        assert pending.pop(fd).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            finally:
                for client in clients:
                    client.close()


def connecting(slot: int) -> socket.socket:
    fd = netns.open_named(f"slot{slot}")
    try:
        client = netns.run_in(fd, socket.socket)
    finally:
        os.close(fd)
    client.setblocking(False)
    client.connect_ex((SERVER, 80))
    return client


@pytest.mark.parametrize("backend", ["nftables", "iptables-legacy", "iptables-nft"])
def test_several_hosts_share_one_root(backend: str, tmp_path: Path) -> None:
    with scene(PROCESS, tmp_path) as first:
        text = first.spec.read_text() + f'\n[root]\nbackend = "{backend}"\n'
        first.spec.write_text(text)
        before = first.rules()
        first.up(2)
        second = first.spec.with_name("second.toml")
        second.write_text(text.replace("uplink =", 'prefix = "other"\nuplink =').replace("10.203.", "10.204."))
        with Host(tmp_path / "second", root_netns=first.root.name) as other:
            other.up(second, slots=2)
            beside = Scene(first.root, first.outside, second, other)
            assert first.reaches(1)
            assert beside.reaches(1)
            assert first.host.verify().drift == other.verify().drift == []
            first.host.down()
            assert beside.reaches(2), "the second host lives on"
            assert other.verify().drift == []
            other.down()
        assert "NETSLOT" not in first.rules()
        assert "netslot" not in first.rules()
        if backend != "iptables-nft":  # whose tables the first host made and the second still used
            assert tables(first.rules()) == tables(before)


@pytest.mark.parametrize("spec", [SANDBOX, CONTAINER, "sandbox/netslot6-nft.toml"])
def test_root_does_not_change_while_slots_are_leased(spec: str, tmp_path: Path) -> None:
    with scene(spec, tmp_path) as host:
        host.up(3)
        before = host.rules(), host.root.sh("nft -s -a list ruleset")
        with heard(host.root.name, without_links=True) as changes:
            for number in range(9):
                with host.host.acquire(f"tenant-{number}", wait=10) as lease:
                    if "allow" in lease.record.params:
                        host.host.update(lease.id, {"allow": ["198.51.100.0/24"]})
                    assert host.reaches(lease.slot)
        assert not changes, "the kernel announced a change of root's rules"
        assert before == (host.rules(), host.root.sh("nft -s -a list ruleset"))


def test_a_change_of_roots_rules_would_be_heard(tmp_path: Path) -> None:
    with scene(CONTAINER, tmp_path) as host:
        host.up(1)
        with heard(host.root.name, without_links=True) as changes:
            host.root.sh("nft add rule inet netslot-slot forward counter")
        assert changes


# --- beside others -----------------------------------------------------------------------------------

DOCKER = """\
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""
FIREWALLD = """\
table inet firewalld {
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname "lo" accept
		jump filter_FORWARD_POLICIES
		ct state invalid drop
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD_POLICIES {
		%s
		iifname "eth0" jump filter_FWD_public
	}
	chain filter_FWD_public {
		accept
	}
	chain nat_POSTROUTING {
		type nat hook postrouting priority srcnat + 10; policy accept;
	}
}
"""
BACKENDS = {
    "nftables": '\n[root]\nbackend = "nftables"\n',
    "iptables-legacy": '\n[root]\nbackend = "iptables-legacy"\n',
    "iptables-nft": '\n[root]\nbackend = "iptables-nft"\n',
}


def load(net: lab.Net, tool: str, text: str) -> None:
    net.sh(f"{tool} <<'END'\n{text}END\n")


@pytest.mark.parametrize("docker", ["legacy", "nft"])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_beside_docker(backend: str, docker: str, tmp_path: Path) -> None:
    with scene(PROCESS, tmp_path) as host:
        host.spec.write_text(host.spec.read_text() + BACKENDS[backend])
        load(host.root, f"iptables-{docker}-restore", DOCKER)
        before = host.rules()
        host.up(2)
        theirs = set(tables(before))
        assert theirs <= set(tables(host.rules())), "rules of Docker's are gone"
        assert host.reaches(1), "Docker's policy of drop is in the way"
        host.up(2)
        assert host.host.verify().drift == []
        host.host.down()
        assert tables(host.rules()) == tables(before)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("admits", [True, False], ids=["admits", "rejects"])
def test_beside_firewalld(backend: str, admits: bool, tmp_path: Path) -> None:
    with scene(PROCESS, tmp_path) as host:
        host.spec.write_text(host.spec.read_text() + BACKENDS[backend])
        load(host.root, "nft -f -", FIREWALLD % ('iifname "slot*" accept' if admits else 'iifname "lan0" accept'))
        before = host.rules()
        host.up(2)
        assert host.reaches(1) == admits, "an accept in one table overrides no drop in another"
        host.host.down()
        assert tables(host.rules()) == tables(before)


# --- refused -----------------------------------------------------------------------------------------


def refused(host: Scene, message: str, error: type[NetslotError] = SpecError) -> None:
    """``up`` says no, and root is as it was."""
    before, names = host.rules(), netns.names()
    forwarding = host.root.sh("cat /proc/sys/net/ipv4/conf/*/forwarding")
    with pytest.raises(error, match=message):
        host.up(1)
    assert tables(host.rules()) == tables(before)
    assert netns.names() == names
    assert host.root.sh("cat /proc/sys/net/ipv4/conf/*/forwarding") == forwarding


def test_a_chain_of_somebody_else_is_not_taken_over(tmp_path: Path) -> None:
    with scene(SANDBOX, tmp_path) as host:
        host.root.sh("iptables-legacy -N ssh && iptables-legacy -A ssh -p tcp --dport 22 -j ACCEPT")
        refused(host, "chain ssh of iptables-legacy's table filter exists")
        assert "-A ssh -p tcp" in host.rules()


def test_a_table_of_somebody_else_is_not_taken_over(tmp_path: Path) -> None:
    with scene("sandbox/netslot-nft.toml", tmp_path) as host:
        text = (host.spec.parent / "root.nft").read_text()
        name = next(line for line in text.splitlines() if line.startswith("table ")).removesuffix("{").strip()
        load(host.root, "nft -f -", f"{name} {{\n chain theirs {{\n counter\n }}\n }}\n")
        refused(host, "exists in the root namespace and is not netslot's")
        assert "chain theirs" in host.rules()


def test_a_missing_uplink_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with scene(SANDBOX, tmp_path) as host:
        host.rewrite("netslot.toml", 'uplink = "eth0"', 'uplink = "eth7"')
        refused(host, "no link 'eth7'")
        assert not (tmp_path / "state").exists()


def test_a_root_rule_that_names_a_slot_is_refused(tmp_path: Path) -> None:
    with scene(SANDBOX, tmp_path) as host:
        host.rewrite("root.rules", "-A PREROUTING -p tcp -j tcp-flags", "-A PREROUTING -i slot7 -p tcp -j tcp-flags")
        refused(host, r"root\.rules:\d+")
        assert not (tmp_path / "state").exists()


def test_names_of_somebody_else_are_refused(tmp_path: Path) -> None:
    with scene(PROCESS, tmp_path) as host:
        netns.create("slot1")
        try:
            refused(host, "slot1", NetslotError)
        finally:
            netns.unpin("slot1")
        host.root.ip("link add slot1 type veth peer name theirs")
        refused(host, "slot1 is not netslot's", NetslotError)
        assert "slot1" in host.root.sh("ip link")


def test_a_rule_that_the_tool_refuses_changes_nothing(tmp_path: Path) -> None:
    with scene(SANDBOX, tmp_path) as host:
        host.rewrite(
            "root.rules", "-A PREROUTING -p tcp -j tcp-flags", "-A PREROUTING -p tcp --nonsense -j tcp-flags"
        )
        refused(host, "nonsense")


# --- seen from outside -------------------------------------------------------------------------------


def test_show_and_exec(tmp_path: Path) -> None:
    with scene(CONTAINER, tmp_path) as host:
        host.up(1)
        fields = host.host.show(1)
        assert {"slot", "netns", "netns_path", "address", "state"} <= fields.keys()
        assert {"up0", "in0"} <= {link["name"] for link in fields["links"]}
        assert any("table ip slot" in line for line in fields["rules"]["nft"])
        assert fields["workload_netns"] == "slot1-in"
        assert host.host.execute(1, ["sh", "-c", "ip -o address show dev eth0 | grep -q 172.17.0.2"]) == 0
        assert host.host.execute(1, ["sh", "-c", "exit 7"]) == 7
        assert host.host.execute(1, ["sh", "-c", "kill -9 $$"]) == -9


def test_exec_runs_in_the_slots_cgroup_from_its_first_moment(tmp_path: Path) -> None:
    parent = f"netslot-exec-{os.getpid()}"
    with scene(PROCESS, tmp_path) as host:
        host.spec.write_text(host.spec.read_text() + f'\n[cgroup]\nparent = "{parent}"\npids = 20\n')
        host.up(1)
        seen = tmp_path / "seen"
        assert host.host.execute(1, ["sh", "-c", f"cat /proc/self/cgroup > {seen}"]) == 0
        lines = seen.read_text().splitlines()
        assert any(line.startswith("0::") and line.endswith(f"/{parent}/slot1") for line in lines), lines
        assert sum(line.endswith(f"/{parent}/slot1") for line in lines) >= 1
