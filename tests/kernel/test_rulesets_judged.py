"""Random rulesets in the kernel: what comes of each packet, its addresses, ports and mark is what the model says."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ruleset_lab import court, for_family, rulesets

EXAMPLES = int(os.environ.get("NETSLOT_RULESETS", "30"))
PACKETS = 120


def test_the_model_says_what_the_kernel_does_with_random_rulesets() -> None:
    with court() as here:

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
        )
        @given(rulesets(), st.sampled_from((4, 6)), st.integers(0, 1 << 16))
        def judged(text: str, family: int, seed: int) -> None:
            result = here.judge(text, 4 if family == 4 else 6, PACKETS, seed)
            wrong = [(d["packet"], d["before"]) for d in result.differences]
            assert wrong == [], for_family(text, 4 if family == 4 else 6)
            assert result.sent > PACKETS // 2

        judged()
