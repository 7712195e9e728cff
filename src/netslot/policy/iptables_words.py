"""What differs between two tables, in the words of the tool's user. Pure; built only when something differs."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from netslot.kernel import xtables
from netslot.policy.base import Difference
from netslot.policy.iptables_image import NEXT, Entry, Image


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain's policy (base chains only) and its rules, each as bytes and the chain it jumps to."""

    policy: str | None
    rules: tuple[tuple[bytes, str | None], ...]


def chains(image: Image) -> dict[str, Chain]:
    """All chains of a table by name."""
    spans = list(_spans(image))
    by_start = {start: name for name, start, _, _ in spans}
    found = {}
    for name, start, end, policy in spans:
        rules = tuple((entry.data, _goal(entry, by_start)) for entry in image.entries[start:end])
        found[name] = Chain(policy, rules)
    return found


def keys(image: Image) -> list[tuple[bytes, str | None]]:
    """Every entry as bytes and the chain it jumps to: equal for a rule that was only moved."""
    by_start = {start: name for name, start, _, _ in _spans(image)}
    return [(entry.data, _goal(entry, by_start)) for entry in image.entries]


def count_rules(image: Image) -> int:
    """How many rules a person would count: without policies, chain heads and chain ends."""
    return sum(end - start for _, start, end, _ in _spans(image))


def differences(wanted: Image, present: Image) -> list[Difference]:
    """How ``present`` differs from ``wanted``, chain by chain, in the order of ``wanted``."""
    table = f"{wanted.family.tool} {wanted.table}"
    ours, theirs = chains(wanted), chains(present)
    found = []
    for name, chain in ours.items():
        if name not in theirs:
            found.append(Difference(f"{table} {name}", "chain missing"))
            continue
        other = theirs[name]
        if chain.policy != other.policy:
            found.append(Difference(f"{table} {name}", f"policy is {other.policy}, should be {chain.policy}"))
        found += [Difference(f"{table} {name}", what) for what in _rule_words(chain, other)]
    for name in theirs.keys() - ours.keys():
        found.append(Difference(f"{table} {name}", "a chain that the template does not have"))
    return found or [Difference(table, "the chains are in another order")]


def foreign(present: Image) -> Difference:
    """A table that the template does not use and that is not empty."""
    rules = count_rules(present)
    what = f"{rules} rule{'' if rules == 1 else 's'} in a table that the template does not use"
    return Difference(f"{present.family.tool} {present.table}", what)


def _spans(image: Image) -> Iterator[tuple[str, int, int, str | None]]:
    """(name, first rule, end of rules, policy) of each chain."""
    after = 0
    for hook, start in enumerate(image.hook_entry):
        end = image.underflow[hook]
        if start >= 0:
            yield xtables.HOOKS[hook], start, end, _policy(image, end)
            after = max(after, end + 1)
    heads = []
    for number in range(after, len(image.entries)):
        data = image.entries[number].data
        target = xtables.target(image.family, data, 0)
        if target.name == "ERROR":
            heads.append((number, xtables.text(data, target)))
    for (number, name), (following, _) in itertools.pairwise(heads):
        yield name, number + 1, following - 1, None  # the chain's last entry is its RETURN


def _policy(image: Image, number: int) -> str:
    data = image.entries[number].data
    verdict = xtables.verdict(data, xtables.target(image.family, data, 0))
    return {xtables.VERDICT_DROP: "DROP", xtables.VERDICT_ACCEPT: "ACCEPT"}.get(verdict, str(verdict))


def _goal(entry: Entry, by_start: dict[int, str]) -> str | None:
    if entry.jump is None or entry.jump == NEXT:
        return None
    return by_start.get(entry.jump, str(entry.jump))


def _rule_words(wanted: Chain, present: Chain) -> Iterator[str]:
    total = len(wanted.rules)
    matcher = difflib.SequenceMatcher(None, wanted.rules, present.rules, autojunk=False)
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind == "equal":
            continue
        pairs = min(last - first, end - start)
        for offset in range(pairs):
            yield f"rule {first + offset + 1} of {total} changed"
        for number in range(first + pairs, last):
            yield f"rule {number + 1} of {total} missing"
        for number in range(start + pairs, end):
            yield f"rule {number + 1} added"
