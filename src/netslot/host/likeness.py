"""Slots of one class are alike: once one was compared in full, the next are compared as bytes, nothing parsed.

A pattern is what the kernel answered for a slot that was found right, under the mask of what counts
(:mod:`netslot.kernel.steady`), with the places that hold the slot's own values. Another slot whose answers are the
same bytes with its own values there is right too. Whatever fits no pattern is compared in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from netslot.kernel import steady
from netslot.kernel.netlink import Message

_MOST = 64
"""Patterns to keep; a class has one for each length of its slots' names and each state of its links."""


@dataclass(frozen=True, slots=True)
class _Pattern:
    mask: int
    masked: bytes
    places: tuple[tuple[int, int, int], ...]
    """(begin, end, which of the slot's own values)."""


@dataclass(slots=True)
class Likeness:
    """The patterns of one class, of slots inside or of root's ends."""

    views: steady.Views
    _patterns: dict[tuple[int, ...], _Pattern] = field(default_factory=dict)
    """By the answers' lengths."""

    def holds(self, own: Sequence[bytes], answers: Sequence[Message]) -> bool:
        """Whether the answers are known to be right for the slot whose own values are ``own``."""
        payloads = [answer.payload for answer in answers]
        pattern = self._patterns.get(tuple(map(len, payloads)))
        if pattern is None:
            return False
        wanted = bytearray(pattern.masked)
        for start, end, which in pattern.places:
            if len(own[which]) != end - start:
                return False
            wanted[start:end] = own[which]
        return int.from_bytes(b"".join(payloads), "little") & pattern.mask == int.from_bytes(wanted, "little")

    def learn(self, own: Sequence[bytes], answers: Sequence[Message]) -> None:
        """The answers were compared in full and are right."""
        if len(self._patterns) >= _MOST:
            return
        which = {value: number for number, value in enumerate(own)}
        masks: list[bytes] = []
        places: list[tuple[int, int, int]] = []
        at = 0
        for answer in answers:
            counts, values = steady.mask(answer, self.views)
            masks.append(counts)
            for start, end in values:
                if (number := which.get(answer.payload[start:end])) is not None:
                    places.append((at + start, at + end, number))
            at += len(answer.payload)
        mask = int.from_bytes(b"".join(masks), "little")
        payload = int.from_bytes(b"".join(answer.payload for answer in answers), "little")
        key = tuple(len(answer.payload) for answer in answers)
        self._patterns[key] = _Pattern(mask, (payload & mask).to_bytes(at, "little"), tuple(places))
