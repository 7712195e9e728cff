"""The other policies' benchmarks on a tiny host: they measure what they say, and clean up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from netslot.bench import policies
from netslot.cli.bench import bench


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
