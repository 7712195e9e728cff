"""Measure the nftables policy, as root: ``python tests/measure_nftables.py``. Figures: docs/decisions/0015 to 0019.

``tool`` runs the real command in a fresh namespace, ``stamp`` is the die's verb there, ``floor`` only sends bytes
that were made before and waits for the kernel. Medians in milliseconds; all of one line's interleaved.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "src")]

from netslot.kernel import netns  # noqa: E402
from netslot.kernel import nf_tables as nf  # noqa: E402
from netslot.policy import nftables  # noqa: E402
from netslot.policy.base import Values  # noqa: E402
from netslot.policy.nftables import NftablesDie  # noqa: E402
from netslot.spec import load  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
ROUNDS = 25


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def tool(die: NftablesDie, values: Values) -> float:
    die._program.prepare()
    return timed(lambda: die._program.load(values, {}))


def stamp(die: NftablesDie, values: Values) -> float:
    return timed(lambda: die.stamp(values))


def floor(die: NftablesDie, values: Values) -> float:
    die._program.prepare()
    batch = nf.Batch(list(die._everything(values, {})))
    with nf.Socket() as sock:
        return timed(lambda: sock.commit(batch))


def read(die: NftablesDie, values: Values) -> float:
    die.stamp(values)
    die.read(values, {})
    return timed(lambda: die.read(values, {}))


def read_generation(die: NftablesDie, values: Values) -> float:
    die.stamp(values)
    known = die.generation()
    return timed(lambda: die.read(values, {}, known_generation=known))


def reset(die: NftablesDie, values: Values) -> float:
    die.stamp(values)
    return timed(lambda: die.reset(values))


VERBS = (tool, stamp, floor, read, read_generation, reset)


def example(name: str) -> tuple[NftablesDie, Values]:
    """The die of an example's rules, iptables files by their nft variant, and one slot's values."""
    spec = load.load(EXAMPLES / name)
    each = next(iter(spec.classes.values()))
    samples = [spec.values(slot) for slot in (1, spec.slots, spec.slots // 2)]
    rules = each.rules
    assert rules is not None
    if rules.nft is not None:
        return nftables.cast(rules.nft.text, samples=samples, lists=each.lists, scalars=()), spec.values(17)
    assert rules.ipv4 is not None
    six = rules.ipv6.text if rules.ipv6 else None
    die = nftables.cast_iptables(rules.ipv4.text, six, samples=samples, lists=each.lists, scalars=())
    return die, spec.values(17)


def measure(worker: netns.Worker, die: NftablesDie, values: Values) -> Mapping[str, float]:
    found: dict[str, list[float]] = {verb.__name__: [] for verb in VERBS}

    def once(verb: Callable[[NftablesDie, Values], float]) -> float:
        with netns.fresh():
            return verb(die, values)

    for _ in range(ROUNDS):
        for verb in VERBS:
            found[verb.__name__].append(worker.run(once, verb))
    return {name: round(statistics.median(each), 3) for name, each in found.items()}


def lists(die: NftablesDie, values: Values, count: int) -> Mapping[str, float]:
    """Bind a list of networks to a fresh slot, then change one of them, then all, then reset."""

    def networks() -> list[str]:
        return [
            f"{random.randrange(1, 224)}.{random.randrange(256)}.{random.randrange(256)}.0/24" for _ in range(count)
        ]

    first, second = networks(), networks()
    with netns.fresh():
        die.stamp(values)
        return {
            "bind": round(timed(lambda: die.bind(values, {"allow": first})), 2),
            "same again": round(timed(lambda: die.bind(values, {"allow": first})), 2),
            "one changed": round(timed(lambda: die.bind(values, {"allow": [*first[1:], second[0]]})), 2),
            "all changed": round(timed(lambda: die.bind(values, {"allow": second})), 2),
            "reset": round(timed(lambda: die.reset(values)), 2),
        }


def main() -> None:
    with netns.Worker() as worker:
        for name in ("sandbox/netslot-nft.toml", "sandbox/netslot.toml", "container/netslot.toml"):
            die, values = example(name)
            print(f"{name}: {die.rules} rules, {die.fallback or 'stamped'}: {measure(worker, die, values)}")
        die, values = example("container/netslot.toml")
        for count in (1_000, 1_000, 1_000, 100_000):
            print(f"{count} networks: {worker.run(lists, die, values, count)}")


if __name__ == "__main__":
    main()
