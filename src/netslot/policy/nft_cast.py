"""Run the real tool in scratch namespaces and turn what it made into a template.

A scratch namespace is made for one load and forgotten with its thread; the tool is a child process of that
thread, which inherits the thread's namespace. Interfaces that the rules hang on (netdev chains, ``iif``) are
played by veth links, with other indexes in every cast: what depends on an index then shows as unexplained.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from netslot.errors import KernelError, SpecError
from netslot.kernel import netlink, netns, rtnetlink
from netslot.kernel import nf_tables as nf
from netslot.policy.base import Parameters
from netslot.policy.nft_programs import Program
from netslot.policy.nft_template import Ruleset, combine, snapshot
from netslot.policy.patches import Unexplained, Values, whole_number
from netslot.spec.render import render

T = TypeVar("T")

CASTS = 4
"""Two casts show the difference, the others prove the explanation."""

_FIRST_INDEX = 4096  # far above what links of a fresh namespace get by themselves
PROOF_INDEX = 1024
"""Where the links of a proof begin: in no cast do they."""


def in_scratch(function: Callable[[], T]) -> T:
    """Call ``function`` on a thread in a new network namespace, which ends with the call."""

    def enter() -> T:
        with netns.fresh():
            return function()

    with netns.Worker(name="netslot-cast") as worker:
        return worker.run(enter)


def make_devices(names: Iterable[str], first_index: int) -> None:
    """Make links of these names in the calling thread's namespace; their indexes count from ``first_index``."""
    requests = [
        rtnetlink.veth(name, f"nscast{place}", index=first_index + 2 * place, peer_index=first_index + 2 * place + 1)
        for place, name in enumerate(names)
    ]
    if requests:
        with netlink.Socket() as sock:
            sock.execute(requests)


def load_and_read(program: Program, values: Values, content: Parameters, number: int = 0) -> Ruleset:
    """What the tool makes of the program in a fresh namespace. ``number`` tells casts apart."""

    def act() -> Ruleset:
        make_devices(program.devices(values), _FIRST_INDEX * (number + 1))
        program.prepare()
        program.load(values, content)
        with nf.Socket() as sock:
            return snapshot(sock)

    return in_scratch(act)


@dataclass(frozen=True, slots=True)
class Cast:
    """A template, or the reason why there is none. ``constants`` are the variables that the casts did not vary."""

    template: Ruleset | None
    reason: str | None
    constants: Mapping[str, str]
    sample: Values
    """The values of one of the casts, with those of composed words."""


def cast_program(program: Program, samples: Sequence[Values], scalars: Collection[str]) -> Cast:
    """Cast ``program`` with the values of several slots and unify what comes out.

    ``scalars`` are variables that may change while a slot is leased: they are varied although all samples
    agree on them. One that cannot be varied (the rules' shape depends on it) is kept constant.
    """
    names = program.variables()
    used = [{name: sample[name] for name in sample if name in names} for sample in samples]
    bases = [used[place % len(used)] for place in range(CASTS)]
    varied = [name for name in sorted(names & set(scalars)) if len({base[name] for base in bases}) == 1]
    if varied:
        try:
            return _cast(program, _vary(bases, varied))
        except (SpecError, KernelError, Unexplained):
            varied = _workable(program, bases, varied)
    try:
        return _cast(program, _vary(bases, varied))
    except Unexplained as error:
        return Cast(None, f"the bytes depend on the slot's values in an unknown way ({error})", {}, {})


def _workable(program: Program, bases: Sequence[Values], names: Sequence[str]) -> list[str]:
    """Those of ``names`` that can be varied one at a time."""
    found: list[str] = []
    for name in names:
        try:
            _cast(program, _vary(bases, [name]))
        except (SpecError, KernelError, Unexplained):
            continue
        found.append(name)
    return found


def _cast(program: Program, values: Sequence[Values]) -> Cast:
    distinct = [value for place, value in enumerate(values) if value not in values[:place]]
    if len(distinct) == 1 and program.devices(distinct[0]):
        distinct = [*distinct, distinct[0]]  # a second cast shows what depends on the links' indexes
    casts = [load_and_read(program, value, {}, number) for number, value in enumerate(distinct)]
    words = program.words()
    extended = [with_words(value, words) for value in distinct]
    template = combine(casts, extended)
    constants = {name: text for name, text in distinct[0].items() if len({value[name] for value in distinct}) == 1}
    return Cast(template, None, constants, extended[0])


def with_words(values: Values, words: Iterable[str]) -> Values:
    """The values, and for each word of the rules that is more than one variable (``${slot}00``) what it becomes."""
    return {**values, **{word: render(word, values, file="rules") for word in words}}


def _vary(bases: Sequence[Values], names: Collection[str]) -> list[Values]:
    return [
        {name: variation(text, number) if number and name in names else text for name, text in base.items()}
        for number, base in enumerate(bases)
    ]


def variation(text: str, number: int) -> str:
    """Another value of the same kind: a number stays a number, an address an address of the same network size."""
    step = random.randint(1, 40) * number
    if (value := whole_number(text)) is not None:
        return hex(value + step) if text.lower().startswith("0x") else str(value + step)
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        return text + "abcdefgh"[:number]
    bits = interface.max_prefixlen - interface.network.prefixlen
    moved = type(interface.ip)((int(interface.ip) + (step << bits)) % (1 << interface.max_prefixlen))
    return f"{moved}/{interface.network.prefixlen}" if "/" in text else str(moved)
