"""Limits of a machine that would bite at a spec's number of slots."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from netslot.host.finding import Finding
from netslot.kernel import netns
from netslot.kernel.probe import sysctl
from netslot.spec.model import HostSpec

KIB_PER_SLOT = 380
"""Kernel memory of a slot with veth, tap and about 30 rules, measured on Linux 6.18 (slab)."""

_SPARE_DESCRIPTORS = 512
_CONNECTIONS_PER_SLOT = 32  # below this, root's table is full before a tenant has opened a web page or two
_PROCESSES_PER_SLOT = 4  # a virtual machine monitor: a thread each for the API, the machine, one vCPU, and its jailer
_FRACTION_OF_MEMORY = 0.5


def check(spec: HostSpec) -> list[Finding]:
    """Every limit that the spec's slots meet or come near to, and how the others stand."""
    slots = spec.slots
    namespaces = sum(
        each.slots * (2 if each.attachment.kind == "veth" else 1) for each in spec.classes.values()
    )  # a container has one of its own, which netslot makes
    return [
        *_memory(slots),
        *_namespaces(namespaces),
        *_mounts(namespaces),
        *_descriptors(namespaces),
        *_connections(spec),
        *_neighbours(slots),
        *_processes(slots),
    ]


def _memory(slots: int) -> Iterator[Finding]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    need = slots * KIB_PER_SLOT
    what = f"memory: {slots} slots need about {need >> 10} MiB of {available >> 10} MiB available"
    why = f"a slot takes about {KIB_PER_SLOT} KiB of kernel memory that cannot be swapped out"
    if need > available:
        yield Finding(
            "error", what, why, f"slots = {int(available * _FRACTION_OF_MEMORY / KIB_PER_SLOT)}, or more memory"
        )
    elif need > available * _FRACTION_OF_MEMORY:
        yield Finding("warning", what, why + "; the workloads need the rest", "fewer slots, or more memory")
    else:
        yield Finding("info", what, why)


def _namespaces(count: int) -> Iterator[Finding]:
    limit = sysctl("user/max_net_namespaces")
    if limit is None:
        return
    present = len(netns.names())
    what = f"user.max_net_namespaces is {limit}; {count} are wanted, {present} are named already"
    why = "unshare fails with ENOSPC beyond it"
    if count + 1 > limit:
        yield Finding("error", what, why, f"sysctl -w user.max_net_namespaces={_rounded(2 * count)}")
    else:
        yield Finding("info", what, why)


def _mounts(count: int) -> Iterator[Finding]:
    limit = sysctl("fs/mount-max")
    if limit is None:
        return
    present = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").count("\n")
    what = f"fs.mount-max is {limit}; {count} mounts are wanted beside the {present} that there are"
    why = "a namespace's name is a mount"
    if count + present > limit:
        yield Finding("error", what, why, f"sysctl -w fs.mount-max={_rounded(2 * (count + present))}")
    else:
        yield Finding("info", what, why)


def _descriptors(count: int) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = count + _SPARE_DESCRIPTORS
    if hard == resource.RLIM_INFINITY:
        return
    what = f"this process may have {hard} files open; a daemon that keeps every slot at hand has {need}"
    why = "with fewer, opening a slot's namespace fails with EMFILE"
    if need > hard:
        yield Finding("warning", what, why, f"LimitNOFILE={_rounded(2 * need)} in netslot's unit, or ulimit -Hn")
    else:
        yield Finding("info", what, why)


def _connections(spec: HostSpec) -> Iterator[Finding]:
    limit = sysctl("net/netfilter/nf_conntrack_max")
    if limit is None:
        why = "connection tracking is not loaded, or this is not the machine's first network namespace"
        yield Finding("info", "net.netfilter.nf_conntrack_max cannot be seen", why)
        return
    if not spec.root.masquerade:
        yield Finding("info", f"net.netfilter.nf_conntrack_max is {limit}", "it holds for each namespace by itself")
        return
    each = limit // max(1, spec.slots)
    what = f"net.netfilter.nf_conntrack_max is {limit}: {each} connections for each of {spec.slots} slots"
    why = (
        "root tracks the connections of all slots where it masquerades; when its table is full, new ones are dropped"
    )
    if each < _CONNECTIONS_PER_SLOT:
        fix = f"sysctl -w net.netfilter.nf_conntrack_max={_rounded(spec.slots * 8 * _CONNECTIONS_PER_SLOT)}"
        yield Finding("warning", what, why, fix)
    else:
        yield Finding("info", what, why)


def _neighbours(slots: int) -> Iterator[Finding]:
    limit = sysctl("net/ipv4/neigh/default/gc_thresh3")
    if limit is None:
        yield Finding("info", "the neighbour table's limit cannot be seen", "it shows in the first namespace only")
        return
    what = f"net.ipv4.neigh.default.gc_thresh3 is {limit}, for all namespaces together"
    why = "netslot's entries are permanent and not counted; those of other programs on this machine are"
    fix = ""
    if limit < slots:
        why += "; whatever else makes neighbours in the slots meets it"
        fix = f"sysctl -w net.ipv4.neigh.default.gc_thresh3={_rounded(2 * slots)}"
    yield Finding("info", what, why, fix)


def _processes(slots: int) -> Iterator[Finding]:
    limits = {"kernel.pid_max": sysctl("kernel/pid_max"), "kernel.threads-max": sysctl("kernel/threads-max")}
    need = slots * _PROCESSES_PER_SLOT
    for name, limit in limits.items():
        if limit is None:
            continue
        what = f"{name} is {limit}"
        why = f"{slots} workloads with {_PROCESSES_PER_SLOT} threads each are {need}"
        if need > limit:
            yield Finding("warning", what, why, f"sysctl -w {name}={_rounded(2 * need)}")
        else:
            yield Finding("info", what, why)


def _rounded(number: int) -> int:
    """The power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()
