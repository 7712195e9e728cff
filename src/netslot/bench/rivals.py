"""The usual arrangements: every tenant's rules in the root namespace, as rule files for the real tools."""

from __future__ import annotations

from collections.abc import Iterable

from netslot.bench.tenants import (
    DENIED_NETWORKS,
    DENIED_PORTS,
    POOL,
    RESOLVERS,
    ROOT_NAT,
    UPLINK,
    Tenant,
    iptables_rules,
    iptables_table,
    nft_rules,
)

BASE_CHAINS = 1024
"""How many base chains the kernel takes on one hook (net/netfilter/core.c, MAX_HOOK_COUNT)."""


def flat(tenants: Iterable[Tenant]) -> str:
    """All rules in one chain, in iptables-save form."""
    return iptables_table((), (line for one in tenants for line in flat_tenant(one))) + ROOT_NAT


def flat_tenant(one: Tenant) -> list[str]:
    return iptables_rules("FORWARD", one.address, one.interface)


def chains(tenants: Iterable[Tenant]) -> str:
    """A chain per tenant and one dispatch rule for each, in iptables-save form."""
    everyone = list(tenants)
    rules = (line for one in everyone for line in chains_tenant(one))
    return iptables_table((f"t{one.number}" for one in everyone), rules) + ROOT_NAT


def chains_tenant(one: Tenant) -> list[str]:
    chain = f"t{one.number}"
    return [f"-A FORWARD -i {one.interface} -j {chain}", *iptables_rules(chain, one.address, None)]


_MASQUERADE = f"""  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{UPLINK}" masquerade
  }}
"""

NAT_ONLY = f"table ip natonly {{\n{_MASQUERADE}}}\n"


def tables(tenants: Iterable[Tenant]) -> str:
    """A table per tenant, each with a base chain of its own on the forward hook, in nft's language."""
    return f"table ip shared {{\n{_MASQUERADE}}}\n" + "".join(tables_tenant(one) for one in tenants)


def tables_tenant(one: Tenant) -> str:
    rules = "\n    ".join(nft_rules(one.address))
    return f"""table ip t{one.number} {{
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname != "{one.interface}" accept
    {rules}
  }}
}}
"""


def verdict_map(tenants: Iterable[Tenant]) -> str:
    """A chain per tenant behind one look-up in a verdict map, in nft's language."""
    everyone = list(tenants)
    bodies = "".join(
        f"  chain t{one.number} {{\n    " + "\n    ".join(nft_rules(one.address)) + "\n  }\n" for one in everyone
    )
    elements = ", ".join(f'"{one.interface}" : jump t{one.number}' for one in everyone)
    return f"""table ip verdicts {{
{bodies}  map tenants {{
    type ifname : verdict
    elements = {{ {elements} }}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname vmap @tenants
  }}
{_MASQUERADE}}}
"""


def verdict_map_tenant(one: Tenant) -> str:
    """One more tenant for :func:`verdict_map`."""
    rules = "".join(f"add rule ip verdicts t{one.number} {rule}\n" for rule in nft_rules(one.address))
    element = f'add element ip verdicts tenants {{ "{one.interface}" : jump t{one.number} }}\n'
    return f"add chain ip verdicts t{one.number}\n{rules}{element}"


_SETS = ("sources", "networks", "resolvers", "ports")


def sets(tenants: Iterable[Tenant]) -> str:
    """What the tenants' rules say as elements of shared sets, in nft's language."""
    elements: dict[str, list[str]] = {name: [] for name in _SETS}
    for one in tenants:
        for name, own in _set_elements(one).items():
            elements[name] += own
    body = {name: ",\n".join(items) for name, items in elements.items()}
    return f"""table ip sets {{
  set sources {{
    type ifname . ipv4_addr
    elements = {{ {body["sources"]} }}
  }}
  set networks {{
    type ipv4_addr . ipv4_addr; flags interval
    elements = {{ {body["networks"]} }}
  }}
  set resolvers {{
    type ipv4_addr . ipv4_addr . inet_proto . inet_service
    elements = {{ {body["resolvers"]} }}
  }}
  set ports {{
    type ipv4_addr . inet_proto . inet_service; flags interval
    elements = {{ {body["ports"]} }}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname . ip saddr != @sources drop
    ct state invalid drop
    ip saddr . ip daddr @networks drop
    ip saddr . ip daddr . meta l4proto . th dport @resolvers accept
    ip saddr . meta l4proto . th dport @ports drop
    ip saddr {POOL} accept
  }}
{_MASQUERADE}}}
"""


def sets_tenant(one: Tenant) -> str:
    """One more tenant for :func:`sets`."""
    return "".join(
        f"add element ip sets {name} {{ {', '.join(items)} }}\n" for name, items in _set_elements(one).items()
    )


def _set_elements(one: Tenant) -> dict[str, list[str]]:
    source = one.address
    return {
        "sources": [f'"{one.interface}" . {source}'],
        "networks": [f"{source} . {network}" for network in DENIED_NETWORKS],
        "resolvers": [f"{source} . {resolver} . {proto} . 53" for resolver in RESOLVERS for proto in ("udp", "tcp")],
        "ports": [f"{source} . {protocol} . {ports}" for protocol, ports in DENIED_PORTS],
    }
