"""What one slot is to be, worked out from the spec: everything that building and verifying it need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

from netslot.host.wiring import Wiring, wiring
from netslot.kernel import rtnetlink
from netslot.policy.base import Parameters
from netslot.spec.model import UPLINK_INTERFACE, Addresses, ClassSpec, HostSpec
from netslot.spec.roster import Resident

LOOPBACK, UPLINK, GUEST, INNER_UPLINK = 1, 102, 103, 102
"""Link indexes inside a slot: chosen by us, so that one message can configure what another one makes; beyond those of
the links that the kernel puts into every namespace once it has loaded ipip, gre or sit."""


@dataclass(frozen=True)
class SlotPlan:
    """One slot as the spec wants it. ``host_id`` is in the tag that every slot carries."""

    spec: HostSpec
    of: ClassSpec
    number: int
    host_id: str

    @cached_property
    def netns(self) -> str:
        return self.spec.name(self.number)

    @property
    def inner_netns(self) -> str | None:
        """The container's namespace, of a ``veth`` attachment."""
        return f"{self.netns}-in" if self.of.attachment.kind == "veth" else None

    @cached_property
    def resident(self) -> Resident | None:
        """Whose slot it is, where it is one of the roster's."""
        return self.of.residents.get(self.number) if self.of.residents is not None else None

    @property
    def digest(self) -> str:
        """Of everything that the slot is made of; see :meth:`HostSpec.digest`."""
        return self.of.digest if self.resident is None else f"{self.of.digest}-{self.resident.digest}"

    @property
    def root_if(self) -> str:
        return self.netns if self.resident is None else self.resident.link or self.netns

    @property
    def uplink_if(self) -> str:
        return UPLINK_INTERFACE

    @property
    def guest_if(self) -> str | None:
        return self.of.guest_interface

    @property
    def tag(self) -> str:
        """What the slot's loopback link carries as its alias, so that the slot is known without the ledger."""
        return f"netslot {self.host_id} {self.number} {self.of.name} {self.digest}"

    @cached_property
    def values(self) -> dict[str, str]:
        """Every variable of the slot, scalar parameters at their defaults."""
        return self.spec.values(self.number, self.of.name)

    @property
    def defaults(self) -> Parameters:
        """List parameters at their defaults."""
        return {
            name: parameter.default
            for name, parameter in self.of.parameters.items()
            if isinstance(parameter.default, tuple)
        }

    @property
    def addresses(self) -> Addresses:
        return self.spec.addresses

    @cached_property
    def pair(self) -> tuple[IPv4Interface, IPv4Interface]:
        """Root's address and the slot's, of a numbered slot."""
        return self.addresses.pair(self.number)

    @property
    def ipv6(self) -> bool:
        return self.addresses.pool6 is not None if self.resident is None else self.of.is_ipv6

    @cached_property
    def wiring(self) -> Wiring:
        """Addresses and routes of the slot's links."""
        return wiring(self.spec, self.of, self.number, self.resident)


def any_network(address: IPv4Address | IPv6Address) -> rtnetlink.Network:
    """The default route's destination in the family of ``address``."""
    return _ANY4 if address.version == 4 else _ANY6


_ANY4 = IPv4Interface("0.0.0.0/0").network
_ANY6 = IPv6Interface("::/0").network


def own_values(digest: str) -> str:
    """The part of a slot's digest that is its resident's; '' of a numbered slot."""
    return digest.partition("-")[2]


def parse_tag(alias: str) -> tuple[str, int, str, str] | None:
    """(host id, number, class, digest) of a slot's tag, or None when the alias is no tag of ours."""
    words = alias.split(" ")
    if len(words) != 5 or words[0] != "netslot" or not words[2].isdecimal():
        return None
    return words[1], int(words[2]), words[3], words[4]
