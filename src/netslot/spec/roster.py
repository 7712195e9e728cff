"""The roster: tenants that have a slot of their own, and keep the addresses, gateways and link that they have.

A file of JSON or TOML with a list ``tenants``, one entry for each slot; see :class:`ResidentSection`.
"""

from __future__ import annotations

import hashlib
import itertools
import tomllib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from netslot.errors import SpecError
from netslot.spec.document import InterfaceName, Mac

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

_WORDS = ("address", "gateway")


class ResidentSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"class_name": "class"}):
    """``[[tenants]]`` of a roster: One tenant and its slot."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    """What the tenant is called; only an owner of this name gets the slot."""
    addresses: Annotated[tuple[str, ...], Meta(min_length=1)]
    """The tenant's own addresses, or networks (``A/len``), of either family; root routes them to the slot."""
    class_name: str | None = "default"
    """The class whose rules the slot has. null: the tenant has no slot, and its rules are in root."""
    link: InterfaceName | None = None
    """Root's end of the slot's link. Default: the slot's name, ``<prefix><number>``."""
    group: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)] = 0
    """Interface group of that link. 0: the group of all slots' links."""
    gateways: tuple[str, ...] = ()
    """Addresses of root that the tenant knows as its gateways; they are on root's end of the link."""
    mac: Mac | None = None
    """The workload's MAC behind a tap. Without it, the workload is asked (ARP, neighbour discovery)."""
    netns: str = ""
    """Where the tenant lives now; for ``netslot migrate`` only."""
    variables: dict[str, str] = {}
    """Further variables of the slot's rules, or another form of ``address``, ``gateway`` and the like."""


class RosterFile(msgspec.Struct, frozen=True):
    """What ``roster`` names. Other keys than ``tenants`` are somebody else's (``netslot split`` writes some)."""

    tenants: tuple[ResidentSection, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A tenant with a slot of its own. ``variables`` are all that the entry gives, the usual names included."""

    name: str
    class_name: str
    link: str | None
    group: int
    addresses: tuple[Network, ...]
    gateways: tuple[Address, ...]
    mac: str | None
    variables: Mapping[str, str]
    digest: str
    """Changes when anything does that the slot is made of, beside its class."""

    @property
    def shape(self) -> tuple[object, ...]:
        """What slots of one class must have in common, so that one can be told from another by its values alone."""
        networks = tuple((each.version, each.prefixlen) for each in self.addresses)
        gateways = tuple((each.version, each.is_link_local) for each in self.gateways)
        return networks, gateways, self.mac is None

    @property
    def has_networks(self) -> bool:
        return any(each.prefixlen < each.max_prefixlen for each in self.addresses)

    def first_addresses(self) -> dict[int, str]:
        """The first address or network of each IP version."""
        return {each.version: plain(each) for each in reversed(self.addresses)}

    def first_gateways(self) -> dict[int, str]:
        """The first gateway of each IP version."""
        return {each.version: str(each) for each in reversed(self.gateways)}


def decode(text: str, file: str) -> tuple[ResidentSection, ...]:
    """The entries of a roster file. SpecError says what is wrong with the first that is."""
    try:
        if file.endswith(".toml"):
            return msgspec.convert(tomllib.loads(text), RosterFile).tenants
        return msgspec.json.decode(text.encode(), type=RosterFile).tenants
    except (msgspec.DecodeError, tomllib.TOMLDecodeError) as error:
        message, _, place = str(error).replace("`", "'").partition(" - at '$.")
        where = place.rstrip("'") or None
        raise SpecError(message, file=file, key=where, hint="docs/reference/keys.md lists a roster's keys") from error


def resident(section: ResidentSection) -> Resident:
    """One entry with its addresses understood. SpecError when they are none."""
    try:
        addresses = tuple(ip_network(text) for text in section.addresses)
        gateways = tuple(ip_address(text.removesuffix("/32").removesuffix("/128")) for text in section.gateways)
    except ValueError as error:
        raise SpecError(str(error), key=section.name, hint="write A, or A/len without host bits") from error
    addresses = tuple(sorted(addresses, key=lambda each: each.version))  # a stable sort: each family in its order
    gateways = tuple(sorted(gateways, key=lambda each: each.version))
    variables = {"tenant": section.name, **_names(addresses, gateways)}
    for name, text in section.variables.items():
        known = variables.get(name)
        if known is not None and not _same(known, text):
            message = f"variable {name} is {text}, but the entry's own {name} is {known}"
            raise SpecError(message, key=section.name, hint="leave it out, or say the same")
    variables |= section.variables
    return Resident(
        section.name,
        section.class_name or "",
        section.link,
        section.group,
        addresses,
        gateways,
        section.mac,
        variables,
        hashlib.sha256(msgspec.json.encode(section)).hexdigest()[:16],
    )


def _names(addresses: Sequence[Network], gateways: Sequence[Address]) -> dict[str, str]:
    """``address``, ``address_2``, ..., ``gateway``; of IPv6 ``address6``, ``address6_2``."""
    found: dict[str, str] = {}
    for word, items in zip(_WORDS, (addresses, gateways), strict=True):
        count = {4: 0, 6: 0}
        for item in items:
            count[item.version] += 1
            suffix = "" if item.version == 4 else "6"
            order = f"_{count[item.version]}" if count[item.version] > 1 else ""
            found[f"{word}{suffix}{order}"] = plain(item)
    return found


def plain(item: Network | Address) -> str:
    """``A`` of one address, ``A/len`` of a network."""
    if isinstance(item, IPv4Network | IPv6Network) and item.prefixlen == item.max_prefixlen:
        return str(item.network_address)
    return str(item)


def _same(known: str, text: str) -> bool:
    if text in (known, f"{known}/32", f"{known}/128"):
        return True
    try:
        return ip_network(known) == ip_network(text)
    except ValueError:
        return False


def conflicts(residents: Iterable[Resident]) -> list[tuple[str, str]]:
    """(tenant, what is wrong) where two of them claim the same name, link or address."""
    found: list[tuple[str, str]] = []
    owners: dict[object, str] = {}
    networks: list[tuple[int, int, int, str]] = []
    gateways: dict[Address, str] = {}
    for each in residents:
        for what, value in (("name", each.name), ("link", each.link)):
            if value is not None and (first := owners.setdefault((what, value), each.name)) is not each.name:
                found.append((each.name, f"{what} {value} is {first}'s already"))
        for network in each.addresses:
            low, high = int(network.network_address), int(network.broadcast_address)
            networks.append((network.version, low, high, each.name))
        gateways |= dict.fromkeys(each.gateways, each.name)
    networks.sort()
    for before, after in itertools.pairwise(networks):
        if before[0] == after[0] and after[1] <= before[2]:
            found.append((after[3], f"an address overlaps with one of {before[3]}'s"))
    starts = [(each[0], each[1]) for each in networks]
    for gateway, name in gateways.items():
        at = bisect_right(starts, (gateway.version, int(gateway))) - 1
        if at >= 0 and networks[at][0] == gateway.version and int(gateway) <= networks[at][2]:
            found.append((name, f"gateway {gateway} is an address of {networks[at][3]}'s"))
    return found


def numbered(names: Sequence[str], known: Mapping[str, int], taken: Iterable[int] = ()) -> dict[str, int]:
    """A number for each name: the one that it has, or else the lowest that nobody has."""
    kept = {name: known[name] for name in names if name in known}
    used = {*kept.values(), *taken}
    free = (number for number in range(1, len(used) + len(names) + 1) if number not in used)
    return {name: kept[name] if name in kept else next(free) for name in names}
