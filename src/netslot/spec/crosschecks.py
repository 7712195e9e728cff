"""What types cannot say of the other policies' sections: names that must be declared, keys that need another one.

A parameter that nobody declared would be an empty list: a filter without its deny list, and no word about it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final

from netslot.spec.model import UPLINK_INTERFACE, ClassSpec
from netslot.spec.policies import BpfFilter, BpfSection, CgroupSection, Rate, RatesSection, RoutesSection
from netslot.spec.problems import Problems
from netslot.spec.render import nearest, variables_in

_LOCAL_TABLE = 255
_DEVICE = re.compile(r"[0-9]+:[0-9]+")
_CGROUP = re.compile(r"[^\s/$]+(/[^\s/$]+)*")
_RESERVED_LINKS: Final = (UPLINK_INTERFACE, "lo")

Path = tuple[str, ...]


def check(problems: Problems, each: ClassSpec) -> None:
    """Note what the sections of one class say that cannot be meant."""
    noted = _Noted(problems, each)
    for path, name, kinds in _named(each):
        noted.parameter(path, name, kinds)
    if each.bpf is not None:
        _check_bpf(noted, each, each.bpf)
    if each.cgroup is not None:
        _check_cgroup(noted, each.cgroup)
    if each.routes is not None:
        _check_routes(noted, each.routes, (*_RESERVED_LINKS, each.guest_interface))
    if each.rates is not None:
        _check_rates(noted, each.rates)


def lists_of_policies(each: ClassSpec) -> frozenset[str]:
    """The list parameters that sections other than ``[rules]`` use: rules need not declare a set for them."""
    return frozenset(name for _, name, _ in _named(each))


def _named(each: ClassSpec) -> Iterator[tuple[Path, str, Collection[str]]]:
    """Where a section names a parameter, and which kinds it may be of; no kinds are any."""
    if each.bpf is not None:
        if each.bpf.filter is not None:
            yield from _named_by_filter(each.bpf.filter)
        for number, program in enumerate(each.bpf.programs):
            for name, parameter in program.maps.items():
                yield ("bpf", "programs", str(number), "maps", name), parameter, ()
    for number, route in enumerate(each.routes.routes if each.routes is not None else ()):
        if route.to.startswith("@"):
            yield ("routes", "routes", str(number), "to"), route.to[1:], ("cidrs",)


def _named_by_filter(section: BpfFilter) -> Iterator[tuple[Path, str, Collection[str]]]:
    for key, name in (("allow", section.allow), ("deny", section.deny)):
        if name:
            yield ("bpf", "filter", key), name, ("cidrs",)
    if isinstance(section.ports, str) and section.ports:
        yield ("bpf", "filter", "ports"), section.ports, ("ports",)


class _Noted:
    """Problems of one class's sections."""

    def __init__(self, problems: Problems, each: ClassSpec) -> None:
        self._problems = problems
        self._each = each

    def add(self, path: Path, message: str, hint: str | None = None) -> None:
        self._problems.add(("class", self._each.name, *path), message, hint=hint)

    def parameter(self, path: Path, name: str, kinds: Collection[str]) -> None:
        declared = self._each.parameters
        if name not in declared:
            close = nearest(name, list(declared))
            hint = f"did you mean {close!r}?" if close else f"declare it: [parameters.{name}]"
            self.add(path, f"there is no parameter {name!r}", hint)
        elif kinds and declared[name].kind not in kinds:
            self.add(path, f"parameter {name!r} is of type {declared[name].kind}, not {' or '.join(kinds)}")


def _check_bpf(noted: _Noted, each: ClassSpec, section: BpfSection) -> None:
    for number, program in enumerate(section.programs):
        where = ("bpf", "programs", str(number))
        for name, text in program.constants.items():
            for parameter in sorted(variables_in(str(text)) & each.parameters.keys()):
                message = f"a lease may change {parameter!r}, and constants are fixed when a slot is built"
                noted.add((*where, "constants", name), message, "give the program a map, which a parameter fills")
        if program.hook.startswith("cgroup/") and each.cgroup is None:
            noted.add((*where, "hook"), "slots have no cgroup to hang a program on", "add a section [cgroup]")
        if program.hook.startswith("guest/") and each.guest_interface is None:
            hint = "what the process sends and gets passes the uplink: egress, ingress"
            noted.add((*where, "hook"), "a process lives in its slot: there is no link to it", hint)
    if section.filter is not None and section.filter.ports and not section.filter.allow:
        noted.add(("bpf", "filter", "ports"), "limits what is on 'allow', and there is none", "add allow")


def _check_cgroup(noted: _Noted, section: CgroupSection) -> None:
    parent = section.parent
    if not _CGROUP.fullmatch(parent) or {".", ".."} & set(parent.split("/")):
        noted.add(("cgroup", "parent"), f"{parent!r} is no cgroup's path below the root", "such as netslot or a/b")
    for number, limit in enumerate(section.io):
        if not _DEVICE.fullmatch(limit.device) and "${" not in limit.device:
            hint = "its numbers, as lsblk shows them: 8:0"
            noted.add(("cgroup", "io", str(number), "device"), f"{limit.device!r} is no block device", hint)


def _check_routes(noted: _Noted, section: RoutesSection, taken: Collection[str | None]) -> None:
    seen: set[str | None] = set()
    for number, tunnel in enumerate(section.tunnels):
        if tunnel.name in taken:
            noted.add(("routes", "tunnels", str(number), "name"), f"{tunnel.name} is another link of the slot's")
        elif tunnel.name in seen:
            noted.add(("routes", "tunnels", str(number), "name"), f"two tunnels are called {tunnel.name}")
        seen.add(tunnel.name)
    for number, route in enumerate(section.routes):
        if route.table == _LOCAL_TABLE:
            noted.add(("routes", "routes", str(number), "table"), "255 is the kernel's own table of local addresses")
        if route.kind != "unicast" and (route.via or route.source):
            noted.add(("routes", "routes", str(number), "kind"), f"{route.kind} leads nowhere: no via and no source")
    for number, rule in enumerate(section.rules):
        if rule.ports and rule.protocol not in ("tcp", "udp"):
            hint = 'protocol = "tcp" or "udp"'
            noted.add(("routes", "rules", str(number), "ports"), "only TCP and UDP have ports", hint)


def _check_rates(noted: _Noted, section: RatesSection) -> None:
    directions: tuple[tuple[str, Rate], ...] = (("egress", section.egress), ("ingress", section.ingress))
    for name, rate in directions:
        for key, burst, limit in (
            ("burst", rate.burst, rate.bandwidth),
            ("packet_burst", rate.packet_burst, rate.packets),
        ):
            if burst is not None and limit is None:
                missing = "bandwidth" if key == "burst" else "packets"
                noted.add(("rates", name, key), f"is a burst above {missing}, and there is none", f"add {missing}")
    if section.new_connections_burst is not None and section.new_connections is None:
        message = "is a burst above new_connections, and there is none"
        noted.add(("rates", "new_connections_burst"), message, "add new_connections")
