"""The shipped BPF objects and the loader that takes them apart; nothing is loaded."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import netslot
from netslot.errors import SpecError, UsageError
from netslot.kernel import bpf, elf
from netslot.policy.bpf_counters import GROUP
from netslot.spec.policies import quantity

OBJECTS = Path(netslot.__file__).parent / "bpf"


def load(name: str) -> elf.Object:
    return elf.parse((OBJECTS / f"{name}.o").read_bytes(), f"{name}.o")


def test_each_source_has_its_object_and_no_path_of_the_builder_in_it() -> None:
    assert {file.stem for file in OBJECTS.glob("*.c")} == {file.stem for file in OBJECTS.glob("*.o")}
    for file in OBJECTS.glob("*.o"):
        assert str(OBJECTS.parent).encode() not in file.read_bytes()
        assert b"/home" not in file.read_bytes()
        assert elf.parse(file.read_bytes(), file.name).license == "GPL"


def test_programs_maps_and_constants() -> None:
    nat = load("nat")
    assert set(nat.programs) == {"nat_egress", "nat_ingress"}
    assert nat.constants["guest4"].size == 4
    assert nat.constants["guest6"].size == 16
    assert load("filter").maps["table4"] == elf.MapSpec(bpf.MAP_TYPE_ARRAY, 4, 8, 1, 0)
    assert load("count").maps["counters"] == elf.MapSpec(bpf.MAP_TYPE_ARRAY, 4, 64, 2 * GROUP, 0)


def test_constants_and_descriptors_are_filled_in() -> None:
    nat = load("nat")
    data = nat.data(".rodata", {"guest4": b"\1\2\3\4"})
    place = nat.constants["guest4"]
    assert data[place.offset : place.offset + 4] == b"\1\2\3\4"
    with pytest.raises(UsageError, match="4 bytes wide, not 2"):
        nat.data(".rodata", {"guest4": b"\1\2"})
    program = load("count").programs["count"]
    code = program.linked({"counters": 77})
    where = program.relocations[0].at * 8
    assert code[where + 1] >> 4 == 1, "BPF_PSEUDO_MAP_FD"
    assert struct.unpack_from("=i", code, where + 4) == (77,)


def test_what_is_no_bpf_object_is_refused() -> None:
    for image in (b"", b"\x7fELF", Path("/bin/sh").read_bytes()):
        with pytest.raises(UsageError, match="BPF object file"):
            elf.parse(image, "file")
    whole = (OBJECTS / "nat.o").read_bytes()
    with pytest.raises(UsageError, match="complete"):
        elf.parse(whole[: len(whole) // 2], "half")


@pytest.mark.parametrize(("text", "number"), [("64k", 64_000), ("20M", 20_000_000), ("512Mi", 512 << 20), (7, 7)])
def test_quantities(text: str | int, number: int) -> None:
    assert quantity(text, key="x") == number


@pytest.mark.parametrize("text", ["", "M", "1.5M", "10X", "-1", -1, "1MM"])
def test_what_is_no_quantity_is_refused(text: str | int) -> None:
    with pytest.raises(SpecError, match="x: "):
        quantity(text, key="x")


HEAD = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
char gpl[] SEC("license") = "GPL";
"""
OLD_MAPS = """
struct bpf_map_def { unsigned type, key_size, value_size, max_entries, map_flags; };
struct bpf_map_def SEC("maps") seen = { BPF_MAP_TYPE_HASH, 4, 8, 16, 0 };
SEC("tc") int one(struct __sk_buff *skb) { __u32 key = 1; return bpf_map_lookup_elem(&seen, &key) ? 1 : 2; }
SEC("cgroup/connect4") int two(struct bpf_sock_addr *ctx) { __u32 key = 2; return !!bpf_map_lookup_elem(&seen,&key); }
"""
NEW_MAP = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1); __type(key, __u32); __type(value, __u32); %s }
held SEC(".maps");
SEC("tc") int one(struct __sk_buff *skb) { __u32 key = 1; return !!bpf_map_lookup_elem(&held, &key); }
"""


def compiled(directory: Path, text: str, *flags: str) -> elf.Object:
    if not shutil.which("clang"):
        pytest.skip("NOT CHECKED: clang is not here to compile with")
    (directory / "user.c").write_text(HEAD + text, encoding="utf-8")
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    command = ["clang", "-O2", *(flags or ("-g",)), "-target", "bpf", include, "-c", "user.c", "-o", "user.o"]
    subprocess.run(command, cwd=directory, check=True)
    return elf.parse((directory / "user.o").read_bytes(), "user.o")


def test_several_programs_and_maps_of_the_older_way(tmp_path: Path) -> None:
    found = compiled(tmp_path, OLD_MAPS)
    assert set(found.programs) == {"one", "two"}
    assert found.maps == {"seen": elf.MapSpec(bpf.MAP_TYPE_HASH, 4, 8, 16, 0)}
    assert all({r.map for r in program.relocations} == {"seen"} for program in found.programs.values())


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ('int count; SEC("tc") int one(void *c) { return count++; }', (), r"variables \(count\)"),
        ('int n = 7; SEC("tc") int one(void *c) { return n++; }', (), r"variables \(n\)"),
        ('int far(void *c); SEC("tc") int one(void *c) { return far(c); }', (), "user.o: far is defined in no"),
        (NEW_MAP % "", ("-g0",), "maps held are"),
        (NEW_MAP % "__uint(pinning, 1);", (), "map held: attribute 'pinning' is not supported"),
        (
            "struct other { int a; } __attribute__((preserve_access_index)); struct other *p;"
            ' SEC("tc") int one(struct other *c) { return c->a; }',
            (),
            r"CO-RE relocations|variables \(p\)",
        ),
        (
            "struct other { int a; } __attribute__((preserve_access_index));"
            ' SEC("tc") int one(struct other *c) { return c->a; }',
            (),
            "user.o: uses the kernel's own types",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named_with_file_and_symbol(
    tmp_path: Path, text: str, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        compiled(tmp_path, text, *flags)
    assert "user.o" in str(caught.value)
