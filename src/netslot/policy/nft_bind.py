"""Change what a slot holds into what a lease wants, in one transaction, keeping whatever stays the same.

Rules are replaced by handle, set elements by difference; counters, dynamic sets and other rules are not
touched. What cannot be changed in place is told to the caller by None, who then replaces everything, in one
transaction as well: no packet meets less than a whole ruleset, and connection tracking is not concerned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from netslot.kernel import nf_attrs as attrs
from netslot.kernel import nf_tables as nf
from netslot.kernel.netlink import NLA_TYPE_MASK, attr_str
from netslot.kernel.nf_attrs import CHAIN, ELEMENT, FLOWTABLE, OBJECT, RULE, SET, TABLE, Node
from netslot.kernel.nf_tables import Command
from netslot.policy.base import Values
from netslot.policy.nft_lists import CIDRS, END_FLAG, ListSet
from netslot.policy.nft_state import by_chain, element_list, masked, masked_rule, split_elements
from netslot.policy.nft_template import (
    BINDING_PREFIX,
    Item,
    Ruleset,
    element_commands,
    elements_request,
    list_command,
    new,
    read_elements,
    refers_to_anonymous,
)

LARGEST_DELETION = 2_000
"""Elements deleted in one transaction with others added. Above that the whole ruleset is replaced.

An insertion into a set of intervals walks past the deleted elements around it, which are there until the
commit: replacing 1,000 networks by 1,000 others took 17 ms, a new set with them 3 ms; 100,000 took minutes.
"""


def list_changes(
    sock: nf.Socket, entry: ListSet, item: Item, entries: Sequence[str], values: Values
) -> list[Command] | None:
    """The messages that make the slot's set ``item`` hold ``entries``; None when that is better done anew."""
    data = sock.dump_bytes(nf.GETSETELEM, item.family, elements_request(item), f"{item.place}: list {item.name}")
    actual = element_list(data)
    if not actual:
        return [list_command(item, chunk) for chunk in entry.chunks(entries, values)]
    if actual == entry.dumped(entries, values):
        return []
    old = list(split_elements(actual))
    fresh = [element for chunk in entry.chunks(entries, values) for element in split_elements(chunk)]
    if entry.kind == CIDRS:
        return _difference(item, _intervals(old[::-1]), _intervals(fresh))
    return _difference(item, dict.fromkeys((e,) for e in old), dict.fromkeys((e,) for e in fresh))


_Units: TypeAlias = dict[tuple[bytes, ...], None]
"""Elements that come and go together, in order."""


def _difference(item: Item, old: _Units, fresh: _Units) -> list[Command] | None:
    gone = [unit for unit in old if unit not in fresh]
    if len(gone) > LARGEST_DELETION:
        return None
    added = [unit for unit in fresh if unit not in old]
    return [
        *element_commands(item, (element for unit in gone for element in unit), nf.DELSETELEM),
        *element_commands(item, (element for unit in added for element in unit)),
    ]


def _intervals(elements: Iterable[bytes]) -> _Units:
    """Each start with its end, from the lowest up: the kernel refuses to part them, or to take the end first."""
    found: _Units = {}
    start: bytes | None = None
    for element in elements:
        if element.endswith(END_FLAG):
            found[(element,) if start is None else (start, element)] = None
            start = None
        else:
            if start is not None:
                found[start,] = None
            start = element
    if start is not None:
        found[start,] = None
    return found


def scalar_changes(
    sock: nf.Socket, template: Ruleset, wanted: Ruleset, names: frozenset[str]
) -> list[Command] | None:
    """The messages that give the rules and elements which depend on ``names`` their new values.

    ``wanted`` is ``template`` rendered. None when something that cannot be changed in place depends on them.
    """
    found: list[Command] = []
    for kind in (TABLE, CHAIN, OBJECT, FLOWTABLE, SET):
        for form, item in zip(template.items[kind], wanted.items[kind], strict=True):
            if form.variables() & names:
                return None
            if any(attrs.variables(element) & names for element in form.elements):
                if item.set_flags() & attrs.SET_ANONYMOUS:
                    return None
                found += _element_changes(sock, item)
    chains = {
        (item.family, item.table, item.name)
        for form, item in zip(template.items[RULE], wanted.items[RULE], strict=True)
        if form.variables() & names
    }
    if any(name.startswith(BINDING_PREFIX) for _, _, name in chains):
        return None  # an anonymous chain takes no rules once a rule jumps to it
    wanted_rules = by_chain(wanted)
    for chain in chains:
        changes = _rule_changes(sock, chain, wanted_rules[chain])
        if changes is None:
            return None
        found += changes
    return found


def _element_changes(sock: nf.Socket, item: Item) -> Iterator[Command]:
    old = {masked(ELEMENT, element): element for element in read_elements(sock, item)}
    wanted = {masked(ELEMENT, element): element for element in item.elements}
    # A key alone names the element to delete; the end of an interval is told by its flag.
    named_by = (attrs.ELEM_KEY, attrs.ELEM_FLAGS, attrs.ELEM_KEY_END)
    gone = (
        attrs.encode(tuple(node for node in element if node.kind & NLA_TYPE_MASK in named_by))
        for data, element in old.items()
        if data not in wanted
    )
    yield from element_commands(item, gone, nf.DELSETELEM)
    fresh = (attrs.encode(attrs.as_input(ELEMENT, e)) for data, e in wanted.items() if data not in old)
    yield from element_commands(item, fresh)


def _rule_changes(sock: nf.Socket, chain: tuple[int, str, str], wanted: Sequence[Item]) -> list[Command] | None:
    """Replace by handle the rules of one chain that differ; None when the chain has other rules than the die's."""
    family, table, name = chain
    request = attr_str(attrs.RULE_TABLE, table) + attr_str(attrs.RULE_CHAIN, name)
    data = sock.dump_bytes(nf.GETRULE, family, request, f"nf_tables: list chain {name}")
    actual = [Item(RULE, family, attrs.parse(RULE, body)) for family, body in nf.split(data)]
    if len(actual) != len(wanted):
        return None
    found: list[Command] = []
    for old, rule in zip(actual, wanted, strict=True):
        if masked_rule(old) == masked_rule(rule):
            continue
        if refers_to_anonymous(rule):
            return None  # what a rule has inside it cannot move to another
        handle = attrs.leaf(old.nodes, attrs.RULE_HANDLE)
        found.append(new(rule, Node(attrs.RULE_HANDLE, handle), flags=nf.REPLACE))
    return found
