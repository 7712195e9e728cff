"""The kernel is the judge: what the model says of a packet is what the kernel does with it, before and after."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fault_trial import Host, try_fault
from netslot.host.replay import replay_packets
from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.split import split
from random_hosts import hosts
from synthetic_host import make_host

PACKETS = 120


def _model_was_wrong(differences: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [d[side] for d in differences for side in ("before", "after") if not d[side]["fits"]]


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(hosts())
def test_model_and_kernel_agree_on_random_hosts(text: str) -> None:
    dump = parse(text)
    tenants = attribute(dump).tenants
    result = split(dump, tenants)
    if result.refused:
        assert all(": " in reason for reason in result.refused)
        return
    places, arrangement = survey(dump, tenants), read(result.files)
    verdict = prove(dump, places, arrangement, enough=1)
    replayed = replay_packets(dump, places, arrangement, result.files, PACKETS)
    assert _model_was_wrong(replayed.differences) == []
    if verdict.equivalent:
        assert [d for d in replayed.differences if d["before"]["kernel"] != d["after"]["kernel"]] == []


def test_the_synthetic_host_replays_without_a_difference() -> None:
    dump = parse(make_host(6).text)
    tenants = attribute(dump).tenants
    result = split(dump, tenants)
    replayed = replay_packets(dump, survey(dump, tenants), read(result.files), result.files, 600)
    assert replayed.differences == []
    assert 590 <= replayed.sent + replayed.skipped.total() <= 600
    assert replayed.skipped.total() < 60


_FAULTS = {
    "a rule dropped": (
        "class1.rules",
        "-A netslot-out -s ${address} -d 203.0.113.7/32 -p tcp -m tcp --dport 1007 -j ACCEPT\n",
        "",
    ),
    "a mask widened": ("class1.rules", "-d 203.0.113.7/32", "-d 203.0.113.0/24"),
    "spoofing let through": ("class0.rules", "! -s ${address} -j DROP", "! -s 10.0.0.0/8 -j DROP"),
    "a state match removed": ("class0.rules", " -m conntrack --ctstate ESTABLISHED,RELATED", ""),
    "the masquerade lost": ("root.rules", "-A POSTROUTING -s 10.64.0.2/255.255.255.227 -o eth0 -j MASQUERADE\n", ""),
    "a drop of INPUT lost": ("root.rules", "-A INPUT -i tap+ -j DROP\n", "-A INPUT -i tap+ -p tcp -j ACCEPT\n"),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_the_counterexample_is_true_in_the_kernel(fault: str) -> None:
    name, old, new = _FAULTS[fault]
    dump = parse(make_host(6).text)
    tenants = attribute(dump).tenants
    files = dict(split(dump, tenants).files)
    assert old in files[name]
    host = Host(dump, tenants, survey(dump, tenants), files)
    found = try_fault(host, {**files, name: files[name].replace(old, new, 1)})
    assert (found.answer, found.detail) == ("true", [])
    assert found.sent > 0
