"""A root namespace whose rules are not netslot's: the spec names them, the operator loads them, netslot compares.

So what ``netslot split`` wrote and ``netslot prove`` proved is what is in force: nothing of netslot's stands before
or behind it. Functions run on a worker thread that is in the root namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from netslot.errors import NetslotError, RefusedError
from netslot.host import root_text, tables
from netslot.host.root_tools import run
from netslot.host.tables import Variant
from netslot.kernel import netns
from netslot.policy.base import Difference
from netslot.spec.model import HostSpec, RuleFile

_SHOWN = 3


def refuse(spec: HostSpec) -> None:
    """RefusedError, with what differs, when root holds other tables than the spec says it does."""
    wrong = differences(spec)
    if wrong:
        raise RefusedError(
            f"root holds other rules than the spec says: {'; '.join(map(str, wrong[:_SHOWN]))}"
            + (f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""),
            hint=f"nothing was changed. Load them first: {'; '.join(commands(spec))}",
        )


def differences(spec: HostSpec) -> list[Difference]:
    """What the tables that the spec's files name hold otherwise. Counters do not count."""
    found: list[Difference] = []
    if spec.root.preset:
        return found
    for family, file in _iptables(spec):
        found += _compare(spec, family, file)
    for file in spec.root.published:
        for owner in root_text.nft_tables(file.text):
            found += _compare_nft(file.text, " ".join(owner))
    return found


def count(spec: HostSpec) -> int:
    """How many rules of root's the spec names: as iptables-save prints them, and statements of nft chains."""
    lines = [
        line.strip() for file in (*spec.root.rules.files, *spec.root.published) for line in file.text.splitlines()
    ]
    return sum(line.startswith("-A ") for line in lines) + sum(" dnat " in f" {line} " for line in lines)


def _iptables(spec: HostSpec) -> Iterator[tuple[Literal[4, 6], RuleFile]]:
    rules = spec.root.rules
    if rules.ipv4 is not None:
        yield 4, rules.ipv4
    if rules.ipv6 is not None:
        yield 6, rules.ipv6


def _variant(spec: HostSpec) -> Variant:
    return "nft" if spec.root.backend == "iptables-nft" else "legacy"


def commands(spec: HostSpec) -> list[str]:
    """What loads the files."""
    loads = [f"{tables.PROGRAMS[family]}-{_variant(spec)}-restore < {file.name}" for family, file in _iptables(spec)]
    return loads + [f"nft -f {file.name}" for file in spec.root.published]


def _compare(spec: HostSpec, family: Literal[4, 6], file: RuleFile) -> Iterator[Difference]:
    text = file.text
    now = tables.plain(tables.save(_variant(spec), family))
    wanted = tables.plain(text)
    named = [line[1:].strip() for line in text.splitlines() if line.startswith("*")]
    if any(now.get(table) != wanted.get(table) for table in named):
        wanted = tables.plain(_as_saved(_variant(spec), family, text))  # the file may be in words of a person's
    for table in named:
        where = f"root {tables.PROGRAMS[family]} {table}"
        yield from _lines(where, wanted.get(table, []), now.get(table, []))


def _lines(where: str, wanted: list[str], now: list[str]) -> Iterator[Difference]:
    missing = [line for line in wanted if line not in now and not _is_bare(line)]
    added = [line for line in now if line not in wanted and not _is_bare(line)]
    yield from (Difference(where, f"missing: {line}") for line in missing)
    yield from (Difference(where, f"not in the spec's file: {line}") for line in added)
    if wanted != now and not missing and not added:
        yield Difference(where, "rules are in another order, or one is there twice")


def _is_bare(line: str) -> bool:
    """A built-in chain that accepts: the same as a table that nobody has made yet."""
    return line.startswith(":") and line.endswith(" ACCEPT")


def _compare_nft(text: str, owner: str) -> Iterator[Difference]:
    wanted = _as_listed(text, owner)
    if owner not in {line.removeprefix("table ") for line in run(["nft", "list", "tables"]).splitlines()}:
        yield Difference(f"root nft {owner}", "the table is missing")
    elif (now := _listed(owner)) != wanted:
        yield from _lines(f"root nft {owner}", list(wanted), list(now))


def _listed(owner: str) -> tuple[str, ...]:
    lines = run(["nft", "-s", "-nn", "list", "table", *owner.split()]).splitlines()
    return tuple(line.strip() for line in lines)


@lru_cache(maxsize=8)
def _as_listed(text: str, owner: str) -> tuple[str, ...]:
    """What nft prints of a table when the file is loaded: load it where nobody is."""

    def load() -> tuple[str, ...]:
        with netns.fresh():
            run(["nft", "-f", "-"], text)
            return _listed(owner)

    with netns.Worker() as worker:
        return worker.run(load)


@lru_cache(maxsize=8)
def _as_saved(variant: Variant, family: Literal[4, 6], text: str) -> str:
    """What iptables-save prints when these rules are loaded: load them where nobody is.

    The text itself where they cannot be, as rules with sets, which are not there.
    """

    def load() -> str:
        with netns.fresh():
            tables.restore(variant, family, text)
            return tables.save(variant, family)

    with netns.Worker() as worker:
        try:
            return worker.run(load)
        except NetslotError:
            return text
