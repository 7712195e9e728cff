"""cgroup file systems: version 2, and version 1 where a controller is only there.

A cgroup is named by its path below the root of each hierarchy, as ``netslot/slot17``. A process is killed, frozen
and matched by the unified hierarchy, which every such host has (also when all controllers are on version 1), and
limited by whichever hierarchy has the controller. Documentation: Admin Guide, "Control Group v2" and "cgroup-v1".
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from netslot.errors import HostError, KernelError

ROOT: Final = Path("/sys/fs/cgroup")
CONTROLLERS: Final = ("cpu", "memory", "pids", "io")
"""Version 2's names; ``io`` is called blkio in version 1."""

_V1_NAMES: Final[Mapping[str, str]] = {"cpu": "cpu", "memory": "memory", "pids": "pids", "io": "blkio"}


@functools.cache
def unified_root() -> Path:
    """Where version 2 is mounted; HostError when it is not."""
    for root in (ROOT, ROOT / "unified"):
        if (root / "cgroup.controllers").exists():
            return root
    raise HostError("cgroup v2 is not mounted", hint="mount -t cgroup2 none /sys/fs/cgroup/unified")


@functools.cache
def version(controller: str) -> int:
    """2 or 1, by where the controller is; HostError when the host has it nowhere."""
    if controller in (unified_root() / "cgroup.controllers").read_text().split():
        return 2
    if (ROOT / _V1_NAMES[controller] / "cgroup.procs").exists():
        return 1
    raise HostError(
        f"the cgroup controller {controller!r} is not available", hint="see cgroup_disable= in /proc/cmdline"
    )


def available(controller: str) -> bool:
    """Whether the host has the controller, in either version."""
    try:
        return version(controller) > 0
    except HostError:
        return False


def unified(path: str) -> Path:
    """A cgroup's directory in the unified hierarchy."""
    return unified_root() / path


@functools.cache
def hierarchy(controller: str) -> str:
    """Where the hierarchy that has ``controller`` is mounted."""
    return str(unified_root() if version(controller) == 2 else ROOT / _V1_NAMES[controller])


def directory(path: str, controller: str) -> Path:
    """A cgroup's directory in the hierarchy that has ``controller``."""
    return Path(hierarchy(controller), path)


@functools.cache
def _hierarchies(controllers: tuple[str, ...]) -> tuple[str, ...]:
    """The unified hierarchy first, then those of the controllers on version 1."""
    return tuple(dict.fromkeys((str(unified_root()), *map(hierarchy, controllers))))


def directories(path: str, controllers: tuple[str, ...]) -> list[Path]:
    """A cgroup's directories: the unified one first, then those of the controllers on version 1."""
    return [Path(root, path) for root in _hierarchies(controllers)]


def create(path: str, controllers: tuple[str, ...]) -> None:
    """Make a cgroup and what is missing above it, with ``controllers`` at work in it; success when it is there."""
    for root in _hierarchies(controllers):
        _mkdir(f"{root}/{path}")
    wanted = _of_version_2(controllers)
    if wanted and not wanted <= set(read(f"{unified_root()}/{path}/cgroup.controllers").split()):
        _enable(Path(path).parent, wanted)


@functools.cache
def _of_version_2(controllers: tuple[str, ...]) -> frozenset[str]:
    return frozenset(controller for controller in controllers if version(controller) == 2)


def _mkdir(place: str) -> None:
    try:
        os.mkdir(place)
    except FileExistsError:
        return
    except FileNotFoundError:
        _mkdir(os.path.dirname(place))
        _mkdir(place)
    except OSError as error:
        raise KernelError(f"mkdir {place}", error.errno or errno.EIO) from error


def _enable(parent: Path, controllers: frozenset[str]) -> None:
    """Have each cgroup from the root down to ``parent`` hand the controllers on (cgroup.subtree_control)."""
    for place in [unified_root() / part for part in (*reversed(parent.parents), parent)]:
        file = place / "cgroup.subtree_control"
        present = file.read_text().split()
        missing = sorted(controllers.difference(present))
        if missing:
            write(file, " ".join(f"+{controller}" for controller in missing))


def remove(path: str, controllers: tuple[str, ...]) -> bool:
    """Remove an empty cgroup everywhere; absence is success. Returns whether there was anything.

    Of ``controllers``, those that the host does not have are passed over. Raises KernelError: EBUSY while a
    process is in it.
    """
    there = False
    for place in directories(path, tuple(name for name in controllers if available(name))):
        try:
            place.rmdir()
            there = True
        except FileNotFoundError:
            continue
        except OSError as error:
            raise KernelError(f"rmdir {place}", error.errno or errno.EIO) from error
    return there


def claim(prefix: str) -> tuple[str, int]:
    """Make a cgroup that begins with ``prefix`` and belongs to whoever holds the descriptor that comes with its name.

    What others claimed so and cannot have any more, because they are dead, is removed first.
    """
    for place in unified_root().glob(f"{prefix}*"):
        _remove_orphan(place)
    path = f"{prefix}{secrets.token_hex(4)}"
    create(path, ())
    fd = os.open(unified(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return path, fd


def _remove_orphan(place: Path) -> None:
    """Remove a claimed cgroup with all below it, in every hierarchy, if nobody holds it and no process is in it."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for root in _hierarchies(tuple(name for name in CONTROLLERS if available(name))):
            for each, _, _ in os.walk(Path(root, place.name), topdown=False):
                os.rmdir(each)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EBUSY, errno.ENOENT):
            raise KernelError(f"remove cgroup {place}", error.errno or errno.EIO) from error
    finally:
        os.close(fd)


def write(file: Path | str, text: str) -> None:
    """One write(2), which is how these files take a value."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelError(f"write {text!r} to {file}", error.errno or errno.EIO) from error


def read(file: Path | str) -> str:
    """The content without the final newline; KernelError ENOENT when the cgroup is gone."""
    try:
        with open(file, encoding="utf-8") as opened_file:
            return opened_file.read().rstrip("\n")
    except OSError as error:
        raise KernelError(f"read {file}", error.errno or errno.EIO) from error


@contextmanager
def opened(place: Path) -> Iterator[int]:
    """A descriptor of a cgroup's directory, for BPF attachments."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open {place}", error.errno or errno.EIO) from error
    try:
        yield fd
    finally:
        os.close(fd)


def enter(path: str, controllers: tuple[str, ...], pid: int = 0) -> None:
    """Move a process (0: the caller) into the cgroup, in each hierarchy that has it; what it starts is born there.

    Raises KernelError ENOENT when not even the unified hierarchy has it.
    """
    for place in _entrances(path, controllers):
        write(place, str(pid))


def _entrances(path: str, controllers: tuple[str, ...]) -> list[Path]:
    places = directories(path, tuple(name for name in controllers if available(name)))
    return [place / "cgroup.procs" for place in places if place == places[0] or place.is_dir()]


@contextmanager
def entrance(path: str, controllers: tuple[str, ...]) -> Iterator[Callable[[], None]]:
    """As :func:`enter`, prepared: a function that moves its caller in, for a child between fork and exec.

    Such a child of a process with threads may do little more than write to descriptors, and that is all it does.
    """
    fds: list[int] = []
    try:
        for place in _entrances(path, controllers):
            try:
                fds.append(os.open(place, os.O_WRONLY | os.O_CLOEXEC))
            except OSError as error:
                raise KernelError(f"open {place}", error.errno or errno.EIO) from error

        def step_in() -> None:
            for fd in fds:
                os.write(fd, b"0")

        yield step_in
    finally:
        for fd in fds:
            os.close(fd)


def processes(path: str) -> list[int]:
    """The processes in the cgroup, as the unified hierarchy lists them."""
    return [int(line) for line in read(unified(path) / "cgroup.procs").split()]


def populated(path: str) -> bool:
    """Whether any process is in the cgroup or below it, also one that is on its way out. A cgroup that is not there
    has none."""
    try:
        return "populated 1" in read(unified(path) / "cgroup.events")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return False


def freeze(path: str, frozen: bool) -> None:
    """Stop or continue all processes of the cgroup, by one write; they stop within moments, not at once."""
    write(unified(path) / "cgroup.freeze", "1" if frozen else "0")


def frozen(path: str) -> bool:
    """Whether all processes of the cgroup have stopped."""
    return "frozen 1" in read(unified(path) / "cgroup.events")


def kill(path: str) -> None:
    """SIGKILL for every process in the cgroup and below it, by one write (cgroup.kill, Linux 5.14).

    It also reaches frozen processes, and those that are forking at this moment.
    """
    write(unified(path) / "cgroup.kill", "1")


def kill_and_wait(path: str, timeout: float = 5.0) -> None:
    """Kill, and wait up to ``timeout`` seconds until nobody is left; KernelError EBUSY when somebody is."""
    if not populated(path):
        return
    kill(path)
    deadline = time.monotonic() + timeout
    pause = 0.0005
    while populated(path):
        if time.monotonic() > deadline:
            raise KernelError(f"kill cgroup {path}", errno.EBUSY, hint="a process is stuck in the kernel")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


class Usage(NamedTuple):
    """What a cgroup uses. Pressure: share of the last 10 s, in percent, in which some task waited."""

    cpu_seconds: float
    memory_bytes: int
    processes: int
    cpu_pressure: float | None
    memory_pressure: float | None
    io_pressure: float | None


def usage(path: str) -> Usage:
    """Read a cgroup's usage; what no hierarchy tells is 0, and pressure that the kernel does not track is None.

    The unified hierarchy counts CPU time and pressure also where all controllers are on version 1.
    """
    place = unified(path)
    stat = dict(line.split() for line in read(place / "cpu.stat").splitlines())
    return Usage(
        cpu_seconds=int(stat["usage_usec"]) / 1e6,
        memory_bytes=_number(path, "memory", {2: "memory.current", 1: "memory.usage_in_bytes"}),
        processes=len(processes(path)),
        cpu_pressure=_pressure(place / "cpu.pressure"),
        memory_pressure=_pressure(place / "memory.pressure"),
        io_pressure=_pressure(place / "io.pressure"),
    )


def _number(path: str, controller: str, files: Mapping[int, str]) -> int:
    try:
        file = directory(path, controller) / files[version(controller)]
    except HostError:
        return 0
    return int(read(file)) if file.exists() else 0


def _pressure(file: Path) -> float | None:
    """``avg10`` of the ``some`` line; reading fails with EOPNOTSUPP when pressure is off (psi=0)."""
    try:
        line = file.read_text().splitlines()[0]
    except OSError:
        return None
    return float(line.split()[1].partition("=")[2])
