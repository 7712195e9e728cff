"""What this kernel can do, found out by doing it in a namespace that is thrown away.

An answer has three values. *No* is only said where the kernel's own refusal means that it lacks the feature; a
refusal for want of permission, or of any other kind, leaves the answer unknown.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from netslot.errors import HostError, KernelError
from netslot.kernel import bpf, cgroupfs, conntrack, ipset, netns, nf_tables, rtnetlink, tc, tun, xtables
from netslot.kernel.netlink import NETLINK_NETFILTER, Socket
from netslot.kernel.netns import Worker

CAPABILITIES: Final = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21, "CAP_BPF": 39}
"""Numbers of linux/capability.h that netslot needs somewhere."""

_LACKS = frozenset(
    (
        errno.EOPNOTSUPP,
        errno.ENOENT,
        errno.ENOSYS,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOPROTOOPT,
        errno.EPROTONOSUPPORT,
        errno.EAFNOSUPPORT,
    )
)
_LOOPBACK = 1
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO, linux/proc_ns.h
_BPF_PROG_TYPE_SCHED_CLS = 3
_RETURN_ZERO = struct.pack("<Q", 0x00000000000000B7) + struct.pack("<Q", 0x0000000000000095)  # r0 = 0; exit


class Answer(enum.Enum):
    """Whether the kernel can do a thing."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Probed:
    """An answer, and the kernel's own words where it is not yes."""

    answer: Answer
    detail: str = ""


def features() -> dict[str, Probed]:
    """Try every feature that some spec can need; each in a namespace of its own that is gone afterwards."""
    if not capabilities() >= {"CAP_SYS_ADMIN", "CAP_NET_ADMIN"}:
        return dict.fromkeys(_PROBES, Probed(Answer.UNKNOWN, "trying it needs CAP_SYS_ADMIN and CAP_NET_ADMIN"))
    with Worker(name="netslot-probe") as worker:
        return {name: worker.run(_try, probe) for name, probe in _PROBES.items()}


def _try(probe: Callable[[], None]) -> Probed:
    try:
        with netns.fresh():
            probe()
    except KernelError as error:
        return Probed(Answer.NO if error.errno in _LACKS else Answer.UNKNOWN, str(error))
    except HostError as error:
        return Probed(Answer.NO, error.message)
    except OSError as error:
        return Probed(Answer.UNKNOWN, str(error))
    return Probed(Answer.YES)


def _namespace() -> None:
    """That the probe got here is the answer."""


def _veth() -> None:
    with Socket() as sock:
        sock.execute([rtnetlink.veth("probe0", "probe1")])


def _tap() -> None:
    tun.create_tap("probe0")


def _iptables() -> None:
    with xtables.open_socket(xtables.IPV4) as sock:
        xtables.get_info(sock, xtables.IPV4, "filter")


def _ip6tables() -> None:
    with xtables.open_socket(xtables.IPV6) as sock:
        xtables.get_info(sock, xtables.IPV6, "filter")


def _nftables() -> None:
    with nf_tables.Socket() as sock:
        sock.dump_bytes(nf_tables.GETTABLE, 0, b"", "list nftables tables")


def _ipset() -> None:
    with Socket(NETLINK_NETFILTER) as sock:
        ipset.execute(sock, [ipset.create("probe", socket.AF_INET, 8)])


def _conntrack() -> None:
    conntrack.count()


def _bpf() -> None:
    os.close(bpf.prog_load(_BPF_PROG_TYPE_SCHED_CLS, _RETURN_ZERO, "GPL", name="probe"))


def _clsact() -> None:
    with Socket() as sock:
        sock.execute([tc.add_clsact(_LOOPBACK)])


def _token_bucket() -> None:
    with Socket() as sock:
        sock.execute([tc.set_token_bucket(_LOOPBACK, 1_000_000, 100_000, 100_000)])


def _unified() -> None:
    cgroupfs.unified_root()


def _cgroup(controller: str) -> Callable[[], None]:
    def probe() -> None:
        cgroupfs.version(controller)

    return probe


_PROBES: Final[dict[str, Callable[[], None]]] = {
    "network namespaces": _namespace,
    "veth": _veth,
    "tap": _tap,
    "iptables-legacy": _iptables,
    "ip6tables-legacy": _ip6tables,
    "nf_tables": _nftables,
    "ipset": _ipset,
    "connection tracking": _conntrack,
    "bpf": _bpf,
    "tc clsact": _clsact,
    "tc tbf": _token_bucket,
    "cgroup v2": _unified,
    **{f"cgroup {controller}": _cgroup(controller) for controller in cgroupfs.CONTROLLERS},
}


def capabilities() -> frozenset[str]:
    """The effective ones of the calling thread, of those that netslot needs (proc_pid_status(5), CapEff)."""
    status = Path("/proc/thread-self/status").read_text(encoding="ascii")
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return frozenset(name for name, bit in CAPABILITIES.items() if mask >> bit & 1)


def in_initial_user_namespace() -> bool:
    """False in a user namespace of one's own, whose capabilities do not reach the machine's sysctls."""
    return os.stat("/proc/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE


def sysctl(name: str) -> int | None:
    """The number in ``/proc/sys/<name>``, as the calling thread's namespace sees it; None where there is none."""
    try:
        return int(Path("/proc/sys", name).read_text(encoding="ascii"))
    except (FileNotFoundError, PermissionError, ValueError):
        return None
