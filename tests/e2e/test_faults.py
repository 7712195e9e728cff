"""Whatever happens at whatever moment, the next command puts it right and nothing leaks."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dying import dies_at
from hostlab import PlayedHost, played
from lab import nets
from netslot.errors import KernelError, NetslotError, RefusedError
from netslot.host import templates
from netslot.host.host import Host
from netslot.host.ledger import Ledger, LedgerError
from netslot.host.links import ROOT_GROUP
from netslot.kernel import netns, sys
from netslot.serve import daemon
from netslot.serve.client import connect
from netslot.serve.upkeep import Settings

ALLOW = {"allow": ["192.0.2.0/24"]}
OTHER = {"allow": ["198.51.100.0/24", "203.0.113.7/32"]}
IDENTITY = "0123abcd"


@pytest.fixture(autouse=True)
def dies_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casting leaves nothing that a kill could leak, and takes most of the time: once for each spec is enough."""
    cast, known = templates.cast, dict[Any, Any]()

    def remembered(spec: Any, of: Any, host_id: str) -> Any:
        key = (of.digest, spec.prefix, host_id)
        if key not in known:
            known[key] = cast(spec, of, host_id)
        return known[key]

    monkeypatch.setattr(templates, "cast", remembered)


@contextmanager
def standing(slots: int = 2, **options: Any) -> Iterator[PlayedHost]:
    """A played host that is up."""
    with played(slots=slots, **options) as lab:
        prepare(lab)
        with lab.host() as host:
            host.up(lab.spec)
        yield lab


def prepare(lab: PlayedHost) -> None:
    """Give the host an identity, so that remembered dies are its own."""
    lab.state_dir.mkdir(exist_ok=True)
    (lab.state_dir / "identity").write_text(IDENTITY, encoding="ascii")


def expected(lab: PlayedHost, slots: int) -> set[str]:
    """What a whole host of this many slots has in the kernel, besides tables in root."""
    names = [f"{lab.prefix}{number}" for number in range(1, slots + 1)]
    return {f"pin {name}" for name in names} | {f"link {name}" for name in names}


def assert_whole(lab: PlayedHost, host: Host, slots: int) -> None:
    """No drift, no slot too many or too few, every slot in one of the two good states."""
    report = host.verify()
    assert report.drift == []
    assert {trace for trace in lab.traces() if not trace.startswith("nft ")} == expected(lab, slots)
    assert {state for _, state in host.counts()} <= {"free", "leased"}
    assert len(host.slots()) == slots


def killed_at_every_step(
    lab: PlayedHost, action: Callable[[Host], object], recover: Callable[[int], None], *, least: int
) -> None:
    """Kill ``action`` after its first step, its second, and so on; ``recover`` puts all back each time."""

    def act() -> None:
        with lab.host() as host:
            action(host)

    step = 1
    while dies_at(step, act):
        recover(step)
        step += 1
    assert step > least, "the steps are not counted"


def test_up_killed_anywhere_is_finished_by_the_next_up() -> None:
    with played(slots=1) as lab:
        prepare(lab)
        with lab.host() as host:
            host.up(lab.spec)
            whole = lab.traces()
            host.down()

        def recover(_: int) -> None:
            with lab.host() as host:
                host.up(lab.spec)
                assert_whole(lab, host, 1)
                assert lab.traces() == whole
                host.down()
            assert lab.traces() == set()
            prepare(lab)

        prepare(lab)
        killed_at_every_step(lab, lambda host: host.up(lab.spec), recover, least=30)


def test_down_killed_anywhere_is_finished_by_the_next_down() -> None:
    with standing() as lab:

        def recover(_: int) -> None:
            with lab.host() as host:
                if host.exists:
                    host.down()
            assert lab.traces() == set()
            prepare(lab)
            with lab.host() as host:
                host.up(lab.spec)
                assert_whole(lab, host, 2)

        killed_at_every_step(lab, lambda host: host.down(), recover, least=10)


def test_acquire_killed_anywhere_gives_one_lease_to_who_asks_again() -> None:
    with standing() as lab:

        def recover(_: int) -> None:
            with lab.host() as host:
                lease = host.lease("tenant", params=ALLOW)
                assert list(lease.record.params["allow"]) == ALLOW["allow"]
                assert [each.owner for each in host.leases()] == ["tenant"]
                host.up(lab.spec)
                assert_whole(lab, host, 2)
                assert host.counts() == {("default", "free"): 1, ("default", "leased"): 1}
                host.release(owner="tenant")

        killed_at_every_step(lab, lambda host: host.lease("tenant", params=ALLOW), recover, least=5)


def test_update_killed_anywhere_ends_with_rules_and_ledger_agreeing() -> None:
    with standing() as lab:
        with lab.host() as host:
            lease = host.lease("tenant", params=ALLOW).id

        def recover(_: int) -> None:
            with lab.host() as host:
                host.verify(repair=True)
                assert_whole(lab, host, 2)
                found = host.find(lease=lease)
                assert found is not None
                assert list(found.record.params["allow"]) in (ALLOW["allow"], OTHER["allow"])
                host.update(lease, ALLOW)

        killed_at_every_step(lab, lambda host: host.update(lease, OTHER), recover, least=4)


def test_release_killed_anywhere_leaves_a_slot_for_the_next() -> None:
    with standing() as lab:
        with lab.host() as host:
            host.lease("tenant", params=ALLOW)

        def recover(_: int) -> None:
            with lab.host() as host:
                host.release(owner="tenant")
                host.up(lab.spec)
                assert_whole(lab, host, 2)
                assert host.counts() == {("default", "free"): 2}
                host.lease("tenant", params=ALLOW)

        killed_at_every_step(lab, lambda host: host.release(owner="tenant"), recover, least=10)


def test_a_rebuild_killed_anywhere_leaves_a_slot_for_the_next() -> None:
    """A process of the last tenant's still runs in the slot, so that it is destroyed and built again."""
    with standing() as lab:
        inside: list[subprocess.Popen[bytes]] = []

        def occupy() -> None:
            with lab.host() as host:
                slot = host.lease("tenant", params=ALLOW).netns_path
            inside.append(subprocess.Popen(["nsenter", f"--net={slot}", "sleep", "100"]))
            while os.stat(f"/proc/{inside[-1].pid}/ns/net").st_ino != os.stat(slot).st_ino:
                time.sleep(0.001)

        def recover(_: int) -> None:
            with lab.host() as host:
                host.release(owner="tenant")
                host.up(lab.spec)
                assert_whole(lab, host, 2)
                assert host.counts() == {("default", "free"): 2}
            inside[-1].kill()
            inside[-1].wait()
            occupy()

        try:
            occupy()
            killed_at_every_step(lab, lambda host: host.release(owner="tenant"), recover, least=20)
        finally:
            for process in inside:
                process.kill()
                process.wait()


def test_the_daemon_killed_anywhere_at_its_start() -> None:
    with standing() as lab:
        settings = Settings(lab.spec, verify_seconds=0)

        def start(host: Host) -> None:
            daemon.notify = lambda state: os.kill(os.getpid(), signal.SIGTERM) if state == "READY=1" else None  # type: ignore[attr-defined]
            daemon.serve(host, settings)

        def recover(_: int) -> None:
            assert connect(lab.state_dir) is None
            with lab.host() as host:
                host.up(lab.spec)
                assert_whole(lab, host, 2)

        killed_at_every_step(lab, start, recover, least=10)


def test_a_ledger_whose_writer_is_killed_in_the_middle_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    chance = random.Random(3)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            ledger = Ledger(path)
            ledger.add((number, "default", "d") for number in range(1, 20))
            while True:
                for number in range(1, 20):
                    found, _ = ledger.acquire(f"l{number}", f"o{number}", "default", {}, uid=0, binding=False)
                    assert found is not None
                for number in range(1, 20):
                    slot = ledger.release(f"l{number}")
                    assert slot is not None
                    ledger.settle(slot, "d", ready_at=0.0)
        time.sleep(0.02 + chance.random() / 50)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ledger = Ledger(path)
        assert ledger._rows("PRAGMA integrity_check") == [("ok",)]
        leased = {record.slot for record in ledger.slots("leased")}
        assert leased == {lease.slot for lease in ledger.leases()}
        for lease in ledger.leases():
            ledger.release(lease.lease)
        for record in ledger.slots("dirty"):
            ledger.settle(record.slot, "d", ready_at=0.0)
        ledger.close()


def test_down_takes_a_link_that_never_got_its_tag_and_no_other() -> None:
    """As when `up` is killed between making a link and labelling it; the kernel would remove it some time later."""
    with standing() as lab, nets("held") as (held,):
        for number, group in ((3, ROOT_GROUP), (4, 0)):
            end = f"{lab.prefix}{number} group {group}"
            lab.root.ip(f"link add {end} type veth peer name up{number} netns {held.name}")
        with lab.host() as host:
            assert host.down() == 3
        left = lab.root.sh("ip link")
        assert f"{lab.prefix}3" not in left
        assert f"{lab.prefix}4" in left
        lab.root.ip(f"link del {lab.prefix}4")


# --- what others do to the host ----------------------------------------------------------------------


def _drop_pin(lab: PlayedHost) -> None:
    netns.unpin(f"{lab.prefix}1")


def _delete_link(lab: PlayedHost) -> None:
    lab.root.ip(f"link del {lab.prefix}1")


def _flush_slot(lab: PlayedHost) -> None:
    lab.root.sh(f"nsenter --net=/run/netns/{lab.prefix}1 nft flush ruleset")


def _flush_root(lab: PlayedHost) -> None:
    lab.root.sh("nft flush ruleset")


def _delete_guest_link(lab: PlayedHost) -> None:
    lab.root.sh(f"ip -n {lab.prefix}1 link del tap0")


@pytest.mark.parametrize("harm", [_drop_pin, _delete_link, _flush_slot, _flush_root, _delete_guest_link])
@pytest.mark.parametrize("leased", [False, True], ids=["free", "leased"])
def test_harm_from_outside_is_found_and_repaired(harm: Callable[[PlayedHost], None], leased: bool) -> None:
    with standing() as lab:
        with lab.host() as host:
            if leased:
                assert host.lease("tenant", params=ALLOW).slot == 1
            harm(lab)
            assert host.verify().unrepaired
            assert host.verify(repair=True).unrepaired == 0
            assert_whole(lab, host, 2)
        assert lab.netslot("verify").returncode == 0


def test_a_lost_ledger_is_rebuilt_and_nothing_is_handed_out_twice() -> None:
    with standing() as lab:
        with lab.host() as host:
            held = host.lease("tenant").slot
        for file in lab.state_dir.glob("ledger.db*"):
            file.unlink()
        with lab.host() as host:
            host.up(lab.spec)
            assert host.counts() == {("default", "unknown"): 2}
            with pytest.raises(RefusedError):
                host.lease("another")
            host.release(slot=held)
            assert host.lease("another").slot == held


def test_a_damaged_ledger_is_said_to_be_damaged() -> None:
    with standing() as lab:
        for file in lab.state_dir.glob("ledger.db*"):
            file.write_bytes(b"this is no database, and longer than a header of one would be" * 100)
        done = lab.netslot("ls", check=False)
        assert done.returncode == 1
        assert "up` rebuilds it" in done.stderr
        for file in lab.state_dir.glob("ledger.db*"):
            file.unlink()
        with lab.host() as host:
            host.up(lab.spec)


# --- what the machine lacks --------------------------------------------------------------------------


def _fill(directory: Path) -> Path:
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(b"x" * size):
                    continue
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return ballast


@contextmanager
def own_filesystem(lab: PlayedHost) -> Iterator[Path]:
    """A small tmpfs for the state directory."""
    lab.state_dir.mkdir()
    sys.mount("tmpfs", str(lab.state_dir), "tmpfs", 0, "size=2m")
    try:
        yield lab.state_dir
    finally:
        sys.umount(str(lab.state_dir))


def test_a_full_disk_refuses_and_loses_nothing() -> None:
    with played(slots=2) as lab, own_filesystem(lab) as directory:
        prepare(lab)
        with lab.host() as host:
            host.up(lab.spec)
            first = host.lease("first").slot
            ballast = _fill(directory)
            refused = 0
            for number in range(200):  # what the log had room for is used up first
                try:
                    host.release(slot=host.lease(f"tenant {number}", params=ALLOW).slot)
                except LedgerError as error:
                    assert error.hint is not None
                    refused += 1
                    break
            assert refused
            ballast.unlink()
            host.up(lab.spec)
            host.release(owner=f"tenant {number}")
            assert_whole(lab, host, 2)
            assert [lease.slot for lease in host.leases()] == [first]
            host.down(force=True)


def test_a_state_directory_that_cannot_be_written_is_an_error_with_a_hint() -> None:
    with played(slots=2) as lab, own_filesystem(lab) as directory:
        prepare(lab)
        with lab.host() as host:
            host.up(lab.spec)
        remount = 32
        sys.mount("tmpfs", str(directory), "tmpfs", remount | sys.MS_RDONLY)
        done = lab.netslot("acquire", "--owner", "tenant", check=False)
        assert done.returncode == 1
        assert "hint: is the state directory writable" in done.stderr
        sys.mount("tmpfs", str(directory), "tmpfs", remount)
        assert lab.json("acquire", "--owner", "tenant")["slot"] == 1
        with lab.host() as host:
            assert_whole(lab, host, 2)
            host.down(force=True)


def test_descriptors_used_up_while_building() -> None:
    with standing() as lab:
        lab.write(4)

        def starved(spare: int) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
            filled = []
            with contextlib.suppress(OSError):
                while True:
                    filled.append(os.open("/dev/null", os.O_RDONLY))
            for fd in filled[:spare]:
                os.close(fd)
            with lab.host() as host:
                try:
                    host.up(lab.spec)
                except (NetslotError, OSError):
                    os.kill(os.getpid(), signal.SIGKILL)

        failures, never = 0, 1 << 30
        for spare in range(1, 16, 2):
            failures += dies_at(never, functools.partial(starved, spare))
            with lab.host() as host:
                assert host.verify(repair=True).unrepaired == 0
        assert failures > 2
        with lab.host() as host:
            host.up(lab.spec)
            assert_whole(lab, host, 4)


def test_no_memory_for_one_more_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing() as lab:
        lab.write(4)
        made, unshare = list[int](), sys.unshare

        def short(flags: int) -> None:
            made.append(flags)
            if len(made) == 2:
                raise KernelError("unshare", errno.ENOMEM)
            unshare(flags)

        monkeypatch.setattr(sys, "unshare", short)
        with lab.host() as host:
            with pytest.raises(KernelError):
                host.up(lab.spec)
            assert_whole(lab, host, 3)
            monkeypatch.undo()
            host.up(lab.spec)
            assert_whole(lab, host, 4)


def test_a_clock_that_is_set_ends_no_lease_and_hides_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    with standing(hold_down="50ms") as lab, lab.host() as host:
        host.lease("tenant", ttl=3600)
        for step in (86400.0, -86400.0):
            monkeypatch.setattr(time, "time", lambda step=step: now() + step)
            host.release(slot=host.lease("other", wait=2).slot)
            assert host.lease("other", wait=2).slot == 2
            host.release(owner="other")
            assert host.find(owner="tenant") is not None
