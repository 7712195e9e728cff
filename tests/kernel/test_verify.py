"""Verify on a host of eight slots: one change behind netslot's back in one slot is found, named, and put right."""

from __future__ import annotations

import re
import subprocess
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
    _inside(f"{where.prefix}{SLOT}", command.format(root_address=ROOT_ADDRESS))
    _found_and_mended(host, words)


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
