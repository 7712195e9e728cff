"""iptables in a slot, legacy variant: filter, nat, mangle, raw and security, IPv4 and IPv6.

:func:`cast` has the real tool load the rule files once; the die that it returns puts the same bytes into any
number of slots, with each slot's own values written into them. See docs/decisions/0010 to 0014.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, groupby

from netslot.errors import KernelError, UsageError
from netslot.kernel import netlink, netns, xtables
from netslot.kernel.xtables import COUNTER_SIZE, Family
from netslot.policy import cidr_sets, iptables_image, iptables_tool, iptables_words
from netslot.policy.base import Difference, Parameters, Values
from netslot.policy.cidr_sets import CidrSet
from netslot.policy.iptables_cast import Casting, Recipe, cast_file, prove_replay
from netslot.policy.iptables_image import Flat, Image, image_of, mask
from netslot.policy.iptables_places import words
from netslot.policy.iptables_tool import Source

_NAMED_STATE = frozenset({"hashlimit", "recent", "RATEEST", "IDLETIMER"})
"""Extensions whose memory the kernel finds again by name: it outlives a rule that is replaced by its like."""

_RULE_STATE = frozenset({"limit", "quota", "statistic", "connlimit"})
"""Extensions with a memory of the rule's own, made afresh whenever the rule is."""

_BUSY_TRIES = 5


def cast(
    rules: str,
    rules6: str | None = None,
    *,
    samples: Sequence[Values],
    lists: Mapping[str, str] | None = None,
    defaults: Parameters | None = None,
    scalars: Collection[str] | None = None,
    file: str = "slot.rules",
    file6: str = "slot.rules6",
) -> IptablesDie:
    """Compile rule files in iptables-save form, with variables ``${name}``, into a die.

    ``samples`` are the values of one or more slots, best the first, the last and some between. ``lists`` says
    which parameters are lists: ``cidrs`` (rules say ``-m set --match-set NAME dst``, NAME6 for IPv6) or ``ports``
    (a line that says ``${NAME.proto}``, ``${NAME.outer}`` or ``${NAME.inner}`` stands once for each port).
    ``defaults`` are what lists hold when no lease has bound them. ``scalars`` are the values that ``bind`` may
    change; without it, any. SpecError, with file and line, when the tool refuses; HostError without the tool.
    """
    if not samples:
        raise UsageError("casting rules needs the values of at least one slot")
    kinds = dict(lists or {})
    ports = tuple(name for name, kind in kinds.items() if kind == "ports")
    sources = [Source(xtables.IPV4, file, rules, ports)]
    if rules6 is not None:
        sources.append(Source(xtables.IPV6, file6, rules6, ports))
    used = frozenset(word for source in sources for word in words(source.text))
    sets = cidr_sets.sets_of((name for name, kind in kinds.items() if kind == "cidrs"), used)
    with netns.Worker(name="netslot-cast") as worker:
        castings, empty, reason = worker.run(_cast_all, sources, samples, sets)
    return IptablesDie(castings, empty, sets, dict(defaults or {}), scalars, samples[0], reason)


def _cast_all(
    sources: Sequence[Source], samples: Sequence[Values], sets: Sequence[CidrSet]
) -> tuple[list[Casting], dict[tuple[str, str], Image], str | None]:
    with netns.fresh():
        with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
            cidr_sets.create(link, sets, {})
        castings = [cast_file(source, samples) for source in sources]
    with netns.fresh():
        empty = iptables_tool.empty_tables()
    reason = next((casting.fallback for casting in castings if casting.fallback), None)
    if reason is None:
        with netns.fresh():
            flats = [recipe.base for casting in castings for recipe in casting.recipes]
            reason = prove_replay(flats, sets)
    return castings, empty, reason


class IptablesDie:
    """Rules of the legacy iptables, ready to be put into slots. All verbs act in the calling thread's namespace."""

    def __init__(
        self,
        castings: Sequence[Casting],
        empty: Mapping[tuple[str, str], Image],
        sets: Sequence[CidrSet],
        defaults: Parameters,
        scalars: Collection[str] | None,
        sample: Values,
        fallback: str | None,
    ) -> None:
        self._castings = castings
        self._empty = empty
        self._sets = sets
        self._defaults = defaults
        self._scalars = None if scalars is None else frozenset(scalars)
        self._fallback = fallback
        self._pinned = {name: value for casting in castings for name, value in casting.pinned.items()}
        self._recipes = [recipe for casting in castings for recipe in casting.recipes]
        self._tables = {
            (casting.source.family.tool, table) for casting in castings for table in casting.source.tables
        }
        flats = self._flats(sample, defaults)
        self._rules = sum(iptables_words.count_rules(image_of(flat)) for flat in flats)
        used: frozenset[str] = frozenset().union(
            *(iptables_image.extensions(flat.family, flat.blob) for flat in flats),
            *(
                iptables_image.extensions(recipe.base.family, rule.blob)
                for recipe in self._recipes
                for line in recipe.lines
                for rule in line.by_protocol.values()
            ),
        )
        self._named_state = bool(used & _NAMED_STATE)
        self._rule_state = bool(used & _RULE_STATE)

    @property
    def rules(self) -> int:
        """Rules of one stamp with the defaults of its lists, both families together."""
        return self._rules

    @property
    def fallback(self) -> str | None:
        """Why the tool is run in each slot, or None when bytes are stamped."""
        return self._fallback

    def stamp(self, values: Values) -> None:
        """Make the sets, then put every table in force: one system call a table in a fresh slot.

        In a slot that was left half stamped, what is there is brought to the same state.
        """
        if self._sets:
            if cidr_sets.any_other(()):
                self.reset(values)
                return
            with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
                cidr_sets.create(link, self._sets, self._defaults)
        self._put(values)

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        """Compare tables and sets with what they should be; a table that exists but is empty is no difference."""
        content = {**self._defaults, **parameters}
        flats = self._flats(values, content)
        found: list[Difference] = []
        for family in xtables.FAMILIES:
            mine = [flat for flat in flats if flat.family is family]
            foreign = self._foreign_tables(family)
            if mine or foreign:
                with closing(xtables.open_socket(family)) as sock:
                    found += self._read_family(sock, mine, foreign)
        return found + cidr_sets.read(self._sets, content)

    def reset(self, values: Values) -> None:
        """Bring tables, counters, limits and sets back to a fresh stamp's; what is right already is left alone."""
        with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
            whole = cidr_sets.sound(link, self._sets)
            if self._named_state or not whole:
                _replace_all(self._existing(), iptables_image.closed)
            _replace_all(chain.from_iterable(map(self._foreign_tables, xtables.FAMILIES)), Image.flatten)
            if not whole:
                cidr_sets.destroy_all(link)
                cidr_sets.create(link, self._sets, self._defaults)
            self._put(values, keep_fresh=not self._rule_state)
            cidr_sets.reset(link, self._sets, self._defaults)

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Put a lease's lists and values in force; lists that are not given go back to their defaults.

        Every set and every table changes at one instant. Counters of rules that stay are kept.
        """
        content = {**self._defaults, **parameters}
        flats = self._flats(values, content, bindable_only=True)  # before anything changes: it may refuse
        if self._sets:
            with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
                cidr_sets.bind(link, self._sets, parameters)
                unbound = [each for each in self._sets if each.parameter not in parameters]
                cidr_sets.restore(link, unbound, self._defaults)
        for family, group in groupby(flats, key=lambda flat: flat.family):
            with closing(xtables.open_socket(family)) as sock:
                for flat in group:
                    _exchange(sock, flat)

    def _flats(self, values: Values, content: Parameters, *, bindable_only: bool = False) -> list[Flat]:
        """One slot's tables. Values beyond what the casting learnt go to the tool, in a scratch namespace."""
        if not self._fallback and all(values.get(name) == value for name, value in self._pinned.items()):
            with contextlib.suppress(ValueError):
                wanted = (recipe for recipe in self._recipes if not bindable_only or self._bindable(recipe))
                return [recipe.build(values, content) for recipe in wanted]
        with netns.Worker(name="netslot-cast") as worker:
            return worker.run(self._tool_flats, values, content)

    def _bindable(self, recipe: Recipe) -> bool:
        """Whether ``bind`` may have to change the table."""
        changing = recipe.values if self._scalars is None else recipe.values.keys() & self._scalars
        return bool(recipe.lines or changing)

    def _tool_flats(self, values: Values, content: Parameters) -> list[Flat]:
        with netns.fresh():
            if self._sets:
                with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
                    cidr_sets.create(link, self._sets, {})
            self._run_tool(values, content)
            return [
                image.flatten()
                for casting in self._castings
                for image in iptables_tool.read_back(casting.source).values()
            ]

    def _run_tool(self, values: Values, content: Parameters) -> None:
        for source in (casting.source for casting in self._castings):
            iptables_tool.load(source, source.render(values, source.items(content)))

    def _put(self, values: Values, *, keep_fresh: bool = False) -> None:
        """Put all tables in force; with ``keep_fresh`` only those that differ or have counted a packet."""
        if self._fallback:
            self._run_tool(values, self._defaults)
            return
        flats = self._flats(values, self._defaults)
        for family, group in groupby(flats, key=lambda flat: flat.family):
            with closing(xtables.open_socket(family)) as sock:
                for flat in group:
                    if not (keep_fresh and _is_fresh(sock, flat)):
                        guess = flat.info.entries if keep_fresh else len(self._empty[family.tool, flat.table].entries)
                        _replace(sock, flat, guess)

    def _read_family(
        self, sock: socket.socket, mine: Sequence[Flat], foreign: Sequence[Image]
    ) -> Iterator[Difference]:
        for flat in mine:
            raw = xtables.get_entries(sock, flat.family, flat.table, flat.info.size)
            if raw is None or mask(flat.family, raw, flat.starts) != flat.blob:
                present = iptables_tool.read_image(sock, flat.family, flat.table)
                yield from iptables_words.differences(image_of(flat), present)
        for empty in foreign:
            present = iptables_tool.read_image(sock, empty.family, empty.table)
            if present != empty:
                yield iptables_words.foreign(present)

    def _existing(self) -> list[Image]:
        """The empty images of all tables that the namespace has."""
        return [
            self._empty[family.tool, table]
            for family in xtables.FAMILIES
            for table in xtables.existing_tables(family)
            if (family.tool, table) in self._empty
        ]

    def _foreign_tables(self, family: Family) -> list[Image]:
        """The empty images of the tables that the namespace has and the die does not use."""
        tables = ((family.tool, table) for table in xtables.existing_tables(family))
        return [self._empty[key] for key in tables if key in self._empty and key not in self._tables]


def _replace_all(images: Iterable[Image], form: Callable[[Image], Flat]) -> None:
    for image in images:
        with closing(xtables.open_socket(image.family)) as sock:
            flat = form(image)
            if not _is_fresh(sock, flat):
                _replace(sock, flat, flat.info.entries)


def _is_fresh(sock: socket.socket, flat: Flat) -> bool:
    """Whether the kernel holds this very table, and no packet has met it since it was put there.

    A packet that goes through a table is counted by the rule or policy that decides on it.
    """
    raw = xtables.get_entries(sock, flat.family, flat.table, flat.info.size)
    return raw is not None and mask(flat.family, raw, flat.starts, counters=False) == flat.blob


def _replace(sock: socket.socket, flat: Flat, present: int) -> None:
    """Put a table in force; ``present`` is a guess at the number of entries of the one that it replaces."""
    for _ in range(_BUSY_TRIES):
        if xtables.replace(sock, flat.family, flat.table, flat.info, flat.blob, present) is not None:
            return
        present = xtables.get_info(sock, flat.family, flat.table).entries
    raise _busy(flat)


def _exchange(sock: socket.socket, flat: Flat) -> None:
    """Put a table in force unless it is; rules that were there before keep their counters."""
    for _ in range(_BUSY_TRIES):
        info, raw = xtables.read_table(sock, flat.family, flat.table)
        old = Flat(flat.family, flat.table, info, bytes(raw), ())
        if info == flat.info and mask(flat.family, raw, flat.starts) == flat.blob:
            return
        counters = xtables.replace(sock, flat.family, flat.table, flat.info, flat.blob, info.entries)
        if counters is None:
            continue
        if any(counters):
            xtables.add_counters(sock, flat.family, flat.table, _carried(old, flat, counters))
        return
    raise _busy(flat)


def _carried(old: Flat, new: Flat, counters: bytes) -> bytes:
    """The old table's counters in the order of the new one's entries; zero for an entry that was not there."""
    before, after = (iptables_words.keys(image_of(flat)) for flat in (old, new))
    found = bytearray(COUNTER_SIZE * len(after))
    for block in difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        start, goal, length = (COUNTER_SIZE * number for number in block)
        found[goal : goal + length] = counters[start : start + length]
    return bytes(found)


def _busy(flat: Flat) -> KernelError:
    return KernelError(
        f"{flat.family.tool}: replace table {flat.table}",
        errno.EAGAIN,
        hint="another program keeps changing the slot's rules",
    )
