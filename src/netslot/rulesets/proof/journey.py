"""The hooks of a packet's whole way through the host, before the split and after it.

Before:  root's hooks.
After:   the sending tenant's slot, the veth, root's hooks, the veth, the receiving tenant's slot.

Crossing a veth into another namespace clears the packet's mark and connection (skb_scrub_packet, net/core/skbuff.c)
and makes it a new frame. The order of tables at a hook is that of their priorities (linux/netfilter_ipv4.h):
raw -300, connection tracking -200, mangle -150, destination NAT -100, filter 0, security 50, source NAT 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from netslot.rulesets import targets as t
from netslot.rulesets.proof.conditions import has_connection, needs_translation
from netslot.rulesets.proof.flow import Flow
from netslot.rulesets.proof.places import NOBODY, Places, stays_on_link
from netslot.rulesets.proof.tagged import ANYBODY, FiledRuleset, Memory, Roles
from netslot.rulesets.proof.terms import Number, Truth, both, choose, either, equal, negate
from netslot.rulesets.proof.walker import Chooser, Ledger, Walker

Attachment = Literal["tap", "veth", "process"]

OWN_ADDRESS = "own address of"
"""How the unknown address is called that REDIRECT leads to: one of the host's."""

_RANDOM = frozenset(("--random", "--random-fully"))
"""Options with which the kernel chooses a source port by itself (nf_nat_l4proto_unique_tuple())."""

LOCAL = ""
"""Where a packet goes that is for the host itself."""


@dataclass(frozen=True, slots=True)
class Way:
    """Where a packet comes from and goes to.

    ``entry``: the interface of root that it comes in by, '' when the host makes it. ``exit``: the one it leaves
    by if it is neither for a tenant nor for the host. For a symbolic packet the others are said too: ``sender``
    and ``receiver`` (tenants or NOBODY), ``source`` (whose address it carries), ``local`` (it is for the host).
    ``as_ruled``: destinations of open connections were translated as the rules say now. ``hairpin``: from a tenant to
    itself, but under another address than its own.
    """

    entry: str
    exit: str
    sender: int = NOBODY
    receiver: int = NOBODY
    source: int = NOBODY
    local: bool = False
    dst_translated: bool = False
    src_translated: bool = False
    as_ruled: bool = False
    hairpin: bool = False


@dataclass(frozen=True)
class Slot:
    """One tenant's slot as instantiated: its rules, and the names of its interfaces."""

    name: str
    filed: FiledRuleset | None
    attachment: Attachment
    guest_if: str
    uplink_if: str


@dataclass(frozen=True)
class Side:
    """One of the two arrangements. ``slot_of`` is None before the split, and for a tenant that has no slot.

    ``own_memories``: those of the rules before the split, whose names mean nothing in slots.
    """

    root: FiledRuleset
    places: Places
    slot_of: Callable[[int], Slot | None] | None = None
    choose: Chooser | None = None
    own_memories: Mapping[Memory, int] = field(default_factory=dict)


NumberSource = Callable[[str, int, Number], Number]
"""Unknown numbers by name and width; the last argument is the answer where nothing is unknown."""


@dataclass(slots=True)
class Result:
    """What came of it. ``translations``: what was asked of NAT, and when. ``exit`` only for concrete packets.

    ``routed``: when it came as far as root's routing, and ``routed_mark`` with which mark.

    ``connection_marks``: what each namespace remembers, by place.
    """

    ledger: Ledger
    flow: Flow
    translations: dict[str, Truth] = field(default_factory=dict)
    routed: Truth = False
    routed_mark: Number = 0
    exit: str | None = None
    connection_marks: dict[str, Number] = field(default_factory=dict)


class Journey:
    """Takes one packet along one way on one side."""

    def __init__(self, side: Side, way: Way, number: NumberSource, trace: bool = False) -> None:
        self._side = side
        self._way = way
        self._number = number
        self._ledger = Ledger(trace=[] if trace else None)
        self._connection_marks: dict[str, Number] = {}

    def travel(self, flow: Flow) -> Result:
        """The whole way. ``flow`` is used up."""
        places, way = self._side.places, self._way
        result = Result(self._ledger, flow, connection_marks=self._connection_marks)
        sender = places.link_owner.get(way.entry, NOBODY)
        flow.frame = f"from {way.entry}"
        slot = self._slot_of(sender)
        if slot is not None:
            if self._turns_round(flow, sender):
                self._slot(flow, slot, outward=True, back=True)
                result.exit = way.entry if isinstance(flow.dst, int) else None
                return result
            self._slot(flow, slot, outward=True)
            if slot.attachment != "process":  # whose link to root is the one that it had
                flow.frame = f"from slot {way.entry}"
        flow.mark, flow.tracked, flow.place = 0, True, "root"
        self._root(flow, result)
        self._connection_marks["root"] = flow.ctmark
        receiver = way.receiver
        if result.exit is not None:
            receiver = places.link_owner.get(result.exit, NOBODY)
        slot = self._slot_of(receiver)
        if slot is not None and self._ledger.alive is not False:
            inner = flow.copy()
            inner.frame, inner.mark, inner.tracked = f"into {receiver}", 0, True
            self._slot(inner, slot, outward=False)
        return result

    def _slot_of(self, tenant: int) -> Slot | None:
        return None if self._side.slot_of is None or tenant == NOBODY else self._side.slot_of(tenant)

    def first_step(self, flow: Flow) -> Ledger:
        """Only what comes before address translation, in the slot or else in root: where spoofing is stopped."""
        sender = self._side.places.link_owner.get(self._way.entry, NOBODY)
        flow.frame, flow.iif = f"from {self._way.entry}", self._way.entry
        slot = self._slot_of(sender)
        if slot is not None and slot.filed is not None:
            process = slot.attachment == "process"
            flow.place = f"slot:{slot.name}"
            flow.iif, flow.oif = ("", slot.uplink_if) if process else (slot.guest_if, "")
            walk = Walker(slot.filed, self._side.places, self._ledger, own_memories=self._side.own_memories)
            for table in ("raw", "mangle"):
                walk.hook(table, "OUTPUT" if process else "PREROUTING", flow, {})
            flow.iif, flow.oif, flow.mark, flow.place = self._way.entry, "", 0, "root"
        walk = Walker(self._side.root, self._side.places, self._ledger, own_memories=self._side.own_memories)
        for table in ("raw", "mangle"):
            walk.hook(table, "PREROUTING", flow, self._roles(flow, routed=False))
        return self._ledger

    def _turns_round(self, flow: Flow, sender: int) -> bool:
        """A tenant's packet to its own address: its slot sends it straight back, and root never sees it."""
        if isinstance(flow.dst, int):
            return self._side.places.is_tenants(flow.dst, sender, flow.family) is True
        return self._way.receiver == sender and not self._way.hairpin

    def _root(self, flow: Flow, result: Result) -> None:
        way, places = self._way, self._side.places
        walk = Walker(self._side.root, places, self._ledger, self._side.choose, self._side.own_memories)
        hook = "PREROUTING" if way.entry else "OUTPUT"
        flow.iif = way.entry
        if way.entry:
            self._early(walk, flow, result, hook)
            receiver, local = self._route(flow)
            flow.oif = "" if local else self._exit(receiver)
        else:
            receiver, local = self._route(flow)
            flow.oif = "lo" if local else self._exit(receiver)
            self._early(walk, flow, result, hook)
            receiver, local = self._route(flow)
        leaves_by = flow.oif if way.entry else "lo" if local else self._exit(receiver)
        result.routed, result.routed_mark = self._ledger.alive, flow.mark
        if isinstance(flow.dst, int) and isinstance(flow.src, int):
            result.exit = LOCAL if local else leaves_by
        if way.entry and not local:
            flow.ttl = flow.ttl - 1
        middle = "OUTPUT" if not way.entry else "INPUT" if local else "FORWARD"
        for table in ("mangle", "filter", "security"):
            if not (table == "mangle" and middle == "OUTPUT"):
                walk.hook(table, middle, flow, self._roles(flow, routed=True))
        if way.entry and local:
            self._translate(walk, "INPUT", flow, result, "src")
            return
        flow.oif = leaves_by  # OUTPUT's rules all saw the first way, also of what one of them translated
        walk.hook("mangle", "POSTROUTING", self._leaving(flow), self._roles(flow, routed=True))
        self._translate(walk, "POSTROUTING", self._leaving(flow), result, "src")

    def _exit(self, receiver: int) -> str:
        return (self._side.places.link(receiver) if receiver != NOBODY else "") or self._way.exit

    def _leaving(self, flow: Flow) -> Flow:
        """At POSTROUTING rules cannot ask for the input interface."""
        flow.iif = ""
        return flow

    def _early(self, walk: Walker, flow: Flow, result: Result, hook: str) -> None:
        walk.hook("raw", hook, flow, self._roles(flow, routed=not self._way.entry))
        walk.hook("mangle", hook, flow, self._roles(flow, routed=not self._way.entry))
        self._translate(walk, hook, flow, result, "dst")

    def _route(self, flow: Flow) -> tuple[int, bool]:
        """The receiving tenant, and whether the packet is for the host."""
        places = self._side.places
        if isinstance(flow.dst, int) and isinstance(flow.src, int):
            owner = places.owner_of(flow.dst, (1 << flow.width) - 1, flow.family)
            here = places.is_local(flow.dst, flow.family)
            if self._way.entry:
                here = here or stays_on_link(flow.dst, flow.family)
            return owner, owner == NOBODY and here is True
        return self._way.receiver, self._way.local

    def _roles(self, flow: Flow, routed: bool) -> Roles:
        way, places = self._way, self._side.places
        owner = places.link_owner.get
        into = frozenset((owner(flow.iif, NOBODY),))
        out = frozenset((owner(flow.oif, NOBODY),))
        if isinstance(flow.dst, int) and isinstance(flow.src, int):
            ones = (1 << flow.width) - 1
            src = frozenset((places.owner_of(flow.src, ones, flow.family),))
            dst = frozenset((places.owner_of(flow.dst, ones, flow.family),))
            return {"in": into, "out": out, "src": src, "dst": dst, "to": ANYBODY}
        src, dst = frozenset((way.source,)), frozenset((way.receiver,))
        return {"in": into, "out": out if routed else frozenset(), "src": src, "dst": dst, "to": dst}

    def _translate(self, walk: Walker, hook: str, flow: Flow, result: Result, what: Literal["src", "dst"]) -> None:
        """The nat table's hook for the first packet of a connection; what that decided for later ones."""
        ledger, first = self._ledger, needs_translation(flow)
        if what == "dst" and self._way.as_ruled:
            first = either(first, both(has_connection(flow), equal(flow.reply, 0)))
        before = ledger.alive
        ledger.alive = both(before, first)
        actions = walk.hook("nat", hook, flow, self._roles(flow, routed=hook not in ("PREROUTING",)))
        ledger.alive = either(ledger.alive, both(before, negate(first)))
        later = both(negate(first), has_connection(flow))
        translated = self._way.dst_translated if what == "dst" else self._way.src_translated
        old = (flow.dst, flow.dport) if what == "dst" else (flow.src, flow.sport)
        address, port = old
        if translated:
            address = choose(later, self._number(f"tracked {what} {hook}", flow.width, old[0]), address, flow.width)
            port = choose(later, self._number(f"tracked port {what} {hook}", 16, old[1]), port, 16)
        for when, target, _ in actions:
            name, new_address, new_port = self._translation(target, flow, old)
            result.translations[name] = either(result.translations.get(name, False), when)
            address = choose(when, new_address, address, flow.width)
            port = choose(when, new_port, port, 16)
        if what == "dst":
            with_ports = either(equal(flow.proto, 6), equal(flow.proto, 17))
            kept = both(equal(address, old[0]), either(equal(port, old[1]), negate(with_ports)))
            forth = both(has_connection(flow), equal(flow.reply, 0))  # of a reply it is SNAT that is taken back
            flow.redirected = either(flow.redirected, both(forth, negate(kept)))
            flow.dst, flow.dport = address, port
        else:
            flow.src, flow.sport = address, port

    def _translation(self, target: t.Target, flow: Flow, old: tuple[Number, Number]) -> tuple[str, Number, Number]:
        """A name that is the same for the same translation, the new address, the new port.

        Without a port DNAT keeps the packet's (nf_nat_l4proto_unique_tuple()), so a port of its own is not in the
        name: whether it is another one is seen by the packet.
        """
        if isinstance(target, t.Netmap):
            address = (old[0] & (~target.mask & ((1 << flow.width) - 1))) | target.value
            return f"NETMAP {target.value:x}/{target.mask:x}", address, old[1]
        assert isinstance(target, t.Dnat | t.Snat | t.Masquerade | t.Redirect)
        to, kind = target.to, type(target).__name__
        where = flow.oif if kind == "Masquerade" else flow.iif if kind == "Redirect" else ""
        ports = to.ports if to.ports is not None and to.ports[0] != to.ports[1] else None  # one is what it comes to
        name = f"{kind} {where} {to.address} {ports} {to.base_port} {sorted(to.flags)}"
        if to.address is not None:
            low, high = to.address
            address = low if low == high else self._number(f"{name} address", flow.width, low)
        elif kind in ("Masquerade", "Redirect"):
            address = self._number(f"{OWN_ADDRESS if kind == 'Redirect' else 'address of'} {where}", flow.width, 0)
        else:
            address = old[0]
        if to.ports is None:
            chosen = kind in ("Snat", "Masquerade") and not to.flags.isdisjoint(_RANDOM)
            port = self._number(f"{name} port", 16, old[1]) if chosen else old[1]
        else:
            port = to.ports[0] if to.ports[0] == to.ports[1] else self._number(f"{name} port", 16, to.ports[0])
        return name, address, port

    def _slot(self, flow: Flow, slot: Slot, outward: bool, back: bool = False) -> None:
        """The hooks of one tenant's slot, on the way out of it or into it."""
        kept = (flow.iif, flow.oif, flow.ctmark)
        flow.place = f"slot:{slot.name}"
        flow.ctmark = self._number(f"connection mark in {flow.place}", 32, 0)
        process = slot.attachment == "process"
        if slot.filed is not None:
            walk = Walker(slot.filed, self._side.places, self._ledger, own_memories=self._side.own_memories)
            if outward:
                entry = "" if process else slot.guest_if
                leaving = slot.guest_if if back and not process else slot.uplink_if
                self._slot_hooks(walk, flow, entry, leaving, "OUTPUT" if process else "FORWARD")
            else:
                exit_ = "" if process else slot.guest_if
                self._slot_hooks(walk, flow, slot.uplink_if, exit_, "INPUT" if process else "FORWARD")
        elif not process:
            flow.ttl = flow.ttl - 1
        self._connection_marks[flow.place] = flow.ctmark
        flow.iif, flow.oif, flow.ctmark = kept

    def _slot_hooks(self, walk: Walker, flow: Flow, iif: str, oif: str, middle: str) -> None:
        everybody: Roles = {}
        flow.iif, flow.oif = iif, (oif if middle == "OUTPUT" else "")
        first = "OUTPUT" if middle == "OUTPUT" else "PREROUTING"
        actions = []
        walk.hook("raw", first, flow, everybody)
        walk.hook("mangle", first, flow, everybody)
        actions += walk.hook("nat", first, flow, everybody)
        flow.oif = oif
        if middle == "FORWARD":
            flow.ttl = flow.ttl - 1
        for table in ("mangle", "filter", "security"):
            if not (table == "mangle" and middle == "OUTPUT"):
                walk.hook(table, middle, flow, everybody)
        if middle == "INPUT":
            actions += walk.hook("nat", "INPUT", flow, everybody)
        else:
            flow.iif = ""
            walk.hook("mangle", "POSTROUTING", flow, everybody)
            actions += walk.hook("nat", "POSTROUTING", flow, everybody)
        for _, _, text in actions:
            self._ledger.unclear.setdefault(f"slot: {text}: address translation in a slot is not modelled")
