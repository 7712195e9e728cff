"""What ``netslot up`` takes of a split: a spec, and the list of tenants as its roster.

Root's rules stay the operator's to load (``preset = false``): beside them netslot adds none, so what was proved is
what is in force.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from netslot.rulesets.model import Dump, Family
from netslot.rulesets.proof.arrangement import HOST, MANIFEST, ROOT
from netslot.rulesets.proof.places import Places
from netslot.rulesets.proof.spec_says import SPEC
from netslot.rulesets.published import PUBLISH
from netslot.rulesets.splitting.plan import Plan
from netslot.rulesets.tenants import Tenant
from netslot.rulesets.values import ALL_ONES, address_text, network_text, prefix_length

_PREFIXES = ("slot", "moved", "guest", "place")
_FAMILIES: Mapping[Family, str] = {4: "ipv4", 6: "ipv6"}
_PUBLISHED: Mapping[Family, str] = {4: "nft", 6: "nft6"}


def add_spec(files: Mapping[str, str], dump: Dump, places: Places, plan: Plan) -> dict[str, str]:
    """The files that change: the manifest with what slots need to know of each tenant, and the spec.

    Where slots cannot be built, the reason is a note, and there is no spec.
    """
    manifest: dict[str, Any] = json.loads(files[MANIFEST])
    entries: list[dict[str, Any]] = manifest["tenants"]
    for index, entry in enumerate(entries):
        entry.update(_values(places, index))
    obstacle = _obstacle(files, manifest, places)
    changed = {}
    if obstacle:
        plan.notes[f"no {SPEC} was written: {obstacle}"] = None
    else:
        _by_shape(manifest)
        changed[SPEC] = _spec(files, manifest, dump, places, plan)
    return {MANIFEST: json.dumps(manifest, indent=1) + "\n", **changed}


def _values(places: Places, index: int) -> dict[str, Any]:
    """The tenant's own addresses, and root's on its link. Addresses are those of the rules, in the same order."""
    tenant: Tenant = places.tenants[index]
    gateways = [
        address_text(value, family) for family, found in sorted(places.gateways.items()) for value in found[index]
    ]
    addresses = [
        network_text(each.value, each.mask, each.family) for each in sorted(tenant.addresses, key=lambda a: a.family)
    ]
    values: dict[str, Any] = {"addresses": addresses, "gateways": gateways}
    if len(tenant.macs) == 1:
        values["mac"] = tenant.macs[0]
    return values


def _obstacle(files: Mapping[str, str], manifest: Mapping[str, Any], places: Places) -> str:
    """Why no slots can be built for these tenants; '' when they can."""
    entries = [entry for entry in manifest["tenants"] if entry["class"] is not None]
    if not entries:
        return "no tenant's rules are in a slot"
    asked = [
        family for family, name in HOST.items() if any(name in files.get(file, "") for file in _templates(manifest))
    ]
    if asked:
        return f"slots must know the host's IPv{asked[0]} addresses: say them with --host-address"
    links = [entry["link"] for entry in entries]
    shared = next((link for link in links if links.count(link) > 1), None) if len(set(links)) < len(links) else None
    if shared is not None:
        return f"several tenants are behind {shared}; they keep the namespaces that they have (netslot migrate)"
    for tenant in places.tenants:
        for address in tenant.addresses:
            if prefix_length(address.mask, address.family) is None:
                return f"{tenant.name}: {address} is no network that can be routed"
            if manifest["attachment"] == "process" and address.mask != ALL_ONES[address.family]:
                return f"{tenant.name} has a network, {address}, and a process has single addresses"
    return ""


def _templates(manifest: Mapping[str, Any]) -> list[str]:
    return [name for rules in manifest["classes"].values() for name in rules.values() if name]


def _by_shape(manifest: dict[str, Any]) -> None:
    """Slots of one class have as many addresses each: others go to a class of their own, with the same rules."""
    shapes: dict[str, dict[tuple[object, ...], str]] = {}
    for entry in manifest["tenants"]:
        name = entry["class"]
        if name is None:
            continue
        shape = (
            tuple(":" in text for text in entry["addresses"]),
            tuple(text.rpartition("/")[2] for text in entry["addresses"]),
            tuple(":" in text for text in entry["gateways"]),
            "mac" in entry,
        )
        known = shapes.setdefault(name, {})
        kind = known.setdefault(shape, name if not known else f"{name}-{len(known) + 1}")
        manifest["classes"].setdefault(kind, manifest["classes"][name])
        entry["class"] = kind


def _spec(files: Mapping[str, str], manifest: Mapping[str, Any], dump: Dump, places: Places, plan: Plan) -> str:
    backend = "iptables-nft" if any(each.tool == "nft" for each in dump.rulesets) else "iptables-legacy"
    uplink, *others = places.outside
    if others:
        plan.notes[f"{SPEC} names one uplink, {uplink}: see that {', '.join(others)} forward too"] = None
    lines = [
        f"# Written by netslot split: slots for the tenants of {MANIFEST}.",
        f'uplink = "{uplink}"',
        f'prefix = "{_prefix(manifest["tenants"])}"',
        f'roster = "{MANIFEST}"',
        "",
        "[attachment]",
        f'kind = "{manifest["attachment"]}"',
        "",
        "# Root's rules are these files and no others. You load them, or netslot migrate does; netslot up compares.",
        "[root]",
        "preset = false",
        f'backend = "{backend}"',
        *(f'{_FAMILIES[family]} = "{name}"' for family, name in ROOT.items() if name in files),
        *(f'{key} = "{PUBLISH[family]}"' for family, key in _PUBLISHED.items() if PUBLISH[family] in files),
    ]
    for name, rules in manifest["classes"].items():
        lines += ["", f"[class.{name}.rules]", f'backend = "{backend}"']
        lines += [f'{key} = "{rules[key]}"' for key in _FAMILIES.values() if rules[key]]
    return "\n".join(lines) + "\n"


def _prefix(entries: Sequence[Mapping[str, Any]]) -> str:
    """What slots' namespaces begin with: nothing that a tenant's link begins with."""
    links = [str(entry["link"]) for entry in entries]
    return next(word for word in (*_PREFIXES, "nslt") if not any(link.startswith(word) for link in links))
