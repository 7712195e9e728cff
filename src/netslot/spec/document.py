"""The spec file as it is written: one struct per section, in the order in which the reference explains them.

The JSON schema for editors comes from these types and the texts under them. What they cannot say (an address must
lie in a pool, a file must exist) is checked in :mod:`netslot.spec.load`, which makes a ``HostSpec`` of a document.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from netslot.spec.policies import BpfSection, CgroupSection, NatSection, RatesSection, RoutesSection

Backend: TypeAlias = Literal["iptables-legacy", "iptables-nft", "nftables"]
"""What loads a rule file: one of the two variants of iptables, or nft."""

ParameterKind: TypeAlias = Literal["cidrs", "ports", "rate", "address", "mark", "int", "text"]

Count: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000)]
Mtu: TypeAlias = Annotated[int, Meta(ge=68, le=65535)]
Mac: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")]
InterfaceName: TypeAlias = Annotated[str, Meta(pattern=r"^[^\s/:]{1,15}$")]


class AddressesSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[addresses]``: who is called what, outside and inside."""

    pool: str = ""
    """IPv4 network of the slots. Slot k has its k-th pair of addresses: even is root's end, odd is the slot's.
    Must be there unless all slots are of a roster."""
    pool6: str = ""
    """IPv6 network of the slots: a /64 each where the pool is wide enough, else a pair. Empty: no IPv6 in slots."""
    guest: str = "172.16.0.2/30"
    """The workload's own address behind a tap or veth, the same in every slot."""
    gateway: str = "172.16.0.1"
    """The slot's end of the link to the workload."""
    guest6: str = "fd00:16::2/64"
    """As ``guest``; used where there is a ``pool6``."""
    gateway6: str = "fd00:16::1"
    """As ``gateway``."""
    dns: tuple[str, ...] = ()
    """Resolvers to tell the workload about; ``${dns}`` and ``${dns6}`` in rules."""


class AttachmentSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[attachment]``: how the workload meets its slot."""

    kind: Literal["tap", "veth", "process"] = "tap"
    """tap: a microVM. veth: a container with a namespace of its own. process: a process in the slot's namespace."""
    interface: InterfaceName | None = None
    """The link to the workload, in the slot. Default: tap0 (tap), inner0 (veth); a process has none."""
    peer: InterfaceName = "eth0"
    """Name of the container's end of a veth."""
    mtu: Mtu = 1500
    """Of all links of the slot, bytes."""
    guest_mac: Mac = "06:00:ac:10:00:02"
    """The workload's MAC, the same in every slot."""
    gateway_mac: Mac = "06:00:ac:10:00:01"
    """The slot's MAC towards the workload."""
    user: Count = 0
    """Numeric id of the user who may open the tap."""
    group: Count = 0
    """Numeric id of the group that may open the tap."""
    multi_queue: bool = False
    """Whether the tap may be opened several times, one queue each."""
    vnet_hdr: bool = True
    """Whether frames on the tap begin with a virtio_net_hdr, as Firecracker and QEMU want."""


class RulesSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[rules]``: the slot's rules. A class that has this section takes nothing of the host's."""

    backend: Backend = "nftables"
    """What loads the files: one of the two variants of iptables, or nft."""
    ipv4: str = ""
    """File in iptables-save form, relative to the spec file."""
    ipv6: str = ""
    """File in ip6tables-save form."""
    nft: str = ""
    """File for ``nft -f``; only with backend nftables."""


class RootSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[root]``: the root namespace. Its rules name no slot, and do not change while slots come and go."""

    preset: bool = True
    """Whether netslot adds rules of its own. false: the tables in the files named here are the whole of root's, and
    loaded by you; ``up`` refuses to go on, and ``verify`` says so, where root holds others."""
    backend: Backend = "nftables"
    """What loads netslot's own few rules, and the files named here."""
    ipv4: str = ""
    """File in iptables-save form with rules of your own, relative to the spec file."""
    ipv6: str = ""
    """File in ip6tables-save form."""
    nft: str = ""
    """File for ``nft -f``; only with backend nftables, or with ``preset = false``."""
    nft6: str = ""
    """A second one, only with ``preset = false``."""
    masquerade: bool = True
    """Whether slots' addresses are replaced by the uplink's on their way out (IPv6: where pool6 is a local one)."""


class ParameterSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[parameters.NAME]``: a value that is bound when a slot is acquired."""

    type: ParameterKind
    """cidrs and ports are lists, bound as sets or as rules; the others are variables of the parameter's name."""
    default: str | int | tuple[str, ...] | None = None
    """The value of a slot that nobody has acquired, and of leases that do not say. Lists: empty."""
    min: int | None = None
    """Smallest value of an int."""
    max: int | None = None
    """Largest value of an int."""


class LimitsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[limits]``: of the pool of slots."""

    hold_down: Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?(ms|s|m)?$")] = "2s"
    """How long a released slot rests before it is handed out again."""


class ClassSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[class.NAME]``: a pool of its own. Keys of its sections stand in for the host's, one by one."""

    slots: Count | None = None
    """How many slots this class has. Not said where they are those of the roster."""
    attachment: AttachmentSection = AttachmentSection()
    rules: RulesSection | None = None
    parameters: dict[str, ParameterSection] = {}
    nat: NatSection = NatSection()
    bpf: BpfSection | None = None
    cgroup: CgroupSection | None = None
    routes: RoutesSection | None = None
    rates: RatesSection | None = None


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"classes": "class"}):
    """A whole ``netslot.toml``."""

    uplink: InterfaceName
    """Root's interface to the outside."""
    addresses: AddressesSection = AddressesSection()
    slots: Count | None = None
    """How many; where there are classes, each says its own."""
    roster: str = ""
    """File with tenants that keep addresses, gateways and links of their own, relative to the spec file."""
    prefix: Annotated[str, Meta(pattern="^[a-z][a-z0-9_-]{0,11}$")] = "slot"
    """Namespaces and root's ends of links are called ``<prefix><number>``."""
    attachment: AttachmentSection = AttachmentSection()
    rules: RulesSection | None = None
    root: RootSection = RootSection()
    parameters: dict[str, ParameterSection] = {}
    nat: NatSection = NatSection()
    bpf: BpfSection | None = None
    cgroup: CgroupSection | None = None
    routes: RoutesSection | None = None
    rates: RatesSection | None = None
    limits: LimitsSection = LimitsSection()
    classes: dict[str, ClassSection] = {}
