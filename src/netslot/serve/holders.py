"""Leases that end with a process: a pidfd each, which the event loop watches (pidfd_open(2))."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from netslot.errors import UsageError
from netslot.host.ledger import LeaseRecord, identify


class Holders:
    """Watches processes; ``ended`` is called with the lease whose process has ended. For the event loop's thread."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        self._ended = ended
        self._fds: dict[str, int] = {}

    def watch(self, lease: str, pidfd: int) -> None:
        """End ``lease`` with the process of ``pidfd``, which belongs to this object now."""
        self.forget(lease)
        self._fds[lease] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._gone, lease)

    def adopt(self, record: LeaseRecord) -> None:
        """Watch the holder that the ledger names; it may have ended while no daemon ran."""
        pid = int(record.holder.partition(":")[0])
        try:
            pidfd, holder = open_holder(pid)
        except UsageError:
            self._ended(record.lease)
            return
        if holder != record.holder:  # another process has got the number
            os.close(pidfd)
            self._ended(record.lease)
            return
        self.watch(record.lease, pidfd)

    def forget(self, lease: str) -> None:
        """The lease has ended, or has another holder."""
        pidfd = self._fds.pop(lease, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    def close(self) -> None:
        for lease in list(self._fds):
            self.forget(lease)

    def _gone(self, lease: str) -> None:
        self.forget(lease)
        self._ended(lease)


def open_holder(pid: int) -> tuple[int, str]:
    """A pidfd of the process and its identity for the ledger. UsageError when there is none.

    The descriptor is opened first: while it is open, the number stays with the process until that is reaped.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise UsageError(f"there is no process {pid}: {error.strerror}") from error
    return pidfd, identify(pid)
