"""Explaining bytes by words: which encoding, where, and what is refused."""

from __future__ import annotations

import random
import struct

import pytest

from netslot.errors import SpecError, UsageError
from netslot.kernel import ipset, xtables
from netslot.policy import cidr_sets
from netslot.policy.iptables_places import ENCODERS, Place, Sample, Unexplained, apply, atoms, explain, merge, words
from netslot.policy.iptables_samples import ladders
from netslot.policy.iptables_tool import Source, port_values


def blob(value: bytes, width: int = 16) -> bytes:
    return b"\x07" * 6 + value.ljust(width, b"\0") + b"\x07" * 6


def learnt(kind: str, template: str, values: list[str]) -> list[Place]:
    samples = [Sample({"v": value}, blob(ENCODERS[kind](template.replace("${v}", value)))) for value in values]
    return explain(samples[0], samples[1:], atoms(f"-A INPUT {template}"))


@pytest.mark.parametrize(
    ("kind", "template", "values", "other"),
    [
        ("u8", "${v}", ["17", "254", "3"], "99"),
        ("u16", "${v}", ["17", "40001", "3"], "8080"),
        ("be16", "${v}", ["17", "40001", "3"], "8080"),
        ("u32", "${v}", ["17", "3000000001", "3"], "70000"),
        ("u32", "${v}", ["0x11", "0xdeadbeef", "0x3"], "0x1234"),
        ("not32", "${v}", ["17", "3000000001", "3"], "70000"),
        ("u64", "${v}", ["17", "5000000000000", "3"], "70000"),
        ("ipv4", "${v}", ["10.0.0.1", "192.168.77.3"], "1.2.3.4"),
        ("ipv4", "10.0.${v}.1", ["1", "200", "33"], "9"),
        ("ipv4 mask", "${v}", ["10.0.0.0/8", "10.2.0.0/17", "1.2.3.4/29"], "9.9.9.9/30"),
        ("ipv6", "${v}", ["fd00::1", "2001:db8:ff::7"], "fe80::9"),
        ("ipv6 last", "${v}", ["fd00::/64", "2001:db8::/48", "::1/127"], "fe80::/10"),
        ("mac", "${v}", ["06:00:ac:10:00:02", "02:11:22:33:44:55"], "02:aa:bb:cc:dd:ee"),
        ("rate", "${v}", ["5/sec", "700/sec", "3/sec"], "60/sec"),
        ("rate", "${v}/minute", ["5", "700", "3"], "60"),
        ("text", "slot-${v}-x", ["17", "40001", "3"], "999"),
        ("interface mask", "${v}", ["tap0", "a", "netslot0123"], "eth0"),
    ],
)
def test_what_was_learnt_holds_for_other_values(kind: str, template: str, values: list[str], other: str) -> None:
    places = learnt(kind, template, values)
    base = bytearray(blob(ENCODERS[kind](template.replace("${v}", values[0]))))
    assert bytes(apply(base, places, {"v": other})) == blob(ENCODERS[kind](template.replace("${v}", other)))


@pytest.mark.parametrize(
    ("kind", "values", "beyond"),
    [
        ("u16", ["17", "40001", "3"], "65536"),
        ("u8", ["17", "254", "3"], "-1"),
        ("text", ["a", "abcdef"], "abcdefg"),
        ("interface mask", ["tap0", "a"], "sixteen-bytes-xx"),
        ("ipv4", ["10.0.0.1", "192.168.77.3"], "fd00::1"),
    ],
)
def test_a_value_beyond_what_was_tried_is_refused(kind: str, values: list[str], beyond: str) -> None:
    places = learnt(kind, "${v}", values)
    with pytest.raises(ValueError, match=r"."):
        apply(bytearray(blob(b"")), places, {"v": beyond})


def test_bytes_that_follow_no_word_are_unexplained() -> None:
    samples = [
        Sample({"v": value}, blob(bytes([length]) + value.encode())) for value, length in (("a", 1), ("bcd", 3))
    ]
    with pytest.raises(Unexplained, match="byte 6"):
        explain(samples[0], samples[1:], ["${v}"])
    with pytest.raises(Unexplained, match="number of rules"):
        explain(samples[0], [Sample({"v": "x"}, b"longer" * 9)], ["${v}"])


def test_two_values_may_not_share_a_byte() -> None:
    first = Place("${a}", "u32", 4, (0, 8))
    assert merge([first, Place("${a}", "u32", 4, (8, 16))]) == (Place("${a}", "u32", 4, (0, 8, 16)),)
    with pytest.raises(Unexplained, match="share byte 10"):
        merge([first, Place("${b}", "u16", 2, (10,))])


def test_words_are_the_tools() -> None:
    line = r'-A INPUT -m comment --comment "slot ${slot}: \"a b\"" --to [${a}]:${b}-9'
    assert words(line)[-1] == "[${a}]:${b}-9"
    assert 'slot ${slot}: "a b"' in words(line)
    assert {"[${a}]:${b}-9", "[${a}]", "${b}", "${b}-9"} <= set(atoms(line))
    assert atoms("-s ${net}/24,10.0.0.1")[0] == "${net}/24,10.0.0.1"


@pytest.mark.parametrize(
    "value", ["17", "0x1f", "10.0.0.1", "10.1.0.0/16", "fd00::1", "fd00::/64", "5/sec", "tap0", "1,2"]
)
def test_other_values_are_of_the_same_kind(value: str) -> None:
    found = [candidate for ladder in ladders(value, random.Random(1)) for candidate in ladder]
    assert len(set(found) - {value}) >= 2
    for kind, encoder in ENCODERS.items():
        if kind in ("ipv4", "ipv6", "rate", "u64") and _takes(kind, value):
            assert all(encoder(candidate) for candidate in found)


def _takes(kind: str, value: str) -> bool:
    try:
        return bool(ENCODERS[kind](value))
    except ValueError:
        return False


def test_lines_for_published_ports() -> None:
    comment = "# ${publish.proto} in a comment means nothing"
    text = (
        f"*nat\n{comment}\n"
        + "-A PREROUTING -p ${publish.proto} --dport ${publish.outer} -j DNAT --to ${a}\nCOMMIT\n"
    )
    source = Source(xtables.IPV4, "slot.rules", text, ("publish",))
    assert source.port_lines == {2: "publish"}
    assert source.tables == ("nat",)
    assert "PREROUTING" not in source.render({"a": "x"})
    ports = source.items({"publish": ["tcp:80:8080", "udp:53:53"]})
    assert "--dport 80 -j DNAT --to x\n-A PREROUTING -p udp --dport 53" in source.render({"a": "x"}, ports)


@pytest.mark.parametrize("item", ["tcp", "tcp:80", "tcp:0:1", "tcp:1:65536", ":1:1", "tcp:a:b", "6:1:1", "tcp:1:1:1"])
def test_published_ports_have_one_form(item: str) -> None:
    with pytest.raises(SpecError):
        port_values("publish", item)


def test_elements_of_sets() -> None:
    assert cidr_sets.encode(["10.0.0.0/8", "fd00::/8", "192.0.2.1"], 4) == [
        ipset.element_form(ipset.FAMILY_IPV4, length)[0] + raw + ipset.element_form(ipset.FAMILY_IPV4, length)[1]
        for raw, length in ((bytes([10, 0, 0, 0]), 8), (bytes([192, 0, 2, 1]), 32))
    ]
    assert len(cidr_sets.encode(["0.0.0.0/0", "::/0"], 4)) == len(cidr_sets.encode(["::/0"], 6)) == 2
    before, behind = ipset.element_form(ipset.FAMILY_IPV6, 64)
    assert struct.unpack_from("=H", before)[0] == len(before) + 16 + len(behind) == 36


@pytest.mark.parametrize("cidr", ["10.0.0.0/33", "10.0.0", "x", "10.0.0.0/-1", "10.0.0.0/a", ""])
def test_a_wrong_cidr_is_refused(cidr: str) -> None:
    with pytest.raises(UsageError):
        cidr_sets.encode([cidr], 4)


def test_sets_are_those_that_rules_name_in_one_order() -> None:
    found = cidr_sets.sets_of(["allow", "deny"], frozenset({"deny6", "allow", "deny", "other"}))
    assert [(each.name, each.version) for each in found] == [("allow", 4), ("deny", 4), ("deny6", 6)]
    with pytest.raises(UsageError):
        cidr_sets.sets_of(["a" * 32], frozenset({"a" * 32}))
