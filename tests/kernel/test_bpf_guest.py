"""BPF programs on a slot's link to its workload: real packets through taps and veths, in both families."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

import attack_lab
import lab
import packets as p
from dying import dies_at
from netslot.errors import SpecError
from netslot.host.host import Host
from netslot.host.plan import SlotPlan
from netslot.kernel import bpf, netlink, netns, tc
from netslot.serve import metrics

PREFIX = f"gu{os.getpid() % 100000}x"
OUTSIDE = {4: attack_lab.OUTSIDE, 6: attack_lab.OUTSIDE6}
SPEC = f"""\
slots = 1
prefix = "{PREFIX}"
uplink = "eth0"
[addresses]
pool = "10.201.0.0/24"
pool6 = "fd5c:a7e:10::/48"
[attachment]
kind = "%s"
[root]
backend = "nftables"
[nat]
kind = "bpf"
[parameters.services]
type = "ports"
[parameters.size]
type = "int"
default = 0
[bpf]
counters = true
[[bpf.programs]]
object = "guest.o"
program = "sends"
hook = "guest/ingress"
constants = {{ number = "${{slot}}" }}
maps = {{ services = "services" }}
[[bpf.programs]]
object = "guest.o"
program = "gets"
hook = "guest/egress"
maps = {{ largest = "size" }}
[limits]
hold_down = "0s"
"""
PROGRAM = """
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
char gpl[] SEC("license") = "GPL";
const volatile __u32 number;
struct service { __u8 protocol, unused; __u16 port; };
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64);
  __type(key, struct service); __type(value, __u32); } services SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1);
  __type(key, __u32); __type(value, __u64); } largest SEC(".maps");
SEC("tc") int sends(struct __sk_buff *skb)
{
    struct service key = {};
    int six = skb->protocol == bpf_htons(ETH_P_IPV6);
    if (!six && skb->protocol != bpf_htons(ETH_P_IP))
        return TC_ACT_UNSPEC;
    bpf_skb_load_bytes(skb, ETH_HLEN + (six ? 6 : 9), &key.protocol, 1);
    if (key.protocol != 17)
        return TC_ACT_UNSPEC;
    bpf_skb_load_bytes(skb, ETH_HLEN + (six ? 40 : 20) + 2, &key.port, 2);
    return number && bpf_map_lookup_elem(&services, &key) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}
SEC("tc") int gets(struct __sk_buff *skb)
{
    __u32 zero = 0;
    __u64 *most = bpf_map_lookup_elem(&largest, &zero);
    return most && *most && skb->len > *most ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("clang"):
        pytest.skip("NOT CHECKED: clang is not here to compile a user's program with")
    directory = tmp_path_factory.mktemp("guest")
    (directory / "guest.c").write_text(PROGRAM)
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    command = ["clang", "-O2", "-g", "-target", "bpf", include, "-c", "guest.c", "-o", "guest.o"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "guest.o"


class Played:
    """A host, and the workload of its first slot."""

    def __init__(self, directory: Path, program: Path, text: str, root: lab.Net, outside: lab.Net) -> None:
        self.root, self.outside = root, outside
        self.spec = directory / "netslot.toml"
        self.spec.write_text(text)
        self.state = directory / "state"
        shutil.copy(program, directory)

    @contextmanager
    def up(self) -> Iterator[Host]:
        with Host(self.state, root_netns=self.root.name) as host:
            try:
                host.up(self.spec)
                with host.engine.holding(1):
                    pass  # what a host opens when it first needs it, and keeps open, is no test's to close
                yield host
            finally:
                host.down(force=True)

    def passes(self, host: Host, version: int, port: int, answer: int = 8) -> tuple[bool, bool]:
        """Whether a datagram of slot 1's workload gets to the outside, and an answer of that many bytes to it."""
        plan = plan_of(host)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with ExitStack() as held:
            slot = held.enter_context(lab.Place(plan.netns))
            sender = attack_lab.SENDERS[plan.of.attachment.kind](plan, slot)
            held.callback(sender.close)
            slot.wait_for_carrier(str(plan.guest_if))
            server = held.enter_context(self.outside.socket(socket.SOCK_DGRAM, family))
            server.bind((OUTSIDE[version], port))
            server.settimeout(0.2)
            own = host.attachment(1)["guest_address" if version == 4 else "guest_address6"]
            datagram = p.udp(own, OUTSIDE[version], 4000, port, b"question")
            sender.packet((p.ipv4 if version == 4 else p.ipv6)(own, OUTSIDE[version], p.UDP, datagram))
            try:
                peer = server.recvfrom(100)[1]
            except TimeoutError:
                return False, False
            server.sendto(b"a" * answer, peer)
            return True, sender.hears(lambda frame: frame.endswith(b"a" * answer))


def plan_of(host: Host) -> SlotPlan:
    return host.engine.plan(1, host.slot(1).class_name)


@contextmanager
def played(directory: Path, program: Path, kind: str) -> Iterator[Played]:
    with lab.nets("root", "outside") as (root, outside):
        attack_lab._wire(root, outside)
        yield Played(directory, program, SPEC % kind, root, outside)


@pytest.mark.parametrize("kind", ["tap", "veth"])
def test_what_the_workload_sends_and_gets_is_judged(kind: str, program: Path, tmp_path: Path) -> None:
    with played(tmp_path, program, kind) as made, made.up() as host:
        assert host.verify().drift == []
        lease = host.lease("alice", params={"services": ["udp:7000:7000"]})
        assert lease.slot == 1
        for version in (4, 6):
            assert made.passes(host, version, 7000) == (True, True)
            assert made.passes(host, version, 7001) == (False, False), "a port that the lease does not name"
            assert made.passes(host, version, 7000, 600) == (True, True)
        counted = host.show(1)["traffic"]
        assert counted["guest/ingress"]["dropped"]["packets"] == 2
        assert counted["guest/egress"]["dropped"]["packets"] == 0
        assert all(each["passed"]["packets"] >= 4 for each in counted.values()), "and ICMP errors of unheard answers"
        line = 'netslot_slot_guest_packets_total{slot="1",direction="ingress",verdict="dropped"} 2'
        plan = plan_of(host)
        assert line in host.engine.run(lambda _: metrics.traffic(plan)).decode().splitlines()
        host.update(lease.id, {"services": ["udp:7001:7001"], "size": 500})
        for version in (4, 6):
            assert made.passes(host, version, 7000) == (False, False)
            assert made.passes(host, version, 7001) == (True, True)
            assert made.passes(host, version, 7001, 600) == (True, False), "larger than the lease allows"
        assert host.verify().drift == []
        inner = plan.inner_netns and os.stat(f"/run/netns/{plan.inner_netns}").st_ino
        host.release(lease=lease.id)
        if inner:
            assert os.stat(f"/run/netns/{plan.inner_netns}").st_ino != inner, "recycled, and not built anew"
        assert host.verify().drift == []
        host.lease("bob", params={"services": ["udp:7002:7002"]})
        for version in (4, 6):
            assert made.passes(host, version, 7001) == (False, False), "the last tenant's"
            assert made.passes(host, version, 7002, 600) == (True, True)


@pytest.mark.parametrize("kind", ["tap", "veth"])
def test_of_a_roster_too(kind: str, program: Path, tmp_path: Path) -> None:
    tenant = {
        "name": "alice",
        "class": "vm",
        "link": "tap17",
        "mac": "02:00:00:00:00:17",
        "addresses": ["10.64.0.6", "2001:db8:17::6"],
        "gateways": ["10.64.0.5", "2001:db8:17::5"],
    }
    (tmp_path / "tenants.json").write_text(json.dumps({"tenants": [tenant]}))
    with played(tmp_path, program, kind) as made:
        text = made.spec.read_text()
        text = re.sub(r"slots = 1\n|\[(addresses|nat)\]\n(?:[a-z].*\n)+", "", text)
        text = text.replace('backend = "nftables"', 'backend = "nftables"\npreset = false')
        made.spec.write_text('roster = "tenants.json"\n' + text + "[class.vm]\n")
        made.outside.ip(
            f"route add 10.64.0.0/16 via {attack_lab.HOST}", f"route add 2001:db8:17::/48 via {attack_lab.HOST6}"
        )
        made.root.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        with made.up() as host:
            lease = host.lease("alice", params={"services": ["udp:7000:7000"], "size": 500})
            for version in (4, 6):
                assert made.passes(host, version, 7000) == (True, True)
                assert made.passes(host, version, 7001) == (False, False)
                assert made.passes(host, version, 7000, 600) == (True, False)
            host.release(lease=lease.id)
            assert host.verify().drift == []
            assert made.passes(host, 4, 7000) == (False, False), "the last lease's"


def somebodys(slot: lab.Place, link: str, hook: int, priority: int) -> None:
    """Attach a program that lets everything pass."""

    def act() -> None:
        code = struct.pack("<BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)  # r0 = -1; exit
        program = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, code, "GPL", name="other")
        with netlink.Socket() as sock:
            sock.execute([tc.set_filter(socket.if_nametoindex(link), hook, priority, program, "other")])
        os.close(program)

    slot.run(act)


@pytest.mark.parametrize("kind", ["tap", "veth"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("tc filter del dev {link} ingress prio 30", "bpf {link} ingress 30: program netslot/user/sends is missing"),
        ("tc filter del dev {link} egress prio 1", "bpf {link} egress 1: program netslot/count is missing"),
        ("tc qdisc del dev {link} clsact", "bpf {link} egress 30: program netslot/user/gets is missing"),
        ((tc.INGRESS, 30), "bpf {link} ingress 30: program netslot/user/sends is another one (other)"),
        ((tc.EGRESS, 5), "bpf {link} egress 5: program other is not the slot's"),
        ("ip link del {link}", "bpf {link} ingress 30: program netslot/user/sends is missing"),
    ],
    ids=["missing", "uncounted", "detached", "replaced", "foreign", "link gone"],
)
def test_verify_names_what_was_changed_and_mends_it(
    kind: str, change: str | tuple[int, int], told: str, program: Path, tmp_path: Path
) -> None:
    with played(tmp_path, program, kind) as made, made.up() as host:
        lease = host.lease("alice", params={"services": ["udp:7000:7000"]})
        link = str(plan_of(host).guest_if)
        with lab.Place(lease.netns) as slot:
            if isinstance(change, str):
                slot.sh(change.format(link=link))
            else:
                somebodys(slot, link, *change)
        drift = [str(each) for each in host.verify().drift]
        assert f"slot 1: {told.format(link=link)}" in drift
        report = host.verify(repair=True)
        assert not report.unrepaired, report
        assert host.verify().drift == []
        assert made.passes(host, 4, 7000) == (True, True)
        assert made.passes(host, 6, 7001) == (False, False)


def test_hooks_are_made_where_a_template_asks_for_them(program: Path, tmp_path: Path) -> None:
    only_guest = re.sub(r'\[nat\]\nkind = "bpf"\n|counters = true\n', "", SPEC)
    neither = re.sub(r"\[\[bpf\.programs\]\]\n(?:[a-z].*\n)+", "", SPEC)
    for text, expected in ((only_guest, {"tap0"}), (neither, {"up0"})):
        with lab.nets("root", "outside") as (root, outside):
            attack_lab._wire(root, outside)
            directory = tmp_path / str(len(expected & {"up0"}))
            directory.mkdir()
            made = Played(directory, program, text % "tap", root, outside)
            with made.up() as host, lab.Place(host.slot(1).netns) as slot:
                hooked = re.findall(r"clsact \S+ dev (\S+)", slot.sh("tc qdisc show"))
                uplink = plan_of(host).uplink_if
                assert {each.replace(uplink, "up0") for each in hooked} == expected
                assert host.verify().drift == []
                slot.sh(f"tc qdisc add dev {'tap0' if expected == {'up0'} else uplink} clsact")
                assert "queue clsact" in str(host.verify().drift)
                assert not host.verify(repair=True).unrepaired


def test_a_process_has_no_link_to_hang_a_program_on(program: Path, tmp_path: Path) -> None:
    with played(tmp_path, program, "process") as made, Host(made.state, root_netns=made.root.name) as host:
        made.spec.write_text(made.spec.read_text().replace('[nat]\nkind = "bpf"\n', ""))
        line = made.spec.read_text().splitlines().index('hook = "guest/ingress"') + 1
        with pytest.raises(SpecError, match=rf"netslot.toml:{line}: bpf.programs.0.hook: a process lives in "):
            host.up(made.spec)


@pytest.mark.parametrize("kind", ["tap", "veth"])
def test_nothing_is_left_of_a_build_that_is_killed(kind: str, program: Path, tmp_path: Path) -> None:
    with played(tmp_path, program, kind) as made:

        def build() -> None:
            with Host(made.state, root_netns=made.root.name) as host:
                host.up(made.spec)

        for step in range(5, 400, 23):
            died = dies_at(step, partial(build))
            with Host(made.state, root_netns=made.root.name) as host:
                if host.exists:
                    host.down(force=True)
            assert not [name for name in netns.names() if name.startswith(PREFIX)]
            assert PREFIX not in made.root.sh("ip link")
            if not died:
                break
