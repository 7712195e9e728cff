"""``net.*`` sysctls of the namespace that the calling thread is in."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from netslot.errors import KernelError
from netslot.kernel import sys

_USES = 64


class Sysctls:
    """Reads and writes sysctls through a procfs instance of its own, replaced after every 64 uses.

    In one procfs instance all namespaces' entries of one name share a hash chain of dentries, so that a look-up
    in a new namespace walks past those of all others (1.2 ms at 4,000 slots in /proc, 0.05 ms here).
    """

    def __init__(self) -> None:
        self._directory = -1
        self._uses = 0
        self._needed: dict[str, str] | None = None

    def insist(self, values: Mapping[str, str]) -> None:
        """Set those of ``values`` that new namespaces have otherwise, which is looked up in the first one only.

        A new namespace takes IPv4 settings over from the machine's own (devinet_init_net() in net/ipv4/devinet.c).
        """
        if self._needed is None:
            self._needed = {name: value for name, value in values.items() if self.read(name) != value}
        for name, value in self._needed.items():
            self.write(name, value)

    def write(self, name: str, value: str) -> None:
        """Set ``name``, a path below ``/proc/sys``. KernelError when it does not exist or is refused."""
        operation = f"set {name.replace('/', '.')} = {value}"
        fd = self._open(name, os.O_WRONLY, operation)
        try:
            os.write(fd, value.encode())
        except OSError as error:
            raise KernelError(operation, error.errno or errno.EIO) from error
        finally:
            os.close(fd)

    def read(self, name: str) -> str:
        """The value of ``name``, without the newline."""
        fd = self._open(name, os.O_RDONLY, f"read {name.replace('/', '.')}")
        try:
            return os.read(fd, 256).decode().rstrip("\n")
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def _open(self, name: str, flags: int, operation: str) -> int:
        if self._directory < 0 or self._uses >= _USES:
            self.close()
            self._directory, self._uses = sys.open_procfs(), 0
        self._uses += 1
        try:
            return os.open(f"sys/{name}", flags | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            raise KernelError(operation, error.errno or errno.EIO) from error
