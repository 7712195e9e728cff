"""Firewall dumps of real hosts, kept outside the repository. Tests that need them skip when they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DIRECTORY = Path(os.environ.get("NETSLOT_DUMPS", Path(__file__).parents[2] / "shared" / "dumps"))
PATHS = sorted(DIRECTORY.glob("*.iptables"))

_ABSENT = pytest.param(
    None,
    marks=pytest.mark.skip(reason=f"no dumps in {DIRECTORY}: set NETSLOT_DUMPS to a directory with *.iptables files"),
)

each_dump = pytest.mark.parametrize("dump", PATHS or [_ABSENT], ids=lambda path: path.stem if path else "none")
"""Runs a test once for each dump, with its path as the argument ``dump``."""
