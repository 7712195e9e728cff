"""The static root ruleset as text: netslot's preset, and the operator's additions put into netslot's own chains.

It names slots by interface prefix and address pool only, so it is the same for ten slots and for ten thousand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from netslot.errors import SpecError
from netslot.spec.model import HostSpec, RuleFile
from netslot.spec.render import render

BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")

_SHORT = {"PREROUTING": "PRE", "INPUT": "IN", "FORWARD": "FWD", "OUTPUT": "OUT", "POSTROUTING": "POST"}
_NFT_TABLE = re.compile(r"^\s*(?:add\s+)?table\s+(?:(ip6?|inet|arp|bridge|netdev)\s+)?([\w-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Chains:
    """netslot's part of one iptables table: its own chains with their rules, and who jumps to them."""

    table: str
    rules: dict[str, list[str]]
    """Rules by chain, each as it follows ``-A CHAIN``."""
    jumps: list[tuple[str, str]]
    """(built-in chain, netslot's chain that it jumps to)."""


def table(spec: HostSpec) -> str:
    """The name of netslot's own nftables table; the prefix tells several hosts in one root namespace apart."""
    return f"netslot-{spec.prefix}"


def _chain(spec: HostSpec, built_in: str) -> str:
    """netslot's chain for a built-in one; the longest fits the 28 bytes that iptables allows."""
    return f"NETSLOT-{spec.prefix}-{_SHORT[built_in]}"


def _chains(spec: HostSpec, table: str, rules: dict[str, list[str]]) -> Chains:
    own = {name: _chain(spec, name) for name in BUILT_IN}
    return Chains(
        table,
        {own.get(name, name): each for name, each in rules.items()},
        [(name, own[name]) for name in rules if name in own],
    )


def iptables(spec: HostSpec, *, ipv6: bool) -> list[Chains]:
    """Preset and additions of one family; the operator's rules come first, so what they drop stays dropped."""
    file = spec.root.rules.ipv6 if ipv6 else spec.root.rules.ipv4
    tables = _additions(file, spec.root_values()) if file is not None else {}
    for table, chain, rule in _preset(spec, ipv6=ipv6):
        tables.setdefault(table, {}).setdefault(chain, []).append(rule)
    return [_chains(spec, table, rules) for table, rules in tables.items()]


def forward_only(spec: HostSpec) -> Chains:
    """What an iptables FORWARD chain needs whose policy, say Docker's, is to drop."""
    return _chains(spec, "filter", {"FORWARD": [rule for _, rule in _forward(spec)]})


def _preset(spec: HostSpec, *, ipv6: bool) -> Iterator[tuple[str, str, str]]:
    slots, uplink = f"{spec.prefix}+", spec.uplink
    yield "raw", "PREROUTING", f"-i {slots} -m rpfilter --invert -j DROP"
    for chain, rule in _forward(spec):
        yield "filter", chain, rule
    ping = "-p ipv6-icmp -m icmp6 --icmpv6-type echo-request" if ipv6 else "-p icmp -m icmp --icmp-type echo-request"
    # Not RELATED: a tenant could tell the host anything about the host's other connections.
    yield "filter", "INPUT", f"-i {slots} -m conntrack --ctstate ESTABLISHED -j ACCEPT"
    yield "filter", "INPUT", f"-i {slots} {ping} -j ACCEPT"
    yield "filter", "INPUT", f"-i {slots} -j DROP"
    pool = spec.addresses.pool6 if ipv6 else spec.addresses.pool
    if pool is not None and (spec.root.masquerade6 if ipv6 else spec.root.masquerade):
        yield "nat", "POSTROUTING", f"-s {pool} -o {uplink} -j MASQUERADE"


def _forward(spec: HostSpec) -> list[tuple[str, str]]:
    """(chain, rule) of the preset's forwarding: to the outside and back, never from slot to slot or elsewhere."""
    slots, uplink = f"{spec.prefix}+", spec.uplink
    return [
        ("FORWARD", f"-i {slots} -o {slots} -j DROP"),
        ("FORWARD", f"-i {slots} -o {uplink} -j ACCEPT"),
        ("FORWARD", f"-i {uplink} -o {slots} -j ACCEPT"),
        ("FORWARD", f"-i {slots} -j DROP"),
    ]


def _additions(file: RuleFile, values: dict[str, str]) -> dict[str, dict[str, list[str]]]:
    """The operator's rules by table and chain."""
    tables: dict[str, dict[str, list[str]]] = {}
    chains: dict[str, list[str]] | None = None
    for number, line in enumerate(render(file.text, values, file=file.name).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0].startswith("*"):
            chains = tables.setdefault(words[0][1:], {})
            continue
        if words[0] == "COMMIT":
            chains = None
            continue
        if chains is None:
            raise SpecError("expected '*TABLE' before rules", file=file.name, line=number)
        if words[0].startswith(":"):
            name = words[0][1:]
            if name not in BUILT_IN:
                chains.setdefault(name, [])
            elif len(words) > 1 and words[1] != "ACCEPT":
                raise SpecError(
                    f"netslot does not set the policy of {name}, which belongs to the whole host",
                    file=file.name,
                    line=number,
                    hint=f"write ':{name} ACCEPT' and end the chain with an explicit '-A {name} ... -j DROP'",
                )
        elif words[0] in ("-A", "--append") and len(words) > 1:
            rule = line.split(None, 2)[2] if len(words) > 2 else ""
            chains.setdefault(words[1], []).append(rule)
        else:
            hint = "write rules as iptables-save prints them: -A CHAIN ..."
            raise SpecError(
                f"{words[0]!r} is not understood in a root rule file", file=file.name, line=number, hint=hint
            )
    return tables


def nft_preset(spec: HostSpec) -> str:
    """netslot's own nftables table, for both families."""
    slots, uplink = f'"{spec.prefix}*"', f'"{spec.uplink}"'
    lines = [
        f"table inet {table(spec)} {{",
        "\tchain prerouting {",
        "\t\ttype filter hook prerouting priority raw; policy accept;",
        f"\t\tiifname {slots} fib saddr . iif oif missing drop",
        "\t}",
        "\tchain input {",
        "\t\ttype filter hook input priority filter; policy accept;",
        f"\t\tiifname {slots} ct state established accept",
        f"\t\tiifname {slots} icmp type echo-request accept",
        f"\t\tiifname {slots} icmpv6 type echo-request accept",
        f"\t\tiifname {slots} drop",
        "\t}",
        "\tchain forward {",
        "\t\ttype filter hook forward priority filter; policy accept;",
        f"\t\tiifname {slots} oifname {slots} drop",
        f"\t\tiifname {slots} oifname {uplink} accept",
        f"\t\tiifname {uplink} oifname {slots} accept",
        f"\t\tiifname {slots} drop",
        "\t}",
    ]
    masquerades = []
    if spec.root.masquerade and spec.addresses.pool is not None:
        masquerades.append(f"\t\tip saddr {spec.addresses.pool} oifname {uplink} masquerade")
    if spec.root.masquerade6 and spec.addresses.pool6 is not None:
        masquerades.append(f"\t\tip6 saddr {spec.addresses.pool6} oifname {uplink} masquerade")
    if masquerades:
        hook = "\t\ttype nat hook postrouting priority srcnat; policy accept;"
        lines += ["\tchain postrouting {", hook, *masquerades, "\t}"]
    return "\n".join([*lines, "}", ""])


def nft_tables(text: str) -> list[tuple[str, str]]:
    """(family, name) of the tables that a file defines."""
    return list(dict.fromkeys((family or "ip", name) for family, name in _NFT_TABLE.findall(text)))
