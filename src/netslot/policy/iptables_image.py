"""A table as entries that can be moved, and as the blob that the kernel takes. Pure: no kernel calls.

The kernel's blob holds jumps as byte offsets, so an entry cannot be added in the middle without mending every
jump, hook and chain end behind it. An :class:`Image` holds them as entry numbers instead; :meth:`Image.flatten`
makes the blob again, with further entries put in where rules of a list parameter belong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from netslot.kernel import xtables
from netslot.kernel.xtables import Family, Info

NO_HOOK: Final = 0xFFFFFFFF
"""What the kernel reports, and takes, for the offset of a hook that the table does not have."""

NEXT: Final = -1
"""A jump to the entry that follows: how the tool writes a rule without a target."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One rule, chain head or chain end. ``jump`` is the number of the entry it jumps to, NEXT, or None."""

    data: bytes
    jump: int | None
    verdict_at: int
    """Where in ``data`` a standard target keeps its verdict."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A table ready for the kernel. ``starts`` are the offsets of its entries."""

    family: Family
    table: str
    info: Info
    blob: bytes
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """A table whose entries are numbered. Hook entries and chain ends are entry numbers by hook, -1 for none."""

    family: Family
    table: str
    valid_hooks: int
    hook_entry: tuple[int, ...]
    underflow: tuple[int, ...]
    entries: tuple[Entry, ...]

    def flatten(self, insertions: Mapping[int, Sequence[Entry]] | None = None, written: bytes = b"") -> Flat:
        """The blob, with ``insertions[n]`` put in before entry ``n``.

        ``written`` is this image's own blob after values were written into it; the entries are taken from there.

        A jump or hook to entry ``n`` meets what was put in before it: that is the same chain's rule. A chain's
        end (underflow) stays the entry itself, so that what was put in before it is still part of the chain.
        """
        put_in = insertions or {}
        order: list[Entry] = []
        first: list[int] = []  # by entry number: offset of what was put in before it, else of itself
        own: list[int] = []
        starts: list[int] = []
        content: list[bytes] = []
        at = read = 0
        for number, entry in enumerate(self.entries):
            first.append(at)
            for extra in put_in.get(number, ()):
                order.append(extra)
                starts.append(at)
                content.append(extra.data)
                at += len(extra.data)
            size = len(entry.data)
            own.append(at)
            order.append(entry)
            starts.append(at)
            content.append(written[read : read + size] if written else entry.data)
            at += size
            read += size
        blob = bytearray(b"".join(content))
        for start, entry in zip(starts, order, strict=True):
            if entry.jump is not None:
                goal = start + len(entry.data) if entry.jump == NEXT else first[entry.jump]
                xtables.set_verdict(blob, start + entry.verdict_at, goal)
        info = Info(
            self.valid_hooks,
            tuple(NO_HOOK if number < 0 else first[number] for number in self.hook_entry),
            tuple(NO_HOOK if number < 0 else own[number] for number in self.underflow),
            len(order),
            at,
        )
        return Flat(self.family, self.table, info, bytes(blob), tuple(starts))


def mask(family: Family, blob: bytearray, starts: Sequence[int], *, counters: bool = True) -> bytearray:
    """Zero what the kernel writes into entries for itself, in place: ``comefrom`` and, unless told, the counters."""
    at, length = family.private_at, family.private if counters else 4
    zero = bytes(length)
    for start in starts:
        blob[start + at : start + at + length] = zero
    return blob


def take_apart(family: Family, table: str, info: Info, raw: bytes | bytearray) -> Image:
    """The image of a blob as the kernel gave it out."""
    starts = xtables.entry_offsets(family, raw)
    blob = mask(family, bytearray(raw), starts)
    number = {start: index for index, start in enumerate(starts)}
    entries = []
    for start in starts:
        data = bytearray(blob[start : start + xtables.entry_size(family, blob, start)])
        target = xtables.target(family, data, 0)
        jump: int | None = None
        if not target.name:
            goal = xtables.verdict(data, target)
            if goal >= 0:
                jump = NEXT if goal == start + len(data) else number[goal]
                xtables.set_verdict(data, target.at, 0)
        entries.append(Entry(bytes(data), jump, target.at))
    return Image(
        family,
        table,
        info.valid_hooks,
        tuple(-1 if offset == NO_HOOK else number[offset] for offset in info.hook_entry),
        tuple(-1 if offset == NO_HOOK else number[offset] for offset in info.underflow),
        tuple(entries),
    )


def image_of(flat: Flat) -> Image:
    """The entries of a table that is ready for the kernel, or came from there."""
    return take_apart(flat.family, flat.table, flat.info, flat.blob)


def closed(image: Image) -> Flat:
    """An empty table whose base chains drop everything; ``image`` is the table's empty image."""
    flat = image.flatten()
    blob = bytearray(flat.blob)
    for offset in flat.info.underflow:
        if offset != NO_HOOK:
            xtables.set_verdict(blob, xtables.target(image.family, blob, offset).at, xtables.VERDICT_DROP)
    return Flat(image.family, image.table, flat.info, bytes(blob), flat.starts)


def extensions(family: Family, blob: bytes | bytearray) -> frozenset[str]:
    """Names of all matches and targets that a blob uses."""
    return frozenset(
        part.name for start in xtables.entry_offsets(family, blob) for part in xtables.parts(family, blob, start)
    )


def inserted(base: Image, longer: Image) -> tuple[int, tuple[Entry, ...]] | None:
    """What ``longer`` has that ``base`` lacks, if it is one run of entries: before which entry, and the run.

    Jumps of the run are given in the base's numbers. None when the two differ otherwise.
    """
    extra = len(longer.entries) - len(base.entries)
    if extra < 0:
        return None
    at = next(
        (
            index
            for index, (ours, theirs) in enumerate(zip(base.entries, longer.entries, strict=False))
            if ours.data != theirs.data
        ),
        len(base.entries),
    )
    run = tuple(
        Entry(entry.data, _renumber(entry.jump, at, extra), entry.verdict_at)
        for entry in longer.entries[at : at + extra]
    )
    # Equal neighbours make the place ambiguous; any place that gives the same table back is right.
    for place in range(at, -1, -1):
        candidate = Image(
            base.family, base.table, base.valid_hooks, base.hook_entry, base.underflow, base.entries
        ).flatten({place: run})
        if (candidate.blob, candidate.info) == _flat_key(longer):
            return place, run
        if place == 0 or longer.entries[place - 1 + extra].data != base.entries[place - 1].data:
            return None
        run = tuple(
            Entry(entry.data, _renumber(entry.jump, place - 1, extra), entry.verdict_at)
            for entry in longer.entries[place - 1 : place - 1 + extra]
        )
    return None


def _renumber(jump: int | None, at: int, extra: int) -> int | None:
    if jump is None or jump == NEXT or jump <= at:
        return jump
    return jump - extra


def _flat_key(image: Image) -> tuple[bytes, Info]:
    flat = image.flatten()
    return flat.blob, flat.info
