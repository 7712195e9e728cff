"""The links, addresses and routes of a replay, as lines for ``ip -batch``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from netslot.host import replay_wire as wire
from netslot.rulesets.model import Family
from netslot.rulesets.proof.arrangement import Arrangement
from netslot.rulesets.proof.places import Places
from netslot.rulesets.values import address_text

_UPLINK: Mapping[Family, int] = {4: 0xC612FF01, 6: 0x20010002000000FF << 64 | 1}
"""198.18.255.1 and 2001:2:0:ff::1: root's address on its first link outside, where it has no other."""
_NEXT_HOP: Mapping[Family, str] = {4: "198.18.255.2", 6: "fe80::99"}
_BEHIND: Mapping[Family, str] = {4: "169.254.88.1", 6: "fe80::88"}
"""The next hop on a tenant's link, as root sees it."""
_AHEAD: Mapping[Family, str] = {4: "169.254.77.1", 6: "fe80::77"}
"""The next hop of a slot: root."""
_SLOT: Mapping[Family, str] = {4: "169.254.77.2/32", 6: "fd00:77::2/128"}


@dataclass(frozen=True)
class SetContents:
    """A set as both arrangements hold it: the networks (value, prefix length) that are its members."""

    family: Family
    members: tuple[tuple[int, int], ...]

    def holds(self, address: int) -> bool:
        width = 32 if self.family == 4 else 128
        return any(address >> (width - length) == value >> (width - length) for value, length in self.members)


@dataclass(frozen=True)
class Scene:
    """What both arrangements have in common. ``players``: the tenants that are built."""

    places: Places
    players: tuple[int, ...]
    families: tuple[Family, ...]
    sets: Mapping[str, SetContents]

    def own_address(self, family: Family) -> int:
        """Root's address on its first link to the outside, by which masquerading names it."""
        return next(iter(self.places.hosts[family]), _UPLINK[family])

    def mac_behind(self, link: str, src: int, family: Family) -> str:
        """From which MAC address a packet comes in by this link."""
        places = self.places
        owner = places.owner_of(src, (1 << (32 if family == 4 else 128)) - 1, family)
        for tenant in (owner, places.link_owner.get(link, -1)):
            if tenant >= 0 and link in places.tenants[tenant].interfaces and places.tenants[tenant].macs:
                return places.tenants[tenant].macs[0]
        return _mac(4, link)


def slot_mac(link: str) -> str:
    """The MAC address of a slot's end of its link to root."""
    return _mac(2, link)


def guest_mac(link: str) -> str:
    """The MAC address of a slot's end of its link to the workload."""
    return _mac(3, link)


def root_mac(link: str) -> str:
    """The MAC address of root's end of a link."""
    return _mac(1, link)


def _mac(kind: int, link: str) -> str:
    number = wire.checksum(link.encode())
    return f"02:00:{kind:02x}:{len(link):02x}:{number >> 8:02x}:{number & 255:02x}"


class Plan:
    """Who is linked to whom. ``slots``: the namespaces of slots by tenant; none before the split."""

    def __init__(self, scene: Scene, arrangement: Arrangement | None, slots: Mapping[int, str], world: str) -> None:
        self._scene, self._arrangement, self._slots, self._world = scene, arrangement, slots, world
        self.of_processes = arrangement is not None and arrangement.attachment == "process"
        self.wires = {link: f"w{number}" for number, link in enumerate(self.links())}

    def links(self) -> list[str]:
        """Root's links: those of the tenants that play and have one of their own, and those to the outside."""
        places = self._scene.places
        return [*filter(None, (places.link(tenant) for tenant in self._scene.players)), *places.outside]

    def root(self) -> list[str]:
        """For root's namespace; makes the outer ends of its links too."""
        places = self._scene.places
        lines = ["link set lo up"]
        for name in places.outside:
            lines += [_pair(name, _mac(1, name), self.wires[name], _mac(4, name), self._world)]
            lines.append(f"link set {name} up")
        lines += self._outside(places.outside[0])
        for link in self.links():
            if link not in places.outside:
                lines += self._tenant_link(link, self.wires[link])
        return lines

    def world(self) -> list[str]:
        """For the namespace of all outer ends; comes last."""
        places = self._scene.places
        inner = {places.link(tenant) for tenant in self._slots} if self.of_processes else set()
        return ["link set lo up", *(f"link set {end} up" for link, end in self.wires.items() if link not in inner)]

    def _outside(self, first: str) -> list[str]:
        """All of the host's addresses on each link to the outside, which is where the model has them."""
        lines = []
        for family in self._scene.families:
            extra = "" if family == 4 else " nodad"
            own = dict.fromkeys((self._scene.own_address(family), *self._scene.places.hosts[family]))
            for name in self._scene.places.outside:
                lines += [f"addr add {_host(value, family)} dev {name}{extra}" for value in own]
            lines.append(f"neigh add {_NEXT_HOP[family]} lladdr {_mac(4, first)} dev {first}")
            lines.append(f"route add default via {_NEXT_HOP[family]} dev {first}{_onlink(family)}")
        return lines

    def _tenant_link(self, link: str, outer: str) -> list[str]:
        places, scene = self._scene.places, self._scene
        tenant = places.link_owner[link]
        slot = self._slots.get(tenant)
        if slot is None or self._arrangement is None:
            far, peer, where = _mac(4, link), outer, self._world
        else:
            far, peer, where = _mac(2, link), self._arrangement.uplink_if, slot
        lines = [_pair(link, _mac(1, link), peer, far, where), f"link set {link} up"]
        if self._arrangement is not None:
            lines.append(f"link set {link} group {self._arrangement.members[tenant].group}")
        for family in scene.families:
            extra = "" if family == 4 else " nodad"
            own = places.addresses(tenant, family)
            lines += [
                f"addr add {_host(value, family)} dev {link}{extra}" for value in places.gateways[family][tenant]
            ]
            if own:
                lines.append(f"neigh add {_BEHIND[family]} lladdr {far} dev {link}")
            lines += [f"route add {net} via {_BEHIND[family]} dev {link}{_onlink(family)}" for net in own]
        return lines

    def slot(self, tenant: int) -> list[str]:
        """For one slot's namespace; after root's."""
        assert self._arrangement is not None
        places, up, guest = self._scene.places, self._arrangement.uplink_if, self._arrangement.guest_if
        link = places.link(tenant)
        outer = self.wires[link]
        lines = ["link set lo up", f"link set {up} up"]
        if not self.of_processes:
            lines += [_pair(guest, _mac(3, link), outer, _mac(4, link), self._world), f"link set {guest} up"]
        for family in self._scene.families:
            own = places.addresses(tenant, family)
            lines.append(f"addr add {_SLOT[family]} dev {up}{'' if family == 4 else ' nodad'}")
            lines.append(f"neigh add {_AHEAD[family]} lladdr {_mac(1, link)} dev {up}")
            lines.append(f"route add default via {_AHEAD[family]} dev {up}{_onlink(family)}")
            if self.of_processes:
                lines += [f"route add local {net} dev lo" for net in own]
            elif own:
                lines.append(f"neigh add {_BEHIND[family]} lladdr {_mac(4, link)} dev {guest}")
                lines += [f"route add {net} via {_BEHIND[family]} dev {guest}{_onlink(family)}" for net in own]
        return lines


def _pair(name: str, mac: str, peer: str, peer_mac: str, where: str) -> str:
    return f"link add {name} address {mac} type veth peer name {peer} address {peer_mac} netns {where}"


def _host(value: int, family: Family) -> str:
    return f"{address_text(value, family)}/{32 if family == 4 else 128}"


def _onlink(family: Family) -> str:
    return " onlink" if family == 4 else ""
