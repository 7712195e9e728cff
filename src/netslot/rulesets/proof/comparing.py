"""Root rules that compare the groups of two links as numbers: so they keep the order of tenants and name none.

    -A CHAIN --src-group 0/8 --dst-group 8/8 -g LESS        the highest bit in which they differ decides
    -A CHAIN --src-group 8/8 --dst-group 0/8 -g MORE
    -A CHAIN --src-group 0/4 --dst-group 4/4 -g LESS
    ...

The numbers make every link a group of its own. Where they are read in no other way, and follow the order in which
tenants' rules stood, two tenants of one class can still be exchanged: only their order counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Chain, Rule, Ruleset

_MOST_STRANGERS = 32


def comparison(number: int, bits: int) -> list[tuple[tuple[m.Match, ...], bool]]:
    """The conditions that compare numbers of ``bits`` bits from bit ``number`` on; True: the sender's is less."""
    found: list[tuple[tuple[m.Match, ...], bool]] = []
    for place in reversed(range(number, number + bits)):
        bit = 1 << place
        for less in (True, False):
            sender, receiver = (0, bit) if less else (bit, 0)
            found.append(((m.DevGroup("in", sender, bit), m.DevGroup("out", receiver, bit)), less))
    return found


def compared_bits(rulesets: Iterable[Ruleset]) -> int:
    """The bits of groups that are compared so, and that no other rule asks for; 0 if there are none."""
    compared, asked = set[int](), 0
    for ruleset in rulesets:
        for table in ruleset.tables.values():
            for chain in table.chains.values():
                bits, rest = _compares(chain)
                compared |= {bits} if bits else set()
                asked |= _asked(rest)
    if len(compared) != 1:
        return 0
    (bits,) = compared
    return 0 if bits & asked else bits


def _compares(chain: Chain) -> tuple[int, Sequence[Rule]]:
    """The bits that the chain's first rules compare, and its other rules."""
    rules, bits, last = chain.rules, 0, 1 << 32
    ways: set[tuple[bool, str]] = set()
    place = 0
    while place + 1 < len(rules):
        bit = _bit(rules[place])
        if not 0 < bit < last or bit & (bit - 1):
            break
        (less, _), (more, _) = comparison(bit.bit_length() - 1, 1)
        two = rules[place], rules[place + 1]
        if (two[0].matches, two[1].matches) != (less, more) or not all(isinstance(x.target, t.Goto) for x in two):
            break
        ways |= {(number == 0, x.target.chain) for number, x in enumerate(two) if isinstance(x.target, t.Goto)}
        if len(ways) != 2:
            return 0, rules
        bits, last, place = bits | bit, bit, place + 2
    return bits, rules[place:]


def _bit(rule: Rule) -> int:
    first = rule.matches[0] if rule.matches else None
    return first.mask if isinstance(first, m.DevGroup) else 0


def _asked(rules: Iterable[Rule]) -> int:
    found = 0
    for rule in rules:
        for match in rule.matches:
            if isinstance(match, m.DevGroup):
                found |= match.mask
    return found


def out_of_order(sequence: Sequence[int], numbers: Sequence[int], kinds: Sequence[int]) -> set[int] | None:
    """Tenants whose numbers do not rise in the order of ``sequence``, and for each of them one of every class whose
    number stands wrongly to its own, in each way; None when they are too many to be looked at one by one.

    ``numbers`` and ``kinds`` are by tenant.
    """
    rising = _rising([numbers[who] for who in sequence])
    wrong = [place for place in range(len(sequence)) if place not in rising]
    if len(wrong) > _MOST_STRANGERS:
        return None
    found: set[int] = set()
    for place in wrong:
        one = numbers[sequence[place]]
        partners: dict[tuple[int, bool, bool], int] = {}
        for other_place, other in enumerate(sequence):
            before = other_place < place
            if other_place != place and (numbers[other] >= one if before else numbers[other] <= one):
                partners.setdefault((kinds[other], before, numbers[other] == one), other)
        found |= {sequence[place], *partners.values()}
    return found


def _rising(values: Sequence[int]) -> set[int]:
    """The places of a longest strictly rising subsequence."""
    ends: list[int] = []
    last: list[int] = []
    before: list[int] = []
    for place, value in enumerate(values):
        at = bisect_left(ends, value)
        before.append(last[at - 1] if at else -1)
        if at == len(ends):
            ends.append(value)
            last.append(place)
        else:
            ends[at], last[at] = value, place
    found: set[int] = set()
    place = last[-1] if last else -1
    while place >= 0:
        found.add(place)
        place = before[place]
    return found
