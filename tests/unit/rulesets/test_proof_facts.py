"""Facts of the kernel that random rulesets brought to light, each as one packet through one small ruleset."""

from __future__ import annotations

from netslot.rulesets.parse import parse
from netslot.rulesets.proof.flow import ESTABLISHED, INVALID, NEW
from netslot.rulesets.proof.journey import Journey, Result, Side, Way
from netslot.rulesets.proof.solving import ConcretePacket
from netslot.rulesets.proof.tagged import FiledRuleset
from ruleset_lab import places

_EMPTY = {
    "raw": ":PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]",
    "nat": ":PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]",
    "filter": ":INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]",
}
_HOST, _TENANT, _STRANGER = 0xC0000201, 0x0A400002, 0xCB007109


def _sent(table: str, rule: str, state: int, entry: str = "eth0") -> Result:
    here = places()
    filed = FiledRuleset(parse(f"*{table}\n{_EMPTY[table]}\n{rule}\nCOMMIT\n").rulesets[0], here)
    values = dict.fromkeys(("icmp_type", "icmp_code", "dscp", "reply", "fragment"), 0)
    values |= {"src": _STRANGER if entry else _HOST, "dst": _TENANT if entry else _STRANGER, "proto": 17}
    values |= {"sport": 4000, "dport": 53, "flags": 0, "length": 60, "ttl": 64, "state": state}
    packet = ConcretePacket(4, values, lambda _key, _contents: False)
    return Journey(Side(filed, here), Way(entry, "eth0"), packet.number).travel(packet.flow())


def test_before_connection_tracking_no_packet_has_a_connection() -> None:
    assert _sent("raw", "-A PREROUTING -m conntrack --ctstate ESTABLISHED -j DROP", ESTABLISHED).ledger.alive is True
    assert _sent("raw", "-A PREROUTING -m conntrack --ctstate INVALID -j DROP", ESTABLISHED).ledger.alive is False
    assert _sent("filter", "-A FORWARD -m conntrack --ctstate ESTABLISHED -j DROP", ESTABLISHED).ledger.alive is False


def test_the_mark_of_no_connection_is_never_what_is_asked_nor_what_is_not() -> None:
    for sign in ("", "! "):
        rule = f"-A FORWARD -m connmark {sign}--mark 0x1 -j DROP"
        assert _sent("filter", rule, INVALID).ledger.alive is True
    assert _sent("filter", "-A FORWARD -m connmark ! --mark 0x1 -j DROP", NEW).ledger.alive is False


def test_what_the_host_makes_and_translates_leaves_by_another_link() -> None:
    result = _sent("nat", "-A OUTPUT -p udp -j DNAT --to-destination 10.64.0.6", NEW, entry="")
    assert result.exit == "tap1"
