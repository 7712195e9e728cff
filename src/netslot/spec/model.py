"""A checked spec: frozen values that the rest of netslot works with, and each slot's own values derived from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path

from netslot.errors import SpecError, UsageError
from netslot.spec.document import AttachmentSection, Backend
from netslot.spec.lines import line_of, told_at
from netslot.spec.parameters import Bound, Parameter
from netslot.spec.policies import BpfSection, CgroupSection, NatSection, RatesSection, RoutesSection
from netslot.spec.roster import Resident

DEFAULT_CLASS = "default"
"""The name of the one class of a spec that has no ``[class.*]``."""

UPLINK_INTERFACE = "up0"
"""The slot's end of its link to root, the same name in every slot."""

_IFNAME_BYTES = 15


@dataclass(frozen=True, slots=True)
class RuleFile:
    """A rule file as it was when the spec was loaded; ``name`` is for errors."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Rules:
    """Rule files and what loads them. ``nft`` only with backend nftables, the others only with iptables."""

    backend: Backend
    ipv4: RuleFile | None = None
    ipv6: RuleFile | None = None
    nft: RuleFile | None = None

    @property
    def files(self) -> tuple[RuleFile, ...]:
        return tuple(file for file in (self.ipv4, self.ipv6, self.nft) if file is not None)


@dataclass(frozen=True, slots=True)
class Addresses:
    """The address plan. Slot k has addresses 2k (root's end) and 2k + 1 (the slot's) of ``pool``."""

    pool: IPv4Network | None
    guest: IPv4Interface
    gateway: IPv4Address
    pool6: IPv6Network | None
    guest6: IPv6Interface
    gateway6: IPv6Address
    dns: tuple[IPv4Address | IPv6Address, ...]

    def capacity(self) -> int:
        """The highest slot number that has addresses."""
        if self.pool is None:
            return 0
        pairs = self.pool.num_addresses // 2 - 1
        return min(pairs, self.pool6.num_addresses // 2 - 1) if self.pool6 is not None else pairs

    def pair(self, slot: int) -> tuple[IPv4Interface, IPv4Interface]:
        """Root's end and the slot's end of the link, each with its /31."""
        first = self.first(slot)
        return IPv4Interface((first, 31)), IPv4Interface((first + 1, 31))

    def first(self, slot: int) -> int:
        """Root's IPv4 address on the link to the slot, as a number; the slot's is the next."""
        if self.pool is None:
            raise UsageError("the spec has no addresses.pool, so slots have no numbered addresses")
        return int(self.pool.network_address) + 2 * slot

    def pair6(self, slot: int) -> tuple[IPv6Interface, IPv6Interface]:
        """As :meth:`pair`, each with its /127. The first pair of the slot's own prefix if that is a /64."""
        first = int(self.network6(slot).network_address)
        return IPv6Interface((first, 127)), IPv6Interface((first + 1, 127))

    def network6(self, slot: int) -> IPv6Network:
        """The prefix that root routes to the slot: a /64 if the pool has more of them than IPv4 has pairs."""
        if self.pool6 is None:
            raise UsageError("the spec has no addresses.pool6, so slots have no IPv6")
        bits = 64 if self._has_wide_slots(self.pool6) else 1
        return IPv6Network((int(self.pool6.network_address) + (slot << bits), 128 - bits))

    def _has_wide_slots(self, pool6: IPv6Network) -> bool:
        pairs = self.pool.num_addresses // 2 if self.pool is not None else 0
        return pool6.prefixlen <= 64 and pool6.num_addresses >> 64 >= pairs


@dataclass(frozen=True, slots=True)
class Root:
    """The root namespace: ``rules`` are the operator's additions, loaded by the same backend as netslot's own.

    Without ``preset`` they are the whole of root's, loaded by the operator.
    """

    rules: Rules
    masquerade: bool
    masquerade6: bool
    preset: bool
    published: tuple[RuleFile, ...]
    """nft files beside iptables' rules; only without ``preset``."""

    @property
    def backend(self) -> Backend:
        return self.rules.backend


@dataclass(frozen=True, slots=True, eq=False)
class ClassSpec:
    """What the slots of one class share: a template, and how many of them there are to be."""

    name: str
    slots: int
    attachment: AttachmentSection
    rules: Rules | None
    parameters: Mapping[str, Parameter]
    nat: NatSection
    bpf: BpfSection | None
    cgroup: CgroupSection | None
    routes: RoutesSection | None
    rates: RatesSection | None
    digest: str
    """Changes when anything does that a slot of this class is made of, rule files' and objects' contents included."""
    residents: Mapping[int, Resident] | None = None
    """By slot number, the tenants whose slots these are; None where slots are numbered and anybody's."""

    @property
    def is_ipv6(self) -> bool:
        """Whether its residents have IPv6 addresses."""
        first = next(iter((self.residents or {}).values()), None)
        return first is not None and any(address.version == 6 for address in first.addresses)

    @property
    def guest_interface(self) -> str | None:
        """The link to the workload, in the slot; a process has none."""
        if self.attachment.kind == "process":
            return None
        return self.attachment.interface or ("tap0" if self.attachment.kind == "tap" else "inner0")

    @property
    def lists(self) -> dict[str, str]:
        """List parameters by name, with their kinds: ``cidrs`` or ``ports``."""
        return {name: parameter.kind for name, parameter in self.parameters.items() if parameter.is_list}

    def bind(self, given: Mapping[str, object]) -> dict[str, Bound]:
        """Every parameter's value for a lease that gives ``given``, the others at their defaults.

        UsageError for a name that is not declared or a value that is wrong.
        """
        for name in given:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise UsageError(f"class {self.name} has no parameter {name!r}", hint=f"its parameters: {known}")
        return {
            name: parameter.check(given[name]) if name in given else parameter.default
            for name, parameter in self.parameters.items()
        }


@dataclass(frozen=True, eq=False)
class HostSpec:
    """One host: everything that ``netslot.toml`` and the files it names say. Compared by identity."""

    file: Path
    prefix: str
    uplink: str
    addresses: Addresses
    root: Root
    hold_down: float
    """Seconds a released slot rests before it is handed out again."""
    classes: Mapping[str, ClassSpec]
    """At least one, in the file's order."""
    roster: RuleFile | None = None
    """The file that says who the residents are."""
    lines: Mapping[tuple[str, ...], int] = dataclasses.field(default_factory=dict)
    """Where the file's keys are; see :mod:`netslot.spec.lines`."""

    def placed(self, error: SpecError, class_name: str) -> SpecError:
        """``error`` with file and line, where only the key of a class's section is known to it."""
        if error.file is not None or error.key is None:
            return error
        path = told_at(("class", class_name, *error.key.split(".")), self.lines)
        found = SpecError(error.message, file=str(self.file), line=line_of(path, self.lines), hint=error.hint)
        found.key = error.key
        return found

    @property
    def slots(self) -> int:
        """How many slots there are to be, of all classes."""
        return sum(each.slots for each in self.classes.values())

    @property
    def ipv6(self) -> bool:
        """Whether any slot has IPv6."""
        return self.addresses.pool6 is not None or any(each.is_ipv6 for each in self.classes.values())

    @functools.cached_property
    def by_tenant(self) -> dict[str, tuple[int, str]]:
        """Slot number and class of each resident."""
        return {
            one.name: (number, each.name)
            for each in self.classes.values()
            for number, one in (each.residents or {}).items()
        }

    def resident(self, slot: int, class_name: str) -> Resident | None:
        """Whose slot it is, where it is one of the roster's."""
        each = self.classes.get(class_name)
        return each.residents.get(slot) if each is not None and each.residents is not None else None

    def has(self, slot: int, class_name: str) -> bool:
        """Whether a slot of that number and class may be there."""
        each = self.classes.get(class_name)
        return each is not None and (each.residents is None or slot in each.residents)

    def sample(self, class_name: str) -> int:
        """The number of some slot of the class; 0 when a roster has none."""
        residents = self.classes[class_name].residents
        return 1 if residents is None else next(iter(residents), 0)

    def digest(self, slot: int, class_name: str) -> str:
        """What a slot is made of: its class's digest and, of a resident's, that of its own values behind a ``-``."""
        resident, digest = self.resident(slot, class_name), self.classes[class_name].digest
        return digest if resident is None else f"{digest}-{resident.digest}"

    def missing(self, built: Mapping[int, str]) -> list[tuple[int, str]]:
        """The slots (number, class) to make, where ``built`` holds the class of every slot that there is.

        A slot keeps its number and class for life. New ones take the lowest free numbers, classes in the file's
        order; so a first build numbers 1..N class after class, and a class that grows later gets numbers at the end.
        UsageError when a number would have no address or too long a name.
        """
        kept = {number for number, _ in self.by_tenant.values()}
        taken = kept | built.keys()
        free = iter(number for number in range(1, len(taken) + self.slots + 1) if number not in taken)
        wanted: list[tuple[int, str]] = []
        for each in self.classes.values():
            if each.residents is not None:
                continue
            there = sum(1 for name in built.values() if name == each.name)
            wanted += [(next(free), each.name) for _ in range(each.slots - there)]
        if wanted:
            self._check_number(max(number for number, _ in wanted))
        return sorted(wanted + [slot for slot in self.by_tenant.values() if slot[0] not in built])

    def surplus(self, built: Mapping[int, str]) -> dict[str, int]:
        """How many slots of which class are too many, classes that the spec no longer has included.

        Classes with residents are left out: there it is known which ones are too many.
        """
        counts: dict[str, int] = {}
        for name in built.values():
            if name not in self.classes or self.classes[name].residents is None:
                counts[name] = counts.get(name, 0) + 1
        wanted = {name: each.slots for name, each in self.classes.items()}
        return {name: count - wanted.get(name, 0) for name, count in counts.items() if count > wanted.get(name, 0)}

    def _check_number(self, highest: int) -> None:
        if highest > self.addresses.capacity():
            raise UsageError(
                f"slot {highest} has no address: the pool holds {self.addresses.capacity()}",
                hint="take away slots of the classes that shrank first, or widen addresses.pool and pool6",
            )
        if len(f"{self.prefix}{highest}") > _IFNAME_BYTES:
            raise UsageError(f"{self.prefix}{highest} is too long for an interface's name", hint="shorten prefix")

    def name(self, slot: int) -> str:
        """The slot's namespace, and root's end of its link."""
        return f"{self.prefix}{slot}"

    def values(self, slot: int, class_name: str = DEFAULT_CLASS) -> dict[str, str]:
        """Every variable of ``slot``, scalar parameters at their defaults included."""
        resident = self.resident(slot, class_name)
        if resident is not None:
            return self._values_of(resident, slot)
        first = self.addresses.first(slot)
        values = {
            **_class_values(self, self.classes[class_name]),
            "slot": str(slot),
            "netns": self.name(slot),
            "address": str(IPv4Address(first + 1)),
            "root_address": str(IPv4Address(first)),
            "uplink_mac": mac(slot, 1),
            "root_if": self.name(slot),
            "root_mac": mac(slot, 0),
        }
        if self.addresses.pool6 is not None:
            root6, own6 = self.addresses.pair6(slot)
            values["address6"] = str(own6.ip)
            values["root_address6"] = str(root6.ip)
            values["network6"] = str(self.addresses.network6(slot))
        if (cgroup := self.classes[class_name].cgroup) is not None:
            values["cgroup"] = f"{cgroup.parent}/{self.name(slot)}"
        return values

    def _values_of(self, resident: Resident, slot: int) -> dict[str, str]:
        """As :meth:`values`, of a slot with a resident."""
        each = self.classes[resident.class_name]
        values = {
            **_class_values(self, each),
            "slot": str(slot),
            "netns": self.name(slot),
            "uplink_mac": mac(slot, 1),
            "root_if": resident.link or self.name(slot),
            "root_mac": mac(slot, 0),
            **resident.variables,
        }
        if each.guest_interface is not None:
            for name in ("address", "address6"):
                if name in values:
                    values[f"guest_{name}"] = values[name]
            if resident.mac is not None:
                values["guest_mac"] = resident.mac
            elif each.attachment.kind == "tap":  # the workload keeps its own, which nobody told us
                del values["guest_mac"]
        if each.cgroup is not None:
            values["cgroup"] = f"{each.cgroup.parent}/{self.name(slot)}"
        return values

    def root_values(self) -> dict[str, str]:
        """The variables of root's rule files: those of the whole host."""
        values = {"prefix": self.prefix, "host_uplink": self.uplink}
        if self.addresses.pool is not None:
            values["pool"] = str(self.addresses.pool)
        if self.addresses.pool6 is not None:
            values["pool6"] = str(self.addresses.pool6)
        for name, version in (("dns", 4), ("dns6", 6)):
            servers = [str(address) for address in self.addresses.dns if address.version == version]
            if servers:
                values[name] = ",".join(servers)
        return values


@functools.lru_cache(maxsize=64)
def _class_values(spec: HostSpec, each: ClassSpec) -> dict[str, str]:
    """What all slots of a class have in common; the caller copies it."""
    values = spec.root_values()
    values |= {
        "class": each.name,
        "uplink_if": UPLINK_INTERFACE,
        "mtu": str(each.attachment.mtu),
    }
    for name, parameter in each.parameters.items():
        if isinstance(parameter.default, str):
            values[name] = parameter.default
    if each.guest_interface is not None:
        values |= {
            "guest_if": each.guest_interface,
            "guest_mac": each.attachment.guest_mac,
            "gateway_mac": each.attachment.gateway_mac,
        }
    return values if each.residents is not None else values | _numbered_values(spec, each)


def _numbered_values(spec: HostSpec, each: ClassSpec) -> dict[str, str]:
    """What all slots of a class have in common whose addresses are numbered."""
    values = {"prefix_length": "31"}
    addresses = spec.addresses
    if addresses.pool6 is not None:
        values["prefix_length6"] = "127"
    if each.guest_interface is not None:
        values |= {
            "guest_address": str(addresses.guest.ip),
            "guest_network": str(addresses.guest.network),
            "guest_prefix_length": str(addresses.guest.network.prefixlen),
            "gateway": str(addresses.gateway),
        }
        if addresses.pool6 is not None:
            values |= {
                "guest_address6": str(addresses.guest6.ip),
                "guest_network6": str(addresses.guest6.network),
                "guest_prefix_length6": str(addresses.guest6.network.prefixlen),
                "gateway6": str(addresses.gateway6),
            }
    return values


def mac(slot: int, end: int) -> str:
    """The MAC of an end of the slot's link to root (0 root's, 1 the slot's): locally administered, by number."""
    return "02:6e:{:02x}:{:02x}:{:02x}:{:02x}".format(end, *slot.to_bytes(3, "big"))
