from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from netslot.host import limits
from netslot.spec.load import parse
from netslot.spec.model import HostSpec


def spec(slots: int, kind: str = "tap") -> HostSpec:
    text = f'slots = {slots}\nuplink = "eth0"\n[addresses]\npool = "10.0.0.0/8"\n[attachment]\nkind = "{kind}"\n'
    return parse(text, Path("netslot.toml"))


@pytest.mark.parametrize(
    ("name", "limit", "slots", "level"),
    [
        ("user/max_net_namespaces", 4000, 4000, "error"),
        ("user/max_net_namespaces", 4001, 4000, "info"),
        ("fs/mount-max", 4000, 4000, "error"),
        ("fs/mount-max", 100_000, 4000, "info"),
        ("net/netfilter/nf_conntrack_max", 65_536, 4000, "warning"),
        ("net/netfilter/nf_conntrack_max", 262_144, 4000, "info"),
        ("kernel/pid_max", 4096, 4000, "warning"),
        ("kernel/pid_max", 32_768, 4000, "info"),
    ],
)
def test_a_limit_that_bites_is_told_with_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, name: str, limit: int, slots: int, level: str
) -> None:
    monkeypatch.setattr(limits, "sysctl", {name: limit}.get)
    key = name.replace("/", ".")
    (finding,) = [each for each in limits.check(spec(slots)) if each.what.startswith(f"{key} is")]
    assert finding.level == level
    if level != "info":
        match = re.fullmatch(rf"sysctl -w {re.escape(key)}=(\d+)", finding.fix)
        assert match
        monkeypatch.setattr(limits, "sysctl", {name: int(match[1])}.get)
        (mended,) = [each for each in limits.check(spec(slots)) if each.what.startswith(f"{key} is")]
        assert mended.level == "info"


def test_containers_need_two_namespaces_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "sysctl", {"user/max_net_namespaces": 6000}.get)
    level = {kind: limits.check(spec(4000, kind))[1].level for kind in ("tap", "veth")}
    assert level == {"tap": "info", "veth": "error"}


def test_memory_is_judged_by_what_a_slot_takes() -> None:
    assert limits.check(spec(1))[0].level == "info"
    finding = limits.check(spec(1_000_000))[0]
    assert finding.level == "error"
    assert "MiB" in finding.what


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert any(each.level == "warning" and "LimitNOFILE" in each.fix for each in limits.check(spec(4000)))
    assert not any("LimitNOFILE" in each.fix for each in limits.check(spec(100)))
