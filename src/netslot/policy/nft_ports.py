"""Lines of an iptables file that stand once for each published port, in the nft variant.

A line is cast by itself: the file is loaded once without it and once with one port, and what is new is the
line's rule. That is done for each protocol, since a rule's shape may depend on it, with several ports, which
shows where the port numbers go.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from netslot.errors import KernelError, SpecError
from netslot.kernel import nf_tables as nf
from netslot.kernel.nf_attrs import RULE
from netslot.policy.base import Parameters, Values
from netslot.policy.iptables_tool import Source, port_values
from netslot.policy.nft_cast import CASTS, in_scratch
from netslot.policy.nft_programs import IptablesProgram
from netslot.policy.nft_template import Item, Ruleset, combine, snapshot
from netslot.policy.patches import Unexplained

_PROTOCOLS = ("tcp", "udp")


@dataclass(frozen=True, slots=True)
class PortLine:
    """One line: its rules by protocol, and the place among the template's rules before which they stand."""

    parameter: str
    place: int
    rules: Mapping[str, tuple[Item, ...]]


def cast_port_lines(program: IptablesProgram, template: Ruleset, samples: Sequence[Values]) -> list[PortLine]:
    """The lines that stand for ports. Raises Unexplained for one that cannot be stamped."""
    found: list[PortLine] = []
    for source in program.sources:
        for index, parameter in source.port_lines.items():
            try:
                found.append(_cast_line(program, source, index, parameter, template, samples))
            except Unexplained as error:
                place = f"{source.file}:{index + 1}"
                raise Unexplained(f"{place}: the rule depends on the port in an unknown way ({error})") from error
    return found


def _cast_line(
    program: IptablesProgram,
    source: Source,
    index: int,
    parameter: str,
    template: Ruleset,
    samples: Sequence[Values],
) -> PortLine:
    places: set[int] = set()
    rules: dict[str, tuple[Item, ...]] = {}
    for protocol in _PROTOCOLS:
        try:
            longer, slots = _load(program, source, index, parameter, protocol, samples)
        except (SpecError, KernelError):
            if protocol == _PROTOCOLS[0]:
                raise
            continue  # the line may be one for a single protocol
        unified = combine(longer, slots).items[RULE]
        base = template.render(slots[0]).items[RULE]
        shown = [item.render(slots[0]) for item in unified]
        extra = len(shown) - len(base)
        place = next((at for at, rule in enumerate(base) if shown[at].nodes != rule.nodes), len(base))
        if [rule.nodes for rule in shown[place + extra :]] != [rule.nodes for rule in base[place:]]:
            raise Unexplained("the line changes other rules")
        places.add(place)
        rules[protocol] = tuple(unified[place : place + extra])
    if len(places) != 1:
        raise Unexplained("the line's place depends on the protocol")
    return PortLine(parameter, places.pop(), rules)


def _load(
    program: IptablesProgram, source: Source, index: int, parameter: str, protocol: str, samples: Sequence[Values]
) -> tuple[list[Ruleset], list[Values]]:
    """The file with one port, for several ports and slots, and the values of each, the port's among them."""
    rulesets: list[Ruleset] = []
    slots: list[Values] = []
    for number in range(CASTS):
        outer, inner = random.sample(range(1024, 65536), 2)
        port = port_values(parameter, f"{protocol}:{outer}:{inner}")
        values = {**samples[number % len(samples)], **port}

        def act(values: Values = values, port: Mapping[str, str] = port) -> Ruleset:
            program.prepare()
            for own in program.sources:
                program.restore(own, values, {index: [port]} if own is source else {})
            with nf.Socket() as sock:
                return snapshot(sock)

        rulesets.append(in_scratch(act))
        slots.append(values)
    return rulesets, slots


def insert_ports(ruleset: Ruleset, lines: Sequence[PortLine], values: Values, content: Parameters) -> Ruleset:
    """The rendered ruleset with the rules of all published ports. SpecError for a port that no line can take."""
    rules = list(ruleset.items[RULE])
    for line in sorted(lines, key=lambda line: line.place, reverse=True):
        own: list[Item] = []
        for entry in content.get(line.parameter, ()):
            port = port_values(line.parameter, entry)
            protocol = port[f"{line.parameter}.proto"]
            if protocol not in line.rules:
                raise SpecError(
                    f"{entry!r}: the rules publish no {protocol} ports",
                    key=line.parameter,
                    hint=f"they take {' and '.join(line.rules)}",
                )
            own += [rule.render({**values, **port}) for rule in line.rules[protocol]]
        rules[line.place : line.place] = own
    return Ruleset({**ruleset.items, RULE: tuple(rules)})
