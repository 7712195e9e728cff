"""The shipped BPF objects and the loader that takes them apart; nothing is loaded."""

from __future__ import annotations

import struct
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
