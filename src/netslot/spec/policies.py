"""The spec's sections for what is not firewall rules: NAT, BPF programs, cgroups, routes, rates.

Texts may hold a slot's variables as ``${name}``. Where a value is said to be a *parameter*, it is the name of one
that the spec declares; its content is bound when a slot is acquired.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from netslot.errors import SpecError

Quantity: TypeAlias = int | str
"""A number, or text such as ``64k``, ``20M``, ``1G`` (powers of 1,000; ``Ki``, ``Mi``, ``Gi`` of 1,024)."""

Hook = Literal[
    "egress",
    "ingress",
    "guest/egress",
    "guest/ingress",
    "cgroup/egress",
    "cgroup/ingress",
    "cgroup/connect4",
    "cgroup/connect6",
    "cgroup/sendmsg4",
    "cgroup/sendmsg6",
    "cgroup/sock_create",
]
Word: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
LinkMtu: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Operations: TypeAlias = Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]
LinkName: TypeAlias = Annotated[str, Meta(pattern=r"^[^\s/:]{1,15}$")]


class NatSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[nat]``: how the guest's address becomes the slot's own."""

    kind: Literal["rules", "bpf", "nftables"] = "rules"
    """rules: by the slot's rule files, or not at all. bpf, nftables: built in, stateless, one to one."""


class BpfProgram(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[bpf.programs]]``: a program out of an object file of the user's."""

    object: str
    """Path of the object file, relative to the spec file."""
    program: str
    """Name of the function in it."""
    hook: Hook
    """Where it is attached: the slot's uplink (tc), its link to the workload, or its cgroup. On links, ingress is
    what comes into the slot: guest/ingress is what the workload sends, guest/egress what it gets."""
    constants: dict[str, str | int] = {}
    """``const volatile`` variables by name: numbers, addresses, MACs, texts with variables."""
    maps: dict[str, str] = {}
    """Maps by name, and the parameter that fills each: CIDRs (LPM trie), ports (hash), a number (array). A map is one
    for all programs of its object file."""


class BpfFilter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[bpf.filter]``: the built-in egress filter. The longest prefix that holds the destination decides."""

    default: Literal["drop", "accept"] = "drop"
    """For destinations on no list."""
    allow: str = ""
    """Parameter (CIDRs, both families) of destinations that pass."""
    deny: str = ""
    """Parameter (CIDRs, both families) of destinations that do not."""
    ports: str | tuple[str, ...] = ""
    """What destinations on ``allow`` are limited to: a list (``tcp:443``, ``udp:53``, ``icmp``), or a parameter of
    type ports, of which the outer one counts. Empty: no limit."""


class BpfSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[bpf]``: programs on the slot's own links and cgroup."""

    counters: bool = False
    """Count packets and bytes by direction and verdict, on the uplink and on a link to the workload with programs."""
    filter: BpfFilter | None = None
    programs: tuple[BpfProgram, ...] = ()


class IoLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[cgroup.io]]``: limits on one block device; a missing one is no limit."""

    device: str
    """``major:minor``."""
    read_bytes: Quantity | None = None
    write_bytes: Quantity | None = None
    read_operations: Operations | None = None
    write_operations: Operations | None = None


class CgroupSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[cgroup]``: one cgroup per slot. Values may be a parameter's, as ``${name}``."""

    parent: str = "netslot"
    """Cgroup that holds all slots' cgroups, below the root of each hierarchy: ``netslot``, ``a/b``; no variables."""
    cpu: str | float | None = None
    """CPUs' worth of time: 0.5, 2."""
    cpu_weight: str | int | None = None
    """1 to 10,000; 100 is the default of the kernel."""
    memory: Quantity | None = None
    """Bytes; reaching it ends processes."""
    memory_high: Quantity | None = None
    """Bytes; above it processes are slowed (cgroup v2 only)."""
    pids: str | int | None = None
    io: tuple[IoLimit, ...] = ()


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[routes.routes]]``: one route in the slot."""

    to: str
    """``default``, ``default6``, or a CIDR; or the name of a CIDRs parameter as ``@name``."""
    kind: Literal["unicast", "blackhole", "prohibit", "unreachable"] = "unicast"
    via: str | tuple[str, ...] = ()
    """Gateways; several share the traffic."""
    device: str = "${uplink_if}"
    source: str = ""
    """Preferred source address."""
    table: Annotated[int, Meta(ge=1, le=0xFFFFFFFF)] = 254
    """254 is the main table; 1 to 252 are the slot's own to use."""
    metric: Word = 0
    mtu: LinkMtu = 0
    onlink: bool = False


class RouteRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[routes.rules]]``: which packets use which table, inside the slot."""

    priority: Annotated[int, Meta(ge=1, le=32765)]
    """1 to 32765, each at most once per family."""
    table: Word = 0
    kind: Literal["table", "blackhole", "prohibit", "unreachable"] = "table"
    source: str = ""
    destination: str = ""
    mark: Word | None = None
    input: str = ""
    """Name of the incoming interface."""
    protocol: Literal["", "tcp", "udp", "icmp", "icmpv6"] = ""
    ports: str = ""
    """Destination port or range: ``443``, ``8000-8999``."""
    family: Literal[0, 4, 6] = 0
    """0: as the addresses say, both without any."""


class WireguardPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[routes.tunnels.peers]]``: who is at the other end of a WireGuard tunnel."""

    public_key: str
    """As ``wg pubkey`` writes it; of keys that parameters bring, leave out the final ``=``."""
    endpoint: str = ""
    """``192.0.2.1:51820`` or ``[2001:db8::1]:51820``; without one the peer must begin."""
    allowed: tuple[str, ...] = ("0.0.0.0/0", "::/0")
    """What the peer may send from, and what is sent to it."""
    keepalive: Port = 0
    """Seconds between packets that keep a NAT on the way open; 0 for none."""
    preshared_key: str = ""


class Tunnel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[routes.tunnels]]``: a tunnel link of the slot's own, for routes to go through."""

    name: LinkName
    local: str = ""
    """The slot's end: ``${address}`` or ``${address6}``. Not for wireguard."""
    remote: str = ""
    """The other end. Not for wireguard, whose peers have endpoints."""
    kind: Literal["vxlan", "geneve", "gre", "gretap", "ip6gre", "ip6gretap", "ipip", "sit", "ip6tnl", "wireguard"] = (
        "vxlan"
    )
    """As the kernel names them. gre, gretap, ipip and sit go over IPv4; ip6gre, ip6gretap and ip6tnl over IPv6."""
    address: str | tuple[str, ...] = ()
    """Addresses and prefix lengths on the link."""
    id: Word | None = None
    """VXLAN or Geneve network identifier (default 1), or GRE key (default: none)."""
    port: Port = 0
    """UDP port of VXLAN (default 4789), Geneve (6081) or WireGuard (any)."""
    mtu: LinkMtu = 0
    private_key: str = ""
    """WireGuard's, as ``wg genkey`` writes it, or a parameter. It stands in the spec or the lease for all to read."""
    private_key_file: str = ""
    """A file with it, by a path relative to the spec file: ``keys/${slot}``."""
    peers: tuple[WireguardPeer, ...] = ()


class RoutesSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[routes]``: tables, rules and tunnels inside the slot."""

    tunnels: tuple[Tunnel, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[RouteRule, ...] = ()


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[rates.egress]``, ``[rates.ingress]``: limits of one direction. A value may be a parameter's: ``${name}``."""

    bandwidth: Quantity | None = None
    """Bits a second: ``10M``; from 8k to 200G."""
    burst: Quantity | None = None
    """Bytes that may pass at once, at least a frame; default: 10 ms of the bandwidth, at least 64 KiB."""
    packets: Quantity | None = None
    """Packets a second."""
    packet_burst: Quantity | None = None
    """Packets that may pass at once; default: 100 ms of the packet rate, at least 16."""


class RatesSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[rates]``: limits on the slot's own links, and on its connections."""

    egress: Rate = Rate()
    """From the workload to the outside."""
    ingress: Rate = Rate()
    """From the outside to the workload."""
    new_connections: Quantity | None = None
    """New connections a second, both directions together."""
    new_connections_burst: Quantity | None = None
    """New connections at once; default: one second's worth."""
    connections: Quantity | None = None
    """Connections that may be open at once. Keep slots x this below the host's nf_conntrack_max where the root
    namespace tracks connections, as it does for masquerading."""


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(value: Quantity, *, key: str) -> int:
    """The number that ``20M`` or ``64Ki`` stands for; SpecError names ``key`` when it stands for none."""
    if isinstance(value, int):
        number = value
    else:
        digits = value.rstrip("kMGTi")
        unit = _UNITS.get(value[len(digits) :])
        if unit is None or not digits.isdecimal():
            raise SpecError(f"{value!r} is no quantity", key=key, hint="write 64k, 20M or 512Mi")
        number = int(digits) * unit
    if number < 0:
        raise SpecError(f"{value!r} is below zero", key=key)
    return number
