"""Run the real tool in scratch namespaces and turn what it made into a template.

A scratch namespace is made for one load and forgotten with its thread; the tool is a child process of that
thread, which inherits the thread's namespace. Interfaces that the rules hang on (netdev chains, ``iif``) are
played by veth links, with other indexes in every cast: what depends on an index then shows as unexplained.
"""

from __future__ import annotations

import ipaddress
import random
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from netslot.errors import HostError, KernelError, SpecError
from netslot.kernel import netlink, netns, rtnetlink, sys
from netslot.kernel import nf_tables as nf
from netslot.policy.nft_template import Ruleset, combine, snapshot
from netslot.policy.patches import Unexplained, Values
from netslot.spec.render import render, variables_in

T = TypeVar("T")

CASTS = 4
"""Two casts show the difference, the others prove the explanation."""

_TIMEOUT_S = 60
_FIRST_INDEX = 4096  # far above what links of a fresh namespace get by themselves


class Program(Protocol):
    """Rules in a tool's own language, and the tool that loads them."""

    def variables(self) -> frozenset[str]:
        """The names of the variables that the text uses."""

    def devices(self, values: Values) -> list[str]:
        """The interfaces that must exist before the rules can be loaded."""

    def load(self, values: Values) -> None:
        """Run the tool in the calling thread's namespace, replacing what is there. SpecError when it refuses."""


@dataclass(frozen=True, slots=True)
class NftProgram:
    """Text for ``nft -f``."""

    text: str
    file: str

    def variables(self) -> frozenset[str]:
        return variables_in(self.text)

    def devices(self, values: Values) -> list[str]:
        return nft_devices(render(self.text, values, file=self.file))

    def load(self, values: Values, more: str = "") -> None:
        text = render(self.text, values, file=self.file)
        # The flush stands on the first line, so that the tool's line numbers are the file's.
        run_tool(["nft", "-f", "-"], f"flush ruleset; {text}\n{more}", self.file, _NFT_PLACE)


_NFT_PLACE = re.compile(r"^\S*?:(\d+):[\d-]+: Error: (.*)$", re.MULTILINE)
_DEVICE = re.compile(r'\b(?:device|iif|oif)\s+(?:[!=]=\s*)?"?([\w.@:-]+)"?')
_DEVICES = re.compile(r"\bdevices\s*=\s*\{([^}]*)\}")
_DEFINE = re.compile(r"^\s*define\s+([\w.-]+)\s*=\s*(.*)$", re.MULTILINE)


def nft_devices(text: str) -> list[str]:
    """The interface names in ``device``, ``devices =``, ``iif`` and ``oif`` clauses, in order of appearance."""
    for name, value in _DEFINE.findall(text):
        text = re.sub(rf"\${re.escape(name)}\b", lambda _, value=value: value, text)
    found = _DEVICE.findall(text)
    for group in _DEVICES.findall(text):
        found += [word.strip().strip('"') for word in group.split(",")]
    return [name for name in dict.fromkeys(found) if name and name != "lo" and len(name) < 16]


def run_tool(command: Sequence[str], text: str, file: str, place: re.Pattern[str]) -> None:
    """Feed ``text`` to a tool. SpecError at the line that it names when it refuses, HostError when it is missing."""
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=False, timeout=_TIMEOUT_S)
    except FileNotFoundError as error:
        raise HostError(f"{command[0]} is not installed", hint="apt-get install nftables iptables") from error
    if done.returncode == 0:
        return
    message = done.stderr.decode(errors="replace").strip()
    found = place.search(message)
    if found:
        line, reason = int(found[1]), (found[2] if found.re.groups > 1 else message.splitlines()[0])
    else:
        line, reason = None, message.splitlines()[0] if message else f"exit status {done.returncode}"
    raise SpecError(f"{command[0]}: {reason}", file=file, line=line, hint=f"{command[0]} refuses this line")


def in_scratch(function: Callable[[], T]) -> T:
    """Call ``function`` on a thread in a new network namespace, which ends with the call."""

    def enter() -> T:
        sys.unshare(sys.CLONE_NEWNET)
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


def load_and_read(program: Program, values: Values, number: int = 0) -> Ruleset:
    """What the tool makes of the program in a fresh namespace. ``number`` tells casts apart."""

    def act() -> Ruleset:
        make_devices(program.devices(values), _FIRST_INDEX * (number + 1))
        program.load(values)
        with nf.Socket() as sock:
            return snapshot(sock)

    return in_scratch(act)


@dataclass(frozen=True, slots=True)
class Cast:
    """A template, or the reason why there is none. ``constants`` are the variables that the casts did not vary."""

    template: Ruleset | None
    reason: str | None
    constants: Mapping[str, str]


def cast_program(program: Program, samples: Sequence[Values], scalars: Collection[str]) -> Cast:
    """Cast ``program`` with the values of several slots and unify what comes out.

    ``scalars`` are variables that may change while a slot is leased: they are varied although all samples
    agree on them. One that cannot be varied (the rules' shape depends on it) is kept constant.
    """
    names = program.variables()
    used = [{name: sample[name] for name in names if name in sample} for sample in samples]
    bases = [used[place % len(used)] for place in range(CASTS)]
    varied = [name for name in sorted(names & set(scalars)) if len({base[name] for base in bases}) == 1]
    for attempt in ([varied] if varied else []) + [_workable(program, bases, varied) if varied else []]:
        try:
            return _cast(program, _vary(bases, attempt))
        except (SpecError, KernelError):
            if not attempt:
                raise
        except Unexplained as error:
            if not attempt:
                return Cast(None, f"not stamped: {error}", {})
    return _cast_or_reason(program, bases)


def _cast_or_reason(program: Program, bases: Sequence[Values]) -> Cast:
    try:
        return _cast(program, bases)
    except Unexplained as error:
        return Cast(None, f"the bytes depend on the slot's values in an unknown way ({error})", {})


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
    casts = [load_and_read(program, value, number) for number, value in enumerate(distinct)]
    template = combine(casts, distinct)
    constants = {name: text for name, text in distinct[0].items() if len({value[name] for value in distinct}) == 1}
    return Cast(template, None, constants)


def _vary(bases: Sequence[Values], names: Collection[str]) -> list[Values]:
    return [
        {name: variation(text, number) if number and name in names else text for name, text in base.items()}
        for number, base in enumerate(bases)
    ]


def variation(text: str, number: int) -> str:
    """Another value of the same kind: a number stays a number, an address an address of the same network size."""
    step = random.randint(1, 40) * number
    try:
        value = int(text, 0)
    except ValueError:
        pass
    else:
        return hex(value + step) if text.lower().startswith("0x") else str(value + step)
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        return text + "abcdefgh"[:number]
    bits = interface.max_prefixlen - interface.network.prefixlen
    moved = type(interface.ip)((int(interface.ip) + (step << bits)) % (1 << interface.max_prefixlen))
    return f"{moved}/{interface.network.prefixlen}" if "/" in text else str(moved)
