"""Verify on a host of eight slots: one change behind netslot's back in one slot is found, named, and put right."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostlab import PlayedHost, played
from netslot.host.host import Host

SPEC = """\
prefix = "{prefix}"
uplink = "up0"
slots = 8
[addresses]
pool = "10.201.0.0/16"
[attachment]
kind = "tap"
[rules]
backend = "iptables-legacy"
ipv4 = "slot.rules"
[root]
backend = "nftables"
[parameters.allow]
type = "cidrs"
default = ["198.51.100.0/24"]
[[routes.routes]]
to = "192.0.2.64/26"
kind = "blackhole"
[limits]
hold_down = "0s"
"""
RULES = """\
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
-A FORWARD -i ${guest_if} -m set --match-set allow dst -j ACCEPT
-A FORWARD -i ${guest_if} -p tcp --dport 25 -j DROP
-A FORWARD -i ${uplink_if} -m conntrack --ctstate ESTABLISHED -j ACCEPT
COMMIT
*nat
-A POSTROUTING -o ${uplink_if} -j SNAT --to-source ${address}
COMMIT
"""
STRANGE = f"{sys.executable} {Path(__file__).parents[1] / 'strange_program.py'}"
SLOT = 5
"""Verify compares the first of the eight in full, and the others with what it learnt from that one."""
ROOT_ADDRESS, ADDRESS = f"10.201.0.{2 * SLOT}", f"10.201.0.{2 * SLOT + 1}"

CHANGES = {
    "rule added": ("iptables-legacy -A FORWARD -j ACCEPT", "FORWARD"),
    "rule gone": ("iptables-legacy -D FORWARD 2", "dport 25|FORWARD"),
    "another slot's address in a rule": (
        "iptables-legacy -t nat -R POSTROUTING 1 -o up0 -j SNAT --to-source 10.201.0.3",
        "10.201.0.3|nat",
    ),
    "policy": ("iptables-legacy -P FORWARD ACCEPT", "FORWARD"),
    "table of another kind": ("iptables-legacy -t raw -A PREROUTING -j NOTRACK", "raw"),
    "table of the other family": ("ip6tables-legacy -A FORWARD -j ACCEPT", "ip6tables"),
    "element added": ("ipset add allow 203.0.113.0/24", r"element 203\.0\.113\.0/24 added"),
    "element gone": ("ipset del allow 198.51.100.0/24", r"element 198\.51\.100\.0/24 missing"),
    "another set": ("ipset create strange hash:ip", "strange"),
    "promiscuous link": ("ip link set tap0 promisc on", "flags are 0x100, not 0x0"),
    "link without ARP": ("ip link set up0 arp off", "flags are 0x80, not 0x0"),
    "address added": ("ip addr add 10.201.9.9/31 dev up0", r"address 10\.201\.9\.9/31 not the slot's"),
    "address gone": ("ip addr del 172.16.0.1/30 dev tap0", r"address 172\.16\.0\.1/30 missing"),
    "route added": ("ip route add 203.0.113.0/24 via {root_address}", r"203\.0\.113\.0/24 via"),
    "route elsewhere": (
        "ip route replace default via 172.16.0.2 dev tap0",
        r"default via 172\.16\.0\.2 dev tap0 not the slot's",
    ),
    "route gone": ("ip route del default", "default via .* missing"),
    "route of another table": ("ip route add 203.0.113.0/24 dev up0 table 77", "route table 77"),
    "route of the routes policy": ("ip route del blackhole 192.0.2.64/26", r"192\.0\.2\.64/26"),
    "neighbour gone": ("ip neigh del {root_address} dev up0", "neighbour .* missing"),
    "neighbour changed": (
        "ip neigh replace 172.16.0.2 lladdr 02:00:00:00:00:77 nud permanent dev tap0",
        "neighbour 172.16.0.2",
    ),
    "link down": ("ip link set tap0 down", "link tap0: down"),
    "mtu": ("ip link set up0 mtu 1400", "mtu is 1400"),
    "mac": ("ip link set up0 address 02:11:22:33:44:55", "mac is 02:11:22:33:44:55"),
    "alias": ("ip link set up0 alias mine", "alias is mine"),
    "group": ("ip link set up0 group 7", "group is 7"),
    "link added": ("ip link add mine type veth peer name yours", "link mine: not the slot's"),
    "sysctl of a link": ("sysctl -qw net.ipv4.conf.up0.rp_filter=2", "link up0: an IPv4 sysctl"),
    "forwarding of a link": ("sysctl -qw net.ipv4.conf.tap0.forwarding=0", "link tap0: an IPv4 sysctl"),
    "queue on the uplink": ("tc qdisc add dev up0 root pfifo limit 7", "link up0: queue pfifo .* not the slot's"),
    "queue on the guest's link": (
        "tc qdisc add dev tap0 root tbf rate 1mbit burst 10k limit 10k",
        "link tap0: queue tbf .* not the slot's",
    ),
    "hook point": ("tc qdisc add dev tap0 clsact", "link tap0: queue clsact .* not the slot's"),
    "filter": (
        "tc qdisc add dev up0 ingress; tc filter add dev up0 parent ffff: u32 match u32 0 0 flowid 1:1",
        "link up0: queue ingress .* not the slot's",
    ),
    "queue length": ("ip link set up0 txqueuelen 7", "link up0: queue_length is 7, not 1000"),
    "program before the queues": ("{strange} xdp up0", "link up0: an XDP program is attached"),
    "program before tc's": ("{strange} ingress up0", "link up0 tcx ingress: program [0-9]+ not the slot's"),
    "program before tc's, guest's link": ("{strange} egress tap0", "link tap0 tcx egress: .* not the slot's"),
    "routing rule": ("ip rule add from 10.0.0.0/8 lookup 77", "routing rules: IPv4 rule 32765 not the slot's"),
    "routing rule of IPv6": ("ip -6 rule add prohibit", "routing rules: IPv6 rule 32765 not the slot's"),
    "routing rule under our number": (
        "ip rule add pref 9 fwmark 1 lookup 77 proto 78",
        "IPv4 rule 9 (not the slot's|should not be there)",
    ),
    "the kernel's routing rule": ("ip rule del pref 32766", "routing rules: IPv4 rule 32766, .* is missing"),
    "route under our number": (
        "ip route add 203.0.113.0/24 dev up0 table 77 proto 78",
        r"203\.0\.113\.0/24 table 77 should not be there",
    ),
    "neighbour added": (
        "ip neigh add 10.99.0.9 lladdr 02:00:00:00:00:99 dev up0 nud permanent",
        r"neighbour 10\.99\.0\.9 02:00:00:00:00:99 not the slot's",
    ),
    "IPv6 of a link": ("sysctl -qw net.ipv6.conf.up0.disable_ipv6=0", "link up0: an IPv6 sysctl"),
}
ROOT_CHANGES = {
    "mac of root's end": ("ip link set {end} address 02:11:22:33:44:66", "root link .*mac is 02:11:22:33:44:66"),
    "group of root's end": ("ip link set {end} group 0", "group is 0"),
    "address of root's end": ("ip addr add 10.201.9.8/31 dev {end}", r"address 10\.201\.9\.8/31 not the slot's"),
    "route over root's end": ("ip route add 203.0.113.77/32 dev {end}", r"203\.0\.113\.77/32"),
    "neighbour of root's end": ("ip neigh del {address} dev {end}", "neighbour .* missing"),
    "forwarding of root's end": ("sysctl -qw net.ipv4.conf.{end}.forwarding=0", "an IPv4 sysctl"),
    "root's end is down": ("ip link set {end} down", "root link .*: down"),
}


@pytest.fixture(scope="module")
def lab() -> Iterator[tuple[PlayedHost, Host]]:
    with played() as where:
        where.spec.write_text(SPEC.format(prefix=where.prefix), encoding="utf-8")
        Path(where.spec.parent, "slot.rules").write_text(RULES, encoding="utf-8")
        with where.host() as host:
            host.up(where.spec)
            where.root.sh(f"ip link set {where.prefix}{SLOT} down")
            assert host.verify(repair=True).repaired == 1  # opens what is opened when it is first needed
            yield where, host


@pytest.fixture(autouse=True)
def sound(lab: tuple[PlayedHost, Host]) -> Iterator[None]:
    """Nothing is found before, and nothing afterwards."""
    assert lab[1].verify().drift == []
    yield
    left = lab[1].verify(repair=True)
    assert left.drift == []


def _inside(netns: str, command: str) -> None:
    subprocess.run(["nsenter", f"--net=/run/netns/{netns}", "sh", "-c", command], check=True)


def _found_and_mended(host: Host, words: str) -> None:
    found = host.verify()
    shown = "\n".join(map(str, found.drift))
    assert re.search(words, shown), shown
    assert all(each.where.startswith(f"slot {SLOT}: ") for each in found.drift), shown
    assert (found.repaired, found.unrepaired) == (0, 1)
    mended = host.verify(repair=True)
    assert (mended.drift, mended.repaired, mended.unrepaired) == (found.drift, 1, 0)


@pytest.mark.parametrize(("command", "words"), CHANGES.values(), ids=CHANGES)
def test_a_change_in_a_slot(lab: tuple[PlayedHost, Host], command: str, words: str) -> None:
    where, host = lab
    _inside(f"{where.prefix}{SLOT}", command.format(root_address=ROOT_ADDRESS, strange=STRANGE))
    _found_and_mended(host, words)


@pytest.mark.parametrize(("command", "words"), CHANGES.values(), ids=CHANGES)
def test_a_change_in_a_slot_that_is_leased(lab: tuple[PlayedHost, Host], command: str, words: str) -> None:
    """It is mended without building the slot again: a process in it keeps its namespace and its connection."""
    host = lab[1]
    leases = [host.lease(f"tenant {number}") for number in range(8)]
    try:
        (lease,) = (each for each in leases if each is not None and each.slot == SLOT)
        before = Path(lease.netns_path).stat().st_ino
        _inside(lease.netns, command.format(root_address=ROOT_ADDRESS, strange=STRANGE))
        _found_and_mended(host, words)
        assert Path(lease.netns_path).stat().st_ino == before, "the same namespace"
    finally:
        for number in range(8):
            host.release(owner=f"tenant {number}")


@pytest.mark.parametrize(("command", "words"), ROOT_CHANGES.values(), ids=ROOT_CHANGES)
def test_a_change_of_the_end_in_root(lab: tuple[PlayedHost, Host], command: str, words: str) -> None:
    where, host = lab
    where.root.sh(command.format(end=f"{where.prefix}{SLOT}", address=ADDRESS))
    _found_and_mended(host, words)


def test_a_lease_with_a_list_of_its_own_is_no_drift_and_is_verified(lab: tuple[PlayedHost, Host]) -> None:
    host = lab[1]
    lease = host.lease("tenant", params={"allow": ["203.0.113.0/25"]})
    assert lease is not None
    assert host.verify().drift == []
    _inside(lease.netns, "ipset del allow 203.0.113.0/25")
    assert [str(each) for each in host.verify(repair=True).drift] == [
        f"slot {lease.slot}: ipset allow: element 203.0.113.0/25 missing"
    ]
    host.release(owner="tenant")


def test_two_slots_that_swapped_an_address_are_both_found(lab: tuple[PlayedHost, Host]) -> None:
    """Bytes of the right form with another slot's values in them are not taken for right."""
    where, host = lab
    for number, other in ((3, 4), (4, 3)):
        _inside(f"{where.prefix}{number}", f"ip addr flush dev up0; ip addr add 10.201.0.{2 * other + 1}/31 dev up0")
    found = host.verify(repair=True)
    assert {each.where.partition(":")[0] for each in found.drift} == {"slot 3", "slot 4"}
    assert found.repaired == 2
