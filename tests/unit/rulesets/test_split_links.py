"""Which links can become a slot's: no port of a bridge; and links told apart from others that begin alike."""

from __future__ import annotations

import pytest

from netslot.rulesets.model import Dump
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import Verdict, prove
from netslot.rulesets.split import Split, split
from netslot.rulesets.tenants import Tenant, parse_tenants

_TENANTS = (
    '[{"name": "a", "interfaces": ["tap1"], "addresses": ["10.0.0.3"]},'
    ' {"name": "b", "interfaces": ["tap2"], "addresses": ["10.0.0.4"]}]'
)


def _filter(*rules: str) -> Dump:
    return parse(
        "\n".join(["*filter", ":FORWARD DROP [0:0]", *(f"-A FORWARD {rule}" for rule in rules), "COMMIT", ""])
    )


def _both(dump: Dump, tenants: tuple[Tenant, ...]) -> tuple[Split, Verdict]:
    result = split(dump, tenants)
    return result, prove(dump, survey(dump, tenants), read(result.files), enough=1)


@pytest.mark.parametrize("way", ["--physdev-in", "--physdev-out"])
def test_what_is_a_bridges_port_becomes_no_slots_link(way: str) -> None:
    dump = _filter(
        *(f"-m physdev {way} tap{k} --physdev-is-bridged -p tcp -m tcp --dport 25 -j DROP" for k in (1, 2)),
        *(f"-s 10.0.0.{k}/32 -p udp -j ACCEPT" for k in (3, 4)),
        "-i br0 -j ACCEPT",
    )
    tenants = parse_tenants(_TENANTS)
    result, verdict = _both(dump, tenants)
    assert "2 tenants (a, b): no link of its own is known (a bridge's port is none)" in " ".join(result.notes)
    assert result.report["slot_rules_max"] == 0
    assert (verdict.equivalent, verdict.counterexamples) == (True, [])
    refused = split(dump, tenants, method="slots")
    assert not refused.files and "a bridge's port is none" in refused.refused[0]


def test_a_link_that_begins_as_slots_do_is_in_no_slots_group() -> None:
    dump = _filter("-i tap0 -j ACCEPT", *(f"-d 10.0.0.{k + 2}/32 -o tap{k} -p tcp -j ACCEPT" for k in (1, 2)))
    result, verdict = _both(dump, parse_tenants(_TENANTS))
    assert "--dst-group" in result.files["root.rules"]
    assert (verdict.equivalent, verdict.counterexamples, verdict.obstacles) == (True, [], [])
