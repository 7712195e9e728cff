"""The tunnels of the routes policy: links of the slot's own, for its routes to go through."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from pathlib import Path
from typing import NamedTuple

from netslot.errors import HostError, KernelError, SpecError
from netslot.kernel import netlink, netns, wireguard
from netslot.kernel import rtnetlink as rt
from netslot.kernel import tunnels as kernel
from netslot.kernel.netlink import Socket
from netslot.policy.base import Difference, Values
from netslot.spec.policies import Tunnel, WireguardPeer
from netslot.spec.render import render

TABLE = "netslot_tunnels"
"""The nf_tables table that keeps the workload from tunnels' ports."""
_ALIAS = "netslot tunnel"
_FORWARD = {rt.IPV4_DEVCONF_FORWARDING: 1, rt.IPV4_DEVCONF_ACCEPT_REDIRECTS: 0}
_LEAST_MTU = 68  # RFC 791
_MOST_IDENTIFIER = 0xFFFFFF
_GRE, _IPIP, _IPV6, _UDP = 47, 4, 41, 17
_CARRIERS: Mapping[str, tuple[int, ...]] = {
    "gre": (_GRE,),
    "gretap": (_GRE,),
    "ip6gre": (_GRE,),
    "ip6gretap": (_GRE,),
    "ipip": (_IPIP,),
    "sit": (_IPV6,),
    "ip6tnl": (_IPIP, _IPV6),
}
_PORTS = {"vxlan": 4789, "geneve": 6081, "wireguard": 0}
_UNAUTHENTICATED = frozenset(("vxlan", "geneve"))
_MODULES = {"gre": "ip_gre", "gretap": "ip_gre", "ip6gre": "ip6_gre", "ip6gretap": "ip6_gre", "ip6tnl": "ip6_tunnel"}


class Arrival(NamedTuple):
    """Packets that come to a slot by one of its tunnels: an IP protocol, and of UDP the port that they come to."""

    protocol: int
    port: int = 0


def arrivals(section: Sequence[Tunnel]) -> tuple[Arrival, ...]:
    """What a NAT must leave to the slot, which otherwise is nobody's address outside but the guest's.

    SpecError for a tunnel of which that cannot be known.
    """
    found: dict[Arrival, None] = {}
    for number, tunnel in enumerate(section):
        port = tunnel.port or _PORTS.get(tunnel.kind, 0)
        if tunnel.kind in _PORTS and not port:
            hint = "say port = 51820, or any other: the kernel's own choice is not known to the NAT"
            raise SpecError("beside nat.kind, WireGuard needs a port", key=f"routes.tunnels.{number}", hint=hint)
        carried = [Arrival(_UDP, port)] if port else [Arrival(each) for each in _CARRIERS[tunnel.kind]]
        found |= dict.fromkeys(carried)
    return tuple(found)


def nft_text(section: Sequence[Tunnel], *, inner: bool) -> str:
    """The nf_tables table that keeps the workload from a tunnel's port on the slot; empty where none needs it.

    VXLAN and Geneve take packets from whoever sends them to their port (vxlan_rcv()): what is inside would come out
    of the tunnel, past all rules for what comes from the workload. The kinds without ports know their other end by
    its address, which reverse-path filters keep the workload from; WireGuard's has a key.
    """
    ports = sorted({tunnel.port or _PORTS[tunnel.kind] for tunnel in section if tunnel.kind in _UNAUTHENTICATED})
    links = ["lo", *(["${guest_if}"] if inner else [])]
    rules = [f'\t\tiifname "{link}" udp dport {port} counter drop\n' for link in links for port in ports]
    if not rules:
        return ""
    chain = f"\tchain arrive {{\n\t\ttype filter hook input priority -300;\n{''.join(rules)}\t}}\n"
    return f"table inet {TABLE} {{\n{chain}}}\n"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One tunnel of one slot, worked out."""

    name: str
    kind: str
    told: kernel.Data
    mtu: int
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    config: wireguard.Config | None


def wanted(section: Sequence[Tunnel], values: Values, directory: Path) -> list[Wanted]:
    """The tunnels of one slot; SpecError for what makes none."""
    found = []
    for number, tunnel in enumerate(section):
        key = f"routes.tunnels.{number}"
        try:
            found.append(_one(tunnel, values, directory, key))
        except ValueError as error:
            raise SpecError(str(error), key=key) from None
    return found


def _one(tunnel: Tunnel, values: Values, directory: Path, key: str) -> Wanted:
    def rendered(text: str) -> str:
        return render(text, values, file="[routes]")

    local, remote = (ip_address(text) if (text := rendered(each)) else None for each in (tunnel.local, tunnel.remote))
    versions = {end.version for end in (local, remote) if end is not None}
    if not versions <= kernel.VERSIONS[tunnel.kind] or len(versions) > 1:
        allowed = " or ".join(f"IPv{version}" for version in sorted(kernel.VERSIONS[tunnel.kind])) or "none"
        raise SpecError(f"ends of a {tunnel.kind} tunnel: {allowed}, both of one version", key=key)
    if 0 < tunnel.mtu < _LEAST_MTU:
        raise SpecError(f"mtu {tunnel.mtu} is below {_LEAST_MTU}", key=key)
    if tunnel.kind in ("vxlan", "geneve") and (tunnel.id or 0) > _MOST_IDENTIFIER:
        raise SpecError(f"id {tunnel.id} is beyond {_MOST_IDENTIFIER}", key=key)
    if tunnel.kind != "wireguard" and remote is None:
        raise SpecError(f"a {tunnel.kind} tunnel needs a remote end", key=key)
    addresses = (tunnel.address,) if isinstance(tunnel.address, str) else tunnel.address
    own = tuple(ip_interface(rendered(text)) for text in addresses if text)
    own += _link_local(own) if tunnel.kind in kernel.ETHERNET else ()
    told = kernel.data(tunnel.kind, kernel.End(local, remote, tunnel.id, tunnel.port))
    config = _config(tunnel, values, directory, key) if tunnel.kind == "wireguard" else None
    return Wanted(tunnel.name, tunnel.kind, told, tunnel.mtu, own, config)


def _link_local(own: Sequence[IPv4Interface | IPv6Interface]) -> tuple[IPv6Interface, ...]:
    """For neighbour discovery on behalf of others, the kernel asks from no other address (ndisc_send_ns()).

    Its lower half is that of the link's own address, and so is nobody else's on the link.
    """
    lower = next((int(each.ip) & 0xFFFF_FFFF_FFFF_FFFF for each in own if each.version == 6), None)
    return (IPv6Interface((0xFE80 << 112 | lower, 64)),) if lower is not None else ()


def _config(tunnel: Tunnel, values: Values, directory: Path, key: str) -> wireguard.Config:
    if bool(tunnel.private_key) == bool(tunnel.private_key_file):
        raise SpecError("WireGuard needs a private_key or a private_key_file", key=key)
    text = render(tunnel.private_key, values, file="[routes]")
    if tunnel.private_key_file:
        file = directory / render(tunnel.private_key_file, values, file="[routes]")
        try:
            text = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            raise SpecError(f"cannot read the key in {file}: {error}", key=key) from error
    peers = tuple(_peer(peer, values) for peer in tunnel.peers)
    return wireguard.Config(wireguard.key(text), tunnel.port, peers)


def _peer(peer: WireguardPeer, values: Values) -> wireguard.Peer:
    def rendered(text: str) -> str:
        return render(text, values, file="[routes]")

    endpoint = None
    if text := rendered(peer.endpoint):
        address, _, port = text.rpartition(":")
        endpoint = (str(ip_address(address.strip("[]"))), int(port))
    shared = rendered(peer.preshared_key)
    return wireguard.Peer(
        key=wireguard.key(rendered(peer.public_key)),
        shared=wireguard.key(shared) if shared else bytes(wireguard.KEY_BYTES),
        endpoint=endpoint,
        keepalive=peer.keepalive,
        allowed=frozenset(ip_network(rendered(each)) for each in peer.allowed),
    )


def probe(tunnels: Sequence[Wanted]) -> None:
    """Make each in a scratch namespace: HostError when the kernel has no such kind."""
    if tunnels:
        with netns.Worker(name="netslot-tunnels") as worker:
            worker.run(_probe_here, tunnels)


def _probe_here(tunnels: Sequence[Wanted]) -> None:
    with netns.fresh(), Socket() as sock:
        for tunnel in tunnels:
            try:
                sock.execute([_add(tunnel)])
            except KernelError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                hint = f"modprobe {_MODULES.get(tunnel.kind, tunnel.kind)}, or a kernel that has it"
                raise HostError(f"this kernel has no tunnels of kind {tunnel.kind}", hint=hint) from error


def _add(tunnel: Wanted) -> netlink.Request:
    return kernel.add(tunnel.name, tunnel.kind, tunnel.told, mtu=tunnel.mtu, alias=_ALIAS)


def converge(sock: Socket, tunnels: Sequence[Wanted]) -> None:
    """Make what is missing or otherwise in the calling thread's namespace; routes through what is made anew go."""
    for tunnel in tunnels:
        there = _link(sock, tunnel.name)
        if there is not None and not list(_differences(sock, tunnel, there)):
            continue
        if there is not None and not _same_kind(tunnel, there):
            sock.execute([rt.delete_link(rt.parse_link(there).ifindex)])
            there = None
        if there is None:
            sock.execute([_add(tunnel)])
        _configure(sock, tunnel)


def _configure(sock: Socket, tunnel: Wanted) -> None:
    index = socket.if_nametoindex(tunnel.name)
    if tunnel.config is not None:
        wireguard.configure(index, tunnel.config)
    present = [record for record in rt.addresses(sock) if record.link == index]
    requests = [rt.set_link(index, quiet_ipv6=True)]  # before it comes up: see netslot.host.links
    requests.append(rt.set_link(index, up=True, mtu=tunnel.mtu or None, alias=_ALIAS, ipv4=_FORWARD))
    own = {(address.ip.packed, address.network.prefixlen) for address in tunnel.addresses}
    for record in present:
        if (record.address, record.prefix_length) not in own:
            gone = ip_interface((ip_address(record.address), record.prefix_length))
            requests.append(rt.delete_address(index, gone)._replace(ignore=(errno.EADDRNOTAVAIL,)))
    sock.execute(requests + [rt.add_address(index, address) for address in tunnel.addresses])


def read(sock: Socket, tunnels: Sequence[Wanted]) -> list[Difference]:
    """What of the tunnels is otherwise."""
    found: list[Difference] = []
    for tunnel in tunnels:
        there = _link(sock, tunnel.name)
        what = ["is missing"] if there is None else _differences(sock, tunnel, there)
        found += [Difference("routes", f"tunnel {tunnel.name} {each}") for each in what]
    return found


def _link(sock: Socket, name: str) -> netlink.Message | None:
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return None
    return next(iter(sock.execute([rt.get_link(index)])), None)


def _same_kind(tunnel: Wanted, there: netlink.Message) -> bool:
    return rt.parse_link(there).kind == tunnel.kind and kernel.is_as_told(there, tunnel.kind, tunnel.told)


def _differences(sock: Socket, tunnel: Wanted, there: netlink.Message) -> Iterator[str]:
    link = rt.parse_link(there)
    if not _same_kind(tunnel, there):
        yield "has other ends, or is of another kind"
        return
    if not link.up:
        yield "is down"
    if tunnel.mtu and link.mtu != tunnel.mtu:
        yield f"has an mtu of {link.mtu}, not {tunnel.mtu}"
    if link.ipv4_settings().get(rt.IPV4_DEVCONF_FORWARDING) != 1:
        yield "does not forward"
    own = {(address.ip.packed, address.network.prefixlen) for address in tunnel.addresses}
    there_now = {(r.address, r.prefix_length) for r in rt.addresses(sock) if r.link == link.ifindex}
    for packed, length in sorted(own ^ there_now):
        verb = "is missing" if (packed, length) in own else "should not be there"
        if (packed, length) in own or not ip_address(packed).is_link_local:  # the kernel's own, of an older one
            yield f"address {ip_address(packed)}/{length} {verb}"
    if tunnel.config is not None:
        yield from wireguard.differences(tunnel.config, wireguard.read(link.ifindex))
