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
from netslot.rulesets.interfaces import IDLE_BRIDGES, Kind, family_of, guest_of, kind
from netslot.rulesets.model import Chain, Dump, Family, Rule
from netslot.rulesets.tenants import Tenant, TenantAddress, tenant_address

Node = tuple[str, str | TenantAddress]  # ("if", name), ("ip", address), ("mac", text), ("chain", "table/name")

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
_SERVICE_CHAINS = re.compile(r"KUBE-(SVC|SEP|FW|XLB|EXT|SVL|SERVICES|NODEPORTS|EXTERNAL-SERVICES)\b")
_LABELS = (
    re.compile(r"POD name:(?P<name>\S+)\s+namespace: (?P<space>\S+)"),
    re.compile(r'name: "(?P<space>[^"]+)" id: "(?P<name>[^"]+)"'),
)


def discover(dump: Dump) -> tuple[Tenant, ...]:
    """Tenants in the order in which the dump first names them; empty when it shows none."""
    finder = _Finder(_kinds(dump))
    tables = [
        (ruleset.family, table, references(table)) for ruleset in dump.rulesets for table in ruleset.tables.values()
    ]
    for family, table, refs in tables:
        forwarded = reachable(table, ("FORWARD",))
        for chain, rule in table.rules():
            finder.look_at(family, chain, rule, chain.name in forwarded)
        for name, jumps in refs.items():
            finder.look_at_dispatch(table.chains[name], jumps)
    finder.add_populations()
    for _, table, refs in tables:
        finder.give_chains(table.name, refs)
        for chain in table.chains.values():
            finder.join_in_chain(table.name, chain)
    return finder.tenants() or _networks(dump)


def _kinds(dump: Dump) -> dict[str, Kind]:
    """The kind of every interface that a rule names. Three or more numbered names alike are guests'."""
    distinct = {id(x): x for ruleset in dump.rulesets for _, _, rule in ruleset.rules() for x in rule.matches}
    named = (x for x in distinct.values() if isinstance(x, m.Interface | m.Physdev) and not x.wildcard)
    kinds = {x.name: kind(x.name) for x in named}
    unknown = [name for name, found in kinds.items() if found is Kind.UNKNOWN]
    crowd = Counter(family_of(name) for name in unknown)
    for name in unknown:
        if family_of(name) and crowd[family_of(name)] >= 3:
            kinds[name] = Kind.GUEST
    return kinds


def is_host_sized(match: m.Address, family: Family) -> bool:
    """A /29 or smaller (IPv6: a /64 or smaller), and not an address that many hosts share."""
    smallest = _SMALLEST[family]
    return match.mask & smallest == smallest and not any(
        other.family == family and match.value & other.mask == other.value for other in _NOT_UNICAST
    )


class _Traces:
    """What one rule names, sorted by the part it plays."""

    __slots__ = ("dst", "in_bridge", "in_guest", "macs", "negated_src", "not_in", "out_bridge", "out_guest", "src")

    def __init__(self) -> None:
        self.src: TenantAddress | None = None
        self.dst: TenantAddress | None = None
        self.negated_src: TenantAddress | None = None
        self.in_guest = ""
        self.out_guest = ""
        self.in_bridge = ""
        self.out_bridge = ""
        self.not_in = ""
        self.macs: list[str] = []


_TELLING = (m.Address, m.Interface, m.Physdev, m.Mac)


class _Finder:
    def __init__(self, kinds: dict[str, Kind]) -> None:
        self._kinds = kinds
        self._parent: dict[Node, Node] = {}
        self._evidence: dict[Node, str] = {}
        self._order: dict[Node, int] = {}
        self._labels: dict[Node, str] = {}
        self._seen_src: set[TenantAddress] = set()
        self._seen_dst: set[TenantAddress] = set()
        self._traces: dict[Rule, _Traces] = {}
        self._known: dict[tuple[object, ...], _Traces | None] = {}

    # union-find: which traces are the same tenant

    def _root(self, node: Node) -> Node:
        parent = self._parent.setdefault(node, node)
        while parent != self._parent[parent]:
            self._parent[parent] = self._parent[self._parent[parent]]
            parent = self._parent[parent]
        return parent

    def _same(self, one: Node, other: Node) -> None:
        first, second = self._root(one), self._root(other)
        if first != second:
            self._parent[second] = first

    def _believe(self, node: Node, why: str) -> None:
        self._evidence.setdefault(node, why)
        self._order.setdefault(node, len(self._order))
        self._root(node)

    # first pass: evidence within one rule

    def look_at(self, family: Family, chain: Chain, rule: Rule, forwarded: bool) -> None:
        # A tenant's rules name the same few things over and over: each combination is looked at once.
        key = (
            *(id(match) for match in rule.matches if type(match) in _TELLING),
            id(rule.target) if isinstance(rule.target, t.Dnat) else type(rule.target),
            id(chain),
        )
        if key in self._known:
            traces = self._known[key]
            if traces is not None:
                self._traces[rule] = traces
            return
        traces = self._known[key] = self._collect(family, rule)
        if traces is None:
            return
        self._traces[rule] = traces
        src, dst = traces.src, traces.dst
        for name in (traces.in_guest, traces.out_guest):
            if name:
                self._believe(("if", name), "the interface of a guest")
                if guest_of(name):
                    self._same(("guest", guest_of(name)), ("if", name))
        pairs = ((src, traces.in_guest), (dst, traces.out_guest), (traces.negated_src, traces.in_guest))
        for address, interface in pairs:
            if address is not None and interface:
                self._bind(address, ("if", interface), "bound to a guest's interface")
        if src is not None and traces.macs:
            self._bind(src, ("mac", traces.macs[0]), "bound to a MAC")
        if src is not None and src == dst:
            self._believe(("ip", src), "translated for itself (hairpin)")
        elif src is not None and isinstance(rule.target, t.Masquerade | t.Snat):
            self._believe(("ip", src), "its source is translated")
        self._look_at_bridges(traces, rule)
        self._look_at_publication(family, chain, rule, traces)
        if src is not None and forwarded:
            self._seen_src.add(src)
        if dst is not None and forwarded:
            self._seen_dst.add(dst)

    def _bind(self, address: TenantAddress, other: Node, why: str) -> None:
        self._believe(("ip", address), why)
        self._same(other, ("ip", address))

    def _collect(self, family: Family, rule: Rule) -> _Traces | None:
        traces = _Traces()
        found = False
        for match in rule.matches:
            match match:
                case m.Address() if is_host_sized(match, family):
                    address = TenantAddress(family, match.value, match.mask)
                    if match.side == "src" and not match.negated:
                        traces.src = address
                    elif match.side == "src":
                        traces.negated_src = address
                    elif not match.negated:
                        traces.dst = address
                    found = True
                case m.Interface() | m.Physdev() if not match.wildcard:
                    found = self._interface(traces, match) or found
                case m.Mac():
                    traces.macs.append(match.address)
                    found = True
        return traces if found or isinstance(rule.target, t.Dnat) else None

    def _interface(self, traces: _Traces, match: m.Interface | m.Physdev) -> bool:
        what = self._kinds[match.name]
        if match.negated:
            if what is Kind.BRIDGE and match.direction == "in":
                traces.not_in = match.name
            return False
        if what is Kind.GUEST:
            if match.direction == "in":
                traces.in_guest = match.name
            else:
                traces.out_guest = match.name
        elif what is Kind.BRIDGE:
            if match.direction == "in":
                traces.in_bridge = match.name
            else:
                traces.out_bridge = match.name
        return what in (Kind.GUEST, Kind.BRIDGE)

    def _look_at_bridges(self, traces: _Traces, rule: Rule) -> None:
        if traces.src is not None and traces.in_bridge:
            self._believe(("ip", traces.src), "on a bridge")
        if traces.dst is not None and (traces.out_bridge or (traces.not_in and isinstance(rule.target, t.Drop))):
            self._believe(("ip", traces.dst), "on a bridge")

    def _look_at_publication(self, family: Family, chain: Chain, rule: Rule, traces: _Traces) -> None:
        """DNAT to a guest. What guests send to a name server or proxy is redirected too: that is no publication."""
        if not isinstance(rule.target, t.Dnat) or rule.target.to.address is None:
            return
        low, high = rule.target.to.address
        from_guest = traces.src is not None or traces.in_guest or traces.in_bridge
        port_53 = any(isinstance(x, m.Ports) and x.ranges == ((53, 53),) for x in rule.matches)
        if low != high or from_guest or _SERVICE_CHAINS.match(chain.name):
            return
        if port_53 and (rule.target.to.ports is None or traces.dst is not None):
            return
        address = TenantAddress(family, low, values.ALL_ONES[family])
        if is_host_sized(m.Address("dst", low, address.mask), family):
            self._believe(("ip", address), "a port is published to it")

    # second pass: evidence from jumps and from numbers

    def look_at_dispatch(self, chain: Chain, jumps: list[tuple[Chain, Rule]]) -> None:
        """``-s A -j CHAIN``, ``-d A -j CHAIN`` where every rule that jumps to CHAIN is about A."""
        if _SERVICE_CHAINS.match(chain.name):
            return
        about: set[TenantAddress | None] = set()
        for caller, rule in jumps:
            traces = self._traces.get(rule)
            if traces is None or _SERVICE_CHAINS.match(caller.name):
                return
            about.add(traces.src or traces.dst)
        if len(about) == 1 and None not in about:
            node: Node = ("ip", about.pop() or "")
            self._believe(node, f"has a chain of its own, {chain.name}")
            label = _label(rule.comment for _, rule in jumps)
            if label:
                self._labels[node] = label

    def add_populations(self) -> None:
        """Three or more addresses of one /16 (IPv6: /48) that are each source and destination; numbered names."""
        both = {address for address in self._seen_src & self._seen_dst if _is_private(address)}
        crowd = Counter(_place(address) for address in both)
        for traces in self._known.values():
            if traces is None:
                continue
            for address in (traces.src, traces.dst):
                if address is not None and address in both and crowd[_place(address)] >= 3:
                    self._believe(("ip", address), "one of many addresses with rules alike")

    def give_chains(self, table: str, refs: References) -> None:
        """A chain belongs to the trace that every jump to it names; chains below it belong to the same."""
        names = list(refs)
        for _ in range(3):
            for name in names:
                owners = {self._owner_of_jump(table, caller, rule) for caller, rule in refs[name]}
                owner = owners.pop() if len(owners) == 1 else None
                if owner is not None:
                    self._same(owner, ("chain", f"{table}/{name}"))

    def _owner_of_jump(self, table: str, caller: Chain, rule: Rule) -> Node | None:
        for node in self._nodes(rule):
            if node in self._evidence:
                return self._root(node)
        node = ("chain", f"{table}/{caller.name}")
        if node in self._parent and self._root(node) != node:
            return self._root(node)
        return None

    def _nodes(self, rule: Rule) -> Iterable[Node]:
        traces = self._traces.get(rule)
        if traces is not None:
            for name in (traces.in_guest, traces.out_guest):
                if name:
                    yield ("if", name)
            for address in (traces.src, traces.dst):
                if address is not None:
                    yield ("ip", address)

    def join_in_chain(self, table: str, chain: Chain) -> None:
        """In a tenant's own chain, an address bound to a MAC is the tenant's, and so is an allowed MAC."""
        node: Node = ("chain", f"{table}/{chain.name}")
        if node not in self._parent:
            return
        for rule in chain.rules:
            traces = self._traces.get(rule)
            if traces is not None and traces.macs:
                self._same(node, ("mac", traces.macs[0]))
                if traces.src is not None:
                    self._same(node, ("ip", traces.src))

    # the answer

    def tenants(self) -> tuple[Tenant, ...]:
        self._join_networks()
        groups: dict[Node, list[Node]] = {}
        for node in sorted(self._evidence, key=self._order.__getitem__):
            groups.setdefault(self._root(node), []).append(node)
        macs: dict[Node, list[str]] = {}
        for node in self._parent:
            if node[0] == "mac":
                macs.setdefault(self._root(node), []).append(str(node[1]))
        return tuple(self._tenant(nodes, macs.get(root, [])) for root, nodes in groups.items())

    def _join_networks(self) -> None:
        """A host inside a small network that is itself a trace is the same tenant."""
        addresses = [node[1] for node in self._evidence if isinstance(node[1], TenantAddress)]
        masks = {(address.family, address.mask) for address in addresses}
        known = set(addresses)
        for address in addresses:
            for family, mask in masks:
                wider = TenantAddress(family, address.value & mask, mask)
                if family == address.family and wider != address and mask < address.mask and wider in known:
                    self._same(("ip", wider), ("ip", address))

    def _tenant(self, nodes: list[Node], macs: list[str]) -> Tenant:
        interfaces = tuple(str(node[1]) for node in nodes if node[0] == "if")
        addresses = tuple(node[1] for node in nodes if isinstance(node[1], TenantAddress))
        label = next((self._labels[node] for node in nodes if node in self._labels), "")
        guest = guest_of(interfaces[0]) if len(interfaces) > 1 else ""
        taps = [name for name in interfaces if name.startswith("tap")] or list(interfaces)
        name = label or (taps[0] if taps else _plain(addresses[0]))
        if guest.startswith("guest"):
            name = guest
        return Tenant(name, interfaces, addresses, tuple(dict.fromkeys(macs)), why=self._evidence[nodes[0]])


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
                return f"{found['space']}/{found['name']}"
    return ""


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
