"""Rules in a slot that match its tenant by cgroup: what its processes send, and nobody else's in the slot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hostlab
import lab
from netslot.errors import SpecError
from netslot.host.host import Host
from netslot.kernel import cgroupfs
from netslot.policy import nftables

PARENT = f"netslot-test-{os.getpid()}"
SPEC = """\
prefix = "{prefix}"
uplink = "up0"
slots = 2
[addresses]
pool = "10.201.0.0/16"
pool6 = "fd5c:7::/48"
[attachment]
kind = "process"
[rules]
{rules}
[root]
backend = "nftables"
[cgroup]
parent = "{parent}"
pids = 50
[limits]
hold_down = "0s"
"""
IPTABLES = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
-A OUTPUT -o ${uplink_if} -p tcp --dport 7000 -m cgroup --path ${cgroup} -j REJECT
COMMIT
"""
RULES = {
    "iptables-legacy": 'backend = "iptables-legacy"\nipv4 = "slot.rules"\nipv6 = "slot.rules"',
    "iptables-nft": 'backend = "iptables-nft"\nipv4 = "slot.rules"\nipv6 = "slot.rules"',
}
OUTSIDE6 = "2001:db8:7::10"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"


@pytest.fixture(params=RULES)
def made(request: pytest.FixtureRequest) -> Iterator[tuple[hostlab.PlayedHost, Host]]:
    with hostlab.played() as where:
        where.spec.write_text(
            SPEC.format(prefix=where.prefix, parent=PARENT, rules=RULES[request.param]), encoding="utf-8"
        )
        Path(where.spec.parent, "slot.rules").write_text(IPTABLES, encoding="utf-8")
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
    assert not (cgroupfs.unified_root() / PARENT).exists()


def _by_exec(where: hostlab.PlayedHost, slot: int, address: str, port: int) -> bool:
    """A connection of a command that ``netslot exec`` runs: it is inside the slot's cgroup."""
    command = ["exec", str(slot), "--", sys.executable, "-c", CONNECT, address, str(port)]
    return where.netslot(*command, check=False).returncode == 0


def _from_outside_the_cgroup(netns: str, address: str, port: int) -> bool:
    command = ["nsenter", f"--net=/run/netns/{netns}", sys.executable, "-c", CONNECT, address, str(port)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_the_tenants_processes_are_matched_and_no_others(made: tuple[hostlab.PlayedHost, Host]) -> None:
    where, host = made
    for address in (hostlab.OUTSIDE, OUTSIDE6):
        echoes = [lab.Echo(where.outside, address, port) for port in (7000, 7001)]
        for slot in (1, 2):
            assert not _by_exec(where, slot, address, 7000), "the rule of this slot knows this slot's cgroup"
            assert _by_exec(where, slot, address, 7001)
            assert _from_outside_the_cgroup(f"{where.prefix}{slot}", address, 7000), "the same slot, not the tenant"
        for echo in echoes:
            echo.close()
    lease = host.lease("tenant")
    assert lease is not None
    host.release(owner="tenant")
    echo = lab.Echo(where.outside, hostlab.OUTSIDE)
    assert not _by_exec(where, lease.slot, hostlab.OUTSIDE, 7000), "the cgroup is made anew, and the rule knows it"
    echo.close()


def test_nft_takes_a_number_that_no_slot_keeps_and_is_refused_with_what_does() -> None:
    text = """table inet slot {
    chain out {
        type filter hook output priority 0;
        socket cgroupv2 level 2 "${cgroup}" drop
    }
}"""
    with pytest.raises(SpecError, match=r"slot\.nft:4: nft: cgroupv2 path fails") as caught:
        nftables.cast(text, samples=[{"cgroup": f"{PARENT}/slot1"}], file="slot.nft")
    assert "-m cgroup" in str(caught.value.hint)
