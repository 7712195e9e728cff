"""Owners in further shapes of products: port maps of CNI, several cards of a guest, dial-in servers."""

from __future__ import annotations

import pytest

from netslot.rulesets.attribute import GLOBAL, SHARED, attribute
from netslot.rulesets.audit import audit
from netslot.rulesets.classes import classes_of
from netslot.rulesets.model import Dump
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.split import split


def _table(name: str, chains: str, *lines: str) -> str:
    hooks = {"nat": "PREROUTING OUTPUT POSTROUTING", "filter": "INPUT FORWARD OUTPUT"}[name]
    declared = [f":{chain} ACCEPT [0:0]" for chain in hooks.split()] + [
        f":{chain} - [0:0]" for chain in chains.split()
    ]
    return "\n".join([f"*{name}", *declared, *(f"-A {line}" for line in lines), "COMMIT", ""])


def _owners(dump: Dump) -> dict[str, str]:
    attribution = attribute(dump)
    words = {GLOBAL: "global", SHARED: "shared"}
    return {
        f"{chain.name} {rule.text}": words.get(who := attribution.owner[rule]) or attribution.tenants[who].name
        for ruleset in dump.rulesets
        for _, chain, rule in ruleset.rules()
    }


def _portmap(*ports: int) -> Dump:
    lines = ["PREROUTING -m addrtype --dst-type LOCAL -j MAPS", "MARKIT -j MARK --set-xmark 0x2000/0x2000"]
    for number, port in enumerate(ports, 5):
        own, engine = f"10.7.0.{number}", f'name: \\"net\\" id: \\"{str(number) * 64}\\"'
        lines += [
            f'POSTROUTING -s {own}/32 -m comment --comment "{engine}" -j OUT-{number}',
            f"OUT-{number} ! -d 224.0.0.0/4 -j MASQUERADE",
            f"MAPS -p tcp -m multiport --dports {port} -j MAP-{number}",
            f"MAP-{number} -s 10.7.0.0/24 -d 192.0.2.9/32 -p tcp -m tcp --dport {port} -j MARKIT",
            f"MAP-{number} -s 127.0.0.1/32 -d 192.0.2.9/32 -p tcp -m tcp --dport {port} -j MARKIT",
            f"MAP-{number} -d 192.0.2.9/32 -p tcp -m tcp --dport {port} -j DNAT --to-destination {own}:80",
        ]
    chains = " ".join(f"OUT-{number} MAP-{number}" for number in range(5, 5 + len(ports)))
    return parse(_table("nat", f"MAPS MARKIT {chains}", *lines))


def test_chains_that_publish_for_one_tenant_each_are_these_tenants() -> None:
    dump = _portmap(8080, 9443)
    owners = _owners(dump)
    assert [tenant.name for tenant in attribute(dump).tenants] == [f"net/{'5' * 12}", f"net/{'6' * 12}"]
    assert [str(a) for x in attribute(dump).tenants for a in x.addresses] == ["10.7.0.5/32", "10.7.0.6/32"]
    common = [text for text, owner in owners.items() if owner in ("global", "shared")]
    assert common == [
        "PREROUTING -m addrtype --dst-type LOCAL -j MAPS",
        "MARKIT -j MARK --set-xmark 0x2000/0x2000",
    ]
    assert classes_of(attribute(dump)) == [0, 0]


def test_an_engines_chain_is_not_the_only_containers() -> None:
    owners = _owners(_portmap(8080))
    assert owners["MAPS -p tcp -m multiport --dports 8080 -j MAP-5"] == "global"


def test_an_address_at_which_much_is_published_is_no_tenant() -> None:
    lines = (
        "PREROUTING -d 192.0.2.9/32 -p tcp -j AT-9",
        "AT-9 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.7.0.5",
    )
    found = attribute(parse(_table("nat", "AT-9", *lines))).tenants
    assert [str(address) for tenant in found for address in tenant.addresses] == ["10.7.0.5/32"]


def test_cards_numbered_by_guest_and_card() -> None:
    lines = [f"FORWARD -m physdev --physdev-in one-{card} -j DROP" for card in ("5-0", "7-0", "7-1")]
    found = attribute(parse(_table("filter", "", *lines))).tenants
    assert [tenant.interfaces for tenant in found] == [("one-5-0",), ("one-7-0", "one-7-1")]
    lines = [f"FORWARD -i g{number}-e0 -j DROP" for number in (3, 4, 11)]
    assert len(attribute(parse(_table("filter", "", *lines))).tenants) == 3


def test_the_one_source_that_a_guests_chain_lets_pass_is_the_guests() -> None:
    lines = [
        "FORWARD -m physdev --physdev-in vnet7 -j OUT-7",
        "FORWARD -s 192.0.2.7/32",
        "OUT-7 ! -s 192.0.2.7/32 -j DROP",
        "OUT-7 ! -s 192.0.2.8/32 -p udp -m udp --dport 53 -j DROP",
        "FORWARD -i eth0 -j LIMITS",
        "LIMITS ! -s 192.0.2.9/32 -j DROP",
    ]
    dump = parse(_table("filter", "OUT-7 LIMITS", *lines))
    [guest] = attribute(dump).tenants
    assert list(map(str, guest.addresses)) == ["192.0.2.7/32"]
    assert _owners(dump)["FORWARD -s 192.0.2.7/32"] == "vnet7"


def test_links_of_subscribers_and_links_to_the_outside() -> None:
    lines = [f"FORWARD ! -s 100.64.0.{number}/32 -i ppp{number} -j DROP" for number in range(3)]
    found = attribute(parse(_table("filter", "", *lines))).tenants
    assert [tenant.interfaces for tenant in found] == [("ppp0",), ("ppp1",), ("ppp2",)]
    assert all(len(tenant.addresses) == 1 for tenant in found)
    outward = _table("nat", "", *(f"POSTROUTING -o ppp{number} -j MASQUERADE" for number in range(3)))
    accepted = _table("filter", "", *(f"FORWARD -i ppp{number} -j DROP" for number in range(3)))
    assert attribute(parse(outward + accepted)).tenants == ()


def test_link_local_addresses_of_guests_do_not_make_them_different() -> None:
    lines = []
    for number in (1, 2, 3):
        lines += [
            f"FORWARD -i tap{number} -s fe80::{number}:2/128 -j RETURN",
            f"FORWARD -i tap{number} -s fe80::99/128 -j DROP",
        ]
    assert classes_of(attribute(parse(_table("filter", "", *lines)))) == [0, 0, 0]


def test_without_tenants_a_packet_may_be_bridged_or_not() -> None:
    lines = ["FORWARD -m physdev --physdev-is-bridged -j PORTS", *["PORTS -p tcp -m tcp --dport 25 -j DROP"] * 3]
    assert audit(parse(_table("filter", "PORTS", *lines))).walks.longest == 4
    lines[0] = "FORWARD -m physdev ! --physdev-is-bridged -j PORTS"
    assert audit(parse(_table("filter", "PORTS", *lines))).walks.longest == 4


def test_links_and_addresses_that_nothing_joins_are_told_to_be_perhaps_the_same() -> None:
    links = _table("filter", "", *(f"FORWARD -i tap{number} -j ACCEPT" for number in range(2)))
    addresses = [f"POSTROUTING -s 10.7.0.{number}/32 -o eth0 -j MASQUERADE" for number in range(2)]
    found = {x.kind: x.text for x in audit(parse(links + _table("nat", "", *addresses))).findings}
    assert "by the link alone: 2, by the address alone: 2;" in found["halves"]
    assert "halves" not in {x.kind for x in audit(parse(links)).findings}


@pytest.mark.parametrize("form", ["sb{}-eth", "vm-{}-tap", "vm{}x", "fc-{}-tap0", "job{}.0", "sb-a1b2c{}d4-eth"])
def test_links_with_the_number_inside_are_tenants_where_there_are_many(form: str) -> None:
    names = [form.format(number) for number in (1, 2, 3)]
    dump = parse(_table("filter", "", *(f"FORWARD -i {name} -j ACCEPT" for name in names)))
    assert [tenant.interfaces for tenant in attribute(dump).tenants] == [(name,) for name in names]


@pytest.mark.parametrize(
    "form", ["eth{}", "wg{}", "bond0.10{}", "enp1s0.10{}", "ib0.800{}", "virbr{}-nic", "lan{}-a"]
)
def test_the_hosts_own_links_are_none_however_many(form: str) -> None:
    lines = (f"FORWARD -i {form.format(number)} -j ACCEPT" for number in (1, 2, 3))
    assert attribute(parse(_table("filter", "", *lines))).tenants == ()


@pytest.mark.parametrize(
    ("lines", "people"),
    [
        pytest.param(["PREROUTING -i eth0 {publish}", "POSTROUTING -o eth0 -j MASQUERADE"], 1, id="from outside"),
        pytest.param(["PREROUTING {publish}", "POSTROUTING -o eth0 -j MASQUERADE"], 1, id="from anywhere"),
        pytest.param(["PREROUTING -i wlan0 {publish}"], 1, id="nobody knows where outside is"),
        pytest.param(["PREROUTING -i wlan0 {publish}", "POSTROUTING -o eth0 -j MASQUERADE"], 0, id="a portal"),
    ],
)
def test_a_port_is_published_to_the_outside(lines: list[str], people: int) -> None:
    publish = "-p tcp -m tcp --dport 80 -j DNAT --to-destination 10.1.0.9:8080"
    text = _table("nat", "", *(line.format(publish=publish) for line in lines))
    assert len(attribute(parse(text)).tenants) == people
    let_in = _table("filter", "", "INPUT -d 10.1.0.9/32 -p tcp -m tcp --dport 8080 -j ACCEPT")
    assert attribute(parse(text + let_in)).tenants == (), "INPUT knows it for the host's own"


def test_a_portal_that_is_lost_is_missed() -> None:
    portal = "PREROUTING -i wlan0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.1.0.1:8080"
    guest = "PREROUTING -i eth0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination 10.1.0.9:443"
    nat = _table("nat", "", portal, guest, "POSTROUTING -s 10.1.0.0/24 -o eth0 -j MASQUERADE")
    text = nat + _table("filter", "", "FORWARD -i wlan0 -o eth0 -j ACCEPT")
    dump = parse(text)
    people = attribute(dump).tenants
    files = split(dump, people).files
    assert prove(dump, survey(dump, people), read(files)).equivalent
    files["root.rules"] = files["root.rules"].replace(f"-A {portal}\n", "")
    assert prove(dump, survey(dump, people), read(files)).counterexamples
