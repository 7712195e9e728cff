"""Programs out of object files of the user's, on the slot's uplink or its cgroup.

A program without maps, whose constants are the same in every slot, is loaded once. Any other has maps and
constants of the slot's own, and is loaded for each slot.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from netslot.errors import KernelError, SpecError
from netslot.kernel import bpf, cgroupfs, elf, netlink, rtnetlink, tc
from netslot.policy import bpf_parts
from netslot.policy.base import Difference, Parameters, Values
from netslot.policy.bpf_parts import Attachment, Identity, Place
from netslot.spec.policies import BpfProgram
from netslot.spec.render import render, variables_in


class _CgroupHook(NamedTuple):
    kind: int
    attach_type: int


CGROUP_HOOKS: Final[Mapping[str, _CgroupHook]] = {
    "cgroup/ingress": _CgroupHook(bpf.PROG_TYPE_CGROUP_SKB, 0),
    "cgroup/egress": _CgroupHook(bpf.PROG_TYPE_CGROUP_SKB, 1),
    "cgroup/sock_create": _CgroupHook(bpf.PROG_TYPE_CGROUP_SOCK, 2),
    "cgroup/connect4": _CgroupHook(bpf.PROG_TYPE_CGROUP_SOCK_ADDR, 10),
    "cgroup/connect6": _CgroupHook(bpf.PROG_TYPE_CGROUP_SOCK_ADDR, 11),
    "cgroup/sendmsg4": _CgroupHook(bpf.PROG_TYPE_CGROUP_SOCK_ADDR, 14),
    "cgroup/sendmsg6": _CgroupHook(bpf.PROG_TYPE_CGROUP_SOCK_ADDR, 15),
}
"""Attach points by their names in the spec; numbers of enum bpf_attach_type, linux/bpf.h."""


@dataclass(frozen=True, slots=True)
class _Source:
    """One ``[[bpf.programs]]`` entry with its object file taken apart."""

    section: BpfProgram
    object: elf.Object
    program: elf.Program

    def shared(self) -> bool:
        constants = (text for text in self.section.constants.values() if isinstance(text, str))
        return not self.object.maps and not any(variables_in(text) for text in constants)


def read(section: BpfProgram, directory: Path) -> _Source:
    """Check an entry against its object file; SpecError names what does not fit."""
    file = directory / section.object
    try:
        image = file.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read {file}: {error.strerror}", key="bpf.programs.object") from error
    source = elf.parse(image, str(file))
    for kind, wanted, known in (
        ("program", [section.program], source.programs),
        ("constant", list(section.constants), source.constants),
        ("map", list(section.maps), source.maps),
    ):
        for name in wanted:
            if name not in known:
                there = ", ".join(sorted(known)) or "none"
                raise SpecError(f"{file} has no {kind} {name}", key="bpf.programs", hint=f"it has: {there}")
    return _Source(section, source, source.programs[section.program])


def _constant(text: str | int, size: int, values: Values, name: str) -> bytes:
    """An address or MAC in network order, a number in the host's."""
    rendered = render(str(text), values, file="bpf.programs.constants")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_pton(family, rendered)
        except OSError:
            continue
    if rendered.count(":") == 5:
        return bytes.fromhex(rendered.replace(":", ""))
    try:
        return int(rendered, 0).to_bytes(size, "little", signed=rendered.startswith("-"))
    except (ValueError, OverflowError):
        raise SpecError(
            f"{rendered!r} does not fit constant {name} of {size} bytes", key="bpf.programs.constants"
        ) from None


class _Loaded(NamedTuple):
    program: int
    owned: bool


class UserPrograms:
    """All ``[[bpf.programs]]`` of a die; a :class:`bpf_parts.Part` for those on links, and more for cgroups."""

    def __init__(self, sections: Sequence[BpfProgram], directory: Path, values: Values, defaults: Parameters) -> None:
        self._sources = [read(section, directory) for section in sections]
        self._shared: dict[int, int] = {}
        self._tags: list[bytes] = []
        for index, source in enumerate(self._sources):
            program = self._load_one(source, values, defaults)
            self._tags.append(bpf.prog_info(program).tag)
            if source.shared():
                self._shared[index] = program
            else:
                os.close(program)

    def load(self, values: Values, parameters: Parameters) -> list[Attachment]:
        attachments: list[Attachment] = []
        try:
            for index, source in enumerate(self._sources):
                if source.section.hook not in CGROUP_HOOKS:
                    loaded = self._loaded(index, values, parameters)
                    place = self._place(index)
                    attachments.append(Attachment(place, self._name(source), loaded.program, loaded.owned))
        except KernelError:
            bpf_parts.close_all([attachment.program for attachment in attachments if attachment.owned])
            raise
        return attachments

    def rebind(self, values: Values, parameters: Parameters) -> list[Attachment]:
        """Nothing is replaced: the maps of the attached programs are updated, element by element."""
        with netlink.here() as sock:
            link = rtnetlink.link_index(sock, values["uplink_if"])
            found = {Place(f.hook, f.priority): f for f in tc.filters(sock, link)}
        for index, source in enumerate(self._sources):
            if source.section.maps:
                for name, fd, spec in self._maps_in_use(index, values, found):
                    try:
                        _update(fd, spec, _elements(spec, self._listed(source, name, values, parameters)))
                    finally:
                        os.close(fd)
        return []

    def tags(self, values: Values) -> dict[Place, Identity]:
        return {
            self._place(index): Identity(self._name(source), self._tags[index])
            for index, source in enumerate(self._sources)
            if source.section.hook not in CGROUP_HOOKS
        }

    def content(self, values: Values, parameters: Parameters, found: Mapping[Place, tc.Filter]) -> list[Difference]:
        differences: list[Difference] = []
        for index, source in enumerate(self._sources):
            try:
                maps = self._maps_in_use(index, values, found) if source.section.maps else []
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
                continue  # a missing program is reported as such
            for name, fd, spec in maps:
                try:
                    wanted = _elements(spec, self._listed(source, name, values, parameters))
                    if dict(bpf.map_items(fd, spec.key_size, spec.value_size)) != wanted:
                        what = f"map {name} does not hold what was bound"
                        differences.append(Difference(f"bpf {source.section.program}", what))
                finally:
                    os.close(fd)
        return differences + self._cgroup_differences(values)

    def close(self) -> None:
        bpf_parts.close_all(list(self._shared.values()))
        self._shared = {}

    def attach_cgroup(self, values: Values, parameters: Parameters) -> None:
        """Attach the programs for the slot's cgroup, each in the place of its predecessor if there is one."""
        for index, source in enumerate(self._sources):
            hook = CGROUP_HOOKS.get(source.section.hook)
            if hook is None:
                continue
            loaded = self._loaded(index, values, parameters)
            try:
                with cgroupfs.opened(cgroupfs.unified(values["cgroup"])) as target:
                    previous = self._attached(target, hook, source)
                    try:
                        bpf.prog_attach(target, loaded.program, hook.attach_type, replace=previous)
                    finally:
                        if previous:
                            os.close(previous)
            finally:
                if loaded.owned:
                    os.close(loaded.program)

    def _cgroup_differences(self, values: Values) -> list[Difference]:
        differences: list[Difference] = []
        for index, source in enumerate(self._sources):
            hook = CGROUP_HOOKS.get(source.section.hook)
            if hook is None:
                continue
            where = f"bpf {source.section.hook} of cgroup {values['cgroup']}"
            try:
                with cgroupfs.opened(cgroupfs.unified(values["cgroup"])) as target:
                    attached = self._attached(target, hook, source)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
                attached = 0
            if not attached:
                differences.append(Difference(where, f"program {source.section.program} is missing"))
                continue
            if bpf.prog_info(attached).tag != self._tags[index]:
                differences.append(Difference(where, f"program {source.section.program} is another one"))
            os.close(attached)
        return differences

    @staticmethod
    def _attached(target: int, hook: _CgroupHook, source: _Source) -> int:
        """A descriptor of the program of this name that is attached to the cgroup; 0 when none is."""
        for number in bpf.prog_query(target, hook.attach_type):
            fd = bpf.prog_by_id(number)
            if bpf.prog_info(fd).name == source.section.program[:15]:
                return fd
            os.close(fd)
        return 0

    @staticmethod
    def _name(source: _Source) -> str:
        return f"netslot/user/{source.section.program}"

    def _place(self, index: int) -> Place:
        if self._sources[index].section.hook == "egress":
            return Place(tc.EGRESS, bpf_parts.USER_EGRESS + index)
        return Place(tc.INGRESS, bpf_parts.USER_INGRESS + index)

    def _loaded(self, index: int, values: Values, parameters: Parameters) -> _Loaded:
        shared = self._shared.get(index)
        if shared is not None:
            return _Loaded(shared, False)
        return _Loaded(self._load_one(self._sources[index], values, parameters), True)

    def _load_one(self, source: _Source, values: Values, parameters: Parameters) -> int:
        section, hook = source.section, CGROUP_HOOKS.get(source.section.hook)
        maps: dict[str, int] = {}
        try:
            for name, content in source.object.sections.items():
                constants = {
                    key: _constant(text, source.object.constants[key].size, values, key)
                    for key, text in section.constants.items()
                    if source.object.constants[key].section == name
                }
                if content:
                    maps[name] = bpf_parts.constant_map(name, source.object.data(name, constants))
            for name, spec in source.object.maps.items():
                maps[name] = bpf_parts.create_map(spec, name)
                if name in section.maps:
                    _update(maps[name], spec, _elements(spec, self._listed(source, name, values, parameters)))
            return bpf.prog_load(
                hook.kind if hook else bpf.PROG_TYPE_SCHED_CLS,
                source.program.linked(maps),
                source.object.license,
                name=section.program,
                attach_type=hook.attach_type if hook else 0,
            )
        finally:
            bpf_parts.close_all(list(maps.values()))

    @staticmethod
    def _listed(source: _Source, name: str, values: Values, parameters: Parameters) -> Sequence[str]:
        """The content of the parameter that fills map ``name``: a list, or a scalar as a list of one."""
        parameter = source.section.maps[name]
        if parameter in parameters:
            return parameters[parameter]
        return (values[parameter],) if parameter in values else ()

    def _maps_in_use(
        self, index: int, values: Values, found: Mapping[Place, tc.Filter]
    ) -> list[tuple[str, int, elf.MapSpec]]:
        """The maps with a parameter, of the attached program: name, descriptor, shape."""
        source = self._sources[index]
        hook = CGROUP_HOOKS.get(source.section.hook)
        if hook is None:
            attached = found.get(self._place(index))
            number = attached.program if attached else 0
        else:
            with cgroupfs.opened(cgroupfs.unified(values["cgroup"])) as target:
                fd = self._attached(target, hook, source)
            number = bpf.prog_info(fd).id if fd else 0
            if fd:
                os.close(fd)
        if not number:
            raise KernelError(f"find program {source.section.program} of the slot", errno.ENOENT)
        return [(name, bpf_parts.map_of(number, name), source.object.maps[name]) for name in source.section.maps]


def _elements(spec: elf.MapSpec, listed: Sequence[str]) -> dict[bytes, bytes]:
    """What a map should hold: a number in an array, CIDRs in a trie, ports in a hash; values of ones."""
    if spec.kind == bpf.MAP_TYPE_ARRAY:
        number = int(listed[0]) if listed else 0
        first = struct.pack("=I", 0)
        rest = {struct.pack("=I", index): bytes(spec.value_size) for index in range(1, spec.max_entries)}
        return {first: number.to_bytes(spec.value_size, "little")} | rest
    one = (1).to_bytes(spec.value_size, "little")
    if spec.kind == bpf.MAP_TYPE_LPM_TRIE:
        family, size = (socket.AF_INET, 8) if spec.key_size == 8 else (socket.AF_INET6, 20)
        chosen = [text for text in listed if (":" in text) == (size == 20)]
        return {_prefix(text, family): one for text in chosen}
    return dict.fromkeys(bpf_parts.services(listed), one)


def _prefix(text: str, family: int) -> bytes:
    address, _, length = text.partition("/")
    packed = socket.inet_pton(family, address)
    return struct.pack("=I", int(length or len(packed) * 8)) + packed


def _update(fd: int, spec: elf.MapSpec, wanted: Mapping[bytes, bytes]) -> None:
    """Make a map hold ``wanted``: what is new first, then without what is not wanted any more."""
    present = dict(bpf.map_items(fd, spec.key_size, spec.value_size))
    for key, value in wanted.items():
        if present.get(key) != value:
            bpf.map_update(fd, key, value)
    if spec.kind != bpf.MAP_TYPE_ARRAY:
        for key in present.keys() - wanted.keys():
            bpf.map_delete(fd, key)
