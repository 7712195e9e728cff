"""Forwarding in the root namespace: switched on by ``up`` where slots need it, put back by ``down``.

IPv4 is switched for the uplink alone. IPv6 forwards only where ``net.ipv6.conf.all.forwarding`` says so.
Functions run on a worker thread that is in the root namespace.
"""

from __future__ import annotations

import errno
import json

from netslot.errors import KernelError, SpecError
from netslot.kernel.sysctl import Sysctls
from netslot.spec.model import HostSpec


def current(spec: HostSpec, known: str | None = None) -> str:
    """How forwarding is set now, for :func:`restore`; what ``known``, an earlier answer, says stands.

    SpecError when there is no uplink.
    """
    saved: dict[str, str] = json.loads(known or "{}")
    sysctls = Sysctls()
    try:
        for name in _names(spec):
            saved.setdefault(name, sysctls.read(name))
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        hint = "ip link shows them"
        raise SpecError(f"the root namespace has no link {spec.uplink!r}", key="uplink", hint=hint) from error
    finally:
        sysctls.close()
    return json.dumps(saved)


def enable(spec: HostSpec) -> None:
    """Let the uplink forward, and IPv6 as a whole where slots have it."""
    sysctls = Sysctls()
    try:
        for name in _names(spec):
            if sysctls.read(name) == "0":
                sysctls.write(name, "1")
    finally:
        sysctls.close()


def restore(saved: str | None) -> None:
    """Put back what :func:`current` found; a link that is gone is left alone."""
    sysctls = Sysctls()
    try:
        for name, value in json.loads(saved or "{}").items():
            try:
                if sysctls.read(name) != value:
                    sysctls.write(name, value)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
    finally:
        sysctls.close()


def _names(spec: HostSpec) -> list[str]:
    names = [f"net/ipv4/conf/{spec.uplink}/forwarding"]
    return names + (["net/ipv6/conf/all/forwarding"] if spec.ipv6 else [])
