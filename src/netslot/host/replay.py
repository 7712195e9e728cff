"""Send real packets through the host as it was and as it will be, and compare what comes out.

Both arrangements are built in namespaces of their own: root with its rules, a link for each tenant that plays, links
to the outside; in the second one, slots. What the kernel did in the two is compared with each other, and with what
the model said: the prover's model is on trial here too.

Packets of connections that are open come first: the connections are opened while everything may pass, then the rules
are loaded. The others are sent one by one, and whoever gets one answers it: so replies, later packets and ICMP errors
of connections that the rules themselves let begin, and translated, are sent and compared too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest

from netslot.errors import RefusedError
from netslot.host.replay_links import Scene, SetContents
from netslot.host.replay_stage import Rules, Stage
from netslot.host.replay_trial import Replayed, Trial
from netslot.rulesets import matches as m
from netslot.rulesets.ipsets import PREFIX, SETS
from netslot.rulesets.model import Dump, Family
from netslot.rulesets.proof.arrangement import ROOT, Arrangement
from netslot.rulesets.proof.journey import Side
from netslot.rulesets.proof.places import Places
from netslot.rulesets.proof.prover import aligned, both_sides, classes_of
from netslot.rulesets.proof.samples import Sample, samples
from netslot.rulesets.published import PUBLISH
from netslot.rulesets.write import write

MOST_PLAYERS = 24


def replay_packets(
    dump: Dump, places: Places, arrangement: Arrangement, files: Mapping[str, str], count: int, seed: int = 1
) -> Replayed:
    """Send ``count`` packets through both arrangements, a share of each address family that the dump has.

    Two thirds are chosen from the rules, the others are answers and what follows them.
    """
    show = Replay(dump, places, arrangement, files)
    families = show.scene.families
    lists = [
        samples(show.sides[0][family].root, show.scene.places, show.scene.players, -(-count // len(families)), seed)
        for family in families
    ]
    made = [one for one in chain.from_iterable(zip_longest(*lists)) if one is not None][:count]
    chosen = -(-2 * count // 3)
    return show.send(made[:chosen], count - chosen, made[chosen:])


class Replay:
    """Both arrangements of one host. RefusedError when they cannot be played."""

    def __init__(self, dump: Dump, places: Places, arrangement: Arrangement, files: Mapping[str, str]) -> None:
        served = {member.link for member in arrangement.members}
        if served and not {places.link(tenant) for tenant in range(len(places.tenants))} <= {"", *served}:
            raise RefusedError("the directory has not a slot for every tenant of the dump")
        families = tuple(ruleset.family for ruleset in dump.rulesets)
        arrangement = aligned(places, arrangement)
        pairs = {family: both_sides(dump, places, arrangement, family) for family in families}
        classes = classes_of(places, arrangement, list(pairs.values())).kinds
        self.sides: list[Mapping[Family, Side]] = [
            {f: pair.before for f, pair in pairs.items()},
            {f: pair.after for f, pair in pairs.items()},
        ]
        self.scene = Scene(places, tuple(players(classes)), families, set_contents(dump, places))
        self._left = len(set(classes)) - len({classes[tenant] for tenant in self.scene.players})
        self._arrangement = arrangement
        before = Rules({ruleset.family: write(ruleset) for ruleset in dump.rulesets})
        self._rules = (before, _rules_after(arrangement, files, self.scene))

    def send(self, made: Sequence[Sample], talk: int = 0, more: Sequence[Sample] = ()) -> Replayed:
        """Send these packets through both, and up to ``talk`` answers; of ``more`` as many as there was no answer."""
        with (
            staged(self.scene, "b", None) as before,
            staged(self.scene, "a", self._arrangement) as after,
        ):
            trial = Trial(self.scene, [before, after], self.sides)
            trial.run(made, self._rules, talk, more)
            result = trial.result()
        if self._left:
            result.notes.append(f"no tenant of {self._left} classes played: {MOST_PLAYERS} tenants are the most")
        return result


def players(classes: Sequence[int]) -> list[int]:
    """One tenant of each class, the largest first; of the two largest, two; of others too while there is room."""
    members: dict[int, list[int]] = {}
    for tenant, number in enumerate(classes):
        members.setdefault(number, []).append(tenant)
    ranked = sorted(members.values(), key=len, reverse=True)
    firsts = [people[0] for people in ranked]
    seconds = [people[1] for people in ranked if len(people) > 1]
    chosen = firsts[: MOST_PLAYERS - min(2, len(seconds))]
    return sorted(chosen + seconds[: max(min(2, len(seconds)), 8 - len(chosen))])


def _rules_after(arrangement: Arrangement, files: Mapping[str, str], scene: Scene) -> Rules:
    slots = {}
    for tenant in scene.players:
        member = arrangement.members[tenant]
        for family in scene.families:
            text = arrangement.slot_text(member, family) if member.kind else None
            if text is not None:
                slots[tenant, family] = text
    return Rules(
        {family: files[ROOT[family]] for family in scene.families if ROOT[family] in files},
        slots,
        tuple(files[PUBLISH[family]] for family in scene.families if PUBLISH[family] in files),
        tuple(files[SETS[family]] for family in scene.families if SETS[family] in files),
    )


def set_contents(dump: Dump, places: Places) -> dict[str, SetContents]:
    """Members for every set that a rule asks for: a dump does not hold them, so some addresses are taken."""
    found: dict[str, SetContents] = {}
    for ruleset in dump.rulesets:
        family = ruleset.family
        width, stranger = (32, 0xCB007100) if family == 4 else (128, 0x20010DB8 << 96)
        for _, _, rule in ruleset.rules():
            words = getattr(rule.target, "words", ())
            names = [x.name for x in rule.matches if isinstance(x, m.SetMatch)]
            names += [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--add-set", "--del-set")]
            names += [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--map-set"]
            for name in names:
                if name in found or name.startswith(PREFIX):
                    continue
                own = [a.value for tenant in places.tenants[:64] for a in tenant.addresses if a.family == family]
                chosen = own[len(found) % 2 :: 2]
                members = [(value, width) for value in dict.fromkeys(chosen)]
                found[name] = SetContents(family, (*members, (stranger, width - 7)))
    return found


@contextlib.contextmanager
def staged(scene: Scene, kind: str, arrangement: Arrangement | None) -> Iterator[Stage]:
    """A stage that is built, and taken down at the end."""
    stage = Stage(scene, f"nsr-{os.getpid()}-{kind}", arrangement)
    try:
        stage.build()
        yield stage
    finally:
        stage.close()
