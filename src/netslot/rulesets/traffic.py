"""The packets of every tenant, sent through all hooks of a ruleset: who is tested against how many rules.

Six packets a tenant and address family: the first packet of a connection (*new*) and a later one
(*established*), each from the tenant to a peer outside, from outside to the tenant (to a published port, where
it has one), and from the tenant to the host itself. All are TCP, to and from addresses and ports that no rule
names. Tables are met in the kernel's order; the nat table only by new packets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.attribute import Attribution, Directory
from netslot.rulesets.interfaces import Kind, kind
from netslot.rulesets.model import Family, Rule, Ruleset
from netslot.rulesets.packets import ABSENT, BRIDGE, PERHAPS_BRIDGED, UPLINK, Link, Packet
from netslot.rulesets.tenants import Tenant
from netslot.rulesets.walk import Key, TableWalker, Template, filing_key, port_key

ANY_PACKET = Tenant("any packet")
"""Stands in where no tenant is known."""

STATES = ("NEW", "ESTABLISHED")

_TABLES_AT = {
    "PREROUTING": ("raw", "mangle", "nat"),
    "INPUT": ("mangle", "filter", "security", "nat"),
    "FORWARD": ("mangle", "filter", "security"),
    "POSTROUTING": ("mangle", "nat"),
}
_HOOKS_OF = {
    "out": ("PREROUTING", "FORWARD", "POSTROUTING"),
    "in": ("PREROUTING", "FORWARD", "POSTROUTING"),
    "host": ("PREROUTING", "INPUT"),
}
_VARYING = {
    "out": frozenset(("src", "in")),
    "in": frozenset(("dst", "out", "port")),
    "host": frozenset(("src", "in")),
}

ChainName = tuple[Family, str, str]  # family, table, built-in chain


@dataclass(slots=True)
class Walks:
    """Tests per tenant, in the order of the tenants.

    ``chains`` maps a built-in chain to what the worst of the tenant's packets meets there (chains that it jumps
    to included), ``totals`` to what one packet meets in all hooks together; both for each state.
    """

    chains: dict[ChainName, dict[str, list[int]]] = field(default_factory=dict)
    totals: dict[str, list[int]] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max((max(counts, default=0) for counts in self.totals.values()), default=0)


def walk_all(attribution: Attribution) -> Walks:
    """Walk every tenant's packets. Where there is no tenant, one packet of nobody is walked."""
    tenants = attribution.tenants or (ANY_PACKET,)
    walks = Walks(totals={state: [0] * len(tenants) for state in STATES})
    for ruleset in attribution.dump.rulesets:
        surroundings = _Surroundings(ruleset, attribution, tenants)
        for index in range(len(tenants)):
            surroundings.walk(index, walks)
    return walks


class _Surroundings:
    """One ruleset, its walkers, and what packets through it look like."""

    def __init__(self, ruleset: Ruleset, attribution: Attribution, tenants: tuple[Tenant, ...]) -> None:
        self._family = ruleset.family
        self._ruleset = ruleset
        self._tenants = tenants
        self._keys: list[list[Key]] = [[] for _ in tenants]
        self._names: dict[Key, int] = {}
        self._bridged: set[str] = set()
        self._file_names(Directory(attribution.tenants))
        self._walkers = {name: TableWalker(table, self._names) for name, table in ruleset.tables.items()}
        self._templates = {
            (flow, state, hook): Template(f"{flow} {state} {hook}", _VARYING[flow])
            for flow, hooks in _HOOKS_OF.items()
            for state in STATES
            for hook in hooks
        }
        self._peer, self._host = unnamed_addresses(ruleset)
        self._port = unnamed_port(ruleset)
        self._published, self._bridges = _published_and_bridges(attribution, ruleset)
        self._present = _present(attribution, ruleset)

    def _file_names(self, directory: Directory) -> None:
        distinct = {id(x): x for _, _, rule in self._ruleset.rules() for x in rule.matches}
        routed: set[str] = set()
        for match in distinct.values():
            if isinstance(match, m.Physdev):
                self._bridged.add(match.name)
            elif isinstance(match, m.Interface):
                routed.add(match.name)
            key = filing_key(match)
            if key is None or key in self._names:
                continue
            if isinstance(match, m.Address):
                who = directory.by_address(self._family, match.value, match.mask)
            elif isinstance(match, m.Interface | m.Physdev):
                who = directory.by_interface.get(match.name, -1)
            else:
                continue
            if who >= 0:
                self._names[key] = who
                self._keys[who].append(key)
        self._bridged -= routed

    def walk(self, index: int, walks: Walks) -> None:
        tenant = self._tenants[index]
        if tenant is not ANY_PACKET and index not in self._present:
            return
        for flow in _HOOKS_OF:
            # A packet carries the tenant's names on one side only.
            keys = tuple(key for key in self._keys[index] if key[0] in _VARYING[flow])
            for interface in tenant.interfaces[:8] or ("",):
                for state in STATES:
                    self._send(flow, state, index, interface, keys, walks)

    def _send(self, flow: str, state: str, index: int, interface: str, keys: tuple[Key, ...], walks: Walks) -> None:
        packet = self._packet(flow, state, index, interface)
        link_in, link_out, port_out = packet.link_in, packet.link_out, packet.port_out
        dst, dport, local = packet.dst, packet.dport, packet.local_dst
        published = self._published.get(index) if flow == "in" else None
        total = 0
        for hook in _HOOKS_OF[flow]:
            # A hook has an output interface after routing only, and an input interface up to forwarding.
            early = hook in ("PREROUTING", "INPUT")
            packet.link_in = ABSENT if hook == "POSTROUTING" else link_in
            packet.link_out, packet.port_out = (ABSENT, ABSENT) if early else (link_out, port_out)
            packet.dst, packet.dport, packet.local_dst = dst, dport, local
            if published is not None and early:
                packet.dst = self._host if published.dst is None else published.dst
                packet.dport, packet.local_dst = published.port, True
            ends_at = self._pass(hook, packet, (flow, state, hook), keys, index, walks, total)
            if ends_at is None:
                return
            total = ends_at
        self._add_total(walks, state, index, total)

    def _pass(
        self,
        hook: str,
        packet: Packet,
        template: tuple[str, str, str],
        keys: tuple[Key, ...],
        index: int,
        walks: Walks,
        total: int,
    ) -> int | None:
        """Send the packet through all tables of one hook; the tests so far, None if no way goes on."""
        keys = (*keys, port_key(packet.dport))
        for table in _TABLES_AT[hook]:
            walker = self._walkers.get(table)
            if walker is None or (table == "nat" and packet.state != "NEW"):
                continue
            outcome = walker.walk(hook, packet, self._templates[template], keys)
            if outcome is None:
                continue
            most = outcome.most()
            self._note(walks, table, hook, packet.state, index, most)
            # A way that ends in drop can be longer than any that goes on.
            self._add_total(walks, packet.state, index, total + most)
            if outcome.accepted is None:
                return None
            total += outcome.accepted
            packet.mark, packet.mark_known = outcome.mark
        return total

    def _note(self, walks: Walks, table: str, hook: str, state: str, index: int, tested: int) -> None:
        name: ChainName = (self._family, table, hook)
        counts = walks.chains.get(name)
        if counts is None:
            counts = walks.chains[name] = {one: [0] * len(self._tenants) for one in STATES}
        counts[state][index] = max(counts[state][index], tested)

    def _add_total(self, walks: Walks, state: str, index: int, tested: int) -> None:
        walks.totals[state][index] = max(walks.totals[state][index], tested)

    def _packet(self, flow: str, state: str, index: int, interface: str) -> Packet:
        tenant = self._tenants[index]
        own = next((a.value for a in tenant.addresses if a.family == self._family), None)
        link, port = self._links(index, interface)
        if flow == "in":
            published = self._published.get(index)
            dport = published.inner_port if published is not None else self._port
            other = port if port.unsure or port is ABSENT else BRIDGE
            return Packet(state, self._peer, own, self._port, dport, UPLINK, link, other, port)
        to_host = flow == "host"
        peer = self._host if to_host else self._peer
        other = port if port.unsure or port is ABSENT else BRIDGE
        packet = Packet(state, own, peer, self._port, self._port, link, UPLINK, port, other)
        packet.local_dst = to_host
        packet.mac = tenant.macs[0] if len(tenant.macs) == 1 else None
        return packet

    def _links(self, index: int, interface: str) -> tuple[Link, Link]:
        """The tenant's interface, and the bridge port if it is one."""
        if interface in self._bridged:
            return BRIDGE, Link(interface)
        if interface:
            return Link(interface), ABSENT
        if self._tenants[index] is ANY_PACKET:
            return BRIDGE, PERHAPS_BRIDGED
        bridge = self._bridges.get(index, "")
        return (Link(bridge) if bridge else BRIDGE), ABSENT


@dataclass(frozen=True, slots=True)
class _Published:
    dst: int | None
    port: int
    inner_port: int


def _published_and_bridges(
    attribution: Attribution, ruleset: Ruleset
) -> tuple[dict[int, _Published], dict[int, str]]:
    """The last published port of each tenant (the farthest down), and the bridge that its own rules name."""
    published: dict[int, _Published] = {}
    bridges: dict[int, Counter[str]] = {}
    own = {name for tenant in attribution.tenants for name in tenant.interfaces}
    for _, _, rule in ruleset.rules():
        who = attribution.owner[rule]
        if who < 0:
            continue
        if type(rule.target) is t.Dnat:
            found = _publication(rule, rule.target)
            if found is not None:
                published[who] = found
        if not attribution.tenants[who].interfaces:
            for match in rule.matches:
                if type(match) is m.Interface and not (match.negated or match.wildcard or match.name in own):
                    bridges.setdefault(who, Counter())[match.name] += 1
    likely = {who: names.most_common(1)[0][0] for who, names in bridges.items() if _is_bridge(names)}
    return published, likely


def _is_bridge(names: Counter[str]) -> bool:
    return kind(names.most_common(1)[0][0]) is Kind.BRIDGE


def _publication(rule: Rule, target: t.Dnat) -> _Published | None:
    port = next((x.ranges[0][0] for x in rule.matches if isinstance(x, m.Ports) and x.side == "dst"), None)
    if port is None or any(isinstance(x, m.Protocol) and x.number != 6 for x in rule.matches):
        return None
    dst = next((x.value for x in rule.matches if isinstance(x, m.Address) and x.side == "dst"), None)
    return _Published(dst, port, target.to.ports[0] if target.to.ports else port)


def _present(attribution: Attribution, ruleset: Ruleset) -> set[int]:
    """Tenants that this family's rules name, or that have an address of this family."""
    found = {
        index
        for index, tenant in enumerate(attribution.tenants)
        if any(address.family == ruleset.family for address in tenant.addresses)
    }
    found.update(attribution.owner[rule] for _, _, rule in ruleset.rules())
    return found


def unnamed_addresses(ruleset: Ruleset) -> tuple[int, int]:
    """Two addresses that lie in no prefix that a rule names: a peer's, and one of the host's own."""
    prefixes: dict[int, set[int]] = {}
    ranges: list[tuple[int, int]] = []
    for _, _, rule in ruleset.rules():
        for match in rule.matches:
            if type(match) is m.Address:
                prefixes.setdefault(match.mask, set()).add(match.value)
            elif type(match) is m.IpRange:
                ranges.append((match.low, match.high))
    free: list[int] = []
    best = _candidates(ruleset.family)
    for value in best:
        named = any(value & mask in known for mask, known in prefixes.items() if mask)
        if not named and not any(low <= value <= high for low, high in ranges):
            free.append(value)
            if len(free) == 2:
                return free[0], free[1]
    return best[0], best[1]


def _candidates(family: Family) -> list[int]:
    """Global unicast addresses spread over the whole space."""
    if family == 4:
        return [(first << 24) + 0x2A4D63 for first in (93, 151, 62, 185, 23, 45, 77, 81, 104, 130, 143, 199, 5, 37)]
    return [(0x2A00 + step << 112) + 0x5D42 for step in range(14)]


def unnamed_port(ruleset: Ruleset) -> int:
    """A port that as few rules as possible name."""
    ranges = Counter(span for span in _port_ranges(ruleset) if span != (0, 65535))
    candidates = (47983, 33917, 61231, 28657, 10949, 5003, 991)
    return min(candidates, key=lambda port: sum(n for (low, high), n in ranges.items() if low <= port <= high))


def _port_ranges(ruleset: Ruleset) -> Iterable[tuple[int, int]]:
    distinct = {id(x): x for _, _, rule in ruleset.rules() for x in rule.matches if type(x) is m.Ports}
    for match in distinct.values():
        yield from match.ranges
