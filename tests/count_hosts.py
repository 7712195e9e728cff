"""Hosts whose tenants have rules that count: limits, quotas, numbers of connections."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

COUNTS = {
    "limit": "-m limit --limit 50/sec --limit-burst 100",
    "quota": "-m quota --quota 100000000",
    "connlimit": "-m connlimit --connlimit-upto 20 --connlimit-mask 32 --connlimit-saddr",
    "hashlimit": "-m hashlimit --hashlimit-upto 50/sec --hashlimit-mode srcip --hashlimit-name all",
}
SHARED = COUNTS["hashlimit"].replace("srcip", "dstip").replace("all", "there")
SYN = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN"
OPEN = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"


@dataclass
class CountHost:
    """``places[tenant]``: which /30 of 10.1.0.0/24 a tenant has. Rules are without ``-A chain``.

    ``common``: what FORWARD begins with; ``after``: what follows tenants' rules. ``out`` and ``to``: rules of each
    tenant, by class in turn. ``nat``: rules of PREROUTING. ``spoofing``: tenants may send under any address.
    """

    places: Sequence[int]
    out: Sequence[Sequence[str]]
    to: Sequence[Sequence[str]] = ((),)
    common: Sequence[str] = (OPEN,)
    after: Sequence[str] = ()
    nat: Sequence[str] = ()
    chains: bool = False
    by_tenant: bool = False
    policy: str = "DROP"
    spoofing: bool = False

    def address(self, tenant: int) -> str:
        return f"10.1.0.{4 * self.places[tenant] + 2}"

    def text(self) -> str:
        """The dump. Each tenant is behind ``tap<number>`` and sends under its own address only."""
        tenants = range(len(self.places))
        lines = ["*nat", ":PREROUTING ACCEPT [0:0]", ":POSTROUTING ACCEPT [0:0]"]
        lines += [f"-A PREROUTING {rule}" for rule in self.nat]
        lines += ["-A POSTROUTING -s 10.1.0.0/16 -o eth0 -j MASQUERADE", "COMMIT", "*raw", ":PREROUTING ACCEPT [0:0]"]
        lines += [f"-A PREROUTING ! -s {self.address(k)}/32 -i tap{k} -j DROP" for k in tenants if not self.spoofing]
        lines += ["COMMIT", "*filter", ":INPUT DROP [0:0]", f":FORWARD {self.policy} [0:0]", ":OUTPUT ACCEPT [0:0]"]
        lines += [f":vm{k}-{way} - [0:0]" for k in tenants if self.chains for way in ("out", "in")]
        lines += [f"-A FORWARD {rule}" for rule in self.common]
        sides = [(k, "out", "-i", self.out[k % len(self.out)]) for k in tenants]
        sides += [(k, "in", "-o", self.to[k % len(self.to)]) for k in tenants]
        if self.by_tenant:
            sides.sort(key=lambda side: side[0])
        for k, way, flag, rules in sides:
            called = [f"-j vm{k}-{way}"] if self.chains else rules
            lines += [f"-A FORWARD {flag} tap{k} {rule}" for rule in called]
        lines += [f"-A FORWARD {rule}" for rule in self.after]
        lines += [f"-A vm{k}-{way} {rule}" for k, way, _, rules in sides if self.chains for rule in rules]
        return "\n".join([*lines, "-A INPUT -i lo -j ACCEPT", "COMMIT", ""])


def any_host(seed: int) -> CountHost:
    """A host of whatever may stand beside a count."""
    chance = random.Random(seed)
    size = chance.choice((2, 3, 4, 6))
    kinds = [[_out(chance) for _ in range(chance.randint(1, 4))] for _ in range(chance.choice((1, 1, 2)))]
    incoming = ("-p tcp -m tcp --dport 8080 -j ACCEPT", "-p udp -j DROP", "-p icmp -m limit --limit 5/sec -j ACCEPT")
    made = CountHost(
        places=sorted(chance.sample(range(12), size)) if chance.random() < 0.4 else range(size),
        out=kinds,
        to=[chance.sample(incoming, chance.randint(0, 2)) for _ in kinds],
        common=[rule for rule, odds in _COMMON.items() if chance.random() < odds],
        after=[rule for rule in _SHARED if chance.random() < 0.15],
        chains=chance.random() < 0.5,
        by_tenant=chance.random() < 0.4,
        policy=chance.choice(("DROP", "DROP", "ACCEPT")),
        spoofing=chance.random() < 0.2,
    )
    made.nat = _nat(chance, made)
    return made


_SHARED = (
    "-p icmp -m limit --limit 10/sec -j ACCEPT",
    "-i tap+ -m limit --limit 10/sec -j ACCEPT",
    "-p tcp -m tcp --dport 8443 -m limit --limit 10/sec -j ACCEPT",
)
_COMMON = {
    OPEN: 0.7,
    "-i tap+ -o tap+ -j DROP": 0.25,
    "-i tap+ -o tap+ -j ACCEPT": 0.1,
    **dict.fromkeys(_SHARED, 0.1),
}


def _out(chance: random.Random) -> str:
    way = chance.choice(("-o eth0", "", "! -o tap+", "-o eth0"))
    what = chance.choice((SYN, "-p tcp -m tcp --dport 443", "-p udp", "", "-d 203.0.113.0/24"))
    new = "-m conntrack --ctstate NEW" if chance.random() < 0.2 else ""
    count = chance.choice((*COUNTS.values(), SHARED)) if chance.random() < 0.5 else ""
    target = chance.choice(("ACCEPT", "ACCEPT", "DROP", "REJECT"))
    return " ".join(filter(None, (way, what, new, count, f"-j {target}")))


def _nat(chance: random.Random, made: CountHost) -> list[str]:
    published = [
        f"-p tcp -m tcp --dport {30000 + k} -j DNAT --to-destination {made.address(k)}:8080"
        for k in range(len(made.places))
    ]
    return chance.choice(
        (
            [],
            [],
            [f"-i eth0 {rule}" for rule in published],
            [f"-d 198.51.100.1/32 {rule}" for rule in published],
            ["-i tap+ -p udp -m udp --dport 53 -j REDIRECT --to-ports 5353"],
            ["-d 169.254.169.254/32 -i tap+ -p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.9:8080"],
            [f"-i tap+ -p tcp -m tcp --dport 25 -j DNAT --to-destination {made.address(0)}:25"],
        )
    )
