from __future__ import annotations

from ipaddress import IPv4Interface, IPv6Network
from pathlib import Path

import pytest

from netslot.errors import UsageError
from netslot.spec import variables
from netslot.spec.load import parse
from netslot.spec.model import HostSpec, mac

HEAD = 'uplink = "eth0"\n'
ADDRESSES = '[addresses]\npool = "10.201.0.0/16"\npool6 = "fd5c:a7e:10::/48"\ndns = ["192.0.2.53", "2001:db8::53"]\n'


def spec(text: str) -> HostSpec:
    return parse(HEAD + text, Path("netslot.toml"))


def classes(small: int, big: int) -> HostSpec:
    return spec(ADDRESSES + f"[class.small]\nslots = {small}\n[class.big]\nslots = {big}\n")


def test_the_first_build_numbers_class_after_class() -> None:
    assert classes(2, 1).missing({}) == [(1, "small"), (2, "small"), (3, "big")]


def test_built_slots_keep_number_and_class_when_another_class_grows() -> None:
    built = {1: "small", 2: "small", 3: "big"}
    assert classes(4, 1).missing(built) == [(4, "small"), (5, "small")]
    assert classes(4, 1).surplus(built) == {}


def test_gaps_are_filled_first_and_surplus_is_counted_by_class() -> None:
    built = {1: "small", 3: "big", 4: "gone"}
    assert classes(2, 0).missing(built) == [(2, "small")]
    assert classes(2, 0).surplus(built) == {"big": 1, "gone": 1}


def test_a_number_without_an_address_is_refused_before_it_is_built() -> None:
    tiny = spec('slots = 3\n[addresses]\npool = "10.0.0.0/29"\n')
    assert tiny.addresses.capacity() == 3
    with pytest.raises(UsageError, match="slot 4 has no address"):
        tiny.missing({1: "other", 2: "default", 3: "default"})


def test_no_two_slots_share_an_address_or_a_mac() -> None:
    host = spec("slots = 300\n" + ADDRESSES)
    seen: set[str] = set()
    for slot in range(1, 301):
        values = host.values(slot)
        own = {values[name] for name in ("address", "root_address", "address6", "root_address6", "network6")}
        own |= {values["uplink_mac"], values["root_mac"], values["netns"]}
        assert len(own) == 8
        assert not own & seen
        seen |= own


def test_the_ends_of_a_link_are_a_pair_of_the_pool() -> None:
    plan = spec("slots = 4\n" + ADDRESSES).addresses
    assert plan.pair(17) == (IPv4Interface("10.201.0.34/31"), IPv4Interface("10.201.0.35/31"))
    assert plan.network6(17) == IPv6Network("fd5c:a7e:10:11::/64")
    assert all(end.ip in plan.network6(17) for end in plan.pair6(17))


def test_a_narrow_ipv6_pool_gives_every_slot_a_pair() -> None:
    plan = spec('slots = 4\n[addresses]\npool = "10.0.0.0/24"\npool6 = "fd00::/120"\n').addresses
    assert plan.network6(3) == IPv6Network("fd00::6/127")
    assert [str(end) for end in plan.pair6(3)] == ["fd00::6/127", "fd00::7/127"]


def test_every_value_is_a_documented_variable_and_the_other_way_round() -> None:
    full = spec("slots = 4\n" + ADDRESSES + "[cgroup]\npids = 100\n")
    assert set(full.values(1)) == set(variables.ALL) - set(variables.RESIDENT)
    assert set(full.root_values()) == set(variables.HOST)
    bare = spec('slots = 4\n[addresses]\npool = "10.0.0.0/16"\n[attachment]\nkind = "process"\n').values(1)
    assert set(bare) < set(variables.ALL)
    assert not set(bare) & set(variables.GUEST)
    assert not [name for name in bare if name.endswith("6")]


def test_scalar_parameters_are_values_and_lists_are_not() -> None:
    text = (
        "slots = 1\n" + ADDRESSES + "[parameters.speed]\ntype = 'rate'\ndefault = '1M'\n"
        "[parameters.allow]\ntype = 'cidrs'\ndefault = ['10.0.0.0/8']\n"
    )
    each = spec(text).classes["default"]
    assert spec(text).values(1)["speed"] == "1000000"
    assert "allow" not in spec(text).values(1)
    assert each.lists == {"allow": "cidrs"}
    assert each.bind({"speed": "2M"}) == {"speed": "2000000", "allow": ("10.0.0.0/8",)}
    with pytest.raises(UsageError, match="no parameter 'sped'"):
        each.bind({"sped": "2M"})


def test_macs_are_local_unicast_and_tell_the_ends_apart() -> None:
    assert mac(4000, 0) == "02:6e:00:00:0f:a0"
    assert mac(4000, 1) == "02:6e:01:00:0f:a0"


def test_the_digest_follows_the_template_not_the_number_of_slots(tmp_path: Path) -> None:
    def digest(slots: int, rules: str, mtu: int = 1500) -> str:
        (tmp_path / "slot.nft").write_text(rules)
        text = f'{HEAD}slots = {slots}\n{ADDRESSES}[attachment]\nmtu = {mtu}\n[rules]\nnft = "slot.nft"\n'
        return parse(text, tmp_path / "netslot.toml").classes["default"].digest

    assert digest(1, "table ip a {}") == digest(2, "table ip a {}")
    assert len({digest(1, "table ip a {}"), digest(1, "table ip b {}"), digest(1, "table ip a {}", 1400)}) == 3
