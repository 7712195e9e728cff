"""The cgroup policy on this machine's hierarchies, below a directory of the test's own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netslot.errors import SpecError
from netslot.kernel import cgroupfs
from netslot.policy import cgroup as policy
from netslot.policy.cgroup import CgroupDie
from netslot.spec.policies import CgroupSection, IoLimit

PARENT = f"netslot-test-{os.getpid()}"
VALUES = {"cgroup": f"{PARENT}/slot1", "size": "64Mi", "most": "20"}
SECTION = CgroupSection(parent=PARENT, cpu=0.5, cpu_weight=50, memory="${size}", pids="${most}")


@pytest.fixture
def die() -> Iterator[CgroupDie]:
    made = policy.cast(SECTION, values=VALUES)
    made.stamp(VALUES)
    yield made
    made.remove(VALUES)
    cgroupfs.remove(PARENT, made.controllers)
    left = [place for place in cgroupfs.directories(PARENT, made.controllers) if place.exists()]
    assert not left


def inside(die: CgroupDie, command: str) -> subprocess.Popen[bytes]:
    """Start a command in the cgroup: it waits for a line until it has been moved there."""
    child = subprocess.Popen(["sh", "-c", f"read go; {command}"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    die.enter(VALUES, child.pid)
    child.stdin.write(b"\n")
    child.stdin.close()
    return child


def test_limits_are_written_read_back_and_bound(die: CgroupDie) -> None:
    assert die.read(VALUES, {}) == []
    other = VALUES | {"size": "32Mi", "most": "5"}
    assert [d.where.rpartition(" ")[2] for d in die.read(other, {})] == ["pids", "memory"]
    die.bind(other, {})
    assert die.read(other, {}) == []
    die.reset(VALUES)
    assert die.read(VALUES, {}) == []
    cgroupfs.freeze(VALUES["cgroup"], True)
    assert [str(d) for d in die.read(VALUES, {})] == [f"cgroup {VALUES['cgroup']}: is frozen, and nobody is in it"]
    die.remove(VALUES)
    assert "is missing" in str(die.read(VALUES, {})[0])


def test_the_number_of_processes_is_limited(die: CgroupDie) -> None:
    child = inside(die, "for i in $(seq 40); do sleep 30 & done 2>/dev/null; wait")
    deadline = time.monotonic() + 5
    while len(cgroupfs.processes(VALUES["cgroup"])) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(cgroupfs.processes(VALUES["cgroup"])) <= 20
    assert cgroupfs.usage(VALUES["cgroup"]).processes == len(cgroupfs.processes(VALUES["cgroup"]))
    cgroupfs.kill_and_wait(VALUES["cgroup"])
    assert cgroupfs.processes(VALUES["cgroup"]) == []
    child.wait()


def test_memory_is_limited(die: CgroupDie) -> None:
    child = inside(die, "exec python3 -c 'x = bytearray(200 << 20)'")
    assert child.wait() == -9, "the kernel ends what exceeds the limit"


def test_cpu_time_is_limited(die: CgroupDie) -> None:
    start = time.monotonic()
    child = inside(die, "while :; do :; done")
    time.sleep(1)
    used = cgroupfs.usage(VALUES["cgroup"]).cpu_seconds
    share = used / (time.monotonic() - start)
    cgroupfs.kill_and_wait(VALUES["cgroup"])
    child.wait()
    assert 0 < share < 0.75, "half a CPU"


def test_a_whole_tenant_is_frozen_and_killed_by_one_write(die: CgroupDie) -> None:
    path = VALUES["cgroup"]
    child = inside(die, "sleep 30 & sleep 30 & wait")
    while len(cgroupfs.processes(path)) < 3:
        time.sleep(0.01)
    cgroupfs.freeze(path, True)
    while not cgroupfs.frozen(path):
        time.sleep(0.01)
    die.reset(VALUES)
    assert not cgroupfs.populated(path)
    assert child.wait() == -9
    assert cgroupfs.usage(path).cpu_seconds < 0.001, "usage is counted from zero"


def test_limits_of_io_are_written_read_back_and_changed() -> None:
    device = next((file.read_text().strip() for file in sorted(Path("/sys/block").glob("*/dev"))), None)
    if device is None:
        pytest.skip("NOT CHECKED: this machine has no block device to limit")
    section = CgroupSection(parent=PARENT, io=(IoLimit(device, read_bytes="${rate}", write_operations=100),))
    values = VALUES | {"rate": "1000000"}
    made = policy.cast(section, values=values)
    made.stamp(values)
    try:
        assert made.read(values, {}) == []
        other = values | {"rate": "2000000"}
        assert len(made.read(other, {})) == 1
        made.bind(other, {})
        assert made.read(other, {}) == []
    finally:
        made.remove(values)
        cgroupfs.remove(PARENT, made.controllers)


def test_slowing_above_an_amount_of_memory_needs_version_2() -> None:
    section = CgroupSection(parent=PARENT, memory_high="32Mi")
    if cgroupfs.version("memory") == 1:
        with pytest.raises(SpecError, match="cgroup v1, which has this host's memory controller"):
            policy.cast(section, values=VALUES)
        return
    made = policy.cast(section, values=VALUES)
    made.stamp(VALUES)
    assert made.read(VALUES, {}) == []
    assert cgroupfs.read(cgroupfs.unified(VALUES["cgroup"]) / "memory.high") == str(32 << 20)
    made.remove(VALUES)
    cgroupfs.remove(PARENT, made.controllers)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (CgroupSection(cpu="much"), "no number of CPUs"),
        (CgroupSection(cpu=0.001), "below the kernel's least share"),
        (CgroupSection(cpu_weight=0), "no weight"),
        (CgroupSection(memory="64Q"), "no quantity"),
        (CgroupSection(memory=0), "0 bytes are less than a page"),
        (CgroupSection(pids="${mots}"), "no variable"),
        (CgroupSection(pids=1 << 23), "no number of processes up to 4194304"),
        (CgroupSection(cpu="inf"), "no number of CPUs"),
    ],
)
def test_what_makes_no_sense_is_refused(section: CgroupSection, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        policy.cast(section, values=VALUES)
