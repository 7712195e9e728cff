"""A tenant's names as variables of a template, and all tenants' links and addresses as one pattern each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from netslot.rulesets import matches as m
from netslot.rulesets.model import Family
from netslot.rulesets.proof.places import Pattern, Places
from netslot.rulesets.values import ALL_ONES, network_text

GROUP = 0x5107
"""Group of slots' links where their names have no beginning of their own; classes follow it."""
NUMBERED = 0x5 << 28
"""The same where each link has a number in its group: 12 bits of class and 16 of number follow."""


@dataclass(frozen=True)
class Naming:
    """``stem``: what all tenants' links and no other interface begin with, '' if there is no such thing.

    ``numbers``: the number that each tenant's link has in its group, where root asks for these.
    """

    places: Places
    stem: str
    numbers: Mapping[int, int] = field(default_factory=dict)

    def link(self, direction: m.Direction) -> m.Match:
        """The condition that a packet comes from, or goes to, some slot."""
        if self.stem:
            return m.Interface(direction, self.stem, wildcard=True)
        return m.DevGroup(direction, NUMBERED, 0xF0000000) if self.numbers else m.DevGroup(direction, GROUP, 0xFFFF)

    def no_link(self, direction: m.Direction) -> m.Match:
        """The condition that a packet does not."""
        match = self.link(direction)
        assert isinstance(match, m.Interface | m.DevGroup)
        return replace(match, negated=True)

    def class_link(self, direction: m.Direction, kind: int) -> m.Match:
        """The same, for the slots of one class."""
        if self.numbers:
            return m.DevGroup(direction, NUMBERED | kind << 16, 0xFFFF0000)
        return m.DevGroup(direction, (kind + 1) << 16 | GROUP, 0xFFFFFFFF)

    def group(self, kind: int, tenant: int) -> int:
        """The group of the link of a tenant of this class: which class, and 'slot' or the link's number."""
        return NUMBERED | kind << 16 | self.numbers[tenant] if self.numbers else (kind + 1) << 16 | GROUP

    def pool(self, family: Family) -> Pattern | None:
        """The bits that all tenants' addresses share."""
        return self.places.pool(family)

    def variables(self, tenant: int) -> dict[str, str]:
        """The tenant's values: ``address``, ``address_2``, ..., ``gateway``, for IPv6 with a 6 behind the word."""
        found: dict[str, str] = {}
        for family in (4, 6):
            key: Family = 4 if family == 4 else 6
            for pattern, name in self.names(tenant, key).items():
                found[name] = network_text(*pattern, key)
        return found

    def names(self, tenant: int, family: Family) -> Mapping[Pattern, str]:
        """The variable for each of the tenant's addresses and gateways."""
        suffix = "" if family == 4 else "6"
        found: dict[Pattern, str] = {}
        own = [(a.value, a.mask) for a in self.places.addresses(tenant, family)]
        for word, patterns in (
            ("address", own),
            ("gateway", [(value, ALL_ONES[family]) for value in self.places.gateways[family][tenant]]),
        ):
            for number, pattern in enumerate(patterns, 1):
                found[pattern] = f"{word}{suffix}" + (f"_{number}" if number > 1 else "")
        return found


def name_links(places: Places) -> Naming:
    """Find what tenants' links begin with, and nothing else does."""
    links = [places.link(tenant) for tenant in range(len(places.tenants))]
    stem = links[0] if links else ""
    for name in links:
        while not name.startswith(stem):
            stem = stem[:-1]
    stem = stem.rstrip("0123456789") if len(links) > 1 or stem[-1:].isdigit() else stem
    others = [*places.outside, "lo"]
    if any(name.startswith(stem) for name in others):
        stem = ""
    return Naming(places, stem)
