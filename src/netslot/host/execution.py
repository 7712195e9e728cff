"""Commands in a slot: as the caller, who may look around and mend, or as the tenant, who may change nothing there."""

from __future__ import annotations

import os
import subprocess
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from netslot.errors import HostError
from netslot.host.plan import SlotPlan
from netslot.kernel import cgroupfs, netns, sys

_TENANTS = 0x70000000
"""The first user id of tenants. No distribution gives out ids from here to 2^31 (systemd, docs/UIDS-GIDS.md)."""
_HOSTS, _SLOTS = 8, 20
"""Bits of an id that tell hosts of one machine apart, and slots of one host."""


def tenant_user(plan: SlotPlan) -> int:
    """The user that a slot's tenant runs as unless somebody says otherwise.

    Each slot has its own: a user's processes may trace and end each other, whatever namespace they are in.
    """
    host = zlib.crc32(plan.host_id.encode()) & ((1 << _HOSTS) - 1)
    return _TENANTS + (host << _SLOTS) + plan.number


def start(plan: SlotPlan, command: Sequence[str], tenant: tuple[int, int] | None) -> subprocess.Popen[bytes]:
    """Start ``command`` in the slot, or the workload's namespace behind a ``veth``, and in the slot's cgroup.

    With ``tenant``, a user and a group, it has no capability and can get none. HostError when the caller's user
    namespace does not know these ids.
    """
    if tenant is not None:
        _refuse_unknown(*tenant)
    cgroup = plan.values.get("cgroup")

    def begin() -> subprocess.Popen[bytes]:
        with ExitStack() as held:
            fd = netns.open_named(plan.inner_netns or plan.netns)
            held.callback(os.close, fd)
            join = held.enter_context(cgroupfs.entrance(cgroup, cgroupfs.CONTROLLERS)) if cgroup else None

            def step_in() -> None:
                # The child joins the cgroup before it runs anything, so nothing it starts is born outside.
                if join is not None:
                    join()
                if tenant is not None:
                    sys.become_powerless(*tenant)

            with netns.entered(fd):
                return subprocess.Popen(list(command), preexec_fn=step_in)  # noqa: PLW1509

    with netns.Worker() as worker:
        return worker.run(begin)


def _refuse_unknown(user: int, group: int) -> None:
    for what, number, file in (("user", user, "uid_map"), ("group", group, "gid_map")):
        maps = [[int(word) for word in line.split()] for line in Path(f"/proc/self/{file}").read_text().splitlines()]
        if not any(first <= number < first + count for first, _, count in maps):
            hint = "map it to the namespace, or name another with --user"
            raise HostError(f"there is no {what} {number} in this user namespace", hint=hint)
