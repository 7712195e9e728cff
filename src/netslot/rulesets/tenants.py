"""Tenants: what they are called and what identifies them, as found in a dump or said by a person.

A tenants file is JSON or TOML. JSON: a list of objects; TOML: ``[[tenant]]`` tables. Keys: ``name`` (required),
``interfaces``, ``addresses`` (``A`` or ``A/len``, IPv4 and IPv6), ``macs``, ``netns`` (the name of the network
namespace that the tenant already lives in, for ``migrate``). At least one interface, address or mac. Tenants with
addresses may share an interface: the bridge that they are behind.

    [[tenant]]
    name = "alice"
    interfaces = ["tap17"]
    addresses = ["10.64.0.70/32", "2001:db8:17::/64"]
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from netslot.errors import SpecError
from netslot.rulesets import values
from netslot.rulesets.model import Family


@dataclass(frozen=True, slots=True)
class TenantAddress:
    """A host or a small network. ``value & mask == value``."""

    family: Family
    value: int
    mask: int

    def __str__(self) -> str:
        return values.network_text(self.value, self.mask, self.family)


@dataclass(frozen=True, slots=True)
class Tenant:
    """``why`` says what in the dump speaks for it being a tenant ("" when a person said so)."""

    name: str
    interfaces: tuple[str, ...] = ()
    addresses: tuple[TenantAddress, ...] = ()
    macs: tuple[str, ...] = ()
    netns: str = ""
    why: str = ""


_KEYS = {"name", "interfaces", "addresses", "macs", "netns"}


def parse_tenants(text: str, *, file: str | None = None) -> tuple[Tenant, ...]:
    """The tenants of one file. Raises SpecError with the key that is wrong."""
    entries = _entries(text, file)
    tenants = [_tenant(entry, f"tenant {number}", file) for number, entry in enumerate(entries, 1)]
    if not tenants:
        raise SpecError("there is no tenant in it", file=file, hint="expected a JSON list or [[tenant]] tables")
    owners: dict[str, int] = {}
    for number, tenant in enumerate(tenants, 1):
        shared = () if tenant.addresses else tenant.interfaces  # tenants of one bridge are told apart by address
        for identifier in {tenant.name, *shared, *tenant.macs, *map(str, tenant.addresses)}:
            first = owners.setdefault(identifier, number)
            if first != number:
                raise SpecError(
                    f"'{identifier}' identifies tenant {first} already; expected it once",
                    file=file,
                    key=f"tenant {number}",
                )
    return tuple(tenants)


def _entries(text: str, file: str | None) -> list[Mapping[str, Any]]:
    try:
        if text.lstrip().startswith(("[[tenant", "#")) or not text.lstrip().startswith(("[", "{")):
            found: Any = tomllib.loads(text).get("tenant", [])
        else:
            found = json.loads(text)
            if isinstance(found, dict):
                found = found.get("tenants", found.get("tenant"))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise SpecError(f"neither JSON nor TOML: {error}", file=file) from None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise SpecError("expected a JSON list of objects, or TOML [[tenant]] tables", file=file)
    return found


def _tenant(entry: Mapping[str, Any], where: str, file: str | None) -> Tenant:
    unknown = set(entry) - _KEYS
    if unknown:
        raise SpecError(
            f"unknown key '{sorted(unknown)[0]}'; expected {', '.join(sorted(_KEYS))}", file=file, key=where
        )
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise SpecError("'name' must be a text that is not empty", file=file, key=where)
    lists = {key: _texts(entry, key, where, file) for key in ("interfaces", "addresses", "macs")}
    try:
        addresses = tuple(tenant_address(text) for text in lists["addresses"])
    except ValueError as error:
        raise SpecError(str(error), file=file, key=f"{where}.addresses") from None
    if not any(lists.values()):
        raise SpecError("it has no interface, address or mac to be recognised by", file=file, key=where)
    netns = entry.get("netns", "")
    if not isinstance(netns, str):
        raise SpecError("'netns' must be a text", file=file, key=where)
    macs = tuple(mac.lower() for mac in lists["macs"])
    return Tenant(name, tuple(lists["interfaces"]), addresses, macs, netns)


def _texts(entry: Mapping[str, Any], key: str, where: str, file: str | None) -> list[str]:
    found = entry.get(key, [])
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise SpecError("expected a list of texts", file=file, key=f"{where}.{key}")
    return found


def tenant_address(text: str) -> TenantAddress:
    """``A`` or ``A/len`` of either family. Raises ValueError."""
    family: Family = 6 if ":" in text else 4
    value, mask = values.network(text, family)
    return TenantAddress(family, value, mask)


def with_links(tenants: Sequence[Tenant], links: Mapping[str, Sequence[TenantAddress]]) -> tuple[Tenant, ...]:
    """The tenants, and the guests' links of a live host with the addresses behind them.

    A link that a tenant has already adds its addresses to it; one behind which a tenant's address is becomes
    that tenant's; any other is a tenant that no rule has named.
    """
    found = list(tenants)
    by_interface = {name: place for place, tenant in enumerate(found) for name in tenant.interfaces}
    by_address = {address: place for place, tenant in enumerate(found) for address in tenant.addresses}
    for name, addresses in links.items():
        place = by_interface.get(name, next((by_address[a] for a in addresses if a in by_address), -1))
        if place < 0:
            found.append(Tenant(name, (name,), tuple(addresses), why="a guest's link of this host"))
            continue
        known = found[place]
        found[place] = replace(
            known,
            interfaces=tuple(dict.fromkeys((*known.interfaces, name))),
            addresses=tuple(dict.fromkeys((*known.addresses, *addresses))),
        )
    return tuple(found)
