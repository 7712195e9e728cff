"""A place to play a host: a child process in fresh network and mount namespaces, that leaves nothing behind.

Without privileges the child gets a user namespace as well. Pins, lock files and state below ``/run`` are on a
tmpfs of the child's own, so whatever way it ends, the kernel removes everything that it made.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys as python
import traceback
from collections.abc import Callable

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
    while True:
        try:
            _, status = os.waitpid(child, 0)
        except KeyboardInterrupt:
            continue  # the terminal interrupted the child too; its end is what we wait for
        return os.waitstatus_to_exitcode(status)


def _perform(act: Callable[[], int], parent: int) -> int:
    try:
        _die_with_parent(parent)
        set_up()
        return act()
    except NetslotError as error:
        print(f"netslot: {error}", file=python.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=python.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("netslot: interrupted", file=python.stderr)
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        python.stdout.flush()
        python.stderr.flush()


def _die_with_parent(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    sys.check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl PR_SET_PDEATHSIG")
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def set_up() -> None:
    """Move this process to fresh namespaces with an empty ``/run``. HostError when the kernel refuses."""
    flags = sys.CLONE_NEWNET | sys.CLONE_NEWNS
    mapped = needs_user_namespace()
    uid, gid = os.getuid(), os.getgid()
    try:
        sys.unshare(flags | sys.CLONE_NEWUSER if mapped else flags)
        if mapped:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {uid} 1")
            _write("/proc/self/gid_map", f"0 {gid} 1")
        sys.mount("none", "/", "", sys.MS_REC | sys.MS_PRIVATE)
        sys.mount("tmpfs", "/run", "tmpfs", sys.MS_NOSUID | sys.MS_NODEV, "mode=755")
    except (KernelError, OSError) as error:
        raise HostError(
            f"cannot make namespaces to play a host in: {error}",
            hint="run as root, or allow user namespaces (sysctl user.max_user_namespaces, "
            "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)",
        ) from error
    os.mkdir("/run/netns")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
