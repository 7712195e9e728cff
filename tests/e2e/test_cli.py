"""The installed command: what it prints where, how it ends, and what an interrupt or a kill leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import host_lab
import lab
from netslot.cli.main import _VERBS
from netslot.kernel import netns

NETSLOT = str(Path(sys.executable).with_name("netslot"))
SUMMARY = {
    "slots": int,
    "free": int,
    "root_rules": int,
    "rules_per_slot": int,
    "rules_total": int,
    "seconds": float,
}
SLOT = {"slot": int, "netns": str, "netns_path": str, "address": str, "state": str}
MANY = 200


@dataclass
class Stage:
    """A root namespace for the command, and the sandbox example beside a state directory of its own."""

    root: lab.Net
    directory: Path

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def spec(self) -> str:
        return str(self.directory / "sandbox" / "netslot.toml")

    def arguments(self, *words: str) -> list[str]:
        return [NETSLOT, "--state-dir", str(self.state), "--root-netns", self.root.name, *words]

    def run(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.arguments(*words), capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == status, f"{words}: {done.returncode}, not {status}: {done.stdout}{done.stderr}"
        return done

    def json(self, *words: str, status: int = 0) -> Any:
        return json.loads(self.run("--json", *words, status=status).stdout)

    def slots(self) -> int:
        return sum(name.startswith("slot") for name in netns.names())

    def traces(self) -> dict[str, object]:
        """All that a host leaves in the kernel and in files, apart from slots."""
        rules = self.root.sh("nft list ruleset; iptables-legacy-save; ip6tables-legacy-save")
        return {
            "names": {name for name in netns.names() if name.startswith("slot")},
            "links": set(self.root.sh("ls /sys/class/net").split()),
            "rules": [line for line in rules.splitlines() if line.startswith(("-A", "table")) or "NETSLOT" in line],
            "files": sorted(self.state.glob("*")) if self.state.exists() else [],
            "mounts": [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "/slot" in line],
            "forwarding": self.root.sh("cat /proc/sys/net/ipv4/conf/eth0/forwarding"),
        }


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    shutil.copytree(host_lab.EXAMPLES / "sandbox", tmp_path / "sandbox")
    with host_lab.stage() as (root, _):
        made = Stage(root, tmp_path)
        yield made
        if made.state.exists():
            made.run("down", "--force")


def has_shape(value: dict[str, Any], shape: dict[str, type]) -> bool:
    return all(type(value.get(name)) is kind for name, kind in shape.items())


# --- help, statuses, where things are printed --------------------------------------------------------


@pytest.mark.parametrize("verb", sorted(_VERBS))
def test_every_verb_explains_itself(verb: str) -> None:
    done = subprocess.run([NETSLOT, verb, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: netslot {verb}")
    assert not done.stderr


def complains(done: subprocess.CompletedProcess[str], *, hint: bool = True) -> str:
    """The one line of error, which has one of hint below it and nothing else around."""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("netslot: "), done.stderr
    assert len(lines) == 1 + hint, done.stderr
    assert not hint or lines[1].startswith("hint: ")
    assert not done.stdout
    return lines[0]


def test_exit_statuses_and_errors(stage: Stage) -> None:
    assert "no host" in complains(stage.run("status", status=3))
    assert "nonsense" in complains(stage.run("nonsense", status=2))
    assert "slots" in complains(stage.run("up", "--slots", "many", status=2))
    bad = Path(stage.spec).with_name("bad.toml")
    bad.write_text(Path(stage.spec).read_text().replace("hold_down", "hold_dwn"))
    message = complains(stage.run("up", str(bad), status=2))
    assert re.search(r"bad\.toml:\d+: limits\.hold_dwn", message), message
    stage.run("up", stage.spec, "--slots", "1")
    assert "9" in complains(stage.run("show", "9", status=2))
    stage.run("acquire", "--owner", "one")
    assert "free" in complains(stage.run("acquire", "--owner", "two", status=3))
    assert "leased" in complains(stage.run("down", status=3))
    complains(stage.run("release", "--owner", "nobody", status=3))
    complains(stage.run("exec", "1", "--", "/no/such/command", status=1), hint=False)
    stage.run("exec", "1", "--", "sh", "-c", "exit 7", status=7)
    stage.run("exec", "1", "--", "sh", "-c", "kill -TERM $$", status=128 + signal.SIGTERM)


def test_a_host_without_tools_is_status_4(stage: Stage) -> None:
    command = stage.arguments("up", stage.spec, "--slots", "1")
    done = subprocess.run(
        command, env={**os.environ, "PATH": str(stage.directory)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "not installed" in complains(done)


def test_a_traceback_only_with_debug(stage: Stage) -> None:
    assert "Traceback" not in stage.run("status", status=3).stderr
    debugged = stage.run("--debug", "status", status=3).stderr
    assert "Traceback" in debugged
    assert debugged.splitlines()[-1].startswith("hint: ")


def test_json_is_all_that_is_on_stdout(stage: Stage) -> None:
    assert has_shape(stage.json("up", stage.spec, "--slots", "2"), SUMMARY)
    status = stage.json("status")
    assert has_shape(status, SUMMARY)
    assert status["rules_total"] == status["root_rules"] + 2 * status["rules_per_slot"]
    listed = stage.json("ls")
    assert [slot["slot"] for slot in listed] == [1, 2]
    assert all(has_shape(slot, SLOT) for slot in listed)
    shown = stage.json("show", "2")
    assert has_shape(shown, SLOT)
    assert len(shown) > len(listed[1])
    check = stage.json("check", stage.spec)
    assert isinstance(check["ok"], bool)
    assert all(finding.keys() == {"level", "what", "why", "fix"} for finding in check["findings"])
    lease = stage.json("acquire", "--owner", "one")
    assert stage.json("acquire", "--owner", "one")["lease"] == lease["lease"]
    assert stage.json("verify")["drift"] == []
    assert stage.json("release", "--owner", "one")["released"] is True
    assert stage.json("down") == {"slots": 2}
    assert stage.json("down") == {"slots": 0}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_completion_script(shell: str) -> None:
    done = subprocess.run(
        [NETSLOT],
        env={**os.environ, "_NETSLOT_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "_NETSLOT_COMPLETE" in done.stdout
    assert not done.stderr


# --- cut short ---------------------------------------------------------------------------------------


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start(stage: Stage, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        stage.arguments(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def test_ctrl_c_stops_up_and_up_continues(stage: Stage) -> None:
    before = stage.traces()
    with start(stage, "up", stage.spec, "--slots", str(MANY)) as process:
        wait_for(lambda: stage.slots() >= 10, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert not out
    assert error.splitlines() == [error.splitlines()[0], "hint: netslot up continues"]
    built = stage.slots()
    assert 10 <= built < MANY, "it was not interrupted in the middle"
    assert stage.json("status")["slots"] == built, "the ledger does not know what was built"
    pins = {name: os.stat(netns.NETNS_DIR / name).st_ino for name in netns.names()}
    assert stage.json("up", stage.spec, "--slots", str(MANY))["slots"] == MANY
    after = {name: os.stat(netns.NETNS_DIR / name).st_ino for name in netns.names()}
    assert pins.items() <= after.items(), "slots were built twice"
    assert stage.json("verify")["drift"] == []
    assert stage.json("down") == {"slots": MANY}
    assert stage.traces() == before


MOMENTS: dict[str, Callable[[Stage], bool]] = {
    "the state directory": lambda stage: stage.state.exists(),
    "the ledger": lambda stage: (stage.state / "ledger.db-wal").exists(),
    "root's rules": lambda stage: "NETSLOT" in stage.root.sh("iptables-legacy-save -t filter"),
    "the first slot": lambda stage: stage.slots() >= 1,
    "sixty slots": lambda stage: stage.slots() >= 60,
    "almost all slots": lambda stage: stage.slots() >= 118,
}


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_killed_in_the_middle_of_up_then_down(moment: str, stage: Stage) -> None:
    before = stage.traces()
    with start(stage, "up", stage.spec, "--slots", "120") as process:
        wait_for(lambda: MOMENTS[moment](stage), process)
        process.kill()
    stage.run("down")
    assert stage.traces() == before


def test_killed_in_the_middle_of_down_then_down(stage: Stage) -> None:
    before = stage.traces()
    stage.run("up", stage.spec, "--slots", "100")
    with start(stage, "down") as process:
        wait_for(lambda: stage.slots() <= 60, process)
        process.kill()
    stage.run("down")
    assert stage.traces() == before
