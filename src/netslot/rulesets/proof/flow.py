"""One packet as the hooks see it: its contents, its connection, and where in the machine it is.

The same class serves a concrete packet (all ints and bools) and a symbolic one (z3 terms).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from netslot.rulesets.model import Family
from netslot.rulesets.proof.terms import Number, Truth

NEW, ESTABLISHED, RELATED, INVALID, UNTRACKED = range(5)
STATES = ("NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED")

ICMP = {4: 1, 6: 58}

Oracle = Callable[[tuple[str, ...], tuple[Number, ...]], Truth]
"""Answers a condition that is not modelled: the same key and the same packet contents, the same answer."""

FIELDS = {
    "src": 0,
    "dst": 0,
    "proto": 8,
    "sport": 16,
    "dport": 16,
    "icmp_type": 8,
    "icmp_code": 8,
    "flags": 8,
    "length": 16,
    "ttl": 8,
    "dscp": 6,
    "state": 3,
    "reply": 1,
    "fragment": 1,
}
"""Width in bits of what a packet is made of; 0 stands for the family's address width."""


@dataclass(slots=True)
class Flow:
    """``frame`` names the link-layer hop: a question about it (a MAC) is the same only on the same hop.

    ``place`` is the namespace: ``root``, or ``slot:NAME``. ``reply``, ``fragment`` are 0 or 1.
    ``redirected``: its destination was translated on its way here. ``written``: for each part of the packet that
    rules rewrite (see :mod:`rewriting`), who wrote it last; 0 is nobody.
    """

    family: Family
    src: Number
    dst: Number
    proto: Number
    sport: Number
    dport: Number
    icmp_type: Number
    icmp_code: Number
    flags: Number
    length: Number
    ttl: Number
    dscp: Number
    state: Number
    reply: Number
    fragment: Number
    oracle: Oracle
    mark: Number = 0
    ctmark: Number = 0
    tracked: Truth = True
    redirected: Truth = False
    iif: str = ""
    oif: str = ""
    place: str = "root"
    frame: str = ""
    written: Mapping[str, Number] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return 32 if self.family == 4 else 128

    def copy(self) -> Flow:
        return replace(self)

    def contents(self) -> tuple[Number, ...]:
        """What an unmodelled condition may read."""
        return (self.src, self.dst, self.proto, self.sport, self.dport, self.state)
