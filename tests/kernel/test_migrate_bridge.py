"""Containers behind one bridge, as Docker has them: their rules stay in root, with sets, and are exchanged there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import Net, nets
from migration_lab import Plan, Traffic, entry, load
from netslot.errors import RefusedError
from netslot.host import tables
from netslot.host.migrate import Migration
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.split import split
from netslot.rulesets.tenants import Tenant, tenant_address

CONTAINERS = 4
OUTSIDE = "198.51.100.9"
UPLINK = "198.51.100.1"


def own(number: int) -> str:
    return f"172.17.0.{number + 2}"


def rules() -> str:
    """What Docker writes for containers with a published port each, and an operator's rules for each of them."""
    numbers = range(CONTAINERS)
    translated = [
        f"-A DOCKER ! -i docker0 -p tcp -m tcp --dport {8080 + n} -j DNAT --to-destination {own(n)}:80"
        for n in numbers
    ]
    opened = [f"-A DOCKER -d {own(n)}/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT" for n in numbers]
    theirs = [f"-A DOCKER-USER -s {own(n)}/32 -d {OUTSIDE}/32 -p udp -m udp --dport 9 -j DROP" for n in numbers]
    return "\n".join(
        [
            "*nat",
            *(f":{name} ACCEPT [0:0]" for name in ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")),
            ":DOCKER - [0:0]",
            "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
            "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
            "-A DOCKER -i docker0 -j RETURN",
            *translated,
            "COMMIT",
            "*filter",
            ":INPUT ACCEPT [0:0]",
            ":FORWARD DROP [0:0]",
            ":OUTPUT ACCEPT [0:0]",
            ":DOCKER - [0:0]",
            ":DOCKER-USER - [0:0]",
            "-A FORWARD -j DOCKER-USER",
            "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A FORWARD -o docker0 -j DOCKER",
            "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
            *opened,
            *theirs,
            "-A DOCKER-USER -j RETURN",
            "COMMIT",
            "",
        ]
    )


class Bridge:
    """root [eth0] -- [eth0] outside; root [docker0] with a port for each container."""

    def __init__(self, root: Net, outside: Net, containers: list[Net], variant: str) -> None:
        self.root, self.outside, self.containers, self.variant = root, outside, containers, variant
        root.ip(
            f"link add eth0 type veth peer name eth0 netns {outside.name}",
            f"addr add {UPLINK}/24 dev eth0",
            "link set eth0 up",
            "link add docker0 type bridge",
            "addr add 172.17.0.1/16 dev docker0",
            "link set docker0 up",
        )
        outside.ip(f"addr add {OUTSIDE}/24 dev eth0", "link set eth0 up", f"route add 172.17.0.0/16 via {UPLINK}")
        root.sysctl(ipv4__ip_forward=1)
        for number, container in enumerate(containers):
            root.ip(
                f"link add veth{number} type veth peer name eth0 netns {container.name}",
                f"link set veth{number} master docker0 up",
            )
            container.ip(
                f"addr add {own(number)}/16 dev eth0", "link set eth0 up", "route add default via 172.17.0.1"
            )
        load(root, rules(), f"iptables-{variant}-restore")

    def save(self) -> str:
        text = self.root.sh(f"iptables-{self.variant}-save -c")
        return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))

    def split(self) -> dict[str, str]:
        dump = parse(self.root.sh(f"iptables-{self.variant}-save"))
        people = [
            Tenant(f"c{number}", (), (tenant_address(own(number)),), netns=container.name)
            for number, container in enumerate(self.containers)
        ]
        result = split(dump, people, attachment="process")
        assert result.refused == []
        verdict = prove(dump, survey(dump, people), read(result.files))
        assert verdict.equivalent, verdict.counterexamples[:1]
        return result.files

    def plan(self) -> Plan:
        plan: Plan = {kind: {} for kind in ("lines", "calls", "questions", "denied", "knocks")}
        out = self.outside.name
        for number, container in enumerate(self.containers):
            name, address = container.name, own(number)
            plan["lines"][f"{number} out"] = entry(name, OUTSIDE, 443, out)
            published = entry(out, UPLINK, 8080 + number, name, address, 80)
            plan["lines"][f"{number} published"] = plan["calls"][f"{number} published"] = published
            plan["questions"][f"{number} out"] = entry(name, OUTSIDE, 5000 + number, out)
            plan["denied"][f"{number} out"] = {**entry(name, OUTSIDE, 9, out), "source": address}
            plan["denied"][f"{number} in"] = {**entry(out, address, 80, name), "source": OUTSIDE}
            plan["knocks"][f"{number} in"] = entry(out, address, 81, name)
        return plan


@pytest.fixture(params=["legacy", "nft"])
def bridge(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    with nets("root", "out", *(f"c{number}" for number in range(CONTAINERS))) as (root, outside, *containers):
        yield Bridge(root, outside, containers, request.param)


def test_containers_are_moved_and_taken_back_under_traffic(
    bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, before = bridge.split(), tables.plain(bridge.save())
    restore = tables.restore

    def slow(*arguments: Any, **options: Any) -> None:
        restore(*arguments, **options)
        time.sleep(0.3 if options.get("keep") else 0)

    monkeypatch.setattr(tables, "restore", slow)
    with Traffic(tmp_path, bridge.plan()) as traffic:
        times = [time.monotonic()]
        assert Migration(tmp_path, bridge.root.fd).forward(files, {}, None, lambda _: None) == 0
        times.append(time.monotonic())
        after = bridge.save()
        assert "--match-set netslot-0" in after and own(1) + "/32" not in after.partition("*filter")[2]
        traffic.wake()
        time.sleep(2.5)
        times.append(time.monotonic())
        Migration(tmp_path, bridge.root.fd).rollback(lambda _: None)
        times.append(time.monotonic())
        time.sleep(2.5)
        seen = traffic.end()
    assert min(seen.between(*times[:2]), seen.between(*times[2:])) > 3
    assert (seen.lost, seen.refused, seen.breaches) == ({}, {}, {})
    assert tables.plain(bridge.save()) == before
    assert "netslot" not in bridge.root.sh("ipset list -n")


def test_sets_of_the_same_name_and_tenants_without_a_slot(bridge: Bridge, tmp_path: Path) -> None:
    files, before = bridge.split(), bridge.save()
    bridge.root.sh("ipset create netslot-0 hash:ip")
    with pytest.raises(RefusedError, match="has a set called netslot-0 already"):
        Migration(tmp_path, bridge.root.fd).forward(files, {}, None, lambda _: None)
    bridge.root.sh("ipset destroy netslot-0")
    with pytest.raises(RefusedError, match="no tenant c1 with a slot"):
        Migration(tmp_path, bridge.root.fd).forward(files, {}, "c1", lambda _: None)
    assert bridge.save() == before
