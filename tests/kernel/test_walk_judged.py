"""The walk that ``audit`` reports, against the kernel's own counters."""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.tenants import Tenant
from netslot.rulesets.traffic import STATES, walk_all
from random_hosts import hosts
from ruleset_lab import places, rulesets
from walk_lab import UPLINKS, WAYS, gauge

EXAMPLES = int(os.environ.get("NETSLOT_WALKS", "3"))


def compare(text: str, people: tuple[Tenant, ...] | None, seen: Counter[str]) -> None:
    """No packet is tested against more rules than the walk says; ``seen`` counts where it is exactly that many."""
    attribution = attribute(parse(text, family=4), people)
    walks = walk_all(attribution)
    totals: Counter[tuple[str, int]] = Counter()
    chains: Counter[tuple[str, str, str, int]] = Counter()
    for uplink in UPLINKS:
        with gauge(attribution, uplink) as here:
            for tenant in range(min(2, len(attribution.tenants))):
                for way in WAYS:
                    for state in STATES:
                        published = way == "in" and here.published(tenant) is not None
                        if published and (state == "ESTABLISHED" or uplink != UPLINKS[0]):
                            continue  # a connection that only the rules could open; no port of this uplink's
                        counts = here.walk(tenant, way, state)
                        total = sum(counts.values())
                        totals[state, tenant] = max(totals[state, tenant], total)
                        for (table, hook), count in counts.items():
                            key = table, hook, state, tenant
                            chains[key] = max(chains[key], count)
    for (state, tenant), count in totals.items():
        said = walks.totals[state][tenant]
        assert count <= said, (text, state, tenant, count, said)
        seen["exact" if count == said else "fewer"] += 1
    for (table, hook, state, tenant), count in chains.items():
        found = walks.chains.get((4, table, hook))
        said = found[state][tenant] if found is not None else 0
        assert count <= said or hook == "OUTPUT", (text, table, hook, state, tenant, count, said)
        if hook != "OUTPUT":
            seen["chain exact" if count == said else "chain fewer"] += 1


def test_no_packet_is_tested_against_more_rules_than_said() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(hosts(publishing=True))
    def judged(text: str) -> None:
        compare(text, None, seen)

    judged()
    assert seen["exact"] > seen["fewer"], seen


def test_jumps_marks_and_returns_are_walked_as_the_kernel_walks_them() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(rulesets(), st.none())
    def judged(text: str, _nothing: None) -> None:
        compare(text, places().tenants, seen)

    judged()
    assert seen["exact"] > 0, seen
