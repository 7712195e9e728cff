"""A running host is migrated and taken back: connections live on, nothing denied gets through, at no moment."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lab import Net
from migration_lab import (
    PlayedHost,
    Traffic,
    address,
    dump_of,
    hush,
    load,
    people,
    plan_of,
    played_host,
    prove_host,
    same_bytes,
    same_rules,
    split_host,
    still,
)
from netslot.errors import RefusedError
from netslot.host import tables
from netslot.host.migrate import Migration
from netslot.host.migration_homes import Homes
from netslot.kernel import netns
from netslot.rulesets.model import Ruleset
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove

Files = dict[str, str]
TENANTS = 100
LONG = 2.5  # seconds, more than the traffic's patience


def quiet(_: str) -> None:
    """What a test has no use for hearing."""


def uncounted(text: str) -> str:
    """A saved text whose rules have counted nothing."""
    return re.sub(r"^\[\d+:\d+\] -A", "[0:0] -A", text, flags=re.MULTILINE)


def migration(host: PlayedHost, state: Path) -> Migration:
    return Migration(state, host.root.fd)


@pytest.fixture(scope="module")
def host() -> Iterator[PlayedHost]:
    with played_host(6, families=(4, 6)) as played:
        yield played


@pytest.fixture(scope="module")
def made(host: PlayedHost) -> Files:
    result = split_host(host)
    assert result.refused == []
    return result.files


@pytest.fixture
def files(made: Files) -> Files:
    return dict(made)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state on the way lasts long enough for several sweeps of traffic."""
    restore, stamp = tables.restore, Homes.stamp

    def slow_restore(*arguments: Any, **options: Any) -> None:
        restore(*arguments, **options)
        if options.get("keep"):
            time.sleep(0.15)

    def slow_stamp(self: Homes, *arguments: Any) -> None:
        stamp(self, *arguments)
        time.sleep(0.01)

    monkeypatch.setattr(tables, "restore", slow_restore)
    monkeypatch.setattr(Homes, "stamp", slow_stamp)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    ("attachment", "variant", "tenants"),
    [
        ("process", "legacy", TENANTS),
        ("process", "nft", 6),
        ("veth", "legacy", 6),
        ("tap", "nft", 6),
    ],
)
def test_no_connection_is_lost_and_nothing_denied_gets_through(
    attachment: Any, variant: str, tenants: int, tmp_path: Path
) -> None:
    with played_host(tenants, families=(4, 6), attachment=attachment, variant=variant) as host:
        files = split_host(host).files
        assert prove_host(host, files).equivalent
        with Traffic(tmp_path, plan_of(host)) as traffic:
            times = [time.monotonic()]
            assert migration(host, tmp_path).forward(files, {}, None, quiet) == tenants
            times.append(time.monotonic())
            assert migration(host, tmp_path).status().in_force == "new"
            traffic.wake()
            time.sleep(LONG)
            times.append(time.monotonic())
            migration(host, tmp_path).rollback(quiet)
            times.append(time.monotonic())
            time.sleep(LONG)
            seen = traffic.end()
    there, between, back = (seen.between(*span) for span in pairwise(times))
    assert min(there, between, back) > 5, (there, between, back)
    assert (seen.lost, seen.refused, seen.breaches) == ({}, {}, {})


def test_the_traffic_notices(tmp_path: Path) -> None:
    """Without rules everything denied gets through; without the slots' accepts nothing allowed does."""
    with played_host(3) as host:
        with Traffic(tmp_path, plan_of(host)) as traffic:
            load(host.root, "*raw\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")
            time.sleep(LONG)
            seen = traffic.end()
        assert set(seen.breaches) == set(traffic.plan["denied"]) | set(traffic.plan["knocks"])
        assert not seen.lost and not seen.refused
    with played_host(3) as host, Traffic(tmp_path, plan_of(host)) as traffic:
        for home in host.homes.values():
            load(home, "*filter\n:INPUT DROP [0:0]\n:OUTPUT DROP [0:0]\nCOMMIT\n")
        traffic.wake()
        time.sleep(LONG)
        seen = traffic.end()
    assert set(seen.lost) == {name + more for name in traffic.plan["lines"] for more in ("", ", asleep")}
    assert {name.split(":")[0] for name in seen.refused} == set(traffic.plan["calls"]) | set(
        traffic.plan["questions"]
    )


def test_every_state_on_the_way_is_proved(host: PlayedHost, files: Files) -> None:
    """Slots have their rules, and root some of the new tables, as the exchange leaves it."""
    dump, after = dump_of(host), read(files)
    world = survey(dump, people(host))
    for done in range(len(tables.ORDER)):
        root: dict[Any, Ruleset] = {}
        for family, new in after.root.items():
            old = dump.family(family)
            assert old is not None
            published = {"nat": new.tables["nat"]}  # the nft table is there before the first exchange
            mixed = {name: (new if name in tables.ORDER[:done] else old).tables[name] for name in old.tables}
            if done <= tables.ORDER.index("nat"):
                chains = dict(old.tables["nat"].chains)
                first = published["nat"].chains["PREROUTING"]
                rules = (*first.rules, *chains["PREROUTING"].rules)
                chains["PREROUTING"] = dataclasses.replace(chains["PREROUTING"], rules=rules)
                mixed["nat"] = dataclasses.replace(old.tables["nat"], chains=chains)
            root[family] = dataclasses.replace(new, tables=mixed)
        verdict = prove(dump, world, dataclasses.replace(after, root=root))
        assert verdict.equivalent, (done, verdict.counterexamples[:1], verdict.obstacles)


@pytest.mark.parametrize("attachment", ["process", "veth"])
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_rollback_restores_every_byte(attachment: Any, variant: str, tmp_path: Path) -> None:
    """Counters too: those of the moment in which root was exchanged."""
    with played_host(3, families=(4, 6), attachment=attachment, variant=variant) as host:
        home = next(iter(host.homes.values()))
        if variant == "legacy":  # a table that was looked at, and has counted
            home.sh("iptables-legacy -L; ping -c 3 -i 0.01 127.0.0.1")
        host.root.sh("ping -c 5 -i 0.01 127.0.0.1")
        hush(host)
        before, publish = still(host), host.root.sh("nft list tables | sort")
        assert "[10:840]" in before["root IPv4"]
        migration(host, tmp_path).forward(split_host(host).files, {}, None, quiet)
        assert "netslot-publish" in host.root.sh("nft list tables")
        assert not set(host.everything().items()) & set(before.items())
        heard: list[str] = []
        migration(host, tmp_path).rollback(heard.append)
        if any("count from zero: ip6tables-nft-restore lost" in text for text in heard):
            assert variant == "nft"
            before["root IPv6"] = uncounted(before["root IPv6"])
        assert same_bytes(host, before) == []
        assert host.root.sh("nft list tables | sort") == publish
        assert migration(host, tmp_path).status().state == "none"


def test_one_tenant_first_and_then_the_others(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    one = host.homes["tap3"]
    assert migration(host, tmp_path).forward(files, {}, "tap3", quiet) == 1
    assert "netslot-out" in host.save(4, one) and "netslot-out" in host.save(6, one)
    assert "netslot-out" not in host.save(4, host.homes["tap2"])
    status = migration(host, tmp_path).status()
    assert (status.state, status.slots, status.in_force) == ("slots", 1, "old")
    assert migration(host, tmp_path).forward(files, {}, "tap3", quiet) == 0
    assert migration(host, tmp_path).forward(files, {}, None, quiet) == 5
    with pytest.raises(RefusedError, match="has been migrated"):
        migration(host, tmp_path).forward(files, {}, None, quiet)
    migration(host, tmp_path).rollback(quiet)
    with pytest.raises(RefusedError, match="no tenant tap99 with a slot"):
        migration(host, tmp_path).forward(files, {}, "tap99", quiet)
    with pytest.raises(RefusedError, match="nothing has been migrated"):
        migration(host, tmp_path).rollback(quiet)


def test_rules_that_changed_since_the_split_are_shown(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    before = host.everything()
    host.root.sh("ip6tables-legacy -A INPUT -p udp --dport 9 -j DROP")
    try:
        with pytest.raises(RefusedError, match="IPv6 rules are not those that were split") as refusal:
            migration(host, tmp_path).forward(files, {}, None, quiet)
        assert "+ filter: -A INPUT -p udp -m udp --dport 9 -j DROP" in str(refusal.value)
    finally:
        host.root.sh("ip6tables-legacy -D INPUT -p udp --dport 9 -j DROP")
    assert same_rules(host, before) == []


def test_rules_that_change_between_two_runs_are_shown_and_kept(
    host: PlayedHost, files: Files, tmp_path: Path
) -> None:
    rule = "INPUT -s 192.0.2.77/32 -j DROP"
    before = host.everything()
    migration(host, tmp_path).forward(files, {}, "tap1", quiet)
    host.root.sh(f"iptables-legacy -A {rule}")
    with pytest.raises(RefusedError, match="somebody has changed root's IPv4 table filter") as refusal:
        migration(host, tmp_path).forward(files, {}, None, quiet)
    assert f"+ filter: -A {rule}" in str(refusal.value)
    host.root.sh(f"iptables-legacy -D {rule}")
    migration(host, tmp_path).forward(files, {}, None, quiet)
    host.root.sh(f"iptables-legacy -A {rule}")
    heard: list[str] = []
    migration(host, tmp_path).rollback(heard.append)
    assert any(f"+ filter: -A {rule}" in text for text in heard)
    assert rule in (tmp_path / "replaced-by-rollback.v4.filter").read_text()
    assert same_rules(host, before) == []


def test_another_directory_is_not_gone_on_with(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    migration(host, tmp_path).forward(files, {}, "tap1", quiet)
    with pytest.raises(RefusedError, match="to other rules than this directory's"):
        migration(host, tmp_path).forward(files | {"root.rules": files["root.rules"] + "\n"}, {}, None, quiet)
    migration(host, tmp_path).rollback(quiet)


def nameless(files: Files) -> Files:
    """The directory of a split that was not told where tenants live."""
    manifest = json.loads(files["tenants.json"])
    bare = [tenant | {"netns": ""} for tenant in manifest["tenants"]]
    return files | {"tenants.json": json.dumps(manifest | {"tenants": bare})}


def test_tenants_without_a_namespace_are_named(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"6 tenants have no namespace.* and 2 more") as refusal:
        migration(host, tmp_path).forward(nameless(files), {}, None, quiet)
    assert "netslot up" in str(refusal.value.hint)
    homes = {name: home.name for name, home in host.homes.items()} | {"tap4": "nowhere"}
    with pytest.raises(RefusedError, match=r"1 tenants have no namespace.*tap4 \(no namespace nowhere\)") as refusal:
        migration(host, tmp_path).forward(nameless(files), homes, None, quiet)
    assert "a pair from its tap4 in root to up0 in it" in str(refusal.value.hint)
    assert migration(host, tmp_path).status().state == "none"


def test_a_namespace_can_be_given_as_a_path(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    homes = {name: f"/run/netns/{home.name}" for name, home in host.homes.items()}
    assert migration(host, tmp_path).forward(nameless(files), homes, "tap2", quiet) == 1
    migration(host, tmp_path).rollback(quiet)


def test_a_namespace_with_another_link_is_refused(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    homes = {"tap1": host.homes["tap2"].name}
    with pytest.raises(RefusedError, match=r"tap1: 0 links of namespace .* are pairs with tap1 in root"):
        migration(host, tmp_path).forward(files, homes, None, quiet)


@pytest.mark.parametrize(
    ("rules", "undo", "said"),
    [
        ("iptables-legacy -A OUTPUT -p tcp --dport 9 -j DROP", "iptables-legacy -F", "1 rules in iptables filter"),
        (
            "ip6tables-legacy -t raw -P OUTPUT DROP",
            "ip6tables-legacy -t raw -P OUTPUT ACCEPT",
            "0 rules in ip6tables raw",
        ),
        ("nft add table inet theirs", "nft delete table inet theirs", "nft table inet theirs"),
    ],
)
def test_rules_of_the_tenants_own_are_not_touched(
    host: PlayedHost, files: Files, tmp_path: Path, rules: str, undo: str, said: str
) -> None:
    home = host.homes["tap5"]
    home.sh(rules)
    before, theirs = host.everything(), home.sh("nft list ruleset")
    with pytest.raises(RefusedError, match=rf"1 namespaces hold rules of their own: tap5 \(namespace .*{said}"):
        migration(host, tmp_path).forward(files, {}, None, quiet)
    assert same_rules(host, before) == []
    assert home.sh("nft list ruleset") == theirs
    home.sh(undo)


def test_rules_that_appear_between_two_runs_are_not_touched(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    home = host.homes["tap1"]
    migration(host, tmp_path).forward(files, {}, "tap1", quiet)
    home.sh("iptables-legacy -A OUTPUT -p tcp --dport 9 -j DROP")
    with pytest.raises(
        RefusedError, match=r"tap1: what namespace .* holds has been changed since: .*iptables filter"
    ):
        migration(host, tmp_path).forward(files, {}, None, quiet)
    assert migration(host, tmp_path).status().in_force == "old"
    heard: list[str] = []
    migration(host, tmp_path).rollback(heard.append)
    assert any("tap1" in text and "replaced-by-rollback" in text for text in heard)
    kept = "".join(path.read_text() for path in tmp_path.glob("replaced-by-rollback.*"))
    assert "-A OUTPUT -p tcp -m tcp --dport 9 -j DROP" in kept


def test_rules_that_ask_for_the_group_of_a_link_stand_in_the_way(tmp_path: Path) -> None:
    with played_host(2) as host:
        host.root.sh("iptables-legacy -I INPUT -m devgroup --src-group 7 -j DROP")
        files = split_host(host).files
        with pytest.raises(RefusedError, match="--src-group 0x7"):
            migration(host, tmp_path).forward(files, {}, None, quiet)


def test_neighbours_are_found_in_the_slot_as_before(host: PlayedHost, files: Files, tmp_path: Path) -> None:
    """Also by a tenant whose rules end with a drop: discovery is between it and the host."""
    home, root = host.homes["tap3"], host.root
    gateway = address(next(one.gateway for one in host.tenants() if one.name == "tap3"), 6)
    migration(host, tmp_path).forward(files, {}, None, quiet)
    try:
        assert "-A netslot-out -j DROP" in host.save(6, home).replace("[0:0] ", "")
        for net, link in ((home, "eth0"), (root, "tap3")):
            net.sh(f"ip -6 neigh flush dev {link}")
        home.sh(f"ping -c 1 -W 2 {gateway} || true")
        assert "lladdr" in home.sh(f"ip -6 neigh show {gateway}")
    finally:
        migration(host, tmp_path).rollback(quiet)


def test_a_namespace_that_goes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its turn, and after it: root keeps its old rules, and what was done is taken back where it still is."""
    with played_host(3) as host:
        files, victim = split_host(host).files, host.homes["tap1"].name
        before = host.save(4)
        track = Homes.track

        def going(self: Homes, place: str) -> None:
            if place == victim:
                netns.unpin(victim)
            track(self, place)

        monkeypatch.setattr(Homes, "track", going)
        with pytest.raises(RefusedError, match=f"namespace {victim} has gone"):
            migration(host, tmp_path).forward(files, {}, None, quiet)
        monkeypatch.undo()
        with pytest.raises(RefusedError, match="1 tenants have no namespace of their own: tap1"):
            migration(host, tmp_path).forward(files, {}, None, quiet)
        assert host.save(4) == before
        replaced = Net("other")
        netns.pin(victim, replaced.fd)
        with pytest.raises(RefusedError, match="tap1: 0 links of namespace"):
            migration(host, tmp_path).forward(files, {}, None, quiet)
        netns.unpin(victim)
        replaced.close()
        heard: list[str] = []
        migration(host, tmp_path).rollback(heard.append)
        assert "tap1: the namespace has gone, and its rules with it" in heard
        assert host.save(4) == before
        assert "netslot" not in host.save(4, host.homes["tap0"])
