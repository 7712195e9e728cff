"""The ways that packets can take between representatives of the classes of tenants.

Every packet that meets the host's rules takes one of these ways, up to a renaming of tenants: from a tenant, from
outside or from the host itself; to a tenant, to the host or out; with the sender's own source address, with
another tenant's, or with nobody's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from netslot.rulesets.proof.journey import Way
from netslot.rulesets.proof.places import NOBODY, Places

STRANGER = "unnamed0"
"""An interface that no rule names: packets may come in by it."""


@dataclass(frozen=True, slots=True)
class Cast:
    """``first`` of each class, ``second`` where the class has another member, and ``last``, in the dump's order."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    last: tuple[int, ...]

    def extremes(self, one: int, other: int) -> tuple[int, int]:
        """Members of the classes of both, of which the one is as early as there is and the other as late."""
        return self.first[self._class_of(one)], self.last[self._class_of(other)]

    def foremost(self, tenant: int) -> int:
        """The first of this tenant's class; of nobody, nobody."""
        return tenant if tenant == NOBODY else self.first[self._class_of(tenant)]

    def _class_of(self, tenant: int) -> int:
        members = zip(self.first, self.second, self.last, strict=True)
        return next(place for place, people in enumerate(members) if tenant in people)

    def partners(self, tenant: int) -> list[int]:
        """One tenant of each class, other than this one."""
        found = []
        for one, other in zip(self.first, self.second, strict=True):
            partner = one if one != tenant else other
            if partner not in (tenant, NOBODY):
                found.append(partner)
        return found


def cast(classes: Sequence[int], rank: Sequence[int] | None = None) -> Cast:
    """Choose the representatives. ``rank``: where each tenant's rules begin, if that is not in the tenants' order."""
    first: dict[int, int] = {}
    second: dict[int, int] = {}
    last: dict[int, int] = {}
    order = range(len(classes)) if rank is None else sorted(range(len(classes)), key=rank.__getitem__)
    for tenant in order:
        number = classes[tenant]
        last[number] = tenant
        if number not in first:
            first[number] = tenant
        else:
            second.setdefault(number, tenant)
    return Cast(
        tuple(first.values()),
        tuple(second.get(number, NOBODY) for number in first),
        tuple(last[number] for number in first),
    )


def from_tenant(tenant: int, players: Cast, places: Places, spoofing: bool) -> Iterator[Way]:
    """All ways from one tenant; with ``spoofing`` also under addresses that are not its own.

    From a tenant without a link of its own there are none: it may be behind any interface, and ``others`` come in
    by each of them under each address.
    """
    link = places.link(tenant)
    if not link:
        return
    partners = players.partners(tenant)
    sources = [tenant, NOBODY, *partners] if spoofing else [tenant]
    for source in sources:
        for out in places.outside:
            yield Way(link, out, tenant, NOBODY, source)
        yield Way(link, places.outside[0], tenant, NOBODY, source, local=True)
        for receiver in [tenant, *partners]:
            yield from _to(link, tenant, receiver, source, places)
        yield Way(link, places.outside[0], tenant, tenant, source, hairpin=True)


def others(players: Cast, places: Places) -> Iterator[Way]:
    """All ways that do not begin at a tenant."""
    entries = [*places.outside, "lo", *places.strangers, STRANGER]
    sources = [NOBODY, *players.first]
    for entry in entries:
        for source in sources:
            yield Way(entry, places.outside[0], NOBODY, NOBODY, source, local=True)
            if entry == "lo":
                continue
            for receiver in players.first:
                yield from _to(entry, NOBODY, receiver, source, places)
            for other in [p for p in players.partners(source) if source != NOBODY and p not in players.first]:
                yield from _to(entry, NOBODY, other, source, places)
            for out in [*places.outside, *places.strangers, STRANGER]:
                yield Way(entry, out, NOBODY, NOBODY, source)
    for receiver in players.first:
        yield from _to("", NOBODY, receiver, NOBODY, places)
    for out in [*places.outside, "lo", *places.strangers, STRANGER]:
        yield Way("", out, NOBODY, NOBODY, NOBODY, local=out == "lo")


def elsewhere(way: Way, players: Cast, places: Places) -> Iterator[Way]:
    """Where packets can go that come in as on this way: to the host, out, to a tenant of each class."""
    yield replace(way, receiver=NOBODY, local=True, hairpin=False)
    for out in {way.exit: None, **dict.fromkeys((*places.outside, STRANGER))}:
        yield replace(way, exit=out, receiver=NOBODY, local=False, hairpin=False)
    for receiver in dict.fromkeys((*players.first, *(p for p in players.second if p != NOBODY))):
        for other in _to(way.entry, way.sender, receiver, way.source, places):
            yield replace(other, hairpin=way.sender == receiver != NOBODY)


def _to(entry: str, sender: int, receiver: int, source: int, places: Places) -> Iterator[Way]:
    """To one tenant: by its own link, or by any interface that it may be behind."""
    exits = [places.outside[0]] if places.link(receiver) else [*places.inside, STRANGER]
    for out in exits:
        yield Way(entry, out, sender, receiver, source)
