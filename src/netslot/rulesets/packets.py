"""Packets as far as the walk needs them, and whether a match holds for one: yes, no, or perhaps.

The peer outside is an address and a port that no rule names, so that a packet is tested against as many rules
as one of its kind can be. What a dump cannot say (the uplink's name, the members of a set, whether a limit is
used up) is *perhaps*, and the walk then takes the longer way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from netslot.rulesets import matches as m
from netslot.rulesets.interfaces import Kind, kind
from netslot.rulesets.values import MARK_BITS

NO, YES, PERHAPS = 0, 1, 2

TCP = 6
_SYN, _ACK = 0x02, 0x10


@dataclass(frozen=True, slots=True)
class Link:
    """An interface of a packet: its name if known. ``host`` says that it is the host's side, not a tenant's.

    A link of unknown name can be any name of its kind; ``absent`` means that the hook has no such interface;
    ``unsure``: it may or may not have.
    """

    name: str = ""
    known: bool = True
    host: bool = False
    unsure: bool = False

    @property
    def absent(self) -> bool:
        return self.known and not self.name


ABSENT = Link()
UPLINK = Link(known=False, host=True)
BRIDGE = Link(known=False)
PERHAPS_BRIDGED = Link(known=False, unsure=True)


@dataclass(slots=True)
class Packet:
    """A TCP packet. ``src`` and ``dst`` are None when not known; ``mark_known``: which bits of the mark are."""

    state: str
    src: int | None
    dst: int | None
    sport: int
    dport: int
    link_in: Link
    link_out: Link
    port_in: Link = ABSENT
    port_out: Link = ABSENT
    local_src: bool = False
    local_dst: bool = False
    mac: str | None = None
    mark: int = 0
    mark_known: int = MARK_BITS


def holds(match: m.Match, packet: Packet) -> int:
    """NO, YES or PERHAPS."""
    return _HOLDS[type(match)](match, packet)


def _answer(value: bool, negated: bool) -> int:
    return YES if value != negated else NO


def _address(x: m.Address, p: Packet) -> int:
    value = p.src if x.side == "src" else p.dst
    if value is None:
        return PERHAPS
    return _answer(value & x.mask == x.value, x.negated)


def _iprange(x: m.IpRange, p: Packet) -> int:
    value = p.src if x.side == "src" else p.dst
    return PERHAPS if value is None else _answer(x.low <= value <= x.high, x.negated)


_kinds: dict[str, Kind] = {}


def _name(link: Link, name: str, wildcard: bool, negated: bool) -> int:
    if link.known:
        return _answer(link.name.startswith(name) if wildcard else link.name == name, negated)
    what = _kinds.get(name)
    if what is None:
        what = _kinds[name] = kind(name)
    if link.host:
        impossible = what is Kind.GUEST or _ENGINES.get(name, False) or name == "lo"
    else:
        impossible = what in (Kind.GUEST, Kind.HOST) and not wildcard
    return _answer(False, negated) if impossible else PERHAPS


class _EngineBridges(dict[str, bool]):
    """Whether a bridge is one that a container engine or libvirt keeps for its own guests: never an uplink."""

    def __missing__(self, name: str) -> bool:
        heads = ("docker", "br-", "virbr", "podman", "cni", "lxdbr", "lxcbr", "cali", "tap", "veth", "vnet", "vif")
        found = self[name] = name.startswith(heads)
        return found


_ENGINES = _EngineBridges()


def _interface(x: m.Interface, p: Packet) -> int:
    return _name(p.link_in if x.direction == "in" else p.link_out, x.name, x.wildcard, x.negated)


def _physdev(x: m.Physdev, p: Packet) -> int:
    return _name(p.port_in if x.direction == "in" else p.port_out, x.name, x.wildcard, x.negated)


def _physdev_is(x: m.PhysdevIs, p: Packet) -> int:
    if p.port_in.unsure or p.port_out.unsure:
        return PERHAPS
    if x.what == "bridged":
        return _answer(not (p.port_in.absent and p.port_out.absent), x.negated)
    return _answer(not (p.port_in if x.what == "in" else p.port_out).absent, x.negated)


def _ports(x: m.Ports, p: Packet) -> int:
    if x.module not in ("tcp", "multiport"):
        return NO
    chosen = {"src": (p.sport,), "dst": (p.dport,), "either": (p.sport, p.dport)}[x.side]
    return _answer(any(low <= port <= high for port in chosen for low, high in x.ranges), x.negated)


def _tcp_flags(x: m.TcpFlags, p: Packet) -> int:
    flags = _SYN if p.state == "NEW" else _ACK
    return _answer(flags & x.mask == x.value, x.negated)


def _ct_state(x: m.CtState, p: Packet) -> int:
    if p.state in x.states:
        return _answer(True, x.negated)
    return PERHAPS if x.states & {"SNAT", "DNAT"} else _answer(False, x.negated)


def _ct_direction(x: m.CtDirection, p: Packet) -> int:
    return PERHAPS if p.state != "NEW" else _answer(x.direction == "ORIGINAL", False)


def _addrtype(x: m.AddrType, p: Packet) -> int:
    local = p.local_src if x.side == "src" else p.local_dst
    return _answer(("LOCAL" if local else "UNICAST") in x.types, x.negated)


def _mac(x: m.Mac, p: Packet) -> int:
    return PERHAPS if p.mac is None else _answer(p.mac == x.address, x.negated)


def _mark(x: m.Mark, p: Packet) -> int:
    known = p.mark_known & x.mask
    if (p.mark ^ x.value) & known or x.value & ~x.mask & MARK_BITS:
        return _answer(False, x.negated)
    return _answer(True, x.negated) if known == x.mask else PERHAPS


def _perhaps(_x: Any, _p: Packet) -> int:
    return PERHAPS


_HOLDS: dict[type, Callable[[Any, Packet], int]] = {
    m.Address: _address,
    m.IpRange: _iprange,
    m.Interface: _interface,
    m.Protocol: lambda x, p: _answer(x.number == TCP, x.negated),
    m.Fragment: lambda x, p: _answer(False, x.negated),
    m.Ports: _ports,
    m.IcmpType: lambda x, p: NO,
    m.TcpFlags: _tcp_flags,
    m.TcpOption: _perhaps,
    m.CtState: _ct_state,
    m.CtStatus: _perhaps,
    m.CtDirection: _ct_direction,
    m.CtAddress: _perhaps,
    m.CtPorts: _perhaps,
    m.CtProtocol: lambda x, p: _answer(x.number == TCP, x.negated),
    m.Mark: _mark,
    m.Connmark: _perhaps,
    m.AddrType: _addrtype,
    m.Mac: _mac,
    m.Physdev: _physdev,
    m.PhysdevIs: _physdev_is,
    m.DevGroup: _perhaps,
    m.SetMatch: _perhaps,
    m.RpFilter: lambda x, p: _answer(True, x.negated),
    m.Length: _perhaps,
    m.Ttl: _perhaps,
    m.Dscp: _perhaps,
    m.PktType: lambda x, p: _answer(x.type == "unicast", x.negated),
    # A forwarded packet has no local socket, and xt_owner is true for none of its conditions then.
    m.Owner: lambda x, p: _answer(False, x.negated),
    m.Opaque: _perhaps,
}
