"""Rules that do nothing: what is found, and that taking it away changes no verdict."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from netslot.rulesets import targets as t
from netslot.rulesets.attribute import attribute
from netslot.rulesets.flaws import find_dead, find_flaws, find_missing
from netslot.rulesets.model import Rule, Table
from netslot.rulesets.packets import PERHAPS, YES, Link, Packet, holds
from netslot.rulesets.parse import parse
from netslot.rulesets.tenants import Tenant
from unit.rulesets.strategies import walk_rulesets


def _flaws(*rules: str, **chains: tuple[str, ...]) -> list[tuple[str, int]]:
    """(kind, number of the rule within FORWARD and the chains, from 1)."""
    lines = ["*filter", ":FORWARD ACCEPT [0:0]", *(f":{name} - [0:0]" for name in chains)]
    first = len(lines)
    lines += [f"-A FORWARD {rule}" for rule in rules]
    lines += [f"-A {name} {rule}" for name, body in chains.items() for rule in body]
    return [(flaw.kind, flaw.rule.line - first) for flaw in find_flaws(parse("\n".join([*lines, "COMMIT", ""])))]


def test_after_a_rule_without_conditions_nothing_is_reached() -> None:
    assert _flaws("-j DROP", "-i tap1 -j ACCEPT") == [("unreachable", 2)]
    assert _flaws("-j LOG", "-i tap1 -j ACCEPT") == []
    assert _flaws("-j c", "-i tap1 -j ACCEPT", c=("-j DROP",)) == [("unreachable", 2)]
    assert _flaws("-j c", "-i tap1 -j ACCEPT", c=("-i tap1 -j RETURN", "-j DROP")) == []


def test_a_narrower_rule_after_a_wider_one() -> None:
    assert _flaws("-s 10.0.0.0/8 -j DROP", "-s 10.1.0.0/16 -i tap1 -j ACCEPT") == [("unreachable", 2)]
    assert _flaws("-i tap+ -j DROP", "-i tap7 -j ACCEPT") == [("unreachable", 2)]
    assert _flaws("-p tcp -m tcp --dport 1:99 -j DROP", "-p tcp -m tcp --dport 80 -j ACCEPT") == [("unreachable", 2)]
    assert _flaws("-s 10.1.0.0/16 -j DROP", "-s 10.0.0.0/8 -j ACCEPT") == []
    assert _flaws("-s 10.0.0.0/8 -j LOG", "-s 10.1.0.0/16 -j ACCEPT") == []


def test_limits_and_marks_shadow_nothing() -> None:
    assert _flaws("-m limit --limit 1/sec -j ACCEPT", "-m limit --limit 1/sec -j ACCEPT") == []
    assert _flaws("-m mark --mark 0x1 -j ACCEPT", "-j MARK --set-xmark 0x1/0x1", "-m mark --mark 0x1 -j ACCEPT") == []


def test_duplicates() -> None:
    assert _flaws("-i tap1 -j ACCEPT", "-i tap2 -j DROP", "-i tap1 -j ACCEPT") == [("duplicate", 3)]
    assert _flaws("", "") == [("duplicate", 2)]
    assert _flaws('-m comment --comment "a"', '-m comment --comment "b"') == []
    assert _flaws("-j LOG", "-j LOG") == []


def test_a_chain_that_nothing_jumps_to() -> None:
    assert _flaws("-i tap1 -j ACCEPT", c=("-j DROP",)) == [("unreachable", 2)]


def test_rules_of_tenants_that_are_not_in_the_list() -> None:
    text = "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -i tap1 -j DROP\n-A FORWARD -i tap2 -j DROP\nCOMMIT\n"
    attribution = attribute(parse(text), [Tenant("one", ("tap1",))])
    assert [flaw.rule.text for flaw in find_dead(attribution)] == ["-i tap2 -j DROP"]
    found = attribute(parse(text))
    assert find_dead(found) == []
    assert [flaw.rule.text for flaw in find_missing(found, frozenset(("tap2", "eth0")))] == ["-i tap1 -j DROP"]


def _verdict(table: Table, chain: str, packet: Packet, answers: dict[object, bool]) -> str:
    """What becomes of one packet; ``answers`` decides what a match leaves open."""
    for rule in table.chains[chain].rules:
        if not all(_applies(rule, match, packet, answers) for match in rule.matches):
            continue
        match rule.target:
            case t.Accept():
                return "accept"
            case t.Drop():
                return "drop"
            case t.Return():
                return ""
            case t.SetMark(value, mask):
                packet.mark = (packet.mark & ~mask) ^ value
            case t.Jump(target) | t.Goto(target):
                verdict = _verdict(table, target, packet, answers)
                if verdict or isinstance(rule.target, t.Goto):
                    return verdict
    return ""


def _applies(rule: Rule, match: object, packet: Packet, answers: dict[object, bool]) -> bool:
    answer = holds(match, packet)  # type: ignore[arg-type]
    if answer != PERHAPS:
        return answer == YES
    stateful = getattr(match, "stateful", False)
    return answers[rule if stateful else match]


@settings(deadline=None)  # the machine may be busy
@given(walk_rulesets(), st.data())
def test_taking_away_what_does_nothing_changes_no_verdict(text: str, data: st.DataObject) -> None:
    dump = parse(text, family=4)
    table = dump.rulesets[0].tables["filter"]
    idle = {flaw.rule for flaw in find_flaws(dump)}
    chains = {
        name: replace(chain, rules=tuple(rule for rule in chain.rules if rule not in idle))
        for name, chain in table.chains.items()
    }
    packet = Packet(
        data.draw(st.sampled_from(["NEW", "ESTABLISHED"])),
        data.draw(st.sampled_from([0x0A000001, 0x0A000002, 0x08080808])),
        data.draw(st.sampled_from([0x0A000001, 0x08080808])),
        40000,
        data.draw(st.sampled_from([80, 443, 9000])),
        Link(data.draw(st.sampled_from(["tap1", "tap2", "eth0"]))),
        Link(data.draw(st.sampled_from(["tap1", "eth0"]))),
        mark=data.draw(st.integers(0, 1)),
    )
    open_ones = [x for _, _, rule in dump.rulesets[0].rules() for x in (rule, *rule.matches)]
    answers: dict[object, bool] = {x: data.draw(st.booleans()) for x in dict.fromkeys(open_ones)}
    before = _verdict(table, "FORWARD", replace(packet), answers)
    after = _verdict(Table("filter", chains), "FORWARD", replace(packet), answers)
    assert after == before
