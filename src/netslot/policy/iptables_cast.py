"""Cast: have the real tool load a rule file in a scratch namespace, and learn from it what a stamp must write.

One run gives the bytes. A few more, each with one variable changed, show where that variable sits and how it is
kept (:mod:`netslot.policy.iptables_places`). Runs with many changed at once prove it, byte by byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from netslot.errors import KernelError, SpecError, UsageError
from netslot.kernel import netlink, xtables
from netslot.policy import cidr_sets, iptables_places, iptables_tool
from netslot.policy.cidr_sets import CidrSet
from netslot.policy.iptables_image import Entry, Flat, Image, inserted, mask
from netslot.policy.iptables_places import Place, Sample, Unexplained, Values
from netslot.policy.iptables_samples import ladders
from netslot.policy.iptables_tool import Source
from netslot.spec.render import variables_in

T = TypeVar("T")

_PROTOCOLS = ("tcp", "udp", "sctp", "dccp", "udplite")
_PROOFS = 3
_ATTEMPTS = 12


@dataclass(frozen=True, slots=True)
class PortRule:
    """What a line for published ports becomes for one protocol. Places count from the first entry's start."""

    entries: tuple[Entry, ...]
    blob: bytes
    places: tuple[Place, ...]

    def entries_for(self, values: Values) -> list[Entry]:
        blob = bytes(iptables_places.apply(bytearray(self.blob), self.places, values))
        found, at = [], 0
        for entry in self.entries:
            found.append(Entry(blob[at : at + len(entry.data)], entry.jump, entry.verdict_at))
            at += len(entry.data)
        return found


@dataclass(frozen=True, slots=True)
class PortLine:
    """A line that stands once for each port of ``parameter``; its entries go before entry number ``before``."""

    parameter: str
    line: int
    before: int
    by_protocol: Mapping[str, PortRule]

    def entries_for(self, values: Values, item: str) -> list[Entry]:
        """The entries of one published port; UsageError when the rule cannot be had for its protocol."""
        port = iptables_tool.port_values(self.parameter, item)
        rule = self.by_protocol.get(port[f"{self.parameter}.proto"])
        if rule is None:
            known = ", ".join(self.by_protocol)
            raise UsageError(f"{self.parameter}: {item!r}: line {self.line} is a rule for {known} only")
        return rule.entries_for({**values, **port})


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one table for any slot."""

    image: Image
    base: Flat
    places: Mapping[str, tuple[Place, ...]]
    """By variable."""
    lines: tuple[PortLine, ...]
    values: Values
    """What the base was made with, for each of the slot's own values that the table depends on."""

    def build(self, values: Values, parameters: Mapping[str, Sequence[str]]) -> Flat:
        """The table for one slot; ValueError for a value beyond what the tool was tried with."""
        base = self.base
        blob = base.blob
        # Most values are the same in every slot, and the base has them already.
        changed = [name for name, value in self.values.items() if values[name] != value]
        if changed:
            places = (place for name in changed for place in self.places[name])
            blob = bytes(iptables_places.apply(bytearray(blob), places, values))
        put_in: dict[int, list[Entry]] = {}
        for line in self.lines:
            for item in parameters.get(line.parameter, ()):
                put_in.setdefault(line.before, []).extend(line.entries_for(values, item))
        if put_in:
            return self.image.flatten(put_in, blob)
        return Flat(base.family, base.table, base.info, blob, base.starts)


@dataclass(frozen=True, slots=True)
class Casting:
    """One rule file, cast: a recipe for each table, or why there is none. ``pinned`` values cannot be changed."""

    source: Source
    recipes: tuple[Recipe, ...]
    pinned: Mapping[str, str]
    fallback: str | None


class Press:
    """Runs the tool in the scratch namespace that the thread is in; ``sets`` must be there already."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def run(self, values: Values, items: Mapping[int, Sequence[Values]] | None = None) -> dict[str, Image]:
        """The tables that the tool makes. SpecError when it refuses."""
        iptables_tool.load(self.source, self.source.render(values, items))
        return iptables_tool.read_back(self.source)

    def attempt(self, values: Values, items: Mapping[int, Sequence[Values]] | None = None) -> dict[str, Image] | None:
        """As :meth:`run`, with None for values that the tool refuses."""
        try:
            return self.run(values, items)
        except SpecError:
            return None


def cast_file(source: Source, samples: Sequence[Values]) -> Casting:
    """Cast one rule file in the scratch namespace that the thread is in, which has the sets that it names.

    ``samples`` are the values of at least one slot; those of several make the proof stronger. SpecError when the
    tool refuses the file for the first of them.
    """
    press = Press(source)
    base = press.run(samples[0])
    rng = random.Random(source.text)
    names = sorted(variables_in(source.fixed))
    tried = {name: _variants(press, base, samples, name, rng) for name in names}
    pinned = {name: samples[0][name] for name, runs in tried.items() if not runs}
    try:
        lines = _port_lines(press, samples[0], base, rng, pinned)
        recipes = _recipes(source, base, samples, tried, pinned, lines)
        _prove(press, samples, tried, recipes, rng)
    except Unexplained as reason:
        return Casting(source, (), pinned, f"{source.file}: {reason}")
    return Casting(source, recipes, pinned, None)


Run = tuple[Values, dict[str, Image]]


def _variants(
    press: Press, base: Mapping[str, Image], samples: Sequence[Values], name: str, rng: random.Random
) -> list[Run]:
    """What the tool makes of other values of one variable; [] when it takes no other.

    The tools take some values and cut them short without a word (a port above 65,535, a name that is too long).
    A value whose bytes cannot be explained is therefore passed over for a smaller one, if there is one that can.
    """
    value = samples[0][name]
    atoms = _atoms(press.source.fixed, name)
    others = dict.fromkeys(sample[name] for sample in (*samples[1:3], samples[-1]) if sample[name] != value)

    def attempt(candidate: str) -> Run | None:
        values = {**samples[0], name: candidate}
        images = press.attempt(values)
        return None if images is None else (values, images)

    def explained(run: Run) -> bool:
        return all(
            _explained(Sample(samples[0], image.flatten().blob), Sample(run[0], run[1][table].flatten().blob), atoms)
            for table, image in base.items()
        )

    return _climb([[other] for other in others] + ladders(value, rng), attempt, explained)


def _climb(
    choices: Iterable[Iterable[str]], attempt: Callable[[str], T | None], explained: Callable[[T], bool]
) -> list[T]:
    """Of each list the first candidate that can be had and explained; else the first that can be had."""
    found = []
    for ladder in choices:
        first: T | None = None
        for candidate in ladder:
            made = attempt(candidate)
            if made is None:
                continue
            if explained(made):
                first = made
                break
            first = first or made
        if first is not None:
            found.append(first)
    return found


def _atoms(text: str, name: str) -> list[str]:
    return [atom for atom in iptables_places.atoms(text) if name in variables_in(atom)]


def _explained(base: Sample, other: Sample, atoms: Sequence[str]) -> bool:
    try:
        iptables_places.explain(base, [other], atoms)
    except Unexplained:
        return False
    return True


def _recipes(
    source: Source,
    base: Mapping[str, Image],
    samples: Sequence[Values],
    tried: dict[str, list[Run]],
    pinned: dict[str, str],
    lines: Mapping[str, Sequence[PortLine]],
) -> tuple[Recipe, ...]:
    """A recipe for each table. A variable that is not understood is pinned if it is the same in all samples."""
    flats = {table: base[table].flatten() for table in source.tables}
    places: dict[str, list[Place]] = {table: [] for table in source.tables}
    for name in [name for name, runs in tried.items() if runs]:
        own = _atoms(source.fixed, name)
        try:
            for table, flat in flats.items():
                others = [Sample(run, images[table].flatten().blob) for run, images in tried[name]]
                places[table] += iptables_places.explain(Sample(samples[0], flat.blob), others, own)
        except Unexplained:
            if any(sample[name] != samples[0][name] for sample in samples):
                raise Unexplained(f"it is not understood how the rules' bytes follow ${{{name}}}") from None
            pinned[name] = samples[0][name]
            tried[name] = []
    recipes = []
    for table, flat in flats.items():
        merged = iptables_places.merge(places[table])
        names = sorted({name for place in merged for name in place.names})
        by_variable = {name: tuple(place for place in merged if name in place.names) for name in names}
        values = {name: samples[0][name] for name in names}
        recipes.append(Recipe(base[table], flat, by_variable, tuple(lines.get(table, ())), values))
    return tuple(recipes)


def _port_lines(
    press: Press, values: Values, base: Mapping[str, Image], rng: random.Random, pinned: dict[str, str]
) -> dict[str, list[PortLine]]:
    """By table, every line that stands for published ports."""
    found: dict[str, list[PortLine]] = {}
    for index, parameter in press.source.port_lines.items():
        line = press.source.lines[index]
        any_protocol = f"{parameter}.proto" not in variables_in(line)
        rules: dict[str, PortRule] = {}
        place: tuple[str, int] | None = None
        for protocol in _PROTOCOLS[:1] if any_protocol else _PROTOCOLS:
            port = {f"{parameter}.proto": protocol, f"{parameter}.outer": "20001", f"{parameter}.inner": "10002"}
            if any_protocol or protocol in _PROTOCOLS[:1]:
                press.run(values, {index: [port]})  # a refusal here is the user's error, and is raised
            rule = _port_rule(press, {**values, **port}, base, index, rng, pinned)
            if rule is not None:
                table, before, rules[protocol] = rule
                place = place or (table, before)
                if place != (table, before):
                    raise Unexplained(f"line {index + 1} goes to another place for {protocol}")
        if place is None:
            raise Unexplained(f"line {index + 1} makes no rule of its own")
        by_protocol = dict.fromkeys(_PROTOCOLS, rules["tcp"]) if any_protocol else rules
        found.setdefault(place[0], []).append(PortLine(parameter, index + 1, place[1], by_protocol))
    return found


def _port_rule(
    press: Press, values: Values, base: Mapping[str, Image], index: int, rng: random.Random, pinned: dict[str, str]
) -> tuple[str, int, PortRule] | None:
    """(table, entry number, rule) of one line for one protocol; None when the tool does not take that protocol."""
    line = press.source.lines[index]
    fixed = variables_in(press.source.fixed)

    def run(changed: Values, without: Mapping[str, Image] | None) -> tuple[str, int, tuple[Entry, ...]] | None:
        images = press.attempt(changed, {index: [changed]})
        if images is None or without is None:
            return None
        runs = [(table, inserted(without[table], images[table])) for table in images]
        changes = [(table, part) for table, part in runs if part is None or part[1]]
        if len(changes) != 1 or changes[0][1] is None:
            raise Unexplained(f"line {index + 1} changes more than its own place")
        return changes[0][0], *changes[0][1]

    first = run(values, base)
    if first is None:
        return None
    table, before, entries = first
    sample = Sample(values, b"".join(entry.data for entry in entries))
    places: list[Place] = []
    for name in sorted(variables_in(line) - pinned.keys()):
        atoms = _atoms(line, name)

        def attempt(candidate: str, name: str = name) -> Sample | None:
            changed = {**values, name: candidate}
            made = run(changed, press.attempt(changed) if name in fixed else base)
            return None if made is None else Sample(changed, b"".join(entry.data for entry in made[2]))

        def explained(other: Sample, atoms: Sequence[str] = atoms) -> bool:
            return _explained(sample, other, atoms)

        others = [] if name.endswith(".proto") else _climb(ladders(values[name], rng), attempt, explained)
        if not others and not name.endswith(".proto"):
            pinned[name] = values[name]
        places += iptables_places.explain(sample, others, atoms)
    return table, before, PortRule(entries, sample.blob, iptables_places.merge(places))


def _prove(
    press: Press,
    samples: Sequence[Values],
    tried: Mapping[str, Sequence[Run]],
    recipes: Sequence[Recipe],
    rng: random.Random,
) -> None:
    """Compare the recipes with the tool for the samples, and for random mixtures of all values that it took."""
    for values in samples[1:]:
        _compare(press.run(values), recipes, values, {})
    choices = {name: [samples[0][name], *(run[name] for run, _ in runs)] for name, runs in tried.items()}
    proven = 0
    for _ in range(_ATTEMPTS if any(tried.values()) or press.source.port_lines else 0):
        values = {**samples[0], **{name: rng.choice(options) for name, options in choices.items()}}
        ports = _random_ports(recipes, rng)
        images = press.attempt(values, press.source.items(ports))
        if images is not None:
            _compare(images, recipes, values, ports)
            proven += 1
        if proven == _PROOFS:
            return


def _random_ports(recipes: Iterable[Recipe], rng: random.Random) -> dict[str, list[str]]:
    """A few published ports for each list, of protocols that all its lines can do."""
    protocols: dict[str, set[str]] = {}
    for line in (line for recipe in recipes for line in recipe.lines):
        protocols.setdefault(line.parameter, set(_PROTOCOLS)).intersection_update(line.by_protocol)
    return {
        parameter: [
            f"{rng.choice(sorted(usable))}:{rng.randrange(1, 65_536)}:{rng.randrange(1, 65_536)}" for _ in range(3)
        ]
        for parameter, usable in protocols.items()
        if usable
    }


def _compare(
    images: Mapping[str, Image], recipes: Sequence[Recipe], values: Values, ports: Mapping[str, Sequence[str]]
) -> None:
    for recipe in recipes:
        wanted = images[recipe.image.table].flatten()
        try:
            made = recipe.build(values, ports)
        except ValueError as error:
            raise Unexplained(f"a value cannot be written: {error}") from error
        if (made.blob, made.info) != (wanted.blob, wanted.info):
            raise Unexplained(f"table {recipe.image.table} comes out otherwise for other values")


def prove_replay(flats: Iterable[Flat], sets: Sequence[CidrSet]) -> str | None:
    """Stamp into the new namespace that the thread is in and read back; why the bytes differ, or None."""
    with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
        cidr_sets.create(link, sets, {})
    for flat in flats:
        family, table = flat.family, flat.table
        with xtables.open_socket(family) as sock:
            try:
                present = xtables.get_info(sock, family, table).entries
                xtables.replace(sock, family, table, flat.info, flat.blob, present)
                info, raw = xtables.read_table(sock, family, table)
            except KernelError as error:
                return f"the kernel does not take table {table} back: {error}"
        if info != flat.info or mask(family, raw, flat.starts) != flat.blob:
            return f"the kernel gives table {table} back otherwise than it was stamped"
    return None
