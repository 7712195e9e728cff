"""What comes under a tenant's address from elsewhere is asked about only where a rule asks for that address."""

from __future__ import annotations

import pytest

from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import ROOT, read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.split import split

HEAD = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"


def _bridged(number: int) -> list[str]:
    return [
        f"-A FORWARD -d 10.9.0.{k + 2}/32 -o br-1 -p tcp -m tcp --dport {80 + k} -j ACCEPT" for k in range(number)
    ]


def _linked(number: int) -> list[str]:
    own = [(f"10.9.0.{k + 2}/32", f"tap{k}") for k in range(number)]
    lines = [f"-A FORWARD ! -s {address} -i {tap} -j DROP" for address, tap in own]
    lines += [f"-A FORWARD -d {address} -o {tap} -p tcp -j ACCEPT" for address, tap in own]
    return lines


def _differs(lines: list[str], edited: str) -> bool:
    dump = parse(HEAD + "\n".join(lines) + "\nCOMMIT\n")
    tenants = attribute(dump).tenants
    files = dict(split(dump, tenants).files)
    assert prove(dump, survey(dump, tenants), read(files)).equivalent
    head, _, rest = files[ROOT[4]].partition("-A FORWARD")
    files[ROOT[4]] = f"{head}-A FORWARD {edited}\n-A FORWARD{rest}"
    return not prove(dump, survey(dump, tenants), read(files), enough=1).equivalent


@pytest.mark.parametrize(
    "edited",
    [
        "-s 10.9.0.3/32 -d 10.9.0.5/32 -j DROP",
        "-s 10.9.0.3/32 -i eth9 -j DROP",
        "-i eth9 -j DROP",
        "-s 10.9.0.4/32 -o br-1 -j DROP",
        "-s 10.9.0.4/31 -d 10.9.0.3/32 -j DROP",
    ],
)
def test_a_rule_about_a_source_is_found_though_strangers_fare_the_same(edited: str) -> None:
    assert _differs(_bridged(5), edited)


@pytest.mark.parametrize(
    "edited", ["-s 10.9.0.3/32 -i eth9 -o tap3 -j DROP", "-s 10.9.0.3/32 -d 10.9.0.5/32 -j DROP"]
)
def test_and_where_tenants_have_links_of_their_own(edited: str) -> None:
    assert _differs(_linked(5), edited)


def test_a_common_rule_about_links_that_only_a_wildcard_names_may_not_be_lost() -> None:
    lines = ["-A FORWARD -i ppp+ -j DROP", *_bridged(3)]
    dump = parse(HEAD + "\n".join(lines) + "\nCOMMIT\n")
    tenants = attribute(dump).tenants
    files = dict(split(dump, tenants).files)
    assert prove(dump, survey(dump, tenants), read(files)).equivalent
    files[ROOT[4]] = files[ROOT[4]].replace("-A FORWARD -i ppp+ -j DROP\n", "")
    [found, *_] = prove(dump, survey(dump, tenants), read(files), enough=1).counterexamples
    assert found.packet["from"] == "ppp0"


PUBLISHED = """*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -d 203.0.113.1/32 -p tcp -m tcp --dport 8000 -j DNAT --to-destination 10.9.0.2:80
COMMIT
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
"""


@pytest.mark.parametrize(
    ("hook", "added"),
    [
        ("PREROUTING", "-d 203.0.113.1/32 -p tcp -m tcp --dport 9999 -j DNAT --to-destination 10.9.0.3:81"),
        ("PREROUTING", "-p tcp -m tcp --dport 9999 -j DNAT --to-destination 10.9.0.3:81"),
        ("PREROUTING", "-s 10.9.0.4/32 -p tcp -m tcp --dport 9999 -j DNAT --to-destination 10.9.0.3:81"),
        ("OUTPUT", "-d 203.0.113.1/32 -p tcp -m tcp --dport 9999 -j DNAT --to-destination 10.9.0.3:81"),
    ],
)
def test_a_port_that_only_the_new_rules_publish_is_found(hook: str, added: str) -> None:
    dump = parse(PUBLISHED + "\n".join(_bridged(4)) + "\nCOMMIT\n")
    tenants = attribute(dump).tenants
    files = dict(split(dump, tenants).files)
    assert prove(dump, survey(dump, tenants), read(files)).equivalent
    policy = ":POSTROUTING ACCEPT [0:0]\n"
    files[ROOT[4]] = files[ROOT[4]].replace(policy, f"{policy}-A {hook} {added}\n", 1)
    assert not prove(dump, survey(dump, tenants), read(files), enough=1).equivalent
