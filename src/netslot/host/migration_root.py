"""Root's two rulesets, the one before a move and the one after: kept, told apart, and exchanged table by table."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from netslot.errors import NetslotError, RefusedError
from netslot.host import tables
from netslot.host.migration_homes import Homes
from netslot.host.migration_journal import Journal, locked, put
from netslot.host.tables import Variant
from netslot.kernel import netns
from netslot.rulesets.ipsets import SETS
from netslot.rulesets.model import Family
from netslot.rulesets.proof.arrangement import ROOT
from netslot.rulesets.published import PUBLISH, PUBLISH_TABLE
from netslot.rulesets.split import BEFORE

FAMILIES: tuple[Family, ...] = (4, 6)
_COUNTED = re.compile(r"\[(?!0:0\])\d+:\d+\] -A")
Which = Literal["old", "new", "other"]


def prepare(directory: Path, homes: Homes, variant: Variant, files: Mapping[str, str]) -> None:
    """Try everything that can be tried, and keep both rulesets. RefusedError when the host has others by now."""
    sets = _sets(homes, files)
    for family in FAMILIES:
        if ROOT[family] not in files:
            for name in ("old", "new"):  # of a move that was never begun
                (directory / f"{name}.v{family}").unlink(missing_ok=True)
            continue
        held = homes.root(tables.save, variant, family)
        _same_as_split(family, files, held)
        if SETS[family] not in files:
            homes.root(tables.restore, variant, family, files[ROOT[family]], test=True)
        put(directory / f"old.v{family}", held)
        put(directory / f"new.v{family}", _as_saved(variant, family, files[ROOT[family]], sets))


def _sets(homes: Homes, files: Mapping[str, str]) -> str:
    """Text that makes all sets that root's new rules can ask for: netslot's own, and empty ones like the host's."""
    own = "".join(files.get(name, "") for name in SETS.values())
    texts = [files[name] for name in ROOT.values() if name in files]
    if not any(" --match-set " in text or " -j SET " in text for text in texts):
        return ""
    names = tables.set_names(own)
    if twice := {name for name in names if names.count(name) > 1}:
        raise RefusedError(f"two sets are called {min(twice)}, one for IPv4 and one for IPv6", hint="move one first")
    theirs = homes.root(tables.sets_in_use)
    if taken := set(tables.set_names(*theirs)) & set(names):
        raise RefusedError(
            f"the host has a set called {min(taken)} already", hint="rename it: netslot brings its own"
        )
    return "".join(f"{line}\n" for line in theirs) + own


def _same_as_split(family: Family, files: Mapping[str, str], held: str) -> None:
    before = files.get(BEFORE[family])
    if before is None:
        raise RefusedError(f"the directory has no {BEFORE[family]}", hint="run netslot split again")
    changed = tables.difference(tables.plain(before), tables.plain(held))
    if changed:
        raise RefusedError(
            f"the host's IPv{family} rules are not those that were split:\n{changed}",
            hint="split and prove the rules of now: netslot split --live --out DIR",
        )


def _as_saved(variant: Variant, family: int, text: str, sets: str) -> str:
    """What iptables-save prints when these rules are loaded: load them where nobody is."""

    def load() -> str:
        with netns.fresh():
            if sets:
                tables.make_sets(sets)
            tables.restore(variant, family, text)
            return tables.save(variant, family)

    with netns.Worker() as worker:
        return worker.run(load)


class Exchange:
    """The exchange of root's tables, there and back. ``lock``: lent to the programs that do it."""

    def __init__(self, directory: Path, journal: Journal, homes: Homes, lock: int) -> None:
        self._directory, self._journal, self._homes, self._lock = directory, journal, homes, lock

    def _kept(self, name: str, family: int) -> str | None:
        path = self._directory / f"{name}.v{family}"
        return path.read_text(errors="surrogateescape") if path.exists() else None

    def in_force(self) -> dict[tuple[Family, str], Which]:
        """Which of the two each of root's tables is that differs between them; in the order of a packet's way."""
        found: dict[tuple[Family, str], Which] = {}
        if self._journal.state == "none":
            return found
        for family in FAMILIES:
            old, new = (self._kept(name, family) for name in ("old", "new"))
            if old is None or new is None:
                continue
            now = tables.plain(self._homes.root(tables.save, self._journal.variant, family))
            before, after = tables.plain(old), tables.plain(new)
            for name in tables.by_table(old) | tables.by_table(new):
                mine, then, next_ = (texts.get(name) for texts in (now, before, after))
                if then != next_ or mine != then:
                    found[family, name] = "old" if mine == then else "new" if mine == next_ else "other"
        return found

    def check_old_or_new(self) -> None:
        """RefusedError, with the lines, when somebody else has changed root's rules since the move began."""
        for (family, name), which in self.in_force().items():
            if which == "other":
                raise RefusedError(
                    f"somebody has changed root's IPv{family} table {name} since:\n{self._changed(family, name)}",
                    hint="take that back and run again, or netslot migrate --rollback",
                )

    def _changed(self, family: Family, name: str) -> str:
        """How a table differs from the kept one that it is nearer to."""
        now = tables.plain(self._homes.root(tables.save, self._journal.variant, family)).get(name, [])
        kept = (tables.plain(self._kept(which, family) or "").get(name, []) for which in ("old", "new"))
        return min((tables.difference({name: one}, {name: now}) for one in kept), key=lambda text: text.count("\n"))

    @contextmanager
    def _alone(self) -> Iterator[tuple[int, ...]]:
        """Keep the iptables programs of others away from root's tables; the nft variant has no such lock."""
        if self._journal.variant == "nft":
            yield (self._lock,)
            return
        path = Path(os.environ.get("XTABLES_LOCKFILE", tables.LOCK))
        with locked(path, f"another program keeps {path}, the lock of iptables") as lock:
            yield (self._lock, lock)

    def forward(self, files: Mapping[str, str]) -> None:
        """The published ports first (the first translation wins, and both say the same), then table by table."""
        with self._alone() as keep:
            self.check_old_or_new()
            standing = self.in_force()
            if "new" not in standing.values():
                self._keep_now(files)
                for name in SETS.values():
                    if name in files:  # no rule asks for them before the first table
                        self._homes.root(tables.make_sets, files[name], keep=keep)
            for family in FAMILIES:
                published = files.get(PUBLISH[family])
                if published is not None:
                    self._homes.root(tables.nft, _gone(family) + published, keep=keep)
                for name, text in tables.by_table(files.get(ROOT[family], "")).items():
                    if standing.get((family, name)) == "old":
                        self._put(family, name, text, keep, "new")
            wrong = [key for key, which in self.in_force().items() if which != "new"]
            if wrong:
                raise NetslotError("root's rules are not what was loaded", hint="netslot migrate --rollback")

    def _keep_now(self, files: Mapping[str, str]) -> None:
        """Keep root's rules once more, for their counters; and see that they are still those that were split."""
        for family in FAMILIES:
            if ROOT[family] in files:
                held = self._homes.root(tables.save, self._journal.variant, family)
                _same_as_split(family, files, held)
                put(self._directory / f"old.v{family}", held)

    def _put(self, family: Family, name: str, text: str, keep: tuple[int, ...], which: Which) -> None:
        self._journal.write({"step": "table", "family": family, "table": name, "which": which})
        variant, counters = self._journal.variant, which == "old"
        self._homes.root(tables.restore, variant, family, text, counters=counters, keep=keep)

    def back(self, say: Callable[[str], None]) -> None:
        """The tables that are not the old ones, in the opposite order; then the published ports go.

        What others have changed meanwhile is kept beside the state, and said.
        """
        with self._alone() as keep:
            for (family, name), which in reversed(self.in_force().items()):
                if which == "other":
                    self._keep_other(family, name, say)
                if which != "old":
                    self._put(family, name, tables.by_table(self._kept("old", family) or "")[name], keep, "old")
            if set(self.in_force().values()) - {"old"}:
                raise NetslotError(
                    "root's rules are not those of before the move", hint="look at the state directory"
                )
            for family in FAMILIES:
                self._homes.root(tables.nft, _gone(family), keep=keep)
                if self._journal.sets:
                    self._homes.root(tables.destroy_sets, self._journal.sets, keep=keep)
                if self._counters_lost(family):
                    tool = f"{tables.PROGRAMS[family]}-nft-restore"
                    say(f"IPv{family} rules count from zero: {tool} lost their counters")

    def _counters_lost(self, family: Family) -> bool:
        """Whether the program forgot what rules had counted, as ip6tables-nft-restore of iptables 1.8.9 does."""
        texts = self._kept("old", family), self._homes.root(tables.save, self._journal.variant, family)
        before, now = (any(_COUNTED.match(line) for line in (text or "").splitlines()) for text in texts)
        return before and not now

    def _keep_other(self, family: Family, name: str, say: Callable[[str], None]) -> None:
        path = self._directory.parent / f"replaced-by-rollback.v{family}.{name}"
        put(path, tables.by_table(self._homes.root(tables.save, self._journal.variant, family))[name])
        say(f"root's IPv{family} table {name} has been changed by others since; what it held is in {path}:")
        say(self._changed(family, name))


def _gone(family: int) -> str:
    """Delete the table of published ports whether or not it is there."""
    word = "ip" if family == 4 else "ip6"
    return f"table {word} {PUBLISH_TABLE} {{ }}\ndelete table {word} {PUBLISH_TABLE}\n"
