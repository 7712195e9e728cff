"""The ledger: each slot has one holder, whoever asks, in whatever order, from however many processes and threads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from netslot.host import ledger as module
from netslot.host.ledger import Ledger, LedgerError, clock, identify, is_alive, myself


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.db")
    yield made
    made.close()


def acquire(ledger: Ledger, owner: str, *, binding: bool = False, ticket: int | None = None) -> int | None:
    record, _ = ledger.acquire(
        f"lease of {owner}", owner, "default", {"allow": ["192.0.2.0/24"]}, uid=7, binding=binding, ticket=ticket
    )
    return record.slot if record is not None else None


def slots(ledger: Ledger, count: int) -> None:
    ledger.add((number, "default", "digest") for number in range(1, count + 1))


def test_the_slot_that_rested_longest_is_handed_out(ledger: Ledger) -> None:
    slots(ledger, 3)
    assert [acquire(ledger, owner) for owner in "abc"] == [1, 2, 3]
    for owner, slot in (("b", 2), ("a", 1)):
        assert ledger.release(f"lease of {owner}") == slot
        ledger.settle(slot, "digest", ready_at=clock())
    assert acquire(ledger, "d") == 2


def test_a_slot_that_rests_is_not_handed_out(ledger: Ledger) -> None:
    slots(ledger, 1)
    acquire(ledger, "a")
    ledger.release("lease of a")
    ledger.settle(1, "digest", ready_at=clock() + 60)
    assert acquire(ledger, "b") is None


def test_an_owner_has_one_lease(ledger: Ledger) -> None:
    slots(ledger, 2)
    assert acquire(ledger, "a") == acquire(ledger, "a") == 1
    assert [lease.owner for lease in ledger.leases()] == ["a"]


def test_tickets_are_served_in_order_and_the_dead_leave(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    slots(ledger, 2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "myself", lambda: "1:not when it started")
        ledger.queue_up("default")
    first, second = ledger.queue_up("default"), ledger.queue_up("default")
    assert acquire(ledger, "late") is None
    assert acquire(ledger, "second", ticket=second) is None
    assert acquire(ledger, "first", ticket=first) == 1
    ledger.leave_queue(first)
    assert acquire(ledger, "second", ticket=second) == 2


def test_work_of_the_dead_is_taken_over_and_that_of_the_living_is_not(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots(ledger, 3)
    acquire(ledger, "bound by the living", binding=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "myself", lambda: "1:not when it started")
        acquire(ledger, "bound by the dead", binding=True)
        assert ledger.claim(3, "free")
    assert [record.slot for record in ledger.take_dirty()] == [2, 3]
    assert ledger.take_dirty() == []
    assert [lease.owner for lease in ledger.leases()] == ["bound by the living"]
    ledger.unclaim([2, 3])
    assert [record.slot for record in ledger.take_dirty(most=1)] == [2]


def test_processes_are_told_apart() -> None:
    assert is_alive(myself())
    assert not is_alive(f"{os.getpid()}:0")
    child = os.fork()
    if child == 0:
        os._exit(0)
    known = identify(child)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has reaped it
    assert not is_alive(known)
    os.waitpid(child, 0)
    assert not is_alive(known)
    assert not is_alive(identify(child))


def test_leases_expire_by_time_since_boot(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    slots(ledger, 2)
    ledger.acquire("short", "a", "default", {}, uid=0, binding=False, ttl=0.0)
    ledger.acquire("long", "b", "default", {}, uid=0, binding=False, ttl=3600)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert [lease.lease for lease in ledger.expired()] == ["short"]
    assert ledger.renew("short", 60)
    assert ledger.expired() == []
    assert not ledger.renew("none", 60)


def test_many_threads_and_connections_never_share_a_slot(ledger: Ledger) -> None:
    slots(ledger, 40)
    other = Ledger(ledger.path)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: acquire((ledger, other)[n % 2], f"owner {n}"), range(60)))
    other.close()
    held = [slot for slot in got if slot is not None]
    assert sorted(held) == list(range(1, 41))


def test_a_file_that_is_no_ledger_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"nothing like a database " * 100)
    with pytest.raises(LedgerError) as caught:
        Ledger(path)
    assert "rebuilds" in (caught.value.hint or "")


class Life(RuleBasedStateMachine):
    """Whatever is asked in whatever order, ledger and model agree on who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(Path(":memory:"))
        slots(self.ledger, 3)
        self.held: dict[str, int] = {}

    @rule(owner=st.sampled_from("abcde"), binding=st.booleans())
    def acquire(self, owner: str, binding: bool) -> None:
        free = {record.slot for record in self.ledger.slots("free")}
        slot = acquire(self.ledger, owner, binding=binding)
        if owner in self.held:
            assert slot == self.held[owner]
        elif not free:
            assert slot is None
        else:
            assert slot in free
            self.held[owner] = slot

    @rule(owner=st.sampled_from("abcde"))
    def release(self, owner: str) -> None:
        assert self.ledger.release(f"lease of {owner}") == self.held.pop(owner, None)

    @rule()
    def clean(self) -> None:
        for record in self.ledger.take_dirty():
            self.ledger.settle(record.slot, "digest", ready_at=0.0)

    @rule(number=st.integers(1, 3))
    def bind(self, number: int) -> None:
        self.ledger.bound(number)

    @invariant()
    def agrees(self) -> None:
        assert {lease.owner: lease.slot for lease in self.ledger.leases()} == self.held
        assert {record.slot for record in self.ledger.slots("leased", "binding")} == set(self.held.values())

    def teardown(self) -> None:
        self.ledger.close()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
