"""What the other policies' sections say that cannot be meant: told with its line, before anything is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from netslot.errors import SpecError
from netslot.spec.crosschecks import lists_of_policies
from netslot.spec.load import parse

HEAD = """slots = 4
uplink = "eth0"
addresses.pool = "10.201.0.0/16"
attachment.kind = "veth"
parameters.deny.type = "cidrs"
parameters.pub.type = "ports"
parameters.size = { type = "int", default = 1 }
"""
LINES = HEAD.count("\n")
HOST = Path(__file__).parent / "netslot.toml"
PROGRAM = '[[bpf.programs]]\nobject = "__init__.py"\nprogram = "x"\n'
TUNNEL = '[[routes.tunnels]]\nname = "vpn0"\nlocal = "${address}"\nremote = "192.0.2.1"\n'

WRONG = [
    ('[bpf.filter]\nallow = "dney"', 2, "bpf.filter.allow", "there is no parameter 'dney'"),
    ('[bpf.filter]\ndeny = "size"', 2, "bpf.filter.deny", "'size' is of type int, not cidrs"),
    ('[bpf.filter]\nallow = "deny"\nports = "deny"', 3, "bpf.filter.ports", "of type cidrs, not ports"),
    ('[bpf.filter]\nports = ["tcp:443"]', 2, "bpf.filter.ports", "on 'allow', and there is none"),
    (PROGRAM + 'hook = "cgroup/connect4"', 4, "bpf.programs.0.hook", "no cgroup"),
    (PROGRAM + 'hook = "xdp"', 4, "bpf.programs.0.hook", "not one of egress, ingress, guest/egress"),
    (PROGRAM + 'hook = "egress"\nmaps = { m = "no" }', 5, "bpf.programs.0.maps.m", "there is no parameter 'no'"),
    (
        PROGRAM + 'hook = "egress"\nconstants.c = "${size}"',
        5,
        "bpf.programs.0.constants.c",
        "a lease may change 'size'",
    ),
    ('[cgroup]\nparent = "../x"', 2, "cgroup.parent", "no cgroup's path below the root"),
    ('[cgroup]\nparent = ""', 2, "cgroup.parent", "no cgroup's path below the root"),
    ('[cgroup]\nparent = "/a"', 2, "cgroup.parent", "no cgroup's path below the root"),
    ('[cgroup]\nparent = "a${slot}"', 2, "cgroup.parent", "no cgroup's path below the root"),
    ('[[cgroup.io]]\ndevice = "sda"', 2, "cgroup.io.0.device", "no block device"),
    ('[[cgroup.io]]\ndevice = "8:0"\nread_operations = 0', 3, "cgroup.io.0.read_operations", ">= 1"),
    ('[[routes.routes]]\nto = "@dney"', 2, "routes.routes.0.to", "there is no parameter 'dney'"),
    ('[[routes.routes]]\nto = "@pub"', 2, "routes.routes.0.to", "of type ports, not cidrs"),
    ('[[routes.routes]]\nto = "::/1"\ntable = 255', 3, "routes.routes.0.table", "local addresses"),
    ('[[routes.routes]]\nto = "::/1"\ntable = -1', 3, "routes.routes.0.table", ">= 1"),
    ('[[routes.routes]]\nto = "::/1"\nkind = "blackhole"\nvia = "::1"', 3, "routes.routes.0.kind", "leads nowhere"),
    ("[[routes.rules]]\npriority = 0", 2, "routes.rules.0.priority", ">= 1"),
    ("[[routes.rules]]\npriority = 1\nmark = -1", 3, "routes.rules.0.mark", ">= 0"),
    ('[[routes.rules]]\npriority = 1\ntable = 9\nports = "443"', 4, "routes.rules.0.ports", "only TCP and UDP"),
    (TUNNEL.replace("vpn0", "up0"), 2, "routes.tunnels.0.name", "another link of the slot's"),
    (TUNNEL.replace("vpn0", "inner0"), 2, "routes.tunnels.0.name", "another link of the slot's"),
    (TUNNEL.replace("vpn0", "a" * 16), 2, "routes.tunnels.0.name", "right form"),
    (TUNNEL + TUNNEL, 6, "routes.tunnels.1.name", "two tunnels are called vpn0"),
    (TUNNEL + "port = 70000", 5, "routes.tunnels.0.port", "<= 65535"),
    ('[rates.egress]\nburst = "1M"', 2, "rates.egress.burst", "a burst above bandwidth, and there is none"),
    ("[rates.ingress]\npacket_burst = 9", 2, "rates.ingress.packet_burst", "above packets, and there is none"),
    ("[rates]\nnew_connections_burst = 9", 2, "rates.new_connections_burst", "above new_connections"),
]


@pytest.mark.parametrize(
    ("text", "line", "key", "message"), WRONG, ids=[key + " " + m[:12] for _, _, key, m in WRONG]
)
def test_told_with_its_line(text: str, line: int, key: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(HEAD + text + "\n", HOST)
    error = caught.value
    assert (error.file, error.line, error.key) == (str(HOST), LINES + line, key)
    assert message in error.message
    assert "\n" not in error.message


def test_what_is_meant_passes() -> None:
    text = '[bpf.filter]\ndeny = "deny"\n[cgroup]\nparent = "a/b.slice"\n[[routes.routes]]\nto = "@deny"\n'
    spec = parse(HEAD + text + TUNNEL, HOST)
    assert lists_of_policies(spec.classes["default"]) == {"deny"}, "rules need no set for it"


def test_what_a_policy_refuses_gets_the_place_of_its_key() -> None:
    """Of a class that has the section itself, and of one that has the host's."""
    text = (
        HEAD.replace("slots = 4\n", "")
        + "[rates.egress]\nbandwidth = 1\n[class.a]\nslots = 1\n[class.b]\nslots = 1\n"
    )
    spec = parse(text + "[class.b.rates.egress]\nbandwidth = 2\n", HOST)
    error = SpecError("too little", key="rates.egress.bandwidth")
    assert str(spec.placed(error, "a")) == f"{HOST}:{LINES + 1}: rates.egress.bandwidth: too little"
    assert str(spec.placed(error, "b")) == f"{HOST}:{LINES + 7}: rates.egress.bandwidth: too little"
    assert spec.placed(error, "b").key == error.key
    elsewhere = SpecError("no rule", file="slot.nft", line=3)
    assert spec.placed(elsewhere, "a") is elsewhere
