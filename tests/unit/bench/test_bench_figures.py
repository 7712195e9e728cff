"""What becomes of measured times: percentiles, tables, pictures; and what plans refuse. Nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netslot.bench import demo, picture, provision, report, skew
from netslot.bench.measure import Samples
from netslot.bench.skew import spread
from netslot.bench.statistics import median, percentile
from netslot.errors import UsageError

TIMES = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=50)


@given(TIMES, st.floats(0, 1))
def test_a_percentile_lies_between_its_neighbours(times: list[float], share: float) -> None:
    value = percentile(times, share)
    assert min(times) <= value <= max(times)
    assert sum(time < value for time in times) <= share * (len(times) - 1) + 1


def test_percentiles_of_known_values() -> None:
    times = [float(number) for number in range(101)]
    assert percentile(times[::-1], 0.99) == 99
    assert median([1.0, 2.0]) == 1.5
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@given(st.integers(1, 5000), st.integers(1, 20))
def test_positions_hold_the_first_and_the_last(slots: int, positions: int) -> None:
    found = spread(slots, positions)
    assert found[-1] == slots
    assert found == sorted(set(found))
    assert len(found) <= positions
    if positions > 1:
        assert found[0] == 1


def test_positions_of_four_thousand() -> None:
    assert spread(4000, 3) == [1, 2001, 4000]
    assert spread(3, 5) == [1, 2, 3]


def shape(name: str, times: list[float], root_rules: int, add: float | None, slot_rules: int = 0) -> dict[str, Any]:
    positions = [
        {"slot": slot, "p50_us": us, "p99_us": 2 * us} for slot, us in zip((1, 2000, 4000), times, strict=True)
    ]
    return {
        "shape": name,
        "root_rules": root_rules,
        "positions": positions,
        "add_tenant_us": add,
        "add_tenant_driver": "a tool" if add else None,
        "slot_rules": slot_rules,
        "note": None,
    }


FACTS = {"kernel": "6.1", "cores": 2, "cpu": "a processor", "hz": 250, "tools": {"nft": "nftables 1.0.6", "ip": None}}
SKEW: dict[str, Any] = {
    "machine": FACTS,
    "slots": 4000,
    "rules_per_tenant": 30,
    "samples": 400,
    "seconds": 20.0,
    "skipped": {"root-nft-sets": "nft is too old"},
    "shapes": [
        shape("none", [50.0, 50.0, 50.0], 0, None),
        shape("root-iptables-legacy-flat", [100.0, 1000.0, 4000.0], 120_002, 300_000.0),
        shape("slots-iptables-legacy", [60.0, 60.0, 60.0], 4, 150.0, slot_rules=33),
    ],
}


def test_the_table_says_the_skew_and_what_was_left_out() -> None:
    lines = report.skew_table(SKEW).splitlines()
    flat = next(line for line in lines if line.startswith("root, iptables-legacy, flat"))
    assert flat.split()[-7:] == ["120,002", "100", "1,000", "4,000", "40.00", "300.0", "ms"]
    slots = next(line for line in lines if line.startswith("slots, iptables-legacy"))
    assert "1.00" in slots
    assert any("p50 is 1.20 of no rules at all" in line for line in lines)
    assert any("not measured: root, nftables sets: nft is too old" in line for line in lines)
    assert "HZ=250" in lines[-1]


def test_the_story_compares_before_and_after() -> None:
    text = demo.story(SKEW)
    before = next(line for line in text.splitlines() if "before" in line)
    after = next(line for line in text.splitlines() if "after:" in line)
    assert "120,002" in before
    assert "4.0 ms" in before
    assert after.split()[-10:-8] == ["4", "37"]
    assert "waits 40 times as long" in text
    assert "connects 67 times faster" in text
    assert "2,000 times sooner" in text


def test_durations_are_told_in_the_unit_that_suits_them() -> None:
    assert [report.duration(us) for us in (12.3, 4_530, 2_500_000)] == ["12 µs", "4.5 ms", "2.5 s"]


def test_a_table_of_provisioning() -> None:
    run = {
        "method": "netslot",
        "slots": 4000,
        "us_per_slot": 2000.0,
        "p50_us": 1900.0,
        "first_500_us": 1800.0,
        "last_500_us": 2160.0,
        "kib_per_slot": 380.0,
        "phases": {"veth": 900.0},
        "note": None,
    }
    floor = {**run, "method": "floor", "phases": {"veth": 850.0, "pin": 50.0}, "note": "bare"}
    lines = report.provision_table({"machine": FACTS, "runs": [run, floor]}).splitlines()
    assert lines[1].split() == ["netslot", "4,000", "2,000", "1,900", "1,800", "2,160", "1.20", "380"]
    assert "veth" in lines[5]
    assert lines[5].split()[-2:] == ["900", "850"]
    assert "  floor: bare" in lines


@pytest.mark.parametrize("suffix", picture.FORMATS)
def test_the_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / f"skew{suffix}"
    picture.draw(SKEW, file)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG") or b"<svg" in content
    if suffix == ".svg":
        assert b"<path" in content


def test_a_picture_has_a_known_format() -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        picture.check_name("skew.gif")


def test_samples_are_summed_up() -> None:
    samples = Samples(tcp_us=[1.0, 2.0, 3.0], udp_us=[4.0])
    summary = samples.summary(7)
    assert summary["slot"] == 7
    assert summary["p50_us"] == 2.0
    assert summary["p99_us"] == pytest.approx(2.98)
    assert summary["udp_p50_us"] == 4.0
    json.dumps(summary)


def test_plans_refuse_what_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="unknown shape"):
        skew.Plan(10, ("nonsense",))
    with pytest.raises(UsageError, match="between 3 and"):
        skew.Plan(2)
    with pytest.raises(UsageError, match="positions"):
        skew.Plan(10, positions=1)
    with pytest.raises(UsageError, match="unknown method"):
        provision.Plan(10, ("nonsense",))
    with pytest.raises(UsageError, match="between 2 and"):
        provision.Plan(1)
