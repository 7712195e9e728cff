"""Which packets can take a way: their addresses, how long they live, and in what state they can be."""

from __future__ import annotations

from collections.abc import Mapping

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Dump, Family, Rule, Ruleset
from netslot.rulesets.proof.flow import Flow
from netslot.rulesets.proof.journey import Result, Side, Way
from netslot.rulesets.proof.places import NOBODY, Places, is_group, is_loopback, stays_on_link
from netslot.rulesets.proof.terms import Truth, both, differ, either, equal, negate, within

_TRACKING = (
    *(m.CtState, m.CtStatus, m.CtDirection, m.CtAddress, m.CtPorts, m.CtProtocol, m.Connmark),
    *(t.Dnat, t.Snat, t.Masquerade, t.Redirect, t.Netmap, t.SetConnmark, t.SaveMark, t.RestoreMark, t.CtTarget),
)


class Limits:
    """The packets of one family's ways. ``after`` says who has a slot."""

    def __init__(self, places: Places, after: Side, family: Family) -> None:
        self._places, self._after, self._family = places, after, family

    def has_slot(self, tenant: int) -> bool:
        return tenant != NOBODY and self._after.slot_of is not None and self._after.slot_of(tenant) is not None

    def turned(self, way: Way) -> bool:
        """A tenant's packets to its own address, which its slot may turn round without root."""
        return way.sender == way.receiver != NOBODY and not way.hairpin and self.has_slot(way.sender)

    def of(self, way: Way, flow: Flow, before: Result, after: Result) -> list[Truth]:
        """A source that can come in there, a destination that routing sends that way, and a long enough life."""
        found = [*self._source(way, flow), *self._destination(way, flow, before, after), *self.ends(way, flow)]
        hops = (not way.local and bool(way.entry)) + self._forwards(way.sender) + self._forwards(way.receiver)
        found.append(within(flow.ttl, hops + 1, 255) if hops else True)
        return [limit for limit in found if limit is not True]

    def _forwards(self, tenant: int) -> bool:
        """Whether a slot of its own forwards the tenant's packets."""
        if tenant == NOBODY or self._after.slot_of is None:
            return False
        slot = self._after.slot_of(tenant)
        return slot is not None and slot.attachment != "process"

    def whose(self, way: Way, flow: Flow) -> list[Truth]:
        """Whose source address the packets of this way carry."""
        places, family = self._places, self._family
        if way.source != NOBODY:
            return [places.is_tenants(flow.src, way.source, family)]
        found = [negate(places.is_any_tenants(flow.src, family))]
        if way.sender == NOBODY and places.linked:
            found.append(negate(places.is_spare(flow.src, family)))
        return found

    def _source(self, way: Way, flow: Flow) -> list[Truth]:
        local = self._places.is_local(flow.src, self._family)
        if not way.entry:
            return [either(local, equal(flow.src, 0))]
        return [negate(local)] if way.entry != "lo" else []

    def parted(self, way: Way, before: Result, after: Result) -> Truth:
        """When the two sides route the packet to different places: each was walked as if it went ``way``."""
        apart = differ(self.goes(way, before), self.goes(way, after))
        return both(both(before.routed, after.routed), apart)

    def goes(self, way: Way, result: Result) -> Truth:
        """Whether the packet as translated is routed this way."""
        places, family, routed = self._places, self._family, result.flow.dst
        if way.receiver != NOBODY:
            return places.is_tenants(routed, way.receiver, family)
        here = places.is_local(routed, family)
        if not way.local:
            return negate(either(here, stays_on_link(routed, family) if way.entry else False))
        heard = bool(way.entry) and way.entry != "lo" and not self.has_slot(way.sender)
        return either(here, stays_on_link(routed, family)) if heard else here

    def _destination(self, way: Way, flow: Flow, before: Result, after: Result) -> list[Truth]:
        places, family = self._places, self._family
        foreign = negate(places.is_any_tenants(flow.dst, family))
        if way.receiver != NOBODY:
            asked = places.is_tenants(flow.dst, way.receiver, family)
            if way.hairpin:
                asked = False
            elif self.turned(way):
                foreign = False
            return [either(self.goes(way, before), self.goes(way, after)), either(asked, foreign)]
        return [negate(places.is_any_tenants(before.flow.dst, family)), self.goes(way, before), foreign]

    def ends(self, way: Way, flow: Flow) -> list[Truth]:
        """What routing lets come in or go out (ip_route_input_slow() and, for 0.0.0.0, __mkroute_output())."""
        family, src, dst = self._family, flow.src, flow.dst
        to_all = is_group(dst, family)
        found = [negate(is_group(src, family)), either(negate(equal(src, 0)), to_all), negate(equal(dst, 0))]
        inside = is_loopback(src, family), is_loopback(dst, family)
        if way.entry in ("", "lo"):
            found.append(either(negate(inside[0]), inside[1]))
        else:
            found += [negate(inside[0]), negate(inside[1])]
        if way.entry and (not way.local or self.has_slot(way.sender)):
            found.append(negate(to_all))
        return found


_SERVERS: Mapping[Family, tuple[int, ...]] = {4: (67,), 6: (547,)}
"""Ports of DHCP, whose clients have no address yet."""


def unheard(dump: Dump, places: Places) -> list[str]:
    """Rules that let in what tenants send to all: from a slot nothing of it comes as far as root."""
    return [
        f"'{rule.text}' of {chain.name} lets in what a tenant sends to all: that ends in the tenant's slot now, and "
        "the server that waits for it has to be there"
        for ruleset in dump.rulesets
        for _, chain, rule in ruleset.rules()
        if chain.name == "INPUT" and isinstance(rule.target, t.Accept) and _from_tenant_to_all(rule, places, ruleset)
    ][:3]


def _from_tenant_to_all(rule: Rule, places: Places, ruleset: Ruleset) -> bool:
    links = to_all = False
    for match in rule.matches:
        if isinstance(match, m.Interface) and match.direction == "in" and not match.negated:
            links = match.name in places.stems if match.wildcard else match.name in places.link_owner
        elif isinstance(match, m.Address) and match.side == "dst" and not match.negated:
            to_all = to_all or is_group(match.value, ruleset.family) is True
        elif isinstance(match, m.Ports) and match.side == "dst" and not match.negated:
            to_all = to_all or match.ranges in [((port, port),) for port in _SERVERS[ruleset.family]]
    return links and to_all


def tracks(ruleset: Ruleset) -> bool:
    """Whether any rule makes the kernel track connections, which puts fragments together before any rule."""
    return any(
        isinstance(rule.target, _TRACKING) or any(isinstance(match, _TRACKING) for match in rule.matches)
        for _, _, rule in ruleset.rules()
    )


def asks_for_fragments(ruleset: Ruleset) -> bool:
    return any(isinstance(match, m.Fragment) for _, _, rule in ruleset.rules() for match in rule.matches)
