"""The commands of docs/guide/quickstart.md, run in the page's order, print what the page says they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from netslot.bench.yard import may_make_taps

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "guide" / "quickstart.md"
NOT_THE_SAME_AGAIN = re.compile(r"^(\.\.\.|lease: .*|acquired_at: .*|built in .*|curl: .*|slots can work here .*|)$")
SECONDS = re.compile(r"in \d+\.\d+ s")

PREAMBLE = """
shopt -s expand_aliases
mount -n -t tmpfs tmpfs /run && mkdir -p /run/netns /run/lock
"""


def _blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _script() -> tuple[str, list[str]]:
    """(a shell script of all commands, the lines that they should print)."""
    lines, wanted = [PREAMBLE], list[str]()
    for kind, text in _blocks():
        if kind == "sh":
            lines += [line for line in text.splitlines() if not line.startswith(("make setup", "export PATH"))]
            if text.rstrip().endswith("&") or "http.server" in text:
                lines.append("sleep 1")  # until the server listens
            continue
        printing = False
        for line in text.splitlines():
            if line.startswith("$ "):
                lines.append(line.removeprefix("$ "))
                printing = True
            elif printing and line.startswith("            ") and lines[-1].count("'") % 2:
                lines[-1] += "\n" + line
            else:
                wanted.append(line)
    return "\n".join(lines), [line for line in wanted if not NOT_THE_SAME_AGAIN.match(line)]


def _comparable(text: str) -> str:
    return SECONDS.sub("in some s", text.rstrip())


def _one_user() -> bool:
    """Whether this is a user namespace that knows its root only."""
    return Path("/proc/self/uid_map").read_text().split()[2:] == ["1"]


@pytest.mark.skipif(not may_make_taps(), reason="/dev/net/tun cannot be used")
def test_the_page_of_the_quick_start_is_true(tmp_path: Path) -> None:
    script, wanted = _script()
    script = script.replace("/tmp/", f"{tmp_path}/")  # the tree itself may be below /tmp
    if _one_user():
        script = script.replace("--as-tenant", "--as-tenant --user 0")  # there is no other user here
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["unshare", "--mount", "--net", "bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=environment,
        timeout=200,
    )
    printed = [_comparable(line) for line in (done.stdout + done.stderr).splitlines()]
    missing = [line for line in wanted if _comparable(line) not in printed]
    assert len(wanted) > 40
    assert not missing, f"{missing}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
