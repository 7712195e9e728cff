"""The operator's own tools, run in the calling thread's namespace: nft, and iptables' save and restore programs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from netslot.errors import HostError, NetslotError, SpecError

_TIMEOUT = 120
_PACKAGES = {"nft": "nftables"}
_TABLE_OR_CHAIN = re.compile(r"^(\t?)(table|chain) (\S+)(?: (\S+))? \{")


def run(command: Sequence[str], text: str = "", file: str | None = None) -> str:
    """Run a tool; SpecError, about ``file``, when it refuses what it was given."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except FileNotFoundError as error:
        package = _PACKAGES.get(command[0], "iptables")
        raise HostError(f"{command[0]} is not installed", hint=f"apt-get install {package}") from error
    except subprocess.TimeoutExpired as error:
        raise NetslotError(f"{' '.join(command)} did not end within {_TIMEOUT} s") from error
    if done.returncode:
        message = done.stderr.strip().splitlines()
        raise SpecError(f"{' '.join(command)}: {message[0] if message else done.returncode}", file=file)
    return done.stdout


def save(tool: str, table: str) -> list[str]:
    """The lines that ``iptables-legacy-save`` and its like print of one table; legacy makes the table by looking."""
    return run([f"{tool}-save", "-t", table]).splitlines()


def restore(tool: str, text: str, *, file: str | None = None, test: bool = False) -> None:
    """Load rules beside those that are there, each table in one transaction; with ``test``, only check them."""
    run([f"{tool}-restore", "--wait", "--noflush", *(["--test"] if test else [])], text, file)


def nft_places() -> set[str]:
    """Every nf_tables table and chain: ``inet netslot-slot``, ``ip filter FORWARD``."""
    places = {" ".join(line.split()[1:]) for line in run(["nft", "list", "tables"]).splitlines()}
    table = ""
    for line in run(["nft", "list", "chains"]).splitlines():
        if (match := _TABLE_OR_CHAIN.match(line)) is None:
            continue
        if match[2] == "table":
            table = f"{match[3]} {match[4]}"
        else:
            places.add(f"{table} {match[3]}")
    return places
