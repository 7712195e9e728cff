"""``netslot migrate`` is killed at every step and at any moment: root holds the old rules or the new ones, never
neither; the next run says which, and goes on or goes back to the byte."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bridge_lab import CONTAINERS, Bridge
from dying import dies_at
from hostlab import NETSLOT
from lab import nets
from migration_lab import PlayedHost, played_host, same_bytes, split_host, still
from netslot.cli.main import cli
from netslot.host import migration_homes, tables
from netslot.host.migrate import Migration
from netslot.host.migration_journal import Journal

TENANTS = 3


@pytest.fixture(autouse=True)
def dies_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casting leaves nothing that a kill could leak, and takes most of the time: once for each class is enough."""
    cast, known = migration_homes._cast, dict[Any, Any]()

    def remembered(arrangement: Any, kind: str, variant: Any, values: Any) -> Any:
        key = kind, variant, str(values)
        if key not in known:
            known[key] = cast(arrangement, kind, variant, values)
        return known[key]

    monkeypatch.setattr(migration_homes, "_cast", remembered)


class Lab:
    """A played host with what was split from it, and ``netslot migrate`` for it."""

    def __init__(self, host: PlayedHost, directory: Path) -> None:
        self.host, self.state, self.moved = host, directory / "state", directory / "moved"
        self.moved.mkdir()
        for name, text in split_host(host).files.items():
            (self.moved / name).write_text(text)
        self.before = still(host)
        self.plain = {family: tables.plain(self.before[f"root IPv{family}"]) for family in host.families}
        self.migrate()
        self.after = {family: tables.plain(host.save(family)) for family in host.families}
        assert self.plain != self.after
        self.migrate("--rollback")

    def words(self, *arguments: str) -> list[str]:
        where = arguments or (str(self.moved),)
        return ["--state-dir", str(self.state), "--root-netns", self.host.root.name, "migrate", *where]

    def migrate(self, *arguments: str) -> str:
        """The next ordinary run, which must do what it is asked; what it says."""
        done = CliRunner().invoke(cli, self.words(*arguments), standalone_mode=False)
        assert done.exception is None, done.exception
        return done.output

    def act(self, *arguments: str) -> Callable[[], None]:
        """The same in this process, to be forked and killed."""

        def act() -> None:
            assert not cli.main(args=self.words(*arguments), standalone_mode=False)

        return act

    def assert_one_of_both(self) -> None:
        """Each table of root is the old or the new one, in the order of a packet's way; new ones rely on slots."""
        any_new = False
        for family in self.host.families:
            now, old, new = tables.plain(self.host.save(family)), self.plain[family], self.after[family]
            changing = [name for name in tables.ORDER if old.get(name) != new.get(name)]
            found = [
                "old" if now.get(name) == old.get(name) else "new" if now.get(name) == new.get(name) else "neither"
                for name in changing
            ]
            assert found == sorted(found), found  # new before old, and neither nowhere
            assert "neither" not in found
            any_new |= "new" in found
            assert {name: now.get(name) for name in now if name not in changing} == {
                name: old.get(name) for name in old if name not in changing
            }
        if any_new:
            for home in self.host.homes.values():
                assert all("-j netslot-out" in self.host.save(family, home) for family in self.host.families)

    def wait(self) -> None:
        """What a killed run started may still be at work: it holds the lock."""
        subprocess.run(["flock", str(self.state / "migration.lock"), "true"], check=True)

    def assert_as_before(self) -> None:
        assert same_bytes(self.host, self.before) == []
        for net in (self.host.root, *self.host.homes.values()):
            assert "netslot" not in net.sh("nft list tables")
        assert set(self.host.root.sh("ip -o link show | grep -o 'group [^ ]*'").split()) == {"group", "default"}


@pytest.fixture(params=["legacy", "nft"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with played_host(TENANTS, variant=request.param) as host:
        yield Lab(host, tmp_path)


def said(text: str, journal: Journal) -> bool:
    """Whether the run after a crash says what it found."""
    return journal.state in ("none", "done") or "an earlier run stopped while" in text


def test_killed_at_every_step_on_the_way_there(lab: Lab) -> None:
    """After every other step the next run goes on, after the others it goes back; which is which by the variant."""
    step = 1
    while dies_at(step, lab.act()):
        lab.wait()
        lab.assert_one_of_both()
        journal = Journal.load(lab.state / "migration")
        if step % 2 == (lab.host.variant == "nft") and journal.state != "done":
            assert said(lab.migrate(), journal)
            assert {f: tables.plain(lab.host.save(f)) for f in lab.host.families} == lab.after
            lab.migrate("--rollback")
        elif journal.state != "none":
            lab.migrate("--rollback")
        lab.assert_as_before()
        step += 1
    assert step > 60, "the steps are not counted"
    lab.migrate("--rollback")


def test_killed_at_every_step_on_the_way_back(lab: Lab) -> None:
    """The next run goes back, or forth again from the middle of the way."""
    step = 1
    lab.migrate()
    while dies_at(step, lab.act("--rollback")):
        lab.wait()
        lab.assert_one_of_both()
        state = Journal.load(lab.state / "migration").state
        if step % 2 == (lab.host.variant == "nft"):
            if state != "none":
                lab.migrate("--rollback")
            lab.assert_as_before()
            lab.migrate()
        elif state != "done":
            lab.migrate()
        assert {f: tables.plain(lab.host.save(f)) for f in lab.host.families} == lab.after
        step += 1
    assert step > 30, "the steps are not counted"
    lab.assert_as_before()


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    """The installed command, with both families, on either way."""
    chance = random.Random(seed)
    with played_host(TENANTS, families=(4, 6), variant=("legacy", "nft")[seed]) as host:
        lab = Lab(host, tmp_path)
        begin = time.monotonic()
        lab.migrate()
        lab.migrate("--rollback")
        span = time.monotonic() - begin
        for _ in range(12):
            journal = Journal.load(lab.state / "migration")
            arguments = () if journal.state in ("none", "slots") else ("--rollback",)
            process = subprocess.Popen([NETSLOT, *lab.words(*arguments)], stdout=subprocess.PIPE, text=True)
            time.sleep(chance.random() * span * 0.7)
            process.kill()
            process.communicate()
            lab.wait()
            lab.assert_one_of_both()
        if Journal.load(lab.state / "migration").state != "none":
            lab.migrate("--rollback")
        for net in (host.root, *host.homes.values()):
            assert "netslot" not in net.sh("nft list tables")
        assert {f: tables.plain(host.save(f)) for f in host.families} == lab.plain


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_containers_killed_at_every_step(variant: str, tmp_path: Path) -> None:
    """Where root's new rules bring sets: these are there as long as a rule asks for them, and gone afterwards."""
    with nets("root", "out", *(f"c{number}" for number in range(CONTAINERS))) as (root, outside, *containers):
        bridge = Bridge(root, outside, containers, variant)
        files, before = bridge.split(), tables.plain(bridge.save())

        def forward() -> None:
            Migration(tmp_path, root.fd).forward(files, {}, None, lambda _: None)

        def back() -> None:
            Migration(tmp_path, root.fd).rollback(lambda _: None)

        def is_old() -> bool:
            return tables.plain(bridge.save()) == before and "netslot" not in root.sh(
                "ipset list -n; nft list tables"
            )

        forward()
        after = tables.plain(bridge.save())
        back()
        step = 1
        while dies_at(step, forward):
            state = Migration(tmp_path, root.fd).status().state
            now = tables.plain(bridge.save())
            assert all(now.get(name) in (before.get(name), after.get(name)) for name in before)
            if step % 2 and state != "done":
                forward()
                assert tables.plain(bridge.save()) == after
                back()
            elif state != "none":
                back()
            assert is_old(), step
            step += 1
        assert step > 30, "the steps are not counted"
        back()


def test_a_torn_line_of_the_journal_has_not_been_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write({"step": "begin", "variant": "nft", "digest": "d", "sets": []})
    whole = journal.path.read_bytes()
    slot = {"step": "slot", "tenant": "a", "netns": "n", "cookie": 7, "link": "tap0", "counters": {}}
    journal.write(slot, {"step": "stamped", "tenant": "a", "print": "p"}, {"step": "root"})
    both = journal.path.read_bytes()
    for length in range(len(both)):
        journal.path.write_bytes(both[:length])
        found = Journal.load(tmp_path)
        assert found.state == ("none" if length < len(whole) else "slots")
        assert len(found.slots) == (length > len(whole) + len(json.dumps(slot)))
        found.write({"step": "root"})
        assert Journal.load(tmp_path).state == "root"
