"""Containers behind one bridge, as Docker has them, with Docker's rules for them and an operator's."""

from __future__ import annotations

from lab import Net
from migration_lab import Plan, entry, load
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
