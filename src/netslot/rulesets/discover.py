"""Find the tenants of a host from its dump alone.

A tenant leaves four kinds of traces: the interface of its guest, its addresses, its MACs, and chains of its
own. Each trace alone can mislead (an administrator's address in an allow list is no tenant), so an address
counts only with evidence of how it is used:

    bound to a guest's interface    -s A -i tap1, -d A -o tap1, ! -s A -i tap1 -j DROP
    bound to a MAC                  -s A -m mac --mac-source M
    on a container bridge           -d A -o br-1, -s A -i br-1, -d A ! -i br-1 -j DROP
    published                       -j DNAT --to-destination A:port  (not a redirection of what guests send)
    translated                      -s A -j MASQUERADE or SNAT; -s A -d A (hairpin)
    dispatched                      -s A -j CHAIN where only rules about A jump to CHAIN
    one of many alike               as source and as destination, and so are two others of the same /16

Traces that stand in one rule, or in a chain that belongs to another trace, are the same tenant.
Where a host has no guests in its rules but several bridges with rules of their own, the networks are the
tenants (libvirt, VLAN bridges).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets import values
from netslot.rulesets.graph import References, reachable, references
from netslot.rulesets.interfaces import IDLE_BRIDGES, Kind, family_of, guest_of, kind, may_be_guests
from netslot.rulesets.model import Chain, Dump, Family, Rule, Table
from netslot.rulesets.tenants import Tenant, TenantAddress, tenant_address

Node = tuple[str, str | TenantAddress]
"""``("if", name)``, ``("ip", address)``, ``("mac", text)``, ``("chain", "table/name")``, ``("guest", word)``."""

_SMALLEST = {4: values.ALL_ONES[4] ^ 7, 6: values.ALL_ONES[6] ^ ((1 << 64) - 1)}
_NOT_UNICAST = (
    TenantAddress(4, 0, 0xFF000000),
    TenantAddress(4, 0x7F000000, 0xFF000000),
    TenantAddress(4, 0xE0000000, 0xE0000000),
    TenantAddress(4, 0xA9FE0000, 0xFFFF0000),
    TenantAddress(6, 0, values.ALL_ONES[6] ^ 1),
    TenantAddress(6, 0xFE80 << 112, 0xFFC0 << 112),
    TenantAddress(6, 0xFF << 120, 0xFF << 120),
)
_CHAIN_OF_ONE_GUEST = re.compile(r"[irsv]-\d+(?:-\d+)?-(?:VM|def)")  # CloudStack: all cards of a guest jump to it
_SERVICE_CHAINS = re.compile(r"KUBE-(SVC|SEP|FW|XLB|EXT|SVL|SERVICES|NODEPORTS|EXTERNAL-SERVICES)\b")
_LABELS = (
    re.compile(r"POD name:(?P<name>\S+)\s+namespace: (?P<space>\S+)"),
    re.compile(r'name: "(?P<space>[^"]+)" id: "(?P<name>[^"]+)"'),
)


_CONTAINER_ID = re.compile(r"([0-9a-f]{12})[0-9a-f]{52}")  # engines show the first 12 digits


def discover(dump: Dump) -> tuple[Tenant, ...]:
    """Tenants in the order in which the dump first names them; empty when it shows none."""
    finder = _Finder(dump)
    tables = [
        (ruleset.family, table, references(table)) for ruleset in dump.rulesets for table in ruleset.tables.values()
    ]
    for family, table, refs in tables:
        forwarded = reachable(table, ("FORWARD",))
        for chain, rule in table.rules():
            finder.look_at(family, chain, rule, chain.name in forwarded)
        for name, jumps in refs.items():
            finder.look_at_dispatch(table, table.chains[name], jumps)
            finder.join_cards(name, jumps)
    finder.add_populations()
    for _, table, refs in tables:
        finder.give_chains(table.name, refs)
        finder.join_in_chains(table)
    return finder.tenants() or _networks(dump)


def _kinds(dump: Dump) -> dict[str, Kind]:
    """The kind of every interface that a rule names. Three or more numbered names alike are guests', unless rules
    hide others behind them: those lead to the outside."""
    distinct = {id(x): x for ruleset in dump.rulesets for _, _, rule in ruleset.rules() for x in rule.matches}
    named = (x for x in distinct.values() if isinstance(x, m.Interface | m.Physdev) and not x.wildcard)
    kinds = {x.name: kind(x.name) for x in named}
    outward = _outward(dump)
    unknown = [name for name in kinds if may_be_guests(name) and name not in outward]
    crowd = Counter(family_of(name) for name in unknown)
    for name in unknown:
        if family_of(name) and crowd[family_of(name)] >= 3:
            kinds[name] = Kind.GUEST
    return kinds


def _outward(dump: Dump) -> frozenset[str]:
    """Interfaces behind which rules hide others: those lead to the outside."""
    return frozenset(
        x.name
        for ruleset in dump.rulesets
        for _, _, rule in ruleset.rules()
        if isinstance(rule.target, t.Masquerade | t.Snat)
        for x in rule.matches
        if isinstance(x, m.Interface) and x.direction == "out" and not x.negated
    )


def _let_in(dump: Dump) -> frozenset[TenantAddress]:
    """Addresses for which INPUT lets packets in: the host's own."""
    return frozenset(
        TenantAddress(ruleset.family, x.value, x.mask)
        for ruleset in dump.rulesets
        for _, chain, rule in ruleset.rules()
        if chain.name == "INPUT" and isinstance(rule.target, t.Accept)
        for x in rule.matches
        if isinstance(x, m.Address)
        and x.side == "dst"
        and not x.negated
        and x.mask == values.ALL_ONES[ruleset.family]
    )


def is_host_sized(match: m.Address, family: Family) -> bool:
    """A /29 or smaller (IPv6: a /64 or smaller), and not an address that many hosts share."""
    smallest = _SMALLEST[family]
    return match.mask & smallest == smallest and not any(
        other.family == family and match.value & other.mask == other.value for other in _NOT_UNICAST
    )


class _Names:
    """Numbers for the things that can identify a tenant, so that the passes compare small integers."""

    def __init__(self) -> None:
        self._numbers: dict[Node, int] = {}
        self.nodes: list[Node] = []

    def number(self, node: Node) -> int:
        found = self._numbers.get(node)
        if found is None:
            found = self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return found


class _Traces:
    """What one rule names, sorted by the part it plays: node numbers, -1 for nothing."""

    __slots__ = ("dst", "in_bridge", "in_guest", "mac", "negated_src", "not_in", "out_bridge", "out_guest", "src")

    def __init__(self) -> None:
        self.src = self.dst = self.negated_src = -1
        self.in_guest = self.out_guest = self.in_bridge = self.out_bridge = self.not_in = -1
        self.mac = -1


def _parts(dump: Dump, kinds: dict[str, Kind], names: _Names) -> dict[int, tuple[str, int]]:
    """For each distinct match that tells something: the part it plays in a rule, and what it names.

    Keyed by the identity of the match, which the parser shares between the rules of one dump.
    """
    parts: dict[int, tuple[str, int]] = {}
    for ruleset in dump.rulesets:
        distinct = {id(match): match for _, _, rule in ruleset.rules() for match in rule.matches}
        for key, match in distinct.items():
            part, node = _part(match, ruleset.family, kinds)
            if node is not None:
                parts[key] = part, names.number(node)
    return parts


def _part(match: m.Match, family: Family, kinds: dict[str, Kind]) -> tuple[str, Node | None]:
    if isinstance(match, m.Mac):
        return "mac", ("mac", match.address)
    if isinstance(match, m.Address) and is_host_sized(match, family):
        node: Node = ("ip", TenantAddress(family, match.value, match.mask))
        if match.negated:
            return "negated_src", node if match.side == "src" else None
        return match.side, node
    if isinstance(match, m.Interface | m.Physdev) and not match.wildcard:
        what = kinds[match.name]
        if match.negated:
            return "not_in", ("if", match.name) if what is Kind.BRIDGE and match.direction == "in" else None
        if what in (Kind.GUEST, Kind.BRIDGE):
            return f"{match.direction}_{what.value}", ("if", match.name)
    return "", None


class _Finder:
    def __init__(self, dump: Dump) -> None:
        self._names = _Names()
        self._parts = _parts(dump, _kinds(dump), self._names)
        self._parent: dict[int, int] = {}
        self._evidence: dict[int, str] = {}  # in the order of discovery
        self._labels: dict[int, str] = {}
        self._forwarded_src: dict[int, None] = {}
        self._forwarded_dst: dict[int, None] = {}
        self._traces: dict[Rule, _Traces] = {}
        self._outward, self._let_in = _outward(dump), _let_in(dump)

    # union-find: which traces are the same tenant

    def _root(self, node: int) -> int:
        parents = self._parent
        parent = parents.setdefault(node, node)
        while parent != parents[parent]:
            parents[parent] = parents[parents[parent]]
            parent = parents[parent]
        return parent

    def _same(self, one: int, other: int) -> None:
        first, second = self._root(one), self._root(other)
        if first != second:
            self._parent[second] = first

    def _believe(self, node: int, why: str) -> None:
        if node not in self._evidence:
            self._evidence[node] = why
            self._root(node)

    # first pass: evidence within one rule

    def look_at(self, family: Family, chain: Chain, rule: Rule, forwarded: bool) -> None:
        traces = None
        for match in rule.matches:
            part = self._parts.get(id(match))
            if part is not None:
                traces = traces or _Traces()
                setattr(traces, *part)
        if traces is None:
            if not isinstance(rule.target, t.Dnat):
                return
            traces = _Traces()
        self._traces[rule] = traces
        if not _is_trust(chain, rule):
            self._look_at_guests(traces)
        src, dst = traces.src, traces.dst
        if src >= 0 and src == dst:
            self._believe(src, "translated for itself (hairpin)")
        elif src >= 0 and isinstance(rule.target, t.Masquerade | t.Snat) and not self._is_whole_network(src):
            self._believe(src, "its source is translated")
        if src >= 0 and traces.in_bridge >= 0:
            self._believe(src, "on a bridge")
        if dst >= 0 and (traces.out_bridge >= 0 or (traces.not_in >= 0 and isinstance(rule.target, t.Drop))):
            self._believe(dst, "on a bridge")
        if isinstance(rule.target, t.Dnat):
            self._look_at_publication(family, chain, rule, rule.target, traces)
        if forwarded and src >= 0:
            self._forwarded_src[src] = None
        if forwarded and dst >= 0:
            self._forwarded_dst[dst] = None

    def _is_whole_network(self, node: int) -> bool:
        """An IPv6 /64 is what one guest may have, and also what every network has: alone it tells nothing."""
        address = self._address(node)
        return address.family == 6 and address.mask == _SMALLEST[6]

    def _look_at_guests(self, traces: _Traces) -> None:
        """Guests' interfaces, and addresses that are bound to one or to a MAC."""
        for interface in (traces.in_guest, traces.out_guest):
            if interface >= 0 and interface not in self._evidence:
                self._believe(interface, "the interface of a guest")
                guest = guest_of(str(self._names.nodes[interface][1]))
                if guest:
                    self._same(self._names.number(("guest", guest)), interface)
        if traces.in_guest >= 0:
            self._bind(traces.src, traces.in_guest, "bound to a guest's interface")
            self._bind(traces.negated_src, traces.in_guest, "bound to a guest's interface")
        if traces.out_guest >= 0:
            self._bind(traces.dst, traces.out_guest, "bound to a guest's interface")
        if traces.mac >= 0:
            self._bind(traces.src, traces.mac, "bound to a MAC")

    def _bind(self, address: int, other: int, why: str) -> None:
        if address >= 0:
            self._believe(address, why)
            self._same(other, address)

    def _look_at_publication(self, family: Family, chain: Chain, rule: Rule, target: t.Dnat, traces: _Traces) -> None:
        """DNAT to a guest. What guests send to a name server, proxy or portal is redirected too: no publication."""
        if target.to.address is None or _SERVICE_CHAINS.match(chain.name):
            return
        low, high = target.to.address
        from_guest = max(traces.src, traces.in_guest, traces.in_bridge) >= 0
        port_53 = any(isinstance(x, m.Ports) and x.ranges == ((53, 53),) for x in rule.matches)
        if low != high or from_guest or (port_53 and (target.to.ports is None or traces.dst >= 0)):
            return
        entries = {
            x.name for x in rule.matches if isinstance(x, m.Interface) and x.direction == "in" and not x.negated
        }
        if self._outward and entries and not entries & self._outward:
            return
        address = TenantAddress(family, low, values.ALL_ONES[family])
        if address not in self._let_in and is_host_sized(m.Address("dst", low, address.mask), family):
            self._believe(self._names.number(("ip", address)), "a port is published to it")

    # second pass: evidence from jumps and from numbers

    def look_at_dispatch(self, table: Table, chain: Chain, jumps: list[tuple[Chain, Rule]]) -> None:
        """``-s A -j CHAIN``, ``-d A -j CHAIN`` where every rule that jumps to CHAIN is about A.

        A destination in the nat table is where something is published: an address of the host's, or a floating one.
        """
        if _SERVICE_CHAINS.match(chain.name):
            return
        about: set[int] = set()
        for caller, rule in jumps:
            traces = self._traces.get(rule)
            if traces is None or _SERVICE_CHAINS.match(caller.name):
                return
            about.add(traces.src if traces.src >= 0 or table.name == "nat" else traces.dst)
        node = about.pop()
        if about or node < 0:
            return
        self._believe(node, f"has a chain of its own, {chain.name}")
        label = _label(rule.comment for _, rule in jumps)
        if label:
            self._labels[node] = label

    def join_cards(self, chain: str, jumps: list[tuple[Chain, Rule]]) -> None:
        """The interfaces that lead to a chain that the product makes for one guest are this guest's."""
        if not _CHAIN_OF_ONE_GUEST.fullmatch(chain):
            return
        cards: list[int] = []
        for _, rule in jumps:
            traces = self._traces.get(rule)
            if traces is not None:
                cards += [node for node in (traces.in_guest, traces.out_guest) if node >= 0]
        for card in cards:
            self._same(cards[0], card)
            self._labels.setdefault(card, f"{chain.rpartition('-')[0]}-VM")

    def add_populations(self) -> None:
        """Three or more private addresses of one /16 (IPv6: /48) that are each source and destination."""
        both = {
            node: address
            for node in self._forwarded_src
            if node in self._forwarded_dst and _is_private(address := self._address(node))
        }
        crowd = Counter(_place(address) for address in both.values())
        for node, address in both.items():
            if crowd[_place(address)] >= 3:
                self._believe(node, "one of many addresses with rules alike")

    def _address(self, node: int) -> TenantAddress:
        value = self._names.nodes[node][1]
        assert isinstance(value, TenantAddress)
        return value

    def give_chains(self, table: str, refs: References) -> None:
        """A chain belongs to the trace that every jump to it names; chains below it belong to the same."""
        for _ in range(3):
            for name, jumps in refs.items():
                owners = {self._owner_of_jump(table, caller, rule) for caller, rule in jumps}
                owner = owners.pop()
                if not owners and owner >= 0:
                    self._same(owner, self._names.number(("chain", f"{table}/{name}")))

    def _owner_of_jump(self, table: str, caller: Chain, rule: Rule) -> int:
        traces = self._traces.get(rule)
        if traces is not None:
            for node in (traces.in_guest, traces.out_guest, traces.src, traces.dst):
                if node in self._evidence:
                    return self._root(node)
        node = self._names.number(("chain", f"{table}/{caller.name}"))
        root = self._root(node)
        return root if root != node else -1

    def join_in_chains(self, table: Table) -> None:
        """In a tenant's own chain, an address bound to a MAC is the tenant's, and so is an allowed MAC. In a guest's,
        so is the source without which everything is dropped."""
        guests = {self._root(number) for number in self._evidence if self._names.nodes[number][0] == "if"}
        for chain in table.chains.values():
            node = self._names.number(("chain", f"{table.name}/{chain.name}"))
            if self._root(node) == node:
                continue
            of_guest = self._root(node) in guests
            for rule in chain.rules:
                traces = self._traces.get(rule)
                if traces is not None and traces.mac >= 0:
                    if self._root(traces.mac) == traces.mac:  # two tenants can use one MAC, behind different bridges
                        self._same(node, traces.mac)
                    if traces.src >= 0:
                        self._same(node, traces.src)
                elif traces is not None and of_guest and _is_spoof_drop(rule):
                    self._bind(traces.negated_src, node, "its guest may send under no other")

    # the answer

    def tenants(self) -> tuple[Tenant, ...]:
        self._join_networks()
        groups: dict[int, list[int]] = {}
        for node in self._evidence:
            groups.setdefault(self._root(node), []).append(node)
        macs: dict[int, list[str]] = {}
        for number in self._parent:
            named = self._names.nodes[number]
            if named[0] == "mac":
                macs.setdefault(self._root(number), []).append(str(named[1]))
        return tuple(self._tenant(numbers, macs.get(root, [])) for root, numbers in groups.items())

    def _join_networks(self) -> None:
        """A host inside a small network that is itself a trace is the same tenant."""
        known = {self._address(n): n for n in self._evidence if self._names.nodes[n][0] == "ip"}
        masks = {(address.family, address.mask) for address in known}
        for address, number in known.items():
            for family, mask in masks:
                if family == address.family and mask < address.mask:
                    wider = known.get(TenantAddress(family, address.value & mask, mask))
                    if wider is not None:
                        self._same(wider, number)

    def _tenant(self, numbers: list[int], macs: list[str]) -> Tenant:
        nodes = [self._names.nodes[number] for number in numbers]
        interfaces = tuple(str(node[1]) for node in nodes if node[0] == "if")
        addresses = tuple(node[1] for node in nodes if isinstance(node[1], TenantAddress))
        label = next((self._labels[number] for number in numbers if number in self._labels), "")
        guest = guest_of(interfaces[0]) if len(interfaces) > 1 else ""
        taps = [name for name in interfaces if name.startswith("tap")] or list(interfaces)
        name = label or (taps[0] if taps else _plain(addresses[0]))
        if guest.startswith("guest"):
            name = guest
        return Tenant(name, interfaces, addresses, tuple(macs), why=self._evidence[numbers[0]])


def _is_spoof_drop(rule: Rule) -> bool:
    """``! -s A -j DROP``, with nothing but a link beside it."""
    own = [match for match in rule.matches if isinstance(match, m.Address)]
    links = [match for match in rule.matches if isinstance(match, m.Interface | m.Physdev)]
    return isinstance(rule.target, t.Drop | t.Reject) and len(own) == 1 and len(own) + len(links) == len(rule.matches)


def _is_trust(chain: Chain, rule: Rule) -> bool:
    """``-A INPUT -i X -j ACCEPT``, which hosts say of links of their own; that alone makes no guest."""
    return chain.name in ("INPUT", "OUTPUT") and len(rule.matches) == 1 and isinstance(rule.target, t.Accept)


def _place(address: TenantAddress) -> tuple[int, int]:
    return address.family, address.value >> (16 if address.family == 4 else 80)


_PRIVATE = tuple(
    tenant_address(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)


def _is_private(address: TenantAddress) -> bool:
    return any(p.family == address.family and address.value & p.mask == p.value for p in _PRIVATE)


def _plain(address: TenantAddress) -> str:
    text = str(address)
    return text.removesuffix("/32").removesuffix("/128")


def _label(comments: Iterable[str]) -> str:
    for comment in comments:
        for pattern in _LABELS:
            found = pattern.search(comment)
            if found:
                return f"{found['space']}/{_short(found['name'])}"
    return ""


def _short(name: str) -> str:
    return _CONTAINER_ID.sub(r"\1", name)


def _networks(dump: Dump) -> tuple[Tenant, ...]:
    """The bridges that rules forward for, each with the prefix that is used together with it."""
    forwarding: dict[str, None] = {}  # in the order of the dump
    prefixes: dict[str, Counter[TenantAddress]] = {}
    wildcards: set[str] = set()
    for ruleset in dump.rulesets:
        for _, chain, rule in ruleset.rules():
            sides: dict[str, str] = {}
            for match in rule.matches:
                if isinstance(match, m.Interface) and match.name and not match.negated:
                    if match.wildcard:
                        wildcards.add(match.name)
                    else:
                        sides["src" if match.direction == "in" else "dst"] = match.name
            if chain.name not in ("INPUT", "OUTPUT"):
                forwarding.update(dict.fromkeys(sides.values()))
            for match in rule.matches:
                if isinstance(match, m.Address) and not match.negated and match.side in sides:
                    known = prefixes.setdefault(sides[match.side], Counter())
                    known[TenantAddress(ruleset.family, match.value, match.mask)] += 1
    # A name of no known kind counts as a network when a wildcard of the host spans it.
    bridges = [
        name
        for name in forwarding
        if name not in IDLE_BRIDGES
        and (
            kind(name) is Kind.BRIDGE
            or (kind(name) is Kind.UNKNOWN and any(name.startswith(stem) for stem in wildcards))
        )
    ]
    if len(bridges) < 2:
        return ()
    return tuple(
        Tenant(name, (name,), tuple(prefixes[name]) if len(prefixes.get(name, ())) == 1 else (), why=_NETWORK)
        for name in bridges
    )


_NETWORK = "a network with rules of its own"
