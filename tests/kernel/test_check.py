"""``netslot check`` against hosts that are namespaces made for the test."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from netslot.cli.check import check
from netslot.errors import HostError, KernelError
from netslot.kernel import netns, probe
from netslot.kernel.probe import Answer

HOST, TENANT, OUTSIDE = "nscheck-host", "nscheck-tenant", "nscheck-out"
SPEC = 'slots = 10\nuplink = "wan"\n[addresses]\npool = "10.201.0.0/16"\n'
DOCKER = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
:DOCKER-FORWARD - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER-USER -j RETURN
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
"""


def run(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=30).stdout


def on_host(*command: str, text: str | None = None) -> str:
    return run("ip", "netns", "exec", HOST, *command, text=text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host with an uplink and one link that is called like a slot's, to a tenant, forwarding between them."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))  # not the machine's own
    made = [HOST, TENANT, OUTSIDE]
    for name in made:
        netns.create(name)
    try:
        for link, far, at, near_address, far_address in (
            ("wan", OUTSIDE, "198.51.100", 1, 2),
            ("lan", TENANT, "192.0.2", 1, 2),
        ):
            run("ip", "-n", HOST, "link", "add", link, "type", "veth", "peer", "name", "up0", "netns", far)
            run("ip", "-n", HOST, "address", "add", f"{at}.{near_address}/24", "dev", link)
            run("ip", "-n", far, "address", "add", f"{at}.{far_address}/24", "dev", "up0")
            run("ip", "-n", HOST, "link", "set", link, "up")
            run("ip", "-n", far, "link", "set", "up0", "up")
            run("ip", "-n", far, "route", "add", "default", "via", f"{at}.{near_address}")
        on_host("sysctl", "-qw", "net.ipv4.ip_forward=1")
        yield HOST
    finally:
        for name in made:
            netns.unpin(name)


@pytest.fixture
def checked(host: str, tmp_path: Path) -> Callable[..., tuple[int, list[dict[str, str]]]]:
    def do(spec: str = SPEC, *options: str) -> tuple[int, list[dict[str, str]]]:
        file = tmp_path / "netslot.toml"
        file.write_text(spec)
        context = SimpleNamespace(state_dir=tmp_path, root_netns=host, json=True)
        result = CliRunner().invoke(check, [str(file), *options], obj=context, catch_exceptions=False)
        answer: dict[str, Any] = json.loads(result.stdout)
        assert answer["ok"] == all(finding["level"] != "error" for finding in answer["findings"])
        assert (result.exit_code == 0) == answer["ok"]
        return result.exit_code, answer["findings"]

    return do


def found(findings: list[dict[str, str]], words: str) -> dict[str, str] | None:
    return next((finding for finding in findings if words in finding["what"]), None)


def state() -> str:
    """All that a check could have changed on the host of the test."""
    parts = [
        on_host(*command)
        for command in (
            ["ip", "-d", "link"],
            ["ip", "address"],
            ["ip", "route", "show", "table", "all"],
            ["ip", "rule"],
            ["nft", "list", "ruleset"],
            ["cat", "/proc/net/ip_tables_names"],
        )
    ]
    return "\n".join([*parts, *sorted(netns.names())])


def test_a_clean_host_is_found_fit_and_left_as_it_is(checked: Callable[..., Any]) -> None:
    before = state()
    status, findings = checked()
    assert (status, [f for f in findings if f["level"] != "info"]) == (0, [])
    assert found(findings, "kernel: network namespaces: yes")
    assert state() == before


def test_a_missing_uplink_is_told_with_those_that_there_are(checked: Callable[..., Any]) -> None:
    status, findings = checked(SPEC.replace("wan", "eth7"))
    finding = found(findings, "there is no interface eth7")
    assert status == 4
    assert finding
    assert "wan" in finding["why"]


def test_foreign_links_and_namespaces_with_slots_names(checked: Callable[..., Any]) -> None:
    on_host("ip", "link", "add", "lan3", "type", "veth", "peer", "name", "other")
    netns.create("lan4")
    try:
        status, findings = checked('prefix = "lan"\n' + SPEC)
    finally:
        netns.unpin("lan4")
    link, namespace = found(findings, "lan3"), found(findings, "lan4")
    assert status == 4
    assert link
    assert link["level"] == "error"
    assert link["fix"].endswith("ip link del lan3")
    assert namespace
    assert namespace["level"] == "warning"


@pytest.mark.parametrize(
    ("route", "level"), [("10.201.7.0/24", "error"), ("10.0.0.0/8", "warning"), ("10.202.0.0/16", None)]
)
def test_routes_that_overlap_with_the_pool(checked: Callable[..., Any], route: str, level: str | None) -> None:
    run("ip", "-n", HOST, "route", "add", route, "dev", "wan")
    finding = found(checked()[1], f"a route to {route}")
    assert (finding["level"] if finding else None) == level


def tenant_reaches_outside() -> bool:
    command = ["ip", "netns", "exec", TENANT, "ping", "-c1", "-W1", "198.51.100.2"]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def test_the_fix_for_a_forward_chain_that_drops_lets_packets_pass(checked: Callable[..., Any]) -> None:
    assert tenant_reaches_outside()
    on_host("nft", "add", "table", "inet", "fw")
    on_host("nft", "add", "chain", "inet", "fw", "forward", "{ type filter hook forward priority 0; policy drop; }")
    spec = 'prefix = "lan"\n' + SPEC
    finding = found(checked(spec)[1], "inet fw forward drops forwarded packets by policy")
    assert finding
    assert finding["level"] == "warning"
    blocked = not tenant_reaches_outside()
    on_host("sh", "-c", finding["fix"])
    assert (blocked, tenant_reaches_outside()) == (True, True)
    assert found(checked(spec)[1], "drops forwarded packets by policy") is None


@pytest.mark.parametrize("tool", ["iptables-legacy", "iptables-nft"])
def test_docker_s_forward_policy_is_left_to_up(checked: Callable[..., Any], tool: str) -> None:
    on_host(f"{tool}-restore", text=DOCKER)
    assert not tenant_reaches_outside()
    finding = found(checked()[1], "FORWARD drops forwarded packets by policy")
    assert finding
    assert (finding["level"], finding["fix"]) == ("info", "")


def test_rules_for_other_links_that_match_slots_too(checked: Callable[..., Any]) -> None:
    on_host("iptables-nft", "-A", "FORWARD", "-i", "sl+", "-j", "DROP")
    on_host("nft", "add", "table", "ip", "x")
    on_host("nft", "add", "chain", "ip", "x", "c")
    on_host("nft", "add", "rule", "ip", "x", "c", 'oifname "s*"', "drop")
    on_host("iptables-legacy", "-A", "FORWARD", "-i", "slot+", "-j", "ACCEPT")
    findings = checked()[1]
    assert found(findings, "a rule for sl* matches slot1")
    assert found(findings, "a rule for s* matches slot1")
    assert found(findings, "a rule for slot* matches") is None


def test_firewalld_is_told_how_to_trust_the_pool(checked: Callable[..., Any]) -> None:
    on_host("nft", "add", "table", "inet", "firewalld")
    finding = found(checked()[1], "firewalld")
    assert finding
    assert "--zone=trusted --add-source=10.201.0.0/16" in finding["fix"]


def test_a_tool_that_the_spec_needs_is_missing(
    checked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "slot.rules").write_text("*filter\nCOMMIT\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    status, findings = checked(SPEC + '[rules]\nbackend = "iptables-legacy"\nipv4 = "slot.rules"\n')
    finding = found(findings, "iptables-legacy-restore is not installed")
    assert status == 4
    assert finding
    assert finding["fix"] == "apt-get install iptables"
    optional = found(findings, "tool: iptables-nft-restore: not installed")
    assert optional
    assert optional["level"] == "info"


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (KernelError("try", errno.EOPNOTSUPP), Answer.NO),
        (HostError("no such device file"), Answer.NO),
        (KernelError("try", errno.EPERM), Answer.UNKNOWN),
        (OSError(errno.EMFILE, "too many"), Answer.UNKNOWN),
        (None, Answer.YES),
    ],
)
def test_an_answer_is_no_only_where_the_kernel_says_so(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, answer: Answer
) -> None:
    def attempt() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(probe, "_PROBES", {"thing": attempt})
    assert probe.features()["thing"].answer is answer


def test_a_feature_that_the_kernel_lacks_counts_only_where_the_spec_needs_it(
    checked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise KernelError("make tap", errno.ENODEV)

    monkeypatch.setitem(probe._PROBES, "tap", absent)
    status, findings = checked()
    finding = found(findings, "the kernel lacks tap")
    assert (status, finding and finding["fix"]) == (4, "modprobe tun")
    assert checked(SPEC + '[attachment]\nkind = "process"\n')[0] == 0


def test_without_capabilities_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "capabilities", frozenset[str])
    assert {probed.answer for probed in probe.features().values()} == {Answer.UNKNOWN}
