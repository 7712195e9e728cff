"""What a slot's BPF programs are made of, and the built-in parts: NAT, egress filter, counters.

Where on the uplink a program runs is its priority. On the way out: counting, the filter, the user's programs,
NAT; on the way in: counting, NAT, the user's programs. So all but NAT see the guest's own address. On the link to
the workload there are the user's programs only.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from netslot.errors import KernelError, SpecError
from netslot.kernel import bpf, elf, netlink, rtnetlink, tc
from netslot.policy import addresses
from netslot.policy.base import Difference, Parameters, Values
from netslot.policy.tunnels import Arrival
from netslot.spec.cidrs import Packed, cidrs
from netslot.spec.policies import BpfFilter

_OBJECTS = Path(__file__).parent.parent / "bpf"
FIRST, _PARSE, _FILTER4, _FILTER6, USER_EGRESS = 1, 2, 3, 4, 10
NAT, USER_INGRESS, LAST = 20, 30, 60
CGROUP: Final = 0
"""The hook of a :class:`Place` that is none of tc's: the slot's cgroup."""
UPLINK: Final = "uplink_if"
GUEST: Final = "guest_if"
"""A slot's links, by the variables that name them."""

_MOST_OWN = 8  # OWN in nat.c

PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "dccp": 33, "gre": 47, "esp": 50, "icmpv6": 58, "sctp": 132}


class Place(NamedTuple):
    """Where a program is attached: a tc hook of one of the slot's links, and a priority."""

    hook: int
    priority: int
    link: str = UPLINK

    def __str__(self) -> str:
        return f"{'egress' if self.hook == tc.EGRESS else 'ingress'} {self.priority}"


class Attachment(NamedTuple):
    """A loaded program to attach; one that is ``owned`` is this slot's alone and closed afterwards."""

    place: Place
    name: str
    program: int
    owned: bool
    number: int = 0
    """For programs that ask for it: which slot's they are, see :func:`netslot.kernel.tc.set_filter`."""


class Identity(NamedTuple):
    """By what an attached program is known; ``tag`` is the kernel's digest of its instructions."""

    name: str
    tag: bytes
    number: int = 0


class Part(Protocol):
    """Programs of a die that belong together."""

    def load(self, values: Values, parameters: Parameters) -> list[Attachment]:
        """All programs for one slot, ready to attach."""

    def rebind(self, values: Values, parameters: Parameters) -> list[Attachment]:
        """The programs that must take their predecessors' places when ``parameters`` change."""

    def tags(self, values: Values) -> dict[Place, Identity]:
        """What each program should be."""

    def content(self, values: Values, parameters: Parameters, found: Mapping[Place, tc.Filter]) -> list[Difference]:
        """What the maps of the programs found hold otherwise than they should."""

    def close(self) -> None:
        """Give up the descriptors of what slots share; attached programs live on."""


def attached(sock: netlink.Socket, values: Values, links: Iterable[str]) -> dict[Place, tc.Filter]:
    """What is attached to those of a slot's links, of which one that is gone has nothing."""
    found: dict[Place, tc.Filter] = {}
    for link in links:
        try:
            index = rtnetlink.link_index(sock, values[link])
        except KernelError as error:
            if error.errno != errno.ENODEV:
                raise
            continue
        found |= {Place(each.hook, each.priority, link): each for each in tc.filters(sock, index)}
    return found


@functools.cache
def built_in(name: str) -> elf.Object:
    """A shipped object file, parsed once."""
    file = _OBJECTS / f"{name}.o"
    return elf.parse(file.read_bytes(), file.name)


def create_map(spec: elf.MapSpec, name: str, entries: int = 0) -> int:
    """A map as an object file declares it; ``entries`` overrides its size."""
    return bpf.map_create(
        spec.kind, spec.key_size, spec.value_size, entries or spec.max_entries, flags=spec.flags, name=name
    )


def constant_map(name: str, content: bytes) -> int:
    """A frozen map of constants: the verifier folds them into the program."""
    fd = bpf.map_create(bpf.MAP_TYPE_ARRAY, 4, len(content), 1, flags=bpf.F_RDONLY_PROG, name=name)
    try:
        bpf.map_update(fd, bytes(4), content)
        bpf.map_freeze(fd)
    except KernelError:
        os.close(fd)
        raise
    return fd


def load_program(source: elf.Object, name: str, maps: Mapping[str, int]) -> int:
    """Load a function of a built-in object for tc."""
    code = source.programs[name].linked(maps)
    return bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, code, source.license, name=f"ns_{name}")


def map_of(program: int, name: str) -> int:
    """A descriptor of the map called ``name`` that the program with id ``program`` uses; ENOENT without one."""
    fd = bpf.prog_by_id(program)
    try:
        ids = bpf.prog_info(fd).map_ids
    finally:
        os.close(fd)
    for number in ids:
        candidate = bpf.map_by_id(number)
        if bpf.map_info(candidate).name == name[:15]:
            return candidate
        os.close(candidate)
    raise KernelError(f"map {name} of BPF program {program}", 2)


def close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)


class Nat:
    """One-to-one NAT: two programs, the same in all slots; an attachment gives them the slot's number.

    From the number follows the slot's address, by the spec's plan of addresses; see
    docs/decisions/0050-bpf-one-program-many-slots.md.
    """

    def __init__(self, samples: Sequence[Values], own: Sequence[Arrival] = ()) -> None:
        """``own`` is what comes to the slot itself, not to the guest."""
        source = built_in("nat")
        first, last = samples[0], samples[-1]
        self._plan = _AddressPlan.of(first, last)
        for sample in samples:
            self._plan.check(sample)
        constants = self._plan.constants() | {
            "guest4": _packed(first["guest_address"], socket.AF_INET),
            "guest6": _packed(first.get("guest_address6", ""), socket.AF_INET6),
            "own": _own(own),
        }
        data = constant_map(".rodata", source.data(".rodata", constants))
        try:
            self._bodies = {
                Place(tc.EGRESS, NAT): load_program(source, "nat_egress", {".rodata": data}),
                Place(tc.INGRESS, NAT): load_program(source, "nat_ingress", {".rodata": data}),
            }
        finally:
            os.close(data)
        self._tags = {place: bpf.prog_info(fd).tag for place, fd in self._bodies.items()}

    def load(self, values: Values, parameters: Parameters) -> list[Attachment]:
        number = self._plan.check(values)
        if number > tc.LARGEST_NUMBER:
            hint = f'BPF NAT knows slots up to {tc.LARGEST_NUMBER}; use nat.kind = "nftables"'
            raise SpecError(f"slot {number} is beyond what a program can be told", key="nat.kind", hint=hint)
        return [Attachment(place, "netslot/nat", fd, False, number) for place, fd in self._bodies.items()]

    def rebind(self, values: Values, parameters: Parameters) -> list[Attachment]:
        return []

    def tags(self, values: Values) -> dict[Place, Identity]:
        number = int(values.get("slot", 0))
        return {place: Identity("netslot/nat", tag, number) for place, tag in self._tags.items()}

    def content(self, values: Values, parameters: Parameters, found: Mapping[Place, tc.Filter]) -> list[Difference]:
        return []

    def close(self) -> None:
        close_all(list(self._bodies.values()))
        self._bodies = {}


def _own(arrivals: Sequence[Arrival]) -> bytes:
    """The list of nat.c: protocol and port in a word each, a zero behind the last."""
    if len(arrivals) > _MOST_OWN:
        hint = 'tunnels of one kind and port count once; or use nat.kind = "nftables"'
        raise SpecError(
            f"tunnels of {len(arrivals)} kinds and ports are more than {_MOST_OWN}", key="nat.kind", hint=hint
        )
    return struct.pack(
        f"={_MOST_OWN}I", *(a.protocol << 16 | a.port for a in arrivals), *[0] * (_MOST_OWN - len(arrivals))
    )


@dataclass(frozen=True, slots=True)
class _AddressPlan:
    """Slot k has base + k x step: in IPv4, and in the two halves of an IPv6 address."""

    base: tuple[int, int, int]
    step: tuple[int, int, int]

    @classmethod
    def of(cls, first: Values, last: Values) -> _AddressPlan:
        """The plan that two slots' values lie on; a step of 0 when they are one slot."""
        start, end = int(first.get("slot", 0)), int(last.get("slot", 0))
        distance = (end - start) or 1
        pairs = list(zip(_numbers(first), _numbers(last), strict=True))
        step = [(b - a) // distance for a, b in pairs]
        base = [a - start * each for (a, _), each in zip(pairs, step, strict=True)]
        return cls((base[0], base[1], base[2]), (step[0], step[1], step[2]))

    def check(self, values: Values) -> int:
        """The slot's number; SpecError when its addresses are not what the plan says."""
        number = int(values.get("slot", 0))
        (base, upper, lower), (step, upper_step, lower_step) = self.base, self.step
        if (base + number * step, upper + number * upper_step, lower + number * lower_step) != _numbers(values):
            hint = 'BPF NAT needs addresses that follow from the slot\'s number; use nat.kind = "nftables"'
            raise SpecError(f"slot {number} has address {values['address']}, off the plan", key="nat.kind", hint=hint)
        return number

    def constants(self) -> dict[str, bytes]:
        names = (("base4", "=I"), ("base6_upper", "=Q"), ("base6_lower", "=Q"))
        found: dict[str, bytes] = {}
        for (name, form), base, step in zip(names, self.base, self.step, strict=True):
            mask = 0xFFFFFFFF if form == "=I" else 0xFFFFFFFFFFFFFFFF
            found[name] = struct.pack(form, base & mask)
            found[name.replace("base", "step")] = struct.pack(form, step & mask)
        return found


def _numbers(values: Values) -> tuple[int, int, int]:
    four = int.from_bytes(socket.inet_aton(values["address"]), "big")
    six = values.get("address6")
    return (four, *struct.unpack(">QQ", _packed(six, socket.AF_INET6))) if six else (four, 0, 0)


def _packed(text: str, family: int) -> bytes:
    """Packed; all zero for none, which no packet has as its source and no slot as its own."""
    return socket.inet_pton(family, text.partition("/")[0] or ("::" if family == socket.AF_INET6 else "0.0.0.0"))


class Filter:
    """The egress filter. Slots whose lists are the default ones share its programs; others have their own."""

    def __init__(self, section: BpfFilter, defaults: Parameters) -> None:
        if not isinstance(section.ports, str):
            try:
                services(section.ports)
            except SpecError as error:
                raise SpecError(error.message, key="bpf.filter.ports", hint=error.hint) from None
        self._section = section
        self._source = built_in("filter")
        self._given, self._defaults = defaults, self._lists(defaults)
        parse = built_in("parse")
        self._shared = [
            Attachment(Place(tc.EGRESS, _PARSE), "netslot/parse", load_program(parse, "parse_egress", {}), False)
        ]
        self._shared += [attachment._replace(owned=False) for attachment in self._programs(*self._defaults, (4, 6))]
        self._tags = {a.place: Identity(a.name, bpf.prog_info(a.program).tag) for a in self._shared}

    def load(self, values: Values, parameters: Parameters) -> list[Attachment]:
        return self._shared if parameters is self._given else [self._shared[0], *self.rebind(values, parameters)]

    def rebind(self, values: Values, parameters: Parameters) -> list[Attachment]:
        ports, lists = self._lists(parameters)
        old_ports, old = self._defaults
        changed = [v for v in (4, 6) if (lists[v], ports) != (old[v], old_ports)]
        same = [self._shared[1 if v == 4 else 2] for v in (4, 6) if v not in changed]
        return same + self._programs(ports, lists, changed)

    def tags(self, values: Values) -> dict[Place, Identity]:
        return self._tags

    def content(self, values: Values, parameters: Parameters, found: Mapping[Place, tc.Filter]) -> list[Difference]:
        listed, lists = self._lists(parameters)
        differences: list[Difference] = []
        for version, priority in ((4, _FILTER4), (6, _FILTER6)):
            attached = found.get(Place(tc.EGRESS, priority))
            if attached is None or not attached.program:
                continue
            where = f"bpf egress filter, IPv{version}"
            if _read_array(map_of(attached.program, f"ns_table{version}")) != self._table(lists[version], version):
                differences.append(Difference(where, "the list of prefixes is not the one that was bound"))
            ports = map_of(attached.program, "ns_ports")
            try:
                if {key for key, _ in bpf.map_items(ports, 4, 4)} != set(services(listed)):
                    differences.append(Difference(where, "the list of ports is not the one that was bound"))
            finally:
                os.close(ports)
        return differences

    def close(self) -> None:
        close_all([attachment.program for attachment in self._shared])
        self._shared = []

    def _lists(self, parameters: Parameters) -> tuple[Sequence[str], dict[int, dict[int, Packed]]]:
        """Ports, and prefixes by IP version and verdict."""
        section = self._section
        ports = parameters.get(section.ports, ()) if isinstance(section.ports, str) else section.ports
        lists: dict[int, dict[int, Packed]] = {4: {}, 6: {}}
        listed = addresses.PORTS if section.ports else addresses.ACCEPT
        for verdict, name in ((addresses.DROP, section.deny), (listed, section.allow)):
            for version, packed in cidrs(parameters.get(name, ())).packed.items() if name else ():
                lists[version][verdict] = packed
        return ports, lists

    def _table(self, lists: Mapping[int, Packed], version: int) -> bytes:
        default = addresses.ACCEPT if self._section.default == "accept" else addresses.DROP
        return addresses.table(lists, default, version)

    def _programs(
        self, listed: Sequence[str], lists: Mapping[int, Mapping[int, Packed]], versions: Sequence[int]
    ) -> list[Attachment]:
        attachments: list[Attachment] = []
        if not versions:
            return attachments
        maps = {"ports": self._port_map(listed)}
        try:
            for version in versions:
                name = f"table{version}"
                maps[name] = _filled_array(f"ns_{name}", self._table(lists[version], version))
                program = load_program(self._source, f"filter{version}", maps)
                place = Place(tc.EGRESS, _FILTER4 if version == 4 else _FILTER6)
                attachments.append(Attachment(place, "netslot/filter", program, True))
        except KernelError:
            close_all([attachment.program for attachment in attachments])
            raise
        finally:
            close_all(list(maps.values()))
        return attachments

    def _port_map(self, ports: Sequence[str]) -> int:
        keys = services(ports)
        fd = create_map(self._source.maps["ports"], "ns_ports", max(1, len(keys)))
        for key in keys:
            bpf.map_update(fd, key, bytes(4))
        return fd


def services(ports: Sequence[str]) -> list[bytes]:
    """Keys of the ports map: protocol, a zero, port in network order. Of ``tcp:8080:80`` the first port counts."""
    keys: list[bytes] = []
    for text in ports:
        protocol, _, rest = text.partition(":")
        port = rest.partition(":")[0]
        if protocol not in PROTOCOLS or not ((port.isdecimal() and int(port) < 1 << 16) or not port):
            raise SpecError(f"{text!r} is no protocol and port", hint="write tcp:443, udp:53 or icmp")
        keys.append(struct.pack(">BxH", PROTOCOLS[protocol], int(port or 0)))
    return keys


def _filled_array(name: str, content: bytes) -> int:
    """An array of 8-byte cells, written through a memory mapping: one call for a table of any size."""
    fd = bpf.map_create(bpf.MAP_TYPE_ARRAY, 4, 8, len(content) // 8, flags=bpf.F_MMAPABLE, name=name)
    try:
        with mmap.mmap(fd, -(-len(content) // mmap.PAGESIZE) * mmap.PAGESIZE) as memory:
            memory[: len(content)] = content
    except OSError:
        os.close(fd)
        raise
    return fd


def _read_array(fd: int) -> bytes:
    """What :func:`_filled_array` wrote; closes ``fd``."""
    try:
        size = bpf.map_info(fd).max_entries * 8
        with mmap.mmap(fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, prot=mmap.PROT_READ) as memory:
            return memory[:size]
    finally:
        os.close(fd)
