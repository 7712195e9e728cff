"""A namespace's iptables as text: saved, compared, and restored table by table, each table at once.

Both variants of iptables are spoken through their own save and restore programs, because what is moved here is
whatever an operator's host holds. Functions work in the calling thread's network namespace.
"""

from __future__ import annotations

import re
import subprocess
from typing import Literal

from netslot.errors import HostError, NetslotError

Variant = Literal["legacy", "nft"]
PROGRAMS = {4: "iptables", 6: "ip6tables"}
_COUNTERS = re.compile(r"^(:\S+ \S+) \[\d+:\d+\]|^\[\d+:\d+\] ")


def save(variant: Variant, family: int) -> str:
    """What iptables-save prints, counters included."""
    return _run([f"{PROGRAMS[family]}-{variant}-save", "-c"])


def restore(variant: Variant, family: int, text: str, *, test: bool = False, counters: bool = False) -> None:
    """Replace the tables that the text holds. Each is exchanged whole, by one call of the kernel."""
    words = [f"{PROGRAMS[family]}-{variant}-restore", "-w"]
    _run([*words, *(["--test"] if test else []), *(["-c"] if counters else [])], text)


def variant_in_use() -> Variant:
    """The variant whose tables hold rules; legacy when neither does."""
    counts = {variant: save(variant, 4).count("\n[") + save(variant, 6).count("\n[") for variant in ("legacy", "nft")}
    if all(counts.values()):
        raise HostError(
            "both iptables-legacy and iptables-nft hold rules here",
            hint="move the rules of one into the other first: one restore cannot replace both",
        )
    return "nft" if counts["nft"] else "legacy"


def plain(text: str) -> dict[str, list[str]]:
    """The lines of each table, without comments and counters: equal when the rules are equal."""
    found: dict[str, list[str]] = {}
    table: list[str] = []
    for line in text.splitlines():
        if line.startswith("*"):
            table = found.setdefault(line, [])
        elif line and not line.startswith("#") and line != "COMMIT":
            table.append(_COUNTERS.sub(lambda match: match[1] or "", line).rstrip())
    chains = {name: sorted(line for line in lines if line.startswith(":")) for name, lines in found.items()}
    return {
        name: chains[name] + [line for line in lines if not line.startswith(":")]
        for name, lines in found.items()
        if any(line.startswith("-") or " DROP" in line or " - " in f"{line} " for line in lines)
    }


def emptied(text: str) -> str:
    """Rules that make the tables of a saved text empty, with built-in chains that accept."""
    lines = []
    for line in text.splitlines():
        if line.startswith("*"):
            lines.append(line)
        elif line.startswith(":") and line.split()[1] != "-":
            lines.append(f"{line.split()[0]} ACCEPT [0:0]")
        elif line == "COMMIT":
            lines.append(line)
    return "\n".join([*lines, ""])


def nft(text: str) -> None:
    """Feed ``nft -f -``; the whole text is one transaction."""
    _run(["nft", "-f", "-"], text)


def _run(words: list[str], text: str | None = None) -> str:
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, errors="surrogateescape", check=False
        )
    except FileNotFoundError:
        raise HostError(f"there is no {words[0]} here", hint="install iptables and nftables") from None
    if done.returncode:
        raise NetslotError(f"{' '.join(words)}: {done.stderr.strip() or 'failed'}")
    return done.stdout
