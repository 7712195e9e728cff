"""Hosts built of one kind of rule each: they split, root does not grow with tenants, and the split is proved."""

from __future__ import annotations

import pytest

from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.split import split

SHAPES: dict[str, list[str]] = {
    "filter_out": [
        "filter -A FORWARD -i {l} -p tcp -m tcp --dport 25 -j DROP",
    ],
    "filter_in": [
        "filter -A FORWARD -o {l} -p tcp -m tcp --dport 80 -j ACCEPT",
        "filter -A FORWARD -o {l} -j DROP",
    ],
    "est_in": [
        "filter -A FORWARD -o {l} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "filter -A FORWARD -o {l} -j DROP",
    ],
    "addr_only_out": [
        "filter -A FORWARD -s {a}/32 -p tcp -m tcp --dport 25 -j DROP",
        "nat -A POSTROUTING -s {a}/32 -o eth0 -j MASQUERADE",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "addr_only_in": [
        "filter -A FORWARD -d {a}/32 -p tcp -m tcp --dport 25 -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "masq": [
        "nat -A POSTROUTING -s {a}/32 -o eth0 -j MASQUERADE",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "snat": [
        "nat -A POSTROUTING -s {a}/32 -o eth0 -j SNAT --to-source 203.0.113.{k}",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "dnat": [
        "nat -A PREROUTING -i eth0 -p tcp -m tcp --dport {p} -j DNAT --to-destination {a}:80",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "dnat_ip": [
        "nat -A PREROUTING -d 203.0.113.{k}/32 -i eth0 -j DNAT --to-destination {a}",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "dnat_out": [
        "nat -A OUTPUT -d 127.0.0.1/32 -p tcp -m tcp --dport {p} -j DNAT --to-destination {a}:80",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "spoof_raw": [
        "raw -A PREROUTING ! -s {a}/32 -i {l} -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "spoof_filter": [
        "filter -A FORWARD ! -s {a}/32 -i {l} -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "mark_mangle": [
        "mangle -A PREROUTING -i {l} -j MARK --set-xmark 0x{k:x}/0xffffffff",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "mark_same": [
        "mangle -A PREROUTING -i {l} -j MARK --set-xmark 0x1/0xffffffff",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "mark_fwd": [
        "mangle -A FORWARD -i {l} -j MARK --set-xmark 0x1/0xffffffff",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "connmark": [
        "mangle -A PREROUTING -i {l} -j CONNMARK --set-xmark 0x{k:x}/0xffffffff",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "tcpmss": [
        "mangle -A FORWARD -o {l} -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "limit_own": [
        "filter -A FORWARD -i {l} -p icmp -m limit --limit 10/sec -j ACCEPT",
        "filter -A FORWARD -i {l} -p icmp -j DROP",
    ],
    "hashlimit_own": [
        "filter -A FORWARD -i {l} -p tcp -m hashlimit --hashlimit-above 10/sec "
        "--hashlimit-mode srcip --hashlimit-name t{k} -j DROP",
    ],
    "connlimit_own": [
        "filter -A FORWARD -i {l} -p tcp -m connlimit --connlimit-above 100 --connlimit-mask 32 "
        "--connlimit-saddr -j REJECT --reject-with tcp-reset",
    ],
    "log_own": [
        'filter -A FORWARD -i {l} -p tcp -m tcp --dport 25 -j LOG --log-prefix "t{k} "',
        "filter -A FORWARD -i {l} -p tcp -m tcp --dport 25 -j DROP",
    ],
    "input_own": [
        "filter -A INPUT -i {l} -p udp -m udp --dport 53 -j ACCEPT",
        "filter -A INPUT -i {l} -j DROP",
    ],
    "input_gw": [
        "filter -A INPUT -d {g}/32 -i {l} -p udp -m udp --dport 53 -j ACCEPT",
        "filter -A INPUT -i {l} -j DROP",
    ],
    "input_src": [
        "filter -A INPUT -s {a}/32 -i {l} -p udp -m udp --dport 53 -j ACCEPT",
        "filter -A INPUT -i {l} -j DROP",
    ],
    "output_own": [
        "filter -A OUTPUT -o {l} -p tcp -m tcp --dport 22 -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "output_dst": [
        "filter -A OUTPUT -d {a}/32 -p tcp -m tcp --dport 22 -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "own_chain": [
        "filter :T-{k}",
        "filter -A FORWARD -i {l} -j T-{k}",
        "filter -A T-{k} -d 198.51.100.0/24 -j DROP",
        "filter -A T-{k} -p tcp -m tcp --dport 443 -j ACCEPT",
        "filter -A T-{k} -j DROP",
    ],
    "own_chain_both": [
        "filter :T-{k}",
        "filter :U-{k}",
        "filter -A FORWARD -i {l} -j T-{k}",
        "filter -A FORWARD -o {l} -j U-{k}",
        "filter -A T-{k} -p tcp -m tcp --dport 443 -j RETURN",
        "filter -A T-{k} -j DROP",
        "filter -A U-{k} -m conntrack --ctstate ESTABLISHED -j RETURN",
        "filter -A U-{k} -j DROP",
    ],
    "own_chain_input": [
        "filter :T-{k}",
        "filter -A FORWARD -i {l} -j T-{k}",
        "filter -A INPUT -i {l} -j T-{k}",
        "filter -A T-{k} -p tcp -m tcp --dport 443 -j ACCEPT",
        "filter -A T-{k} -j DROP",
    ],
    "metadata": [
        "nat -A PREROUTING -d 169.254.169.254/32 -i {l} -p tcp -m tcp --dport 80 "
        "-j DNAT --to-destination 10.0.0.5:8775",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "redirect": [
        "nat -A PREROUTING -i {l} -p udp -m udp --dport 53 -j REDIRECT --to-ports 5353",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "notrack": [
        "raw -A PREROUTING -i {l} -p udp -m udp --dport 53 -j CT --notrack",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "zone": [
        "raw -A PREROUTING -i {l} -j CT --zone {k}",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "mac": [
        "filter -A FORWARD -i {l} -m mac ! --mac-source 02:00:00:00:00:{k:02X} -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "mac_raw": [
        "raw -A PREROUTING -i {l} -m mac ! --mac-source 02:00:00:00:00:{k:02X} -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "iprange": [
        "filter -A FORWARD -i {l} -m iprange --dst-range 10.0.0.0-10.0.0.255 -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "count": [
        "filter -A FORWARD -i {l}",
        "filter -A FORWARD -o {l}",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "set_own": [
        "filter -A FORWARD -i {l} -m set --match-set allow{k} dst -j ACCEPT",
        "filter -A FORWARD -i {l} -j DROP",
    ],
    "fwd_out_if": [
        "filter -A FORWARD -i {l} -o eth0 -j ACCEPT",
        "filter -A FORWARD -i {l} -j DROP",
    ],
    "fwd_pair": [
        "filter -A FORWARD -i {l} -o tap+ -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "fwd_not_out": [
        "filter -A FORWARD -i {l} ! -o eth0 -j DROP",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "in_from_eth": [
        "filter -A FORWARD -i eth0 -o {l} -p tcp -m tcp --dport 22 -j ACCEPT",
        "filter -A FORWARD -o {l} -m conntrack --ctstate ESTABLISHED -j ACCEPT",
        "filter -A FORWARD -o {l} -j DROP",
    ],
    "two_uplinks": [
        "filter -A FORWARD -i {l} -o eth0 -j ACCEPT",
        "filter -A FORWARD -i {l} -o eth1 -j DROP",
    ],
    "quota": [
        "filter -A FORWARD -i {l} -m quota --quota 1000000 -j ACCEPT",
        "filter -A FORWARD -i {l} -j DROP",
    ],
    "dscp": [
        "mangle -A POSTROUTING -o {l} -j DSCP --set-dscp 0x08",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
    "classify": [
        "mangle -A POSTROUTING -o {l} -j CLASSIFY --set-class 1:{k:x}",
        "filter -A FORWARD -i {l} -j ACCEPT",
    ],
}
"""Rules of one tenant: table and rule, with its link {l}, address {a}, gateway {g}, number {k}, port {p}."""

_OWN_NUMBERS = {"dnat_out", "mark_mangle", "connmark", "zone", "classify", "log_own", "set_own"}
"""Rules with a number or name of the tenant's own in them that is no address: root keeps one for each."""
GROWING = {*_OWN_NUMBERS, "limit_own", "quota"}
"""And those that let pass up to a count of one tenant's."""
REFUSED = {"addr_only_out"}
"""Not proved: rules that know a tenant by its address only, and whose rule stands first."""

_HOOKS = {
    "raw": ["PREROUTING", "OUTPUT"],
    "mangle": ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"],
    "nat": ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"],
    "filter": ["INPUT", "FORWARD", "OUTPUT"],
}
_FIRST = [
    "filter -A INPUT -i lo -j ACCEPT",
    "filter -A INPUT -d 192.0.2.1/32 -p tcp -m tcp --dport 22 -j ACCEPT",
    "filter -A FORWARD -m conntrack --ctstate INVALID -j DROP",
    "filter -A FORWARD -d 192.0.2.128/25 -j DROP",
]
_LAST = ["filter -A FORWARD -p tcp -m tcp --dport 6667 -j DROP"]


def _host(shape: list[str], tenants: int) -> str:
    lines = list(_FIRST)
    for k in range(1, tenants + 1):
        names = {"l": f"tap{k}", "a": f"10.64.0.{4 * k + 2}", "g": f"10.64.0.{4 * k + 1}", "k": k, "p": 20000 + k}
        mine = ["filter -A INPUT -s {a}/32 -i {l} -p icmp -j ACCEPT", *shape]
        lines += [line.format(**names) for line in mine]
    lines += _LAST
    text: list[str] = []
    for table, hooks in _HOOKS.items():
        rules = [line.partition(" ")[2] for line in lines if line.startswith(f"{table} ")]
        text += [f"*{table}", *(f":{hook} ACCEPT [0:0]" for hook in hooks)]
        text += [f"{rule} - [0:0]" for rule in rules if rule.startswith(":")]
        text += [rule for rule in rules if not rule.startswith(":")]
        text.append("COMMIT")
    return "\n".join(text) + "\n"


@pytest.mark.parametrize("name", SHAPES)
def test_a_host_of_such_rules_splits_and_is_proved(name: str) -> None:
    sizes = []
    for number in (2, 4):
        dump = parse(_host(SHAPES[name], number))
        tenants = attribute(dump).tenants
        assert len(tenants) == number
        result = split(dump, tenants)
        assert result.refused == []
        sizes.append(result.report["root_rules_after"])
        if number == 2:
            verdict = prove(dump, survey(dump, tenants), read(result.files), enough=1)
            assert verdict.equivalent == (name not in REFUSED), (verdict.counterexamples, verdict.obstacles)
            assert verdict.equivalent or verdict.counterexamples
    assert (sizes[0] != sizes[1]) == (name in GROWING)
