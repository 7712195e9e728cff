"""Thirty rules for a tenant, as sandbox platforms write them, in every form that the shapes need.

What the rules mean is the same in all forms: no spoofed sources, no metadata service, no private networks, no
mail, only the given resolvers, no amplification; the rest may leave. Limits are left out: a benchmark would
measure them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address

POOL = "10.202.0.0/16"
PREFIX = "bare"
SLOT_PREFIX = "slot"
UPLINK = "eth0"
GUEST = "172.16.0.2"
GATEWAY = "172.16.0.1"
SERVER = "203.0.113.10"
RESOLVERS = ("203.0.113.53", "203.0.113.54")

DENIED_NETWORKS = (
    "169.254.169.254/32",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "0.0.0.0/8",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
DENIED_PORTS = (
    ("tcp", "25"),
    ("tcp", "465"),
    ("tcp", "587"),
    ("tcp", "2525"),
    ("udp", "53"),
    ("tcp", "53"),
    ("tcp", "137-139"),
    ("tcp", "445"),
    ("udp", "137-139"),
    ("udp", "1900"),
    ("udp", "5353"),
    ("udp", "11211"),
    ("tcp", "6667"),
)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Tenant ``number`` (from 1) of a host that keeps the rules in its root namespace: the host's end of the
    tenant's link, and the address that the tenant's packets come from."""

    number: int

    @property
    def interface(self) -> str:
        return f"{PREFIX}{self.number}"

    @property
    def root_address(self) -> str:
        return str(IPv4Address(POOL.split("/", maxsplit=1)[0]) + 2 * (self.number - 1))

    @property
    def address(self) -> str:
        return str(IPv4Address(POOL.split("/", maxsplit=1)[0]) + 2 * (self.number - 1) + 1)


def iptables_rules(chain: str, address: str, interface: str | None) -> list[str]:
    """The rules in iptables-save form; ``interface`` is None in a chain that only this tenant's packets reach."""
    start = f"-A {chain} -i {interface}" if interface else f"-A {chain}"
    lines = [f"{start} ! -s {address}/32 -j DROP", f"{start} -m conntrack --ctstate INVALID -j DROP"]
    lines += [f"{start} -d {network} -j DROP" for network in DENIED_NETWORKS]
    for resolver in RESOLVERS:
        for protocol in ("udp", "tcp"):
            lines.append(f"{start} -d {resolver}/32 -p {protocol} -m {protocol} --dport 53 -j ACCEPT")
    for protocol, ports in DENIED_PORTS:
        lines.append(f"{start} -p {protocol} -m {protocol} --dport {ports.replace('-', ':')} -j DROP")
    lines.append(f"{start} -j ACCEPT")
    return lines


def nft_rules(address: str) -> list[str]:
    """The rules in nft's language, for a chain that only this tenant's packets reach."""
    lines = [f"ip saddr != {address} drop", "ct state invalid drop"]
    lines += [f"ip daddr {network} drop" for network in DENIED_NETWORKS]
    for resolver in RESOLVERS:
        for protocol in ("udp", "tcp"):
            lines.append(f"ip daddr {resolver} {protocol} dport 53 accept")
    lines += [f"{protocol} dport {ports} drop" for protocol, ports in DENIED_PORTS]
    lines.append("accept")
    return lines


RULES_PER_TENANT = len(nft_rules(GUEST))


def iptables_table(chains: Iterable[str], rules: Iterable[str]) -> str:
    """A filter table in iptables-save form that lets answers through and drops what no rule accepts."""
    return "\n".join(
        [
            "*filter",
            ":INPUT ACCEPT [0:0]",
            ":FORWARD DROP [0:0]",
            ":OUTPUT ACCEPT [0:0]",
            *(f":{chain} - [0:0]" for chain in chains),
            "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            *rules,
            "COMMIT\n",
        ]
    )


def iptables_nat(rule: str) -> str:
    """A nat table of one rule in iptables-save form."""
    chains = "".join(f":{chain} ACCEPT [0:0]\n" for chain in ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"))
    return f"*nat\n{chains}-A POSTROUTING {rule}\nCOMMIT\n"


ROOT_NAT = iptables_nat(f"-o {UPLINK} -j MASQUERADE")

SLOT_IPTABLES = iptables_table(
    ("egress",), ["-A FORWARD -i tap0 -j egress", *iptables_rules("egress", "${guest_address}", None)]
) + iptables_nat("-o up0 -j SNAT --to-source ${address}")
"""The tenant's rules and its NAT as a slot holds them, in iptables-save form; ``${...}`` are the slot's values."""

SLOT_NFT_NAT = """table ip slotnat {
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "up0" snat to ${address}
  }
}
"""

SLOT_NFT = (
    """table ip slot {
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "tap0" jump egress
  }
  chain egress {
"""
    + "".join(f"    {rule}\n" for rule in nft_rules("${guest_address}"))
    + "  }\n}\n"
    + SLOT_NFT_NAT
)
"""The same in nft's language."""
