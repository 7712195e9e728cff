"""The prover's parts: covers, published ports as text, fallbacks of the splitter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netslot.errors import SpecError
from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import common_pattern, cover, survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.published import Published, read_published, write_published
from netslot.rulesets.split import split

ONES = 0xFFFFFFFF


@given(st.sets(st.integers(0, 255), min_size=1, max_size=60))
def test_a_cover_holds_exactly_what_it_covers(numbers: set[int]) -> None:
    found = cover([(number, ONES) for number in numbers])
    assert {n for n in range(256) if any(n & mask == value for value, mask in found)} == numbers
    assert len(found) <= len(numbers)


@given(st.sets(st.integers(0, ONES), min_size=1, max_size=20))
def test_a_common_pattern_holds_all(numbers: set[int]) -> None:
    pattern = common_pattern([(number, ONES) for number in numbers])
    assert pattern is not None
    assert all(number & pattern[1] == pattern[0] for number in numbers)


def test_published_ports_read_back_as_they_were() -> None:
    text = "*nat\n:PREROUTING ACCEPT [0:0]\n"
    text += "-A PREROUTING -i eth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2:8080\n"
    text += "-A PREROUTING -i eth0 -p tcp -m tcp --dport 81 -j DNAT --to-destination 10.0.0.3:81\nCOMMIT\n"
    rules = list(parse(text).rulesets[0].tables["nat"].chains["PREROUTING"].rules)
    published = Published({"PREROUTING": rules}, {"PREROUTING": True})
    back = read_published(write_published(published, 4), 4, "publish.nft")
    assert [rule.target for rule in back.rules["PREROUTING"]] == [rule.target for rule in rules]
    assert (back.first, back.statements) == ({"PREROUTING": True}, 1)


FLOATING = """*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -d 198.51.100.1/32 -i eth0 -j DNAT --to-destination 10.1.0.2
-A PREROUTING -d 198.51.100.2/32 -i eth0 -j DNAT --to-destination 10.1.0.6
-A POSTROUTING -s 10.1.0.2/32 -o eth0 -j SNAT --to-source 198.51.100.1
-A POSTROUTING -s 10.1.0.6/32 -o eth0 -j SNAT --to-source 198.51.100.2
-A POSTROUTING -o eth0 -j MASQUERADE
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
-A FORWARD ! -s 10.1.0.2/32 -i tap1 -j DROP
-A FORWARD ! -s 10.1.0.6/32 -i tap2 -j DROP
COMMIT
"""


def test_addresses_lent_to_tenants_are_two_maps_and_one_class() -> None:
    dump = parse(FLOATING)
    tenants = attribute(dump).tenants
    result = split(dump, tenants)
    assert "198.51.100.1 : 10.1.0.2," in result.files["publish.nft"]
    assert "10.1.0.6 : 198.51.100.2," in result.files["publish.nft"]
    assert "198.51.100" not in result.files["root.rules"]
    verdict = prove(dump, survey(dump, tenants), read(result.files))
    assert verdict.equivalent and verdict.classes == 1, (verdict.counterexamples, verdict.obstacles)
    wrong = result.files["publish.nft"].replace("198.51.100.2 : 10.1.0.6", "198.51.100.2 : 10.1.0.2")
    assert not prove(dump, survey(dump, tenants), read(result.files | {"publish.nft": wrong})).equivalent


def test_a_foreign_line_among_published_ports_is_refused() -> None:
    with pytest.raises(SpecError, match=r"publish\.nft:2"):
        read_published("table ip netslot-publish {\n\tip saddr 10.0.0.1 drop\n}\n", 4, "publish.nft")


TWO = """*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
-A INPUT -d 10.1.0.1/32 -i tap1 -p udp -m udp --dport 53 -j ACCEPT
-A INPUT -d 10.1.0.5/32 -i tap2 -p udp -m udp --dport 53 -j ACCEPT
{forward}
COMMIT
"""


def _split(*forward: str, **options: str) -> tuple[bool, list[str]]:
    dump = parse(TWO.format(forward="\n".join(forward)))
    tenants = attribute(dump).tenants
    result = split(dump, tenants, **options)  # type: ignore[arg-type]
    if result.refused:
        return False, result.refused
    verdict = prove(dump, survey(dump, tenants), read(result.files), enough=1)
    return verdict.equivalent, verdict.obstacles


def _both(rule: str) -> list[str]:
    return [f"-A FORWARD {rule}".format(ip=f"10.1.0.{4 * n - 2}/32", tap=f"tap{n}") for n in (1, 2)]


@pytest.mark.parametrize("attachment", ["tap", "veth", "process"])
def test_every_attachment_is_proved(attachment: str) -> None:
    rules = [
        *_both("-s {ip} -i {tap} -o eth0 -p tcp -m tcp --dport 443 -j ACCEPT"),
        *_both("-d {ip} -o {tap} -p icmp -j ACCEPT"),
    ]
    assert _split(*rules, attachment=attachment) == (True, [])


def test_a_question_about_the_way_in_keeps_decisions_in_root() -> None:
    rules = [
        *_both("-s {ip} -i {tap} -o eth0 -j ACCEPT"),
        *_both("-d {ip} -i eth0 -o {tap} -p tcp -m tcp --dport 80 -j ACCEPT"),
    ]
    assert _split(*rules) == (True, [])


def test_what_a_slot_cannot_answer_is_left_to_root() -> None:
    rules = [*_both("-s {ip} -i {tap} -o eth0 -j ACCEPT"), "-A FORWARD -i eth1 -j DROP"]
    assert _split(*rules) == (True, [])
