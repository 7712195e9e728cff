"""Random wrong splits of random hosts: the prover finds each, with a packet that the kernel bears out."""

from __future__ import annotations

import random

import pytest

from fault_lab import FAULTS, broken
from fault_trial import Host, proved_host, try_fault
from measure_faults import WAYS, random_host
from synthetic_host import as_ipv6

SEEDS = (5, 6, 7, 9)
"""Random hosts whose split is proved: IPv4, IPv6, processes, IPv6 with sets."""


_KINDS = 6


def _host(number: int) -> Host:
    family, method, attachment = WAYS[number % len(WAYS)]
    text = random_host(number)
    host = proved_host(as_ipv6(text) if family == 6 else text, family, method, attachment)
    assert host is not None
    return host


@pytest.mark.parametrize("number", SEEDS)
def test_a_random_wrong_split_is_found_or_changes_nothing(number: int) -> None:
    host = _host(number)
    dice = random.Random(number)
    answers = []
    for kind in dice.sample(sorted(FAULTS), _KINDS):
        files = broken(host.files, kind, dice)
        if files is not None:
            found = try_fault(host, files, packets=90)
            answers.append(found.answer)
            assert found.answer != "WRONG", (kind, found.detail)
    assert "true" in answers, answers
