"""One wrong split on trial: the prover's answer, and whether the kernel bears it out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from netslot.errors import HostError, SpecError
from netslot.host.replay import Replay, replay_packets
from netslot.host.replay_model import Foresight, Memory
from netslot.host.replay_wire import ACK, RST, SYN, TCP, UDP, natural_length
from netslot.rulesets.attribute import attribute
from netslot.rulesets.model import Dump, Family
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import Arrangement, read
from netslot.rulesets.proof.flow import FIELDS
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.proof.places import NOBODY, Places, survey
from netslot.rulesets.proof.prover import Counterexample, Verdict, prove
from netslot.rulesets.proof.samples import Sample, can_be_sent
from netslot.rulesets.split import Method, split
from netslot.rulesets.tenants import Tenant

Answer = Literal["true", "unsent", "unread", "unloadable", "obstacle", "equivalent", "WRONG"]
"""``true``: a counterexample that the kernel bears out. ``unsent``: counterexamples, none of which can be sent here.

``unread``: the directory is refused. ``unloadable``: the kernel itself refuses the rules.
``obstacle``: not provable, without a packet. ``equivalent``: and replay agrees.
``WRONG``: the prover and the kernel disagree.
"""


@dataclass(frozen=True)
class Host:
    """A host whose split is proved, before anything is broken."""

    dump: Dump
    tenants: Sequence[Tenant]
    places: Places
    files: Mapping[str, str]


@dataclass
class Finding:
    """What came of one fault. ``detail``: what to look at when the answer is wrong."""

    answer: Answer
    sent: int = 0
    detail: list[Any] = field(default_factory=list)


def proved_host(text: str, family: Family, method: Method | None, attachment: Attachment = "tap") -> Host | None:
    """Split and prove; None where the split is refused or changes something.

    What comes to tenants is decided in root: else few hosts with traffic between tenants keep it as it was.
    """
    dump = parse(text, family=family)
    tenants = attribute(dump).tenants
    result = split(dump, tenants, method=method, attachment=attachment, inward="root" if method != "sets" else "slot")
    if result.refused:
        return None
    places = survey(dump, tenants)
    files = {name: content for name, content in result.files.items() if name != "report.json"}
    verdict = prove(dump, places, read(files), enough=1)
    return Host(dump, tenants, places, files) if verdict.equivalent else None


def try_fault(host: Host, files: Mapping[str, str], packets: int = 150) -> Finding:
    """Prove the broken split, and ask the kernel about the answer."""
    try:
        arrangement = read(files)
    except SpecError as error:
        return Finding("unread", detail=[str(error)])
    verdict = prove(host.dump, host.places, arrangement, enough=6)
    try:
        return _judged(host, files, arrangement, verdict, packets)
    except HostError as error:
        if "cannot be loaded" not in error.message:
            raise
        return Finding("unloadable", detail=[error.message])


def _judged(
    host: Host, files: Mapping[str, str], arrangement: Arrangement, verdict: Verdict, packets: int
) -> Finding:
    if verdict.counterexamples:
        return _confirmed(verdict.counterexamples, Replay(host.dump, host.places, arrangement, files))
    if verdict.obstacles:
        return Finding("obstacle", detail=verdict.obstacles)
    replayed = replay_packets(host.dump, host.places, arrangement, files, packets, random.randrange(1 << 16))
    wrong = [d for d in replayed.differences if d["before"]["kernel"] != d["after"]["kernel"]]
    return Finding("WRONG" if wrong else "equivalent", replayed.sent, wrong[:2])


def _confirmed(found: Sequence[Counterexample], show: Replay) -> Finding:
    """Send the counterexamples that can be sent: each must part as the model says."""
    samples = [sample for one in found if (sample := _sample(one, show)) is not None]
    said = [one.packet | {"parts": one.parts} for one in found]
    if not samples:
        return Finding("unsent", detail=said)
    replayed = show.send(samples)
    misfits = [d for d in replayed.differences if not (d["before"]["fits"] and d["after"]["fits"])]
    if misfits or len(replayed.differences) != replayed.sent or not replayed.sent:
        return Finding("WRONG", replayed.sent, [misfits[:2], said])
    return Finding("true", replayed.sent)


def _sample(one: Counterexample, show: Replay) -> Sample | None:
    """The counterexample as a packet that can be sent and shows the difference; None when there is none."""
    family = one.concrete.family
    filed = show.sides[0][family].root
    for values in _variants(one.concrete.values, family):
        sample = Sample(one.way.entry, values, family)
        if not can_be_sent(sample, filed, show.scene.places, show.scene.players):
            continue
        before, after = (Foresight(side[family], show.scene, family).predict(sample, Memory()) for side in show.sides)
        pair = one.way.sender != NOBODY and one.way.receiver != NOBODY
        silent = pair or before.muted or after.muted
        seen = [(x.outcome, x.mark) if x.passes else "denied" if silent else x.outcome for x in (before, after)]
        if not before.unforeseen and not after.unforeseen and seen[0] != seen[1]:
            return sample
    return None


def _variants(values: Mapping[str, int], family: Family) -> Iterator[dict[str, int]]:
    """The packet, and others like it where the solver chose what no kernel would see (an answer to nothing)."""
    fields = {name: values[name] for name in FIELDS}
    echo = {"icmp_type": 8 if family == 4 else 128, "icmp_code": 0}
    for change in ({}, {"flags": SYN}, {"flags": ACK}, {"flags": RST}, echo):
        for proto in (values["proto"], UDP, TCP):
            made = fields | change | {"proto": proto}
            yield made | {"length": max(made["length"], natural_length(family, made))}


def tally(findings: Mapping[str, Counter[str]]) -> str:
    """A line for each kind of fault."""
    return "\n".join(f"{kind:36} {dict(sorted(counts.items()))}" for kind, counts in sorted(findings.items()))
