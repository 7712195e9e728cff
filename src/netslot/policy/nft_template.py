"""What a namespace's nf_tables hold, as values; and the same with variables, which makes a slot's commands.

A snapshot is read from the kernel; a template is several snapshots of the same rules, loaded with different
values, unified. Both have one form, :class:`Ruleset`: in the template some leaves depend on the slot.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from netslot.kernel import netlink
from netslot.kernel import nf_attrs as attrs
from netslot.kernel import nf_tables as nf
from netslot.kernel.nf_attrs import CHAIN, ELEMENT, FLOWTABLE, OBJECT, RULE, SET, TABLE, Node, Nodes
from netslot.kernel.nf_tables import Command
from netslot.policy.patches import Unexplained, unify

KINDS = (TABLE, CHAIN, SET, OBJECT, FLOWTABLE, RULE)
"""What is dumped, in the order in which it is read."""

GET = {
    TABLE: nf.GETTABLE,
    CHAIN: nf.GETCHAIN,
    SET: nf.GETSET,
    OBJECT: nf.GETOBJ,
    FLOWTABLE: nf.GETFLOWTABLE,
    RULE: nf.GETRULE,
}
_NEW = {
    TABLE: nf.NEWTABLE,
    CHAIN: nf.NEWCHAIN,
    SET: nf.NEWSET,
    OBJECT: nf.NEWOBJ,
    FLOWTABLE: nf.NEWFLOWTABLE,
    RULE: nf.NEWRULE,
}
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _LIST_ELEM = 1, 2, 3, 1
LARGEST_LIST = 60_000
"""Most bytes of elements in one message: an attribute's length has 16 bits."""
BINDING_PREFIX = "__chain_"
"""What the names of anonymous chains begin with, here. The kernel names them ``__chain`` and a number."""


class Item:
    """One object as dumped. ``elements`` are a set's.

    In a template some leaves depend on the slot. An object rendered for a slot knows its template, as ``origin``,
    and the values of these leaves; its attributes are made only when somebody asks for them, since most of the
    time the template's encoded form serves, with the values put in.
    """

    __slots__ = ("_nodes", "elements", "family", "leaves", "origin", "values", "varies", "what")

    def __init__(self, what: str, family: int, nodes: Nodes, elements: tuple[Nodes, ...] = ()) -> None:
        self.what = what
        self.family = family
        self.elements = elements
        self.origin: Item | None = None
        self.values: tuple[bytes, ...] = ()
        self._nodes: Nodes | None = nodes
        self.leaves = attrs.leaves(nodes)
        self.varies = bool(self.leaves or any(map(attrs.leaves, elements)))

    @property
    def nodes(self) -> Nodes:
        """The object's attributes."""
        if self._nodes is None:
            assert self.origin is not None
            self._nodes = attrs.fill(self.origin.nodes, iter(self.values))
        return self._nodes

    @property
    def table(self) -> str:
        """The name of the table that the object is in, or is."""
        return attrs.text(self.nodes, 1)

    @property
    def name(self) -> str:
        """The object's own name; a rule's is its chain's."""
        return attrs.text(self.nodes, attrs.CHAIN_NAME if self.what == CHAIN else 1 if self.what == TABLE else 2)

    @property
    def place(self) -> str:
        """The table in nft's words: ``nftables inet fw``."""
        return f"nftables {nf.FAMILIES.get(self.family, str(self.family))} {self.table}"

    def variables(self) -> frozenset[str]:
        """The variables that the object itself depends on; not those of its elements."""
        return attrs.variables(self.nodes)

    def render(self, values: Mapping[str, str]) -> Item:
        """The object in one slot: itself when nothing in it varies. Raises Unpatchable for values of another kind."""
        if not self.varies:
            return self
        made = Item(self.what, self.family, (), ())
        made.origin = self
        made.values = tuple([leaf.render(values) for leaf in self.leaves])
        made._nodes = None
        if self.elements:
            made.elements = tuple(sorted((_render(element, values) for element in self.elements), key=element_key))
        return made

    def set_flags(self) -> int:
        return attrs.number(self.nodes, attrs.SET_FLAGS)


def _render(nodes: Nodes, values: Mapping[str, str]) -> Nodes:
    return attrs.fill(nodes, (leaf.render(values) for leaf in attrs.leaves(nodes)))


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Everything in one namespace, each kind in the kernel's order."""

    items: Mapping[str, tuple[Item, ...]] = field(default_factory=lambda: dict.fromkeys(KINDS, ()))

    def all(self) -> Iterator[Item]:
        for kind in KINDS:
            yield from self.items[kind]

    def variables(self) -> frozenset[str]:
        """The variables that anything in it depends on."""
        found: frozenset[str] = frozenset()
        for item in self.all():
            found = found.union(item.variables(), *map(attrs.variables, item.elements))
        return found

    def render(self, values: Mapping[str, str]) -> Ruleset:
        """What one slot holds."""
        return Ruleset({kind: tuple(item.render(values) for item in items) for kind, items in self.items.items()})


def snapshot(sock: nf.Socket) -> Ruleset:
    """Read everything in the socket's namespace. Anonymous chains get names of their own: the kernel's differ."""
    items: dict[str, tuple[Item, ...]] = {}
    for kind in KINDS:
        data = sock.dump_bytes(GET[kind], 0, b"", f"nf_tables: list {kind}s")
        items[kind] = tuple(Item(kind, family, attrs.parse(kind, body)) for family, body in nf.split(data))
    items[SET] = tuple(Item(SET, item.family, item.nodes, read_elements(sock, item)) for item in items[SET])
    return _rename_chains(Ruleset(items))


def elements_of(data: bytes) -> tuple[Nodes, ...]:
    """The elements in a dump of one set, sorted: the kernel's order is that of a hash with a random seed."""
    found: list[Nodes] = []
    for message in netlink.split(data):
        for kind, body in netlink.iter_attrs(message.payload, 4):
            if kind == _LIST_ELEMENTS:
                found += [attrs.parse(ELEMENT, element) for _, element in netlink.iter_attrs(body)]
    return tuple(sorted(found, key=element_key))


def element_key(element: Nodes) -> bytes:
    """Sorts elements as a tree of intervals takes them: by key, where an end comes before a start with its key."""
    key = attrs.leaf(attrs.children(element, attrs.ELEM_KEY), 1)
    end = attrs.number(element, attrs.ELEM_FLAGS) & attrs.ELEM_INTERVAL_END
    return key + (b"\0" if end else b"\1")


def read_elements(sock: nf.Socket, item: Item) -> tuple[Nodes, ...]:
    """The elements that the kernel holds for a set now."""
    operation = f"{item.place}: list set {item.name}"
    return elements_of(sock.dump_bytes(nf.GETSETELEM, item.family, elements_request(item), operation))


def elements_request(item: Item) -> bytes:
    """The attributes that name a set in messages about its elements."""
    return netlink.attr_str(_LIST_TABLE, item.table) + netlink.attr_str(_LIST_SET, item.name)


def _rename_chains(ruleset: Ruleset) -> Ruleset:
    """Number the anonymous chains of the ruleset: the kernel's own counter is one for all namespaces.

    The underscore keeps the names apart from those that the kernel will yet give.
    """
    names: dict[bytes, bytes] = {}
    for chain in ruleset.items[CHAIN]:
        if attrs.number(chain.nodes, attrs.CHAIN_FLAGS) & attrs.CHAIN_BINDING:
            names[attrs.leaf(chain.nodes, attrs.CHAIN_NAME)] = f"{BINDING_PREFIX}{len(names)}\0".encode()
    if not names:
        return ruleset

    def renamed(nodes: Nodes) -> Nodes:
        return tuple(
            Node(node.kind, names.get(node.value, node.value))
            if isinstance(node.value, bytes)
            else Node(node.kind, renamed(node.value))
            if isinstance(node.value, tuple) and not node.records
            else node
            for node in nodes
        )

    return Ruleset(
        {
            kind: tuple(
                Item(kind, item.family, renamed(item.nodes), tuple(map(renamed, item.elements))) for item in items
            )
            for kind, items in ruleset.items.items()
        }
    )


def combine(casts: Sequence[Ruleset], values: Sequence[Mapping[str, str]]) -> Ruleset:
    """The template behind several snapshots of the same rules. Raises Unexplained with the place."""
    items: dict[str, tuple[Item, ...]] = {}
    for kind in KINDS:
        columns = [[_steady(item) for item in cast.items[kind]] for cast in casts]
        if len({len(column) for column in columns}) != 1:
            raise Unexplained(f"the number of {kind}s depends on the values")
        rows = list(zip(*columns, strict=True))
        items[kind] = tuple(_combine_item(row, values, place) for place, row in enumerate(rows, 1))
    return Ruleset(items)


def _steady(item: Item) -> Item:
    """The item with its volatile leaves (handles, counters of users) set to zero, so that casts compare."""
    return Item(item.what, item.family, attrs.steady(item.what, item.nodes), item.elements)


def _combine_item(row: Sequence[Item], values: Sequence[Mapping[str, str]], place: int) -> Item:
    first = row[0]
    try:
        if len({item.family for item in row}) != 1:
            raise Unexplained("the family depends on the values")
        nodes = unify([item.nodes for item in row], values)
        elements = _combine_elements([item.elements for item in row], values)
        return Item(first.what, first.family, nodes, elements)
    except Unexplained as error:
        raise Unexplained(f"{first.place}: {first.what} {first.name} ({place}): {error}") from error


def _combine_elements(sets: Sequence[Sequence[Nodes]], values: Sequence[Mapping[str, str]]) -> tuple[Nodes, ...]:
    """Elements have no order: those that all casts share are constant, the others are matched by explanation."""
    if len({len(elements) for elements in sets}) != 1:
        raise Unexplained("the number of elements depends on the values")
    steady = [[attrs.steady(ELEMENT, element) for element in elements] for elements in sets]
    shared = set(steady[0]).intersection(*map(set, steady[1:]))
    found = [element for element in steady[0] if element in shared]
    rest = [[element for element in elements if element not in shared] for elements in steady]
    for element in rest[0]:
        found.append(_match(element, rest[1:], values))
    return tuple(found)


def _match(element: Nodes, others: Sequence[list[Nodes]], values: Sequence[Mapping[str, str]]) -> Nodes:
    """The template of an element of the first cast: one element is taken out of every other cast for it."""

    def extend(row: list[Nodes], depth: int) -> Nodes | None:
        if depth == len(others):
            return unify(row, values)
        for candidate in others[depth]:
            try:
                unify([*row, candidate], values[: depth + 2])
                found = extend([*row, candidate], depth + 1)
            except Unexplained:
                continue
            if found is not None:
                others[depth].remove(candidate)
                return found
        return None

    found = extend([element], 0)
    if found is None:
        raise Unexplained("elements differ between the casts in a way that no variable explains")
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """What is the same in every slot about the commands of one template, by the identity of its items."""

    commands: Mapping[int, tuple[Command, ...]]
    """Those of the items that do not vary."""
    forms: Mapping[int, attrs.Form]
    """The attributes of commands for items that vary; sets are not among them."""
    order: Sequence[int]
    """The places of the rules in the order in which they are made."""


def commands(ruleset: Ruleset, plan: Plan) -> Iterator[Command]:
    """The messages that make the ruleset in a namespace that has none of it; all leaves must be bytes.

    ``plan`` is that of the ruleset's template, or of the ruleset itself.
    """
    memo, rules = plan.commands, ruleset.items[RULE]
    order = plan.order if len(plan.order) == len(rules) else _innermost_first(rules)
    for item in (*ruleset.items[TABLE], *ruleset.items[CHAIN], *ruleset.items[OBJECT]):
        yield from memo.get(id(item)) or (_filled(item, plan),)
    for identity, item in enumerate(ruleset.items[SET], 1):
        yield from memo.get(id(item)) or new_set(item, identity)
    for item in (*ruleset.items[FLOWTABLE], *(rules[place] for place in order)):
        yield from memo.get(id(item)) or (_filled(item, plan),)


def _filled(item: Item, plan: Plan) -> Command:
    form = plan.forms.get(id(item.origin))
    payload = form.filled(item.values) if form else None
    if payload is None:
        return new(item)
    return Command(_NEW[item.what], item.family, _flags(item), payload, lambda: _operation(item))


def plan_of(ruleset: Ruleset, values: Mapping[str, str]) -> Plan:
    """Encode of a template what can be; ``values`` are those of one slot."""
    memo: dict[int, tuple[Command, ...]] = {}
    forms: dict[int, attrs.Form] = {}
    for kind in KINDS:
        for identity, item in enumerate(ruleset.items[kind], 1):
            if not item.varies:
                memo[id(item)] = new_set(item, identity) if kind == SET else (new(item),)
            elif kind != SET:
                made = item.render(values)
                form = attrs.Form(attrs.as_input(kind, item.nodes), made.values)
                # What is taken as input may follow from a value (the protocol of x_tables extensions).
                if form.filled(made.values) == new(made).payload:
                    forms[id(item)] = form
    return Plan(memo, forms, _innermost_first(ruleset.items[RULE]))


def new_set(item: Item, identity: int) -> tuple[Command, ...]:
    """The messages that make a set and its elements; ``identity`` must be unique within the batch."""
    return (new(item, Node(attrs.SET_ID, struct.pack(">I", identity))), *new_elements(item, item.elements))


def new(item: Item, *extra: Node, flags: int | None = None) -> Command:
    """The message that makes one object."""
    payload = attrs.encode(attrs.as_input(item.what, item.nodes) + extra)
    flags = _flags(item) if flags is None else flags
    return Command(_NEW[item.what], item.family, flags, payload, lambda: _operation(item))


def _flags(item: Item) -> int:
    return nf.APPEND if item.what == RULE else nf.CREATE


def _operation(item: Item) -> str:
    what = f"a rule of chain {item.name}" if item.what == RULE else f"{item.what} {item.name}"
    return f"{item.place}: add {what}"


def new_elements(item: Item, elements: Iterable[Nodes]) -> Iterator[Command]:
    """The messages that add elements to a set, as few as their size allows."""
    yield from element_commands(item, (attrs.encode(attrs.as_input(ELEMENT, element)) for element in elements))


def element_commands(item: Item, elements: Iterable[bytes], message: int = nf.NEWSETELEM) -> Iterator[Command]:
    """Messages that add (or, with DELSETELEM, delete) elements given by their encoded attributes."""
    chunk: list[bytes] = []
    size = 0
    for element in elements:
        if size + len(element) + 4 > LARGEST_LIST:
            yield list_command(item, b"".join(chunk), message)
            chunk, size = [], 0
        chunk.append(netlink.attr(_LIST_ELEM, element))
        size += len(element) + 4
    if chunk:
        yield list_command(item, b"".join(chunk), message)


def list_command(item: Item, chunk: bytes, message: int = nf.NEWSETELEM) -> Command:
    """The message that names a set and carries encoded list elements."""
    verb = "add elements to" if message == nf.NEWSETELEM else "delete elements of"
    payload = elements_request(item) + netlink.attr(_LIST_ELEMENTS | netlink.NLA_F_NESTED, chunk)
    return Command(message, item.family, nf.CREATE, payload, f"{item.place}: {verb} set {item.name}")


def _innermost_first(rules: Sequence[Item]) -> list[int]:
    """The rules' places, those of anonymous chains before the rule that jumps to them, since it closes the chain."""
    by_chain: dict[tuple[int, str, str], list[int]] = {}
    for place, rule in enumerate(rules):
        by_chain.setdefault((rule.family, rule.table, rule.name), []).append(place)
    done: list[int] = []

    def emit(place: int) -> None:
        rule = rules[place]
        for name in binding_chains(rule):
            for inner in by_chain.pop((rule.family, rule.table, name), ()):
                emit(inner)
        done.append(place)

    for key in list(by_chain):
        if not key[2].startswith(BINDING_PREFIX):
            for place in by_chain.pop(key):
                emit(place)
    return done


def binding_chains(rule: Item) -> Iterator[str]:
    """The anonymous chains that the rule jumps to."""
    for name, data in attrs.expressions(rule.nodes):
        if name == b"immediate":
            target = attrs.text(attrs.children(attrs.children(data, 2), 2), 2)
            if target.startswith(BINDING_PREFIX):
                yield target


def refers_to_anonymous(rule: Item) -> bool:
    """Whether the rule has a set, map or chain inside it."""
    names = (attrs.text(data, 1) for name, data in attrs.expressions(rule.nodes) if name == b"lookup")
    return any(name.startswith(("__set", "__map")) for name in names) or any(binding_chains(rule))
