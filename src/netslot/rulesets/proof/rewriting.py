"""What targets such as DSCP and TTL write into a packet, and which conditions read it.

Two rules that write the same part do not commute, and a condition that reads the part answers otherwise behind them.
So a packet carries with it who wrote each part last. Where the value is plain (DSCP, TOS, TTL) it is computed too.
"""

from __future__ import annotations

from zlib import crc32

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.proof.flow import Flow
from netslot.rulesets.proof.terms import Number, Truth, choose

_PARTS = {"DSCP": "tos", "TOS": "tos", "ECN": "tos", "TTL": "ttl", "HL": "ttl", "TCPMSS": "tcp", "TCPOPTSTRIP": "tcp"}
"""What each target writes; others write a part of their own."""

_READERS = {"tos": ("tos",), "ecn": ("tos", "tcp"), "tcpmss": ("tcp",), "u32": ("tos", "ttl", "tcp")}
_READERS["bpf"] = _READERS["u32"]

REMEMBERED = frozenset(("SET", "RATEEST", "TEE"))
"""Targets whose effect stays even when the packet is dropped later."""


def write(target: t.Modify, met: Truth, flow: Flow) -> None:
    """The packet after the target, where the rule was met."""
    part = _PARTS.get(target.name, target.name)
    author = crc32(" ".join(target.words).encode())
    flow.written = {**flow.written, part: choose(met, author, flow.written.get(part, 0), 32)}
    words = dict(zip(target.words, target.words[1:], strict=False))
    if target.name == "DSCP" and "--set-dscp" in words:
        flow.dscp = choose(met, int(words["--set-dscp"], 0), flow.dscp, 6)
    elif target.name == "TOS" and "--set-tos" in words:
        value, _, mask = words["--set-tos"].partition("/")
        kept = ~(int(mask or "0xff", 0) >> 2) & 0x3F
        flow.dscp = choose(met, (flow.dscp & kept) ^ (int(value, 0) >> 2), flow.dscp, 6)
    elif part == "ttl":
        flow.ttl = choose(met, _lifetime(words, flow.ttl), flow.ttl, 8)


def _lifetime(words: dict[str, str], ttl: Number) -> Number:
    for option, value in words.items():
        if option.endswith(("-set", "-inc", "-dec")):
            step = int(value, 0)
            return step if option.endswith("-set") else ttl + step if option.endswith("-inc") else ttl - step
    return ttl


def read_by(match: m.Match) -> tuple[str, ...]:
    """The parts that an unmodelled condition may read."""
    if isinstance(match, m.TcpOption):
        return ("tcp",)
    return _READERS.get(match.module, ()) if isinstance(match, m.Opaque) else ()
