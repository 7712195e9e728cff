"""The cgroup policy: one cgroup per slot, with its limits inside it.

It acts on the cgroup file systems, not in the slot's namespace; ``values["cgroup"]`` is the cgroup's path. One
verb more than other dies have: ``remove``, for a slot that is destroyed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from netslot.errors import KernelError, SpecError
from netslot.kernel import cgroupfs
from netslot.policy.base import Difference, Parameters, Values
from netslot.spec.policies import CgroupSection, IoLimit, Quantity, quantity
from netslot.spec.render import render

_PERIOD = 100_000
"""Microseconds over which a CPU limit is counted; the kernel's default."""
_PAGE = 4096


def cast(section: CgroupSection, *, values: Values) -> CgroupDie:
    """Check a template by rendering it for one slot; HostError when the host lacks a controller that it needs."""
    die = CgroupDie(section, _controllers(section))
    die.settings(values)
    return die


def _controllers(section: CgroupSection) -> tuple[str, ...]:
    used = {
        "cpu": section.cpu is not None or section.cpu_weight is not None,
        "memory": section.memory is not None or section.memory_high is not None,
        "pids": section.pids is not None,
        "io": bool(section.io),
    }
    return tuple(name for name in cgroupfs.CONTROLLERS if used[name])


@dataclass(frozen=True, slots=True)
class Setting:
    """One limit: a file of the cgroup, what to write, and what is then read back."""

    name: str
    file: Path
    text: str
    shown: str


@dataclass(frozen=True, slots=True)
class CgroupDie:
    """Limits that can be put on any number of cgroups; see :class:`netslot.policy.base.Die`."""

    section: CgroupSection
    controllers: tuple[str, ...]

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
            cgroupfs.write(setting.file, setting.text)

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Write the limits that ``values`` change. KernelError EBUSY: memory in use is above the new limit."""
        for setting in self.settings(values):
            if _shown(setting) != setting.shown:
                cgroupfs.write(setting.file, setting.text)

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        path = values["cgroup"]
        missing = [place for place in cgroupfs.directories(path, self.controllers) if not place.is_dir()]
        differences = [Difference(f"cgroup {path}", f"{place} is missing") for place in missing]
        if missing:
            return differences
        for setting in self.settings(values):
            shown = _shown(setting)
            if shown != setting.shown:
                what = f"{setting.file.name} is {shown or 'not set'}, not {setting.shown}"
                differences.append(Difference(f"cgroup {path}: {setting.name}", what))
        if cgroupfs.read(cgroupfs.unified(path) / "cgroup.freeze") != "0":
            differences.append(Difference(f"cgroup {path}", "is frozen"))
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
        section, path = self.section, values["cgroup"]
        found: list[Setting] = []
        for name, text in (("cpu", section.cpu), ("cpu_weight", section.cpu_weight), ("pids", section.pids)):
            if text is not None:
                found.append(_SCALARS[name](path, _rendered(str(text), values)))
        for name, size in (("memory", section.memory), ("memory_high", section.memory_high)):
            if size is not None:
                found.append(_memory(path, name, _amount(size, values, f"cgroup.{name}")))
        for limit in section.io:
            found += _io(path, limit, values)
        return found


def _rendered(text: str, values: Values) -> str:
    return render(text, values, file="[cgroup]")


def _amount(value: Quantity, values: Values, key: str) -> int:
    return quantity(_rendered(value, values) if isinstance(value, str) else value, key=key)


def _cpu(path: str, text: str) -> Setting:
    try:
        quota = round(float(text) * _PERIOD)
    except ValueError:
        raise SpecError(f"{text!r} is no number of CPUs", key="cgroup.cpu", hint="write 0.5 or 2") from None
    if quota < 1000:  # the kernel's smallest quota is 1 ms
        raise SpecError(f"{text} CPUs is below the kernel's least share of 0.01", key="cgroup.cpu")
    place = cgroupfs.directory(path, "cpu")
    if cgroupfs.version("cpu") == 2:
        return Setting("cpu", place / "cpu.max", f"{quota} {_PERIOD}", f"{quota} {_PERIOD}")
    return Setting("cpu", place / "cpu.cfs_quota_us", str(quota), str(quota))


def _cpu_weight(path: str, text: str) -> Setting:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise SpecError(f"{text!r} is no weight from 1 to 10000", key="cgroup.cpu_weight")
    place = cgroupfs.directory(path, "cpu")
    if cgroupfs.version("cpu") == 2:
        return Setting("cpu_weight", place / "cpu.weight", text, text)
    shares = str(max(2, round(int(text) * 1024 / 100)))
    return Setting("cpu_weight", place / "cpu.shares", shares, shares)


def _pids(path: str, text: str) -> Setting:
    if not text.isdecimal():
        raise SpecError(f"{text!r} is no number of processes", key="cgroup.pids")
    return Setting("pids", cgroupfs.directory(path, "pids") / "pids.max", text, text)


_SCALARS: Mapping[str, Callable[[str, str], Setting]] = {"cpu": _cpu, "cpu_weight": _cpu_weight, "pids": _pids}


def _memory(path: str, name: str, size: int) -> Setting:
    pages = str(size // _PAGE * _PAGE)
    place = cgroupfs.directory(path, "memory")
    if cgroupfs.version("memory") == 2:
        return Setting(name, place / ("memory.max" if name == "memory" else "memory.high"), pages, pages)
    if name == "memory_high":
        raise SpecError(
            "cgroup v1, which has this host's memory controller, has no such limit", key="cgroup.memory_high"
        )
    return Setting(name, place / "memory.limit_in_bytes", pages, pages)


_IO_FILES_V1 = {
    "rbps": "blkio.throttle.read_bps_device",
    "wbps": "blkio.throttle.write_bps_device",
    "riops": "blkio.throttle.read_iops_device",
    "wiops": "blkio.throttle.write_iops_device",
}


def _io(path: str, limit: IoLimit, values: Values) -> list[Setting]:
    wanted = {
        "rbps": limit.read_bytes,
        "wbps": limit.write_bytes,
        "riops": limit.read_operations,
        "wiops": limit.write_operations,
    }
    amounts = {key: _amount(v, values, "cgroup.io") for key, v in wanted.items() if v is not None}
    device = _rendered(limit.device, values)
    place = cgroupfs.directory(path, "io")
    if cgroupfs.version("io") == 1:
        return [
            Setting(f"io {key}", place / _IO_FILES_V1[key], f"{device} {amount}", f"{device} {amount}")
            for key, amount in amounts.items()
        ]
    full = {key: amounts.get(key, "max") for key in wanted}
    text = f"{device} " + " ".join(f"{key}={amount}" for key, amount in full.items())
    return [Setting("io", place / "io.max", text, text)]


def _shown(setting: Setting) -> str:
    """What the file says now, of the same device where it lists several; empty when unset or gone."""
    try:
        text = cgroupfs.read(setting.file)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return ""
    if setting.name.startswith("io"):
        device = setting.text.split()[0]
        return next((line for line in text.splitlines() if line.split()[0] == device), "")
    return text
