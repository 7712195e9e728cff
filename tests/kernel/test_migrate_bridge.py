"""Containers behind one bridge, as Docker has them: their rules stay in root, with sets, and are exchanged there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge_lab import CONTAINERS, Bridge, own
from lab import nets
from migration_lab import Traffic
from netslot.errors import RefusedError
from netslot.host import tables
from netslot.host.migrate import Migration


@pytest.fixture(params=["legacy", "nft"])
def bridge(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    with nets("root", "out", *(f"c{number}" for number in range(CONTAINERS))) as (root, outside, *containers):
        yield Bridge(root, outside, containers, request.param)


def test_containers_are_moved_and_taken_back_under_traffic(
    bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, before = bridge.split(), tables.plain(bridge.save())
    restore = tables.restore

    def slow(*arguments: Any, **options: Any) -> None:
        restore(*arguments, **options)
        time.sleep(0.3 if options.get("keep") else 0)

    monkeypatch.setattr(tables, "restore", slow)
    with Traffic(tmp_path, bridge.plan()) as traffic:
        times = [time.monotonic()]
        assert Migration(tmp_path, bridge.root.fd).forward(files, {}, None, lambda _: None) == 0
        times.append(time.monotonic())
        after = bridge.save()
        assert "--match-set netslot-0" in after and own(1) + "/32" not in after.partition("*filter")[2]
        traffic.wake()
        time.sleep(2.5)
        times.append(time.monotonic())
        Migration(tmp_path, bridge.root.fd).rollback(lambda _: None)
        times.append(time.monotonic())
        time.sleep(2.5)
        seen = traffic.end()
    assert min(seen.between(*times[:2]), seen.between(*times[2:])) > 3
    assert (seen.lost, seen.refused, seen.breaches) == ({}, {}, {})
    assert tables.plain(bridge.save()) == before
    assert "netslot" not in bridge.root.sh("ipset list -n")


def test_sets_of_the_same_name_and_tenants_without_a_slot(bridge: Bridge, tmp_path: Path) -> None:
    files, before = bridge.split(), bridge.save()
    bridge.root.sh("ipset create netslot-0 hash:ip")
    with pytest.raises(RefusedError, match="has a set called netslot-0 already"):
        Migration(tmp_path, bridge.root.fd).forward(files, {}, None, lambda _: None)
    bridge.root.sh("ipset destroy netslot-0")
    with pytest.raises(RefusedError, match="no tenant c1 with a slot"):
        Migration(tmp_path, bridge.root.fd).forward(files, {}, "c1", lambda _: None)
    assert bridge.save() == before
