"""The pieces of code in docs/guide/library.md do what the page says, in the page's order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab import nets
from netslot import Host

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "guide" / "library.md"


def test_the_page_of_the_library_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(pieces) > 5
    monkeypatch.chdir(REPOSITORY)
    with nets("outside", "host") as (outside, root):
        root.ip(
            f"link add eth0 type veth peer name eth0 netns {outside.name}",
            "link set eth0 up",
            "addr add 192.0.2.1/24 dev eth0",
        )
        names = {'"/run/try"': repr(str(tmp_path / "state")), 'root_netns="host"': f"root_netns={root.name!r}"}
        scope: dict[str, object] = {"__name__": "page"}
        try:
            for piece in pieces:
                for old, new in names.items():
                    piece = piece.replace(old, new)  # noqa: PLW2901
                exec(compile(piece, str(PAGE), "exec"), scope)
        finally:
            with Host(tmp_path / "state", root_netns=root.name) as host:
                if host.exists:
                    host.down(force=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "10 10 10 18", "as the comment in the page says"
    assert printed[-1] == "10 slots removed"
