"""Whose rule is it: tenants found in the shapes that products write, and owners that a person would name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dumps import each_dump
from netslot.rulesets.attribute import GLOBAL, SHARED, Attribution, attribute
from netslot.rulesets.classes import classes_of
from netslot.rulesets.interfaces import Kind, kind
from netslot.rulesets.parse import parse
from netslot.rulesets.tenants import Tenant, TenantAddress, parse_tenants
from unit.rulesets.shapes import ALL, DOCKER, KUBE_ROUTER, NEUTRON, PROXMOX, Shape


@pytest.mark.parametrize("shape", ALL.values(), ids=ALL)
def test_tenants_are_found_from_the_dump_alone(shape: Shape) -> None:
    attribution = attribute(parse(shape.text))
    found = [{*tenant.interfaces, *map(str, tenant.addresses)} for tenant in attribution.tenants]
    assert sorted(map(sorted, found)) == sorted(map(sorted, shape.tenants))


@pytest.mark.parametrize("shape", ALL.values(), ids=ALL)
def test_rules_alike_but_for_names_are_one_class(shape: Shape) -> None:
    assert len(set(classes_of(attribute(parse(shape.text))))) == shape.classes


@pytest.mark.parametrize("shape", ALL.values(), ids=ALL)
def test_every_rule_has_one_owner(shape: Shape) -> None:
    dump = parse(shape.text)
    attribution = attribute(dump)
    per_tenant, common, shared = attribution.counts()
    assert sum(per_tenant) + common + shared == dump.rule_count()
    assert set(attribution.why) == {rule for rule, who in attribution.owner.items() if who == SHARED}


def _owner(attribution: Attribution, text: str) -> str:
    for ruleset in attribution.dump.rulesets:
        for _, chain, rule in ruleset.rules():
            if f"{chain.name} {rule.text}" == text:
                who = attribution.owner[rule]
                return {GLOBAL: "global", SHARED: "shared"}.get(who) or attribution.tenants[who].name
    raise AssertionError(f"no rule {text}")


def test_a_chain_that_one_tenant_reaches_is_that_tenants() -> None:
    attribution = attribute(parse(NEUTRON.text))
    assert _owner(attribution, "n-i0695f2ca-b -m state --state RELATED,ESTABLISHED -j RETURN") == "tap0695f2ca-bf"
    assert _owner(attribution, "n-s839737e6-1 -j DROP") == "tap839737e6-15"


def test_a_chain_that_several_tenants_reach_is_shared_with_the_reason() -> None:
    attribution = attribute(parse(NEUTRON.text))
    assert _owner(attribution, "n-sg-fallback -j DROP") == "shared"
    assert "n-sg-fallback, which rules of 2 tenants jump to" in " ".join(attribution.why.values())


def test_rules_about_nobody_are_global() -> None:
    attribution = attribute(parse(NEUTRON.text))
    assert _owner(attribution, "FORWARD -j n-FORWARD") == "global"
    docker = attribute(parse(DOCKER.text))
    assert _owner(docker, "INPUT -s 203.0.113.9/32 -p tcp -m tcp --dport 22 -j ACCEPT") == "global"


def test_a_bridge_with_tenants_on_it_is_shared() -> None:
    attribution = attribute(parse(DOCKER.text))
    assert _owner(attribution, "FORWARD -i br-1a2b3c4d5e6f ! -o br-1a2b3c4d5e6f -j ACCEPT") == "shared"


def test_several_cards_of_one_guest_are_one_tenant() -> None:
    assert {tenant.name for tenant in attribute(parse(PROXMOX.text)).tenants} == {"guest 100", "veth200i0"}


def test_a_pod_is_called_by_its_name() -> None:
    assert [tenant.name for tenant in attribute(parse(KUBE_ROUTER.text)).tenants] == [
        "default/pod-a",
        "default/pod-b",
    ]


def test_a_rule_that_names_two_tenants_is_shared() -> None:
    text = (
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -i tap1 -o tap2 -j ACCEPT\n-A FORWARD -i tap1 -j DROP\nCOMMIT\n"
    )
    attribution = attribute(parse(text))
    assert _owner(attribution, "FORWARD -i tap1 -o tap2 -j ACCEPT") == "shared"
    assert list(attribution.why.values()) == ["names tap1 and tap2"]


def test_a_prefix_over_several_tenants_is_shared() -> None:
    text = (
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -s 10.1.0.2/32 -i tap1 -j ACCEPT\n"
        "-A FORWARD -s 10.1.0.6/32 -i tap2 -j ACCEPT\n-A FORWARD -s 10.1.0.0/16 -j DROP\nCOMMIT\n"
    )
    assert _owner(attribute(parse(text)), "FORWARD -s 10.1.0.0/16 -j DROP") == "shared"


def test_given_tenants_are_taken_as_they_are() -> None:
    text = (
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -s 203.0.113.64/28 -j ACCEPT\n"
        "-A FORWARD -s 203.0.113.70/32 -j ACCEPT\n-A FORWARD -i tap9 -j DROP\nCOMMIT\n"
    )
    people = [Tenant("alice", addresses=(TenantAddress(4, 0xCB007140, 0xFFFFFFF0),))]
    attribution = attribute(parse(text), people)
    assert _owner(attribution, "FORWARD -s 203.0.113.64/28 -j ACCEPT") == "alice"
    assert _owner(attribution, "FORWARD -s 203.0.113.70/32 -j ACCEPT") == "alice"
    assert _owner(attribution, "FORWARD -i tap9 -j DROP") == "global"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vmtap0", Kind.GUEST),
        ("e2b-tap-3", Kind.GUEST),
        ("fc_tap3", Kind.GUEST),
        ("vethwe-bridge", Kind.HOST),
        ("vethwepl1234", Kind.GUEST),
    ],
)
def test_what_a_name_says(name: str, expected: Kind) -> None:
    assert kind(name) is expected


@pytest.mark.parametrize(
    "rule",
    [
        "INPUT -i vmeth0 -j ACCEPT",
        "OUTPUT -o tap0 -j ACCEPT",
        "FORWARD -m physdev --physdev-in vethwe-bridge -j RETURN",
        "POSTROUTING -s fd42:1:2:3::/64 ! -d fd42:1:2:3::/64 -j MASQUERADE",
        "POSTROUTING -s fd42:42:42::/64 -o eth0 -j MASQUERADE",
    ],
)
def test_the_hosts_own_links_and_networks_are_no_tenants(rule: str) -> None:
    table = "nat" if rule.startswith("POST") else "filter"
    text = f"*{table}\n:{rule.split(maxsplit=1)[0]} ACCEPT [0:0]\n-A {rule}\nCOMMIT\n"
    assert attribute(parse(text)).tenants == ()


def test_cards_that_lead_to_one_guests_chain_are_one_tenant_by_the_guests_name() -> None:
    chains = "s-1-VM", "i-2-7-VM", "i-2-7-def"
    cards = [("vnet1", "s-1-VM"), ("vnet2", "s-1-VM"), ("vnet5", "i-2-7-def")]
    lines = [
        f"-A FORWARD -m physdev --physdev-{way} {card} -j {chain}" for card, chain in cards for way in ("in", "out")
    ]
    lines += ["-A i-2-7-def -m physdev --physdev-out vnet5 -j i-2-7-VM", "-A i-2-7-VM -j DROP", "-A s-1-VM -j ACCEPT"]
    declared = [f":{name} - [0:0]" for name in chains]
    attribution = attribute(parse("\n".join(["*filter", ":FORWARD DROP [0:0]", *declared, *lines, "COMMIT", ""])))
    assert [(x.name, x.interfaces) for x in attribution.tenants] == [
        ("s-1-VM", ("vnet1", "vnet2")),
        ("i-2-7-VM", ("vnet5",)),
    ]
    assert _owner(attribution, "s-1-VM -j ACCEPT") == "s-1-VM"


def test_a_mark_of_one_tenant_leads_to_its_rule_elsewhere() -> None:
    lines = [f"-A FORWARD -i tap{k} -j MARK --set-xmark {k:#x}/0xffffffff" for k in (1, 2)]
    lines += [f"-A FORWARD -m mark --mark {k:#x} -j DROP" for k in (1, 2)]
    attribution = attribute(parse("\n".join(["*filter", ":FORWARD ACCEPT [0:0]", *lines, "COMMIT", ""])))
    assert _owner(attribution, "FORWARD -m mark --mark 0x1 -j DROP") == "tap1"
    assert _owner(attribution, "FORWARD -m mark --mark 0x2 -j DROP") == "tap2"


def test_ipv4_and_ipv6_rules_of_one_tap_are_one_tenants() -> None:
    v4 = (
        "# Generated by iptables-save v1.8.9\n*filter\n:FORWARD ACCEPT [0:0]\n"
        "-A FORWARD -s 10.0.0.2/32 -i tap1 -j DROP\nCOMMIT\n"
    )
    v6 = (
        "# Generated by ip6tables-save v1.8.9\n*filter\n:FORWARD ACCEPT [0:0]\n"
        "-A FORWARD -s 2001:db8::/64 -i tap1 -j DROP\nCOMMIT\n"
    )
    (tenant,) = attribute(parse(v4 + v6)).tenants
    assert {str(address) for address in tenant.addresses} == {"10.0.0.2/32", "2001:db8::/64"}


def test_tenants_file_in_both_forms() -> None:
    as_toml = '[[tenant]]\nname = "a"\ninterfaces = ["tap1"]\naddresses = ["10.0.0.1", "2001:db8::/64"]\n'
    as_json = '[{"name": "a", "interfaces": ["tap1"], "addresses": ["10.0.0.1/32", "2001:db8::/64"]}]'
    assert parse_tenants(as_toml) == parse_tenants(as_json)


_TRUTH = {  # counted by eye in the index of the dumps; netavark shows only containers with published ports
    "aks-npm-v1": 0,
    "beta9-200containers": 200,
    "calico-no-workloads": 0,
    "cilium-lima-counters": 0,
    "docker-free5gc": 3,
    "docker-printserver": 3,
    "docker-topos-4containers": 5,
    "kuberouter-k3s-11pods": 11,
    "libvirt-fuel-3nets": 4,
    "netavark-10ctrs": 6,
    "neutron-ovs-hybrid-2vms": 2,
    "office-internal-virt": 5,
    "openstack-fip-netns": 0,
    "proxmox-testcfg-group1": 2,
    "qubes-fwvm-1client": 1,
    "ufw-server1": 0,
}


@each_dump
def test_tenants_of_real_hosts(dump: Path) -> None:
    if dump.stem not in _TRUTH:
        pytest.skip("nobody has counted the tenants of this dump")
    assert len(attribute(parse(dump.read_text())).tenants) == _TRUTH[dump.stem]
