"""The settings of a slot's links that depend on no rules: verify sees to them, and what is inherited is undone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import attack_lab
import lab
from attack_lab import Kind, Scene
from netslot.kernel.sysctl import Sysctls

WANTED = {"rp_filter": "1", "arp_ignore": "1", "arp_accept": "0", "proxy_arp": "0", "accept_source_route": "0"}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with attack_lab.scene(Kind("nftables", "tap"), tmp_path / "host") as each:
        yield each


def setting(place: lab.Place, link: str, name: str) -> str:
    return place.sh(f"sysctl -n net.ipv4.conf.{link}.{name}").strip()


def test_both_links_to_a_tenant_distrust_it_and_verify_keeps_it_so(scene: Scene) -> None:
    assert scene.plan.guest_if is not None
    for place, link in ((scene.slot, scene.plan.guest_if), (scene.root, scene.plan.root_if)):
        for name, value in WANTED.items():
            assert setting(place, link, name) == value, (link, name)
            place.sh(f"sysctl -qw net.ipv4.conf.{link}.{name}={1 - int(value)}")
            assert scene.host.verify().drift, (link, name)
            scene.mend()
            assert setting(place, link, name) == value, (link, name)
            assert scene.host.verify().drift == []


def test_what_a_new_namespace_takes_over_is_set_right() -> None:
    """Machines may have set it; which are to be written is found once, in the first namespace."""
    name, wanted = (
        "net/ipv4/conf/all/rp_filter",
        {"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/all/proxy_arp": "0"},
    )
    with lab.nets("first", "second", "third") as places:
        for place in places:
            place.sh("sysctl -qw net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.all.proxy_arp=0")
        with_one = Sysctls()
        for place in places[:2]:
            place.run(with_one.insist, wanted)
            assert place.run(with_one.read, name) == "0"
        with_one.close()
        assert setting(places[2], "all", "rp_filter") == "2"
