"""What else lives in the root namespace and would get in the way: names, routes, other programs' firewalls.

Read in the calling thread's namespace; nothing is changed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from netslot.errors import KernelError
from netslot.host import census, root_given
from netslot.host.finding import Finding
from netslot.host.plan import parse_tag
from netslot.kernel import netlink, netns, nf_attrs, nf_tables, rtnetlink, xtables
from netslot.spec.model import HostSpec

_FORWARD_HOOK = 2  # NF_INET_FORWARD
_DROP = 0  # NF_DROP
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
_HOOK_NUMBER = 1  # NFTA_HOOK_HOOKNUM
_OWN_TABLE = "netslot-"
_BASE_CHAINS = 1024  # per hook: NF_MAX_HOOKS / MAX_HOOK_COUNT, net/netfilter/core.c
_WILDCARD = re.compile(r'(?:-[io] (?P<ipt>[\w.-]+)\+)|(?:[io]ifname (?:!= )?"(?P<nft>[\w.-]+)\*")')


@dataclass(frozen=True, slots=True)
class ForwardPolicy:
    """A base chain on the forward hook that drops what it does not accept; ``chain`` as its tool calls it."""

    family: str
    chain: str
    is_iptables: bool


def assumed_uplink() -> str:
    """The link of the calling thread's namespace that a spec without one would most likely name."""
    with netlink.Socket() as sock:
        links = {link.ifindex: link.name for link in rtnetlink.links(sock)}
        defaults = [
            links[route.link] for route in rtnetlink.routes(sock) if not route.prefix_length and route.link in links
        ]
    others = [name for name in links.values() if name != "lo"]
    return next((name for name in [*defaults, *others] if name != "lo"), "lo")


def check(spec: HostSpec) -> list[Finding]:
    """Every conflict with ``spec`` in the calling thread's namespace. KernelError when it cannot be read."""
    with netlink.Socket() as sock:
        links = rtnetlink.links(sock)
        routes = rtnetlink.routes(sock)
    rules = _rule_texts()
    return [
        *_uplink(spec, links),
        *_names(spec, links),
        *_routes(spec, links, routes),
        *_forward(spec, rules),
        *_wildcards(spec, rules),
        *_base_chains(),
        *_managers(spec),
        *_given(spec),
    ]


def _given(spec: HostSpec) -> Iterator[Finding]:
    """Rules of root's that the spec names and root does not hold."""
    wrong = root_given.differences(spec)
    if wrong:
        what = f"root holds other rules than the spec says: {len(wrong)} differences"
        yield Finding("error", what, f"netslot up refuses: {wrong[0]}", " && ".join(root_given.commands(spec)))


def _uplink(spec: HostSpec, links: list[rtnetlink.Link]) -> Iterator[Finding]:
    names = [link.name for link in links]
    if spec.uplink in names:
        return
    others = ", ".join(name for name in names if name != "lo" and not _is_slot(spec, name)) or "none"
    why = f"slots reach the outside through it; there are: {others}"
    yield Finding("error", f"there is no interface {spec.uplink}", why, f'uplink = "NAME" in {spec.file}')


def _is_slot(spec: HostSpec, name: str) -> bool:
    return name.startswith(spec.prefix) and name[len(spec.prefix) :].isdecimal()


def _names(spec: HostSpec, links: list[rtnetlink.Link]) -> Iterator[Finding]:
    own_links = {one.link for each in spec.classes.values() for one in (each.residents or {}).values()}
    taken = [link for link in links if _is_slot(spec, link.name) or link.name in own_links]
    foreign = [link.name for link in taken if parse_tag(link.alias) is None]
    why = "slots' links are to be called that, and netslot removes nothing that it did not make"
    fix = 'prefix = "..." in the spec, or remove them: ip link del '
    if foreign:
        yield Finding("error", f"links that are not netslot's: {_some(foreign)}", why, fix + foreign[0])
    own = {link.name for link in taken} - set(foreign)
    stray = sorted(name for name in netns.names() if _is_slot(spec, name) and name not in own)
    if stray:
        fix = f"netslot down, or: ip netns del {stray[0]}"
        yield Finding("warning", f"namespaces without a slot's link: {_some(stray)}", why, fix)
    if own:
        yield Finding("info", f"{len(own)} slots are here already", "netslot runs on this host")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _routes(spec: HostSpec, links: list[rtnetlink.Link], routes: list[rtnetlink.RouteRecord]) -> Iterator[Finding]:
    by_index = {link.ifindex: link.name for link in links}
    pools = [pool for pool in (spec.addresses.pool, spec.addresses.pool6) if pool is not None]
    for route in routes:
        through = by_index.get(route.link, "nowhere")
        if route.table != rtnetlink.RT_TABLE_MAIN or route.kind != rtnetlink.RTN_UNICAST or not route.prefix_length:
            continue
        if _is_slot(spec, through):
            continue
        network = ip_network((route.destination, route.prefix_length))
        for pool in pools:
            if pool.version == network.version and pool.overlaps(network):
                key = "pool" if pool.version == 4 else "pool6"
                inside = network.prefixlen >= pool.prefixlen
                yield Finding(
                    "error" if inside else "warning",
                    f"a route to {network} through {through} overlaps with {key} {pool}",
                    "packets for some slots would go there instead"
                    if inside
                    else "what it has there cannot be reached",
                    f"another addresses.{key} in {spec.file}, or: ip route del {network} dev {through}",
                )


def _forward(spec: HostSpec, rules: str) -> Iterator[Finding]:
    for policy in forward_policies():
        if policy.family == "ip6" and not spec.ipv6:
            continue
        what = f"{policy.chain} drops forwarded packets by policy"
        if policy.is_iptables:
            yield Finding("info", what, "netslot up puts a jump to its own accepting rules into that chain")
        elif f'iifname "{spec.prefix}*" accept' not in rules:
            why = "what it does not accept is dropped, and an accept in a table of netslot's own does not override it"
            fix = " && ".join(
                f"nft 'insert rule {policy.chain} {way} \"{spec.prefix}*\" accept'" for way in ("iifname", "oifname")
            )
            yield Finding("warning", what, why, fix)
    if "firewalld" in rules:
        why = "it rejects what is forwarded between zones that it was not told about"
        pool = spec.addresses.pool or "NETWORK"
        fix = f"firewall-cmd --permanent --zone=trusted --add-source={pool} && firewall-cmd --reload"
        yield Finding("warning", "firewalld's rules are loaded", why, fix)


def forward_policies() -> list[ForwardPolicy]:
    """The chains on the forward hook with policy drop, of both iptables variants and of nftables."""
    found = [ForwardPolicy(family, f"{tool} filter FORWARD", True) for family, tool in _legacy_dropping()]
    with nf_tables.Socket() as sock:
        try:
            chains = list(netlink.split(sock.dump_bytes(nf_tables.GETCHAIN, 0, b"", "list nftables chains")))
        except KernelError:
            return found  # a kernel without nf_tables has no chains of it; the probe of features says so
    for message in chains:
        attributes = netlink.parse_attrs(message.payload, 4)
        hook = netlink.parse_attrs(attributes.get(nf_attrs.CHAIN_HOOK, b""))
        if int.from_bytes(hook.get(_HOOK_NUMBER, b"\xff"), "big") != _FORWARD_HOOK:
            continue
        if (
            int.from_bytes(attributes.get(nf_attrs.CHAIN_POLICY, b"\1"), "big") != _DROP
            or message.payload[0] not in _FAMILIES
        ):
            continue
        table, name = (
            attributes[kind].rstrip(b"\0").decode() for kind in (nf_attrs.CHAIN_TABLE, nf_attrs.CHAIN_NAME)
        )
        family = _FAMILIES[message.payload[0]]
        if table.startswith(_OWN_TABLE):
            continue
        is_iptables = (table, name) == ("filter", "FORWARD") and family in ("ip", "ip6")
        found.append(ForwardPolicy(family, f"{family} {table} {name}", is_iptables))
    return found


def _legacy_dropping() -> list[tuple[str, str]]:
    return [
        (family, tool)
        for family, tool in (("ip", "iptables-legacy"), ("ip6", "ip6tables-legacy"))
        if re.search(r"^:FORWARD DROP", _saved(f"{tool}-save"), re.MULTILINE)
    ]


def _rule_texts() -> str:
    """The rules of all firewalls, as their own tools print them."""
    return "\n".join(
        [
            *(_saved(f"{tool}-legacy-save") for tool in ("iptables", "ip6tables")),
            *(_saved(f"{tool}-nft-save") for tool in ("iptables", "ip6tables")),
            _output(["nft", "list", "ruleset"]),
        ]
    )


def _saved(tool: str) -> str:
    """What a save command prints; a legacy one is not run where there are no tables, as it would load modules."""
    family = xtables.IPV6 if tool.startswith("ip6") else xtables.IPV4
    if "legacy" in tool and not xtables.existing_tables(family):
        return ""
    return _output([tool])


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _wildcards(spec: HostSpec, rules: str) -> Iterator[Finding]:
    seen: set[str] = set()
    for line in rules.splitlines():
        for match in _WILDCARD.finditer(line):
            start = match["ipt"] or match["nft"]
            if spec.prefix.startswith(start) and start != spec.prefix and start not in seen:
                seen.add(start)
                why = f"{line.strip()!r} was written for other links and meets the slots' too"
                yield Finding(
                    "warning", f"a rule for {start}* matches {spec.prefix}1", why, 'prefix = "..." in the spec'
                )


def _base_chains() -> Iterator[Finding]:
    for (family, hook), count in census.take().base_chains.items():
        if count > _BASE_CHAINS * 3 // 4:
            why = f"the kernel takes {_BASE_CHAINS} for each hook, and every packet walks all of them"
            fix = "nft list chains, and remove what nobody uses"
            yield Finding("warning", f"{count} base chains on {family} {hook}", why, fix)


def _managers(spec: HostSpec) -> Iterator[Finding]:
    """Programs that configure every link they see."""
    if _is_running("NetworkManager"):
        config = f"[keyfile]\\nunmanaged-devices=interface-name:{spec.prefix}*\\n"
        yield Finding(
            "warning",
            "NetworkManager is running",
            "it looks at every new link, and may try to configure slots' links",
            f"printf '{config}' > /etc/NetworkManager/conf.d/netslot.conf && nmcli general reload",
        )


def _is_running(name: str) -> bool:
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text(encoding="utf-8", errors="replace").strip() == name:
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return False
