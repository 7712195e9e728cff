"""What the prover calls the same without asking the solver, and what it must not."""

from __future__ import annotations

import pytest

from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.alike import alike
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.published import PUBLISH
from netslot.rulesets.split import split

HEAD = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:a - [0:0]\n:b - [0:0]\n"
RULES = """-A FORWARD -s 10.0.0.5/32 -p tcp -m tcp --dport 80 -j ACCEPT
-A FORWARD -s 10.0.0.6/32 -j ACCEPT
-A FORWARD -m limit --limit 5/sec -p udp -j DROP
-A FORWARD -i eth0 -j a
-A a -j DROP
"""


def _alike(other: str) -> bool:
    one, two = (parse(f"{HEAD}{rules}COMMIT\n").rulesets[0] for rules in (RULES, other))
    return alike(one, two)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("-s 10.0.0.5/32 -p tcp -m tcp --dport 80", "-p tcp -m tcp --dport 80 -s 10.0.0.5/32"),
        ("-A FORWARD -s 10.0.0.6/32 -j ACCEPT\n", ""),
        ("-A a -j DROP\n", '-A a -m comment --comment "no more" -j DROP\n-A b -j ACCEPT\n'),
    ],
)
def test_order_matters_only_where_it_can(old: str, new: str) -> None:
    moved = RULES.replace(old, new)
    if new == "":  # the two that accept, the other way round
        moved = old + moved
    assert moved != RULES
    assert _alike(moved)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("-s 10.0.0.6/32", "-s 10.0.0.7/32"),
        ("-s 10.0.0.6/32 -j ACCEPT", "-s 10.0.0.6/32 -j RETURN"),
        ("-i eth0 -j a", "-i eth0 -g a"),
        ("-i eth0 -j a", "-i eth0 -j b"),
        ("-A a -j DROP\n", ""),
        ("-m limit --limit 5/sec -p udp -j DROP", "-p udp -m limit --limit 5/sec -j DROP"),
    ],
)
def test_anything_else_is_another_ruleset(old: str, new: str) -> None:
    assert old in RULES
    assert not _alike(RULES.replace(old, new))


def test_a_policy_counts() -> None:
    one, other = (parse(f"*filter\n:FORWARD {policy} [0:0]\nCOMMIT\n").rulesets[0] for policy in ("ACCEPT", "DROP"))
    assert not alike(one, other)


PUBLISHED = """*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -d 203.0.113.1/32 -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.0.0.5
-A PREROUTING -d 203.0.113.1/32 -p tcp -m tcp --dport 444 -j DNAT --to-destination 10.0.0.6
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A FORWARD -d 10.0.0.5/32 -o br-1 -p tcp -m tcp --dport 443 -j ACCEPT
-A FORWARD -d 10.0.0.6/32 -o br-1 -p tcp -m tcp --dport 444 -j ACCEPT
COMMIT
"""


def test_a_port_that_is_kept_may_be_said_or_not() -> None:
    dump = parse(PUBLISHED)
    tenants = attribute(dump).tenants
    files = split(dump, tenants).files
    assert "443 : 10.0.0.5 . 443" in files[PUBLISH[4]]
    assert prove(dump, survey(dump, tenants), read(files)).equivalent
    files[PUBLISH[4]] = files[PUBLISH[4]].replace("10.0.0.5 . 443", "10.0.0.5 . 4443")
    [example, *_] = prove(dump, survey(dump, tenants), read(files), enough=1).counterexamples
    assert "destination port" in example.parts
