"""Rules about packets that are easily forgotten: each is lost from one side, and the proof must find the packet.

Lost from the dump and lost from the split are two questions: what only one side knows (an interface, an address, a
translation) must be looked for all the same.
"""

from __future__ import annotations

import pytest

from netslot.rulesets.attribute import attribute
from netslot.rulesets.model import Dump
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import Verdict, prove
from netslot.rulesets.split import split
from netslot.rulesets.tenants import Tenant

_HOOKS = {
    "raw": {"PREROUTING": "ACCEPT", "OUTPUT": "ACCEPT"},
    "mangle": dict.fromkeys(("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"), "ACCEPT"),
    "nat": dict.fromkeys(("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"), "ACCEPT"),
    "filter": {"INPUT": "DROP", "FORWARD": "DROP", "OUTPUT": "ACCEPT"},
}
_ALWAYS = [
    "filter -A INPUT -i lo -j ACCEPT",
    "filter -A INPUT -d 192.0.2.1/32 -p tcp -m tcp --dport 22 -j ACCEPT",
]
_LAST = ["filter -A FORWARD -i eth0 -j DROP", "filter -A FORWARD -s 10.9.0.0/16 -j DROP"]
_TENANT = [
    "filter -A FORWARD -i {l} -o eth0 -j ACCEPT",
    "filter -A FORWARD -o {l} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "nat -A POSTROUTING -s {a}/32 -o eth0 -j MASQUERADE",
    "filter -A INPUT -s {a}/32 -i {l} -p icmp -j ACCEPT",
]

LOST: dict[str, list[str]] = {
    "broadcast": ["filter -A INPUT -d 255.255.255.255/32 -i eth0 -p udp -m udp --dport 67 -j ACCEPT"],
    "multicast in": ["filter -A INPUT -d 224.0.0.18/32 -i eth0 -p 112 -j ACCEPT"],
    "multicast out": ["filter -A OUTPUT -d 224.0.0.251/32 -p udp -j DROP"],
    "no source yet": ["filter -A INPUT -s 0.0.0.0/32 -i eth0 -p udp -m udp --dport 67 -j ACCEPT"],
    "reserved": ["filter -A INPUT -s 240.0.0.0/5 -i eth0 -j ACCEPT"],
    "loopback": ["filter -A OUTPUT -d 127.0.0.1/32 -p tcp -m tcp --dport 6379 -j REJECT --reject-with tcp-reset"],
    "loopback to tenant": [
        "nat -A OUTPUT -d 127.0.0.1/32 -p tcp -m tcp --dport {p} -j DNAT --to-destination {a}:80",
    ],
    "wildcard": ["filter -A FORWARD -i wg+ -j ACCEPT"],
    "wildcard out": ["filter -A FORWARD -i eth0 -o wg+ -p tcp -m tcp --dport 99 -j REJECT"],
    "other interface": ["filter -A FORWARD -i eth7 -j ACCEPT"],
    "other address of the host": ["filter -A INPUT -d 192.0.2.77/32 -p tcp -m tcp --dport 8443 -j ACCEPT"],
    "published": ["nat -A PREROUTING -d 192.0.2.1/32 -p tcp -m tcp --dport {p} -j DNAT --to-destination {a}:22"],
    "published, and let in": [
        "filter -A INPUT -i eth0 -p tcp -m tcp --dport 20000:30000 -j ACCEPT",
        "nat -A PREROUTING -i eth0 -p tcp -m tcp --dport {p} -j DNAT --to-destination {a}:80",
    ],
    "elsewhere": [
        "nat -A PREROUTING -d 169.254.169.254/32 -i {l} -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.5",
    ],
    "own published port": [
        "nat -A PREROUTING -d 192.0.2.1/32 -p tcp -m tcp --dport {p} -j DNAT --to-destination {a}:80",
        "filter -A FORWARD -i {l} -o {l} -j ACCEPT",
        "nat -A POSTROUTING -s {a}/32 -d {a}/32 -p tcp -m tcp --dport 80 -j MASQUERADE",
    ],
    "remembered": [
        "filter -A INPUT -p tcp -m tcp --dport 22 -m recent --update --seconds 60 --name S --rsource -j DROP",
        "filter -A INPUT -p tcp -m tcp --dport 22 -m recent --set --name S --rsource",
    ],
    "put into a set, and dropped": [
        "filter -A INPUT -i eth0 -m set --match-set bad src -j DROP",
        "filter -A INPUT -i eth0 -p tcp -m tcp --dport 23 -j SET --add-set bad src",
    ],
    "short life": [
        "filter -A INPUT -i eth0 -p icmp -m ttl --ttl-gt 3 -j ACCEPT",
        "filter -A INPUT -i eth0 -p icmp -m ttl --ttl-lt 3 -j ACCEPT",
    ],
}
"""Rules of which the last is lost; where it names a tenant, the second tenant's."""


def _host(rules: list[str]) -> str:
    people = [{"l": f"tap{k}", "a": f"10.9.{k}.2", "p": str(20000 + k)} for k in (1, 2)]
    own = [rule for rule in rules if "{" in rule]
    common = [rule for rule in rules if "{" not in rule]
    lines = [*_ALWAYS, *common, *(rule.format(**one) for one in people for rule in [*own, *_TENANT]), *_LAST]
    text = []
    for table, hooks in _HOOKS.items():
        text += [f"*{table}", *(f":{hook} {policy} [0:0]" for hook, policy in hooks.items())]
        text += [line.partition(" ")[2] for line in lines if line.startswith(table)]
        text.append("COMMIT")
    return "\n".join(text) + "\n"


def _compared(before: str, other: str) -> Verdict:
    """What the proof says of the split of another host."""
    dump, split_of = parse(before), parse(other)
    return prove(dump, survey(dump, _tenants(dump)), read(split(split_of, _tenants(split_of)).files), enough=1)


def _tenants(dump: Dump) -> list[Tenant]:
    return list(attribute(dump).tenants)


@pytest.mark.parametrize("name", LOST)
def test_a_rule_that_one_side_has_lost_is_missed(name: str) -> None:
    whole = _host(LOST[name])
    last = LOST[name][-1].partition(" ")[2].format(l="tap2", a="10.9.2.2", p="20002")
    less = whole.replace(last + "\n", "")
    assert len(less) < len(whole)
    assert _compared(whole, whole).equivalent
    for verdict in (_compared(whole, less), _compared(less, whole)):
        assert verdict.counterexamples, (verdict.obstacles, last)


def test_a_port_that_is_kept_is_the_port_that_is_given() -> None:
    """A map says the port that a rule without one leaves as it is."""
    text = _host(["nat -A PREROUTING -d 192.0.2.1/32 -p tcp -m tcp --dport {p} -j DNAT --to-destination {a}"])
    verdict = _compared(text, text)
    assert verdict.equivalent, verdict.counterexamples
    assert _compared(text, text.replace("20002", "20003")).counterexamples


@pytest.mark.parametrize(
    "rules",
    [
        ("-A PREROUTING -i eth0 -j DSCP --set-dscp 0x08", "-A PREROUTING -p tcp -j DSCP --set-dscp 0x10"),
        ("-A PREROUTING -i eth0 -j DSCP --set-dscp 0x08", "-A PREROUTING -m dscp --dscp 0x08 -j MARK --set-mark 5"),
        ("-A PREROUTING -i eth0 -j TOS --set-tos 0x10/0xff", "-A PREROUTING -m tos --tos 0x10 -j MARK --set-mark 5"),
        (
            "-A PREROUTING -i eth0 -j TTL --ttl-set 64",
            "-A PREROUTING -i eth0 -m ttl --ttl-eq 64 -j MARK --set-mark 5",
        ),
    ],
)
def test_who_writes_last_and_who_reads_before_it_matter(rules: tuple[str, str]) -> None:
    one = _host([f"mangle {rule}" for rule in rules])
    other = _host([f"mangle {rule}" for rule in reversed(rules)])
    assert _compared(one, one).equivalent
    assert _compared(one, other).counterexamples


def test_a_dhcp_server_that_no_longer_hears_its_guests_is_told() -> None:
    text = _host(["filter -A INPUT -i {l} -p udp -m udp --sport 68 --dport 67 -j ACCEPT"])
    verdict = _compared(text, text)
    assert verdict.equivalent
    assert any("--dport 67" in note and "ends in the tenant's slot" in note for note in verdict.notes)
