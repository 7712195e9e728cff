"""The walk: counts that can be checked by hand, and the index against a walk that files nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from netslot.rulesets.attribute import attribute
from netslot.rulesets.packets import ABSENT, UPLINK, Link, Packet
from netslot.rulesets.parse import parse
from netslot.rulesets.traffic import walk_all
from netslot.rulesets.walk import Key, Outcome, TableWalker, Template, port_key
from synthetic_host import make_host
from unit.rulesets.strategies import walk_rulesets

_ONE = 0x0A000001
_PACKET = Packet("NEW", _ONE, 0x08080808, 40000, 443, Link("tap1"), UPLINK)
_TEMPLATE = Template("test", frozenset(("src", "in")))
_NAMES: dict[Key, int] = {
    ("src", _ONE, 0xFFFFFFFF): 0,
    ("dst", _ONE, 0xFFFFFFFF): 0,
    ("in", "tap1"): 0,
    ("out", "tap1"): 0,
}
_OTHERS: dict[Key, int] = {
    ("src", _ONE + 1, 0xFFFFFFFF): 1,
    ("dst", _ONE + 1, 0xFFFFFFFF): 1,
    ("in", "tap2"): 1,
    ("out", "tap2"): 1,
}


def _walk(text: str, packet: Packet = _PACKET, indexed: bool = True) -> Outcome:
    table = parse(text, family=4).rulesets[0].tables["filter"]
    names = {**_NAMES, **_OTHERS} if indexed else {}
    keys = (*_NAMES, port_key(packet.dport)) if indexed else (port_key(packet.dport),)
    outcome = TableWalker(table, names).walk("FORWARD", replace(packet), _TEMPLATE, keys)
    assert outcome is not None
    return outcome


def _forward(*rules: str, policy: str = "ACCEPT", **chains: tuple[str, ...]) -> str:
    lines = ["*filter", f":FORWARD {policy} [0:0]", *(f":{name} - [0:0]" for name in chains)]
    lines += [f"-A FORWARD {rule}" for rule in rules]
    lines += [f"-A {name} {rule}" for name, body in chains.items() for rule in body]
    return "\n".join([*lines, "COMMIT", ""])


@pytest.mark.parametrize(
    ("text", "accepted", "dropped"),
    [
        (_forward("-i tap2 -j DROP", "-i tap1 -j ACCEPT", "-j DROP"), 2, None),
        (_forward("-i tap2 -j DROP", "-i tap2 -j ACCEPT"), 2, None),
        (_forward("-i tap2 -j DROP", policy="DROP"), None, 1),
        (_forward("-j c", "-j DROP", c=("-i tap2 -j DROP", "-i tap1 -j RETURN", "-j DROP")), None, 4),
        (_forward("-j c", "-j DROP", c=("-j ACCEPT",)), 2, None),
        (_forward("-g c", "-j DROP", c=("-i tap2 -j DROP",)), 2, None),
        (_forward("-m limit --limit 1/sec -j ACCEPT", "-j DROP"), 1, 2),
        (_forward("-m set --match-set s src -j c", "-j DROP", c=("-j LOG", "-j LOG")), None, 4),
        (_forward("-j MARK --set-xmark 0x1/0x1", "-m mark --mark 0x1/0x1 -j ACCEPT", "-j DROP"), 2, None),
        (_forward("-j MARK --set-xmark 0x1/0x1", "-m mark ! --mark 0x1/0x1 -j ACCEPT", "-j DROP"), None, 3),
        (_forward("-m mark --mark 0x0/0xff -j ACCEPT", "-j DROP"), 1, None),
        (_forward("-o eth0 -j ACCEPT", "-j DROP"), 1, 2),
        (_forward("-o tap2 -j ACCEPT", "-j DROP"), None, 2),
        (_forward("-p udp -j ACCEPT", "-p tcp -m tcp --dport 443 -j ACCEPT", "-j DROP"), 2, None),
    ],
)
def test_counts_by_hand(text: str, accepted: int | None, dropped: int | None) -> None:
    outcome = _walk(text)
    assert (outcome.accepted, outcome.dropped) == (accepted, dropped)


def test_an_established_packet_ends_where_its_state_is_accepted() -> None:
    text = _forward("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-i tap1 -j DROP")
    assert _walk(text).dropped == 2
    assert _walk(text, replace(_PACKET, state="ESTABLISHED")).accepted == 1


@settings(deadline=None)  # the machine may be busy
@given(walk_rulesets())
def test_the_index_changes_no_count(text: str) -> None:
    assert _walk(text, indexed=True) == _walk(text, indexed=False)
    later = replace(_PACKET, state="ESTABLISHED", link_in=ABSENT)
    assert _walk(text, later, indexed=True) == _walk(text, later, indexed=False)


def test_a_flat_host_walks_longer_with_every_tenant_and_dispatch_does_not_help_the_last() -> None:
    flat = [walk_all(attribute(parse(make_host(n, 1, style="flat").text))).longest for n in (20, 40)]
    assert flat[1] - flat[0] == 20 * (
        flat[0] - walk_all(attribute(parse(make_host(19, 1, style="flat").text))).longest
    )
    chains = [walk_all(attribute(parse(make_host(n, 1, style="chains").text))).longest for n in (20, 40)]
    assert chains[1] > chains[0]
    assert chains[1] < flat[1]


def test_the_first_tenant_is_served_before_the_last() -> None:
    walks = walk_all(attribute(parse(make_host(60, 1, style="flat").text)))
    established = walks.totals["ESTABLISHED"]
    assert established[0] < established[30] < established[-1]
