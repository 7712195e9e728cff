"""One hook of one table: rules in order, jumps and returns, marks, translations, verdicts.

With a concrete flow the walk is what the kernel does; with a symbolic one every rule adds to the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Rule
from netslot.rulesets.proof.conditions import asked_by, depends_on_place, has_connection, holds, kept_apart_by
from netslot.rulesets.proof.flow import INVALID, Flow
from netslot.rulesets.proof.places import NOBODY, Places
from netslot.rulesets.proof.rewriting import REMEMBERED, write
from netslot.rulesets.proof.tagged import Filed, FiledRuleset, Memory, Roles, memories, without_names
from netslot.rulesets.proof.terms import Number, Truth, both, choose, either, negate
from netslot.rulesets.write import target_words

DROP = "DROP"

_NEUTRAL = (t.Log, t.NoTarget)
"""Targets that change no packet and no verdict: how often they act is not part of what must stay the same."""

_TELLING = ("recent",)
"""Conditions whose memory other rules ask too, by its name: to be asked is all that such a rule is for."""

_NAT = (t.Dnat, t.Snat, t.Masquerade, t.Redirect, t.Netmap)


@dataclass(slots=True)
class Ledger:
    """What has happened to the packet so far, on its whole way.

    ``denied``: for each kind of denial (``DROP``, ``REJECT with``, a target of which nothing is known) when.
    ``changes``: when each unmodelled change was made. ``asked``: when each condition with a memory was asked;
    the key says whose memory it is. ``unclear``: conditions whose answer cannot be compared across namespaces.
    """

    alive: Truth = True
    denied: dict[str, Truth] = field(default_factory=dict)
    changes: dict[str, Truth] = field(default_factory=dict)
    asked: dict[tuple[str, ...], Truth] = field(default_factory=dict)
    unclear: dict[str, None] = field(default_factory=dict)
    trace: list[str] | None = None

    def deny(self, kind: str, when: Truth) -> None:
        self.denied[kind] = either(self.denied.get(kind, False), when)


Chooser = Callable[[str, str, Roles], list[Filed]]


class Walker:
    """Walks the hooks of one namespace."""

    def __init__(
        self,
        filed: FiledRuleset,
        places: Places,
        ledger: Ledger,
        chooser: Chooser | None = None,
        own_memories: Mapping[Memory, int] = MappingProxyType({}),
    ) -> None:
        self._filed = filed
        self._own_memories = own_memories
        self._places = places
        self._ledger = ledger
        self._choose = chooser or filed.candidates
        self._table = self._hook = ""
        self._accepted: Truth = False
        self._actions: list[tuple[Truth, t.Target, str]] = []

    def hook(self, table: str, chain: str, flow: Flow, roles: Roles) -> list[tuple[Truth, t.Target, str]]:
        """Take the packet through one hook; returns the translations that nat rules ask for, and when."""
        tables = self._filed.ruleset.tables
        if table not in tables or chain not in tables[table].chains or self._ledger.alive is False:
            return []
        self._table, self._hook, self._accepted, self._actions = table, chain, False, []
        state = flow.state
        if table == "raw" and flow.iif != "lo":
            flow.state = INVALID  # it comes before connection tracking, and has no connection yet (xt_conntrack.c)
        through = self._chain(chain, self._ledger.alive, flow, roles)
        flow.state = state
        policy = self._filed.policy(table, chain)
        if policy == "DROP" and through is not False:
            self._ledger.deny(DROP, through)
            self._note(through, flow, f"{table} {chain}: policy DROP")
            through = False
        self._ledger.alive = either(self._accepted, through)
        return self._actions

    def _chain(self, chain: str, guard: Truth, flow: Flow, roles: Roles) -> Truth:
        """Walk one chain; returns when the packet comes back to where the chain was called from."""
        back: Truth = False
        for filed in self._choose(self._table, chain, roles):
            rule = filed.rule
            met = self._met(filed, chain, guard, flow)
            if met is False:
                continue
            self._note(met, flow, f"{self._table} {chain}: {rule.text}")
            guard, returned = self._act(rule, met, guard, flow, roles)
            back = either(back, returned)
            if guard is False:
                break
        return either(back, guard)

    def _met(self, filed: Filed, chain: str, guard: Truth, flow: Flow) -> Truth:
        met, rule = guard, filed.rule
        for match in rule.matches:
            if met is False:
                return False
            if isinstance(match, m.Opaque) and match.stateful:
                continue
            met = both(met, holds(match, flow, self._places))
        if met is False:
            return False
        for match in rule.matches:
            remembers = isinstance(match, m.Opaque) and match.stateful
            if depends_on_place(match) and not remembers and not isinstance(match, m.Mac):
                self._ledger.unclear.setdefault(f"{flow.place.split(':')[0]}: {rule.text}")
            if isinstance(match, m.Opaque) and remembers:
                met = both(met, self._remembered(match, filed, chain, met, flow))
        return met

    def _remembered(self, match: m.Opaque, filed: Filed, chain: str, met: Truth, flow: Flow) -> Truth:
        """The answer of a memory: a tenant's own, all packets', or one that has a count for each address."""
        whose, rule = self._memory(filed, chain, flow), filed.rule
        if whose in ("root", flow.place) or self._filed.shared_memories.isdisjoint(memories(rule)):
            return self._ask(match, rule, whose, met, flow)
        own: Truth = False
        for side in kept_apart_by(match):
            address = flow.src if side == "src" else flow.dst
            own = either(own, self._places.is_tenants(address, self._owner(filed, chain), flow.family))
        mine, others = both(met, own), both(met, negate(own))
        answer = both(own, self._ask(match, rule, whose, mine, flow)) if mine is not False else False
        return either(answer, both(negate(own), self._ask(match, rule, "root", others, flow)))

    def _ask(self, match: m.Opaque, rule: Rule, whose: str, met: Truth, flow: Flow) -> Truth:
        """A condition with a memory: the same memory, asked by the same packets, gives the same answer."""
        if isinstance(rule.target, _NEUTRAL) and match.module not in _TELLING:
            return True  # whatever the answer, nothing comes of it
        own: Mapping[Memory, int] = {} if whose == "root" else self._own_memories
        words = without_names(match, own)
        others = tuple(
            " ".join(without_names(x, own)) if isinstance(x, m.Opaque) else repr(x)
            for x in rule.matches
            if x is not match and not isinstance(x, m.Address | m.Interface)
        )
        key = (whose, self._table, *words, *target_words(rule.target, flow.family), *others)
        self._ledger.asked[key] = either(self._ledger.asked.get(key, False), met)
        return flow.oracle(key, asked_by(match, flow))

    def _memory(self, filed: Filed, chain: str, flow: Flow) -> str:
        """Whose the memory is: the slot's, the one tenant's whose packets alone come here, or all packets'."""
        if flow.place != "root":
            return flow.place
        owner = self._owner(filed, chain)
        return "root" if owner == NOBODY else f"slot:{self._places.tenants[owner].name}"

    def _owner(self, filed: Filed, chain: str) -> int:
        people = {who for role, who in filed.tags if role != "to"}
        owner = self._filed.chain_owner.get((self._table, chain), NOBODY)
        return people.pop() if owner == NOBODY and len(people) == 1 else owner

    def _act(self, rule: Rule, met: Truth, guard: Truth, flow: Flow, roles: Roles) -> tuple[Truth, Truth]:
        """What the target does; returns when the walk goes on, and when it goes back to the caller."""
        target = rule.target
        rest = both(guard, negate(met))
        ledger = self._ledger
        match target:
            case t.Accept():
                self._accepted = either(self._accepted, met)
            case t.Drop():
                ledger.deny(DROP, met)
            case t.Reject():
                ledger.deny(f"REJECT {target.with_}", met)
            case t.Return():
                return rest, met
            case t.Jump():
                return either(rest, self._chain(target.chain, met, flow, roles)), False
            case t.Goto():
                return rest, self._chain(target.chain, met, flow, roles)
            case t.Dnat() | t.Snat() | t.Masquerade() | t.Redirect() | t.Netmap():
                self._actions.append((met, target, rule.text))
                self._accepted = either(self._accepted, met)
            case t.OpaqueTarget():
                return self._stranger(target, met, rest, flow), False
            case _:
                self._alter(target, met, flow)
                return guard, False
        return rest, False

    def _stranger(self, target: t.OpaqueTarget, met: Truth, rest: Truth, flow: Flow) -> Truth:
        """Of a target that nothing is known of not even whether the walk goes on: follow both ways."""
        name = f"{' '.join(target.words)} in {flow.place}"
        goes_on = flow.oracle(("goes on", name), flow.contents())
        self._ledger.deny(name, both(met, negate(goes_on)))
        return either(rest, both(met, goes_on))

    def _alter(self, target: t.Target, met: Truth, flow: Flow) -> None:
        connected = both(met, has_connection(flow))
        match target:
            case t.SetMark():
                flow.mark = choose(met, (flow.mark & _inverse(target.mask)) ^ target.value, flow.mark, 32)
            case t.SetConnmark():
                new = (flow.ctmark & _inverse(target.mask)) ^ target.value
                flow.ctmark = choose(connected, new, flow.ctmark, 32)
            case t.SaveMark():
                saved = (flow.ctmark & _inverse(target.ctmask)) ^ (flow.mark & target.nfmask)
                flow.ctmark = choose(connected, saved, flow.ctmark, 32)
            case t.RestoreMark():
                restored = (flow.mark & _inverse(target.nfmask)) ^ (flow.ctmark & target.ctmask)
                flow.mark = choose(connected, restored, flow.mark, 32)
            case t.Notrack():
                flow.tracked = both(flow.tracked, negate(met))
            case t.Modify() if target.name in REMEMBERED:
                key = (flow.place, self._table, self._hook, *target.words)
                self._ledger.asked[key] = either(self._ledger.asked.get(key, False), met)
            case t.CtTarget() | t.Modify():
                words = " ".join(target.words)
                self._ledger.changes[words] = either(self._ledger.changes.get(words, False), met)
                if isinstance(target, t.Modify):
                    write(target, met, flow)
            case _:
                pass  # NoTarget and Log leave the packet as it is

    def _note(self, met: Truth, flow: Flow, text: str) -> None:
        if self._ledger.trace is not None and met is True:
            where = "root" if flow.place == "root" else "slot"
            self._ledger.trace.append(f"{where}: {text}")


def _inverse(mask: int) -> Number:
    return ~mask & 0xFFFFFFFF
