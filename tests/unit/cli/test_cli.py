"""What needs no host: the pages made from the commands, help, completion, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
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
    """What a shell is offered for the last word."""
    shell = BashComplete(cli, {}, "netslot", "_NETSLOT_COMPLETE")
    return [offer.value for offer in shell.get_completions(list(words[:-1]), words[-1])]


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


def test_bash_gets_its_script_and_its_words() -> None:
    """As the page says, by the installed command."""
    script = _output(_NETSLOT_COMPLETE="bash_source")
    assert "_NETSLOT_COMPLETE=bash_complete" in script
    offered = _output(_NETSLOT_COMPLETE="bash_complete", COMP_WORDS="netslot ver", COMP_CWORD="1")
    assert offered.splitlines() == ["plain,verify"]


def _output(**environment: str) -> str:
    done = subprocess.run([NETSLOT], env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout


def test_wrong_usage_is_status_2(tmp_path: Path) -> None:
    for arguments in (["no-such-verb"], ["acquire"], ["up", "--slots", "-1"]):
        assert CliRunner().invoke(cli, arguments).exit_code == 2
    done = subprocess.run([NETSLOT, "acquire"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
