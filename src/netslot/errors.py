"""The errors that netslot raises. Every one carries what happened and, where there is one, what to do.

    NetslotError            exit 1   an operation failed
    ├── KernelError         exit 1   a system call or netlink request was refused (has .errno)
    ├── UsageError          exit 2   the caller asked for something that makes no sense
    │   └── SpecError       exit 2   a spec or rule file is wrong (has .file, .line, .key)
    ├── RefusedError        exit 3   the answer is no: drift, no free slot, not provable
    └── HostError           exit 4   the host lacks a capability, kernel feature or tool

This module imports nothing of netslot's, so that every room may use it.
"""

from __future__ import annotations

import os


class NetslotError(Exception):
    """Root of the tree. ``hint`` is one line that says what the reader can do about it."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class KernelError(NetslotError):
    """The kernel refused ``operation``; ``errno`` says why, ``detail`` is the kernel's own text if it gave one."""

    def __init__(self, operation: str, errno: int, *, detail: str | None = None, hint: str | None = None) -> None:
        text = detail or os.strerror(errno)
        super().__init__(f"{operation}: {text}", hint=hint)
        self.operation = operation
        self.errno = errno
        self.detail = detail


class UsageError(NetslotError):
    """The request itself is wrong: an unknown slot, an impossible option."""

    exit_status = 2


class SpecError(UsageError):
    """A spec file or rule file is wrong. ``line`` counts from 1."""

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
        hint: str | None = None,
    ) -> None:
        place = ":".join(str(part) for part in (file, line) if part is not None)
        parts = [part for part in (place, key) if part]
        super().__init__(": ".join([*parts, message]), hint=hint)
        self.file = file
        self.line = line
        self.key = key


class RefusedError(NetslotError):
    """The question was understood and the answer is no (drift found, no free slot, not provable)."""

    exit_status = 3


class HostError(NetslotError):
    """The host lacks something that is needed: a capability, a kernel feature, a tool."""

    exit_status = 4
