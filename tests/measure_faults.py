"""Wrong splits of random hosts: does ``prove`` find each, and is every counterexample true in the kernel?

    python tests/measure_faults.py SECONDS [SEED]

For each random host whose split is proved, one fault of every kind at a random place. Prints how many hosts there
were, a line for each kind of fault with what came of it (see ``fault_trial.Answer``), and everything that is wrong.
Needs root; everything happens in namespaces of its own. Exit status 1 when the prover and the kernel disagree.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter, defaultdict
from typing import cast

from hypothesis import HealthCheck, Phase, given, seed, settings

from fault_lab import FAULTS, broken
from fault_trial import Host, proved_host, tally, try_fault
from measure_model import private_run
from netslot.rulesets.model import Family
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.split import Method
from random_hosts import hosts
from synthetic_host import as_ipv6

WAYS: tuple[tuple[Family, Method | None, Attachment], ...] = (
    (4, None, "tap"),
    (6, None, "tap"),
    (4, None, "process"),
    (4, "sets", "tap"),
    (6, "sets", "tap"),
)


def random_host(number: int) -> str:
    """One host of the strategy, always the same for a number."""
    found: list[str] = []

    @settings(max_examples=4, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @seed(number)
    @given(hosts(publishing=True))
    def draw(text: str) -> None:
        found.append(text)

    draw()
    return found[-1]


def measure(seconds: float, first: int) -> int:
    """Break hosts until the time is over; the number of answers that were wrong."""
    private_run()
    counts: Counter[str] = Counter()
    findings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    deadline = time.monotonic() + seconds
    number = first
    while time.monotonic() < deadline:
        dice = random.Random(number)
        text = random_host(number)
        family, method, attachment = WAYS[number % len(WAYS)]
        host = proved_host(as_ipv6(text) if family == 6 else text, family, method, attachment)
        number += 1
        counts["hosts"] += 1
        if host is None:
            counts["hosts refused or not proved"] += 1
            continue
        for kind in FAULTS:
            if time.monotonic() < deadline:
                _one(host, kind, dice, counts, findings)
    counts |= Counter({"faults": sum(sum(found.values()) for found in findings.values())})
    print(dict(counts), tally(findings), f"seeds {first} to {number - 1}", sep="\n")
    return sum(found["WRONG"] for found in findings.values())


def _one(
    host: object, kind: str, dice: random.Random, counts: Counter[str], findings: defaultdict[str, Counter[str]]
) -> None:
    known = cast(Host, host)
    files = broken(known.files, kind, dice)
    if files is None:
        return
    found = try_fault(known, files)
    counts["packets"] += found.sent
    findings[kind][found.answer] += 1
    if found.answer == "WRONG":
        changed = [name for name in files if files[name] != known.files.get(name)]
        print(kind, changed, found.detail, sep="\n", flush=True)
        for name in changed:
            print(f"--- {name}", files[name], f"--- was {name}", known.files.get(name), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(1 if measure(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1) else 0)
