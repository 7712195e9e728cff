"""The interfaces and addresses of the host that its rules name: those are told apart, all others are alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from netslot.rulesets import matches as m
from netslot.rulesets.model import Family, Rule, Ruleset
from netslot.rulesets.values import ALL_ONES

_NAME_LENGTH = 15


@dataclass
class NamedLinks:
    """``exact``: names that are written out. ``stems``: the ``eth`` of ``eth+``, and whether any rule asks for it as
    the way out."""

    exact: dict[str, None] = field(default_factory=dict)
    stems: dict[str, bool] = field(default_factory=dict)

    def samples(self, links: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A link for each wildcard, of a name that nobody wrote: those that packets may leave by, and the others.

        None for wildcards that name tenants' ``links``: all links that are called so are taken to be tenants'.
        """
        leaving: list[str] = []
        entering: list[str] = []
        for stem, out in self.stems.items():
            if not any(link.startswith(stem) for link in links):
                (leaving if out else entering).append(self._fresh(stem, links))
        return tuple(leaving), tuple(entering)

    def stems_of(self, links: Collection[str]) -> tuple[str, ...]:
        """The wildcards that name tenants' links."""
        return tuple(stem for stem in self.stems if any(link.startswith(stem) for link in links))

    def _fresh(self, stem: str, links: Collection[str]) -> str:
        longer = [other for other in self.stems if other != stem and other.startswith(stem)]
        for number in range(1000):
            name = f"{stem[: _NAME_LENGTH - 3]}{number}" if len(stem) > _NAME_LENGTH - 3 else f"{stem}{number}"
            if name not in self.exact and name not in links and not any(map(name.startswith, longer)):
                return name
        return stem


def named_links(rulesets: Iterable[Ruleset]) -> NamedLinks:
    """The interfaces that rules ask for with -i and -o."""
    found = NamedLinks()
    for ruleset in rulesets:
        for _, _, rule in ruleset.rules():
            for match in rule.matches:
                if not isinstance(match, m.Interface):
                    continue
                if match.wildcard:
                    found.stems[match.name] = found.stems.get(match.name, False) or match.direction == "out"
                else:
                    found.exact.setdefault(match.name)
    return found


def asked_for_in_input(ruleset: Ruleset) -> Iterator[tuple[int, str, Rule]]:
    """A rule of INPUT whose destination is one address names an address of the host: that, and the link, if any."""
    for _, chain, rule in ruleset.rules():
        if chain.name != "INPUT":
            continue
        value, link = None, ""
        for match in rule.matches:
            if (
                isinstance(match, m.Interface)
                and match.direction == "in"
                and not match.negated
                and not match.wildcard
            ):
                link = match.name
            elif isinstance(match, m.Address) and match.side == "dst" and not match.negated:
                value = match.value if match.mask == ALL_ONES[ruleset.family] else None
        if value is not None and not is_no_address(value, ruleset.family):
            yield value, link, rule


def is_no_address(value: int, family: Family) -> bool:
    """Multicast, broadcast or loopback: delivered to the host, but no address of its links."""
    if family == 6:
        return value >> 120 == 0xFF or value == 1
    return value >> 28 >= 0xE or value >> 24 == 127
