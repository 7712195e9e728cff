"""Rules of many tenants that differ in addresses and ports only, as one rule and a set of these.

Rules of a chain are taken in order. One joins an earlier group when it may stand there: past every group between,
which it does if no packet meets both or if both do the same. So the result decides about every packet as the rules
did. One order is given up: a jump on a packet's source into one tenant's chain against a jump on its destination
into another's; which comes first differs from pair to pair, and the proof tells whether it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.ipsets import PROTOCOLS, Part
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.places import NOBODY, Pattern, Places
from netslot.rulesets.values import ALL_ONES, prefix_length

_LOOK_BACK = 64
"""How many groups a rule is tried against, from the last one backwards; further back it opens a new one."""
_MOST_PORTS = 64

VERDICTS = (*t.TERMINAL, t.Return)
NEUTRAL = (t.Log, t.NoTarget)


@dataclass(frozen=True, slots=True)
class OwnChain:
    """Stands for a tenant's own chain in a target: ``shape`` is the same for chains that say the same."""

    shape: int
    goto: bool


Aim = t.Target | OwnChain


@dataclass(frozen=True, slots=True)
class Key:
    """What a packet must be, as far as it is addresses and ports. ``ports``: side, protocol, ranges."""

    src: Pattern | None
    dst: Pattern | None
    ports: tuple[str, int, tuple[tuple[int, int], ...]] | None

    def side(self, side: m.Side) -> Pattern | None:
        return self.src if side == "src" else self.dst


@dataclass(frozen=True, slots=True)
class Shape:
    """What rules of one group share. ``sides``: the addresses that differ; ``port``: the side of the port, if any."""

    rest: tuple[m.Match, ...]
    sides: tuple[m.Side, ...]
    port: m.Side | None
    aim: Aim


@dataclass(frozen=True, slots=True)
class Member:
    """One rule of a group and whose it is."""

    rule: Rule
    tenant: int
    key: Key


@dataclass
class Group:
    """``shape`` is None for a rule that stands for itself."""

    aim: Aim
    rest: tuple[m.Match, ...]
    shape: Shape | None
    members: list[Member] = field(default_factory=list)
    _index: dict[m.Side, dict[int, dict[int, list[Key]]]] = field(default_factory=lambda: {"src": {}, "dst": {}})
    _open: list[Key] = field(default_factory=list)

    def add(self, member: Member) -> None:
        self.members.append(member)
        key = member.key
        for side in _SIDES:
            pattern = key.side(side)
            if pattern is not None:
                value, mask = pattern
                self._index[side].setdefault(mask, {}).setdefault(value, []).append(key)
        if key.src is None and key.dst is None:
            self._open.append(key)

    def meets(self, key: Key) -> bool:
        """Whether some packet can meet the key and a member's."""
        if any(_ports_meet(key, other) for other in self._open):
            return True
        return any(_meet(key, other) for side in _SIDES for other in self._near(side, key))

    def _near(self, side: m.Side, key: Key) -> Iterator[Key]:
        """Members that have an address on this side, and one that can be the same as the key's."""
        pattern = key.side(side)
        for mask, values in self._index[side].items():
            if pattern is not None and pattern[1] & mask == mask:
                yield from values.get(pattern[0] & mask, ())
                continue
            for value, keys in values.items():
                if pattern is None or not (value ^ pattern[0]) & mask & pattern[1]:
                    yield from keys

    def has_address(self, side: m.Side, pattern: Pattern) -> bool:
        return pattern[0] in self._index[side].get(pattern[1], {})

    def one_mask(self, side: m.Side, mask: int) -> bool:
        return not self._index[side].keys() - {mask}


_SIDES: tuple[m.Side, ...] = ("src", "dst")


def _meet(one: Key, other: Key) -> bool:
    for side in _SIDES:
        a, b = one.side(side), other.side(side)
        if a is not None and b is not None and (a[0] ^ b[0]) & a[1] & b[1]:
            return False
    return _ports_meet(one, other)


def _ports_meet(one: Key, other: Key) -> bool:
    a, b = one.ports, other.ports
    if a is None or b is None:
        return True
    if a[1] != b[1]:
        return False
    return a[0] != b[0] or any(low <= end and start <= high for low, high in a[2] for start, end in b[2])


class Gatherer:
    """Gathers the rules of one family. ``aim`` says what a target stands for (a tenant's own chain)."""

    def __init__(self, places: Places, family: Family, aim: Callable[[Rule, int], Aim | None]) -> None:
        self._places, self._family, self._aim = places, family, aim

    def gather(self, rules: Sequence[tuple[Rule, int]]) -> list[Group]:
        """Groups in the order in which they have to stand. ``rules``: each with its tenant, or NOBODY.

        An address that is no tenant's stays in the rule, unless there would be many rules then.
        """
        plain = self._gather(rules, False)
        wide = self._gather(rules, True) if len(plain) > 8 else plain
        return wide if 2 * len(wide) < len(plain) else plain

    def _gather(self, rules: Sequence[tuple[Rule, int]], wide: bool) -> list[Group]:
        groups: list[Group] = []
        by_shape: dict[Shape, int] = {}
        for rule, tenant in rules:
            aim = rule.target if tenant == NOBODY else self._aim(rule, tenant)
            key = self._key(rule)
            member = Member(rule, tenant, key)
            shape = self._shape(rule, key, aim, wide) if tenant != NOBODY and aim is not None else None
            place = by_shape.get(shape, -1) if shape is not None else -1
            if place >= 0 and self._fits(groups, place, member):
                groups[place].add(member)
                continue
            rest = shape.rest if shape is not None else self._rest(rule)
            group = Group(rule.target if aim is None else aim, rest, shape)
            group.add(member)
            groups.append(group)
            if shape is not None:
                by_shape[shape] = len(groups) - 1
        return groups

    def _fits(self, groups: list[Group], place: int, member: Member) -> bool:
        group = groups[place]
        shape = group.shape
        assert shape is not None
        if len(groups) - place > _LOOK_BACK:
            return False
        if not isinstance(shape.aim, (*VERDICTS, *NEUTRAL)):
            side = shape.sides[0]
            pattern = member.key.side(side)
            if pattern is None or group.has_address(side, pattern) or not group.one_mask(side, pattern[1]):
                return False
        return all(
            _passes(member, shape, other) or self._ways_part(member, shape, other) for other in groups[place + 1 :]
        )

    def _ways_part(self, member: Member, shape: Shape, other: Group) -> bool:
        """Whether one is about packets that leave by an uplink, and the other about packets to a tenant."""
        if _leaves_by(shape.rest) in self._places.uplinks:
            return all(self._owner(x.key.dst) != NOBODY for x in other.members)
        if _leaves_by(other.rest) in self._places.uplinks:
            return self._owner(member.key.dst) != NOBODY
        return False

    def _key(self, rule: Rule) -> Key:
        found: dict[str, Pattern] = {}
        protocol = 0
        ports: m.Ports | None = None
        for match in rule.matches:
            if isinstance(match, m.Address) and not match.negated and match.side not in found:
                found[match.side] = (match.value, match.mask)
            elif isinstance(match, m.Protocol) and not match.negated:
                protocol = match.number
            elif isinstance(match, m.Ports) and not match.negated and match.side != "either":
                ports = match if ports is None or match.side == "dst" else ports
        wanted = (ports.side, protocol, ports.ranges) if ports is not None and protocol else None
        return Key(found.get("src"), found.get("dst"), wanted)

    def _rest(self, rule: Rule) -> tuple[m.Match, ...]:
        return tuple(x for x in rule.matches if not isinstance(x, m.Address))

    def _shape(self, rule: Rule, key: Key, aim: Aim, wide: bool) -> Shape | None:
        """None if the rule cannot be one of many."""
        if isinstance(aim, t.OpaqueTarget):
            return None
        if any(isinstance(x, m.Opaque) and x.stateful for x in rule.matches) and not isinstance(aim, NEUTRAL):
            return None
        own = [side for side in _SIDES if self._owner(key.side(side)) != NOBODY]
        if not own:
            return None
        sides = tuple(side for side in _SIDES if (wide or side in own) and _is_network(key.side(side), self._family))
        if not set(own) <= set(sides):
            return None
        port = self._port(rule, key)
        gone: list[m.Match] = []
        for match in rule.matches:
            pinned = isinstance(match, m.Address) and not match.negated and match.side in sides
            if pinned or (port is not None and isinstance(match, m.Ports) and match.side == port):
                gone.append(match)
            elif isinstance(match, m.Address) and self._owner((match.value, match.mask)) != NOBODY:
                return None
        if len(gone) != len(sides) + (port is not None):
            return None
        return Shape(tuple(x for x in rule.matches if x not in gone), sides, port, aim)

    def _owner(self, pattern: Pattern | None) -> int:
        return NOBODY if pattern is None else self._places.owner_of(*pattern, self._family)

    def _port(self, rule: Rule, key: Key) -> m.Side | None:
        if key.ports is None or key.ports[1] not in PROTOCOLS.values():
            return None
        side, _, ranges = key.ports
        if sum(high - low + 1 for low, high in ranges) > _MOST_PORTS:
            return None
        return "src" if side == "src" else "dst"


def parts_of(member: Member, shape: Shape) -> list[tuple[Part, ...]]:
    """The member's elements of the group's set: addresses and ports in the order of the set's type."""
    addresses = [pattern for side in shape.sides if (pattern := member.key.side(side)) is not None]
    if shape.port is None:
        return [tuple(addresses)]
    assert member.key.ports is not None
    _, protocol, ranges = member.key.ports
    ports = [(protocol, port) for low, high in ranges for port in range(low, high + 1)]
    return [(addresses[0], port, *addresses[1:]) for port in ports]


def kind_of(members: Sequence[Member], shape: Shape, family: Family) -> tuple[str, tuple[str, ...]]:
    """The type of set that holds them, and what of a packet it is asked for."""
    port = () if shape.port is None else (shape.port,)
    flags = (shape.sides[0], *port, *shape.sides[1:])
    if len(shape.sides) == 1:
        return ("hash:net,port" if port else "hash:net"), flags
    if not port:
        return "hash:net,net", flags
    first = {pattern[1] for x in members if (pattern := x.key.side(shape.sides[0])) is not None}
    return ("hash:ip,port,net" if first == {ALL_ONES[family]} else "hash:net,port,net"), flags


def _is_network(pattern: Pattern | None, family: Family) -> bool:
    return pattern is not None and pattern[1] != 0 and prefix_length(pattern[1], family) is not None


def _passes(member: Member, shape: Shape, other: Group) -> bool:
    """Whether the member may stand before all of the other group instead of behind it."""
    if shape.aim == other.aim and isinstance(shape.aim, VERDICTS):
        return True
    if isinstance(shape.aim, OwnChain) and isinstance(other.aim, OwnChain):
        assert other.shape is not None
        if not set(shape.sides) & set(other.shape.sides):
            return True
    if _never_both(shape.rest, other.rest):
        return True
    return not other.meets(member.key)


def _leaves_by(matches: tuple[m.Match, ...]) -> str:
    for match in matches:
        if isinstance(match, m.Interface) and match.direction == "out" and not match.negated and not match.wildcard:
            return match.name
    return ""


def _never_both(one: tuple[m.Match, ...], other: tuple[m.Match, ...]) -> bool:
    """Whether conditions beside addresses keep two rules apart."""
    return any(_apart(a, b) for a in one for b in other)


def _apart(a: m.Match, b: m.Match) -> bool:
    if getattr(a, "negated", False) != getattr(b, "negated", False):
        x, y = (a, b) if getattr(b, "negated", False) else (b, a)
        return hasattr(y, "negated") and not isinstance(x, m.Opaque | m.Ports) and _plain(y) == x
    if getattr(a, "negated", False):
        return False
    if isinstance(a, m.Protocol) and isinstance(b, m.Protocol):
        return a.number != b.number
    if isinstance(a, m.Interface) and isinstance(b, m.Interface) and a.direction == b.direction:
        return not (a.wildcard or b.wildcard) and a.name != b.name
    if isinstance(a, m.CtState) and isinstance(b, m.CtState):
        return not (a.states & b.states) and not (a.states | b.states) & {"SNAT", "DNAT"}
    return False


def _plain(match: m.Match) -> m.Match:
    """The condition without its negation."""
    if isinstance(match, m.Protocol | m.Interface | m.CtState | m.DevGroup):
        return replace(match, negated=False)
    return match
