"""Packets through one or more stages: connections are opened, packets sent, answered, and what came out compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from netslot.host import replay_wire as wire
from netslot.host.replay_links import Scene
from netslot.host.replay_model import NOTHING, Foreseen, Foresight, Memory, describe, remembered
from netslot.host.replay_stage import Rules, Sent, Stage
from netslot.rulesets import targets as t
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.flow import ESTABLISHED, ICMP, INVALID, NEW, RELATED
from netslot.rulesets.proof.journey import Side
from netslot.rulesets.proof.places import NOBODY
from netslot.rulesets.proof.samples import Sample
from netslot.rulesets.values import ALL_ONES

_PACE = 64  # packets between two looks at what came out: under the kernel's limit of ICMP errors a second


@dataclass
class Replayed:
    """``sent``: packets that went through both and were compared. ``skipped``: why others were not, and how many.

    ``differences``: as the prover's counterexamples. ``kinds``: how many of what was compared, by the state of the
    connection. ``notes``: what else a reader must know.
    """

    sent: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    differences: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Probe:
    """One packet under way, and what the model says of it for each stage."""

    number: int
    sample: Sample
    foreseen: tuple[Foreseen, ...]


class Trial:
    """Sends packets through some stages, and compares these with each other and with the model."""

    def __init__(self, scene: Scene, stages: Sequence[Stage], sides: Sequence[Mapping[Family, Side]]) -> None:
        self._scene, self._stages = scene, stages
        self._seers = [{family: Foresight(side, scene, family) for family, side in each.items()} for each in sides]
        self._probes: list[_Probe] = []
        self._number = max(stage.last for stage in stages)
        self._talk = 0
        self._marking = any(isinstance(rule.target, _MARKING) for each in sides for rule in _rules(each))
        self._skipped: Counter[str] = Counter()

    def run(self, made: Sequence[Sample], rules: Sequence[Rules], talk: int = 0, more: Sequence[Sample] = ()) -> None:
        """Load the rules, send ``made`` and ``talk`` packets of answers; of ``more`` what was not answered."""
        made = [one for one in made if self._playable(one)]
        open_ = [one for one in made if one.values["state"] in (ESTABLISHED, RELATED)]
        fresh = [one for one in made if one.values["state"] not in (ESTABLISHED, RELATED)]
        for stage, text in zip(self._stages, rules, strict=True):
            stage.let_everything_pass(text)
        told = self._begin_connections(open_)
        for stage, text in zip(self._stages, rules, strict=True):
            stage.load(text)
        for batch in _chunks([self._probe(one, self._strangers()) for one in told]):
            self._send(batch)
        self._talk = talk
        self._send_fresh(fresh)
        left = [one for one in more if one.values["state"] not in (ESTABLISHED, RELATED) and self._playable(one)]
        self._send_fresh(left[: self._talk], talking=False)

    def _send_fresh(self, fresh: Sequence[Sample], talking: bool = True) -> None:
        for samples in _apart(fresh):
            for stage in self._stages:
                stage.forget()
            batch = [self._probe(one, self._strangers()) for one in samples]
            self._send(batch)
            if talking:
                self._converse(batch)

    def _strangers(self) -> list[Memory]:
        return [Memory()] * len(self._stages)

    def _playable(self, sample: Sample) -> bool:
        """A process cannot get a packet under its own address: its kernel takes that for a forgery."""
        if not any(stage.of_processes for stage in self._stages):
            return True
        places = self._scene.places
        src, dst = (
            places.owner_of(sample.values[end], ALL_ONES[sample.family], sample.family) for end in ("src", "dst")
        )
        if dst == NOBODY or dst not in (src, places.link_owner.get(sample.entry, NOBODY)):
            return True
        self._skipped["a process's packet to itself never leaves it"] += 1
        return False

    # Connections that were there before the rules

    def _begin_connections(self, wanted: Sequence[Sample]) -> list[Sample]:
        """Open a connection for each of these packets; those for which it cannot be done are left out."""
        told = list({_connection(sample): sample for sample in wanted}.values())
        for batch in _chunks(told):
            for sample in batch:
                for first, seq, ack in self._opening(sample):
                    self._number += 1
                    for stage in self._stages:
                        stage.send(Sent(self._number, sample.family, first.entry, first.values), seq, ack)
            for stage in self._stages:
                stage.settle(())
        return told

    def _opening(self, sample: Sample) -> list[tuple[Sample, int, int]]:
        """The first packet of the connection, and the first of the other direction; their TCP numbers."""
        v, family = sample.values, sample.family
        related = v["state"] == RELATED
        proto = v.get("quoted", wire.UDP) if related else v["proto"]
        there = {**v, "proto": proto, "flags": wire.SYN, "icmp_type": wire.ECHO[family][0], "icmp_code": 0}
        there |= {"ttl": 64, "length": 0, "dscp": 0}
        back = _turned(there) | {"flags": wire.SYN | wire.ACK, "icmp_type": wire.ECHO[family][1]}
        ends = sample.entry, self._far_end(sample)
        if v["reply"]:
            there, back = _turned(there), _turned(back)
            ends = ends[1], ends[0]
        return [(Sample(ends[0], there, family), 100, 0), (Sample(ends[1], back, family), 300, 101 + wire.TAG)]

    def _far_end(self, sample: Sample) -> str:
        places, dst = self._scene.places, sample.values["dst"]
        owner = places.owner_of(dst, ALL_ONES[sample.family], sample.family)
        if owner != NOBODY and places.link(owner):
            return places.link(owner)
        return "" if places.is_local(dst, sample.family) is True else places.outside[0]

    # Connections that begin under the rules

    def _converse(self, batch: Sequence[_Probe]) -> None:
        """Let the receivers answer, the senders send on, and somebody on the way complain."""
        openers = [probe for probe in batch if self._answerable(probe)][: self._talk]
        self._talk -= len(openers)
        answers = [self._probe(_reply(one.sample, self._seen(one)), self._memories(one, 0, [one])) for one in openers]
        self._send(answers)
        later: list[_Probe] = []
        for opener, answer in zip(openers, answers, strict=True):
            heard = self._fits(answer) and all(one.passes for one in answer.foreseen) and not _untracked(answer)
            if self._talk < 2 or not heard:
                continue
            self._talk -= 2
            on = self._probe(_next(opener.sample), self._memories(opener, 1, [opener, answer]))
            error = _complaint(opener.sample, self._seen(opener))
            later += [on, self._probe(error, self._memories(opener, 0, [opener, answer, on]))]
        self._send(later)

    def _answerable(self, probe: _Probe) -> bool:
        """Whether it opened a connection, the same on all stages, that an answer can belong to."""
        v = probe.sample.values
        opens = v["state"] == NEW and (v["proto"] == wire.UDP or (v["proto"] == wire.TCP and v["flags"] == wire.SYN))
        opens = opens or (
            v["state"] == NEW
            and v["proto"] == ICMP[probe.sample.family]
            and v["icmp_type"] == wire.ECHO[probe.sample.family][0]
        )
        if not opens or not self._fits(probe) or any(x.unforeseen or not x.passes for x in probe.foreseen):
            return False
        seen = {stage.sightings.get(probe.number, NOTHING) for stage in self._stages}
        if len(seen) != 1 or not self._at_home(probe.sample) or _untracked(probe):
            return False
        local = next(iter(seen))[0] == "local"  # where the kernel itself answers what nobody listens to
        if local and self._marking:
            return False
        return not (local and v["proto"] == wire.TCP) and not (not probe.sample.entry and v["proto"] == wire.TCP)

    def _at_home(self, sample: Sample) -> bool:
        """Whether what is sent to its source address comes out where it came in."""
        return self._far_end(Sample("", _turned(sample.values), sample.family)) == sample.entry

    def _seen(self, probe: _Probe) -> tuple[Any, ...]:
        return self._stages[0].sightings[probe.number]

    def _memories(self, opener: _Probe, which: int, history: Sequence[_Probe]) -> list[Memory]:
        """What each stage knows of the connection after these packets: 0 for the other direction, 1 for its own."""
        found = []
        for place in range(len(self._stages)):
            marks: dict[str, int] = {}
            for probe in history:
                marks |= probe.foreseen[place].result.connection_marks
            found.append(Memory(remembered(opener.sample, self._seen(opener))[which], marks))
        return found

    # One packet

    def _probe(self, sample: Sample, memories: Sequence[Memory]) -> _Probe:
        self._number += 1
        foreseen = tuple(
            seer[sample.family].predict(sample, memory) for seer, memory in zip(self._seers, memories, strict=True)
        )
        return _Probe(self._number, sample, foreseen)

    def _send(self, batch: Sequence[_Probe]) -> None:
        for place, stage in enumerate(self._stages):
            for probe in batch:
                seq, ack = _tcp_numbers(probe.sample)
                sample = probe.sample
                stage.send(Sent(probe.number, sample.family, sample.entry, sample.values), seq, ack)
            awaited = [(p.number, p.foreseen[place]) for p in batch]
            wanted = [number for number, one in awaited if one.passes or (one.outcome != NOTHING and not one.muted)]
            stage.settle(wanted)
        self._probes += batch

    def _fits(self, probe: _Probe) -> bool:
        return all(
            foreseen.fits(stage.sightings.get(probe.number, NOTHING), stage.marks.get(probe.number))
            for stage, foreseen in zip(self._stages, probe.foreseen, strict=True)
        )

    # The verdict

    def result(self) -> Replayed:
        """What came of everything that was sent."""
        for stage in self._stages:
            stage.settle(())
        result = Replayed(skipped=Counter(self._skipped))
        if not all(stage.sees_marks for stage in self._stages):
            result.notes.append("this kernel does not say with which mark a packet leaves: marks were not compared")
        for probe in self._probes:
            reasons = list(dict.fromkeys(reason for one in probe.foreseen for reason in one.unforeseen))
            if reasons:
                result.skipped[reasons[0]] += 1
                continue
            result.sent += 1
            result.kinds[_kind(probe.sample)] += 1
            if not self._fits(probe) or not self._same(probe):
                result.differences.append(self._difference(probe))
        return result

    def _same(self, probe: _Probe) -> bool:
        """Whether it fared the same on all stages; between tenants any denial is like any other."""
        seen = [stage.sightings.get(probe.number, NOTHING) for stage in self._stages]
        marks = {stage.marks.get(probe.number) for stage in self._stages} - {None}
        if all(one[0] not in ("out", "local") for one in seen):
            pair = self._between(probe.sample) or any(one.muted for one in probe.foreseen)
            return pair or len(set(seen)) == 1
        loose = any(one.loose for one in probe.foreseen)
        return len(marks) <= 1 and (len({one[:2] if loose else one for one in seen}) == 1)

    def _between(self, sample: Sample) -> bool:
        places = self._scene.places
        return (
            sample.entry in places.link_owner
            and places.owner_of(sample.values["dst"], ALL_ONES[sample.family], sample.family) != NOBODY
        )

    def _difference(self, probe: _Probe) -> dict[str, Any]:
        places = self._scene.places
        stories = []
        for stage, foreseen in zip(self._stages, probe.foreseen, strict=True):
            seen = stage.sightings.get(probe.number, NOTHING)
            mark = stage.marks.get(probe.number)
            stories.append(
                {
                    "verdict": seen[0],
                    "kernel": (*seen, mark) if seen[0] in ("out", "local") else seen,
                    "model": (*foreseen.outcome, foreseen.mark) if foreseen.passes else foreseen.outcome,
                    "fits": foreseen.fits(seen, mark),
                    "path": list(foreseen.result.ledger.trace or ()),
                }
            )
        who = places.link_owner.get(probe.sample.entry, NOBODY)
        name = places.tenants[who].name if who != NOBODY else ""
        return {"tenant": name, "packet": describe(probe.sample), "before": stories[0], "after": stories[-1]}


def _kind(sample: Sample) -> str:
    v = sample.values
    direction = " reply" if v["reply"] else ""
    states = {NEW: "NEW", ESTABLISHED: "ESTABLISHED", RELATED: "RELATED", INVALID: "INVALID"}
    return f"IPv{sample.family} {states.get(v['state'], 'UNTRACKED')}{direction}"


def _untracked(probe: _Probe) -> bool:
    """Whether some namespace on the way was told not to remember it."""
    met = [line.lower() for one in probe.foreseen for line in one.result.ledger.trace or ()]
    return any("notrack" in line for line in met)


_MARKING = (t.SetConnmark, t.SaveMark)
"""What the kernel's own answers would do to a connection, unseen by the model."""


def _rules(sides: Mapping[Family, Side]) -> Iterator[Rule]:
    for side in sides.values():
        for _, _, rule in side.root.ruleset.rules():
            yield rule


def _turned(values: Mapping[str, int]) -> dict[str, int]:
    """The same ends, the other way. An ICMP message keeps its identifier."""
    turned = {**values, "src": values["dst"], "dst": values["src"]}
    if values["proto"] in (wire.TCP, wire.UDP):
        turned |= {"sport": values["dport"], "dport": values["sport"]}
    return turned


def _length(values: Mapping[str, int], family: Family) -> dict[str, int]:
    return {**values, "length": wire.natural_length(family, values)}


def _reply(opener: Sample, seen: Sequence[Any]) -> Sample:
    """What the receiver answers to what it saw."""
    family, place = opener.family, 1 if seen[0] == "local" else 2
    entry = "" if seen[0] == "local" else seen[1]
    values = {**opener.values, "src": seen[place], "dst": seen[place + 1], "state": ESTABLISHED, "ttl": 64}
    if opener.values["proto"] in (wire.TCP, wire.UDP):
        values |= {"sport": seen[place + 2], "dport": seen[place + 3]}
    values = _turned(values) | {"reply": 1, "flags": wire.SYN | wire.ACK, "icmp_type": wire.ECHO[family][1]}
    return Sample(entry, _length(values, family), family)


def _next(opener: Sample) -> Sample:
    """What the sender of the first packet sends then."""
    return Sample(opener.entry, {**opener.values, "state": ESTABLISHED, "flags": wire.ACK}, opener.family)


def _complaint(opener: Sample, seen: Sequence[Any]) -> Sample:
    """An ICMP error about the first packet, from where it came out."""
    family = opener.family
    values = {
        **_reply(opener, seen).values,
        "quoted": opener.values["proto"],
        "proto": ICMP[family],
        "state": RELATED,
    }
    values |= {"icmp_type": wire.ERRORS[family][0], "icmp_code": 3 if family == 4 else 4, "flags": 0}
    entry = "" if seen[0] == "local" else seen[1]
    return Sample(entry, _length(values, family), family)


def _tcp_numbers(sample: Sample) -> tuple[int, int]:
    """Sequence and acknowledgement, for connection tracking to find them in its windows."""
    v = sample.values
    if v["state"] != ESTABLISHED:
        return 100, 1 if v["flags"] & wire.ACK else 0
    if v["reply"]:
        first = v["flags"] == wire.SYN | wire.ACK
        return 300 if first else 301 + wire.TAG, 101 + wire.TAG
    return 101 + wire.TAG, 301


def _connection(sample: Sample) -> tuple[Any, ...]:
    """The connection that it belongs to, as long as nothing is translated."""
    v = sample.values
    proto = v.get("quoted", wire.UDP) if v["state"] == RELATED else v["proto"]
    return sample.family, proto, frozenset(((v["src"], v["sport"]), (v["dst"], v["dport"])))


def _apart(wanted: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Batches in which no two share a port of the sender's: then none clash, whatever is translated to what."""
    left = list(wanted)
    while left:
        taken: set[tuple[int, ...]] = set()
        batch: list[Sample] = []
        later: list[Sample] = []
        for sample in left:
            key = (sample.family, sample.values["proto"], sample.values["sport"])
            if len(batch) == _PACE or key in taken:
                later.append(sample)
            else:
                taken.add(key)
                batch.append(sample)
        left = later
        yield batch


def _chunks(items: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _PACE):
        yield list(items[start : start + _PACE])
