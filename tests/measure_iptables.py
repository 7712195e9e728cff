"""What the iptables policy costs, next to the bare system calls and to the tool.

As root: ``python tests/measure_iptables.py``.
Prints medians in microseconds for the sandbox example, each verb in fresh namespaces or on a stamped one, and the
binding of allow lists of 1,000 and 100,000 entries in milliseconds. Interleaved in one run, since machines drift.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from netslot.kernel import netns, xtables
from netslot.policy import iptables
from netslot.policy.iptables_tool import Source, load
from netslot.spec import load as spec_load

ROUNDS = 60
LISTED = "*filter\n:OUTPUT DROP [0:0]\n-A OUTPUT -m set --match-set allow dst -j ACCEPT\nCOMMIT\n"


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sandbox() -> dict[str, float]:
    """Medians in seconds by verb."""
    spec = spec_load.load(Path(__file__).parents[1] / "examples/sandbox/netslot.toml")
    rules = spec.classes["default"].rules
    assert rules is not None
    assert rules.ipv4 is not None
    die = iptables.cast(rules.ipv4.text, samples=[spec.values(1), spec.values(spec.slots)], scalars=())
    assert die.fallback is None
    values = spec.values(99)
    source = Source(xtables.IPV4, "slot.rules", rules.ipv4.text)
    times: dict[str, list[float]] = {}

    def note(name: str, function: Callable[[], object]) -> None:
        times.setdefault(name, []).append(timed(function))

    with netns.fresh():
        die.stamp(values)
        with closing(xtables.open_socket(xtables.IPV4)) as sock:
            tables = [(table, *xtables.read_table(sock, xtables.IPV4, table)) for table in source.tables]
    with netns.fresh(), closing(xtables.open_socket(xtables.IPV4)) as sock:
        fresh = {table: xtables.get_info(sock, xtables.IPV4, table).entries for table in source.tables}

    def bare() -> None:
        with closing(xtables.open_socket(xtables.IPV4)) as sock:
            for table, info, blob in tables:
                xtables.replace(sock, xtables.IPV4, table, info, blob, fresh[table])

    for _ in range(ROUNDS):
        for name, put in (("stamp", lambda: die.stamp(values)), ("bare calls", bare)):
            with netns.fresh():
                note(name, put)
    with netns.fresh():
        die.stamp(values)
        for _ in range(ROUNDS):
            note("read", lambda: die.read(values, {}))
            note("reset", lambda: die.reset(values))
            note("bind, nothing to do", lambda: die.bind(values, {}))
    for _ in range(ROUNDS // 3):
        with netns.fresh():
            note("tool", lambda: load(source, source.render(values)))
    return {name: statistics.median(found) for name, found in times.items()}


def lists() -> dict[str, float]:
    """Medians in seconds of binding and reading allow lists."""
    die = iptables.cast(LISTED, samples=[{}], lists={"allow": "cidrs"}, scalars=())
    rng = random.Random(1)
    found = {}
    with netns.fresh():
        die.stamp({})
        for size in (1, 1_000, 100_000):
            allow = [f"{rng.randrange(1, 224)}.{rng.randrange(256)}.{rng.randrange(256)}.0/24" for _ in range(size)]
            bound = {"allow": allow}
            found[f"bind {size:,}"] = statistics.median(timed(lambda: die.bind({}, bound)) for _ in range(7))  # noqa: B023
            found[f"read {size:,}"] = statistics.median(timed(lambda: die.read({}, bound)) for _ in range(5))  # noqa: B023
    return found


if __name__ == "__main__":
    with netns.Worker() as worker:
        for measured in (worker.run(sandbox), worker.run(lists)):
            for name, seconds in measured.items():
                print(f"{name:24} {seconds * 1e6:12,.0f} us")
