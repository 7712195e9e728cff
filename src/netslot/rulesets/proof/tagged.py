"""A ruleset filed by the tenants that its rules name, so that a question looks only at rules that can matter.

A rule is *tagged* with what a packet must be for the rule to match: come in by tenant 7's link, come from its
address, go out by its link, go to its address. Tags are read from positive, exact conditions only, so that a
rule left out because of a tag can never have matched: the proof loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Chain, Rule, Ruleset
from netslot.rulesets.proof.places import NOBODY, Places
from netslot.rulesets.values import ALL_ONES

Role = Literal["in", "out", "src", "dst", "to"]
Tag = tuple[Role, int]
Tags = frozenset[Tag]
Roles = Mapping[Role, frozenset[int]]
"""Which tenants can play the role in the packets in question; a missing role is open to nobody."""

NONE: Tags = frozenset()
ANYBODY: frozenset[int] = frozenset((-2,))
"""For the role ``to``: rules are not left out for whom they translate to."""


@dataclass(frozen=True, slots=True)
class Filed:
    """A rule with its place in the chain and the number of untagged rules before it."""

    position: int
    segment: int
    rule: Rule
    tags: Tags

    @property
    def tenant(self) -> int:
        return min((who for _, who in self.tags), default=NOBODY)


Memory = tuple[str, str]
"""The module, and the name that rules give."""


class Tagger:
    """Tags of matches, remembered by the match object, which rules that say the same share."""

    def __init__(self, places: Places, family: int) -> None:
        self._places = places
        self._family: Literal[4, 6] = 4 if family == 4 else 6
        self._known: dict[m.Match, Tag | None] = {}

    def tags(self, rule: Rule) -> Tags:
        found = []
        for match in rule.matches:
            kind = type(match)
            if kind is m.Address or kind is m.Interface:
                tag = self._tag(match)
                if tag is not None:
                    found.append(tag)
        target = rule.target
        if type(target) is t.Dnat and target.to.address is not None:
            low, high = target.to.address
            if low == high:
                who = self._places.owner_of(low, ALL_ONES[self._family], self._family)
                if who != NOBODY:
                    found.append(("to", who))
        return frozenset(found) if found else NONE

    def _tag(self, match: m.Match) -> Tag | None:
        try:
            return self._known[match]
        except KeyError:
            tag = self._known[match] = self._find(match)
            return tag

    def _find(self, match: m.Match) -> Tag | None:
        if isinstance(match, m.Interface):
            if match.negated or match.wildcard:
                return None
            who = self._places.link_owner.get(match.name, NOBODY)
            return None if who == NOBODY else (match.direction, who)
        if isinstance(match, m.Address) and not match.negated:
            who = self._places.owner_of(match.value, match.mask, self._family)
            return None if who == NOBODY else (match.side, who)
        return None


_NAMES = {"hashlimit": "--hashlimit-name", "recent": "--name"}


def _name_at(match: m.Opaque) -> int:
    """Where among the condition's words the name of its memory stands; 0 if it has none."""
    option = _NAMES.get(match.module, "")
    return match.words.index(option) + 1 if option in match.words[:-1] else 0


def without_names(match: m.Opaque, places: Mapping[Memory, int] | None = None) -> tuple[str, ...]:
    """The condition's words, with a place instead of the name of a memory that has one; None: without any name."""
    words = list(match.words)
    if at := _name_at(match):
        place = places.get((match.module, words[at])) if places is not None else ""
        words[at] = words[at] if place is None else f"memory {place}"
    return tuple(words)


def memories(rule: Rule) -> list[Memory]:
    """The memories with a name that a rule asks: whoever says the name in this namespace asks the same one.

    Each namespace has its own (net/netfilter/xt_hashlimit.c, xt_recent.c: pernet tables, found by name).
    """
    return [(x.module, x.words[at]) for x in rule.matches if isinstance(x, m.Opaque) and (at := _name_at(x))]


class FiledRuleset:
    """Every chain of one ruleset with its rules filed by tag."""

    def __init__(self, ruleset: Ruleset, places: Places) -> None:
        self.ruleset = ruleset
        tagger = Tagger(places, ruleset.family)
        self.chains: dict[tuple[str, str], list[Filed]] = {}
        self._index: dict[tuple[str, str], dict[Tags, list[Filed]]] = {}
        for table in ruleset.tables.values():
            for chain in table.chains.values():
                self._file(table.name, chain, tagger)
        self.chain_owner = self._chain_owners()

    @cached_property
    def _askers(self) -> dict[Memory, set[int]]:
        """For each memory with a name, the tenants whose rules ask it."""
        found: dict[Memory, set[int]] = {}
        for (table, chain), items in self.chains.items():
            owner = self.chain_owner.get((table, chain), NOBODY)
            for item in items:
                for memory in memories(item.rule):
                    people = {who for role, who in item.tags if role != "to"} or {owner}
                    found.setdefault(memory, set()).update(people if len(people) == 1 else (NOBODY,))
        return found

    @cached_property
    def shared_memories(self) -> frozenset[Memory]:
        """Memories with a name that rules of several tenants ask, or rules of nobody's beside a tenant's."""
        return frozenset(memory for memory, people in self._askers.items() if len(people) > 1)

    @cached_property
    def own_memories(self) -> dict[Memory, int]:
        """Those that one tenant's rules alone ask, each with its place among that tenant's."""
        counts: dict[int, int] = {}
        found: dict[Memory, int] = {}
        for memory, people in self._askers.items():
            who = min(people)
            if len(people) == 1 and who != NOBODY:
                found[memory] = counts[who] = counts.get(who, -1) + 1
        return found

    @cached_property
    def beside_source(self) -> Mapping[int, set[Tags]]:
        """For each tenant what else a packet must be, beside from its address, for a rule about its address."""
        found: dict[int, set[Tags]] = {}
        for index in self._index.values():
            for tags in index:
                for role, who in tags:
                    if role == "src":
                        found.setdefault(who, set()).add(tags - {(role, who)})
        return found

    def _chain_owners(self) -> dict[tuple[str, str], int]:
        """User chains that only one tenant's packets come to: every jump there is that tenant's."""
        callers: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for (table, chain), rules in self.chains.items():
            for filed in rules:
                target = filed.rule.target
                if isinstance(target, t.Jump | t.Goto):
                    people = {who for role, who in filed.tags if role != "to"}
                    owner = people.pop() if len(people) == 1 else NOBODY
                    callers.setdefault((table, target.chain), []).append((chain, owner))
        owners: dict[tuple[str, str], int] = {}
        left = list(callers)
        while left:
            waiting = []
            for key in left:
                found = {
                    owner if owner != NOBODY else owners.get((key[0], chain), NOBODY) for chain, owner in callers[key]
                }
                if len(found) == 1 and NOBODY not in found:
                    owners[key] = found.pop()
                else:
                    waiting.append(key)
            if len(waiting) == len(left):
                break
            left = waiting
        return owners

    def _file(self, table: str, chain: Chain, tagger: Tagger) -> None:
        filed: list[Filed] = []
        index: dict[Tags, list[Filed]] = {}
        segment = 0
        for position, rule in enumerate(chain.rules):
            tags = tagger.tags(rule)
            one = Filed(position, segment, rule, tags)
            segment += not tags
            filed.append(one)
            index.setdefault(tags, []).append(one)
        self.chains[table, chain.name] = filed
        self._index[table, chain.name] = index

    def by_source_alone(self, table: str) -> bool:
        """Whether a rule before routing is a tenant's by its source address only, whatever link it came in by."""
        for tags in self._index.get((table, "PREROUTING"), ()):
            roles = {role for role, _ in tags}
            if "src" in roles and "in" not in roles:
                return True
        return False

    def policy(self, table: str, chain: str) -> str | None:
        return self.ruleset.tables[table].chains[chain].policy

    def candidates(self, table: str, chain: str, roles: Roles) -> list[Filed]:
        """The rules that packets with these roles could match, in order."""
        index = self._index.get((table, chain), {})
        if len(index) == 1:
            return self.chains[table, chain] if NONE in index else self._filter(index, roles)
        return self._filter(index, roles)

    def _filter(self, index: dict[Tags, list[Filed]], roles: Roles) -> list[Filed]:
        found: list[Filed] = []
        open_to: list[Tag] = [(role, who) for role, people in roles.items() for who in people if role != "to"]
        targets = roles.get("to", ANYBODY)
        for tags in _subsets(open_to):
            found += index.get(tags, ())
            if not targets & ANYBODY:
                for who in targets:
                    found += index.get(tags | {("to", who)}, ())
        if targets & ANYBODY:
            for tags, rules in index.items():
                wanted = {tag for tag in tags if tag[0] == "to"}
                if wanted and tags - wanted <= set(open_to):
                    found += rules
        found.sort(key=lambda one: one.position)
        return found


def _subsets(tags: list[Tag]) -> Iterator[Tags]:
    for number in range(1 << len(tags)):
        yield frozenset(tag for place, tag in enumerate(tags) if number >> place & 1)
