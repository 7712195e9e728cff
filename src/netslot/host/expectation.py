"""What a slot of a class should look like, learnt from one that was just built; and in words, what is otherwise.

Compared are the states of :mod:`netslot.host.links`, or the kernel's bytes where slots are alike.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import TypeVar

from netslot.host.likeness import Likeness
from netslot.host.links import DISABLE6, ROOT_IPV4, Answers, State, packed, root_group, root_state_of, state_of
from netslot.host.plan import SlotPlan
from netslot.host.wiring import METRIC
from netslot.kernel import rtnetlink as rt
from netslot.kernel import steady

T = TypeVar("T", rt.AddressRecord, rt.RouteRecord, rt.NeighbourRecord)


class Expectation:
    """What a slot of one class should look like, learnt from a slot that was just built.

    So nothing is assumed about which routes this kernel adds for an address. ``sample`` is the slot's plan,
    ``slot`` and ``root`` what was read inside it and of root's end; another slot's expectation is the same with
    that slot's own values.
    """

    def __init__(self, sample: SlotPlan, slot: State, root: State) -> None:
        self._own = _own_values(sample)
        self._tag, self._root_if, self._metric = sample.tag, sample.root_if, METRIC + sample.number
        self._slot, self._root = _Part(slot, self._own), _Part(root, self._own)
        # Of root's sysctls some are netslot's; the bytes between them merely send a link to the full comparison.
        self._alike = Likeness(steady.views())
        self._alike_root = Likeness(steady.views(index=False, ipv4_conf=ROOT_IPV4, ipv6_conf=DISABLE6))

    def slot_drift(self, plan: SlotPlan, answers: Answers) -> list[tuple[str, str]]:
        """(where, what) of everything that is otherwise in the slot, whose answers to :func:`ask` are given."""
        own = _marks(plan)[1:]  # root's end may be called as some link in the slot is
        if self._alike.holds(own, answers.all()):
            return []
        found, wanted = state_of(answers, plan), self.slot(plan)
        if found != wanted:
            return list(differences(wanted, found))
        self._alike.learn(own, answers.all())
        return []

    def root_drift(self, plan: SlotPlan, answers: Answers) -> list[tuple[str, str]]:
        """As :meth:`slot_drift`, of root's end of the link."""
        own = _marks(plan)
        if self._alike_root.holds(own, answers.all()):
            return []
        found, wanted = root_state_of(answers), self.root(plan)
        if found != wanted:
            return list(differences(wanted, found))
        self._alike_root.learn(own, answers.all())
        return []

    def slot(self, plan: SlotPlan) -> State:
        """What the slot of ``plan`` holds when nothing drifted."""
        return self._of(plan, self._slot, {})

    def root(self, plan: SlotPlan) -> State:
        """What root's end of the link of ``plan`` is when nothing drifted, as :func:`read_root` has it."""
        state = self._of(plan, self._root, {self._root_if: plan.root_if})
        return state._replace(links={i: each._replace(group=root_group(plan)) for i, each in state.links.items()})

    def _of(self, plan: SlotPlan, part: _Part, names: Mapping[str, str]) -> State:
        change = dict(zip(self._own, _own_values(plan), strict=True))
        get = change.get
        links = {
            index: link._replace(
                name=names.get(link.name, link.name),
                alias=plan.tag if link.alias == self._tag else link.alias,
                mac=_mac(link.mac, change),
            )
            for index, link in part.state.links.items()
        }
        return State(
            links,
            part.addresses | {record._replace(address=get(record.address, b"")) for record in part.own_addresses},
            part.routes
            | {
                record._replace(
                    destination=get(record.destination, record.destination),
                    gateway=get(record.gateway, record.gateway),
                    metric=METRIC + plan.number if record.metric == self._metric else record.metric,
                )
                for record in part.own_routes
            },
            frozenset(
                record._replace(address=get(record.address, record.address), mac=_mac(record.mac, change))
                for record in part.state.neighbours
            ),
        )


class _Part:
    """A state, with what is the same in every slot apart from what holds the slot's own addresses."""

    def __init__(self, state: State, own: list[bytes]) -> None:
        values = set(own)
        self.state = state
        self.own_addresses = [record for record in state.addresses if record.address in values]
        self.addresses = state.addresses - set(self.own_addresses)
        self.own_routes = [record for record in state.routes if {record.destination, record.gateway} & values]
        self.routes = state.routes - set(self.own_routes)


@functools.lru_cache(maxsize=1)
def _marks(plan: SlotPlan) -> list[bytes]:
    """What the kernel's answers say of the slot's own: names, tag, addresses and MACs, the group of root's end."""
    group = root_group(plan).to_bytes(4, sys.byteorder)
    return [f"{plan.root_if}\0".encode(), f"{plan.tag}\0".encode(), *_own_values(plan), group]


def _own_values(plan: SlotPlan) -> list[bytes]:
    """The packed addresses and MACs that differ from slot to slot, always in the same order."""
    values, resident = plan.values, plan.resident
    own = [rt.mac_bytes(values["root_mac"]), rt.mac_bytes(values["uplink_mac"])]
    if resident is not None:
        own += [each.network_address.packed for each in resident.addresses]
        own += [each.packed for each in resident.gateways]
        own += [rt.mac_bytes(resident.mac)] if resident.mac is not None else []
        return [*own, (METRIC + plan.number).to_bytes(4, sys.byteorder)]
    own += [packed(values["root_address"]), packed(values["address"])]
    if plan.ipv6:
        own += [packed(values["root_address6"]), packed(values["address6"])]
        own.append(packed(values["network6"].partition("/")[0]))
    return own


def _mac(mac: str, change: Mapping[bytes, bytes]) -> str:
    raw = rt.mac_bytes(mac)
    return change.get(raw, raw).hex(":")


def differences(wanted: State, found: State) -> Iterator[tuple[str, str]]:
    """(where, what) for everything in which ``found`` is not ``wanted``."""
    names = {index: link.name for index, link in {**found.links, **wanted.links}.items()}
    for index in sorted(wanted.links.keys() | found.links.keys()):
        expected, actual = wanted.links.get(index), found.links.get(index)
        where = f"link {names[index]}"
        if actual is None:
            yield where, "missing"
        elif expected is None:
            yield where, "not the slot's"
        else:
            for field in rt.Link._fields:
                if getattr(expected, field) != getattr(actual, field):
                    yield where, _changed(field, getattr(expected, field), getattr(actual, field))
    for address, verb in _two_ways(wanted.addresses, found.addresses):
        shown = f"{_shown(address.address)}/{address.prefix_length}"
        yield f"link {names.get(address.link, address.link)}", f"address {shown} {verb}"
    for route, verb in _two_ways(wanted.routes, found.routes):
        target = f"{_shown(route.destination)}/{route.prefix_length}" if route.destination else "default"
        via = f" via {_shown(route.gateway)}" if route.gateway else ""
        yield f"route table {route.table}", f"{target}{via} dev {names.get(route.link, route.link)} {verb}"
    for entry, verb in _two_ways(wanted.neighbours, found.neighbours):
        yield f"link {names.get(entry.link, entry.link)}", f"neighbour {_shown(entry.address)} {entry.mac} {verb}"


def _two_ways(wanted: frozenset[T], found: frozenset[T]) -> Iterator[tuple[T, str]]:
    yield from ((record, "missing") for record in sorted(wanted - found))
    yield from ((record, "not the slot's") for record in sorted(found - wanted))


def _shown(raw: bytes) -> str:
    return str(ip_address(raw)) if len(raw) in (4, 16) else raw.hex()


_SETTINGS = {"ipv4_conf": "an IPv4 sysctl (net.ipv4.conf.*)", "ipv6_conf": "an IPv6 sysctl (net.ipv6.conf.*)"}


def _changed(field: str, expected: object, actual: object) -> str:
    if field in _SETTINGS:
        assert isinstance(expected, bytes)
        assert isinstance(actual, bytes)
        places = range(0, len(expected), 4)
        numbers = ", ".join(str(at // 4 + 1) for at in places if expected[at : at + 4] != actual[at : at + 4])
        return f"{_SETTINGS[field]} changed: number {numbers} of the kernel's devconf"
    if field == "xdp":
        return "an XDP program is attached" if actual else "the XDP program is gone"
    if field == "up":
        return "down" if expected else "up"
    if field == "flags":
        return f"flags are {actual:#x}, not {expected:#x} (0x80 noarp, 0x100 promisc, 0x200 allmulti)"
    return f"{field} is {actual}, not {expected}"
