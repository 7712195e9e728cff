"""The checks that types cannot make: what must lie in what, which numbers must fit, which texts must render."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from netslot.spec.document import AddressesSection
from netslot.spec.model import UPLINK_INTERFACE, Addresses, ClassSpec, HostSpec
from netslot.spec.policies import BpfSection
from netslot.spec.problems import Problems
from netslot.spec.render import nearest, variables_in

_T = TypeVar("_T")
_POOL = ipaddress.IPv4Network("10.201.0.0/16")  # stands in for a pool that is no network, until that is reported
_IFNAME_BYTES = 15
_MINIMUM_MTU6 = 1280  # RFC 8200, section 5
_TAKEN_PREFIXES = (
    "veth",
    "docker",
    "br-",
    "virbr",
    "cni",
    "cali",
    "lxc",
    "eth",
    "en",
    "wlan",
    "tun",
    "tap",
    "wg",
    "lo",
)
"""How other programs name interfaces: their wildcard rules would meet our links, and ours theirs."""


def addresses(problems: Problems, section: AddressesSection, *, needed: bool) -> Addresses:
    """The address plan; what is wrong in it is noted and replaced by something harmless.

    ``needed``: there are numbered slots, which need a pool.
    """

    def parsed(key: str, parse: Callable[[str], _T], instead: _T, expected: str) -> _T:
        try:
            return parse(getattr(section, key))
        except ValueError as error:
            problems.add(("addresses", key), f"expected {expected}: {error}")
            return instead

    pool = None
    if section.pool:
        pool = parsed("pool", ipaddress.IPv4Network, _POOL, "an IPv4 network such as 10.201.0.0/16")
    elif needed:
        problems.add(("addresses",), "'pool' is missing", hint="an IPv4 network such as 10.201.0.0/16")
        pool = _POOL
    guest = parsed("guest", ipaddress.IPv4Interface, ipaddress.IPv4Interface("172.16.0.2/30"), "ADDRESS/LENGTH")
    gateway = parsed("gateway", ipaddress.IPv4Address, guest.ip, "an IPv4 address")
    pool6 = None
    if section.pool6:
        pool6 = parsed("pool6", ipaddress.IPv6Network, None, "an IPv6 network such as fd5c:a7e:10::/48")
    guest6 = parsed("guest6", ipaddress.IPv6Interface, ipaddress.IPv6Interface("fd00:16::2/64"), "ADDRESS/LENGTH")
    gateway6 = parsed("gateway6", ipaddress.IPv6Address, guest6.ip, "an IPv6 address")
    plan = Addresses(pool, guest, gateway, pool6, guest6, gateway6, _resolvers(problems, section))
    for key, inside, outside in (("gateway", gateway, guest), ("gateway6", gateway6, guest6)):
        if inside not in outside.network:
            problems.add(("addresses", key), f"{inside} is not in the guest's network {outside.network}")
        elif inside == outside.ip and getattr(section, key) == str(inside):
            problems.add(("addresses", key), f"{inside} is the guest's own address")
    if pool is not None and guest.network.overlaps(pool):
        problems.add(("addresses", "guest"), f"{guest.network} overlaps with the pool {pool}")
    if pool6 is not None and guest6.network.overlaps(pool6):
        problems.add(("addresses", "guest6"), f"{guest6.network} overlaps with the pool {pool6}")
    return plan


def _resolvers(
    problems: Problems, section: AddressesSection
) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...]:
    found = []
    for text in section.dns:
        try:
            found.append(ipaddress.ip_address(text))
        except ValueError as error:
            problems.add(("addresses", "dns"), f"expected addresses: {error}")
    return tuple(found)


def seconds(text: str) -> float:
    """A time such as ``500ms``, ``2s``, ``1m``, ``2`` in seconds."""
    for unit, scale in (("ms", 0.001), ("s", 1.0), ("m", 60.0)):
        if text.endswith(unit):
            return float(text[: -len(unit)]) * scale
    return float(text)


def check_sizes(problems: Problems, spec: HostSpec) -> None:
    """Whether there are addresses and names for all slots, and IPv6 where a file asks for it."""
    numbered = sum(each.slots for each in spec.classes.values() if each.residents is None)
    if numbered and spec.slots > spec.addresses.capacity():
        held = spec.addresses.capacity()
        problems.add(
            ("addresses", "pool"),
            f"{spec.slots} slots need {spec.slots + 1} pairs of addresses, and there are pairs for {held} slots",
            hint=f"a /{max(1, 31 - (spec.slots + 1).bit_length())} is enough for IPv4",
        )
    longest = f"{spec.prefix}{max([spec.slots, *(number for number, _ in spec.by_tenant.values())])}"
    if len(longest) > _IFNAME_BYTES:
        problems.add(("prefix",), f"{longest} has more than {_IFNAME_BYTES} bytes", hint="shorten the prefix")
    if spec.prefix[-1].isdigit():
        problems.add(("prefix",), "must not end in a digit: slot numbers follow it")
    if any(other.startswith(spec.prefix) or spec.prefix.startswith(other) for other in _TAKEN_PREFIXES):
        hint = "choose one of your own"
        problems.add(("prefix",), f"other programs name interfaces {spec.prefix}... too", hint=hint)
    if spec.uplink.startswith(spec.prefix):
        problems.add(("prefix",), f"the uplink {spec.uplink} would pass for a slot's link", hint="another prefix")
    for each in spec.classes.values():
        _check_attachment(problems, spec, each)


def _check_attachment(problems: Problems, spec: HostSpec, each: ClassSpec) -> None:
    where = ("class", each.name, "attachment")
    attachment = each.attachment
    if each.guest_interface in (UPLINK_INTERFACE, "lo"):
        problems.add((*where, "interface"), f"{each.guest_interface} is taken in every slot")
    if (spec.addresses.pool6 is not None or each.is_ipv6) and attachment.mtu < _MINIMUM_MTU6:
        problems.add((*where, "mtu"), f"IPv6 needs an MTU of at least {_MINIMUM_MTU6}")
    if attachment.guest_mac == attachment.gateway_mac:
        problems.add((*where, "gateway_mac"), "the workload and its gateway have the same MAC")
    for key in ("guest_mac", "gateway_mac"):
        if int(getattr(attachment, key)[:2], 16) & 1:
            problems.add((*where, key), "is a multicast address", hint="make the first byte even, such as 06")


def resolve_objects(
    problems: Problems, bpf: BpfSection | None, base: Path, where: tuple[str, ...]
) -> BpfSection | None:
    """The section with the object files' names made whole; a file that is not there is noted."""
    if bpf is None:
        return None
    programs = []
    for number, program in enumerate(bpf.programs):
        path = base / program.object
        if not path.is_file():
            problems.add((*where, "bpf", "programs", str(number), "object"), f"no such file: {path}")
        programs.append(msgspec.structs.replace(program, object=str(path.absolute())))
    return msgspec.structs.replace(bpf, programs=tuple(programs))


def check_texts(problems: Problems, each: ClassSpec, values: Mapping[str, str]) -> None:
    """Whether every variable in the texts of the other policies' sections has a value."""
    sections = {"bpf": each.bpf, "cgroup": each.cgroup, "routes": each.routes, "rates": each.rates}
    for name, section in sections.items():
        for path, text in _texts(msgspec.to_builtins(section), (name,)):
            for variable in sorted(variables_in(text) - set(values)):
                close = nearest(variable, list(values))
                hint = f"did you mean ${{{close}}}?" if close else None
                problems.add(("class", each.name, *path), f"there is no variable ${{{variable}}}", hint=hint)


def _texts(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from _texts(member, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for number, member in enumerate(value):
            yield from _texts(member, (*path, str(number)))
