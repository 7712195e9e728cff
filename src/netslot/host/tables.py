"""A namespace's iptables as text: saved, compared, and restored table by table, each table at once.

Both variants of iptables are spoken through their own save and restore programs, because what is moved here is
whatever an operator's host holds. Functions work in the calling thread's network namespace.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from netslot.errors import HostError, NetslotError

Variant = Literal["legacy", "nft"]
PROGRAMS = {4: "iptables", 6: "ip6tables"}
ORDER = ("raw", "mangle", "nat", "filter", "security")
"""The tables in the order in which a packet meets them."""
LOCK = "/run/xtables.lock"
"""What the legacy tools lock, unless XTABLES_LOCKFILE names another (iptables/xshared.h)."""

_COUNTERS = re.compile(r"^(:\S+ \S+) \[\d+:\d+\]|^\[\d+:\d+\] ")
_SHOWN = 12
_TRIES = 100
_PACKAGES = {"nft": "nftables", "ipset": "ipset"}
_HEADS = ("--- ", "+++ ", "@@ ")


def save(variant: Variant, family: int) -> str:
    """What iptables-save prints, counters included."""
    return _run([f"{PROGRAMS[family]}-{variant}-save", "-c"])


def restore(
    variant: Variant, family: int, text: str, *, test: bool = False, counters: bool = False, keep: Sequence[int] = ()
) -> None:
    """Replace the tables that the text holds. Each is exchanged whole, by one call of the kernel.

    The caller holds the tools' lock file, or the namespace is nobody else's: the program locks another file.
    ``keep``: descriptors that the program is to hold open until it ends.
    """
    words = [f"{PROGRAMS[family]}-{variant}-restore", *(["--test"] if test else []), *(["-c"] if counters else [])]
    lock = os.memfd_create("netslot-xtables")
    try:
        _run(words, text, {**os.environ, "XTABLES_LOCKFILE": f"/proc/self/fd/{lock}"}, (lock, *keep))
    finally:
        os.close(lock)


def variant_in_use() -> Variant:
    """The variant whose tables hold rules; legacy when neither does."""
    counts = {variant: save(variant, 4).count("\n[") + save(variant, 6).count("\n[") for variant in ("legacy", "nft")}
    if all(counts.values()):
        raise HostError(
            "both iptables-legacy and iptables-nft hold rules here",
            hint="move the rules of one into the other first: one restore cannot replace both",
        )
    return "nft" if counts["nft"] else "legacy"


def by_table(text: str) -> dict[str, str]:
    """The part of a saved text that each table is, as a text of its own; in the order of a packet's way."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("*"):
            lines = found.setdefault(line[1:].strip(), [])
        lines.append(line)
        if line.strip() == "COMMIT":
            lines = []
    return {name: "".join(found[name]) for name in sorted(found, key=_place)}


def _place(table: str) -> int:
    return ORDER.index(table) if table in ORDER else len(ORDER)


def plain(text: str) -> dict[str, list[str]]:
    """The lines of each table, without comments and counters: equal when the rules are equal.

    Tables without rules, chains and policies of their own are left out: looking at a table can make one.
    """
    found: dict[str, list[str]] = {}
    for name, part in by_table(text).items():
        lines = [line for line in part.splitlines()[1:-1] if line and not line.startswith("#")]
        lines = [_COUNTERS.sub(lambda match: match[1] or "", line).rstrip() for line in lines]
        chains = sorted(line for line in lines if line.startswith(":"))
        if any(not line.startswith(":") or not line.endswith(" ACCEPT") for line in lines):
            found[name] = chains + [line for line in lines if not line.startswith(":")]
    return found


def difference(expected: Mapping[str, Sequence[str]], found: Mapping[str, Sequence[str]]) -> str:
    """What :func:`plain` says of two texts, as lines with - and +, the first dozen of them; "" when they agree."""
    lines: list[str] = []
    for name in sorted(expected.keys() | found.keys(), key=_place):
        before, now = (list(texts.get(name, ())) for texts in (expected, found))
        found_lines = difflib.unified_diff(before, now, lineterm="", n=0)
        changed = [line for line in found_lines if not line.startswith(_HEADS)]
        lines += [f"{line[0]} {name}: {line[1:]}" for line in changed]
    more = [f"... and {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []
    return "\n".join(["  " + line for line in [*lines[:_SHOWN], *more]])


def sets_in_use() -> list[str]:
    """``create`` lines, as ``ipset save`` prints them, of all IP sets of the namespace."""
    return [line for line in _run(["ipset", "save"]).splitlines() if line.startswith("create ")]


def make_sets(text: str, *, keep: Sequence[int] = ()) -> None:
    """Feed ``ipset restore``. Sets that are there already are made anew: no rule may be using them."""
    names = set_names(text)
    emptied = "".join(f"flush {name}\ndestroy {name}\n" for name in names if name in set_names(*sets_in_use()))
    _run(["ipset", "restore"], emptied + text, keep=keep)


def destroy_sets(names: Sequence[str], *, keep: Sequence[int] = ()) -> None:
    """Remove those of the sets that are there."""
    present = set_names(*sets_in_use())
    text = "".join(f"destroy {name}\n" for name in names if name in present)
    for attempt in range(_TRIES):
        try:
            _run(["ipset", "restore", "-exist"], text, keep=keep)
            return
        except NetslotError:  # the nft variant lets go of rules, and of their sets, a moment after they are gone
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.05)


def set_names(*lines: str) -> list[str]:
    """The sets that a text for ``ipset restore`` makes."""
    return [line.split()[1] for line in "\n".join(lines).splitlines() if line.startswith("create ")]


def nft(text: str, *, keep: Sequence[int] = ()) -> None:
    """Feed ``nft -f -``; the whole text is one transaction."""
    _run(["nft", "-f", "-"], text, keep=keep)


def _run(
    words: list[str], text: str | None = None, environment: Mapping[str, str] | None = None, keep: Sequence[int] = ()
) -> str:
    try:
        done = subprocess.run(
            words,
            input=text,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            env=environment,
            pass_fds=keep,
        )
    except FileNotFoundError:
        package = _PACKAGES.get(words[0], "iptables")
        raise HostError(f"{words[0]} is not installed", hint=f"apt-get install {package}") from None
    if done.returncode:
        raise NetslotError(f"{' '.join(words)}: {done.stderr.strip() or 'failed'}")
    return done.stdout
