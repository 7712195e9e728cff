"""Slot rules that cannot work in a slot: their packet never comes there, or comes too late.

Root has routed a packet before the slot sees it, by its destination; the slot's links have names of their own;
marks do not cross from one namespace to another; and a guest's packets are forwarded, not sent, by the slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Final, TypeAlias

from netslot.host import rule_view
from netslot.host.lint_finding import LintFinding
from netslot.host.rule_view import RuleView, Span
from netslot.spec.model import UPLINK_INTERFACE, ClassSpec, HostSpec, RuleFile
from netslot.spec.render import render

Verdict: TypeAlias = tuple[str, str, bool]
"""Message, hint, fatal."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What there is in a slot of one class."""

    attachment: str
    guest: str | None
    """The interface to the workload."""
    uplink: str
    links: frozenset[str]
    own: Mapping[int, Sequence[Span]]
    """Destinations that root routes to the slot, by IP version; and multicast."""
    inner: Mapping[int, Span]
    """The workload's network."""
    marks_read: bool
    """A rule of ``[routes]`` chooses a table by mark."""

    @classmethod
    def of(cls, spec: HostSpec, each: ClassSpec, values: Mapping[str, str]) -> Slot:
        guest = each.guest_interface
        routes = each.routes
        tunnels = {tunnel.name for tunnel in routes.tunnels} if routes else set()
        own = {4: [_span("224.0.0.0/3")], 6: [_span("fe80::/10"), _span("ff00::/8")]}  # multicast, broadcast
        resident = spec.resident(spec.sample(each.name), each.name)
        if resident is not None:
            for address in resident.addresses:
                own[address.version].append(_span(str(address)))
        else:
            own[4].append(_span(values["address"]))
        if "network6" in values:
            own[6].append(_span(values["network6"]))
        elif resident is None:
            del own[6]
        names = {4: "guest_network", 6: "guest_network6"}
        inner = {version: _span(values[name]) for version, name in names.items() if name in values}
        return cls(
            attachment=each.attachment.kind,
            guest=guest,
            uplink=UPLINK_INTERFACE,
            links=frozenset({"lo", UPLINK_INTERFACE, *([guest] if guest else []), *tunnels}),
            own=own,
            inner=inner,
            marks_read=bool(routes and any(rule.mark is not None for rule in routes.rules)),
        )


def lint(file: RuleFile, values: Mapping[str, str], slot: Slot, *, is_nft: bool) -> list[LintFinding]:
    """What in a slot's rule file cannot work there, or is met by no packet."""
    text = render(file.text, values, file=file.name)
    views = rule_view.from_nft(text) if is_nft else rule_view.from_iptables(text, file.name)
    source = file.text.split("\n")
    found: list[LintFinding] = []
    for view in views:
        for check in _CHECKS:
            verdict = check(view, slot, views)
            if verdict is not None:
                message, hint, fatal = verdict
                found.append(LintFinding(file.name, view.line, source[view.line - 1].strip(), message, hint, fatal))
                break
    return found


def _span(text: str) -> Span:
    network = ip_network(text)
    return Span(int(network.network_address), int(network.broadcast_address))


def _links(view: RuleView, slot: Slot, _: list[RuleView]) -> Verdict | None:
    """Interfaces of root, or of nobody."""
    for name in (*view.inputs, *view.outputs):
        if not any(name.matches(link) for link in slot.links):
            there = ", ".join(sorted(slot.links))
            hint = f"a slot has {there}; ${{uplink_if}} leads to root and the outside. What is about root's own links"
            return f"there is no interface '{name.text}' in a slot", f"{hint} belongs in root's rules", True
    return None


def _published(view: RuleView, slot: Slot, _: list[RuleView]) -> Verdict | None:
    """A translation of a destination that root does not route to the slot."""
    from_root = any(name.matches(slot.uplink) for name in view.inputs)
    inner = slot.inner.get(view.version)
    to_guest = view.dnat_to is not None and inner is not None and view.dnat_to in inner
    if not view.is_dnat or "prerouting" not in view.hooks or not (from_root or (not view.inputs and to_guest)):
        return None
    wrong = _elsewhere(view, slot)
    if wrong is None:
        return None
    message = f"a packet to {wrong} never comes to this slot: root has chosen where it goes by then"
    hint = "publish on ${address}, the slot's own; a port of the host's address is translated in root, before routing"
    return message, hint, True


def _never_arrives(view: RuleView, slot: Slot, _: list[RuleView]) -> Verdict | None:
    """Other rules about packets from root to addresses that root does not route here. Drops do no harm."""
    if view.is_dnat or view.verdict == "drop" or not view.hooks or not view.hooks <= {"prerouting", "ingress"}:
        return None
    if not view.inputs or not all(name.matches(slot.uplink) and not name.wildcard for name in view.inputs):
        return None
    wrong = _elsewhere(view, slot)
    if wrong is None:
        return None
    message = f"a packet to {wrong} never comes to this slot from root"
    return message, "before translation a packet for this slot has the destination ${address}", False


def _elsewhere(view: RuleView, slot: Slot) -> str | None:
    """The rule's destination, if none of it is the slot's."""
    own = slot.own.get(view.version, ())
    if not view.destinations or view.destination_negated or not own:
        return None
    if any(mine.overlaps(span) for mine in own for span in view.destinations):
        return None
    lowest = view.destinations[0].low
    return str(IPv4Address(lowest) if view.version == 4 else IPv6Address(lowest))


def _mark(view: RuleView, slot: Slot, views: list[RuleView]) -> Verdict | None:
    """Marks end at the slot's edge: nobody outside reads them, and nobody outside set them."""
    if view.sets_mark and not slot.marks_read and not any(other.reads_mark for other in views):
        message = "nothing in the slot reads this mark, and the kernel clears it on the way to root"
        hint = "mark in root what root's routing depends on; for a table of the slot's own, add [[routes.rules]]"
        return message, hint, True
    if view.reads_mark and not view.restores_mark and not any(other.sets_mark for other in views):
        message = "nothing in the slot sets this mark, and marks from root are cleared on the way in"
        return message, "match what root marked for: address, port, or interface", False
    return None


def _bridge(view: RuleView, slot: Slot, _: list[RuleView]) -> Verdict | None:
    if view.physdev:
        return "a slot has no bridge, so no packet comes from a bridge's port", "match ${guest_if} instead", False
    return None


def _sent_by_guest(view: RuleView, slot: Slot, views: list[RuleView]) -> Verdict | None:
    """A ban in OUTPUT binds the slot's own programs; a guest's packets are forwarded."""
    if slot.guest is None or view.hooks != {"output"} or view.verdict != "drop" or not view.destinations:
        return None
    if view.destination_negated or _forbidden_when_forwarded(view, views):
        return None
    message = "a guest's packets are forwarded, so they never meet a rule in OUTPUT"
    return message, "write it in FORWARD, or in a chain that both FORWARD and OUTPUT jump to", True


def _forbidden_when_forwarded(view: RuleView, views: list[RuleView]) -> bool:
    return any(
        other.verdict == "drop"
        and other.version == view.version
        and other.hooks & {"forward", "prerouting"}
        and all(any(wide.covers(span) for wide in other.destinations) for span in view.destinations)
        for other in views
    )


def _forwarded_by_process(view: RuleView, slot: Slot, _: list[RuleView]) -> Verdict | None:
    if slot.attachment == "process" and view.hooks == {"forward"}:
        message = "a process sends from the slot itself, so its packets never meet a rule in FORWARD"
        return message, "write it in OUTPUT (what it sends) or INPUT (what it gets)", view.verdict == "drop"
    return None


_CHECKS: Final[tuple[Callable[[RuleView, Slot, list[RuleView]], Verdict | None], ...]] = (
    _links,
    _published,
    _never_arrives,
    _mark,
    _bridge,
    _sent_by_guest,
    _forwarded_by_process,
)
