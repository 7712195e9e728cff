"""The kernel is the judge: what netslot writes must load, and must be saved as the original is saved."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dumps import each_dump
from netslot.rulesets.model import Ruleset, Table
from netslot.rulesets.parse import parse
from netslot.rulesets.write import rule_text, write

# One throwaway namespace: the sets that rules name, the original, then ours over it, each saved with counters.
_SCRIPT = """
set -e
if [ -n "$2" ]; then ipset restore < "$2"; fi
$1-restore -c < "$3" 2>/dev/null
$1-save -c > "$3.saved"
$1-restore -c < "$4" 2>/dev/null
$1-save -c > "$4.saved"
"""


def _load_both(tool: str, original: Path, ours: Path, sets: Path | None) -> tuple[str, str]:
    command = ["unshare", "-n", "bash", "-c", _SCRIPT, "bash", tool, str(sets or ""), str(original), str(ours)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(f"{original}.saved").read_text(), Path(f"{ours}.saved").read_text()


def _rules_only(saved: str) -> list[str]:
    return [line for line in saved.splitlines() if not line.startswith("#")]


def _from_values(ruleset: Ruleset) -> Ruleset:
    """The same ruleset, with each rule's text made anew from its matches and target."""
    tables = {}
    for table in ruleset.tables.values():
        chains = {
            chain.name: replace(
                chain,
                rules=tuple(
                    replace(rule, text=rule_text(rule.matches, rule.target, ruleset.family, rule.comment))
                    for rule in chain.rules
                ),
            )
            for chain in table.chains.values()
        }
        tables[table.name] = Table(table.name, chains)
    return Ruleset(ruleset.family, tables)


def _meaning(saved: str) -> list[tuple[object, ...]]:
    ruleset = parse(saved).rulesets[0]
    return [
        (table.name, chain.name, frozenset(rule.matches), rule.target, rule.comment, rule.counters)
        for table, chain, rule in sorted(ruleset.rules(), key=lambda place: place[0].name)
    ]


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@each_dump
def test_every_dump_loads_again_and_is_saved_identically(dump: Path, variant: str, tmp_path: Path) -> None:
    original, ours, composed = (tmp_path / name for name in ("original", "ours", "composed"))
    original.write_text(dump.read_text())
    ruleset = parse(dump.read_text(), file=dump.name).rulesets[0]
    ours.write_text(write(ruleset))
    composed.write_text(write(_from_values(ruleset)))
    sets = dump.with_suffix(".ipset")
    tool = f"iptables-{variant}"
    before, after = _load_both(tool, original, ours, sets if sets.exists() else None)
    assert _rules_only(after) == _rules_only(before)
    before, after = _load_both(tool, original, composed, sets if sets.exists() else None)
    assert _meaning(after) == _meaning(before)


_EVERY_V4 = r"""*filter
:INPUT ACCEPT [1:2]
:FORWARD DROP [3:4]
:OUTPUT ACCEPT [5:6]
:user - [0:0]
[7:8] -A FORWARD -s 10.0.0.0/255.0.255.0 ! -d 10.1.2.3/32 -i tap+ ! -o eth0 -j user
[0:0] -A FORWARD ! -f -m length --length 40:1500 -m ttl --ttl-lt 5 -j LOG --log-prefix "it's \"so\": " --log-level 6
[0:0] -A FORWARD -p tcp -m tcp ! --tcp-flags SYN,ACK SYN -m multiport ! --dports 1,2:5,9 -m mac ! --mac-source 02:00:00:00:00:01 -j RETURN
[0:0] -A FORWARD -p tcp -m tcp --tcp-option 8 -m dscp ! --dscp 0x0a -m pkttype --pkt-type multicast -g user
[0:0] -A FORWARD -p icmp -m icmp ! --icmp-type 3/1 -j REJECT --reject-with icmp-admin-prohibited
[0:0] -A FORWARD -m conntrack ! --ctstate NEW,RELATED -m conntrack --ctorigdst 10.0.0.0/8 --ctproto 6 --ctorigdstport 80:90 -j ACCEPT
[0:0] -A FORWARD -m conntrack --ctstatus ASSURED,CONFIRMED -m conntrack --ctdir REPLY -j ACCEPT
[0:0] -A FORWARD -m addrtype ! --src-type LOCAL,UNICAST --limit-iface-in -m iprange ! --src-range 10.0.0.1-10.0.0.9 -j DROP
[0:0] -A FORWARD -m mark ! --mark 0x1/0xff -m connmark --mark 0x10 -m devgroup --src-group 0x7/0xff -j DROP
[0:0] -A FORWARD -m limit --limit 5/sec -m statistic --mode nth --every 3 --packet 0 -m comment --comment "a b" -j NFLOG --nflog-group 3
[0:0] -A FORWARD -m policy --dir in --pol ipsec --strict --reqid 3 --proto esp --mode tunnel -j ACCEPT
[0:0] -A FORWARD -m string --string "GET /x -j DROP" --algo bm --from 10 --to 100 -j DROP
[0:0] -A FORWARD -m u32 --u32 "0x0&0xffff=0x100:0xffff&&0x6&0xff=0x1" -j DROP
[0:0] -A FORWARD -p sctp -m sctp --dport 80 --chunk-types any DATA,INIT -j DROP
[0:0] -A FORWARD -j NFQUEUE --queue-balance 0:3
[0:0] -A OUTPUT -m owner --uid-owner 1000-2000 -m owner ! --socket-exists -j DROP
[0:0] -A user
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
[0:0] -A PREROUTING -m rpfilter --loose --validmark --invert -j DROP
[0:0] -A PREROUTING -j MARK --set-xmark 0x5/0xf
[0:0] -A PREROUTING -j CONNMARK --save-mark --nfmask 0xff --ctmask 0xffffffff
[0:0] -A PREROUTING -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xf
[0:0] -A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
[0:0] -A PREROUTING -p udp -m udp --dport 5000:5002 -j DNAT --to-destination 10.0.0.1-10.0.0.4:6000-6002 --random --persistent
[0:0] -A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080-8090
[0:0] -A PREROUTING -d 192.0.2.0/24 -j NETMAP --to 198.51.100.0/24
[0:0] -A POSTROUTING -p tcp -j MASQUERADE --to-ports 1024-65535 --random-fully
[0:0] -A POSTROUTING -j SNAT --to-source 203.0.113.5
COMMIT
"""  # noqa: E501

_EVERY_V6 = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
[0:0] -A FORWARD -s 2001:db8::/32 ! -d 2001:db8::1/128 -p tcp -m tcp --dport 22 -j REJECT --reject-with icmp6-port-unreachable
[0:0] -A FORWARD -p ipv6-icmp -m icmp6 --icmpv6-type 135 -m hl --hl-eq 255 -j ACCEPT
[0:0] -A FORWARD -m iprange --dst-range 2001:db8::1-2001:db8::ff -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
[0:0] -A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination [2001:db8::5]:8080
[0:0] -A POSTROUTING -j SNAT --to-source 2001:db8::9
COMMIT
"""  # noqa: E501


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ("iptables-legacy", _EVERY_V4),
        ("iptables-nft", _EVERY_V4),
        ("ip6tables-legacy", _EVERY_V6),
        ("ip6tables-nft", _EVERY_V6),
    ],
)
def test_every_modelled_match_and_target_survives_the_kernel(tool: str, text: str, tmp_path: Path) -> None:
    original, ours, composed = (tmp_path / name for name in ("original", "ours", "composed"))
    original.write_text(text)
    ruleset = parse(text).rulesets[0]
    ours.write_text(write(ruleset))
    composed.write_text(write(_from_values(ruleset)))
    before, after = _load_both(tool, original, ours, None)
    assert _rules_only(after) == _rules_only(before)
    assert _meaning(before) == _meaning(text)
    _, after = _load_both(tool, original, composed, None)
    assert _meaning(after) == _meaning(before)
