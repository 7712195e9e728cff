"""The solver's side: symbolic packets, their journeys on both sides, and concrete packets out of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import z3

from netslot.rulesets.model import Family
from netslot.rulesets.proof.flow import ESTABLISHED, FIELDS, ICMP, NEW, RELATED, STATES, UNTRACKED, Flow, Oracle
from netslot.rulesets.proof.journey import Result
from netslot.rulesets.proof.terms import Number, Truth, any_of, both, differ, negate
from netslot.rulesets.values import address_text

_DOCUMENTATION = {32: 0xCB0071, 128: 0x20010D}
"""The first 24 bits of 203.0.113.0/24 and of 2001:db8::/32: where a stranger's address should come from."""


class Unknowns:
    """The names of what is not known. The same name is the same unknown on both sides."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._width = 32 if family == 4 else 128
        self._functions: dict[tuple[str, ...], z3.FuncDeclRef] = {}
        self.numbers: dict[str, Number] = {}

    def oracle(self, key: tuple[str, ...], contents: tuple[Number, ...]) -> Truth:
        sizes = [self._width] if len(contents) == 1 else [self._width, self._width, 8, 16, 16, 3]
        sizes += [32] * (len(contents) - len(sizes)) if contents else []
        name = " ".join(key)
        if not contents:
            return z3.Bool(name)
        function = self._functions.get(key)
        if function is None:
            function = z3.Function(name, *(z3.BitVecSort(size) for size in sizes), z3.BoolSort())
            self._functions[key] = function
        arguments = [
            z3.BitVecVal(c, size) if isinstance(c, int) else c for c, size in zip(contents, sizes, strict=True)
        ]
        return function(*arguments)

    def number(self, name: str, width: int, _default: Number) -> Number:
        return self.numbers.setdefault(name, z3.BitVec(name, width))

    def flow(self) -> Flow:
        """A packet of which nothing is known."""
        fields = {name: z3.BitVec(name, width or self._width) for name, width in FIELDS.items()}
        return Flow(family=self.family, oracle=self.oracle, ctmark=z3.BitVec("ctmark", 32), **fields)

    def sane(self, flow: Flow, fragments: bool = False) -> list[Truth]:
        """What every packet is like. ``fragments``: those that nobody puts together come too."""
        states = [flow.state == number for number in range(UNTRACKED)]
        if self.family == 6:  # neighbour discovery is never tracked
            states.append(z3.And(flow.state == UNTRACKED, flow.proto == ICMP[6], z3.UGE(flow.icmp_type, 133)))
        errors = z3.And(flow.state == RELATED, flow.proto == ICMP[self.family])  # others begin connections
        return [
            z3.Or(states),
            z3.Implies(flow.reply == 1, z3.Or(flow.state == ESTABLISHED, errors)),
            *([] if fragments else [flow.fragment == 0]),
            flow.proto != 0,
        ]


def differences(before: Result, after: Result, lenient: bool) -> dict[str, Truth]:
    """What would be different, by name. ``lenient``: how a denial is answered does not count."""
    found: dict[str, Truth] = {}
    b, a = before.ledger, after.ledger
    if lenient:
        found["denied or not"] = differ(any_of(b.denied.values()), any_of(a.denied.values()))
    else:
        for kind in {**b.denied, **a.denied}:
            found[kind] = differ(b.denied.get(kind, False), a.denied.get(kind, False))
    found["accepted or not"] = differ(b.alive, a.alive)
    accepted = both(b.alive, a.alive)
    for name in {**before.translations, **after.translations}:
        one, other = before.translations.get(name, False), after.translations.get(name, False)
        found[f"translation {name}"] = both(accepted, differ(one, other))
    if before.translations or after.translations:
        found["destination port"] = both(accepted, negate(_same(before.flow.dport, after.flow.dport)))
    for words in {**b.changes, **a.changes}:
        found[f"change {words}"] = both(accepted, differ(b.changes.get(words, False), a.changes.get(words, False)))
    for part in {**before.flow.written, **after.flow.written}:
        one, other = before.flow.written.get(part, 0), after.flow.written.get(part, 0)
        found[f"the last change of {part}"] = both(accepted, negate(_same(one, other)))
    for key in {**b.asked, **a.asked}:
        found[f"whether it is counted: {' '.join(key)}"] = differ(b.asked.get(key, False), a.asked.get(key, False))
    ports = (before.flow.sport, after.flow.sport), (before.flow.dport, after.flow.dport)
    for name, (one, other) in zip(("source port", "destination port"), ports, strict=True):
        found[name] = both(accepted, negate(_same(one, other)))
    marks = (before.routed_mark, after.routed_mark), (before.flow.mark, after.flow.mark)
    for name, (one, other) in zip(("mark at routing", "mark"), marks, strict=True):
        found[name] = both(accepted, negate(_same(one, other)))
    found["connection mark"] = both(accepted, negate(_same(before.flow.ctmark, after.flow.ctmark)))
    if before.exit is not None and after.exit is not None:
        found["where it goes"] = both(accepted, before.exit != after.exit)
    return {name: truth for name, truth in found.items() if truth is not False}


def _same(a: Number, b: Number) -> Truth:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if not isinstance(a, int) and not isinstance(b, int) and a.eq(b):
        return True
    return a == b


@dataclass(frozen=True)
class ConcretePacket:
    """A packet that the solver found; ``answers`` are for what the model leaves open."""

    family: Family
    values: Mapping[str, int]
    answers: Oracle
    numbers: Mapping[str, int] = field(default_factory=dict)

    def flow(self) -> Flow:
        fields: dict[str, Any] = {name: self.values[name] for name in FIELDS}
        return Flow(family=self.family, oracle=self.answers, ctmark=self.values.get("ctmark", 0), **fields)

    def number(self, name: str, _width: int, default: Number) -> Number:
        return self.numbers.get(name, default)

    def describe(self) -> dict[str, str | int]:
        """For a reader: addresses as text, and only what this protocol has."""
        v = self.values
        said: dict[str, str | int] = {
            "src": address_text(v["src"], self.family),
            "dst": address_text(v["dst"], self.family),
            "proto": {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp"}.get(v["proto"], v["proto"]),
        }
        if v["proto"] in (6, 17, 33, 132, 136):
            said |= {"sport": v["sport"], "dport": v["dport"]}
        if v["proto"] == 6:
            names = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")
            said["flags"] = ",".join(name for bit, name in enumerate(names) if v["flags"] >> bit & 1) or "none"
        if v["proto"] == ICMP[self.family]:
            said |= {"type": v["icmp_type"], "code": v["icmp_code"]}
        return said | {"state": STATES[v["state"]]}


def concrete(model: z3.ModelRef, unknowns: Unknowns) -> ConcretePacket:
    """The packet that a model of the solver describes, with its answers to every open question."""
    values = {
        name: model.eval(z3.BitVec(name, width or (32 if unknowns.family == 4 else 128)), True).as_long()
        for name, width in {**FIELDS, "ctmark": 32}.items()
    }
    numbers = {
        declared.name(): model[declared].as_long()
        for declared in model.decls()
        if declared.arity() == 0 and z3.is_bv_value(model[declared])
    }

    def answers(key: tuple[str, ...], contents: tuple[Number, ...]) -> Truth:
        return z3.is_true(model.eval(unknowns.oracle(key, contents), True))

    return ConcretePacket(unknowns.family, values, answers, numbers)


def plainest(solver: z3.Solver, flow: Flow) -> z3.ModelRef:
    """A model that is pleasant to read and to send, if one of those will do."""
    wishes = [
        flow.state == NEW,
        z3.Or(flow.proto == 6, flow.proto == 17),
        flow.flags == 2,
        flow.length == 60,
        flow.ttl == 64,
        flow.dscp == 0,
        *(
            z3.Extract(end.size() - 1, end.size() - 24, end) == _DOCUMENTATION[end.size()]
            for end in (flow.src, flow.dst)
        ),
        z3.UGE(flow.sport, 1024),
    ]
    kept: list[Truth] = []
    for wish in wishes:
        if solver.check(*kept, wish) == z3.sat:
            kept.append(wish)
    solver.check(*kept)
    return solver.model()
