"""The benchmarks on small hosts: every shape with real rules and packets, the bare loop beside netslot's slots."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from netslot.bench import demo, provision, skew, slot_rules, stage
from netslot.bench.field import prepare_root
from netslot.bench.floor import PHASES, Floor
from netslot.bench.yard import Yard, host_spec, may_make_taps, plan_of
from netslot.host import expectation, links
from netslot.kernel import cgroupfs, netlink, netns
from netslot.spec.model import HostSpec

NETSLOT = str(Path(sys.executable).with_name("netslot"))


@pytest.fixture(scope="module", autouse=True)
def host_can_be_played() -> None:
    if stage.play(lambda: 0):
        pytest.skip("namespaces cannot be made here")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    links_here = {name for _, name in socket.if_nameindex()}
    assert not links_here & {"slot1", "bare1", "plain1", "script32001"}
    assert "outside" not in netns.names()


def played(plan: skew.Plan) -> dict[str, Any]:
    status, result = stage.compute(lambda: skew.measure_skew(plan))
    assert status == 0
    assert result is not None
    return result


def test_every_shape_is_measured_with_its_rules_in_force() -> None:
    result = played(skew.Plan(8, samples=10, rounds=2, add_times=1, positions=3))
    assert result["skipped"] == {}
    assert [shape["shape"] for shape in result["shapes"]] == list(skew.SHAPES)
    assert {"kernel", "cores", "hz", "tools"} <= result["machine"].keys()
    for shape in result["shapes"]:
        assert len(shape["positions"]) >= 2
        for position in shape["positions"]:
            assert 0 < position["p50_us"] <= position["p99_us"]
            assert 0 < position["udp_p50_us"] <= position["udp_p99_us"]
        if shape["shape"] not in ("none", "nat-only"):
            assert shape["add_tenant_us"] > 0
            assert shape["add_tenant_driver"]
    by_name = {shape["shape"]: shape for shape in result["shapes"]}
    assert by_name["root-iptables-legacy-flat"]["root_rules"] == 8 * 30 + 2


def test_slots_need_as_many_root_rules_at_any_number() -> None:
    def root_rules(slots: int) -> int:
        plan = skew.Plan(slots, ("slots-nftables",), samples=2, rounds=1, add_times=1)
        return int(played(plan)["shapes"][0]["root_rules"])

    assert root_rules(3) == root_rules(12) > 0


def test_a_shape_whose_rules_are_not_in_force_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netslot.bench.shapes.rivals.verdict_map", lambda tenants: "table ip verdicts {}\n")
    plan = skew.Plan(3, ("root-nft-verdict-map",), samples=2, rounds=1, add_times=1)
    status, result = stage.compute(lambda: skew.measure_skew(plan))
    assert status == 1
    assert result is None


def test_the_number_of_tables_ends_where_the_kernel_says() -> None:
    from netslot.bench import shapes

    def load() -> dict[str, Any]:
        shape = shapes.load_tables(1030)
        return {"tenants": shape.tenants, "note": shape.note}

    _, result = stage.compute(load)
    assert result is not None
    assert 1000 < result["tenants"] < 1024
    assert "refuses" in result["note"]


@pytest.mark.skipif(not may_make_taps(), reason="/dev/net/tun cannot be used")
def test_the_bare_loop_makes_what_netslot_makes() -> None:
    def compare() -> int:
        with netns.Worker() as worker:
            return worker.run(_compare)

    assert stage.play(compare) == 0


def _compare() -> int:
    prepare_root()
    spec = host_spec(4)
    die = slot_rules.cast_backend("iptables-legacy")
    yard, floor = Yard(4), Floor()
    yard.build(1, die)
    floor.build(floor.prepare([plan_of(spec, 2)], die)[0])
    with netlink.Socket() as sock:
        roots = links.read_root(sock)
    ours, bare = plan_of(spec, 1), plan_of(spec, 2)
    expected = expectation.Expectation(ours, _state(spec, 1), roots[ours.root_if])
    found = list(expectation.differences(expected.slot(bare), _state(spec, 2)))
    found += expectation.differences(expected.root(bare), roots[bare.root_if])
    inside = netns.open_named(bare.netns)
    with netns.entered(inside):
        found += [(one.where, one.what) for one in die.read(bare.values, {})]
    print(found)
    assert all(floor.seconds[phase] > 0 for phase in PHASES)
    return 1 if found else 0


def _state(spec: HostSpec, number: int) -> links.State:
    inside = netns.open_named(spec.name(number))
    try:
        with netns.entered(inside), netlink.Socket() as sock:
            return links.read(plan_of(spec, number), sock)
    finally:
        os.close(inside)


@pytest.mark.skipif(not may_make_taps(), reason="/dev/net/tun cannot be used")
def test_every_method_of_provisioning() -> None:
    plan = provision.Plan(6, provision.METHODS, chunk=2, script_samples=1, cni_slots=2)
    status, result = stage.compute(lambda: provision.measure_provision(plan))
    assert status == 0
    assert result is not None
    runs = {run["method"]: run for run in result["runs"]}
    assert {"netslot", "floor", "script", "policies"} <= runs.keys()
    for run in runs.values():
        assert run["us_per_slot"] > 0
        assert run["first_500_us"] > 0
        assert run["last_500_us"] > 0
    assert runs["netslot"]["phases"].keys() >= set(PHASES)
    assert runs["netslot"]["slots"] == runs["floor"]["slots"] == runs["policies"]["slots"] == 6
    assert runs["policies"]["phases"]["routes"] > 0
    assert not list(cgroupfs.ROOT.glob("*/netslot-bench-*"))
    assert runs["script"]["us_per_slot"] > runs["floor"]["us_per_slot"]


def test_the_story_is_told_from_a_measurement() -> None:
    status, result = stage.compute(lambda: demo.measure_demo(8, lambda _: None))
    assert status == 0
    assert result is not None
    assert "before" in demo.story(result)


@contextmanager
def running_benchmark() -> Iterator[subprocess.Popen[bytes]]:
    """A benchmark in the middle of its work, in a session of its own."""
    process = subprocess.Popen(
        [NETSLOT, "bench", "skew", "--slots", "2000", "--samples", "100000"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(2)
    assert process.poll() is None
    assert len(_members(process.pid)) > 1
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
    deadline = time.monotonic() + 20
    while _members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _members(process.pid) == []


def test_an_interrupted_benchmark_leaves_no_process() -> None:
    with running_benchmark() as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 1


def test_a_killed_benchmark_leaves_no_process() -> None:
    with running_benchmark() as process:
        process.kill()


def _members(session: int) -> list[int]:
    """The processes of a session, zombies apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found
