"""Limits of packets and connections, and NAT by nftables, beside rules of each backend; one tenant at its limits."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hostlab
import lab
from netslot.host.host import Host
from netslot.host.leasing import Lease
from netslot.kernel import netns

SPEC = """\
prefix = "{prefix}"
uplink = "up0"
slots = 2
[addresses]
pool = "10.201.0.0/16"
pool6 = "fd5c:7::/48"
[attachment]
kind = "veth"
{rules}
[root]
backend = "nftables"
[nat]
kind = "nftables"
[parameters.allow]
type = "cidrs"
default = ["203.0.113.0/24"]
[parameters.most]
type = "int"
default = "40"
[parameters.often]
type = "int"
default = "1000"
[parameters.packets]
type = "int"
default = "10000000"
[rates]
connections = "${{most}}"
new_connections = "${{often}}"
new_connections_burst = "60"
[rates.egress]
packets = "${{packets}}"
packet_burst = "50"
[rates.ingress]
packets = "${{packets}}"
packet_burst = "50"
[limits]
hold_down = "0s"
"""
IPTABLES = """\
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
-A FORWARD -i ${guest_if} -m set --match-set allow dst -j ACCEPT
-A FORWARD -i ${uplink_if} -d ${guest_address} -j ACCEPT
COMMIT
"""
IPTABLES6 = """\
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
"""
NFT = """table inet slot {
    set allow { type ipv4_addr; flags interval; }
    chain forward {
        type filter hook forward priority 0; policy drop;
        iifname "${guest_if}" ip daddr @allow accept
        iifname "${uplink_if}" accept
        meta nfproto ipv6 accept
    }
}
"""
FILES = 'ipv4 = "slot.rules"\nipv6 = "slot.rules6"\n'
RULES = {
    "iptables-nft": f'[rules]\nbackend = "iptables-nft"\n{FILES}',
    "iptables-legacy": f'[rules]\nbackend = "iptables-legacy"\n{FILES}',
    "nftables": '[rules]\nbackend = "nftables"\nnft = "slot.nft"\n',
}
OUTSIDE6 = "2001:db8:7::10"
Made = tuple[hostlab.PlayedHost, Host]


@pytest.fixture(params=RULES)
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    with hostlab.played() as where:
        where.spec.write_text(SPEC.format(prefix=where.prefix, rules=RULES[request.param]), encoding="utf-8")
        for name, text in (("slot.rules", IPTABLES), ("slot.rules6", IPTABLES6), ("slot.nft", NFT)):
            Path(where.spec.parent, name).write_text(text, encoding="utf-8")
        where.root.ip("addr add 2001:db8:2::1/64 dev up0 nodad", "route add default via 2001:db8:2::2")
        where.outside.ip(
            "addr add 2001:db8:2::2/64 dev eth0 nodad",
            f"addr add {OUTSIDE6}/128 dev lo nodad",
            "route add 10.201.0.0/16 via 192.0.2.1",
            "route add fd5c:7::/48 via 2001:db8:2::1",
        )
        with where.host() as host:
            host.up(where.spec)
            yield where, host


def _settled(host: Host) -> None:
    """IPv6 adds routes a moment after addresses."""
    deadline = time.monotonic() + 3
    while (drift := host.verify().drift) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert drift == []


def _tenant(host: Host, name: str, **params: object) -> tuple[Lease, lab.Net]:
    lease = host.lease(name, params=params)
    assert lease is not None
    return lease, Inside(str(lease.fields["workload_netns"]))


class Inside(lab.Net):
    """A tenant's own namespace, which somebody else made and removes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = netns.open_named(name)
        self.worker = netns.Worker(self.fd)

    def close(self) -> None:
        self.worker.close()
        os.close(self.fd)


def _held(net: lab.Net, address: str, count: int) -> list[socket.socket]:
    """As many of ``count`` connections as come about, held open."""
    found = []
    for _ in range(count):
        sock = net.socket(family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.settimeout(0.15)
        if sock.connect_ex((address, 7000)):
            sock.close()
        else:
            found.append(sock)
    return found


def _flood(net: lab.Net, address: str, seconds: float) -> int:
    """Datagrams sent as fast as one thread can; returns how many."""
    count = 0
    with net.socket(socket.SOCK_DGRAM, socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.setblocking(False)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                sock.sendto(b"x" * 64, (address, 7000))
            except BlockingIOError:
                continue
            count += 1
    return count


def _came(where: hostlab.PlayedHost) -> int:
    """Packets that have come to the outside, read or not."""
    line = next(text for text in where.outside.sh("cat /proc/net/dev").splitlines() if "eth0:" in text)
    return int(line.partition(":")[2].split()[1])


def test_connections_in_all_beside_rules_of_every_backend(made: Made) -> None:
    """One tenant at its limit, in either family; the other has its own left."""
    where, host = made
    _settled(host)
    _, other = _tenant(host, "other")
    for address in (hostlab.OUTSIDE, OUTSIDE6):
        echo = lab.Echo(where.outside, address)
        lease, greedy = _tenant(host, "greedy", most="8")
        held = _held(greedy, address, 20)
        assert len(held) == 8, "connections in all"
        spare = _held(other, address, 3)
        assert len(spare) == 3, "the other tenant has its own"
        host.update(lease.id, {"most": "12"})
        more = _held(greedy, address, 20)
        assert len(more) == 12, "changed in place, and those before the change are not counted"
        held += more
        for sock in held + spare:
            sock.close()
        greedy.close()
        host.release(owner="greedy")
        echo.close()
    _settled(host)
    other.close()


def test_a_flood_is_held_and_touches_nobody_else(made: Made) -> None:
    where, host = made
    lease, greedy = _tenant(host, "greedy", packets="300")
    _, other = _tenant(host, "other")  # may send more than one thread can
    for address in (hostlab.OUTSIDE, OUTSIDE6):
        echo = lab.Echo(where.outside, address)
        before = _came(where)
        sent = _flood(greedy, address, 1.0)
        came = _came(where) - before
        assert sent > 3000, "the load is real"
        assert 200 <= came <= 300 * 1.5 + 50 + 20, "300 a second, and the burst"
        before = _came(where)
        sent = _flood(other, address, 0.3)
        assert sent > 1000, "the load is real"
        assert _came(where) - before > sent * 0.9, "the other tenant's datagrams arrive"
        echo.close()
    where_in = ["nsenter", f"--net=/run/netns/{lease.netns}", "nft", "list", "ruleset"]
    listed = subprocess.run(where_in, capture_output=True, text=True, check=True).stdout
    assert "limit rate over 300/second" in listed
    greedy.close()
    other.close()


def test_new_connections_in_a_burst_and_then_at_their_rate(made: Made) -> None:
    where, host = made
    echo = lab.Echo(where.outside, hostlab.OUTSIDE)
    lease, tenant = _tenant(host, "tenant", often="5", most="100000")
    started, count, tries = time.monotonic(), 0, 0
    while time.monotonic() < started + 2:
        with tenant.socket() as sock:
            sock.settimeout(0.02)
            count += not sock.connect_ex((hostlab.OUTSIDE, 7000))
            tries += 1
    assert tries > count + 10, "the load is real"
    assert 55 <= count <= 60 + 5 * (time.monotonic() - started) + 5
    host.update(lease.id, {"often": "100000"})
    with tenant.socket() as sock:
        sock.settimeout(2)
        sock.connect((hostlab.OUTSIDE, 7000))
    echo.close()
    tenant.close()
    host.release(owner="tenant")
