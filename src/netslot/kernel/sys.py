"""The few system calls that Python 3.11 does not offer, one thin function each, all errors through one funnel."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from typing import Any

from netslot.errors import KernelError

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_FS = 0x00000200

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SHARED = 1 << 20
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same numbers on every architecture (asm-generic unistd.h)
_FSCONFIG_CMD_CREATE = 6
_FD_CLOEXEC = 1
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


def _bind(name: str, *argtypes: Any) -> Callable[..., int]:
    function = getattr(_libc, name)
    function.argtypes = argtypes
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    return function  # type: ignore[no-any-return]


_unshare = _bind("unshare", ctypes.c_int)
_setns = _bind("setns", ctypes.c_int, ctypes.c_int)
_mount = _bind("mount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_umount2 = _bind("umount2", ctypes.c_char_p, ctypes.c_int)
_prctl = _bind("prctl", ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_capset = _bind("capset", ctypes.c_char_p, ctypes.c_char_p)
_syscall = _bind("syscall")
_syscall.argtypes = None  # type: ignore[attr-defined]


def check(result: int, operation: str) -> int:
    """Return ``result`` of a libc call, or raise KernelError with errno when it is -1."""
    if result == -1:
        raise KernelError(operation, ctypes.get_errno())
    return result


def syscall(number: int, *arguments: Any) -> int:
    """Make a system call that libc has no function for; -1 when it failed, with errno kept for :func:`check`."""
    return _syscall(ctypes.c_long(number), *arguments)


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces; see unshare(2)."""
    check(_unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into the namespace that ``fd`` refers to; see setns(2)."""
    check(_setns(fd, kind), "setns")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """See mount(2). Empty strings stand for NULL."""
    check(
        _mount(
            os.fsencode(source) or None,
            os.fsencode(target),
            fstype.encode() or None,
            flags,
            data.encode() or None,
        ),
        f"mount {target}",
    )


def umount(target: str, flags: int = MNT_DETACH) -> None:
    """See umount2(2)."""
    check(_umount2(os.fsencode(target), flags), f"umount {target}")


def open_procfs() -> int:
    """Open a procfs instance of its own that is mounted nowhere; return a directory descriptor (O_PATH-like).

    Entries below ``sys/net`` resolve to the opener's network namespace. A fresh instance starts with an empty
    dentry cache: in the shared /proc, all namespaces' ``sys/net`` dentries of one name hang in one hash chain,
    and a look-up walks it. Since Linux 5.8 (fsopen(2), and one superblock per procfs mount).
    """
    context = check(_syscall(_FSOPEN, b"proc", _FD_CLOEXEC), "fsopen proc")
    try:
        check(_syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig proc")
        return check(_syscall(_FSMOUNT, context, _FD_CLOEXEC, MS_NOSUID | MS_NODEV | MS_NOEXEC), "fsmount proc")
    finally:
        os.close(context)


def become_powerless(user: int, group: int) -> None:
    """Make the calling process one of ``user`` and ``group`` (numeric), without any capability, never to get one.

    Neither set-user-ID programs nor file capabilities give it more than it has (PR_SET_NO_NEW_PRIVS), and its
    bounding set is empty, which matters to those who run as user 0. KernelError or OSError when that is refused.
    """
    for capability in range(_last_capability() + 1):
        check(_prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0), f"drop capability {capability}")
    check(_prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "clear ambient capabilities")
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    nothing = struct.pack("=6I", 0, 0, 0, 0, 0, 0)  # effective, permitted, inheritable, each in two words
    check(_capset(struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0), nothing), "drop all capabilities")
    check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "forgo new privileges")


def _last_capability() -> int:
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        return int(file.read())
