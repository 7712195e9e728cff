"""``net.*`` sysctls of the namespace that the calling thread is in."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Final

from netslot.errors import KernelError
from netslot.kernel import sys

_USES = 64

IPV6_CONF: Final[Mapping[int, str]] = {
    0: "forwarding",
    1: "hop_limit",
    2: "mtu",
    3: "accept_ra",
    4: "accept_redirects",
    5: "autoconf",
    6: "dad_transmits",
    7: "router_solicitations",
    10: "use_tempaddr",
    11: "temp_valid_lft",
    12: "temp_prefered_lft",
    13: "regen_max_retry",
    14: "max_desync_factor",
    15: "max_addresses",
    16: "force_mld_version",
    17: "accept_ra_defrtr",
    18: "accept_ra_pinfo",
    22: "proxy_ndp",
    23: "optimistic_dad",
    24: "accept_source_route",
    26: "disable_ipv6",
    27: "accept_dad",
    28: "force_tllao",
    29: "ndisc_notify",
    32: "suppress_frag_ndisc",
    33: "accept_ra_from_local",
    34: "use_optimistic",
    35: "accept_ra_mtu",
    37: "use_oif_addrs_only",
    38: "accept_ra_min_hop_limit",
    39: "ignore_routes_with_linkdown",
    40: "drop_unicast_in_l2_multicast",
    41: "drop_unsolicited_na",
    42: "keep_addr_on_down",
    44: "seg6_enabled",
    46: "enhanced_dad",
    47: "addr_gen_mode",
    48: "disable_policy",
    50: "ndisc_tclass",
    53: "ioam6_enabled",
    56: "ndisc_evict_nocarrier",
    57: "accept_untracked_na",
}
"""Names below net.ipv6.conf.LINK by number in the array that a link's dump holds (DEVCONF_*, linux/ipv6.h): those
that are in it as they are written, and that every build of the kernel has or that are 0 where it has not."""


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
