"""The conditions of a rule: one frozen class per kind of match that is modelled, and Opaque for the rest.

Addresses, masks and marks are plain ints (32 bits, or 128 for IPv6 addresses). Ranges include both ends.
``negated`` is the ``!`` in front of an option. Sides are the strings ``"src"``/``"dst"`` for addresses and
ports (``"either"`` for multiport ``--ports``), and ``"in"``/``"out"`` for interfaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Side = Literal["src", "dst"]
PortSide = Literal["src", "dst", "either"]
Direction = Literal["in", "out"]
Words: TypeAlias = tuple[str, ...]

STATEFUL_MODULES = frozenset(
    ("limit", "hashlimit", "recent", "quota", "statistic", "connlimit", "nfacct", "rateest", "connbytes")
)
"""Matches whose answer depends on packets seen before (statistic: on a counter or on chance)."""


@dataclass(frozen=True, slots=True)
class Address:
    """``-s``/``-d``: true when ``packet & mask == value``. The mask need not be a prefix."""

    side: Side
    value: int
    mask: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class IpRange:
    """``-m iprange``: true when ``low <= packet <= high``."""

    side: Side
    low: int
    high: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Interface:
    """``-i``/``-o``. ``wildcard`` says that the rule wrote ``name+``: any interface that begins with name.

    A packet that has no such interface (``-o`` before routing cannot be written; locally made packets have no
    input interface) is compared as the empty name.
    """

    direction: Direction
    name: str
    wildcard: bool = False
    negated: bool = False


@dataclass(frozen=True, slots=True)
class OtherLink:
    """A link that is none of these. No dump says it: it is what is left when a set of links is read as rules."""

    direction: Direction
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Protocol:
    """``-p``: the IP protocol number, 1..255 (0, ``all``, is no condition and never appears)."""

    number: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Fragment:
    """``-f``: second and later fragments (IPv4 only)."""

    negated: bool = False


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of tcp, udp, udplite, sctp or dccp, from that module or from multiport.

    ``module`` is the word after ``-m`` (needed to write it back). True when the port lies in one of
    ``ranges``; for side ``either`` when source or destination does. The kernel wants a ``-p`` beside it, so
    the rule also holds a Protocol; a fragment without ports never matches, negated or not.
    """

    module: str
    side: PortSide
    ranges: tuple[tuple[int, int], ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class IcmpType:
    """``--icmp-type`` (module ``icmp``) or ``--icmpv6-type`` (``icmp6``): the type, and a range of codes.

    For IPv4 the type 255 means any type; for IPv6 it is a type like others.
    """

    module: str
    type: int
    code_low: int = 0
    code_high: int = 255
    negated: bool = False


@dataclass(frozen=True, slots=True)
class TcpFlags:
    """``--tcp-flags``, ``--syn``: true when ``flags & mask == value``.

    FIN is 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32.
    """

    mask: int
    value: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class TcpOption:
    """``--tcp-option``: the option number is present."""

    number: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class CtState:
    """``-m conntrack --ctstate`` and ``-m state --state`` (``module`` tells them apart): any of ``states``.

    States: INVALID NEW ESTABLISHED RELATED UNTRACKED, and for conntrack also SNAT DNAT (the connection was
    translated), which can hold together with one of the others.
    """

    module: str
    states: frozenset[str]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class CtStatus:
    """``--ctstatus``: any of NONE EXPECTED SEEN_REPLY ASSURED CONFIRMED."""

    statuses: frozenset[str]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class CtDirection:
    """``--ctdir``: the packet goes in the connection's ORIGINAL or REPLY direction."""

    direction: Literal["ORIGINAL", "REPLY"]


@dataclass(frozen=True, slots=True)
class CtAddress:
    """``--ctorigsrc`` and its three siblings: an address of the connection's tuple."""

    tuple_: Literal["orig", "repl"]
    side: Side
    value: int
    mask: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class CtPorts:
    """``--ctorigsrcport`` and its three siblings."""

    tuple_: Literal["orig", "repl"]
    side: Side
    low: int
    high: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class CtProtocol:
    """``--ctproto``: the protocol number of the connection."""

    number: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """``-m mark``: true when ``packet mark & mask == value``."""

    value: int
    mask: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Connmark:
    """``-m connmark``: true when ``connection mark & mask == value``.

    False for a packet without connection, negated or not.
    """

    value: int
    mask: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class AddrType:
    """``-m addrtype``: to the routing table the address is of one of ``types`` (UNICAST, LOCAL, ...).

    ``interface`` is ``in``/``out`` for ``--limit-iface-in``/``-out``: only that interface's addresses count.
    """

    side: Side
    types: frozenset[str]
    negated: bool = False
    interface: Direction | None = None


@dataclass(frozen=True, slots=True)
class Mac:
    """``-m mac --mac-source``: lower case, colons."""

    address: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Physdev:
    """``-m physdev --physdev-in/-out``: the bridge port.

    For a packet that no bridge carried the name is empty: false, or true if negated.
    """

    direction: Direction
    name: str
    wildcard: bool = False
    negated: bool = False


@dataclass(frozen=True, slots=True)
class PhysdevIs:
    """``--physdev-is-in``, ``-is-out``, ``-is-bridged``."""

    what: Literal["in", "out", "bridged"]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class DevGroup:
    """``-m devgroup``: true when ``group & mask == value``."""

    direction: Direction
    value: int
    mask: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class SetMatch:
    """``-m set --match-set NAME FLAGS``. ``options``: further words (``--return-nomatch``, counters, ...)."""

    name: str
    flags: tuple[str, ...]
    negated: bool = False
    options: Words = ()


@dataclass(frozen=True, slots=True)
class RpFilter:
    """``-m rpfilter``: the route back to the source leaves by the input interface.

    ``negated`` is ``--invert``.
    """

    loose: bool = False
    validmark: bool = False
    accept_local: bool = False
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Length:
    """``-m length``: bytes of the layer 3 packet."""

    low: int
    high: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Ttl:
    """``-m ttl`` (IPv4) or ``-m hl`` (IPv6): ``eq``, ``lt`` or ``gt`` the value; ``negated`` only with ``eq``."""

    op: Literal["eq", "lt", "gt"]
    value: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Dscp:
    """``-m dscp``: the six bits."""

    value: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class PktType:
    """``-m pkttype``: ``unicast`` (to this host), ``broadcast`` or ``multicast``, at layer 2."""

    type: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Owner:
    """``-m owner``: the local socket's uid or gid lies in the range, or (``socket``) there is a socket."""

    kind: Literal["uid", "gid", "socket"]
    low: int = 0
    high: int = 0
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Opaque:
    """A condition kept word for word. ``module`` is the name after ``-m`` (or the option, for a basic one).

    ``words`` are everything needed to write it back, ``-m module`` included.
    """

    module: str
    words: Words

    @property
    def stateful(self) -> bool:
        """Whether the answer depends on earlier packets (of whatever tenant)."""
        return self.module in STATEFUL_MODULES or (self.module == "set" and "--update-counters" in self.words)


Match: TypeAlias = (
    Address
    | IpRange
    | Interface
    | OtherLink
    | Protocol
    | Fragment
    | Ports
    | IcmpType
    | TcpFlags
    | TcpOption
    | CtState
    | CtStatus
    | CtDirection
    | CtAddress
    | CtPorts
    | CtProtocol
    | Mark
    | Connmark
    | AddrType
    | Mac
    | Physdev
    | PhysdevIs
    | DevGroup
    | SetMatch
    | RpFilter
    | Length
    | Ttl
    | Dscp
    | PktType
    | Owner
    | Opaque
)
