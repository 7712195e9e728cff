"""A running host is migrated and taken back: connections live on, nothing denied gets through."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Net
from migration_lab import PlayedHost, load, played_host
from netslot.errors import RefusedError
from netslot.host import tables
from netslot.host.migrate import Journal, Migration
from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.split import split

Files = dict[str, str]
TENANTS = 100


def _split(host: PlayedHost) -> Files:
    dump = parse(host.root.sh("iptables-legacy-save"))
    tenants = attribute(dump).tenants
    result = split(dump, tenants, attachment="process")
    assert result.refused == []
    verdict = prove(dump, survey(dump, tenants), read(result.files))
    assert verdict.equivalent, (verdict.counterexamples[:1], verdict.obstacles)
    return result.files


def _homes(host: PlayedHost) -> dict[str, str]:
    return {name: home.name for name, home in host.homes.items()}


class Line:
    """One connection of a tenant to a server outside, or from outside to the tenant."""

    def __init__(self, near: Net, far: Net, address: str, port: int, answer: str) -> None:
        server = far.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((answer, port))
        server.listen(8)
        server.settimeout(5)
        self.near = near.socket()
        self.near.settimeout(5)
        self.near.connect((address, port))
        self.far, _ = server.accept()
        self.far.settimeout(5)
        server.close()

    def alive(self, word: bytes) -> bool:
        """Say something in both directions, the far side first."""
        try:
            self.far.sendall(word)
            heard = self.near.recv(64)
            self.near.sendall(word[::-1])
            return heard == word and self.far.recv(64) == word[::-1]
        except TimeoutError:
            return False

    def close(self) -> None:
        self.near.close()
        self.far.close()


@contextlib.contextmanager
def _lines(host: PlayedHost) -> Iterator[list[Line]]:
    """For every tenant a connection that its class may make, and one that is made to it."""
    made = []
    try:
        for one in host.rules.tenants:
            place = 20 * one.klass
            home = host.homes[one.name]
            made.append(Line(home, host.outside, f"203.0.113.{place}", 1000 + place, f"203.0.113.{place}"))
        for one in host.rules.tenants[:20]:
            home = host.homes[one.name]
            host.outside.ip(f"route replace {one.address}/32 via 198.18.7.2")
            made.append(Line(host.outside, home, one.address, 8080 + one.klass, one.address))
        yield made
    finally:
        for line in made:
            line.close()


def _probes(host: PlayedHost) -> tuple[socket.socket, list[socket.socket]]:
    """A datagram socket outside that must stay deaf, and one of every tenant that speaks to it."""
    deaf = host.outside.socket(socket.SOCK_DGRAM)
    deaf.bind(("203.0.113.200", 1900))
    deaf.setblocking(False)
    speakers = []
    for one in host.rules.tenants:
        speaker = host.homes[one.name].socket(socket.SOCK_DGRAM)
        speaker.bind((one.address, 5353))
        speakers.append(speaker)
    return deaf, [s for s, one in zip(speakers, host.rules.tenants, strict=True) if one.klass == 0]


@pytest.fixture(scope="module")
def made(host: PlayedHost) -> Files:
    return _split(host)


@pytest.fixture
def files(made: Files) -> Files:
    return dict(made)


@pytest.fixture(scope="module")
def host() -> Iterator[PlayedHost]:
    with played_host(TENANTS) as played:
        yield played


def test_connections_live_and_nothing_denied_gets_through(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    deaf, speakers = _probes(host)

    def speak(_: str = "") -> None:
        for speaker in speakers:
            with contextlib.suppress(PermissionError):  # the slot's own OUTPUT says so to the sender
                speaker.sendto(b"?", ("203.0.113.200", 1900))

    with _lines(host) as lines:
        assert all(line.alive(b"before") for line in lines)
        speak()
        migration = Migration(tmp_path, host.root.fd)
        assert migration.forward(files, _homes(host), None, speak) == TENANTS
        assert migration.in_force() == "new"
        speak()
        lost = [number for number, line in enumerate(lines) if not line.alive(b"after")]
        assert lost == []
        assert len(host.root.sh("iptables-legacy-save").splitlines()) < 300

        held = host.root.sh("iptables-legacy-save")
        Migration(tmp_path, host.root.fd).rollback(speak)
        assert held != host.root.sh("iptables-legacy-save")
        speak()
        assert [number for number, line in enumerate(lines) if not line.alive(b"back")] == []
    with pytest.raises(BlockingIOError):
        deaf.recv(16)


def test_rollback_restores_every_byte_of_rules(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    home = next(iter(host.homes.values()))
    load(home, "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 9 -j DROP\nCOMMIT\n")
    before = tables.plain(host.root.sh("iptables-legacy-save"))
    inside = tables.plain(home.sh("iptables-legacy-save"))
    migration = Migration(tmp_path, host.root.fd)
    migration.forward(files, _homes(host), None, lambda _: None)
    assert "netslot-publish" in host.root.sh("nft list tables")
    Migration(tmp_path, host.root.fd).rollback(lambda _: None)
    assert tables.plain(host.root.sh("iptables-legacy-save")) == before
    assert tables.plain(home.sh("iptables-legacy-save")) == inside
    assert "netslot-publish" not in host.root.sh("nft list tables")
    load(home, "*filter\nCOMMIT\n")


def test_one_tenant_first_and_then_the_others(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    migration = Migration(tmp_path, host.root.fd)
    assert migration.forward(files, _homes(host), "tap3", lambda _: None) == 1
    assert migration.in_force() == "old"
    again = Migration(tmp_path, host.root.fd)
    assert again.forward(files, _homes(host), None, lambda _: None) == TENANTS - 1
    again.rollback(lambda _: None)


@pytest.mark.parametrize("step", range(5))
def test_a_crash_leaves_the_old_rules_or_the_new_ones(
    host: PlayedHost, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stop at the n-th write of the journal; the next run says what is in force, and goes on."""
    few = set(list(host.homes)[:2])
    manifest = json.loads(files["tenants.json"])
    files["tenants.json"] = json.dumps(manifest | {"tenants": [t for t in manifest["tenants"] if t["name"] in few]})
    written = 0
    honest = Journal.write

    def dying(self: Journal) -> None:
        nonlocal written
        written += 1
        if written == step + 2:
            raise KeyboardInterrupt
        honest(self)

    monkeypatch.setattr(Journal, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        Migration(tmp_path, host.root.fd).forward(files, _homes(host), None, lambda _: None)
    monkeypatch.setattr(Journal, "write", honest)
    after_crash = Migration(tmp_path, host.root.fd)
    assert after_crash.in_force() in ("old", "new")
    after_crash.forward(files, _homes(host), None, lambda _: None)
    assert after_crash.in_force() == "new"
    after_crash.rollback(lambda _: None)
    assert after_crash.in_force() == "old"


def test_rules_that_changed_since_the_split_are_left_alone(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    host.root.sh("iptables-legacy -A INPUT -p udp --dport 9 -j DROP")
    try:
        with pytest.raises(RefusedError, match="not those that were split"):
            Migration(tmp_path, host.root.fd).forward(files, _homes(host), None, lambda _: None)
    finally:
        host.root.sh("iptables-legacy -D INPUT -p udp --dport 9 -j DROP")


def test_tenants_without_a_namespace_are_named(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="100 tenants have no namespace") as refusal:
        Migration(tmp_path, host.root.fd).forward(files, {}, None, lambda _: None)
    assert "netslot up" in str(refusal.value.hint)
