"""What a rule does with a packet that meets its conditions: one frozen class per kind of target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from netslot.rulesets.matches import Words


@dataclass(frozen=True, slots=True)
class NoTarget:
    """A rule without ``-j``: it counts packets and the walk goes on."""


@dataclass(frozen=True, slots=True)
class Accept:
    """Ends the walk of this table's hook; later tables and hooks still see the packet."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Ends everything."""


@dataclass(frozen=True, slots=True)
class Return:
    """Back to the caller's next rule; in a built-in chain, the chain's policy."""


@dataclass(frozen=True, slots=True)
class Jump:
    """``-j CHAIN``: come back to the next rule."""

    chain: str


@dataclass(frozen=True, slots=True)
class Goto:
    """``-g CHAIN``: at its end go back to where the *calling* chain was called from."""

    chain: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Drop, and answer. ``with_`` is the word of ``--reject-with`` (the default is filled in)."""

    with_: str


@dataclass(frozen=True, slots=True)
class NatTarget:
    """Addresses and ports of a translation. ``None`` where the rule leaves it to the kernel.

    ``address``: lowest and highest, ``ports``: lowest and highest, ``base_port`` for a shifted port map
    (``--to-destination A:5000-5002/5000``), ``flags`` among ``--random --random-fully --persistent``.
    """

    address: tuple[int, int] | None = None
    ports: tuple[int, int] | None = None
    base_port: int | None = None
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Dnat:
    """Rewrites the destination; ends the walk of the nat table's hook."""

    to: NatTarget


@dataclass(frozen=True, slots=True)
class Snat:
    """Rewrites the source; ends the walk of the nat table's hook."""

    to: NatTarget


@dataclass(frozen=True, slots=True)
class Masquerade:
    """Snat to the address of the output interface; ``to.address`` is None."""

    to: NatTarget


@dataclass(frozen=True, slots=True)
class Redirect:
    """Dnat to the input interface's own address; ``to.address`` is None."""

    to: NatTarget


@dataclass(frozen=True, slots=True)
class Netmap:
    """Maps one prefix onto another, bit for bit: ``new = (old & ~mask) | value``."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class SetMark:
    """Every form of ``-j MARK`` in one: ``mark = (mark & ~mask) ^ value``. The walk goes on."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class SetConnmark:
    """``-j CONNMARK --set-xmark`` and its short forms: ``ctmark = (ctmark & ~mask) ^ value``; goes on."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class SaveMark:
    """``ctmark = (ctmark & ~ctmask) ^ (mark & nfmask)``. The walk goes on."""

    nfmask: int
    ctmask: int


@dataclass(frozen=True, slots=True)
class RestoreMark:
    """``mark = (mark & ~nfmask) ^ (ctmark & ctmask)``. The walk goes on."""

    nfmask: int
    ctmask: int


@dataclass(frozen=True, slots=True)
class Notrack:
    """``-j NOTRACK`` or ``-j CT --notrack``. The walk goes on."""

    words: Words


@dataclass(frozen=True, slots=True)
class CtTarget:
    """Other uses of ``-j CT`` (zones, helpers, events). ``zone`` is None when it sets none, or not a number.

    The walk goes on.
    """

    words: Words
    zone: int | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """Tells somebody and lets the walk go on; the packet stays as it is (LOG, NFLOG, TRACE, AUDIT, ...)."""

    name: str
    words: Words


@dataclass(frozen=True, slots=True)
class Modify:
    """Changes the packet or its metadata in a way that is not modelled, and lets the walk go on.

    TCPMSS, TOS, DSCP, TTL, HL, CLASSIFY, CHECKSUM, ECN, TCPOPTSTRIP, TEE, SET, SECMARK, HMARK, ...
    """

    name: str
    words: Words


@dataclass(frozen=True, slots=True)
class OpaqueTarget:
    """A target of which nothing is known, not even whether the walk goes on (NFQUEUE, TPROXY, strangers)."""

    name: str
    words: Words


Target: TypeAlias = (
    NoTarget
    | Accept
    | Drop
    | Return
    | Jump
    | Goto
    | Reject
    | Dnat
    | Snat
    | Masquerade
    | Redirect
    | Netmap
    | SetMark
    | SetConnmark
    | SaveMark
    | RestoreMark
    | Notrack
    | CtTarget
    | Log
    | Modify
    | OpaqueTarget
)

TERMINAL = (Accept, Drop, Reject, Dnat, Snat, Masquerade, Redirect, Netmap)
"""Targets after which this hook of this table is over. (Return, Jump and Goto move the walk instead.)"""

CONTINUES = (NoTarget, SetMark, SetConnmark, SaveMark, RestoreMark, Notrack, CtTarget, Log, Modify)
"""Targets after which the next rule is always looked at."""
