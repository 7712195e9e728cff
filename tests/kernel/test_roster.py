"""Slots of a roster: tenants that keep their addresses, gateways and links, while the list of them changes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moved_lab as lab
from dying import dies_at
from lab import Net
from moved_lab import Inside
from netslot.errors import NetslotError, RefusedError, SpecError, UsageError
from netslot.host.host import Host
from netslot.kernel import netns, tun

PREFIX = f"ro{os.getpid() % 10000}x"
SPEC = f"""prefix = "{PREFIX}"
uplink = "eth0"
roster = "roster.json"
[limits]
hold_down = "0s"
[root]
preset = false
backend = "iptables-legacy"
[class.vm.rules]
backend = "iptables-legacy"
ipv4 = "vm.rules"
[class.job.attachment]
kind = "process"
[class.job.rules]
backend = "iptables-legacy"
ipv4 = "job.rules"
"""
RULES = """*filter
:FORWARD DROP [0:0]
-A FORWARD -i ${guest_if} -s ${address} -p udp -m udp --dport 53 -j ACCEPT
-A FORWARD -o ${guest_if} -d ${address} -m conntrack --ctstate ESTABLISHED -j ACCEPT
COMMIT
"""
JOB = """*filter
:OUTPUT DROP [0:0]
-A OUTPUT -s ${address} -p udp -m udp --dport 53 -j ACCEPT
COMMIT
"""


def entry(number: int, kind: str = "job", **more: Any) -> dict[str, Any]:
    """Tenant ``t<number>`` as a roster has it."""
    addresses = [lab.mapped(f"10.64.0.{4 * number + 2}", family) for family in (4, 6)]
    gateways = [lab.mapped(f"10.64.0.{4 * number + 1}", family) for family in (4, 6)]
    fields = {"name": f"t{number}", "class": kind, "link": f"tap{number}"}
    return {**fields, "addresses": addresses, "gateways": gateways, **more}


class Played:
    """A host whose roster tests write."""

    def __init__(self, directory: Path, host: lab.Host, command: Host) -> None:
        self.directory, self.root, self.outside, self.host = directory, host.root, host.outside, command
        self.spec = directory / "netslot.toml"
        self.spec.write_text(SPEC)
        (directory / "vm.rules").write_text(RULES)
        (directory / "job.rules").write_text(JOB)

    def up(self, *entries: dict[str, Any]) -> None:
        (self.directory / "roster.json").write_text(json.dumps({"tenants": entries}))
        self.host.up(self.spec)

    def found(self) -> dict[str, tuple[int, str]]:
        """What root has: by link, the slot that it leads to and where its first address is routed."""
        links = json.loads(self.root.sh("ip -j link"))
        routes = json.loads(self.root.sh("ip -j route"))
        return {
            link["ifname"]: (
                int(link["ifalias"].split()[2]),
                ",".join(route["dst"] for route in routes if route["dev"] == link["ifname"]),
            )
            for link in links
            if "ifalias" in link
        }

    def groups(self) -> dict[int, int]:
        """The interface group of the links ``tap<number>``."""
        links = json.loads(self.root.sh("ip -j link"))
        found = {link["ifname"]: int(link["group"]) for link in links if link["ifname"].startswith("tap")}
        return {int(name.removeprefix("tap")): group for name, group in found.items()}

    def whole(self) -> None:
        """No drift, and nothing that no slot needs."""
        deadline = time.monotonic() + 3
        while (drift := self.host.verify().drift) and time.monotonic() < deadline:
            time.sleep(0.05)  # IPv6 adds routes of its own a moment after the address
        assert drift == []
        slots = {slot.number for slot in self.host.slots()}
        assert {number for number, _ in self.found().values()} == slots
        assert {name for name in netns.names() if name.startswith(PREFIX)} == {f"{PREFIX}{each}" for each in slots}

    def answers(self, tenant: str, address: str) -> str:
        """What a server at port 53 of ``address`` says to a process in the tenant's slot."""
        return ask(Inside(self.host.slot(self.host.number(tenant)).netns), address)


def ask(place: lab.Somewhere, address: str, port: int = 53) -> str:
    """What a server says there, asked a few times, as the kernel may be slow to notice that a link is up; or ''."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with place.run(socket.socket, family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.5)
            sock.connect((address, port))
            for _ in range(6):
                with contextlib.suppress(OSError):  # silence, or a rule in the slot's OUTPUT
                    sock.send(b"?")
                    return sock.recv(100).decode()
        return ""
    finally:
        if isinstance(place, Inside):
            place.close()


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    with lab.bare() as host, Host(tmp_path / "state", root_netns=host.root.name) as command:
        before = host.root.sh("ip -j link; ip route; ip -6 route")
        try:
            yield Played(tmp_path, host, command)
        finally:
            if command.exists:
                command.down(force=True)
        assert host.root.sh("ip -j link; ip route; ip -6 route") == before
        assert not [name for name in netns.names() if name.startswith(PREFIX)]


def test_a_tenant_speaks_under_its_own_address_and_reaches_its_gateway(played: Played) -> None:
    played.up(entry(1), entry(2))
    with lab._Servers(lab.Host(played.root, played.outside)):
        for address in ("203.0.113.9", "10.64.0.5"):
            assert played.answers("t1", address) == "10.64.0.6", address
        for address in ("203.0.113.9", "10.64.0.5"):
            assert played.answers("t1", lab.mapped(address, 6)) == lab.mapped("10.64.0.6", 6), address
        assert ask(Inside(f"{PREFIX}1"), "203.0.113.9", 123) == "", "denied by its rules"
    played.whole()


def test_tenants_whose_gateway_no_rule_names_get_slots_too(played: Played) -> None:
    played.up(entry(1, "vm", gateways=[]), entry(2, gateways=[]))
    played.whole()
    assert {slot.number for slot in played.host.slots()} == {1, 2}


def test_the_list_grows_shrinks_and_changes(played: Played) -> None:
    played.up(entry(1), entry(2), entry(3))
    assert played.found()["tap2"] == (2, "10.64.0.10")
    played.up(entry(5), entry(3), entry(1))  # t2 leaves, t5 comes, and the order means nothing
    assert played.found() == {"tap1": (1, "10.64.0.6"), "tap3": (3, "10.64.0.14"), "tap5": (4, "10.64.0.22")}
    played.whole()
    played.up(entry(5, link="tap1"), entry(3), entry(1, link="tap5"))  # two change links
    assert played.found() == {"tap5": (1, "10.64.0.6"), "tap3": (3, "10.64.0.14"), "tap1": (4, "10.64.0.22")}
    played.whole()
    played.up(entry(5), entry(3, addresses=["10.64.7.7", "2001:db8:3::7"]))
    assert played.found() == {"tap3": (3, "10.64.7.7"), "tap5": (4, "10.64.0.22")}
    played.whole()
    played.up()
    assert played.found() == {}


def test_what_is_right_is_not_touched_again(played: Played) -> None:
    played.up(entry(1), entry(2, "vm"))
    before = played.root.sh("ip -j link")
    played.up(entry(1), entry(2, "vm"), entry(3))
    after = json.loads(played.root.sh("ip -j link"))
    assert [link for link in after if link["ifname"] != "tap3"] == json.loads(before)


def test_an_owner_gets_its_own_slot_and_nobody_else_does(played: Played) -> None:
    played.up(entry(1), entry(2), entry(3, "vm"))
    lease = played.host.lease("t2")
    assert (lease.slot, lease.fields["tenant"], lease.fields["guest_address"]) == (2, "t2", "10.64.0.10")
    assert lease.fields["gateway"] == "10.64.0.9"
    assert played.host.lease("t2").id == lease.id
    with pytest.raises(UsageError, match="no slot for t9"):
        played.host.lease("t9")
    with pytest.raises(UsageError, match="no slot for t1 in class vm"):
        played.host.lease("t1", class_name="vm")
    vm = played.host.lease("t3", wait=1.0)
    assert vm.fields["tap"] == "tap0"
    assert vm.fields["guest_mac"] is None
    played.host.release(owner="t2")
    assert played.host.slot(2).state == "free"
    played.whole()


def test_whoever_leaves_while_at_work_keeps_the_slot_until_the_end(played: Played) -> None:
    played.up(entry(1), entry(2))
    lease = played.host.lease("t2")
    played.up(entry(1))
    assert played.found()["tap2"] == (2, "10.64.0.10")
    played.up(entry(1), entry(2), entry(3))  # back again: the same slot
    assert played.host.find(owner="t2") is not None
    assert played.found()["tap2"] == (2, "10.64.0.10")
    assert played.found()["tap3"][0] == 3
    played.up(entry(1), entry(2, link="tap9"), entry(3))
    assert "tap9" not in played.found(), "not while it is leased"
    played.host.release(lease=lease.id)
    assert played.found()["tap9"] == (2, "10.64.0.10")
    played.whole()
    played.host.lease("t2")
    played.up(entry(1), entry(3))
    played.host.release(owner="t2")
    assert "tap9" not in played.found()
    played.whole()


def test_rules_that_change_are_in_force_in_every_slot(played: Played) -> None:
    played.up(entry(1), entry(2))
    (played.directory / "job.rules").write_text(JOB.replace("--dport 53", "--dport 123"))
    played.up(entry(1), entry(2))
    played.whole()
    with lab._Servers(lab.Host(played.root, played.outside)):
        assert ask(Inside(f"{PREFIX}2"), "203.0.113.9", 123) == "10.64.0.10"
        assert ask(Inside(f"{PREFIX}2"), "203.0.113.9", 53) == ""


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        ("ip route del 10.64.0.10", "10.64.0.10/32 via 169.254.110.2"),
        ("ip route add 10.99.0.0/16 via 169.254.110.2 dev tap2 onlink", "10.99.0.0/16"),
        ("ip addr del 10.64.0.9/32 dev tap2", "address 10.64.0.9/32 missing"),
        ("ip -6 addr add 2001:db8:77::1/128 dev tap2", "2001:db8:77::1/128"),
        ("ip link set tap2 group 7", "group is 7"),
        ("ip link del tap2", "missing"),
        ("ip -n {prefix}2 route del default", "missing"),
        ("ip -n {prefix}2 addr add 10.64.0.9/32 dev up0", "10.64.0.9/32 not the slot's"),
        ("ip -n {prefix}3 route del 10.64.0.14", "10.64.0.14/32"),
        ("ip netns exec {prefix}3 sysctl -qw net.ipv4.conf.tap0.proxy_arp=0", "sysctl"),
        ("ip netns exec {prefix}2 iptables-legacy -A OUTPUT -j ACCEPT", "OUTPUT"),
    ],
)
def test_drift_is_told_and_repaired(played: Played, harm: str, word: str) -> None:
    played.up(entry(1), entry(2), entry(3, "vm"), entry(4, "vm"))
    played.root.sh(harm.format(prefix=PREFIX))
    said = [str(each) for each in played.host.verify().drift]
    assert any(word in each for each in said), said
    number = "3" if "{prefix}3" in harm else "2"
    assert all(each.startswith(f"slot {number}:") for each in said), said
    report = played.host.verify(repair=True)
    assert report.unrepaired == 0, report
    played.whole()


def test_links_of_one_class_may_have_a_group_each(played: Played) -> None:
    """As those have that root's rules tell apart by a number (docs/decisions/0111)."""
    groups = {number: 0x50000000 + number for number in range(1, 7)}
    played.up(*(entry(number, "vm" if number > 3 else "job", group=group) for number, group in groups.items()))
    assert played.groups() == groups
    played.whole()
    played.root.sh(f"ip link set tap2 group {groups[3]}; ip link set tap6 group {groups[5]}")
    said = [str(each) for each in played.host.verify().drift]
    assert len(said) == 2
    assert all("group is " in each for each in said)
    assert played.host.verify(repair=True).unrepaired == 0
    assert played.groups() == groups
    played.up(*(entry(number, "vm" if number > 3 else "job", group=groups[7 - number]) for number in groups))
    assert played.groups() == {number: groups[7 - number] for number in groups}
    played.whole()


def test_a_link_that_is_somebody_elses_is_left_alone(played: Played) -> None:
    played.root.ip("link add tap2 type veth peer name far2")
    with pytest.raises(NetslotError, match="root has a link tap2 already"):
        played.up(entry(1), entry(2))
    assert "tap2" in played.root.sh("ip link")
    played.root.ip("link del tap2")
    played.up(entry(1), entry(2))
    played.whole()


def test_a_workload_behind_a_tap_finds_all_that_it_had_before(played: Played) -> None:
    """A network of its own of each family, a gateway of root's, another that is link-local, an unknown MAC."""
    one, two = (
        entry(
            number,
            "vm",
            addresses=[f"10.64.{number}.8/29", f"2001:db8:{number}::/64"],
            gateways=[f"10.64.{number}.1", f"2001:db8:9::{number}", "fe80::9"],
        )
        for number in (1, 2)
    )
    (played.directory / "vm.rules").write_text(RULES.replace("FORWARD DROP", "FORWARD ACCEPT"))
    played.up(one, two)
    played.outside.ip(f"route add 2001:db8:1::/64 via {lab.mapped(lab.UPLINK, 6)}")
    fields = played.host.lease("t1").fields
    slot = Inside(fields["netns"])
    with Net("guest") as guest, contextlib.closing(slot):
        guest.run(tun.create_tap, "eth0", vnet_hdr=True)
        ends = slot.run(tun.open_tap, "tap0", vnet_hdr=True), guest.run(tun.open_tap, "eth0", vnet_hdr=True)
        guest.ip(
            "link set eth0 up",
            "addr add 10.64.1.11/24 dev eth0",
            "addr add 2001:db8:1::77/64 dev eth0 nodad",
            "route add default via 10.64.1.1",
            "route add 2001:db8:9::1 dev eth0",
            "route add default via fe80::9 dev eth0",
        )
        with lab._carried([ends]), lab._Servers(lab.Host(played.root, played.outside)):
            guest.wait_for_carrier("eth0")
            for address, known in (
                ("203.0.113.9", "10.64.1.11"),
                ("10.64.1.1", "10.64.1.11"),
                (lab.mapped("203.0.113.9", 6), "2001:db8:1::77"),
                ("2001:db8:9::1", "2001:db8:1::77"),
            ):
                assert ask(guest, address) == known, address
    played.whole()


def test_netslots_own_root_knows_links_with_the_prefix(tmp_path: Path) -> None:
    """Without a word about links they are called as numbered slots' are, and netslot's preset is right for them."""
    with lab.bare() as stage, Host(tmp_path / "state", root_netns=stage.root.name) as host:
        played = Played(tmp_path, stage, host)
        text = SPEC.replace("preset = false\n", "")
        played.spec.write_text(text)
        with pytest.raises(SpecError, match="know slots' links by their prefix"):
            played.up(entry(1))
        people = [{key: value for key, value in entry(number).items() if key != "link"} for number in (1, 2)]
        try:
            played.up(*people)
            played.whole()
            with lab._Servers(lab.Host(stage.root, stage.outside)):
                assert played.answers("t1", "203.0.113.9") == "10.64.0.6"
                assert played.answers("t1", "10.64.0.10") == "", "from slot to slot"
        finally:
            host.down(force=True)


def test_up_killed_anywhere_is_finished_by_the_next_up(played: Played) -> None:
    played.up(entry(1))
    played.host.close()
    step = 1

    def grow() -> None:
        with Host(played.directory / "state", root_netns=played.root.name) as host:
            host.up(played.spec)

    people = [entry(2, link="tap1"), entry(1, link="tap2")]
    (played.directory / "roster.json").write_text(json.dumps({"tenants": people}))
    while dies_at(step, grow):
        played.up(*people)
        assert played.found() == {"tap2": (1, "10.64.0.6"), "tap1": (2, "10.64.0.10")}, step
        played.whole()
        played.up(entry(1))
        played.host.close()
        (played.directory / "roster.json").write_text(json.dumps({"tenants": people}))
        step += 5
    assert step > 60, "the steps are not counted"


def test_root_rules_that_differ_stop_up_and_are_never_touched(played: Played) -> None:
    (played.directory / "root.rules").write_text(
        "*filter\n:INPUT ACCEPT\n-A INPUT -p tcp --dport 9 -j DROP\nCOMMIT\n"
    )
    played.spec.write_text(SPEC.replace("preset = false\n", 'preset = false\nipv4 = "root.rules"\n'))
    with pytest.raises(RefusedError, match="root iptables filter: missing: -A INPUT -p tcp -m tcp --dport 9 -j DROP"):
        played.up(entry(1))
    assert not played.host.exists
    lab.load(played.root, "iptables", (played.directory / "root.rules").read_text())
    played.up(entry(1))
    played.root.sh("iptables-legacy -A INPUT -p tcp --dport 10 -j DROP")
    report = played.host.verify(repair=True)
    assert [str(each) for each in report.drift] == [
        "root iptables filter: not in the spec's file: -A INPUT -p tcp -m tcp --dport 10 -j DROP"
    ]
    assert report.unrepaired == 1
    with pytest.raises(RefusedError, match="root holds other rules"):
        played.up(entry(1), entry(2))
    assert [slot.tenant for slot in played.host.slots()] == ["t1"], "nothing was changed"
    played.host.down()
    assert "--dport 9" in played.root.sh("iptables-legacy-save")
