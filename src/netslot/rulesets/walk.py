"""How many rules a packet is tested against, counted by walking the ruleset as the kernel does.

Chains can hold 100,000 rules of thousands of tenants, so a chain is indexed once: rules that name a tenant
are filed under that name, and a packet looks only at the rules that could apply to it. Between two of them
the kernel tests every rule, and the walk counts every rule: the count is a matter of positions.

Where a match is *perhaps*, both ways are followed and the longer one counts; the result is the most that such
a packet can be tested against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Chain, Rule, Table
from netslot.rulesets.packets import NO, PERHAPS, YES, Packet, holds
from netslot.rulesets.values import MARK_BITS

_VARIES = -1  # beside NO, YES and PERHAPS: ask for each packet anew

Key = tuple[str | int, ...]
"""What a rule is filed under: ``("src", value, mask)``, ``("in", name)``, ``("port", number)``."""

_Mark = tuple[int, int]  # bits, and which of them are known


@dataclass(slots=True)
class Outcome:
    """The most tests on a way that falls through to the caller, that ends in accept, and that ends in drop.

    None where no such way exists. ``mark`` is the packet's mark after falling through or being accepted.
    """

    falls: int | None = None
    accepted: int | None = None
    dropped: int | None = None
    mark: _Mark = (0, MARK_BITS)

    def most(self) -> int:
        return max(way or 0 for way in (self.falls, self.accepted, self.dropped))


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """Packets that differ only in what is a tenant's own. ``varying`` names those fields.

    Fields: ``src``/``dst`` for addresses, ``in``/``out`` for interfaces and bridge ports, ``port`` for the
    ports and for whether an address is the host's own.
    """

    name: str
    varying: frozenset[str]


class _Index:
    """One chain: which rules name whom. Positions count from 0."""

    def __init__(self, chain: Chain, names: Mapping[Key, int]) -> None:
        self.chain = chain
        self.common: list[int] = []
        self.filed: dict[Key, list[int]] = {}
        self.by_template: dict[Template, list[int]] = {}
        for position, rule in enumerate(chain.rules):
            key = next((k for k in map(filing_key, rule.matches) if k in names or _is_port(k)), None)
            if key is None:
                self.common.append(position)
            else:
                self.filed.setdefault(key, []).append(position)


def filing_key(match: m.Match) -> Key | None:
    """What a rule with this match is filed under; None if the match does not single out one name."""
    if isinstance(match, m.Address) and not match.negated:
        return match.side, match.value, match.mask
    if isinstance(match, m.Interface | m.Physdev) and not match.negated and not match.wildcard:
        return match.direction, match.name
    if isinstance(match, m.Ports) and match.side == "dst" and not match.negated and len(match.ranges) == 1:
        low, high = match.ranges[0]
        return port_key(low) if low == high else None
    return None


def port_key(port: int) -> Key:
    """What rules about one destination port are filed under: every packet has one, of a known number."""
    return "port", port


def _is_port(key: Key | None) -> bool:
    return key is not None and key[0] == "port"


class TableWalker:
    """Walks packets through one table. ``names`` are the keys under which rules may be filed (see ``filing_key``)."""

    def __init__(self, table: Table, names: Mapping[Key, int]) -> None:
        self._table = table
        self._names = names
        self._indexes: dict[str, _Index] = {}
        self._template = Template("", frozenset())
        self._answers: dict[int, int] = {}
        self._answers_by_template: dict[Template, dict[int, int]] = {}
        self._memo: dict[tuple[str, _Mark], Outcome] = {}

    def walk(self, hook: str, packet: Packet, template: Template, keys: tuple[Key, ...]) -> Outcome | None:
        """The outcome in the built-in chain; None if the table has none for this hook.

        ``keys`` are the names of this packet's tenant and its port. The policy decides what falls through.
        """
        chain = self._table.chains.get(hook)
        if chain is None:
            return None
        if not chain.rules:
            mark = packet.mark, packet.mark_known
            return Outcome(dropped=0, mark=mark) if chain.policy == "DROP" else Outcome(accepted=0, mark=mark)
        self._template = template
        self._answers = self._answers_by_template.setdefault(template, {})
        self._memo = {}
        outcome = self._chain(hook, packet, keys, (packet.mark, packet.mark_known))
        end = outcome.falls
        if end is None:
            return outcome
        if chain.policy == "DROP":
            return replace(outcome, dropped=max(outcome.dropped or 0, end), falls=None)
        return replace(outcome, accepted=max(outcome.accepted or 0, end), falls=None)

    def _positions(self, name: str, packet: Packet, keys: tuple[Key, ...]) -> tuple[_Index, list[int]]:
        index = self._indexes.get(name)
        if index is None:
            index = self._indexes[name] = _Index(self._table.chains[name], self._names)
        common = index.by_template.get(self._template)
        if common is None:
            rules = index.chain.rules
            common = [p for p in index.common if self._possible(rules[p], packet)]
            index.by_template[self._template] = common
        filed = [index.filed[key] for key in keys if key in index.filed]
        if not filed:
            return index, common
        merged = list(common)
        for positions in filed:
            merged += positions
        merged.sort()
        return index, merged

    def _possible(self, rule: Rule, packet: Packet) -> bool:
        """Whether a rule can apply to some packet of the template."""
        return all(self._varies(match) or holds(match, packet) != NO for match in rule.matches)

    def _varies(self, match: m.Match) -> bool:
        varying = self._template.varying
        match match:
            case m.Address() | m.IpRange():
                return match.side in varying
            case m.Interface() | m.Physdev():
                return match.direction in varying
            case m.Ports() | m.AddrType():
                return "port" in varying
            case m.Mac() | m.Mark():
                return True
        return False

    def _rule(self, rule: Rule, packet: Packet, mark: _Mark) -> int:
        result = YES
        answers = self._answers
        varying = False
        for match in rule.matches:  # what is the same for all packets of the template fails without a look at them
            answer = answers.get(id(match))
            if answer is None:
                answer = answers[id(match)] = _VARIES if self._varies(match) else holds(match, packet)
            if answer == NO:
                return NO
            if answer == PERHAPS:
                result = PERHAPS
            elif answer == _VARIES:
                varying = True
        if not varying:
            return result
        packet.mark, packet.mark_known = mark
        for match in rule.matches:
            if answers[id(match)] == _VARIES:
                answer = holds(match, packet)
                if answer == NO:
                    return NO
                if answer == PERHAPS:
                    result = PERHAPS
        return result

    def _chain(self, name: str, packet: Packet, keys: tuple[Key, ...], mark: _Mark) -> Outcome:
        known = self._memo.get((name, mark))
        if known is not None:
            return known
        self._memo[name, mark] = Outcome(falls=0, mark=mark)  # a loop, which the kernel refuses to load
        index, positions = self._positions(name, packet, keys)
        rules = index.chain.rules
        way = _Way(mark)
        for position in positions:
            rule = rules[position]
            answer = self._rule(rule, packet, way.mark)
            if answer == NO:
                continue
            target = rule.target
            tested = position + 1 + way.extra
            if isinstance(target, t.Jump | t.Goto):
                inner = self._chain(target.chain, packet, keys, way.mark)
                way.visit(inner, tested, answer == YES, isinstance(target, t.Goto))
            else:
                way.meet(target, tested, answer == YES)
            if way.over:
                break
        else:
            way.fall(len(rules) + way.extra)
        result = way.outcome()
        self._memo[name, mark] = result
        return result


class _Way:
    """The ways through one chain, merged: those that are still under way, and those that have ended."""

    __slots__ = ("_accepted", "_accepted_mark", "_dropped", "_fallen", "_fallen_mark", "extra", "mark", "over")

    def __init__(self, mark: _Mark) -> None:
        self.extra = 0  # tests in chains that were visited
        self.mark = mark
        self.over = False
        self._accepted: int | None = None
        self._dropped: int | None = None
        self._fallen: int | None = None
        self._accepted_mark: _Mark | None = None
        self._fallen_mark: _Mark | None = None

    def fall(self, tested: int) -> None:
        self._fallen = max(self._fallen or 0, tested)
        self._fallen_mark = _merge(self._fallen_mark, self.mark)

    def _accept(self, tested: int, mark: _Mark) -> None:
        self._accepted = max(self._accepted or 0, tested)
        self._accepted_mark = _merge(self._accepted_mark, mark)

    def meet(self, target: t.Target, tested: int, surely: bool) -> None:
        """A rule that is no jump applies, surely or perhaps."""
        match target:
            case t.Accept() | t.Dnat() | t.Snat() | t.Masquerade() | t.Redirect() | t.Netmap():
                self._accept(tested, self.mark)
                self.over = surely
            case t.Drop() | t.Reject():
                self._dropped = max(self._dropped or 0, tested)
                self.over = surely
            case t.Return():
                self.fall(tested)
                self.over = surely
            case t.OpaqueTarget():
                self._accept(tested, self.mark)
                self._dropped = max(self._dropped or 0, tested)
            case t.SetMark():
                value, known = self.mark
                new = ((value & ~target.mask) ^ target.value) & MARK_BITS, known | target.mask
                self.mark = new if surely else _merge(self.mark, new)
            case t.RestoreMark():
                self.mark = self.mark[0], self.mark[1] & ~target.nfmask & MARK_BITS

    def visit(self, inner: Outcome, tested: int, surely: bool, goto: bool) -> None:
        """A jump is taken, surely or perhaps, and this is what comes of it."""
        if inner.accepted is not None:
            self._accept(tested + inner.accepted, inner.mark)
        if inner.dropped is not None:
            self._dropped = max(self._dropped or 0, tested + inner.dropped)
        if inner.falls is None:
            self.over = surely
        elif goto:
            self._fallen = max(self._fallen or 0, tested + inner.falls)
            self._fallen_mark = _merge(self._fallen_mark, inner.mark)
            self.over = surely
        else:
            self.extra += inner.falls
            self.mark = inner.mark if surely else _merge(self.mark, inner.mark)

    def outcome(self) -> Outcome:
        mark = self._fallen_mark
        if self._accepted_mark is not None:
            mark = _merge(mark, self._accepted_mark)
        return Outcome(self._fallen, self._accepted, self._dropped, mark or (0, 0))


def _merge(one: _Mark | None, other: _Mark) -> _Mark:
    """Only the bits that both know, and that agree."""
    if one is None or one == other:
        return other
    return one[0], one[1] & other[1] & ~(one[0] ^ other[0]) & MARK_BITS
