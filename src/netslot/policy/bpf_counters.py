"""The built-in counters of packets and bytes, a :class:`netslot.policy.bpf_parts.Part`.

Loading a program costs more than attaching all the others, so one is loaded for GROUP slots of neighbouring numbers.
Their counters are in one map, where each attachment's number says which are its own: nothing is looked up.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from netslot.errors import KernelError
from netslot.kernel import bpf, tc
from netslot.policy import bpf_parts
from netslot.policy.base import Difference, Parameters, Values
from netslot.policy.bpf_parts import Attachment, Identity, Place

GROUP: Final = 64
"""Slots whose counters are in one map; count.c has the same number."""

_NAME = "netslot/count"
_DIRECTION = struct.Struct("=QQQQ32x")
_STANDS = [(hook, where) for hook in (tc.EGRESS, tc.INGRESS) for where in (bpf_parts.FIRST, bpf_parts.LAST)]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Packets and bytes of one direction: all that came, and those that no program dropped."""

    packets: int
    bytes: int
    passed_packets: int
    passed_bytes: int

    def by_verdict(self) -> dict[str, dict[str, int]]:
        """Packets and bytes that passed, and those that a program dropped."""
        dropped = {"packets": self.packets - self.passed_packets, "bytes": self.bytes - self.passed_bytes}
        return {"passed": {"packets": self.passed_packets, "bytes": self.passed_bytes}, "dropped": dropped}


@dataclass(slots=True)
class _Group:
    """What neighbouring slots share; ``used`` are the numbers of those that have counted here."""

    program: int
    counters: int
    used: set[int] = field(default_factory=set)


class Counters:
    """One counting program around all others on a link; its attachments say where they stand."""

    def __init__(self, link: str = bpf_parts.UPLINK) -> None:
        self._places = _places(link)
        self._source = bpf_parts.built_in("count")
        self._groups: dict[int, _Group] = {}
        self._lock = threading.Lock()
        self._tag = bpf.prog_info(self._group(0).program).tag

    def load(self, values: Values, parameters: Parameters) -> list[Attachment]:
        slot = int(values["slot"])
        with self._lock:
            group = self._group(slot)
            again = slot in group.used
            group.used.add(slot)
        if again:
            for direction in (0, 1):
                bpf.map_update(group.counters, _key(slot, direction), bytes(_DIRECTION.size))
        return [
            Attachment(place, _NAME, group.program, False, _number(slot, stand))
            for stand, place in enumerate(self._places)
        ]

    def rebind(self, values: Values, parameters: Parameters) -> list[Attachment]:
        return []

    def tags(self, values: Values) -> dict[Place, Identity]:
        slot = int(values["slot"])
        return {place: Identity(_NAME, self._tag, _number(slot, stand)) for stand, place in enumerate(self._places)}

    def content(self, values: Values, parameters: Parameters, found: Mapping[Place, tc.Filter]) -> list[Difference]:
        """The four must count in one map, or what lies between them would not be what was dropped."""
        if len({found[place].program for place in self._places if place in found}) > 1:
            return [Difference(f"bpf {values[self._places[0].link]} counters", "the counting programs are not one")]
        return []

    def close(self) -> None:
        bpf_parts.close_all([fd for group in self._groups.values() for fd in (group.program, group.counters)])
        self._groups = {}

    def _group(self, slot: int) -> _Group:
        found = self._groups.get(slot // GROUP)
        if found is None:
            counters = bpf_parts.create_map(self._source.maps["counters"], "ns_counters")
            try:
                program = bpf_parts.load_program(self._source, "count", {"counters": counters})
            except KernelError:
                os.close(counters)
                raise
            found = self._groups[slot // GROUP] = _Group(program, counters)
        return found

    @staticmethod
    def read(slot: int, found: Mapping[Place, tc.Filter], link: str) -> tuple[Traffic, Traffic]:
        """Egress and ingress; KernelError ENOENT when the slot has no counters on the link."""
        attached = found.get(_places(link)[0])
        if attached is None:
            raise KernelError("read the slot's counters", errno.ENOENT, hint="set counters = true in [bpf]")
        fd = bpf_parts.map_of(attached.program, "ns_counters")
        try:
            cells = [bpf.map_lookup(fd, _key(slot, direction), _DIRECTION.size) for direction in (0, 1)]
        finally:
            os.close(fd)
        out, back = (Traffic(*_DIRECTION.unpack(cell or bytes(_DIRECTION.size))) for cell in cells)
        return out, back


def _places(link: str) -> list[Place]:
    return [Place(hook, priority, link) for hook, priority in _STANDS]


def _number(slot: int, stand: int) -> int:
    """Of a class id a program sees 16 bits (struct qdisc_skb_cb): where it stands, and the place in the group."""
    return slot << 2 | stand


def _key(slot: int, direction: int) -> bytes:
    return struct.pack("=I", slot % GROUP << 1 | direction)
