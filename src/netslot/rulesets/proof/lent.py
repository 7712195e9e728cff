"""What rules give to one tenant and no other rule knows: addresses outside, marks, conntrack zones.

Such a number is a name of the tenant's: exchanging two tenants exchanges it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.places import NOBODY, Places
from netslot.rulesets.proof.tagged import FiledRuleset
from netslot.rulesets.values import ALL_ONES, MARK_BITS

Number = tuple[str, int]
"""``mark`` or ``zone``, and its value."""


def one_address(target: t.Dnat | t.Snat) -> int | None:
    """The address that it translates to, if that is all it says but for a port."""
    to = target.to
    if to.address is None or to.address[0] != to.address[1] or to.flags or to.base_port is not None:
        return None
    return to.address[0]


def lent_addresses(filed: Sequence[FiledRuleset], places: Places, family: Family) -> list[list[int]]:
    """For each tenant the addresses that only its rules of the nat table know.

    An address that other rules name too, or that is a tenant's or the host's own, is nobody's to rename.
    """
    found: dict[int, int] = {}
    ones = ALL_ONES[family]
    for one in filed:
        for (table, _), rules in one.chains.items():
            for item in rules:
                who = item.tenant if table == "nat" and len({who for _, who in item.tags}) == 1 else NOBODY
                for value in _addresses(item.rule, ones):
                    if found.setdefault(value, who) != who:
                        found[value] = NOBODY
    lent: list[list[int]] = [[] for _ in places.tenants]
    pools = places.pools(family)
    for value, who in found.items():
        taken = places.owner_of(value, ones, family) != NOBODY or places.is_local(value, family)
        if who != NOBODY and not taken and not any(value & mask == pool for pool, mask in pools):
            lent[who].append(value)
    return lent


def _addresses(rule: Rule, ones: int) -> Iterator[int]:
    for match in rule.matches:
        if isinstance(match, m.Address) and match.mask == ones:
            yield match.value
    if isinstance(rule.target, t.Dnat | t.Snat):
        address = one_address(rule.target)
        if address is not None:
            yield address


def lent_numbers(filed: Sequence[FiledRuleset], places: Places) -> list[Mapping[Number, int]]:
    """For each tenant its own marks and zones, each with its place among them.

    Marks are renamed only where all rules know them whole: none sets or asks for a part of a mark's bits.
    """
    found: dict[Number, int] = {}
    whole = True
    for one in filed:
        for place, rules in one.chains.items():
            owner = one.chain_owner.get(place, NOBODY)
            for item in rules:
                numbers, all_of_it = _numbers(item.rule)
                whole = whole and all_of_it
                if not numbers:
                    continue
                people = {who for _, who in item.tags} or {owner}
                who = people.pop() if len(people) == 1 else NOBODY
                for number in numbers:
                    if found.setdefault(number, who) != who:
                        found[number] = NOBODY
    lent: list[dict[Number, int]] = [{} for _ in places.tenants]
    for number, who in found.items():
        if who != NOBODY and (whole or number[0] != "mark"):
            lent[who][number] = len(lent[who])
    return list(lent)


_TARGETS = (t.SetMark, t.SetConnmark, t.SaveMark, t.RestoreMark, t.CtTarget)


def numbers_of(rule: Rule) -> tuple[Number, ...]:
    """The marks and zones that a rule names; no mark (0) is nobody's."""
    return _numbers(rule)[0]


def _numbers(rule: Rule) -> tuple[tuple[Number, ...], bool]:
    """The same, and whether the rule knows marks whole only."""
    found: list[Number] = []
    masks: list[int] = []
    for match in rule.matches:
        kind = type(match)
        if kind is m.Mark or kind is m.Connmark:
            assert isinstance(match, m.Mark | m.Connmark)
            found.append(("mark", match.value))
            masks.append(match.mask)
    target = rule.target
    if isinstance(target, _TARGETS):
        if isinstance(target, t.CtTarget):
            found += [] if target.zone is None else [("zone", target.zone)]
        elif isinstance(target, t.SetMark | t.SetConnmark):
            found.append(("mark", target.value))
            masks.append(target.mask)
        else:
            masks += [target.nfmask, target.ctmask]
    return tuple(number for number in found if number != ("mark", 0)), all(mask == MARK_BITS for mask in masks)
