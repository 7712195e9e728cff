"""How well the model of rulesets holds against the kernel: many random rulesets, by the clock.

    python tests/measure_model.py SECONDS [SEED]

Prints rulesets, packets that were compared (by family and state), packets skipped and why, and every disagreement
with the ruleset that shows it. Needs root; everything happens in namespaces of its own. Exit status 1 when the model
and the kernel disagree.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from netslot.kernel import netns
from netslot.kernel import sys as calls
from netslot.rulesets.model import Family
from ruleset_lab import court, for_family, rulesets

PACKETS = 150
_ROUND = 40


def private_run() -> None:
    """A ``/run`` of this process's own, so that nothing is left behind."""
    calls.unshare(calls.CLONE_NEWNS)
    calls.mount("none", "/", "", calls.MS_REC | calls.MS_PRIVATE)
    calls.mount("tmpfs", "/run", "tmpfs", calls.MS_NOSUID | calls.MS_NODEV, "mode=755")
    netns.NETNS_DIR.mkdir()
    Path("/run/lock").mkdir()
    Path("/run/xtables.lock").touch()


def measure(seconds: float, first: int) -> int:
    """Judge rulesets until the time is over; the number of rulesets that showed a disagreement."""
    private_run()
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    number = first
    while time.monotonic() < deadline:
        with court() as here:

            @settings(
                max_examples=_ROUND,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @seed(number)
            @given(rulesets())
            def judged(text: str) -> None:
                families: tuple[Family, Family] = (4, 6)
                for family in families:
                    result = here.judge(text, family, PACKETS, number)  # noqa: B023 -- called before the next round
                    counts["rulesets"] += 1
                    counts["packets"] += result.sent
                    kinds.update(result.kinds)
                    skipped.update(result.skipped)
                    if result.differences:
                        counts["rulesets with a disagreement"] += 1
                        one = result.differences[0]
                        print(for_family(text, family), one["packet"], one["before"], sep="\n", flush=True)

            judged()
        number += 1
    print(dict(counts), dict(kinds), dict(skipped), f"seeds {first} to {number - 1}", sep="\n")
    return counts["rulesets with a disagreement"]


if __name__ == "__main__":
    sys.exit(1 if measure(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1) else 0)
