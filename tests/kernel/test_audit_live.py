"""Audit of a live host, played by a throwaway namespace; and the measurement on a stage of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from netslot.bench import walk
from netslot.rulesets.audit import audit
from netslot.rulesets.parse import parse
from synthetic_host import make_host

_AUDIT = "from netslot.cli.audit import audit; audit()"

_HOST = """
set -e
ip link add tap1 type veth peer name far1
ip link set tap1 up
ip route add 192.0.2.7/32 dev tap1
ip link add veth77 type veth peer name far2
ip rule add fwmark 7 lookup 100
nft add table ip mine
nft add chain ip mine forwarded '{ type filter hook forward priority 5; }'
iptables -A FORWARD -i tap1 -j ACCEPT
iptables -A FORWARD -i tap2 -j ACCEPT
ip6tables -A FORWARD -i tap1 -j DROP
iptables -A INPUT -s 192.0.2.7 -j DROP
exec "$@"
"""


def _live(*arguments: str) -> str:
    command = ["unshare", "-n", "bash", "-c", _HOST, "bash", sys.executable, "-c", _AUDIT, "--live", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_live_host_is_read_whole_and_stale_rules_are_found() -> None:
    found = json.loads(_live("--json"))
    assert (found["rules"], found["tenants"]) == (4, 3)  # tap1, tap2, and veth77, which no rule names
    assert found["rules_per_tenant"]["max"] == 3  # the route says that 192.0.2.7 is behind tap1
    assert [(flaw["kind"], flaw["rule"]) for flaw in found["dead"]] == [("dead", "-i tap2 -j ACCEPT")]
    live = [finding["text"] for finding in found["findings"] if finding["kind"] == "live"]
    assert any(text.startswith("6 policy routing rules") for text in live)
    assert any("nftables base chains on ip forward" in text for text in live)


def test_measuring_loads_the_rules_and_leaves_nothing() -> None:
    before = sorted(path.name for path in Path("/sys/class/net").iterdir())
    result = audit(parse(make_host(12).text))
    sentences = walk.measure(result)
    assert "without rules" in sentences[0]
    assert any("iptables-legacy, tenant 1 " in text and "adding one rule" in text for text in sentences[1:])
    assert sorted(path.name for path in Path("/sys/class/net").iterdir()) == before


def test_what_is_measured_has_as_many_rules_and_refuses_nothing() -> None:
    ruleset = parse(make_host(12).text).rulesets[0]
    passable = walk.passable(ruleset)
    assert passable.rule_count() == ruleset.rule_count()
    texts = [rule.text for _, _, rule in passable.rules()]
    assert not any(word in text for text in texts for word in ("DROP", "REJECT", "DNAT", "MASQUERADE", "limit"))
