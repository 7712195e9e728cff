"""What needs no host: the pages made from the commands, help, completion, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from netslot.cli import reference
from netslot.cli.main import cli

REPOSITORY = Path(__file__).parents[3]
NETSLOT = Path(sys.executable).with_name("netslot")
VERBS = sorted(cli.list_commands(cli.make_context("netslot", ["schema"])))


def test_the_page_of_the_commands_is_current() -> None:
    committed = (REPOSITORY / "docs/reference/cli.md").read_text(encoding="utf-8")
    assert committed == reference.page(), "make it anew: python -m netslot.cli.reference > docs/reference/cli.md"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: cli {verb}")


def _complete(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    environment = {
        **os.environ,
        "_NETSLOT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("netslot", *words)),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([NETSLOT], env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("ver",), ["verify"]),
        (("bench", "sk"), ["skew"]),
        (("verify", "--rep"), ["--repair"]),
        (("split", "--attachment", "t"), ["tap"]),
    ],
)
def test_words_are_completed(words: tuple[str, ...], offered: list[str]) -> None:
    assert _complete(*words) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_their_script(shell: str) -> None:
    environment = {**os.environ, "_NETSLOT_COMPLETE": f"{shell}_source"}
    done = subprocess.run([NETSLOT], env=environment, capture_output=True, text=True, check=True)
    assert f"_NETSLOT_COMPLETE={shell}_complete" in done.stdout


def test_wrong_usage_is_status_2(tmp_path: Path) -> None:
    for arguments in (["no-such-verb"], ["acquire"], ["up", "--slots", "-1"]):
        done = subprocess.run([NETSLOT, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
