"""What every policy offers: a die with the verbs stamp, read, reset and bind.

A policy module has one more function, ``cast``, whose arguments are the policy's own template; it runs the
real tool in a scratch namespace and returns a die. All verbs act in the network namespace that the calling
thread is in, which is the slot's; none of them starts a process unless ``fallback`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeAlias

Values: TypeAlias = Mapping[str, str]
"""A slot's own values by variable name, as they would be written in a rule file."""

Parameters: TypeAlias = Mapping[str, Sequence[str]]
"""List-valued parameters of a lease by name: CIDRs as ``10.0.0.0/8``, published ports as ``tcp:8080:80``."""


Links: TypeAlias = Mapping[str, int]
"""Indexes of links by name."""

NO_LINKS: Links = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that the kernel holds otherwise than the die says."""

    where: str
    """The object in the tool's own words: ``iptables filter FORWARD``, ``nftables ip fw: set allow``."""
    what: str
    """What is wrong, in words: ``rule 3 of 12 missing``."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Die(Protocol):
    """A template of one policy, compiled once, that can be put into any number of slots."""

    @property
    def rules(self) -> int:
        """How many rules one stamp puts into a slot."""

    @property
    def fallback(self) -> str | None:
        """Why this die runs the real tool in each slot instead of stamping bytes; None when it stamps."""

    def stamp(self, values: Values) -> None:
        """Put the die into a fresh slot, with the parameters' defaults bound. KernelError when refused."""

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        """Compare what the kernel holds with what the die and the bound parameters say it should."""

    def reset(self, values: Values) -> None:
        """Make any state equal to that after ``stamp`` in a fresh slot: rules, sets, counters, limits."""

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Put a lease's values in force: ``values`` may differ from the stamped ones in scalar parameters.

        Atomic for packets: each is judged by the old values or the new ones, and established flows stay.
        """
