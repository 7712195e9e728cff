"""What every test with real namespaces runs in, and what none may leave behind.

The test process gets a mount namespace with a ``/run`` of its own. So names in ``/run/netns`` and state directories
are those of the tests alone, whatever else runs on the machine, and go with the process however it ends.
"""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from netslot.bench.stage import needs_user_namespace
from netslot.errors import KernelError
from netslot.kernel import netns, sys
from netslot.kernel.tunnels import FALLBACK

_PATIENCE = 3.0
"""Seconds for what the kernel ends by itself: links of a dying namespace, processes on their way out."""


@pytest.fixture(scope="session", autouse=True)
def private_run() -> None:
    """Give this process a ``/run`` of its own; skip what needs namespaces where none may be made."""
    if needs_user_namespace():
        pytest.skip("needs CAP_SYS_ADMIN and CAP_NET_ADMIN: run as root, or `unshare -Urnmpf --mount-proc make test`")
    try:
        sys.unshare(sys.CLONE_NEWNS)
        sys.mount("none", "/", "", sys.MS_REC | sys.MS_PRIVATE)
        sys.mount("tmpfs", "/run", "tmpfs", sys.MS_NOSUID | sys.MS_NODEV, "mode=755")
    except KernelError as error:
        pytest.skip(f"cannot make a mount namespace to test in: {error}")
    netns.NETNS_DIR.mkdir()
    Path("/run/lock").mkdir()
    Path("/run/xtables.lock").touch()  # the iptables tools make it and leave it


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, private_run: None) -> Iterator[None]:
    """Fail a test that leaves anything behind."""
    before = _inventory()
    yield
    gc.collect()
    deadline = time.monotonic() + _PATIENCE
    while left := _left(before, _inventory(), request.node.funcargs.get("tmp_path")):
        if time.monotonic() > deadline:
            _tidy(before)
            pytest.fail(f"{request.node.name} left behind: {'; '.join(left)}", pytrace=False)
        time.sleep(0.02)


def _left(before: dict[str, set[str]], after: dict[str, set[str]], directory: Path | None) -> list[str]:
    left = [
        f"{kind}: {', '.join(sorted(after[kind] - before[kind]))}" for kind in after if after[kind] - before[kind]
    ]
    lost = before["rules of the machine"] - after["rules of the machine"]
    left += ["the machine's own rules changed"] if lost else []
    ledgers = sorted(directory.rglob("ledger.db")) if directory is not None else []
    return left + [f"a host in {ledger.parent}" for ledger in ledgers]


def _inventory() -> dict[str, set[str]]:
    return {
        "names in /run/netns": set(netns.names()),
        "links": set(os.listdir("/sys/class/net")) - FALLBACK,
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "descriptors": _descriptors(),
        "processes": _children(),
        "files": {str(path) for path in Path("/run").rglob("*") if netns.NETNS_DIR not in path.parents},
        "rules of the machine": {_rules()},
    }


def _descriptors() -> set[str]:
    """What is open, by name and how often: one that is closed and opened again may get another number."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{fd}")] += 1
        except FileNotFoundError:  # the one that listed the directory
            continue
    return {f"{name} ({number})" for name, count in found.items() for number in range(1, count + 1)}


def _children() -> set[str]:
    found = set()
    for task in os.listdir("/proc/self/task"):
        try:
            found |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
        except FileNotFoundError:  # a thread that ended meanwhile
            continue
    return found


def _rules() -> str:
    """The root namespace's rules, without looking into tables that looking would make."""
    texts = [_output("nft", "-s", "list", "ruleset")]
    for program in ("iptables-legacy-save", "ip6tables-legacy-save"):
        lines = _output(program).splitlines()
        texts += [line.partition(" [")[0] for line in lines if not line.startswith("#")]
    return "\n".join(texts)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _tidy(before: dict[str, set[str]]) -> None:
    """One test's leftovers must not fail the next."""
    for name in set(netns.names()) - before["names in /run/netns"]:
        netns.unpin(name)
