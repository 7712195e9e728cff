"""A host as operators build them: thousands of tenants' rules in the root namespace, written by a script.

    host = make_host(tenants=4000, classes=3, seed=1)
    host.text        iptables-save form, IPv4
    host.tenants     what each tenant is called, its interface, address and class

Every tenant has a tap of its own and a /30: the host has the first address, the guest the second. Class 0 is
flat in the built-in chains, class 1 has two chains of its own behind dispatch rules, class 2 is flat and has a
published port. Tenants' rules stand interleaved: a tenant's own order is kept, the order between tenants is
shuffled within a window, as hosts look that have seen tenants come and go.

Some rules must stay in the root namespace: published ports (nat PREROUTING, before routing), a mark that
routing reads, limits that all tenants share.
"""

from __future__ import annotations

import ipaddress
import random
import re
from dataclasses import dataclass

RULES_PER_TENANT = 30
GLOBAL_RULES = 144
POOL = ipaddress.ip_network("10.64.0.0/12")
UPLINK = "eth0"


@dataclass(frozen=True, slots=True)
class SyntheticTenant:
    name: str
    interface: str
    address: str
    network: str
    gateway: str
    klass: int


@dataclass(frozen=True, slots=True)
class SyntheticHost:
    text: str
    tenants: list[SyntheticTenant]
    rules: int
    global_rules: int


_Line = tuple[str, str, str]  # table, chain, rule


def tenant(number: int, classes: int) -> SyntheticTenant:
    base = int(POOL.network_address) + 4 * number
    address = ipaddress.ip_address
    return SyntheticTenant(
        name=f"tap{number}",
        interface=f"tap{number}",
        address=str(address(base + 2)),
        network=f"{address(base)}/30",
        gateway=str(address(base + 1)),
        klass=number % classes,
    )


def make_host(tenants: int = 4000, classes: int = 3, seed: int = 1, style: str = "mixed") -> SyntheticHost:
    """``style``: ``mixed`` (as above), ``flat`` (every class flat) or ``chains`` (every class behind dispatch)."""
    dice = random.Random(seed)
    people = [tenant(number, classes) for number in range(tenants)]
    streams = [_tenant_lines(one, style) for one in people]
    before, after = _global_lines()
    lines = [*before, *_interleave(streams, dice), *after]
    return SyntheticHost(_render(lines), people, len(lines), len(before) + len(after))


_BUILTIN = {
    "raw": ("PREROUTING ACCEPT", "OUTPUT ACCEPT"),
    "mangle": (
        "PREROUTING ACCEPT",
        "INPUT ACCEPT",
        "FORWARD ACCEPT",
        "OUTPUT ACCEPT",
        "POSTROUTING ACCEPT",
    ),
    "nat": ("PREROUTING ACCEPT", "INPUT ACCEPT", "OUTPUT ACCEPT", "POSTROUTING ACCEPT"),
    "filter": ("INPUT DROP", "FORWARD DROP", "OUTPUT ACCEPT"),
}


def _global_lines() -> tuple[list[_Line], list[_Line]]:
    """144 rules that name no tenant: those that stand before the tenants' rules, and those behind."""
    before: list[_Line] = [
        ("raw", "PREROUTING", "-i lo -j ACCEPT"),
        ("mangle", "PREROUTING", f"-i {UPLINK} -p udp -m udp --dport 4789 -j MARK --set-xmark 0x200/0xffffffff"),
        ("filter", "INPUT", "-i lo -j ACCEPT"),
        ("filter", "FORWARD", "-m conntrack --ctstate INVALID -j DROP"),
        ("filter", "FORWARD", "-d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m limit --limit 100/sec -j ACCEPT"),
    ]
    for port in range(20000, 20060):
        before.append(("filter", "INPUT", f"-i {UPLINK} -p tcp -m tcp --dport {port} -j ACCEPT"))
    for third in range(60):
        before.append(("filter", "FORWARD", f"-d 192.0.2.{third}/32 -i tap+ -j DROP"))
    after: list[_Line] = [
        ("filter", "INPUT", f"-i {UPLINK} -p icmp -m limit --limit 10/sec -j ACCEPT"),
        ("filter", "FORWARD", '-m limit --limit 1/sec -j LOG --log-prefix "dropped: "'),
        ("filter", "FORWARD", "-j DROP"),
        ("nat", "POSTROUTING", f"-s 172.31.0.0/16 -o {UPLINK} -j MASQUERADE"),
    ]
    for last in range(GLOBAL_RULES - len(before) - len(after)):
        after.insert(
            0, ("filter", "INPUT", f"-s 198.51.100.{last}/32 -i {UPLINK} -p tcp -m tcp --dport 22 -j ACCEPT")
        )
    return before, after


def _tenant_lines(one: SyntheticTenant, style: str) -> list[_Line]:
    tap, ip = one.interface, one.address
    lines: list[_Line] = [
        ("raw", "PREROUTING", f"! -s {ip}/32 -i {tap} -j DROP"),
        ("nat", "POSTROUTING", f"-s {ip}/32 -o {UPLINK} -j MASQUERADE"),
        ("filter", "INPUT", f"-d {one.gateway}/32 -i {tap} -p udp -m udp --dport 53 -j ACCEPT"),
        ("filter", "INPUT", f"-i {tap} -j DROP"),
    ]
    if one.klass == 2:
        port = 30000 + int(tap[3:]) % 30000
        lines.append(
            ("nat", "PREROUTING", f"-i {UPLINK} -p tcp -m tcp --dport {port} -j DNAT --to-destination {ip}:8080")
        )
    chains = style == "chains" or (style == "mixed" and one.klass == 1)
    body = RULES_PER_TENANT - len(lines) - (2 if chains else 0)
    outward, inward = _policy(one, body)
    if chains:
        lines += [("filter", "FORWARD", f"-i {tap} -j {tap}-out"), ("filter", "FORWARD", f"-o {tap} -j {tap}-in")]
        lines += [("filter", f"{tap}-out", rule) for rule in outward]
        lines += [("filter", f"{tap}-in", rule) for rule in inward]
    else:
        lines += [("filter", "FORWARD", f"-s {ip}/32 -i {tap} {rule}") for rule in outward]
        lines += [("filter", "FORWARD", f"-d {ip}/32 -o {tap} {rule}") for rule in inward]
    return lines


def _policy(one: SyntheticTenant, count: int) -> tuple[list[str], list[str]]:
    """The rules of one class, without what names the tenant: from it, and to it."""
    established = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    inward = [
        established,
        f"-p tcp -m tcp --dport {8080 + one.klass} -m conntrack --ctstate NEW -j ACCEPT",
        "-p icmp -m icmp --icmp-type 8 -j ACCEPT",
        "-j DROP",
    ]
    outward = [established, "-p tcp -m tcp --dport 25 -j REJECT --reject-with icmp-port-unreachable"]
    for index in range(count - len(inward) - len(outward) - 1):
        place = index + 20 * one.klass
        outward.append(f"-d 203.0.113.{place}/32 -p tcp -m tcp --dport {1000 + place} -j ACCEPT")
    outward.append("-p udp -m udp --dport 1900 -j DROP" if one.klass == 0 else f"-o {UPLINK} -j ACCEPT")
    return outward, inward


def _interleave(streams: list[list[_Line]], dice: random.Random, window: int = 20) -> list[_Line]:
    """Merge tenants' lines: each keeps its own order, neighbours are mixed."""
    merged: list[_Line] = []
    for start in range(0, len(streams), window):
        left = [list(reversed(stream)) for stream in streams[start : start + window]]
        while left:
            chosen = dice.randrange(len(left))
            run = dice.randint(1, 6)
            for _ in range(min(run, len(left[chosen]))):
                merged.append(left[chosen].pop())
            if not left[chosen]:
                left.pop(chosen)
    return merged


def _render(lines: list[_Line]) -> str:
    text = []
    for table, builtin in _BUILTIN.items():
        rules = [(chain, rule) for name, chain, rule in lines if name == table]
        user = dict.fromkeys(chain for chain, _ in rules if not chain.isupper())
        text.append(f"*{table}")
        text += [f":{chain} [0:0]" for chain in builtin]
        text += [f":{chain} - [0:0]" for chain in sorted(user)]
        by_chain: dict[str, list[str]] = {}
        for chain, rule in rules:
            by_chain.setdefault(chain, []).append(rule)
        order = [chain.split()[0] for chain in builtin] + sorted(user)
        text += [f"-A {chain} {rule}" for chain in order for rule in by_chain.get(chain, ())]
        text.append("COMMIT")
    return "\n".join(text) + "\n"


_REJECTS = {
    "icmp-port-unreachable": "icmp6-port-unreachable",
    "icmp-host-prohibited": "icmp6-adm-prohibited",
    "icmp-admin-prohibited": "icmp6-adm-prohibited",
    "icmp-host-unreachable": "icmp6-addr-unreachable",
    "icmp-net-unreachable": "icmp6-no-route",
}
_TYPES = {"8": "128", "0": "129", "3": "1", "11": "3", "13": "130"}
_ADDRESS = re.compile(r"(?<![\d.:/-])(\d+\.\d+\.\d+\.\d+)(?:/(\d+))?(?:-(\d+\.\d+\.\d+\.\d+))?(:\d+)?(?![\d.])")


def as_ipv6(text: str) -> str:
    """The same rules for IPv6: A.B.C.D is 2001:db8:AB:CD::1, a network of /24 one of /56, ICMP has its new words."""

    def made(address: str, end: int = 1) -> str:
        return str(ipaddress.ip_address(0x20010DB8 << 96 | int(ipaddress.ip_address(address)) << 64 | end))

    def moved(match: re.Match[str]) -> str:
        address, length, last, port = match.groups()
        if last:
            return f"{made(address)}-{made(last)}"
        if port:
            return f"[{made(address)}]{port}"
        if length and length != "32":
            return f"{made(address, 0)}/{32 + int(length)}"
        return made(address) + ("/128" if length else "")

    text = _ADDRESS.sub(moved, text)
    text = re.sub(
        r"-m icmp (! )?--icmp-type (\d+)", lambda x: f"-m icmp6 {x[1] or ''}--icmpv6-type {_TYPES[x[2]]}", text
    )
    text = re.sub(r"-p icmp\b", "-p ipv6-icmp", text)
    text = re.sub(r"-m ttl --ttl-", "-m hl --hl-", text)
    return re.sub(r"icmp-[a-z-]+", lambda found: _REJECTS.get(found[0], found[0]), text)
