"""Splits are proved, and wrong splits are found: each seeded fault with a packet that shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from netslot.rulesets.attribute import attribute
from netslot.rulesets.model import Dump
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import Verdict, prove
from netslot.rulesets.split import Split, split
from synthetic_host import make_host

Files = dict[str, str]


def _proved(dump: Dump, files: Files) -> Verdict:
    tenants = attribute(dump).tenants
    return prove(dump, survey(dump, tenants), read(files), enough=1)


def _synthetic(tenants: int) -> Dump:
    """A synthetic host with ten of each sixty common rules that differ in one number only, to be quicker."""
    text = make_host(tenants, classes=3).text
    many = re.compile(r"--dport 200[1-5]\d |-d 192\.0\.2\.[1-5]\d/32 ")
    return parse("\n".join(line for line in text.splitlines() if not many.search(line)) + "\n")


@pytest.fixture(scope="module")
def host() -> tuple[Dump, Split]:
    dump = _synthetic(6)
    return dump, split(dump, attribute(dump).tenants)


def test_the_synthetic_host_splits_and_is_proved(host: tuple[Dump, Split]) -> None:
    dump, result = host
    assert result.refused == []
    verdict = _proved(dump, result.files)
    assert verdict.counterexamples == []
    assert verdict.obstacles == []
    assert (verdict.tenants, verdict.classes) == (6, 3)


def test_root_rules_do_not_grow_with_tenants(host: tuple[Dump, Split]) -> None:
    dump = _synthetic(30)
    more = split(dump, attribute(dump).tenants)
    assert more.report["root_rules_after"] == host[1].report["root_rules_after"]
    assert more.report["slot_rules_max"] == host[1].report["slot_rules_max"]


def test_every_rule_is_accounted_for(host: tuple[Dump, Split]) -> None:
    dump, result = host
    account = json.loads(result.files["report.json"])
    assert len(account) == dump.rule_count()
    assert all(entry["why"] for entry in account)
    assert {entry["fate"] for entry in account} == {"moved", "merged", "mapped", "stayed"}


def test_a_walk_is_no_longer_than_one_tenants_rules_and_the_common_ones(host: tuple[Dump, Split]) -> None:
    walk = host[1].report["longest_walk_after"]
    assert isinstance(walk, int)
    assert walk <= 30 + 144


def _without(name: str, words: str) -> Callable[[Files], Files]:
    """Drop the one rule of a file that contains the words."""

    def change(files: Files) -> Files:
        lines = files[name].splitlines()
        chosen = next(line for line in lines if words in line)
        lines.remove(chosen)
        return files | {name: "\n".join(lines) + "\n"}

    return change


def _instead(name: str, old: str, new: str) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        assert old in files[name], files[name]
        return files | {name: files[name].replace(old, new, 1)}

    return change


def _first_becomes_last(name: str, words: str) -> Callable[[Files], Files]:
    """Put one rule at the end of its chain."""

    def change(files: Files) -> Files:
        lines = files[name].splitlines()
        chosen = next(line for line in lines if words in line)
        lines.remove(chosen)
        chain = chosen.split()[1]
        last = max(number for number, line in enumerate(lines) if line.startswith(f"-A {chain} "))
        lines.insert(last + 1, chosen)
        return files | {name: "\n".join(lines) + "\n"}

    return change


def _links_exchanged(files: Files) -> Files:
    manifest = json.loads(files["tenants.json"])
    people = manifest["tenants"]
    one = people[0]
    other = next(t for t in people[1:] if t["class"] == one["class"])
    one["link"], other["link"] = other["link"], one["link"]
    return files | {"tenants.json": json.dumps(manifest)}


def _exchanged(key: str) -> Callable[[Files], Files]:
    """Exchange one value between two tenants of the same class."""

    def change(files: Files) -> Files:
        manifest = json.loads(files["tenants.json"])
        people = manifest["tenants"]
        one = people[0]
        other = next(t for t in people[1:] if t["class"] == one["class"])
        one["variables"][key], other["variables"][key] = other["variables"][key], one["variables"][key]
        return files | {"tenants.json": json.dumps(manifest)}

    return change


FAULTS = {
    "a rule of a slot dropped": _without("class0.rules", "203.0.113.7/32"),
    "an anti-spoofing rule dropped": _without("class0.rules", "! -s ${address}"),
    "a common rule dropped": _without("root.rules", "--ctstate INVALID"),
    "a rule of INPUT dropped": _without("root.rules", "--dport 20007"),
    "order changed in a slot": _first_becomes_last("class0.rules", "--dport 25 "),
    "order changed in root": _first_becomes_last("root.rules", "-A INPUT -i tap+ -p udp"),
    "a mask widened": _instead("class0.rules", "-d 203.0.113.7/32", "-d 203.0.113.0/24"),
    "the pool widened": _instead(
        "root.rules", "/255.255.255.243 -o eth0 -j MASQ", "/255.255.255.240 -o eth0 -j MASQ"
    ),
    "a hook swapped": _instead("root.rules", "-A INPUT -i tap+ -j DROP", "-A FORWARD -i tap+ -j DROP"),
    "a state match removed": _instead("class1.rules", " -m conntrack --ctstate ESTABLISHED,RELATED", ""),
    "a NAT lost": _without("root.rules", "172.31.0.0/16"),
    "the masquerade lost": _without("root.rules", "/255.255.255.243 -o eth0 -j MASQ"),
    "a published port lost": _without("publish.nft", " : 10.64."),
    "a published port elsewhere": _instead("publish.nft", ". 8080", ". 8081"),
    "a mark lost": _without("root.rules", "--dport 4789"),
    "addresses of two tenants exchanged": _exchanged("address"),
    "links of two tenants exchanged": _links_exchanged,
    "a shared count asked more often": _instead(
        "root.rules",
        "-A FORWARD -d 169.254.169.254/32 -p tcp -m tcp --dport 80",
        "-A FORWARD -p tcp -m tcp --dport 80",
    ),
    "the door for the wrong sources": _instead("root.rules", "-A FORWARD ! -s 10.64", "-A FORWARD -s 10.64"),
}


@pytest.fixture(scope="module")
def small_host() -> tuple[Dump, Split]:
    """One tenant of each class: fewer ways to prove."""
    dump = _synthetic(3)
    return dump, split(dump, attribute(dump).tenants)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_split_is_found_with_a_packet(
    host: tuple[Dump, Split], small_host: tuple[Dump, Split], fault: str
) -> None:
    dump, result = host if "exchanged" in fault else small_host
    verdict = _proved(dump, FAULTS[fault](dict(result.files)))
    assert not verdict.equivalent
    found = verdict.counterexamples[0]
    assert found.packet["src"] and found.parts
    assert found.before != found.after


def test_a_host_whose_rules_do_not_name_it_is_asked_for_when_slots_are_made() -> None:
    text = re.sub(r"(-A INPUT[^\n]*?) -d \S+", r"\1", make_host(3, classes=2).text)
    dump = parse(text)
    result = split(dump, attribute(dump).tenants)
    assert "-A netslot-out -d ${host} -j ACCEPT" in result.files["class0.rules"]
    assert any("${host}" in note for note in result.notes)
    verdict = _proved(dump, result.files)
    assert verdict.equivalent, (verdict.counterexamples, verdict.obstacles)
    assert any("told every address of the host" in text for text in verdict.assumptions)
    forgotten = {name: text.replace("-d ${host}", "-d 192.0.2.200") for name, text in result.files.items()}
    assert _proved(dump, forgotten).counterexamples
