"""A place to play a host: a child process in fresh network and mount namespaces, that leaves nothing behind.

Without privileges the child gets a user namespace as well. Pins, lock files and state below ``/run`` are on a
tmpfs of the child's own, and processes that it starts are in a PID namespace that ends with it: so whatever way
it ends, the kernel removes everything that it made.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys as python
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from netslot.errors import HostError, KernelError, NetslotError
from netslot.kernel import sys

_PR_SET_PDEATHSIG = 1
_CAP_SYS_ADMIN, _CAP_NET_ADMIN = 21, 12


def needs_user_namespace() -> bool:
    """True when this process may not make network namespaces by itself (capabilities(7))."""
    wanted = 1 << _CAP_SYS_ADMIN | 1 << _CAP_NET_ADMIN
    with open("/proc/self/status", encoding="ascii") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return effective & wanted != wanted


def play(act: Callable[[], int]) -> int:
    """Run ``act`` in a child on a stage of its own and return its exit status.

    ``act`` gets the fresh network namespace as its own, with the loopback link still down. It may fork and
    start threads. A NetslotError is printed and becomes its exit status; other errors print a traceback.
    Must be called before this process has started threads.
    """
    python.stdout.flush()
    python.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os._exit(_perform(act, parent))
    return os.waitstatus_to_exitcode(_wait(child))


def compute(act: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any] | None]:
    """As :func:`play`, for an ``act`` whose result the caller wants: the exit status, and the result if it is 0.

    The result comes back as JSON, so it should be made of what JSON has.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:

        def perform() -> int:
            json.dump(act(), file)
            file.flush()
            return 0

        status = play(perform)
        if status:
            return status, None
        file.seek(0)
        result: dict[str, Any] = json.load(file)
        return status, result


def _wait(child: int) -> int:
    """The wait status of ``child``. An interrupt meanwhile is raised when the child has ended, as it was told too."""
    interrupted = False
    while True:
        try:
            status = os.waitpid(child, 0)[1]
        except KeyboardInterrupt:
            interrupted = True
            continue
        if interrupted:
            raise KeyboardInterrupt
        return status


def _perform(act: Callable[[], int], parent: int) -> int:
    try:
        _die_with(parent)
        _unshare()
        # The PID namespace begins with the next child. A procfs of one's own can be mounted only from inside it.
        player = os.fork()
        if player:
            return os.waitstatus_to_exitcode(_wait(player))
        _die_with(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)
        _mount()
        return act()
    except NetslotError as error:
        print(f"netslot: {error}", file=python.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=python.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        python.stdout.flush()
        python.stderr.flush()


def _end(number: int, _: object) -> None:
    """Leave without clean-up: threads may be busy for long, and the kernel removes all there is."""
    os._exit(128 + number)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; a parent in another PID namespace shows as 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    sys.check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl PR_SET_PDEATHSIG")
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _unshare() -> None:
    flags = sys.CLONE_NEWNET | sys.CLONE_NEWNS | sys.CLONE_NEWPID
    mapped = needs_user_namespace()
    uid, gid = os.getuid(), os.getgid()
    with _explained():
        sys.unshare(flags | sys.CLONE_NEWUSER if mapped else flags)
        if mapped:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {uid} 1")
            _write("/proc/self/gid_map", f"0 {gid} 1")


def _mount() -> None:
    with _explained():
        sys.mount("none", "/", "", sys.MS_REC | sys.MS_PRIVATE)
        sys.mount("proc", "/proc", "proc", sys.MS_NOSUID | sys.MS_NODEV | sys.MS_NOEXEC)
        sys.mount("tmpfs", "/run", "tmpfs", sys.MS_NOSUID | sys.MS_NODEV, "mode=755")
    os.mkdir("/run/netns")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (KernelError, OSError) as error:
        raise HostError(
            f"cannot make namespaces to play a host in: {error}",
            hint="run as root, or allow user namespaces (sysctl user.max_user_namespaces, "
            "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)",
        ) from error


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
