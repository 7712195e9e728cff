"""Hosts whose tenants share a bridge: their rules become rules with sets, and that is proved."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from netslot.errors import SpecError
from netslot.rulesets.attribute import attribute
from netslot.rulesets.ipsets import SETS, read_sets, write_sets
from netslot.rulesets.model import Dump
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import ROOT, read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import Verdict, prove
from netslot.rulesets.split import Split, split
from netslot.rulesets.tenants import Tenant, parse_tenants, tenant_address

HEAD = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"


def _tenants(number: int) -> tuple[Tenant, ...]:
    return tuple(Tenant(f"t{k}", addresses=(tenant_address(f"10.9.0.{k + 2}/32"),)) for k in range(number))


def _split(lines: list[str], tenants: tuple[Tenant, ...], chains: str = "") -> tuple[Dump, Split]:
    dump = parse(HEAD + chains + "\n".join(lines) + "\nCOMMIT\n")
    return dump, split(dump, tenants)


def _proof(dump: Dump, tenants: tuple[Tenant, ...], files: dict[str, str]) -> Verdict:
    return prove(dump, survey(dump, tenants), read(files), enough=1)


def _root(result: Split) -> list[str]:
    return [line for line in result.files[ROOT[4]].splitlines() if line.startswith("-A")]


def _allow_lists(number: int) -> list[str]:
    lines = []
    for k in range(number):
        own = f"10.9.0.{k + 2}/32"
        lines += [
            f"-A FORWARD -s {own} -d 203.0.113.0/24 -o eth0 -j ACCEPT",
            f"-A FORWARD -s {own} -o eth0 -m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP",
            f"-A FORWARD -d {own} -p tcp -m tcp --dport {8000 + k % 2} -j ACCEPT",
        ]
    return [*lines, "-A FORWARD -d 10.9.0.0/24 -j REJECT --reject-with icmp-port-unreachable"]


def test_rules_that_differ_in_addresses_and_ports_become_one_with_a_set() -> None:
    tenants = _tenants(20)
    dump, result = _split(_allow_lists(20), tenants)
    assert result.refused == []
    assert len(_root(result)) == 4
    assert result.report["merged"] == 60
    assert result.files[SETS[4]].count("add ") == 40  # two rules of the three ask for the same addresses
    verdict = _proof(dump, tenants, result.files)
    assert verdict.equivalent, (verdict.counterexamples, verdict.obstacles)
    assert len(_root(_split(_allow_lists(40), _tenants(40))[1])) == 4


def test_own_chains_that_say_the_same_become_one_for_each_side() -> None:
    tenants = _tenants(6)
    names = [f"POD-{k}" for k in range(6)]
    lines = []
    for k, name in enumerate(names):
        own = f"10.9.0.{k + 2}/32"
        lines += [
            f'-A FORWARD -s {own} -m comment --comment "from {name}" -j {name}',
            f"-A FORWARD -d {own} -j {name}",
            f"-A {name} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            f"-A {name} -d {own} -p tcp -m tcp --dport 80 -j RETURN",
            f"-A {name} -s {own} -p udp -m udp --dport 53 -j RETURN",
            f"-A {name} -j DROP",
        ]
    dump, result = _split(lines, tenants, "".join(f":{name} - [0:0]\n" for name in names))
    assert result.refused == []
    assert len(_root(result)) == 2 + 2 * 4
    assert result.report["merged"] == len(lines)
    verdict = _proof(dump, tenants, result.files)
    assert verdict.equivalent, (verdict.counterexamples, verdict.obstacles)


def test_what_no_set_can_say_stays_with_its_reason() -> None:
    lines = [f"-A FORWARD -s 10.9.0.{k}/32 -m limit --limit {k}/sec -j ACCEPT" for k in (2, 3)]
    lines += ["-A FORWARD ! -s 10.9.0.2/32 -i br0 -j DROP"]
    dump, result = _split(lines, _tenants(2))
    assert result.report["merged"] == 0
    stayed = result.report["stayed"]
    assert isinstance(stayed, list)
    assert [entry["rule"] for entry in stayed] == [rule.text for _, _, rule in dump.rulesets[0].rules()]
    assert _proof(dump, _tenants(2), result.files).equivalent


def test_tenants_of_one_bridge_may_all_name_it() -> None:
    text = '[{"name": "a", "interfaces": ["br0"], "addresses": ["10.9.0.2"]},'
    text += ' {"name": "b", "interfaces": ["br0"], "addresses": ["10.9.0.3"]}]'
    tenants = parse_tenants(text)
    dump, result = _split(_allow_lists(2), tenants)
    assert result.files
    assert _proof(dump, tenants, result.files).equivalent
    without = text.replace(', "addresses": ["10.9.0.2"]', "").replace(', "addresses": ["10.9.0.3"]', "")
    with pytest.raises(SpecError, match="identifies tenant 1 already"):
        parse_tenants(without)


def test_a_tenant_of_which_too_little_is_known_stays_the_hosts_own() -> None:
    tenants = (*_tenants(2), Tenant("net", ("virbr7",)))
    lines = [*_allow_lists(2), "-A FORWARD -i virbr7 -o virbr7 -j ACCEPT"]
    dump, result = _split(lines, tenants)
    assert any("net" in note and "no address" in note for note in result.notes)
    assert "-A FORWARD -i virbr7 -o virbr7 -j ACCEPT" in _root(result)
    verdict = _proof(dump, tenants, result.files)
    assert verdict.equivalent and any("net has no slot" in note for note in verdict.notes)


@pytest.mark.parametrize("seed", range(4))
def test_random_rules_keep_their_meaning_in_whatever_order_they_stand(seed: int) -> None:
    dice = random.Random(seed)
    tenants = _tenants(4)
    own = [f"10.9.0.{k + 2}/32" for k in range(4)]
    lines = []
    for _ in range(dice.randint(4, 16)):
        words = []
        for option in ("-s", "-d"):
            if dice.random() < 0.6:
                words += [option, dice.choice([*own, "10.9.0.0/30", "203.0.113.0/24"])]
        if dice.random() < 0.4:
            words += [dice.choice(["-i", "-o"]), dice.choice(["eth0", "br0"])]
        if dice.random() < 0.4:
            words += ["-p", "tcp", "-m", "tcp", "--dport", str(dice.choice([22, 80, 443]))]
        if dice.random() < 0.3:
            words += ["-m", "conntrack", "--ctstate", dice.choice(["NEW", "ESTABLISHED"])]
        target = dice.choice(["ACCEPT", "DROP", "RETURN", "MARK --set-xmark 0x1/0xff", "ACCEPT", "DROP"])
        lines.append(" ".join(["-A FORWARD", *words, "-j", target]))
    dump, result = _split(lines, tenants)
    verdict = _proof(dump, tenants, result.files)
    assert verdict.counterexamples == [], (lines, _root(result), verdict.counterexamples[0])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("add netslot-1 10.9.0.3/32\n", ""),
        ("10.9.0.3/32,tcp:8001", "10.9.0.3/32,tcp:8002"),
        ("add netslot-0 10.9.0.3/32", "add netslot-0 10.9.0.0/24"),
    ],
)
def test_a_set_that_was_changed_by_hand_is_found(old: str, new: str) -> None:
    tenants = _tenants(3)
    dump, result = _split(_allow_lists(3), tenants)
    text = result.files[SETS[4]]
    changed = text.replace(old if old in text else old.replace("netslot-1", "netslot-0"), new)
    assert changed != text
    verdict = _proof(dump, tenants, result.files | {SETS[4]: changed})
    assert verdict.counterexamples


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("create netslot-0 hash:mac family inet\n", "expected 'create"),
        ("create netslot-0 hash:net family inet hashsize 64\nadd netslot-0 10.0.0.1,tcp:80\n", "has 1 parts"),
        ("create netslot-0 hash:net,port family inet hashsize 64\nadd netslot-0 10.0.0.1,foo:80\n", "PROTOCOL:PORT"),
        ("add netslot-0 10.0.0.1\n", "expected 'create"),
    ],
)
def test_a_file_of_sets_that_is_not_ours_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as caught:
        read_sets(text, 4, "root.sets")
    assert caught.value.line == text.count("\n")


def test_sets_read_back_as_they_were_written() -> None:
    _, result = _split(_allow_lists(5), _tenants(5))
    text = result.files[SETS[4]]
    assert write_sets(list(read_sets(text, 4, "root.sets").values())) == text


def test_the_live_tenants_of_a_dump_need_no_file() -> None:
    dump = parse(HEAD + "\n".join(_allow_lists(5)) + "\nCOMMIT\n")
    found = attribute(dump).tenants
    assert {str(a) for tenant in found for a in tenant.addresses} == {f"10.9.0.{k + 2}/32" for k in range(5)}
    assert all(replace(tenant, why="") for tenant in found)
