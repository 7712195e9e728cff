"""A roster beside the spec: what slots it makes, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netslot.errors import SpecError, UsageError
from netslot.spec.load import parse
from netslot.spec.model import HostSpec

HEAD = 'uplink = "eth0"\nroster = "who.json"\n[root]\npreset = false\nbackend = "iptables-legacy"\n'
CLASSES = "[class.a]\n[class.b.attachment]\nkind = 'process'\n"


def entry(number: int, **more: Any) -> dict[str, Any]:
    fields = {"name": f"t{number}", "class": "a", "link": f"tap{number}", "addresses": [f"10.0.0.{number}"]}
    return {**fields, "gateways": [f"10.0.1.{number}"], **more}


def load(*entries: dict[str, Any], text: str = HEAD + CLASSES, numbers: dict[str, int] | None = None) -> HostSpec:
    files = {"who.json": json.dumps({"tenants": entries, "somebody": "else's"})}
    return parse(text, Path("netslot.toml"), files=files, numbers=numbers)


def test_the_list_says_how_many_slots_there_are_and_whose() -> None:
    spec = load(entry(1), entry(2), entry(3, **{"class": "b"}))
    assert spec.slots == 3
    assert spec.by_tenant == {"t1": (1, "a"), "t2": (2, "a"), "t3": (3, "b")}
    assert spec.missing({}) == [(1, "a"), (2, "a"), (3, "b")]
    assert spec.missing({2: "a", 4: "a"}) == [(1, "a"), (3, "b")]
    assert spec.surplus({2: "a", 4: "a"}) == {}, "which ones are too many is known by name"
    assert not spec.ipv6


def test_a_tenant_keeps_its_number_wherever_it_stands() -> None:
    spec = load(entry(3), entry(1), entry(9), numbers={"t1": 5, "t9": 2})
    assert {name: number for name, (number, _) in spec.by_tenant.items()} == {"t3": 1, "t1": 5, "t9": 2}


def test_a_slot_has_the_tenants_own_values() -> None:
    one = entry(
        1,
        addresses=["2001:db8::/64", "10.0.0.1", "10.0.7.0/29"],
        gateways=["10.0.1.1/32", "2001:db8:1::1"],
        variables={"address": "10.0.0.1/32", "colour": "green"},
    )
    values = load(one, numbers={"t1": 17}).values(17, "a")
    wanted = {
        "tenant": "t1",
        "slot": "17",
        "netns": "slot17",
        "root_if": "tap1",
        "address": "10.0.0.1/32",
        "address_2": "10.0.7.0/29",
        "address6": "2001:db8::/64",
        "gateway": "10.0.1.1",
        "gateway6": "2001:db8:1::1",
        "guest_if": "tap0",
        "colour": "green",
    }
    assert {name: values.get(name) for name in wanted} == wanted
    assert not {"root_address", "guest_mac", "pool", "network6"} & values.keys()


def test_slots_of_a_roster_and_numbered_ones_live_on_one_host() -> None:
    text = HEAD + '[addresses]\npool = "10.9.0.0/16"\n[class.a]\n[class.c]\nslots = 2\n'
    spec = load(entry(1), text=text)
    assert spec.missing({}) == [(1, "a"), (2, "c"), (3, "c")]
    assert spec.missing({1: "a", 2: "c"}) == [(3, "c")]
    assert spec.values(2, "c")["address"] == "10.9.0.5"
    with pytest.raises(SpecError, match="t1: in the pool"):
        load(entry(1, addresses=["10.9.0.5"]), text=text)


def test_what_a_slot_is_made_of_has_a_part_that_is_the_tenants() -> None:
    before, after = load(entry(1), entry(2)), load(entry(1, gateways=["10.0.1.9"]), entry(2))
    assert before.digest(2, "a") == after.digest(2, "a")
    same, changed = (spec.digest(1, "a").partition("-") for spec in (before, after))
    assert same[0] == changed[0]
    assert same[2] != changed[2]


def test_toml_is_a_roster_too() -> None:
    text = '[[tenants]]\nname = "t1"\nclass = "a"\naddresses = ["10.0.0.1"]\n'
    spec = parse(HEAD.replace("who.json", "who.toml") + CLASSES, Path("netslot.toml"), files={"who.toml": text})
    assert spec.values(1, "a")["root_if"] == "slot1"


def test_nobody_in_a_class_is_no_error() -> None:
    assert load().slots == 0
    with pytest.raises(UsageError, match="no numbered addresses"):
        load().values(1, "a")


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a key": ([entry(1, lnik="x")], "who.json: tenants[0]: Object contains unknown field 'lnik'"),
    "no address": ([entry(1, addresses=[])], "tenants[0].addresses"),
    "an address": ([entry(1, addresses=["10.0.0.300"])], "'10.0.0.300' does not appear to be"),
    "host bits": ([entry(1, addresses=["10.0.0.1/24"])], "has host bits set"),
    "a class": ([entry(1, **{"class": "x"})], "names a class x that the spec does not have"),
    "one name": ([entry(1), entry(2, name="t1")], "name t1 is t1's already"),
    "one link": ([entry(1), entry(2, link="tap1")], "link tap1 is t1's already"),
    "one address": ([entry(1), entry(2, addresses=["10.0.0.0/30"])], "overlaps with one of"),
    "a gateway that is a tenant": (
        [entry(1), entry(2, gateways=["10.0.0.1"])],
        "gateway 10.0.0.1 is an address of t1's",
    ),
    "a variable": ([entry(1, variables={"address": "10.0.0.9"})], "variable address is 10.0.0.9, but"),
    "another shape": ([entry(1), entry(2, addresses=["10.0.0.2", "10.0.0.3"])], "t2: not as many addresses"),
    "a process with a network": ([entry(1, addresses=["10.0.2.0/24"], **{"class": "b"})], "not networks"),
    "the uplink": ([entry(1, link="eth0")], "eth0: a link of that name is somebody else's"),
    "a slot's link": ([entry(1, link="slot7")], "slot7: a link of that name is somebody else's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    entries, message = WRONG[name]
    with pytest.raises(SpecError) as caught:
        load(*entries)
    assert message in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[class.a]\nslots = 3\n", "class.a.slots: the roster has tenants of this class"),
        ("[class.a.nat]\nkind = 'bpf'\n", "residents keep their addresses"),
        ("[class.a]\n[class.c]\nslots = 1\n", "'pool' is missing"),
    ],
)
def test_sections_that_do_not_fit_a_roster(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(entry(1), text=HEAD + text)
    assert message in str(caught.value)


def test_a_roster_that_is_not_there() -> None:
    with pytest.raises(SpecError, match=r"cannot read nowhere\.json"):
        parse(HEAD.replace("who.json", "nowhere.json") + CLASSES, Path("netslot.toml"))
