"""Rules in the wrong place are refused with a reason; the examples, and what is right, are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netslot.errors import SpecError
from netslot.host import lint, nft_text, rule_view
from netslot.spec.load import load

EXAMPLES = Path(__file__).parents[3] / "examples"

SPEC = """
slots = 300
uplink = "eth0"
[addresses]
pool = "10.201.0.0/16"
pool6 = "fd5c:a7e:10::/48"
[attachment]
kind = "{kind}"
[rules]
{slot}
[root]
{root}
"""

IPTABLES = ('backend = "iptables-legacy"\nipv4 = "slot.rules"', 'backend = "iptables-legacy"\nipv4 = "root.rules"')
NFT = ('backend = "nftables"\nnft = "slot.rules"', 'backend = "nftables"\nnft = "root.rules"')


def findings(
    directory: Path, backend: tuple[str, str], *, slot: str = "", root: str = "", kind: str = "tap"
) -> list[lint.LintFinding]:
    (directory / "slot.rules").write_text(slot)
    (directory / "root.rules").write_text(root)
    spec = directory / "netslot.toml"
    spec.write_text(SPEC.format(kind=kind, slot=backend[0], root=backend[1]))
    return lint.lint(load(spec))


def iptables(rule: str, table: str = "filter") -> str:
    return f"*{table}\n:mine - [0:0]\n{rule}\nCOMMIT\n"


def nft(rule: str, hook: str = "forward", family: str = "ip") -> str:
    head = f"table {family} mine {{\n\tset many {{ type ipv4_addr; }}\n\tchain c {{\n"
    return head + f"\t\ttype filter hook {hook} priority 0; policy accept;\n\t\t{rule}\n\t}}\n}}\n"


@pytest.mark.parametrize("spec", sorted(EXAMPLES.glob("*/*.toml")), ids=lambda path: "/".join(path.parts[-2:]))
def test_the_examples_raise_no_alarm(spec: Path) -> None:
    assert lint.lint(load(spec)) == []


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ("-A FORWARD -i slot7 -j ACCEPT", "slot7"),
        ("-A FORWARD -o slot1+ -j ACCEPT", "slot1+"),
        ("-A FORWARD -s 10.201.0.15/32 -j ACCEPT", "10.201.0.15/32"),
        ("-A FORWARD -s 10.201.0.0/17 -j ACCEPT", "10.201.0.0/17"),
        ("-A FORWARD ! -d 10.201.3.4 -j DROP", "10.201.3.4"),
        ("-A FORWARD -s 0.0.0.2/0.0.0.2 -j DROP", "0.0.0.2 with the mask 0.0.0.2"),
        ("-A FORWARD -m iprange --src-range 10.200.255.0-10.201.0.9 -j DROP", "10.200.255.0-10.201.0.9"),
        ("-A FORWARD -d 172.16.0.2 -j ACCEPT", "172.16.0.2"),
        ("-A FORWARD -m mac --mac-source 02:6e:00:00:00:07 -j ACCEPT", "02:6e:00:00:00:07"),
        ("-A FORWARD -m mac --mac-source 06:00:AC:10:00:02 -j ACCEPT", "06:00:ac:10:00:02"),
        (":slot12 - [0:0]", "slot12"),
    ],
)
def test_a_root_rule_of_iptables_that_names_a_slot_is_refused(tmp_path: Path, rule: str, word: str) -> None:
    (finding,) = findings(tmp_path, IPTABLES, root=iptables(rule))
    assert finding.fatal
    assert finding.line == 3
    assert finding.message.startswith(f"{word} ") or f"'{word}'" in finding.message


def test_a_port_published_to_a_slot_in_root_is_refused(tmp_path: Path) -> None:
    rule = "-A PREROUTING -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.201.0.15:80"
    (finding,) = findings(tmp_path, IPTABLES, root=iptables(rule, "nat"))
    assert "10.201.0.15:80" in finding.message


@pytest.mark.parametrize(
    "rule",
    [
        "-A FORWARD -i slot+ -j ACCEPT",
        "-A FORWARD -s 10.201.0.0/16 -j ACCEPT",
        "-A FORWARD -s 10.0.0.0/8 -j ACCEPT",
        "-A FORWARD -d 172.16.0.0/12 -j REJECT",
        "-A FORWARD -s 10.202.0.15 -j ACCEPT",
        "-A FORWARD -s 0.0.0.0/0.0.0.0 -j ACCEPT",
        "-A FORWARD -i slots0 -j ACCEPT",
        '-A FORWARD -m comment --comment "as slot7 10.201.0.15 had it" -j ACCEPT',
        '-A FORWARD -j LOG --log-prefix "slot7 "',
        "-A FORWARD -p tcp -m tcp --dport 80:90 -j ACCEPT",
    ],
)
def test_a_root_rule_that_names_all_slots_or_none_is_not(tmp_path: Path, rule: str) -> None:
    assert findings(tmp_path, IPTABLES, root=iptables(rule)) == []


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ('iifname "slot7" accept', "slot7"),
        ('oifname { "eth1", "slot3" } drop', "slot3"),
        ("ip saddr 10.201.0.15 accept", "10.201.0.15"),
        ("ip saddr { 192.0.2.1,\n10.201.0.4/31 } accept", "10.201.0.4/31"),
        ("ip daddr 10.201.0.2-10.201.0.9 drop", "10.201.0.2-10.201.0.9"),
        ("ip saddr & 0.0.0.1 == 0.0.0.1 drop", "0.0.0.1 with the mask 0.0.0.1"),
        ("ip6 saddr fd5c:a7e:10:7::/64 accept", "fd5c:a7e:10:7::/64"),
        ("ether saddr 02:6e:01:00:00:07 accept", "02:6e:01:00:00:07"),
        ("tcp dport vmap { 80 : accept, 81 : jump slot4 }", "slot4"),
    ],
)
def test_a_root_rule_of_nftables_that_names_a_slot_is_refused(tmp_path: Path, rule: str, word: str) -> None:
    found = findings(tmp_path, NFT, root=nft(rule, family="inet"))
    assert len(found) == 1
    assert word in found[0].message
    assert found[0].line == 5


def test_elements_and_defines_count_too_and_so_does_a_flush(tmp_path: Path) -> None:
    root = "flush ruleset\ndefine tenant = 10.201.0.15\n" + nft("ip saddr $tenant drop")
    root += "add element ip mine many { 10.201.0.17 }\n"
    found = findings(tmp_path, NFT, root=root)
    assert [finding.line for finding in found] == [1, 7, 10]


def test_a_map_of_published_ports_is_worth_a_look_only(tmp_path: Path) -> None:
    """A port of the host's own address can be nowhere else, and elements are no rules."""
    root = """table ip publish {
    map ports {
        type inet_proto . inet_service : ipv4_addr . inet_service
        elements = { tcp . 8080 : 10.201.0.35 . 80 }
    }
}
"""
    (finding,) = findings(tmp_path, NFT, root=root)
    assert not finding.fatal
    assert finding.line == 4


@pytest.mark.parametrize(
    "rule", ['iifname "slot*" accept', "ip saddr 10.201.0.0/16 accept", 'iifname "slots0" drop comment "slot7"']
)
def test_nftables_rules_for_all_slots_pass(tmp_path: Path, rule: str) -> None:
    assert findings(tmp_path, NFT, root=nft(rule)) == []


@pytest.mark.parametrize(
    ("table", "rule", "words"),
    [
        ("filter", "-A FORWARD -o eth0 -j ACCEPT", "no interface 'eth0'"),
        ("filter", "-A FORWARD -o ${root_if} -j ACCEPT", "no interface 'slot1'"),
        ("filter", "-A FORWARD -i slot+ -j ACCEPT", "no interface 'slot*'"),
        ("nat", "-A PREROUTING -i up0 -d 192.0.2.1 -p tcp -j DNAT --to-destination ${guest_address}",
         "a packet to 192.0.2.1 never comes"),
        ("nat", "-A PREROUTING -d 192.0.2.1 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.16.0.2:80",
         "a packet to 192.0.2.1 never comes"),
        ("mangle", "-A PREROUTING -i tap0 -j MARK --set-xmark 0x1/0xffffffff", "nothing in the slot reads this mark"),
        ("filter", "-A OUTPUT -d 169.254.169.254 -j DROP", "a guest's packets are forwarded"),
    ],
)  # fmt: skip
def test_a_slot_rule_that_cannot_work_is_refused(tmp_path: Path, table: str, rule: str, words: str) -> None:
    (finding,) = findings(tmp_path, IPTABLES, slot=iptables(rule, table))
    assert finding.fatal
    assert finding.line == 3
    assert finding.rule == rule
    assert words in finding.message


@pytest.mark.parametrize(
    ("hook", "rule", "words"),
    [
        ("forward", 'oifname "eth0" accept', "no interface 'eth0'"),
        ("forward", 'iifname { "tap0", "slot*" } accept', "no interface 'slot*'"),
        ("prerouting", 'iifname "up0" ip daddr 192.0.2.1 tcp dport 80 dnat to 172.16.0.2', "a packet to 192.0.2.1"),
        ("prerouting", 'iifname "tap0" meta mark set 0x1', "nothing in the slot reads this mark"),
        ("output", "ip daddr 169.254.169.254 drop", "a guest's packets are forwarded"),
    ],
)
def test_the_same_of_nftables(tmp_path: Path, hook: str, rule: str, words: str) -> None:
    (finding,) = findings(tmp_path, NFT, slot=nft(rule, hook))
    assert finding.fatal
    assert words in finding.message


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        ("nat", "-A PREROUTING -i up0 -p tcp -m tcp --dport 80 -j DNAT --to-destination ${guest_address}"),
        ("nat", "-A PREROUTING -i up0 -d ${address} -j DNAT --to-destination ${guest_address}"),
        (
            "nat",
            "-A PREROUTING -i tap0 -d 192.0.2.53 -p udp -m udp --dport 53 -j DNAT --to-destination 198.51.100.53",
        ),
        ("mangle", "-A PREROUTING -j MARK --set-xmark 0x1/0xffffffff\n-A FORWARD -m mark --mark 0x1 -j DROP"),
        ("filter", "-A OUTPUT -d 169.254.169.254 -j DROP\n-A FORWARD -d 169.254.0.0/16 -j DROP"),
        ("filter", "-A FORWARD -j mine\n-A OUTPUT -j mine\n-A mine -d 169.254.169.254 -j DROP"),
        ("raw", "-A PREROUTING -i tap0 -m rpfilter --invert -j DROP"),
        ("filter", "-A FORWARD -i tap+ -j ACCEPT"),
    ],
)
def test_a_slot_rule_that_works_is_not(tmp_path: Path, table: str, rule: str) -> None:
    assert findings(tmp_path, IPTABLES, slot=iptables(rule, table)) == []


def test_a_bridge_and_an_unset_mark_are_worth_a_look_only(tmp_path: Path) -> None:
    rules = "-A FORWARD -m physdev --physdev-in port1 -j ACCEPT\n-A FORWARD -m mark --mark 0x1 -j ACCEPT"
    found = findings(tmp_path, IPTABLES, slot=iptables(rules))
    assert [finding.fatal for finding in found] == [False, False]


def test_a_process_is_not_forwarded(tmp_path: Path) -> None:
    (finding,) = findings(tmp_path, IPTABLES, kind="process", slot=iptables("-A FORWARD -d 169.254.169.254 -j DROP"))
    assert "OUTPUT" in finding.hint
    assert findings(tmp_path, IPTABLES, kind="process", slot=iptables("-A OUTPUT -d 169.254.169.254 -j DROP")) == []


def test_refusing_names_the_place_and_what_to_do(tmp_path: Path) -> None:
    findings(tmp_path, IPTABLES, root=iptables("-A FORWARD -i slot7 -j ACCEPT\n-A FORWARD -i slot8 -j ACCEPT"))
    with pytest.raises(SpecError) as refused:
        lint.refuse(load(tmp_path / "netslot.toml"))
    assert refused.value.line == 3
    assert "1 more" in str(refused.value)
    assert "every slot" in (refused.value.hint or "")


_COMMANDS = ("table", "chain", "add", "rule", "type", "hook", "define", "jump", "set", "map", "elements")
_EXPRESSIONS = ("ip", "daddr", "iifname", "mark", "dnat", "to", "10.201.0.3", '"slot1"', '"x', "$x", "c")
WORDS = st.sampled_from((*_COMMANDS, *_EXPRESSIONS, *"{};&=:!\n"))


@given(st.lists(WORDS, max_size=40))
def test_nonsense_is_left_to_nft_to_refuse(words: list[str]) -> None:
    """The linters judge no syntax, so no text may make them fall over."""
    text = " ".join(words)
    rule_view.from_nft(text)
    nft_text.read(text).hooks()
