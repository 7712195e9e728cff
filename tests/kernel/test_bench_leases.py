"""The benchmarks of leases on small hosts: what they count is counted, and a churn leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from netslot.bench import churn, leases, stage
from netslot.host.verifying import verify


def played(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    status, result = stage.compute(measure)
    assert status == 0
    assert result is not None
    return result


def test_acquires_are_timed_on_few_slots_and_many_and_over_the_socket() -> None:
    result = played(lambda: leases.measure_acquire(60, 5))
    assert result["few"]["slots"] == 6
    assert result["many"]["slots"] == 60
    for name in ("few", "many", "list_of_1000", "socket", "socket_100_paced", "socket_100_at_once"):
        assert 0 < result[name]["p50_us"] <= result[name]["p99_us"]
    assert str(result["ratio"]) in leases.acquire_lines(result)


def test_a_churn_with_kills_leaves_the_host_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(churn, "_CLIENT_DIES_EVERY", 0.2)
    monkeypatch.setattr(churn, "_DAEMON_DIES_EVERY", 0.5)
    result = played(lambda: churn.measure_churn(churn.Plan(12, 300, clients=20, recycled=5)))
    assert result["cycles"] >= 300
    assert result["clients_killed"]
    assert result["daemons_killed"]
    assert result["leased_twice"] == result["slots_lost"] == result["root_generations"] == 0
    assert result["drift"] == result["leaked"] == []
    assert result["times_cheaper"] > 1


def test_seeded_changes_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    result = played(lambda: leases.measure_verify(9, rounds=1))
    assert result["seeded"]["a rule"]
    assert result["seeded"]["a sysctl"]
    monkeypatch.setattr("netslot.host.host.verifying.verify", lambda engine, **rest: verify(engine, numbers=[9]))
    blind = played(lambda: leases.measure_verify(9, rounds=1))
    assert not blind["seeded"]["a rule"]
