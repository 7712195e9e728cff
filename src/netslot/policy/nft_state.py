"""Compare what a slot's nf_tables hold with what a template says: fast when equal, in words when not.

Dumps are compared as bytes under a mask that blanks what slots may differ in (handles, counters, time left).
Only when that finds a difference are both sides taken apart. Not compared are the elements of dynamic sets,
which packets add, and the absence of elements that have a timeout.
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from netslot.kernel import netlink
from netslot.kernel import nf_attrs as attrs
from netslot.kernel import nf_tables as nf
from netslot.kernel.nf_attrs import CHAIN, ELEMENT, FLOWTABLE, OBJECT, RULE, SET, TABLE, Nodes
from netslot.policy.base import Difference, Values
from netslot.policy.nft_template import GET, KINDS, Item, Ruleset, elements_request, snapshot

Lists = Mapping[tuple[int, str, str], bytes]
"""Elements that parameters put into sets, encoded, by the set's family, table and name."""

_HEADER_MASK = nf.HEADER.pack(0xFFFFFFFF, 0xFFFF, 0, 0, 0) + b"\xff\0\0\0"  # length, type, family
_NEW_TYPE = {kind: nf.kind(GET[kind] - 1) for kind in KINDS}  # every NEW message is numbered just before its GET
_LIST_ELEMENTS = 3
_POLICIES = {0: "drop", 1: "accept"}


@dataclass(frozen=True, slots=True)
class Memo:
    """What is the same in every slot about the dump of one template, by the identity of its items."""

    messages: Mapping[int, tuple[bytes, bytes]]
    """Message and mask, as :func:`message_and_mask` gives them."""
    forms: Mapping[int, tuple[bytes, attrs.Form, bytes]]
    """Header, attributes and mask of the items that vary."""
    elements: Mapping[int, Sequence[bytes]]
    """A set's elements, encoded, sorted."""


class Expectation:
    """What a dump of a slot should be. ``memo`` is that of the ruleset's template."""

    def __init__(self, ruleset: Ruleset, lists: Lists, memo: Memo) -> None:
        self.ruleset = ruleset
        self.lists = lists
        self._memo = memo

    def holds(self, sock: nf.Socket, *, but: Container[Item] = ()) -> bool:
        """True when the namespace holds exactly this, whatever is in the sets ``but``."""
        return all(self.same(sock, kind) for kind in KINDS) and all(
            self._same_elements(sock, item) for item in self.ruleset.items[SET] if item not in but
        )

    def same(self, sock: nf.Socket, kind: str) -> bool:
        """True when the objects of one kind are as expected."""
        actual = sock.dump_bytes(GET[kind], 0, b"", f"nf_tables: list {kind}s")
        known = self._memo.messages
        pairs = [known.get(id(item)) or self._filled(item) for item in self.ruleset.items[kind]]
        expected = b"".join([data for data, _ in pairs])
        if len(actual) != len(expected):
            return False
        mask = int.from_bytes(b"".join([mask for _, mask in pairs]), "little")
        return (int.from_bytes(actual, "little") ^ int.from_bytes(expected, "little")) & mask == 0

    def _filled(self, item: Item) -> tuple[bytes, bytes]:
        form = self._memo.forms.get(id(item.origin))
        body = form[1].filled(item.values) if form else None
        return message_and_mask(item) if form is None or body is None else (form[0] + body, form[2])

    def _same_elements(self, sock: nf.Socket, item: Item) -> bool:
        if item.set_flags() & attrs.SET_EVAL:
            return True
        data = sock.dump_bytes(nf.GETSETELEM, item.family, elements_request(item), f"{item.place}: list {item.name}")
        actual = element_list(data)
        bound = self.lists.get((item.family, item.table, item.name))
        if bound is not None:
            return actual == bound or sorted(split_elements(actual)) == sorted(split_elements(bound))
        plain = self._memo.elements.get(id(item))
        if plain is not None and sorted(split_elements(actual)) == plain:
            return True
        found = [attrs.parse(ELEMENT, element) for element in split_elements(actual)]
        return not any(compare_elements(item, item.elements, found))


def memoise(ruleset: Ruleset, values: Values) -> Memo:
    """Encode of a template what can be; ``values`` are those of one slot."""
    constant = [item for item in ruleset.all() if not item.varies]
    forms: dict[int, tuple[bytes, attrs.Form, bytes]] = {}
    for item in ruleset.all():
        if item.varies:
            made = item.render(values)
            message, mask = message_and_mask(made)
            forms[id(item)] = (message[: nf.MESSAGE_HEADER_SIZE], attrs.Form(item.nodes, made.values), mask)
    return Memo(
        {id(item): message_and_mask(item) for item in constant},
        forms,
        {id(item): sorted(map(attrs.encode, item.elements)) for item in constant if item.what == SET},
    )


def message_and_mask(item: Item) -> tuple[bytes, bytes]:
    """How the kernel dumps the item, and which bits of that are the same in every slot that holds it."""
    body = attrs.encode(item.nodes)
    header = nf.HEADER.pack(len(body) + nf.MESSAGE_HEADER_SIZE, _NEW_TYPE[item.what], 0, 0, 0)
    return (
        header + nf.generic_header(item.family) + body,
        _HEADER_MASK + attrs.mask(item.what, item.nodes),
    )


def element_list(data: bytes) -> bytes:
    """The list elements in a dump of one set, in the kernel's order."""
    return b"".join(
        body
        for message in netlink.split(data)
        for kind, body in netlink.iter_attrs(message.payload, 4)
        if kind == _LIST_ELEMENTS
    )


def split_elements(data: bytes) -> Iterator[bytes]:
    """The attributes of each element of a list."""
    for _, element in netlink.iter_attrs(data):
        yield element


def masked(what: str, nodes: Nodes) -> bytes:
    """The encoded attributes with zeros in what slots may differ in; equal for equal objects."""
    data, mask = attrs.encode(nodes), attrs.mask(what, nodes)
    return (int.from_bytes(data, "little") & int.from_bytes(mask, "little")).to_bytes(len(data), "little")


def compare_elements(item: Item, expected: Sequence[Nodes], found: Sequence[Nodes]) -> Iterator[Difference]:
    """What is missing from a set and what is too much in it."""
    where = f"{item.place}: {'map' if item.set_flags() & attrs.SET_MAP else 'set'} {item.name}"
    wanted = {masked(ELEMENT, element): element for element in expected}
    actual = {masked(ELEMENT, element): element for element in found}
    for data, element in wanted.items():
        expires = attrs.leaf(element, attrs.ELEM_EXPIRATION) or attrs.leaf(element, attrs.ELEM_TIMEOUT)
        if data not in actual and not expires:
            yield Difference(where, f"element {element_text(item, element)} missing")
    for data, element in actual.items():
        if data not in wanted:
            yield Difference(where, f"element {element_text(item, element)} added")


def element_text(item: Item, element: Nodes) -> str:
    """An element's key for people: an address as such, everything else as hexadecimal digits."""
    key = attrs.leaf(attrs.children(element, attrs.ELEM_KEY), 1)
    ends = attrs.number(element, attrs.ELEM_FLAGS) & attrs.ELEM_INTERVAL_END
    text = (
        str(ipaddress.ip_address(key)) if attrs.number(item.nodes, attrs.SET_KEY_TYPE) in (7, 8) else "0x" + key.hex()
    )
    return f"up to {text}" if ends else text


def differences(sock: nf.Socket, expectation: Expectation) -> list[Difference]:
    """Everything that differs, in words; [] when nothing does."""
    if expectation.holds(sock):
        return []
    actual = snapshot(sock)
    expected = expectation.ruleset
    found = list(_compare_named(TABLE, expected, actual))
    foreign = {(item.family, item.table) for item in actual.items[TABLE]} - {
        (item.family, item.table) for item in expected.items[TABLE]
    }
    for kind in (CHAIN, SET, OBJECT, FLOWTABLE):
        found += list(_compare_named(kind, expected, actual, foreign))
    found += _compare_all_elements(expectation, actual)
    found += _compare_rules(expected, actual, foreign)
    return found


def _compare_named(
    kind: str, expected: Ruleset, actual: Ruleset, foreign: set[tuple[int, str]] | None = None
) -> Iterator[Difference]:
    wanted = {(item.family, item.table, item.name): item for item in expected.items[kind]}
    there = {(item.family, item.table, item.name): item for item in actual.items[kind]}
    for key, item in wanted.items():
        where = item.place if kind == TABLE else f"{item.place}: {kind} {item.name}"
        if key not in there:
            yield Difference(where, f"{kind} missing")
        elif masked(kind, item.nodes) != masked(kind, there[key].nodes):
            yield Difference(where, _change(kind, item, there[key]))
    for key, item in there.items():
        if key not in wanted and (item.family, item.table) not in (foreign or ()):
            where = item.place if kind == TABLE else f"{item.place}: {kind} {item.name}"
            yield Difference(where, f"foreign {kind}")


def _change(kind: str, expected: Item, actual: Item) -> str:
    if kind == CHAIN:
        should, is_now = (attrs.number(item.nodes, attrs.CHAIN_POLICY) for item in (expected, actual))
        if should != is_now:
            return f"policy is {_POLICIES.get(is_now, is_now)}, should be {_POLICIES.get(should, should)}"
    return f"{kind} changed"


def _compare_all_elements(expectation: Expectation, actual: Ruleset) -> Iterator[Difference]:
    there = {(item.family, item.table, item.name): item for item in actual.items[SET]}
    for item in expectation.ruleset.items[SET]:
        key = (item.family, item.table, item.name)
        if key not in there or item.set_flags() & attrs.SET_EVAL:
            continue
        bound = expectation.lists.get(key)
        if bound is None:
            wanted: Sequence[Nodes] = item.elements
        else:
            wanted = [attrs.parse(ELEMENT, element) for element in split_elements(bound)]
        yield from compare_elements(item, wanted, there[key].elements)


def by_chain(ruleset: Ruleset) -> dict[tuple[int, str, str], list[Item]]:
    """The rules of each chain, in order."""
    found: dict[tuple[int, str, str], list[Item]] = {}
    for rule in ruleset.items[RULE]:
        found.setdefault((rule.family, rule.table, rule.name), []).append(rule)
    return found


def _compare_rules(expected: Ruleset, actual: Ruleset, foreign: set[tuple[int, str]]) -> Iterator[Difference]:
    wanted, there = by_chain(expected), by_chain(actual)
    for key in {**wanted, **there}:
        if key[:2] in foreign:
            continue
        old = [masked_rule(rule) for rule in wanted.get(key, ())]
        new = [masked_rule(rule) for rule in there.get(key, ())]
        where = f"nftables {nf.FAMILIES.get(key[0], key[0])} {key[1]} {key[2]}"
        for tag, first, last, other_first, other_last in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
            yield from _rule_words(where, tag, (first, last), (other_first, other_last), len(old))


def masked_rule(rule: Item) -> bytes:
    """What two rules share when they are the same rule: the position depends on what else is in the chain."""
    nodes = tuple(node for node in rule.nodes if node.kind not in (attrs.RULE_HANDLE, attrs.RULE_POSITION))
    return masked(RULE, nodes)


def _rule_words(where: str, tag: str, old: tuple[int, int], new: tuple[int, int], total: int) -> Iterator[Difference]:
    changed = min(old[1] - old[0], new[1] - new[0]) if tag == "replace" else 0
    if tag == "equal":
        return
    for number in range(old[0] + 1, old[0] + changed + 1):
        yield Difference(where, f"rule {number} of {total} changed")
    for number in range(old[0] + changed + 1, old[1] + 1):
        yield Difference(where, f"rule {number} of {total} missing")
    for _ in range(new[0] + changed, new[1]):
        yield Difference(where, f"rule added {f'after rule {old[1]} of {total}' if old[1] else 'at the beginning'}")
