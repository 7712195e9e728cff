"""nftables in a slot, and the nft variant of iptables: one die for both.

:func:`cast` and :func:`cast_iptables` have the real tool load the rules once; the die that they return puts
the same objects into any number of slots, in one nfnetlink transaction each. See docs/decisions/0015 to 0019.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from errno import EBUSY

from netslot.errors import KernelError, UsageError
from netslot.kernel import netlink, xtables
from netslot.kernel import nf_attrs as attrs
from netslot.kernel import nf_tables as nf
from netslot.kernel.nf_attrs import CHAIN, RULE, SET
from netslot.kernel.nf_tables import Command
from netslot.policy import cidr_sets, nft_bind, nft_state, nft_template
from netslot.policy.base import Difference, Parameters, Values
from netslot.policy.cidr_sets import CidrSet
from netslot.policy.iptables_places import words
from netslot.policy.iptables_tool import Source
from netslot.policy.nft_cast import (
    PROOF_INDEX,
    Cast,
    cast_program,
    in_scratch,
    load_and_read,
    make_devices,
    with_words,
)
from netslot.policy.nft_lists import CIDRS, PORTS, ListSet, check_versions, find
from netslot.policy.nft_ports import PortLine, cast_port_lines, insert_ports
from netslot.policy.nft_programs import IptablesProgram, NftProgram, Program
from netslot.policy.nft_template import Item, Ruleset, element_key, list_command, snapshot
from netslot.policy.patches import Unexplained, Unpatchable
from netslot.spec.render import variables_in

_FLUSH = Command(nf.DELTABLE, 0, 0, b"", "nf_tables: remove every table")
_NETDEV = 5
_BUSY_TRIES = 50
_BUSY_WAIT_S = 0.01
_LOADED_KEPT = 64


def cast(
    text: str,
    *,
    samples: Sequence[Values],
    lists: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
    defaults: Parameters | None = None,
    scalars: Collection[str] | None = None,
    file: str = "slot.nft",
    finish: Callable[[], None] | None = None,
) -> NftablesDie:
    """Compile rules as ``nft -f`` takes them, with variables ``${name}``, into a die.

    ``samples`` are the values of one or more slots, best the first, the last and some between. ``lists`` says
    which parameters are lists: ``cidrs`` fill the set NAME (and NAME6), ``ports`` the map or set NAME that the
    rules declare; those in ``optional`` they need not declare. ``defaults`` are what lists hold when no lease has
    bound them. ``scalars`` are the values that ``bind`` may change; without it, any. ``finish`` is called after the
    tool, in the namespace that it has loaded the rules in. SpecError, with file and line, when the tool refuses the
    rules or a list's set is declared otherwise than its entries need; HostError without the tool.
    """
    program, kinds = NftProgram(text, file, finish), dict(lists or {})
    return _cast(program, samples, kinds, dict(defaults or {}), scalars, (), file, optional)


def cast_iptables(
    rules: str,
    rules6: str | None = None,
    *,
    samples: Sequence[Values],
    lists: Mapping[str, str] | None = None,
    defaults: Parameters | None = None,
    scalars: Collection[str] | None = None,
    file: str = "slot.rules",
    file6: str = "slot.rules6",
    beside: NftProgram | None = None,
) -> NftablesDie:
    """Compile rule files in iptables-save form by the nft variants of the tools; arguments as for the legacy one.

    ``beside`` are further tables for nft, which are one die with them: a namespace's nf_tables have one owner.
    """
    kinds = dict(lists or {})
    ports = tuple(name for name, kind in kinds.items() if kind == PORTS)
    sources = [Source(xtables.IPV4, file, rules, ports)]
    if rules6 is not None:
        sources.append(Source(xtables.IPV6, file6, rules6, ports))
    used = frozenset(word for source in sources for word in words(source.text))
    sets = cidr_sets.sets_of((name for name, kind in kinds.items() if kind == CIDRS), used)
    return _cast(IptablesProgram(sources, sets, beside), samples, {}, dict(defaults or {}), scalars, sets, file)


def _cast(
    program: NftProgram | IptablesProgram,
    samples: Sequence[Values],
    lists: Mapping[str, str],
    defaults: Parameters,
    scalars: Collection[str] | None,
    sets: tuple[CidrSet, ...],
    file: str,
    optional: Collection[str] = (),
) -> NftablesDie:
    if not samples:
        raise UsageError("casting rules needs the values of at least one slot")
    made = cast_program(program, samples, program.variables() if scalars is None else scalars)
    lines: Sequence[PortLine] = ()
    if isinstance(program, IptablesProgram) and made.template is not None:
        try:
            lines = cast_port_lines(program, made.template, samples)
        except Unexplained as error:
            made = Cast(None, str(error), {}, {})
    shown = made.template or load_and_read(program, samples[0], {})
    filled = find(shown, lists, file, optional)
    die = NftablesDie(program, made, lines, filled, sets, defaults, scalars, len(shown.items[RULE]))
    check_versions(die.lists, defaults)
    die.prove(samples)
    return die


class NftablesDie:
    """nf_tables rules, ready to be put into slots. All verbs act in the calling thread's namespace."""

    def __init__(
        self,
        program: Program,
        made: Cast,
        lines: Sequence[PortLine],
        lists: Sequence[ListSet],
        sets: tuple[CidrSet, ...],
        defaults: Parameters,
        scalars: Collection[str] | None,
        rules: int,
    ) -> None:
        self._program = program
        self._template = made.template
        self._constants = made.constants
        self._fallback = made.reason
        self._lines = lines
        self.lists = lists
        self._sets = sets
        self._defaults = defaults
        self._rules = rules
        names = program.variables()
        self._scalars = names if scalars is None else names & frozenset(scalars)
        template = made.template or Ruleset()
        self._words = sorted(name for name in template.variables() if "${" in name)
        self._bindable = self._scalars.union(word for word in self._words if variables_in(word) & self._scalars)
        self._plan = nft_template.plan_of(template, made.sample)
        self._messages = nft_state.memoise(template, made.sample)
        self._keys = [_distinct_keys(item.render(made.sample)) for item in template.items[SET]]
        self._loaded: dict[tuple[tuple[str, str], ...], Ruleset] = {}

    @property
    def rules(self) -> int:
        """Rules of one stamp, without those that stand for published ports."""
        return self._rules

    @property
    def fallback(self) -> str | None:
        """Why the tool is run in each slot, or None when bytes are stamped."""
        return self._fallback

    def stamp(self, values: Values) -> None:
        """Put the rules in force in one transaction. The namespace must have none: they would add up."""
        if self._sets and not cidr_sets.ready(self._sets):
            with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
                cidr_sets.create(link, self._sets, self._defaults)
        self._put(values, self._defaults)

    def reset(self, values: Values) -> None:
        """Replace everything, in one transaction: counters, limits, quotas and dynamic sets begin anew with it."""
        if not self._sets:
            self._replace_all(values, self._defaults)
            return
        with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
            if not cidr_sets.ready(self._sets):
                with nf.Socket() as sock:
                    sock.commit(nf.Batch([_FLUSH]))
                _when_unused(lambda: cidr_sets.destroy_all(link))
                cidr_sets.create(link, self._sets, self._defaults)
            self._replace_all(values, self._defaults)
            _when_unused(lambda: cidr_sets.reset(link, self._sets, self._defaults))

    def read(
        self, values: Values, parameters: Parameters, *, known_generation: int | None = None
    ) -> list[Difference]:
        """Compare everything in the namespace's nf_tables, and the rules' IP sets, with what they should be.

        ``known_generation`` is what :meth:`generation` gave after the last stamp, bind, reset or good read of
        this slot. While it stays, nobody has changed rules or sets, and nothing more is read; unless a chain
        hangs on a device, whose end the number does not show.
        """
        content = {**self._defaults, **parameters}
        ruleset = self._ruleset(values, content)
        with nf.Socket() as sock:
            steady = all(item.family != _NETDEV for item in ruleset.items[CHAIN])
            if known_generation is not None and steady and sock.generation() == known_generation:
                return self._read_sets(content)
            expected = nft_state.Expectation(ruleset, self._elements(ruleset, values, content), self._messages)
            found = nft_state.differences(sock, expected)
        return found + self._read_sets(content)

    def _read_sets(self, content: Parameters) -> list[Difference]:
        return cidr_sets.read(self._sets, content) if isinstance(self._program, IptablesProgram) else []

    def generation(self) -> int:
        """The number of the namespace's nf_tables ruleset, which every transaction changes; for :meth:`read`."""
        with nf.Socket() as sock:
            return sock.generation()

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Put a lease's lists and values in force in one transaction; lists that are not given hold their defaults.

        Rules and elements that do not change keep counters and state. Where nf_tables has no way to change a
        thing in place (a set inside a rule, the number of rules), the whole ruleset is replaced, and counters
        and dynamic sets begin anew; established connections go on in either case.
        """
        content = {**self._defaults, **parameters}
        check_versions(self.lists, content)
        if self._sets:
            with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
                cidr_sets.restore(link, self._sets, content)
        if self._fallback:
            if self._scalars or self.lists or self._program_ports():
                self._replace_all(values, content)
            return
        if not (self._scalars or self.lists or self._lines):
            return
        with nf.Socket() as sock:
            changes = self._changes(sock, values, content)
            if changes is not None:
                sock.commit(nf.Batch(changes))
                return
        self._replace_all(values, content)

    def _program_ports(self) -> bool:
        return isinstance(self._program, IptablesProgram) and any(s.port_lines for s in self._program.sources)

    def _changes(self, sock: nf.Socket, values: Values, content: Parameters) -> list[Command] | None:
        """The messages that turn what the slot holds into what it should; None when all must be replaced."""
        changes: list[Command] = []
        ruleset = self._ruleset(values, content)
        template = self._template
        if template is None:
            return None
        if self._lines or self._scalars & self._constants.keys():
            # The template does not know which rules these change, so all must be right already.
            bound = [ruleset.items[SET][entry.index] for entry in self.lists]
            if not self._expected(ruleset).holds(sock, but=bound):
                return None
        elif self._scalars:
            rendered = self._rendered(template, values)
            if rendered is None:
                return None
            found = nft_bind.scalar_changes(sock, template, rendered, self._bindable)
            if found is None:
                return None
            changes += found
        for entry in self.lists:
            item = ruleset.items[SET][entry.index]
            own = nft_bind.list_changes(sock, entry, item, content.get(entry.parameter, ()), values)
            if own is None:
                return None
            changes += own
        return changes

    def _expected(self, ruleset: Ruleset) -> nft_state.Expectation:
        return nft_state.Expectation(ruleset, {}, self._messages)

    def _put(self, values: Values, content: Parameters, *, first: Sequence[Command] = ()) -> None:
        with nf.Socket() as sock:
            if self._fallback is None:
                sock.commit(nf.Batch([*first, *self._everything(values, content)]))
                return
            sock.commit(nf.Batch(first))
            self._program.load(values, content)
            sock.commit(nf.Batch(list(self._fill(snapshot(sock), values, content))))

    def _replace_all(self, values: Values, content: Parameters) -> None:
        self._put(values, content, first=[_FLUSH])

    def _everything(self, values: Values, content: Parameters) -> Iterator[Command]:
        ruleset = self._ruleset(values, content)
        yield from nft_template.commands(ruleset, self._plan)
        yield from self._fill(ruleset, values, content)

    def _fill(self, ruleset: Ruleset, values: Values, content: Parameters) -> Iterator[Command]:
        for entry in self.lists:
            for chunk in entry.chunks(content.get(entry.parameter, ()), values):
                yield list_command(ruleset.items[SET][entry.index], chunk)

    def _elements(self, ruleset: Ruleset, values: Values, content: Parameters) -> nft_state.Lists:
        found: dict[tuple[int, str, str], bytes] = {}
        for entry in self.lists:
            item = ruleset.items[SET][entry.index]
            found[item.family, item.table, item.name] = entry.dumped(content.get(entry.parameter, ()), values)
        return found

    def _ruleset(self, values: Values, content: Parameters) -> Ruleset:
        """What one slot holds. Values beyond what the casting learnt go to the tool, in a scratch namespace."""
        if self._template is not None:
            rendered = self._rendered(self._template, values)
            if rendered is not None:
                return insert_ports(rendered, self._lines, values, content) if self._lines else rendered
        key = tuple((name, values.get(name, "")) for name in sorted(self._program.variables()))
        key += tuple((name, "\n".join(entries)) for name, entries in content.items() if self._program_ports())
        if key not in self._loaded:
            if len(self._loaded) >= _LOADED_KEPT:
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[key] = load_and_read(self._program, values, content)
        return self._loaded[key]

    def _rendered(self, template: Ruleset, values: Values) -> Ruleset | None:
        """The template with a slot's values; None when the template does not cover them."""
        if any(values.get(name) != text for name, text in self._constants.items()):
            return None
        try:
            rendered = template.render(with_words(values, self._words) if self._words else values)
        except Unpatchable:
            return None
        for form, item, keys in zip(template.items[SET], rendered.items[SET], self._keys, strict=True):
            if form.varies and _distinct_keys(item) != keys:
                return None
        return rendered

    def prove(self, samples: Sequence[Values]) -> None:
        """Stamp a scratch namespace and compare with what the tool made; fall back when they differ."""
        if self._template is None:
            return
        values = samples[-1]
        ruleset = self._ruleset(values, {})

        def act() -> str | None:
            make_devices(self._program.devices(values), PROOF_INDEX)
            self._program.prepare()
            with nf.Socket() as sock:
                try:
                    sock.commit(nf.Batch(list(nft_template.commands(ruleset, self._plan))))
                except KernelError as error:
                    return f"the kernel does not take back what the tool made ({error})"
                found = nft_state.differences(sock, self._expected(ruleset))
            return f"what is stamped is not what the tool makes ({found[0]})" if found else None

        self._fallback = in_scratch(act)
        if self._fallback:
            self._template, self._lines = None, ()


def _distinct_keys(item: Item) -> int:
    """How many keys a set's elements have: fewer in a slot where the tool would merge elements or join intervals."""
    if any(attrs.leaf(element, attrs.ELEM_KEY_END) for element in item.elements):
        return len(set(item.elements))
    return len({element_key(element)[:-1] for element in item.elements})


def _when_unused(destroy: object) -> None:
    """Call ``destroy`` until no rule refers to the sets: the kernel lets go of removed rules a little later."""
    assert callable(destroy)
    for attempt in range(_BUSY_TRIES):
        try:
            destroy()
        except KernelError as error:
            if error.errno != EBUSY or attempt == _BUSY_TRIES - 1:
                raise
            time.sleep(_BUSY_WAIT_S)
        else:
            return


__all__ = ["NftablesDie", "cast", "cast_iptables"]
