"""The other policies' benchmarks on a tiny host: they measure what they say, and clean up."""

from __future__ import annotations

import fcntl
import json
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hostlab import NETSLOT
from netslot.bench import policies
from netslot.cli.bench import bench
from netslot.kernel import cgroupfs


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_skew_of_each_policy(policy: str) -> None:
    arguments = ["skew", "--policy", policy, "--slots", "4", "--positions", "2", "--samples", "12", "--json"]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    shared, own = result["shapes"][0], result["shapes"][-1]
    assert own["shape"] == f"slots-{policy}"
    assert own["root_rules"] == 0
    assert shared["root_rules"] == (4 if policy != "bpf" else 0)
    for shape in result["shapes"]:
        assert [position["slot"] for position in shape["positions"]] == [1, 4]
        assert all(position["p50_us"] > 0 for position in shape["positions"])
        assert shape["add_tenant_us"] > 0
    assert not list(Path("/sys/fs/cgroup/unified").glob("netslot-test-bench-*"))


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    """Killed once its cgroups are there, with SIGKILL: nothing of it can clean up."""
    arguments = ["bench", "skew", "--policy", "cgroup", "--slots", "300", "--positions", "2", "--samples", "4000"]
    before = set(cgroupfs.unified_root().glob("netslot-test-bench-*"))
    with subprocess.Popen([NETSLOT, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        made = set[Path]()
        deadline = time.monotonic() + 60
        while not made and started.poll() is None and time.monotonic() < deadline:
            made = set(cgroupfs.unified_root().glob("netslot-test-bench-*")) - before
        (orphan,) = made
        started.kill()
    with cgroupfs.opened(orphan) as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # whoever worked for the run has ended too
    assert orphan.exists(), "the run left something"
    test_skew_of_each_policy("cgroup")
    assert not orphan.exists()


NAT = ["nat", "--samples", "20", "--connections", "500", "--setups", "3"]


def test_nat_for_people_and_for_programs() -> None:
    done = CliRunner().invoke(bench, [*NAT, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    kinds = {kind["nat"]: kind for kind in result["kinds"]}
    assert set(kinds) == {"bpf", "nftables", "conntrack"}
    slowest = max(kind["setup_us"] for kind in kinds.values())
    assert min(result["tools_us"]["iptables-legacy"], result["tools_us"]["iptables-nft"]) > slowest > 0
    done = CliRunner().invoke(bench, NAT)
    assert "stateless, bpf" in done.output


def test_what_does_not_go_together_is_refused() -> None:
    done = CliRunner().invoke(bench, ["skew", "--policy", "bpf", "--picture", "x.svg"])
    assert "--picture are for rules" in str(done.exception)
