"""BPF object files, as clang writes them: programs, maps and constants, ready to be relocated and loaded.

What is understood: programs in sections of their own, functions in .text, maps declared in .maps by BTF, and
constants in .rodata. Refused by name: writable globals, map-in-map declarations, symbols that another file
defines, and callbacks, for which the kernel wants types. CO-RE records are not read, since packet programs use
none of the kernel's own types.
Layouts: elf(5), linux/btf.h, and "BPF relocations" in the kernel's documentation.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from netslot.errors import UsageError

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_REL = struct.Struct("<QQ")
_EM_BPF = 247
_SHT_SYMTAB, _SHT_REL = 2, 9
_SHF_EXECINSTR = 4
_STT_OBJECT, _STT_FUNC, _STT_SECTION = 1, 2, 3
_SHN_UNDEF = 0

_MAP_DEF = struct.Struct("<IIIII")  # struct bpf_map_def: type, key size, value size, entries, flags
_EXT = struct.Struct("<HBBIIIIIII")  # struct btf_ext_header; the last is the length of CO-RE relocations
_EXT_EMPTY = 4  # the size of a record, and no record

_LD_IMM64 = 0x18
_CALL = 0x85
_PSEUDO_MAP_FD = 1
_PSEUDO_MAP_VALUE = 2
_PSEUDO_CALL = 1

_BTF_MAGIC = 0xEB9F
_BTF_INT, _BTF_PTR, _BTF_ARRAY, _BTF_STRUCT, _BTF_UNION, _BTF_ENUM = 1, 2, 3, 4, 5, 6
_BTF_TYPEDEF, _BTF_VOLATILE, _BTF_CONST, _BTF_RESTRICT = 8, 9, 10, 11
_BTF_VAR, _BTF_DATASEC = 14, 15
# Bytes that follow the 12-byte type header: fixed, or per member.
_BTF_TAIL = {1: 4, 3: 12, 14: 4, 17: 4}
_BTF_PER_MEMBER = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


class MapSpec(NamedTuple):
    """A map as an object file declares it; sizes in bytes."""

    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class Relocation(NamedTuple):
    """Instruction ``at`` refers to map ``map``; ``offset`` is a place in its value for constants, else None."""

    at: int
    map: str
    offset: int | None


@dataclass(frozen=True, slots=True)
class Program:
    """A program with the functions it calls appended; relocations say where map descriptors go."""

    name: str
    section: str
    instructions: bytes
    relocations: tuple[Relocation, ...]

    def linked(self, maps: Mapping[str, int]) -> bytes:
        """The instructions with the descriptors of ``maps`` (by name) in their places."""
        code = bytearray(self.instructions)
        for where, name, offset in self.relocations:
            at = where * 8
            code[at + 1] = (code[at + 1] & 0x0F) | ((_PSEUDO_MAP_FD if offset is None else _PSEUDO_MAP_VALUE) << 4)
            struct.pack_into("<i", code, at + 4, maps[name])
            struct.pack_into("<i", code, at + 12, offset or 0)
        return bytes(code)


class Constant(NamedTuple):
    """A ``const volatile`` variable: its section, and its place in it in bytes."""

    section: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Object:
    """An object file taken apart. Constants are filled in by :meth:`data` before a load."""

    programs: Mapping[str, Program]
    maps: Mapping[str, MapSpec]
    sections: Mapping[str, bytes]
    """The constant data sections by name, as compiled."""
    constants: Mapping[str, Constant]
    license: str

    def data(self, section: str, values: Mapping[str, bytes]) -> bytes:
        """The content of a constant section with ``values`` put in; UsageError for one of another size."""
        content = bytearray(self.sections[section])
        for name, value in values.items():
            constant = self.constants[name]
            if constant.section != section:
                continue
            if len(value) != constant.size:
                raise UsageError(f"constant {name} is {constant.size} bytes wide, not {len(value)}")
            content[constant.offset : constant.offset + constant.size] = value
        return bytes(content)


class _Section(NamedTuple):
    name: str
    kind: int
    flags: int
    info: int
    content: bytes


class _Symbol(NamedTuple):
    name: str
    kind: int
    section: int
    value: int
    size: int


def parse(image: bytes, file: str) -> Object:
    """Take an object file apart. ``file`` names it in errors; UsageError when it cannot be loaded by netslot."""
    try:
        return _Parser(image, file).object()
    except (struct.error, IndexError, KeyError) as error:
        raise UsageError(f"{file}: not a complete BPF object file ({error})") from error


class _Parser:
    def __init__(self, image: bytes, file: str) -> None:
        self.file = file
        header = _EHDR.unpack_from(image)
        if header[0][:6] != b"\x7fELF\x02\x01" or header[2] != _EM_BPF:
            raise UsageError(
                f"{file}: not a little-endian BPF object file", hint="compile it with clang -O2 -g -target bpf -c"
            )
        self.sections = self._read_sections(image, header[6], header[12], header[13])
        self.symbols = self._read_symbols()

    @staticmethod
    def _read_sections(image: bytes, offset: int, count: int, names_at: int) -> list[_Section]:
        raw = [_SHDR.unpack_from(image, offset + i * _SHDR.size) for i in range(count)]
        names = image[raw[names_at][4] : raw[names_at][4] + raw[names_at][5]]
        nobits = 8
        return [
            _Section(
                _text(names, s[0]), s[1], s[2], s[7], bytes(s[5]) if s[1] == nobits else image[s[4] : s[4] + s[5]]
            )
            for s in raw
        ]

    def _read_symbols(self) -> list[_Symbol]:
        names = next(s.content for s in self.sections if s.name == ".strtab")
        table = next(s.content for s in self.sections if s.kind == _SHT_SYMTAB)
        return [
            _Symbol(_text(names, name), info & 0xF, section, value, size)
            for name, info, _, section, value, size in _SYM.iter_unpack(table)
        ]

    def object(self) -> Object:
        by_name = {s.name: s for s in self.sections}
        data = {s.name: s.content for s in self.sections if s.name.startswith(".rodata") and s.kind != _SHT_REL}
        indexes = {index: s.name for index, s in enumerate(self.sections)}
        self._refuse(by_name, indexes)
        constants = {
            s.name: Constant(indexes[s.section], s.value, s.size)
            for s in self.symbols
            if indexes.get(s.section) in data and s.name and s.kind != _STT_SECTION
        }
        maps = _Btf(by_name[".BTF"].content, self.file).maps() if ".BTF" in by_name else {}
        maps |= self._plain_maps(indexes)
        license = by_name["license"].content.rstrip(b"\0").decode() if "license" in by_name else ""
        return Object(self._programs(), maps, data, constants, license)

    def _refuse(self, by_name: Mapping[str, _Section], indexes: Mapping[int, str]) -> None:
        for name in (".data", ".bss"):
            if name in by_name and by_name[name].content:
                variables = [s.name for s in self.symbols if indexes.get(s.section) == name and s.kind == _STT_OBJECT]
                raise UsageError(
                    f"{self.file}: writable global variables ({', '.join(variables) or name}) are not supported",
                    hint="keep state in a map, and the slot's values in const volatile variables",
                )
        if ".maps" in by_name and ".BTF" not in by_name:
            declared = ", ".join(s.name for s in self.symbols if indexes.get(s.section) == ".maps" and s.name)
            raise UsageError(
                f"{self.file}: no types (.BTF) to tell what the maps {declared} are", hint="compile it with -g"
            )
        length = _EXT.unpack_from(by_name[".BTF.ext"].content)[-1] if ".BTF.ext" in by_name else 0
        if length > _EXT_EMPTY:
            raise UsageError(
                f"{self.file}: uses the kernel's own types (CO-RE relocations), which is not supported",
                hint="packet programs need none: read the packet, and keep state in maps",
            )

    def _plain_maps(self, indexes: Mapping[int, str]) -> dict[str, MapSpec]:
        """Maps declared in the older way: struct bpf_map_def in a section called maps."""
        found: dict[str, MapSpec] = {}
        for symbol in self.symbols:
            if indexes.get(symbol.section) != "maps" or symbol.kind == _STT_SECTION:
                continue
            content = self.sections[symbol.section].content
            if symbol.size < _MAP_DEF.size or any(content[symbol.value + _MAP_DEF.size : symbol.value + symbol.size]):
                raise UsageError(f"{self.file}: map {symbol.name}: only type, sizes and flags are supported")
            found[symbol.name] = MapSpec(*_MAP_DEF.unpack_from(content, symbol.value))
        return found

    def _programs(self) -> dict[str, Program]:
        relocations = {s.info: s.content for s in self.sections if s.kind == _SHT_REL}
        text_index = next((i for i, s in enumerate(self.sections) if s.name == ".text"), -1)
        programs: dict[str, Program] = {}
        for symbol in self.symbols:
            if symbol.kind != _STT_FUNC or symbol.section in (_SHN_UNDEF, text_index):
                continue
            section = self.sections[symbol.section]
            if not section.flags & _SHF_EXECINSTR:
                continue
            code = bytearray(section.content[symbol.value : symbol.value + symbol.size])
            table = relocations.get(symbol.section, b"")
            found, calls = self._relocate(table, symbol.value, len(code), 0)
            found += self._link(code, calls, text_index, relocations.get(text_index, b""))
            programs[symbol.name] = Program(symbol.name, section.name, bytes(code), tuple(found))
        return programs

    def _link(self, code: bytearray, calls: list[tuple[int, int]], text: int, table: bytes) -> list[Relocation]:
        """Append the functions of .text that are called, and point the calls at them; gives their map references.

        Only those: the verifier refuses a function that nobody calls.
        """
        sizes = {s.value: s.size for s in self.symbols if s.kind == _STT_FUNC and s.section == text}
        found: list[Relocation] = []
        placed: dict[int, int] = {}
        todo = list(calls)
        while todo:
            at, start = todo.pop()
            if code[at] != _CALL:
                raise UsageError(f"{self.file}: a function's address (a callback) is not supported")
            if start < 0:  # the symbol is the section, and the instruction says where in it
                start = (struct.unpack_from("<i", code, at + 4)[0] + 1) * 8
            if start not in placed:
                if start not in sizes:
                    raise UsageError(f"{self.file}: a call to what is no function, at {start} of .text")
                placed[start] = len(code)
                code += self.sections[text].content[start : start + sizes[start]]
                more, inner = self._relocate(table, start, sizes[start], placed[start])
                found += more
                todo += inner + _near_calls(code, start, placed[start], {place for place, _ in inner})
            code[at + 1] = (code[at + 1] & 0x0F) | (_PSEUDO_CALL << 4)
            struct.pack_into("<i", code, at + 4, (placed[start] - at) // 8 - 1)
        return found

    def _relocate(
        self, table: bytes, start: int, length: int, base: int
    ) -> tuple[list[Relocation], list[tuple[int, int]]]:
        """Map references, and calls as (place in bytes, target in .text or -1 where the instruction holds it)."""
        found: list[Relocation] = []
        calls: list[tuple[int, int]] = []
        for offset, info in _REL.iter_unpack(table):
            if not start <= offset < start + length:
                continue
            at = offset - start + base
            symbol = self.symbols[info >> 32]
            section = self.sections[symbol.section] if symbol.section < len(self.sections) else None
            if symbol.section == _SHN_UNDEF or section is None:
                raise UsageError(f"{self.file}: {symbol.name} is defined in no section of this file")
            if section.name in (".maps", "maps"):
                found.append(Relocation(at // 8, symbol.name, None))
            elif section.name.startswith(".rodata"):
                found.append(Relocation(at // 8, section.name, symbol.value + self._addend(table, offset, info)))
            elif section.name == ".text":
                calls.append((at, -1 if symbol.kind == _STT_SECTION else symbol.value))
            else:
                what = symbol.name or "something"
                raise UsageError(f"{self.file}: a reference to {what} in section {section.name} is not supported")
        return found, calls

    def _addend(self, table: bytes, offset: int, info: int) -> int:
        """REL entries keep the addend in the instruction's own immediate."""
        owner = next(s.info for s in self.sections if s.kind == _SHT_REL and s.content == table)
        return int(struct.unpack_from("<i", self.sections[owner].content, offset + 4)[0])


def _near_calls(code: bytearray, start: int, place: int, known: set[int]) -> list[tuple[int, int]]:
    """Calls in a function of .text, put at ``place`` of ``code``, that the compiler has resolved itself."""
    return [
        (at, start + at - place + (struct.unpack_from("<i", code, at + 4)[0] + 1) * 8)
        for at in range(place, len(code), 8)
        if at not in known and code[at] == _CALL and code[at + 1] >> 4 == _PSEUDO_CALL
    ]


class _Btf:
    """The types of .BTF, as far as map declarations use them."""

    def __init__(self, content: bytes, file: str) -> None:
        self.file = file
        magic, _, _, header, types_at, types_size, names_at, names_size = struct.unpack_from("<HBBIIIII", content)
        if magic != _BTF_MAGIC:
            raise UsageError(f"{file}: the .BTF section is not little-endian BTF")
        self.names = content[header + names_at : header + names_at + names_size]
        self.types: list[tuple[int, int, int, int, bytes]] = [(0, 0, 0, 0, b"")]
        offset, end = header + types_at, header + types_at + types_size
        while offset < end:
            name, info, size = struct.unpack_from("<III", content, offset)
            kind, members = (info >> 24) & 0x1F, info & 0xFFFF
            tail = _BTF_TAIL.get(kind, 0) + _BTF_PER_MEMBER.get(kind, 0) * members
            self.types.append((kind, name, members, size, content[offset + 12 : offset + 12 + tail]))
            offset += 12 + tail

    def maps(self) -> dict[str, MapSpec]:
        found: dict[str, MapSpec] = {}
        for kind, name, _, _, tail in self.types:
            if kind != _BTF_DATASEC or _text(self.names, name) != ".maps":
                continue
            for variable, _, _ in struct.iter_unpack("<III", tail):
                _, variable_name, _, target, _ = self.types[variable]
                text = _text(self.names, variable_name)
                found[text] = self._map(self._plain(target), text)
        return found

    def _map(self, struct_type: int, name: str) -> MapSpec:
        fields = {"type": 0, "key_size": 0, "value_size": 0, "max_entries": 0, "map_flags": 0}
        for member, kind, _ in struct.iter_unpack("<III", self.types[struct_type][4]):
            text = _text(self.names, member)
            target = self.types[self._plain(kind)][3]
            if text in ("key", "value"):
                fields[f"{text}_size"] = self._size(target)
            elif text in fields:
                fields[text] = self._elements(target)
            else:
                raise UsageError(f"{self.file}: map {name}: attribute {text!r} is not supported")
        return MapSpec(*fields.values())

    def _plain(self, index: int) -> int:
        while self.types[index][0] in (_BTF_TYPEDEF, _BTF_VOLATILE, _BTF_CONST, _BTF_RESTRICT):
            index = self.types[index][3]
        return index

    def _elements(self, index: int) -> int:
        """libbpf's __uint(name, N) declares a pointer to an array of N."""
        return int(struct.unpack("<III", self.types[self._plain(index)][4])[2])

    def _size(self, index: int) -> int:
        kind, _, _, size, tail = self.types[self._plain(index)]
        if kind in (_BTF_INT, _BTF_STRUCT, _BTF_UNION, _BTF_ENUM):
            return size
        if kind == _BTF_PTR:
            return 8
        if kind == _BTF_ARRAY:
            element, _, count = struct.unpack("<III", tail)
            return self._size(element) * int(count)
        raise UsageError(f"{self.file}: a map's key or value has a type of BTF kind {kind}, which is not supported")


def _text(names: bytes, offset: int) -> str:
    return names[offset : names.index(b"\0", offset)].decode()
