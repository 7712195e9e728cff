"""The attack matrix: what a hostile tenant sends, what stops it, and that nothing else would have.

Every row is played on every kind of host that it concerns, as ``up`` built it, where it must fail; with only the
slot's rules or only root's, where both are said to stop it; and without all that is said to stop it, where it must
work. ``tests/attack_rows.py`` holds the rows, ``docs/security/attacks.md`` the table of them.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

import attack_acts
import attack_lab
from attack_lab import KINDS, OUTSIDE, Scene
from attack_rows import Row, rows
from attack_stops import Stop, put_back, run, take_away, to_mend
from netslot.kernel import conntrack

PATIENCE = 1.0
"""Seconds to wait for what an attack is to achieve once nothing stops it."""
Marked = tuple[bytes, Row]


def mark(number: int) -> bytes:
    return b"\xa5\x5a" + struct.pack(">H", number) + b"\xc3\x3c\x96\x69"


HONEST = mark(60000)


class Game:
    """One kind of host, and what went wrong on it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        mine = [row for row in rows() if row.concerns(scene.of)]
        self.rows = [(mark(at), row) for at, row in enumerate(mine)]
        self.wrong: list[str] = []

    def must_fail(self, chosen: Sequence[Marked], when: str) -> None:
        """An honest datagram is sent last: when that has arrived, so has what went before it."""
        worked, expected = self._send(chosen)
        attack_acts.udp(OUTSIDE)(self.scene, HONEST)
        arrived = self.arrived({**expected, HONEST: "outside"}, lambda arrived: HONEST in arrived)
        assert HONEST in arrived, f"{self.scene.of}: what an honest tenant sends does not arrive {when}"
        self.wrong += [f"{row}: not stopped {when}" for each, row in chosen if each in worked | arrived]

    def must_work(self, chosen: Sequence[Marked], when: str) -> None:
        worked, expected = self._send(chosen, patient=True)
        worked |= self.arrived(expected, lambda arrived: arrived == expected.keys())
        self.wrong += [f"{row}: fails also {when}" for each, row in chosen if each not in worked]

    def _send(self, chosen: Sequence[Marked], *, patient: bool = False) -> tuple[set[bytes], dict[bytes, str]]:
        """Play them; the marks of those that can be said to have worked, and where to look for the others'."""
        worked, expected = set(), {}
        for watch in self.scene.seen.values():
            watch.take()
        for each, row in chosen:
            row.act(self.scene, each)
            if row.achieved is None:
                expected[each] = row.seen
            elif row.achieved(self.scene) or (patient and _comes_true(row.achieved, self.scene)):
                worked.add(each)
        return worked, expected

    def arrived(self, expected: dict[bytes, str], enough: Callable[[set[bytes]], bool]) -> set[bytes]:
        """Those of the marks that are seen where they are expected, until there are enough of them."""
        arrived: set[bytes] = set()
        deadline = time.monotonic() + PATIENCE
        while not enough(arrived) and time.monotonic() < deadline:
            for place, watch in self.scene.seen.items():
                mine = [each for each, where in expected.items() if where == place]
                arrived |= {each for frame in watch.take() for each in mine if each in frame}
        return arrived


def _comes_true(achieved: Callable[[Scene], bool], scene: Scene) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if achieved(scene):
            return True
    return False


@pytest.fixture(scope="module", params=KINDS, ids=str)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with attack_lab.scene(request.param, tmp_path_factory.mktemp("attacks") / "host") as each:
        yield each


def by_stops(scene: Scene, chosen: Sequence[Marked]) -> dict[tuple[Stop, ...], list[Marked]]:
    groups: dict[tuple[Stop, ...], list[Marked]] = {}
    for each, row in chosen:
        groups.setdefault(row.stops_of(scene.of), []).append((each, row))
    return groups


def test_every_attack_is_stopped_by_what_is_said_to_stop_it(scene: Scene) -> None:
    game = Game(scene)
    game.must_fail(game.rows, "as built")

    slot, root = scene.rules["slot"], scene.rules["root"]
    slot.bare()
    beyond = [(each, row) for each, row in game.rows if {stop.layer for stop in row.stops_of(scene.of)} != {"slot"}]
    game.must_fail(beyond, "without the slot's rules")
    slot.whole()
    root.bare()
    before = [(each, row) for each, row in game.rows if {stop.layer for stop in row.stops_of(scene.of)} != {"root"}]
    game.must_fail(before, "without root's rules")

    groups = by_stops(scene, [each for each in game.rows if each[1].twin is None])
    for stops, chosen in sorted(groups.items(), key=lambda group: sorted(to_mend(group[0]))):
        take_away(scene, stops)
        game.must_work(chosen, "without what is said to stop it")
        for _, row in chosen:
            run(scene, row.tidy)
        put_back(scene, stops)
    scene.mend()

    slot.bare()
    root.bare()
    alone = [(each, row) for each, row in game.rows if row.twin is not None]
    game.must_fail(alone, "by the kernel alone")
    game.must_work([(each, replace(row, act=row.twin)) for each, row in alone if row.twin is not None], "as a twin")
    slot.whole()
    root.whole()
    assert not game.wrong, f"{scene.of}:\n" + "\n".join(game.wrong)
    assert scene.host.verify().drift == []


@pytest.mark.parametrize("scene", [kind for kind in KINDS if kind.nat != "nftables"], indirect=True, ids=str)
def test_a_tenant_with_no_connection_left_leaves_its_neighbour_all(scene: Scene) -> None:
    """The tenant has opened all it may; the neighbour's connections are its own to count."""
    for six in (False, True):
        attack_acts.connections(six)(scene, b"")
        one, other = mark(1), mark(2)
        attack_acts.tcp(attack_acts.outside(six), 443)(scene, one)
        scene.honest.packet(attack_acts.segment(scene.its_own(six), attack_acts.outside(six), other, 443))
        assert Game(scene).arrived({one: "outside", other: "outside"}, {other}.issubset) == {other}
        scene.slot.run(conntrack.flush)
