"""The nftables policy, and the nft variant of the iptables policy: one die for both.

Cast by the real tool, stamped as one nfnetlink batch. See ``policy/base.py`` for what the verbs promise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from netslot.errors import SpecError
from netslot.kernel import nf_tables as nf
from netslot.kernel.nf_attrs import RULE
from netslot.policy.base import Difference, Parameters, Values
from netslot.policy.nft_cast import Cast, NftProgram, Program, cast_program, in_scratch, load_and_read, make_devices
from netslot.policy.nft_template import Ruleset, commands, snapshot
from netslot.policy.patches import Unpatchable


class NftablesDie:
    """nf_tables rules compiled once; made by :func:`cast` or :func:`cast_iptables`."""

    def __init__(self, program: Program, made: Cast, samples: Sequence[Values]) -> None:
        self._program = program
        self._template = made.template
        self._constants = made.constants
        self.fallback = made.reason
        shown = made.template or load_and_read(program, samples[0])
        self.rules = len(shown.items[RULE])

    def stamp(self, values: Values) -> None:
        """Put the rules into a fresh slot in one transaction, with the parameters' defaults bound."""
        if self._template is None:
            self._program.load(values)
            return
        with nf.Socket() as sock:
            sock.commit(nf.Batch(list(commands(self._template.render(values)))))


def cast(
    text: str,
    samples: Sequence[Values],
    *,
    file: str = "slot.nft",
) -> NftablesDie:
    program = NftProgram(text, file)
    made = cast_program(program, samples, ())
    return NftablesDie(program, made, samples)
