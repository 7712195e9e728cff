"""The cgroup policy: one cgroup per slot, with its limits inside it.

It acts on the cgroup file systems, not in the slot's namespace; ``values["cgroup"]`` is the cgroup's path. One
verb more than other dies have: ``remove``, for a slot that is destroyed.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from netslot.errors import KernelError, SpecError
from netslot.kernel import cgroupfs
from netslot.policy.base import Difference, Parameters, Values
from netslot.spec.policies import CgroupSection, IoLimit, Quantity, quantity
from netslot.spec.render import render, variables_in

_PERIOD = 100_000
"""Microseconds over which a CPU limit is counted; the kernel's default."""
_PAGE = 4096
_MOST_PIDS = 1 << 22  # PID_MAX_LIMIT, linux/threads.h


def cast(section: CgroupSection, *, values: Values) -> CgroupDie:
    """Check a template by rendering it for one slot; HostError when the host lacks a controller that it needs."""
    die = CgroupDie(section, _controllers(section), variables_in(repr(section)))
    die.settings(values)
    for number, limit in enumerate(section.io):
        device = _rendered(limit.device, values)
        if not Path("/sys/dev/block", device).exists():
            hint = "lsblk shows which there are"
            raise SpecError(f"this host has no block device {device}", key=f"cgroup.io.{number}.device", hint=hint)
    return die


def _controllers(section: CgroupSection) -> tuple[str, ...]:
    used = {
        "cpu": section.cpu is not None or section.cpu_weight is not None,
        "memory": section.memory is not None or section.memory_high is not None,
        "pids": section.pids is not None,
        "io": bool(section.io),
    }
    return tuple(name for name in cgroupfs.CONTROLLERS if used[name])


class _Limit(NamedTuple):
    """One limit: its file below the directory of any cgroup, what to write, and what is then read back."""

    name: str
    controller: str
    file: str
    text: str
    shown: str


class Setting(NamedTuple):
    """A limit of one cgroup."""

    limit: _Limit
    file: str


@dataclass(frozen=True, slots=True)
class CgroupDie:
    """Limits that can be put on any number of cgroups; see :class:`netslot.policy.base.Die`."""

    section: CgroupSection
    controllers: tuple[str, ...]
    variables: frozenset[str]

    @property
    def rules(self) -> int:
        """Limits do not count as rules."""
        return 0

    @property
    def fallback(self) -> str | None:
        return None

    def stamp(self, values: Values) -> None:
        cgroupfs.create(values["cgroup"], self.controllers)
        for setting in self.settings(values):
            cgroupfs.write(setting.file, setting.limit.text)

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Write the limits that ``values`` change, and make the cgroup if it is gone; who is inside stays.

        KernelError EBUSY: memory in use is above the new limit.
        """
        if any(not place.is_dir() for place in cgroupfs.directories(values["cgroup"], self.controllers)):
            cgroupfs.create(values["cgroup"], self.controllers)
        for setting in self.settings(values):
            if _shown(setting) != setting.limit.shown:
                cgroupfs.write(setting.file, setting.limit.text)

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        path = values["cgroup"]
        missing = [place for place in cgroupfs.directories(path, self.controllers) if not place.is_dir()]
        differences = [Difference(f"cgroup {path}", f"{place} is missing") for place in missing]
        if missing:
            return differences
        for setting in self.settings(values):
            shown, limit = _shown(setting), setting.limit
            if shown != limit.shown:
                what = f"{limit.file} is {shown or 'not set'}, not {limit.shown}"
                differences.append(Difference(f"cgroup {path}: {limit.name}", what))
        # Whoever froze a tenant at work meant it; an empty cgroup that is frozen stops the next tenant.
        if cgroupfs.read(cgroupfs.unified(path) / "cgroup.freeze") != "0" and not cgroupfs.populated(path):
            differences.append(Difference(f"cgroup {path}", "is frozen, and nobody is in it"))
        return differences

    def reset(self, values: Values) -> None:
        """Kill whoever is inside and make the cgroup anew, so that usage is counted from zero.

        BPF programs attached to it go with the old one: reset the bpf policy afterwards.
        """
        self.remove(values)
        self.stamp(values)

    def remove(self, values: Values) -> None:
        """Kill whoever is inside and remove the cgroup; absence is success."""
        cgroupfs.kill_and_wait(values["cgroup"])
        cgroupfs.remove(values["cgroup"], self.controllers)

    def enter(self, values: Values, pid: int = 0) -> None:
        """Move a process (0: the caller) into the slot's cgroup."""
        cgroupfs.enter(values["cgroup"], self.controllers, pid)

    def settings(self, values: Values) -> list[Setting]:
        """The limits of one slot; SpecError for a value that is none."""
        own = tuple((name, values[name]) for name in self.variables if name in values)
        path = values["cgroup"]
        return [
            Setting(limit, f"{cgroupfs.hierarchy(limit.controller)}/{path}/{limit.file}")
            for limit in _limits(self.section, own)
        ]


@functools.lru_cache(maxsize=256)
def _limits(section: CgroupSection, own: tuple[tuple[str, str], ...]) -> tuple[_Limit, ...]:
    """Most slots have the same limits: working them out once is enough. ``own`` are the section's variables."""
    values = dict(own)
    found: list[_Limit] = []
    for name, text in (("cpu", section.cpu), ("cpu_weight", section.cpu_weight), ("pids", section.pids)):
        if text is not None:
            found.append(_SCALARS[name](_rendered(str(text), values)))
    for name, size in (("memory", section.memory), ("memory_high", section.memory_high)):
        if size is not None:
            found.append(_memory(name, _amount(size, values, f"cgroup.{name}")))
    for number, limit in enumerate(section.io):
        found += _io(limit, values, f"cgroup.io.{number}")
    return tuple(found)


def _rendered(text: str, values: Values) -> str:
    return render(text, values, file="[cgroup]")


def _amount(value: Quantity, values: Values, key: str) -> int:
    return quantity(_rendered(value, values) if isinstance(value, str) else value, key=key)


def _cpu(text: str) -> _Limit:
    try:
        quota = round(float(text) * _PERIOD)
    except (ValueError, OverflowError):  # inf and nan are numbers to Python
        raise SpecError(f"{text!r} is no number of CPUs", key="cgroup.cpu", hint="write 0.5 or 2") from None
    if quota < 1000:  # the kernel's smallest quota is 1 ms
        raise SpecError(f"{text} CPUs is below the kernel's least share of 0.01", key="cgroup.cpu")
    if cgroupfs.version("cpu") == 2:
        return _Limit("cpu", "cpu", "cpu.max", f"{quota} {_PERIOD}", f"{quota} {_PERIOD}")
    return _Limit("cpu", "cpu", "cpu.cfs_quota_us", str(quota), str(quota))


def _cpu_weight(text: str) -> _Limit:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise SpecError(f"{text!r} is no weight from 1 to 10000", key="cgroup.cpu_weight")
    if cgroupfs.version("cpu") == 2:
        return _Limit("cpu_weight", "cpu", "cpu.weight", text, text)
    shares = str(max(2, round(int(text) * 1024 / 100)))
    return _Limit("cpu_weight", "cpu", "cpu.shares", shares, shares)


def _pids(text: str) -> _Limit:
    if not text.isdecimal() or int(text) > _MOST_PIDS:
        raise SpecError(f"{text!r} is no number of processes up to {_MOST_PIDS}", key="cgroup.pids")
    return _Limit("pids", "pids", "pids.max", text, text)


_SCALARS: Mapping[str, Callable[[str], _Limit]] = {"cpu": _cpu, "cpu_weight": _cpu_weight, "pids": _pids}


def _memory(name: str, size: int) -> _Limit:
    if size < _PAGE:
        raise SpecError(f"{size} bytes are less than a page: no process could run", key=f"cgroup.{name}")
    pages = str(size // _PAGE * _PAGE)
    if cgroupfs.version("memory") == 2:
        return _Limit(name, "memory", "memory.max" if name == "memory" else "memory.high", pages, pages)
    if name == "memory_high":
        raise SpecError(
            "cgroup v1, which has this host's memory controller, has no such limit", key="cgroup.memory_high"
        )
    return _Limit(name, "memory", "memory.limit_in_bytes", pages, pages)


_IO_FILES_V1 = {
    "rbps": "blkio.throttle.read_bps_device",
    "wbps": "blkio.throttle.write_bps_device",
    "riops": "blkio.throttle.read_iops_device",
    "wiops": "blkio.throttle.write_iops_device",
}


def _io(limit: IoLimit, values: Values, key: str) -> list[_Limit]:
    wanted = {
        "rbps": limit.read_bytes,
        "wbps": limit.write_bytes,
        "riops": limit.read_operations,
        "wiops": limit.write_operations,
    }
    amounts = {name: _amount(v, values, key) for name, v in wanted.items() if v is not None}
    device = _rendered(limit.device, values)
    if cgroupfs.version("io") == 1:
        return [
            _Limit(f"io {name}", "io", _IO_FILES_V1[name], f"{device} {amount}", f"{device} {amount}")
            for name, amount in amounts.items()
        ]
    full = {name: amounts.get(name, "max") for name in wanted}
    text = f"{device} " + " ".join(f"{name}={amount}" for name, amount in full.items())
    return [_Limit("io", "io", "io.max", text, text)]


def _shown(setting: Setting) -> str:
    """What the file says now, of the same device where it lists several; empty when unset or gone."""
    try:
        text = cgroupfs.read(setting.file)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return ""
    if setting.limit.controller == "io":
        device = setting.limit.text.split()[0]
        return next((line for line in text.splitlines() if line.split()[0] == device), "")
    return text
