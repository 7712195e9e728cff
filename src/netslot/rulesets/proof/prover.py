"""Puts the question of each scenario to the solver, and checks its answers against the whole ruleset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import z3

from netslot.rulesets.model import Dump, Family
from netslot.rulesets.proof.alike import alike
from netslot.rulesets.proof.arrangement import NO_SLOT, Arrangement
from netslot.rulesets.proof.comparing import compared_bits, out_of_order
from netslot.rulesets.proof.flow import Flow
from netslot.rulesets.proof.journey import Journey, Result, Side, Slot, Way
from netslot.rulesets.proof.limits import Limits, asks_for_fragments, tracks, unheard
from netslot.rulesets.proof.members import Portraits
from netslot.rulesets.proof.orders import Orders
from netslot.rulesets.proof.places import NOBODY, Places, widened
from netslot.rulesets.proof.scenarios import Cast, cast, elsewhere, from_tenant, others
from netslot.rulesets.proof.solving import ConcretePacket, Unknowns, concrete, differences, plainest
from netslot.rulesets.proof.standing import standings
from netslot.rulesets.proof.tagged import FiledRuleset, Tag
from netslot.rulesets.proof.terms import Truth, any_of, either, negate
from netslot.rulesets.proof.translations import Translations
from netslot.rulesets.targets import Dnat
from netslot.rulesets.values import address_text

_TRIES = 40
"""How often an answer that the whole ruleset does not bear out is excluded and the question put again."""


@dataclass(frozen=True)
class Counterexample:
    """One packet that fares differently. ``before``, ``after``: the rules it met, and what came of it."""

    tenant: str
    packet: dict[str, str | int]
    before: dict[str, Any]
    after: dict[str, Any]
    parts: str
    way: Way
    concrete: ConcretePacket


@dataclass
class Verdict:
    """``obstacles``: why it is not provable, where that is not a counterexample. ``notes``: for the reader."""

    tenants: int = 0
    classes: int = 0
    scenarios: int = 0
    counterexamples: list[Counterexample] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def equivalent(self) -> bool:
        return not self.counterexamples and not self.obstacles


@dataclass(frozen=True)
class Sides:
    """Both sides of one family, filed."""

    family: Family
    before: Side
    after: Side


class Classes(NamedTuple):
    """``kinds``: the class of each tenant. ``obstacle``: why one of each class cannot stand for all."""

    kinds: list[int]
    obstacle: str = ""


def prove(dump: Dump, places: Places, arrangement: Arrangement, enough: int = 5) -> Verdict:
    """Compare the dump with the arrangement for all packets. ``places`` comes from the dump, not the arrangement.

    Stops after ``enough`` counterexamples.
    """
    verdict = Verdict(tenants=len(places.tenants))
    verdict.notes += [
        f"{name} has no slot, and its rules are taken as the host's: {why}" for name, why in places.left_out
    ]
    verdict.obstacles += _mismatches(dump, places, arrangement)
    if verdict.obstacles:
        return verdict
    places = widened(places, arrangement.root)
    arrangement = aligned(places, arrangement)
    families = [both_sides(dump, places, arrangement, ruleset.family) for ruleset in dump.rulesets]
    kinds, obstacle = classes_of(places, arrangement, families)
    if obstacle:
        verdict.obstacles.append(obstacle)
        return verdict
    orders = [Orders(sides.before.root, kinds) for sides in families]
    players = cast(kinds, orders[0].rank)
    verdict.classes = len(players.first)
    verdict.assumptions = places.assumptions([sides.family for sides in families])
    if families and families[0].after.places.groups:
        verdict.assumptions.append("no link of the host but the slots' is in a slots' group (migrate sets these)")
    verdict.assumptions += [
        "a connection that is open was translated as the rules say now",
        "the mark that a packet leaves on its connection matters where the packet passes",
        "between two tenants a denial is a denial, whether it is answered or silent",
        "what REJECT answers may come from another address than before: that of the namespace which refuses",
    ]
    moved = any(member.kind for member in arrangement.members)
    if moved:
        verdict.assumptions += [
            "what a tenant sends to its own address its slot may turn round, without root",
            "what a tenant sends to all (broadcast, multicast) or to a link-local address ends in its slot, and no "
            "server of the host's hears it",
        ]
        verdict.notes += unheard(dump, places)
    if arrangement.asks_for_hosts:
        verdict.assumptions.append("slots are told every address of the host's (the templates ask for them)")
    for family in places.guessed & {sides.family for sides in families}:
        verdict.notes.append(
            f"{address_text(places.hosts[family][0], family)} stands for an address of the host that no rule names; "
            "say what the host is called with --host-address"
        )
    for sides, order in zip(families, orders, strict=True):
        if moved or not alike(sides.before.root.ruleset, sides.after.root.ruleset):
            _Prover(sides, players, order, verdict).run(enough)
        else:
            verdict.notes.append(f"IPv{sides.family}: rule for rule the same in root, and no tenant is moved")
    return verdict


def classes_of(places: Places, arrangement: Arrangement, families: Sequence[Sides]) -> Classes:
    """The class of each tenant: members are renamings of each other on both sides."""
    portraits = Portraits(places, arrangement)
    for sides in families:
        portraits.add(sides.family, sides.before.root, sides.after.root)
    bits = compared_bits(sides.after.root.ruleset for sides in families)
    kinds = portraits.classes(bits)
    alone: set[int] = set()
    numbers = [member.group & bits for member in arrangement.members]
    for standing in (each for sides in families for each in standings(sides.before.root) if bits):
        strangers = out_of_order(standing.tenants, numbers, kinds) if standing.mode != "mixed" else None
        if strangers is None:
            where = f"{standing.table} {standing.chain}"
            return Classes(
                kinds, f"root compares the numbers of links, and tenants' rules of {where} have no such order"
            )
        alone |= strangers
    return Classes(portraits.classes(bits, alone) if alone else kinds)


def both_sides(dump: Dump, places: Places, arrangement: Arrangement, family: Family) -> Sides:
    """File the rules of both sides; slots are instantiated when they are asked for."""
    ruleset = dump.family(family)
    assert ruleset is not None
    after_places = replace(places, groups={m.link: m.group for m in arrangement.members if m.group})
    nobody = replace(places, tenants=())

    @lru_cache(maxsize=256)
    def slot_of(tenant: int) -> Slot | None:
        member = arrangement.members[tenant]
        if not member.kind:
            return None
        rules = arrangement.slot_rules(member, family)
        filed = FiledRuleset(rules, nobody) if rules is not None else None
        return Slot(
            places.tenants[tenant].name, filed, arrangement.attachment, arrangement.guest_if, arrangement.uplink_if
        )

    old, new = FiledRuleset(ruleset, places), FiledRuleset(arrangement.root[family], after_places)
    before = Side(old, places, own_memories=old.own_memories)
    after = Side(new, after_places, slot_of, own_memories=old.own_memories)
    return Sides(family, before, after)


def _mismatches(dump: Dump, places: Places, arrangement: Arrangement) -> list[str]:
    """What makes the comparison meaningless before it begins."""
    found = []
    served = {member.link for member in arrangement.members}
    for tenant in places.tenants if served else ():
        if not tenant.interfaces:
            found.append(f"tenant {tenant.name} has no link of its own, and others of the directory have slots")
        elif tenant.interfaces[0] not in served:
            found.append(f"tenant {tenant.name}: no slot of the directory is behind its link {tenant.interfaces[0]}")
    strangers = served - set(places.link_owner)
    if strangers:
        found.append(f"the directory has slots behind links that are no tenant's: {', '.join(sorted(strangers)[:5])}")
    if len(arrangement.members) != len(served):
        found.append("the directory has two slots behind one link")
    for ruleset in dump.rulesets:
        if ruleset.family not in arrangement.root:
            found.append(f"the directory has no root ruleset for IPv{ruleset.family}")
    for family in sorted(arrangement.root.keys() - {ruleset.family for ruleset in dump.rulesets}):
        found.append(f"the directory has rules for IPv{family}, and the dump has none: give that dump too")
    return found[:20]


def aligned(places: Places, arrangement: Arrangement) -> Arrangement:
    """The members in the order of the tenants: whoever sits behind a tenant's link decides, whatever it is called.

    Where no rule names the host, what stands for it stands for it in the templates too.
    """
    behind = {member.link: member for member in arrangement.members}
    guessed = {family: places.hosts[family] for family in places.guessed}
    links = [next(iter(tenant.interfaces), "") for tenant in places.tenants]
    return replace(arrangement, members=tuple(behind.get(link, NO_SLOT) for link in links), hosts=guessed)


class _Prover:
    def __init__(self, sides: Sides, players: Cast, orders: Orders, verdict: Verdict) -> None:
        self._sides, self._orders = sides, orders
        self._players = players
        self._limits = Limits(sides.before.places, sides.after, sides.family)
        self._fragments = self._asks_for_fragments()
        self._nat = Translations(sides.before.root, sides.after.root, sides.before.places)
        self._verdict = verdict
        self._family: Family = sides.family
        self._places = sides.before.places
        self._settled: set[Way] = set()  # strangers' ways on which both sides say the same of every source

    def run(self, enough: int) -> None:
        """All scenarios, until there are enough counterexamples."""
        self._check_published()
        for way in self._ways():
            if len(self._verdict.counterexamples) >= enough:
                return
            self._verdict.scenarios += 1
            self._scenario(way)

    def _asks_for_fragments(self) -> bool:
        """Whether fragments that nobody puts together meet a rule about fragments."""
        rulesets = [side.root.ruleset for side in self._both()]
        return any(map(asks_for_fragments, rulesets)) and not tracks(rulesets[0])

    def _check_published(self) -> None:
        """A port published under another tenant's address would be a way that no scenario takes."""
        for filed in (self._sides.before.root, self._sides.after.root):
            for item in filed.chains.get(("nat", "PREROUTING"), ()):
                people = {who for _, who in item.tags}
                if isinstance(item.rule.target, Dnat) and len(people) > 1:
                    self._verdict.obstacles.append(
                        f"a port of one tenant's address leads to another: {item.rule.text}"
                    )

    def _ways(self) -> Iterator[Way]:
        for tenant in self._players.first:
            spoofing = not self._no_spoofing(tenant)
            yield from from_tenant(tenant, self._players, self._places, spoofing)
        yield from others(self._players, self._places)

    def _no_spoofing(self, tenant: int) -> bool:
        """Whether packets from this tenant under any address but its own are dropped first thing on both sides."""
        if any(self._sides.before.root.by_source_alone(table) for table in ("raw", "mangle")):
            return False
        link = self._places.link(tenant)
        way = Way(link, self._places.outside[0], tenant, NOBODY, NOBODY)
        unknowns = Unknowns(self._family)
        solver = _solver()
        flow = unknowns.flow()
        solver.add(negate(self._places.is_tenants(flow.src, tenant, self._family)), *unknowns.sane(flow))
        solver.add(*self._limits.ends(way, flow))
        results = [Journey(side, way, unknowns.number).first_step(flow.copy()) for side in self._both()]
        if any(ledger.asked or ledger.denied.keys() != {"DROP"} for ledger in results):
            return False
        return bool(solver.check(either(results[0].alive, results[1].alive)) == z3.unsat)

    def _both(self) -> tuple[Side, Side]:
        return self._sides.before, self._sides.after

    def _scenario(self, way: Way) -> None:
        one = way.sender if way.sender != NOBODY else way.source
        if NOBODY in (one, way.receiver) or one == way.receiver:
            if not self._is_settled(way):
                self._question(way, self._sides.before, lenient=False)
            return
        early, late = self._players.extremes(one, way.receiver)
        self._pair(way, one, early, late, (early, late))
        early, late = self._players.extremes(way.receiver, one)
        self._pair(way, one, late, early, (early, late))

    def _pair(self, way: Way, one: int, sender: int, receiver: int, order: tuple[int, int]) -> None:
        """The way between two others of the same classes, and the rules of one before those of the other."""
        if sender == receiver:
            return  # of one tenant alone, both orders are the same
        people = {one: sender, way.receiver: receiver}
        other = replace(
            way,
            entry=self._places.link(sender) if way.sender != NOBODY else way.entry,
            sender=people.get(way.sender, way.sender),
            receiver=receiver,
            source=people.get(way.source, way.source),
        )
        if self._is_settled(other):
            return
        side = replace(self._sides.before, choose=self._orders.chooser(*order))
        self._question(other, side, lenient=way.sender != NOBODY)

    def _is_settled(self, way: Way) -> bool:
        """Whether strangers' packets fare the same, whosever they are, and no rule asks for this source."""
        strangers = replace(way, source=NOBODY, receiver=self._players.foremost(way.receiver))
        if way.source == NOBODY or strangers not in self._settled:
            return False
        here: set[Tag] = {("dst", way.receiver), ("out", way.receiver)}
        return not any(
            {tag for tag in beside if tag[0] != "to"} <= here
            for side in self._both()
            for beside in side.root.beside_source.get(way.source, ())
        )

    def _question(self, asked: Way, before_side: Side, lenient: bool) -> None:
        way = self._translatable(asked)
        unknowns = Unknowns(self._family)
        flow = unknowns.flow()
        before = Journey(before_side, way, unknowns.number).travel(flow.copy())
        after = Journey(self._sides.after, way, unknowns.number).travel(flow.copy())
        wrong = any_of(differences(before, after, lenient).values())
        parted = self._limits.parted(way, before, after)
        strange = asked.sender == asked.source == NOBODY
        if wrong is False and parted is False:
            self._settled.update([asked] if strange else [])
            return
        given = [*unknowns.sane(flow, self._fragments), *self._limits.of(way, flow, before, after)]
        given += self._nat.limits(unknowns, flow, way)
        if strange and _impossible([*given, either(wrong, parted)]):
            self._settled.add(asked)
            return
        given += self._limits.whose(way, flow)
        if wrong is not False:
            self._ask(way, unknowns, flow, [*given, negate(parted), wrong], after)
        if parted is not False and not self._limits.turned(way):
            self._parted(way, before_side, lenient, unknowns, flow, [*given, parted])

    def _parted(
        self, way: Way, before_side: Side, lenient: bool, unknowns: Unknowns, flow: Flow, given: Sequence[Truth]
    ) -> None:
        """Packets that one side routes this way, and the other side another: each is walked as it goes."""
        if _impossible(given):
            return
        number = unknowns.number
        for other in map(self._translatable, elsewhere(way, self._players, self._places)):
            for ways in [(way, other), (other, way)] if way.receiver != NOBODY else [(way, other)]:
                before = Journey(before_side, ways[0], number).travel(flow.copy())
                after = Journey(self._sides.after, ways[1], number).travel(flow.copy())
                wrong = any_of(differences(before, after, lenient).values())
                if wrong is False:
                    continue
                goes = [self._limits.goes(ways[0], before), self._limits.goes(ways[1], after)]
                self._ask(way, unknowns, flow, [*given, *goes, wrong], after)

    def _ask(self, way: Way, unknowns: Unknowns, flow: Flow, given: Sequence[Truth], after: Result) -> None:
        """Whether there is such a packet; one that the whole rulesets bear out is a counterexample."""
        solver = _solver()
        solver.add(*given)
        turned = self._limits.turned(way)
        for tries in range(_TRIES):
            outcome = solver.check()
            if outcome == z3.unsat:
                if tries and not turned:  # more than these packets was left out
                    self._obstacle(self._unsure(way), way)
                return
            if outcome == z3.unknown:
                self._obstacle(f"the solver gave up ({solver.reason_unknown()})", way)
                return
            packet = concrete(plainest(solver, flow), unknowns)
            unclear = [text for text in after.ledger.unclear if text.startswith("slot:")]
            if unclear and not turned:
                self._obstacle(f"a condition cannot be compared across namespaces: {unclear[0]}", way)
                return
            found = self._confirm(way, packet)
            if found is not None and turned:
                text = (
                    f"a packet of tenant {found.tenant} to its own address, which its slot turns round: {found.parts}"
                )
                if text not in self._verdict.notes:
                    self._verdict.notes.append(text)
                return
            if found is not None:
                if all(known.packet != found.packet for known in self._verdict.counterexamples):
                    self._verdict.counterexamples.append(found)
                return
            solver.add(self._other_than(flow, packet))
        if not turned:  # what is turned round is taken for granted, and said so
            self._obstacle(f"{self._unsure(way)}, and the model's packets are not those of the whole ruleset", way)

    def _unsure(self, way: Way) -> str:
        pair = way.sender != NOBODY and way.receiver != NOBODY
        return "the answer depends on whose rules stand first" if pair else "tenants' rules overlap"

    def _other_than(self, flow: Flow, packet: ConcretePacket) -> Truth:
        """Exclude the neighbourhood of an answer: its destination and port."""
        values = packet.values
        return z3.Or(flow.dport != values["dport"], flow.dst != values["dst"], flow.state != values["state"])

    def _obstacle(self, reason: str, way: Way) -> None:
        text = f"IPv{self._family}, {self._describe(way)}: {reason}"
        if text not in self._verdict.obstacles:
            self._verdict.obstacles.append(text)

    def _describe(self, way: Way) -> str:
        tenants = self._places.tenants
        start = tenants[way.sender].name if way.sender != NOBODY else way.entry or "the host"
        end = tenants[way.receiver].name if way.receiver != NOBODY else "the host" if way.local else way.exit
        return f"from {start} to {end}"

    def _translatable(self, way: Way) -> Way:
        """Whether tracked connections on this way can have translated addresses: only if some rule can do it."""
        entering, leaving = self._nat.entering(way), self._nat.leaving(way)
        return replace(way, dst_translated=entering, src_translated=leaving, as_ruled=True)

    def _confirm(self, way: Way, packet: ConcretePacket) -> Counterexample | None:
        """Take the packet through both whole arrangements; None when it fares the same."""
        before, after = self.replayed(way, packet)
        pair = way.sender != NOBODY and way.receiver not in (NOBODY, way.sender)
        wrong = differences(before, after, lenient=pair)
        if not wrong:
            return None
        who = way.sender if way.sender != NOBODY else way.receiver
        name = self._places.tenants[who].name if who != NOBODY else ""
        said = packet.describe() | {"from": way.entry or "the host itself"}
        return Counterexample(name, said, _story(before), _story(after), ", ".join(sorted(wrong)), way, packet)

    def replayed(self, way: Way, packet: ConcretePacket) -> tuple[Result, Result]:
        before = Journey(self._sides.before, way, packet.number, trace=True).travel(packet.flow())
        after = Journey(self._sides.after, way, packet.number, trace=True).travel(packet.flow())
        return before, after


def _story(result: Result) -> dict[str, Any]:
    ledger = result.ledger
    verdict = "accepted" if ledger.alive is True else next((k for k, v in ledger.denied.items() if v is True), "?")
    made = [name for name, when in result.translations.items() if when is True]
    story: dict[str, Any] = {"verdict": verdict, "path": list(ledger.trace or ())}
    if verdict == "accepted":
        story |= {"leaves": result.exit or "to the host", "mark": result.flow.mark, "translations": made}
    return story


def _impossible(given: Sequence[Truth]) -> bool:
    solver = _solver()
    solver.add(*given)
    return bool(solver.check() == z3.unsat)


def _solver() -> z3.Solver:
    solver = z3.Solver()
    solver.set("timeout", 20_000)
    return solver
