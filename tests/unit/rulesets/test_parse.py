"""The parser: the grammar of iptables-save, and what it says about text that is not that."""

from __future__ import annotations

import pytest

from netslot.errors import SpecError
from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.audit import audit
from netslot.rulesets.graph import depth
from netslot.rulesets.model import Rule
from netslot.rulesets.parse import merge, parse
from netslot.rulesets.write import write


def _rule(text: str, family: int = 4) -> Rule:
    whole = f"*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:user - [0:0]\n-A FORWARD {text}\nCOMMIT\n"
    ruleset = parse(whole, family=6 if family == 6 else 4).rulesets[0]
    return ruleset.tables["filter"].chains["FORWARD"].rules[0]


def test_a_whole_rule() -> None:
    rule = _rule("-s 10.0.0.0/8 ! -d 10.1.2.3/32 -i tap+ ! -o eth0 -p tcp -m tcp --dport 22:25 -j DROP")
    assert rule.matches == (
        m.Address("src", 0x0A000000, 0xFF000000),
        m.Address("dst", 0x0A010203, 0xFFFFFFFF, negated=True),
        m.Interface("in", "tap", wildcard=True),
        m.Interface("out", "eth0", negated=True),
        m.Protocol(6),
        m.Ports("tcp", "dst", ((22, 25),)),
    )
    assert rule.target == t.Drop()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("-m multiport ! --ports 1,5:9", m.Ports("multiport", "either", ((1, 1), (5, 9)), True)),
        ("-p icmp -m icmp --icmp-type 3/1", m.IcmpType("icmp", 3, 1, 1)),
        ("-p icmp -m icmp --icmp-type echo-request", m.IcmpType("icmp", 8)),
        ("-p tcp -m tcp --syn", m.TcpFlags(0x17, 0x02)),
        ("-p tcp -m tcp ! --tcp-flags SYN,ACK NONE", m.TcpFlags(0x12, 0, True)),
        ("-m state --state ESTABLISHED,RELATED", m.CtState("state", frozenset(("ESTABLISHED", "RELATED")))),
        ("-m conntrack ! --ctstate NEW", m.CtState("conntrack", frozenset(("NEW",)), True)),
        ("-m mark --mark 0x1/0xff", m.Mark(1, 0xFF)),
        ("-m connmark ! --mark 16", m.Connmark(16, 0xFFFFFFFF, True)),
        ("-m addrtype --dst-type LOCAL --limit-iface-in", m.AddrType("dst", frozenset(("LOCAL",)), False, "in")),
        ("-m iprange --src-range 10.0.0.1-10.0.0.9", m.IpRange("src", 0x0A000001, 0x0A000009)),
        ("-m mac --mac-source FA:16:3E:0:1:2", m.Mac("fa:16:3e:00:01:02")),
        ("-m physdev --physdev-in tap+", m.Physdev("in", "tap", True)),
        ("-m physdev ! --physdev-is-bridged", m.PhysdevIs("bridged", True)),
        ("-m devgroup --dst-group 0x5/0xf", m.DevGroup("out", 5, 15)),
        ("-m set ! --match-set web dst,dst", m.SetMatch("web", ("dst", "dst"), True)),
        ("-m rpfilter --loose --invert", m.RpFilter(loose=True, negated=True)),
        ("-m length --length 100:", m.Length(100, 65535)),
        ("-m ttl --ttl-gt 5", m.Ttl("gt", 5)),
        ("-m dscp --dscp 0x0a", m.Dscp(10)),
        ("-m pkttype --pkt-type broadcast", m.PktType("broadcast")),
        ("-m owner --uid-owner 0-99", m.Owner("uid", 0, 99)),
        ("-p 47", m.Protocol(47)),
        ("-s 10.0.0.0/255.0.255.0", m.Address("src", 0x0A000000, 0xFF00FF00)),
        ("-s 192.0.2.77/24", m.Address("src", 0xC0000200, 0xFFFFFF00)),
        ("-m limit --limit 5/sec", m.Opaque("limit", ("-m", "limit", "--limit", "5/sec"))),
        ("-m foo ! --bar baz", m.Opaque("foo", ("-m", "foo", "!", "--bar", "baz"))),
        ("-s host.example.net", m.Opaque("-s", ("-s", "host.example.net"))),
        ("-p udp -m udp --dport domain", m.Opaque("udp", ("-m", "udp", "--dport", "domain"))),
    ],
)
def test_matches(text: str, match: m.Match) -> None:
    assert _rule(text).matches[-1] == match


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("", t.NoTarget()),
        ("-j user", t.Jump("user")),
        ("-g user", t.Goto("user")),
        ("-j REJECT", t.Reject("icmp-port-unreachable")),
        (
            "-j DNAT --to-destination 10.0.0.5:80",
            t.Dnat(t.NatTarget((0x0A000005, 0x0A000005), (80, 80))),
        ),
        (
            "-j DNAT --to-destination 10.0.0.5:5000-5002/5000 --random",
            t.Dnat(t.NatTarget((0x0A000005, 0x0A000005), (5000, 5002), 5000, frozenset(("--random",)))),
        ),
        ("-j SNAT --to-source 10.0.0.1-10.0.0.3", t.Snat(t.NatTarget((0x0A000001, 0x0A000003)))),
        ("-j MASQUERADE --to-ports 1024-65535", t.Masquerade(t.NatTarget(ports=(1024, 65535)))),
        ("-j REDIRECT --to-ports 80", t.Redirect(t.NatTarget(ports=(80, 80)))),
        ("-j NETMAP --to 10.0.0.0/24", t.Netmap(0x0A000000, 0xFFFFFF00)),
        ("-j MARK --set-xmark 0x5/0xf", t.SetMark(5, 15)),
        ("-j MARK --set-mark 0x5/0xf", t.SetMark(5, 15)),
        ("-j MARK --or-mark 0x8", t.SetMark(8, 8)),
        ("-j MARK --and-mark 0xf", t.SetMark(0, 0xFFFFFFF0)),
        ("-j MARK --xor-mark 0x3", t.SetMark(3, 0)),
        ("-j CONNMARK --save-mark --mask 0xff", t.SaveMark(0xFF, 0xFF)),
        ("-j CONNMARK --restore-mark", t.RestoreMark(0xFFFFFFFF, 0xFFFFFFFF)),
        ("-j CT --zone 7", t.CtTarget(("-j", "CT", "--zone", "7"), 7)),
        ("-j CT --notrack", t.Notrack(("-j", "CT", "--notrack"))),
        ("-j LOG --log-prefix x", t.Log("LOG", ("-j", "LOG", "--log-prefix", "x"))),
        ("-j TCPMSS --set-mss 1400", t.Modify("TCPMSS", ("-j", "TCPMSS", "--set-mss", "1400"))),
        ("-j NFQUEUE --queue-num 3", t.OpaqueTarget("NFQUEUE", ("-j", "NFQUEUE", "--queue-num", "3"))),
    ],
)
def test_targets(text: str, target: t.Target) -> None:
    assert _rule(text).target == target


@pytest.mark.parametrize(
    ("text", "family", "target"),
    [
        ("DNAT --to 10.0.0.2:80", 4, t.Dnat(t.NatTarget((0x0A000002, 0x0A000002), (80, 80)))),
        ("SNAT --to 10.0.0.2", 4, t.Snat(t.NatTarget((0x0A000002, 0x0A000002)))),
        ("REDIRECT --to 8080", 4, t.Redirect(t.NatTarget(None, (8080, 8080)))),
        ("DNAT --to-destination :36712", 6, t.Dnat(t.NatTarget(None, (36712, 36712)))),
        ("DNAT --to-destination ::1", 6, t.Dnat(t.NatTarget((1, 1)))),
        ("DNAT --to-destination [::1]:80", 6, t.Dnat(t.NatTarget((1, 1), (80, 80)))),
    ],
)
def test_translations_in_short_and_of_ports_only(text: str, family: int, target: t.Target) -> None:
    assert _rule(f"-p tcp -j {text}", family).target == target


def test_conditions_that_are_always_true_are_none() -> None:
    assert _rule('-s 0.0.0.0/0 -i + -p all -m comment --comment "all of it" -m tcp -j ACCEPT').matches == ()


def test_conditions_that_are_never_true_are_kept() -> None:
    assert _rule("! -s 0.0.0.0/0 -j ACCEPT").matches == (m.Address("src", 0, 0, True),)


def test_comments_keep_blanks_quotes_and_dashes() -> None:
    rule = _rule(r'-m comment --comment "pod\'s \"own\" -j DROP" -m comment --comment -s -j ACCEPT')
    assert rule.comment == 'pod\'s "own" -j DROP -s'
    assert rule.target == t.Accept()


def test_a_comment_may_be_a_sign() -> None:
    rule = _rule('-m comment --comment "!" -s 10.0.0.1/32 -j DROP')
    assert (rule.comment, rule.matches) == ("!", (m.Address("src", 0x0A000001, 0xFFFFFFFF),))


def test_a_link_may_be_called_like_an_option() -> None:
    names = m.Interface("in", "-m"), m.Interface("out", "-j", negated=True)
    assert _rule("-i -m ! -o -j -j DROP").matches == names
    assert parse("*filter\n-A INPUT -i -m\nCOMMIT\n").rulesets[0].rule_count() == 1


def test_options_of_a_match_may_stand_behind_another() -> None:
    rule = _rule("-p tcp -m state --dport 22 --state NEW -j ACCEPT")
    assert set(rule.matches) == {
        m.Protocol(6),
        m.CtState("state", frozenset(("NEW",))),
        m.Ports("tcp", "dst", ((22, 22),)),
    }


def test_old_negation_is_read_and_written_in_the_new_form() -> None:
    rule = _rule("-s ! 10.0.0.0/8 -j DROP")
    assert rule.matches == (m.Address("src", 0x0A000000, 0xFF000000, True),)
    assert rule.text == "! -s 10.0.0.0/8 -j DROP"


def test_invalid_state_with_other_conntrack_options_is_not_a_plain_and() -> None:
    (match,) = _rule("-m conntrack --ctstate INVALID --ctproto 6 -j DROP").matches
    assert isinstance(match, m.Opaque)


def test_equal_clauses_are_one_object() -> None:
    text = "*filter\n:FORWARD ACCEPT [0:0]\n" + "-A FORWARD -s 10.0.0.1/32 -j DROP\n" * 2 + "COMMIT\n"
    first, second = parse(text).rulesets[0].tables["filter"].chains["FORWARD"].rules
    assert first.matches[0] is second.matches[0]
    assert first.target is second.target
    assert first != second


def test_counters_of_rules_and_chains() -> None:
    text = "*filter\n:INPUT DROP [1:2]\n[3:4] -A INPUT -j ACCEPT\n-A INPUT -c 5 6 -j DROP\nCOMMIT\n"
    chain = parse(text).rulesets[0].tables["filter"].chains["INPUT"]
    assert (chain.policy, chain.counters) == ("DROP", (1, 2))
    assert [rule.counters for rule in chain.rules] == [(3, 4), (5, 6)]


def test_hand_written_rule_files() -> None:
    text = (
        "*filter\n-N user\n-P INPUT DROP\n-A INPUT -s 10.0.0.1,10.0.0.2 -j user\n"
        "-I INPUT -i lo -j ACCEPT\n-A INPUT -6 -j DROP\nCOMMIT\n"
    )
    chain = parse(text).rulesets[0].tables["filter"].chains["INPUT"]
    assert chain.policy == "DROP"
    assert [rule.text for rule in chain.rules] == ["-i lo -j ACCEPT", "-s 10.0.0.1 -j user", "-s 10.0.0.2 -j user"]


def test_tabs_and_columns() -> None:
    text = "*filter\n:INPUT\tACCEPT\t[0:0]\n-A\tINPUT\t-i\tlo\t-j\tACCEPT\n-A INPUT    -j   DROP\nCOMMIT\n"
    (chain,) = parse(text).rulesets[0].tables["filter"].chains.values()
    assert [rule.text for rule in chain.rules] == ["-i lo -j ACCEPT", "-j   DROP"]


def test_windows_line_ends_and_missing_last_newline() -> None:
    text = "*filter\r\n:INPUT ACCEPT [0:0]\r\n-A INPUT -j DROP\r\nCOMMIT"
    assert write(parse(text).rulesets[0]) == "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j DROP\nCOMMIT\n"


def test_families_by_banner_by_addresses_and_both_in_one_text() -> None:
    v4 = "# Generated by iptables-save v1.8.9 (nf_tables) on x\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n"
    v6 = "# Generated by ip6tables-save v1.8.9 on x\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n"
    assert [ruleset.family for ruleset in parse(v4 + v6).rulesets] == [4, 6]
    plain = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -s 2001:db8::/32 -j DROP\nCOMMIT\n"
    assert parse(plain).rulesets[0].family == 6
    assert [ruleset.family for ruleset in merge(parse(plain), parse(v4)).rulesets] == [4, 6]
    with pytest.raises(SpecError, match="same address family"):
        merge(parse(v4), parse(v4))


def test_families_without_banners_table_by_table() -> None:
    v4 = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j DNAT --to-destination 10.0.0.1:80-90\nCOMMIT\n"
    v6 = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d ::1/128 -j RETURN\nCOMMIT\n"
    silent = "*filter\n:INPUT DROP [0:0]\nCOMMIT\n"
    both = parse(v4 + silent + v6 + silent).rulesets
    assert [(ruleset.family, list(ruleset.tables)) for ruleset in both] == [
        (4, ["nat", "filter"]),
        (6, ["nat", "filter"]),
    ]
    indented = "  # Generated by ip6tables-save v1.6.1 on x\n" + silent
    assert parse(indented).rulesets[0].family == 6
    assert parse(silent, file="/etc/v6/rules.v4").rulesets[0].family == 4
    assert parse(silent, file="/etc/iptables/rules.v6").rulesets[0].family == 6
    assert parse("# -s 2001:db8::/32 was here\n" + silent).rulesets[0].family == 4


def test_prompts_and_warnings_around_a_dump_are_left_out_and_told() -> None:
    text = (
        "[root@h ~]# iptables-save\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\nsudo: unable to resolve host h\n[root@h ~]#"
    )
    with pytest.raises(SpecError, match="counters"):
        parse(text)
    (ruleset,) = parse(text, pasted=True).rulesets
    assert list(ruleset.tables) == ["filter"]
    assert ruleset.notes == ("3 lines are no part of a table and left out, the first is line 1",)


def test_a_note_about_left_out_tables_is_kept() -> None:
    text = "# Table `foo' is incompatible, use 'nft' tool.\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n"
    assert parse(text).rulesets[0].notes == ("Table `foo' is incompatible, use 'nft' tool.",)


_HEAD = "*filter\n:FORWARD ACCEPT [0:0]\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (_HEAD + "-A FORWARD -s 10.0.0.300 -j DROP\nCOMMIT\n", 3, "not an IPv4 address"),
        (_HEAD + "-A FORWARD -s 10.0.0.0/33 -j DROP\nCOMMIT\n", 3, "prefix length"),
        (_HEAD + "-A FORWARD -j nowhere\nCOMMIT\n", 3, "chain nowhere is not declared"),
        (_HEAD + "-A nowhere -j DROP\nCOMMIT\n", 3, "chain nowhere is not declared"),
        (_HEAD + "-A FORWARD --dport 22 -j DROP\nCOMMIT\n", 3, "--dport"),
        (_HEAD + "-A FORWARD -p tcp -m tcp --dport 22:11 -j DROP\nCOMMIT\n", 3, "ends before it begins"),
        (_HEAD + "-A FORWARD -p tcp -m tcp --dport 70000 -j DROP\nCOMMIT\n", 3, "outside 0..65535"),
        (_HEAD + "-A FORWARD -m conntrack --ctstate NEWISH -j DROP\nCOMMIT\n", 3, "not a connection state"),
        (_HEAD + '-A FORWARD -m comment --comment "open -j DROP\nCOMMIT\n', 3, "never closed"),
        (_HEAD + "-A FORWARD -j DROP -j ACCEPT\nCOMMIT\n", 3, "one target"),
        (_HEAD + "-A FORWARD -i averyverylongname0 -j DROP\nCOMMIT\n", 3, "15 bytes"),
        (_HEAD + "-A FORWARD -j DROP\n", 1, "no COMMIT"),
        (_HEAD + "*nat\nCOMMIT\n", 3, "expected COMMIT"),
        (_HEAD + "COMMIT\n" + _HEAD + "COMMIT\n", 6, "second time"),
        ("*fliter\nCOMMIT\n", 1, "not a table"),
        (_HEAD + ":INPUT MAYBE [0:0]\nCOMMIT\n", 3, "expected ACCEPT or DROP"),
        (_HEAD + "[x] -A FORWARD -j DROP\nCOMMIT\n", 3, "packets:bytes"),
        (_HEAD + "gibberish\nCOMMIT\n", 3, "not understood"),
        (_HEAD + "-A FORWARD -m ! addrtype --dst-type LOCAL -j DROP\nCOMMIT\n", 3, "no name of a match"),
        (_HEAD + "-N\nCOMMIT\n", 3, "no name of a chain"),
        (_HEAD + "-N two words\nCOMMIT\n", 3, "no name of a chain"),
        (_HEAD + ": - [0:0]\nCOMMIT\n", 3, "no name of a chain"),
        (_HEAD + "-F FORWARD\nCOMMIT\n", 3, "edits a ruleset"),
        ("-P INPUT ACCEPT\n-A INPUT -j DROP\n", 1, "iptables -S"),
        ("table inet filter {\n}\n", 1, "nftables ruleset"),
        ("Chain INPUT (policy ACCEPT)\n", 1, "iptables -L"),
        ("$ sudo iptables -L\nChain INPUT (policy ACCEPT)\n", 2, "iptables -L"),
        ("fliter\n:INPUT ACCEPT [0:0]\nCOMMIT\n", 2, "outside a table"),
        ("<html>\n</html>\n", 1, "'<html>' is not understood"),
        (
            "*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j DNAT --to-destination  --random\nCOMMIT\n",
            3,
            "should; expected ADD",
        ),
    ],
)
def test_errors_name_the_line_and_what_was_expected(text: str, line: int, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        parse(text, file="dump", pasted=True)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"dump:{line}: ")


def _ladder(steps: int) -> str:
    declared = [f":c{step} - [0:0]" for step in range(steps)]
    jumps = ["-A FORWARD -j c0", *(f"-A c{step} -p tcp -j c{step + 1}" for step in range(steps - 1))]
    return "\n".join(["*filter", ":FORWARD ACCEPT [0:0]", *declared, *jumps, "COMMIT", ""])


def test_jumps_that_no_host_has_are_refused_and_those_below_are_walked() -> None:
    result = audit(parse(_ladder(100)))
    assert result.walks.longest == 100
    assert depth(parse(_ladder(100)).rulesets[0].tables["filter"]) == 100
    with pytest.raises(SpecError, match="more than 100 chains deep"):
        parse(_ladder(2000))


def test_loops_are_refused_by_the_jump_that_closes_them_where_a_packet_can_come_to() -> None:
    chains = ":INPUT ACCEPT [0:0]\n:a - [0:0]\n:b - [0:0]\n"
    rules = "-A INPUT -j a\n-A a -j b\n-A a -j b\n-A b -p tcp -j a\nCOMMIT\n"
    with pytest.raises(SpecError, match="chain b leads back") as caught:
        parse("*filter\n" + chains + rules)
    assert caught.value.line == 8
    assert parse("*filter\n" + chains + rules.replace("INPUT -j a", "INPUT -j DROP")).rule_count() == 4


def test_bytes_that_are_no_text_stay_what_they_are_and_a_nul_is_refused() -> None:
    latin = b"*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -i caf\xe9 -j DROP\nCOMMIT\n".decode("utf-8", "surrogateescape")
    assert parse(latin).rulesets[0].tables["filter"].chains["INPUT"].rules[0].text == "-i caf\udce9 -j DROP"
    with pytest.raises(SpecError, match="NUL") as caught:
        parse("*filter\n-A INPUT -i a\0b -j DROP\nCOMMIT\n")
    assert caught.value.line == 2


def test_an_empty_dump_says_what_to_give() -> None:
    with pytest.raises(SpecError, match="no table") as caught:
        parse("# nothing\n")
    assert "iptables-save" in (caught.value.hint or "")
