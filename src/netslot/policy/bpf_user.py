"""Programs out of object files of the user's, on the slot's links or its cgroup.

A program without maps, whose constants are the same in every slot, is loaded once. Any other has maps and
constants of the slot's own, and is loaded for each slot; its maps it shares with the others of its file there, as
programs do that libbpf loads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from netslot.errors import KernelError, NetslotError, SpecError, UsageError
from netslot.kernel import bpf, cgroupfs, elf, netlink, tc
from netslot.policy import bpf_maps, bpf_parts
from netslot.policy.base import Difference, Parameters, Values
from netslot.policy.bpf_parts import Attachment, Identity, Place
from netslot.spec.policies import BpfProgram
from netslot.spec.render import render, variables_in

_ON_LINKS: Final[Mapping[str, tuple[Place, int]]] = {
    "egress": (Place(tc.EGRESS, bpf_parts.USER_EGRESS), bpf_parts.NAT),
    "ingress": (Place(tc.INGRESS, bpf_parts.USER_INGRESS), bpf_parts.LAST),
    "guest/egress": (Place(tc.EGRESS, bpf_parts.USER_INGRESS, bpf_parts.GUEST), bpf_parts.LAST),
    "guest/ingress": (Place(tc.INGRESS, bpf_parts.USER_INGRESS, bpf_parts.GUEST), bpf_parts.LAST),
}
"""The place of the first of users' programs, and the first priority that is not theirs any more."""
_REFUSED = (errno.EACCES, errno.EINVAL, errno.E2BIG)
"""What the verifier says of a program that it does not like; other errors are the host's."""
_KEPT = 15
"""Bytes of a program's or map's name that the kernel keeps (BPF_OBJ_NAME_LEN)."""
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")


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


def links_of(sections: Sequence[BpfProgram]) -> set[str]:
    """The links that programs are on, by the variables that name them."""
    return {_ON_LINKS[each.hook][0].link for each in sections if each.hook in _ON_LINKS}


@dataclass(frozen=True, slots=True)
class _Source:
    """One ``[[bpf.programs]]`` entry with its object file taken apart."""

    section: BpfProgram
    object: elf.Object
    program: elf.Program
    key: str

    def data(self, values: Values) -> dict[str, bytes]:
        """The constant sections with one slot's values put in; SpecError for one that does not fit."""
        constants: dict[str, bytes] = {}
        for name, text in self.section.constants.items():
            try:
                constants[name] = _constant(text, self.object.constants[name].size, values)
            except ValueError as error:
                raise SpecError(str(error), key=f"{self.key}.constants.{name}") from None
        return {name: self.object.data(name, constants) for name, content in self.object.sections.items() if content}

    def uses(self, name: str) -> bool:
        """Whether the program refers to the map or section of this name."""
        return any(relocation.map == name for relocation in self.program.relocations)

    def shared(self) -> bool:
        constants = (text for text in self.section.constants.values() if isinstance(text, str))
        return not self.object.maps and not any(variables_in(text) for text in constants)


def read(section: BpfProgram, directory: Path, key: str = "bpf.programs") -> _Source:
    """Check an entry, which ``key`` names, against its object file; SpecError names what does not fit."""
    file = directory / section.object
    try:
        image = file.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read {file}: {error.strerror}", key=f"{key}.object") from error
    try:
        source = elf.parse(image, str(file))
    except UsageError as error:
        raise SpecError(error.message, key=f"{key}.object", hint=error.hint) from error
    for kind, place, wanted, known in (
        ("program", "program", [section.program], source.programs),
        ("constant", "constants", list(section.constants), source.constants),
        ("map", "maps", list(section.maps), source.maps),
    ):
        for name in wanted:
            if name not in known:
                there = ", ".join(sorted(known)) or "none"
                raise SpecError(f"{file} has no {kind} {name}", key=f"{key}.{place}", hint=f"it has: {there}")
    program = source.programs[section.program]
    if not _may_be_at(program.section, section.hook):
        what = f'{section.program} is written for another hook: SEC("{program.section}")'
        raise SpecError(what, key=f"{key}.hook")
    return _Source(section, source, program, key)


def _may_be_at(section: str, hook: str) -> bool:
    """Whether a program may be at a hook, by what its author called the section; other names say nothing."""
    written_for = section.replace("cgroup_skb/", "cgroup/")
    if written_for in CGROUP_HOOKS:
        return written_for == hook
    kind = written_for.partition("/")[0]
    return kind != "xdp" and not (hook in CGROUP_HOOKS and kind in ("tc", "tcx", "classifier"))


def _constant(text: str | int, size: int, values: Values) -> bytes:
    """An address or MAC in network order, a number in the host's; ValueError for what does not fit."""
    rendered = render(str(text), values, file="bpf.programs.constants")
    packed = _packed(rendered)
    if packed is None:
        try:
            return int(rendered, 0).to_bytes(size, sys.byteorder, signed=rendered.startswith("-"))
        except (ValueError, OverflowError):
            raise ValueError(f"{rendered!r} does not fit {size} bytes") from None
    if len(packed) != size:
        raise ValueError(f"{rendered!r} is {len(packed)} bytes wide, not {size}")
    return packed


def _packed(text: str) -> bytes | None:
    """The bytes of an IP or MAC address; None for a text that is none."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            return socket.inet_pton(family, text)
    return bytes.fromhex(text.replace(":", "")) if _MAC.fullmatch(text) else None


class UserPrograms:
    """All ``[[bpf.programs]]`` of a die; a :class:`bpf_parts.Part` for those on links, and more for cgroups."""

    def __init__(
        self,
        sections: Sequence[BpfProgram],
        directory: Path,
        values: Values,
        defaults: Parameters,
        kinds: Mapping[str, str] | None = None,
    ) -> None:
        """``kinds`` are those of all parameters, as the spec calls them; without it nothing is checked by them."""
        self._sources = [read(each, directory, f"bpf.programs.{n}") for n, each in enumerate(sections)]
        self._check_names()
        self._places = list(self._ordered())
        self._links = links_of(sections)
        self._shared: dict[int, int] = {}
        self._tags: list[bytes] = []
        for index, source in enumerate(self._sources):
            try:
                bpf_maps.check(source.section, source.object.maps, kinds, source.key)
                with self._maps(source, values, defaults) as maps:
                    program = self._load_one(source, values, maps)
            except KernelError as error:
                self.close()
                if error.errno not in _REFUSED:
                    raise
                what = f"the kernel refuses {source.section.program} of {source.section.object} for this hook"
                raise SpecError(f"{what}: {error.detail or error}", key=f"{source.key}.hook") from error
            except UsageError:
                self.close()
                raise
            self._tags.append(bpf.prog_info(program).tag)
            if source.shared():
                self._shared[index] = program
            else:
                os.close(program)

    def _check_names(self) -> None:
        """A cgroup's programs, and a program's maps, are found again by what the kernel keeps of their names."""
        seen: set[tuple[str, str]] = set()
        filled: dict[tuple[str, str], str] = {}
        for source in self._sources:
            hook, name = source.section.hook, source.section.program[:_KEPT]
            if hook in CGROUP_HOOKS and (hook, name) in seen:
                hint = f"the kernel keeps {_KEPT} bytes of a name"
                raise SpecError(f"two programs called {name} on {hook}", key=f"{source.key}.program", hint=hint)
            seen.add((hook, name))
            for map_name, parameter in source.section.maps.items():
                other = next((m for m in source.object.maps if m != map_name and m[:_KEPT] == map_name[:_KEPT]), "")
                what = ""
                if other:
                    what = f"maps {map_name} and {other} are one name to the kernel"
                elif not source.uses(map_name):
                    what = f"{source.section.program} does not use map {map_name}"
                elif filled.setdefault((source.section.object, map_name), parameter) != parameter:
                    what = f"map {map_name} is one for all programs of its file, and another parameter fills it"
                if what:
                    raise SpecError(what, key=f"{source.key}.maps.{map_name}")

    def _ordered(self) -> Iterator[Place]:
        """Where each program goes: those of one hook behind one another, in the spec's order."""
        counts = dict.fromkeys(_ON_LINKS, 0)
        for index, source in enumerate(self._sources):
            hook = source.section.hook
            if hook in CGROUP_HOOKS:
                yield Place(bpf_parts.CGROUP, index)
                continue
            first, end = _ON_LINKS[hook]
            if first.priority + counts[hook] == end:
                raise SpecError(f"more than {end - first.priority} programs on {hook}", key=f"{source.key}.hook")
            yield first._replace(priority=first.priority + counts[hook])
            counts[hook] += 1

    def load(self, values: Values, parameters: Parameters) -> list[Attachment]:
        """Programs of one object file share its maps, in each slot its own; those that need no maps, all slots."""
        attachments: list[Attachment] = []
        with contextlib.ExitStack() as stack:
            made: dict[str, Mapping[str, int]] = {}
            try:
                for place, source, shared in zip(self._places, self._sources, self._shared_or_none(), strict=True):
                    program = shared
                    if program is None:
                        file = source.section.object
                        if file not in made:
                            made[file] = stack.enter_context(self._maps(source, values, parameters))
                        program = self._load_one(source, values, made[file])
                    attachments.append(Attachment(place, self._name(source), program, shared is None))
            except NetslotError:
                bpf_parts.close_all([attachment.program for attachment in attachments if attachment.owned])
                raise
        return attachments

    def _shared_or_none(self) -> list[int | None]:
        return [self._shared.get(index) for index in range(len(self._sources))]

    def rebind(self, values: Values, parameters: Parameters) -> list[Attachment]:
        """Nothing is replaced: the maps of the attached programs are updated, element by element."""
        with netlink.here() as sock:
            found = bpf_parts.attached(sock, values, self._links)
        content = [
            self._content(source, values, parameters) for source in self._sources
        ]  # all, before any is changed
        for index, (source, bound) in enumerate(zip(self._sources, content, strict=True)):
            number = self._attached_id(index, values, found) if bound else 0
            if bound and not number:
                raise KernelError(f"find program {source.section.program} of the slot", errno.ENOENT)
            for name, wanted in bound.items():
                fd = bpf_parts.map_of(number, name)
                try:
                    bpf_maps.update(fd, source.object.maps[name], wanted)
                finally:
                    os.close(fd)
        return []

    def tags(self, values: Values) -> dict[Place, Identity]:
        return {
            place: Identity(self._name(source), tag)
            for place, source, tag in zip(self._places, self._sources, self._tags, strict=True)
            if place.hook != bpf_parts.CGROUP
        }

    def content(self, values: Values, parameters: Parameters, found: Mapping[Place, tc.Filter]) -> list[Difference]:
        differences: list[Difference] = []
        sharing: dict[tuple[str, str], int] = {}
        for index, source in enumerate(self._sources):
            number = self._attached_id(index, values, found)
            if not number:
                continue  # a missing program is reported as such
            where = f"bpf {source.section.program}"
            for name, data in source.data(values).items():
                if source.uses(name) and bpf_maps.items(number, name, 4, len(data)) != {bytes(4): data}:
                    differences.append(Difference(where, "works with other constants than the slot's"))
            for name, wanted in self._content(source, values, parameters).items():
                spec = source.object.maps[name]
                if bpf_maps.items(number, name, spec.key_size, spec.value_size) != wanted:
                    differences.append(Difference(where, f"map {name} does not hold what was bound"))
            for name, own in bpf_maps.ids(number).items():
                if name[0] != "." and sharing.setdefault((source.section.object, name), own) != own:
                    differences.append(Difference(where, f"map {name} is not that of the others of its file"))
        return differences + self._cgroup_differences(values)

    def close(self) -> None:
        bpf_parts.close_all(list(self._shared.values()))
        self._shared = {}

    def attach_cgroup(self, values: Values, attachments: Sequence[Attachment]) -> None:
        """Attach the programs for the slot's cgroup, each in the place of its predecessor if there is one."""
        for place, _, program, *_ in attachments:
            source = self._sources[place.priority]
            hook = CGROUP_HOOKS[source.section.hook]
            with cgroupfs.opened(cgroupfs.unified(values["cgroup"])) as target:
                previous = self._attached(target, hook, source)
                try:
                    bpf.prog_attach(target, program, hook.attach_type, replace=previous)
                finally:
                    if previous:
                        os.close(previous)

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
            if bpf.prog_info(fd).name == source.section.program[:_KEPT]:
                return fd
            os.close(fd)
        return 0

    @staticmethod
    def _name(source: _Source) -> str:
        return f"netslot/user/{source.section.program}"

    @contextlib.contextmanager
    def _maps(self, source: _Source, values: Values, parameters: Parameters) -> Iterator[dict[str, int]]:
        """Fresh maps of an object file, filled as all its programs say, open while the block lasts."""
        maps: dict[str, int] = {}
        try:
            bound: dict[str, dict[bytes, bytes]] = {}
            for other in self._sources:
                if other.section.object == source.section.object:
                    bound |= self._content(other, values, parameters)
            for name, spec in source.object.maps.items():
                maps[name] = bpf_parts.create_map(spec, name)
                if name in bound:
                    bpf_maps.update(maps[name], spec, bound[name])
            yield maps
        finally:
            bpf_parts.close_all(list(maps.values()))

    @staticmethod
    def _load_one(source: _Source, values: Values, maps: Mapping[str, int]) -> int:
        section, hook = source.section, CGROUP_HOOKS.get(source.section.hook)
        constants: dict[str, int] = {}
        try:
            for name, content in source.data(values).items():
                constants[name] = bpf_parts.constant_map(name, content)
            return bpf.prog_load(
                hook.kind if hook else bpf.PROG_TYPE_SCHED_CLS,
                source.program.linked({**maps, **constants}),
                source.object.license,
                name=section.program,
                attach_type=hook.attach_type if hook else 0,
            )
        finally:
            bpf_parts.close_all(list(constants.values()))

    @staticmethod
    def _content(source: _Source, values: Values, parameters: Parameters) -> dict[str, dict[bytes, bytes]]:
        """What each map with a parameter should hold; SpecError for what it cannot."""
        found: dict[str, dict[bytes, bytes]] = {}
        for name, parameter in source.section.maps.items():
            listed = parameters.get(parameter) or ((values[parameter],) if parameter in values else ())
            try:
                found[name] = bpf_maps.elements(source.object.maps[name], listed)
            except ValueError as error:
                what = f"parameter {parameter} does not fit map {name}: {error}"
                raise SpecError(what, key=f"{source.key}.maps.{name}") from None
        return found

    def _attached_id(self, index: int, values: Values, found: Mapping[Place, tc.Filter]) -> int:
        """The kernel's number of a program where it is attached; 0 where it is not, or another one of its name is."""
        source = self._sources[index]
        hook = CGROUP_HOOKS.get(source.section.hook)
        if hook is None:
            attached = found.get(self._places[index])
            return attached.program if attached else 0
        try:
            with cgroupfs.opened(cgroupfs.unified(values["cgroup"])) as target:
                fd = self._attached(target, hook, source)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            return 0
        if not fd:
            return 0
        info = bpf.prog_info(fd)
        os.close(fd)
        return info.id if info.tag == self._tags[index] else 0
