"""The examples' rules do with packets what their README says, and both backends do the same.

The files are loaded by the real tools into a slot that stands alone: guest - slot - root - outside. Root has no
rules but one masquerade, so nothing but the slot's own rules can be what stops a packet; except in the last tests,
where root has its rules and the slot has none.
"""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import packets
from lab import Net, Wire, nets
from netslot.spec.load import load
from netslot.spec.model import HostSpec, Rules
from tools import put

EXAMPLES = Path(__file__).parents[2] / "examples"
SLOT = 17
OUTSIDE4, OUTSIDE6 = "198.51.100.1", "2001:db8:1::1"
FOREIGN = ("10.9.9.9", "172.20.0.1", "192.168.7.7", "100.64.1.1", "169.254.169.254", "9.9.9.9", "8.8.8.8")
FOREIGN6 = ("fd00:ec2::254", "2620:fe::fe", "2001:4860::8", "64:ff9b::a9fe:a9fe")


@dataclass
class Scene:
    """The four namespaces, the spec, and the slot's values."""

    spec: HostSpec
    values: dict[str, str]
    outside: Net
    root: Net
    slot: Net
    guest: Net

    def tcp(self, address: str, port: int = 80, *, source: Net | None = None) -> str:
        """What a TCP connect from the guest meets: open, refused, prohibited or silence."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with (source or self.guest).socket(family=family) as sock:
            # An ICMPv6 error that comes while connect() still holds the socket is heeded at the second SYN only.
            sock.settimeout(1.2 if ":" in address else 0.4)
            try:
                sock.connect((address, port))
            except TimeoutError:
                return "silence"
            except OSError as error:
                return "refused" if error.errno == errno.ECONNREFUSED else "prohibited"
            return "open"

    def udp(self, address: str, port: int, *, source: Net | None = None) -> str:
        """The same for a UDP datagram, which the outside answers."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with (
            self.outside.socket(socket.SOCK_DGRAM, family) as server,
            (source or self.guest).socket(socket.SOCK_DGRAM, family) as client,
        ):
            server.bind((address, port))
            server.settimeout(0.4)
            client.settimeout(0.4)
            try:
                client.connect((address, port))
                client.send(b"?")
                data, peer = server.recvfrom(100)
                server.sendto(data, peer)
                client.recv(100)
            except TimeoutError:
                pass
            except OSError:
                return "prohibited"
            else:
                return "open"
            try:
                client.recv(100)
            except TimeoutError:
                return "silence"
            except OSError as error:
                return "refused" if error.errno == errno.ECONNREFUSED else "prohibited"
            return "open"


def wire(values: dict[str, str], outside: Net, root: Net, slot: Net, guest: Net) -> None:
    """The topology of a slot; a veth plays the tap, since the guest here is a namespace."""
    v = values
    outside.ip(
        f"link add eth0 type veth peer name eth0 netns {root.name}",
        f"addr add {OUTSIDE4}/24 dev eth0",
        f"addr add {OUTSIDE6}/64 dev eth0 nodad",
        *(f"addr add {address}/32 dev lo" for address in FOREIGN),
        *(f"addr add {address}/128 dev lo nodad" for address in FOREIGN6),
        "link set eth0 up",
        "route add default via 198.51.100.254",
        "route add default via 2001:db8:1::fe",
    )
    root.ip(
        "addr add 198.51.100.254/24 dev eth0",
        "addr add 2001:db8:1::fe/64 dev eth0 nodad",
        "link set eth0 up",
        f"route add default via {OUTSIDE4}",
        f"route add default via {OUTSIDE6}",
        f"link add {v['root_if']} address {v['root_mac']} type veth"
        f" peer name {v['uplink_if']} address {v['uplink_mac']} netns {slot.name}",
        f"addr add {v['root_address']}/31 dev {v['root_if']}",
        f"addr add {v['root_address6']}/127 dev {v['root_if']} nodad",
        f"link set {v['root_if']} up",
    )
    slot.ip(
        f"link add {v['guest_if']} address {v['gateway_mac']} type veth"
        f" peer name eth0 address {v['guest_mac']} netns {guest.name}",
        f"addr add {v['address']}/31 dev {v['uplink_if']}",
        f"addr add {v['address6']}/127 dev {v['uplink_if']} nodad",
        f"addr add {v['gateway']}/{v['guest_prefix_length']} dev {v['guest_if']}",
        f"addr add {v['gateway6']}/{v['guest_prefix_length6']} dev {v['guest_if']} nodad",
        f"link set {v['uplink_if']} up",
        f"link set {v['guest_if']} up",
        f"route add default via {v['root_address']}",
        f"route add default via {v['root_address6']}",
    )
    guest.ip(
        f"addr add {v['guest_address']}/{v['guest_prefix_length']} dev eth0",
        f"addr add {v['guest_address6']}/{v['guest_prefix_length6']} dev eth0 nodad",
        "link set eth0 up",
        f"route add default via {v['gateway']}",
        f"route add default via {v['gateway6']}",
    )
    for net in (root, slot):
        net.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    root.sh(
        f"iptables-legacy -t nat -A POSTROUTING -s {v['pool']} -o eth0 -j MASQUERADE;"
        f"ip6tables-legacy -t nat -A POSTROUTING -s {v['pool6']} -o eth0 -j MASQUERADE"
    )
    for net, link in ((root, v["root_if"]), (slot, v["uplink_if"]), (slot, v["guest_if"]), (guest, "eth0")):
        net.wait_for_carrier(link)


def build(stack: ExitStack, spec: HostSpec) -> Scene:
    outside, root, slot, guest = stack.enter_context(nets("outside", "root", "slot", "guest"))
    values = spec.values(SLOT)
    wire(values, outside, root, slot, guest)
    listen(stack, outside, 53, 80, 25, 587)
    return Scene(spec, values, outside, root, slot, guest)


def listen(stack: ExitStack, net: Net, *ports: int) -> None:
    """The kernel takes up connections to a listening socket by itself."""
    for port in ports:
        server = stack.enter_context(net.socket(family=socket.AF_INET6))
        server.bind(("::", port))
        server.listen(64)


@pytest.fixture(scope="module", params=["netslot6.toml", "netslot6-nft.toml"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Scene]:
    spec = load(EXAMPLES / "sandbox" / request.param)
    rules = spec.classes["default"].rules
    assert rules is not None
    with ExitStack() as stack:
        scene = build(stack, spec)
        put(scene.slot, rules, scene.values)
        yield scene


CONNECTS = [
    (OUTSIDE4, 80, "open"),
    (OUTSIDE4, 25, "refused"),
    (OUTSIDE4, 587, "refused"),
    ("9.9.9.9", 53, "open"),
    ("8.8.8.8", 53, "refused"),
    ("8.8.8.8", 80, "open"),
    ("169.254.169.254", 80, "silence"),
    ("10.9.9.9", 80, "prohibited"),
    ("172.20.0.1", 80, "prohibited"),
    ("192.168.7.7", 80, "prohibited"),
    ("100.64.1.1", 80, "prohibited"),
    (OUTSIDE6, 80, "open"),
    (OUTSIDE6, 25, "refused"),
    ("2620:fe::fe", 53, "open"),
    ("2001:4860::8", 53, "refused"),
    ("fd00:ec2::254", 80, "prohibited"),
    ("64:ff9b::a9fe:a9fe", 80, "silence"),
]


@pytest.mark.parametrize(("address", "port", "meets"), CONNECTS)
def test_where_a_sandbox_may_connect(sandbox: Scene, address: str, port: int, meets: str) -> None:
    assert sandbox.tcp(address, port) == meets
    assert sandbox.tcp(address, port, source=sandbox.slot) == meets, "what runs in the slot is bound as the guest is"


@pytest.mark.parametrize(
    ("address", "port", "meets"),
    [
        (OUTSIDE4, 4000, "open"),
        ("9.9.9.9", 53, "open"),
        ("8.8.8.8", 53, "refused"),
        ("10.9.9.9", 4000, "prohibited"),
        ("2620:fe::fe", 53, "open"),
        (OUTSIDE6, 53, "refused"),
    ],
)
def test_where_a_sandbox_may_send_datagrams(sandbox: Scene, address: str, port: int, meets: str) -> None:
    assert sandbox.udp(address, port) == meets


def test_the_outside_sees_neither_guest_nor_slot(sandbox: Scene) -> None:
    with sandbox.outside.socket() as server:
        server.bind((OUTSIDE4, 8081))
        server.listen()
        server.settimeout(2)
        assert sandbox.tcp(OUTSIDE4, 8081) == "open"
        assert server.accept()[1][0] == "198.51.100.254"


@pytest.mark.parametrize("family", ["", "6"])
def test_root_reaches_the_guest_by_the_slots_address(sandbox: Scene, family: str) -> None:
    with ExitStack() as stack:
        listen(stack, sandbox.guest, 7777)
        assert sandbox.tcp(sandbox.values[f"address{family}"], 7777, source=sandbox.root) == "open"
    assert "1 received" in sandbox.root.sh(f"ping -c1 -W1 {sandbox.values[f'address{family}']}")


def test_the_slot_answers_ping_and_nothing_else(sandbox: Scene) -> None:
    with ExitStack() as stack:
        listen(stack, sandbox.slot, 7778)
        for gateway in (sandbox.values["gateway"], sandbox.values["gateway6"]):
            assert "1 received" in sandbox.guest.sh(f"ping -c1 -W1 {gateway}")
            assert sandbox.tcp(gateway, 7778) == "silence"


def arrives(scene: Scene, *, source: str = "", mac: str = "", destination: str = OUTSIDE4) -> bool:
    """Whether a datagram that the guest writes by hand reaches the outside."""
    six = ":" in destination
    v = scene.values
    source = source or v["guest_address6" if six else "guest_address"]
    payload = packets.udp(source, destination, 3333, 4444, b"hello")
    packet = packets.ipv6(source, destination, 17, payload) if six else packets.ipv4(source, destination, 17, payload)
    sender, watcher = Wire(scene.guest, "eth0"), Wire(scene.outside, "eth0")
    try:
        kind = 0x86DD if six else 0x0800
        sender.send(packets.ethernet(v["gateway_mac"], mac or v["guest_mac"], kind, packet))
        return watcher.received(lambda frame: frame.endswith(b"hello"), 0.4) is not None
    finally:
        sender.close()
        watcher.close()


@pytest.mark.parametrize("destination", [OUTSIDE4, OUTSIDE6])
def test_a_forged_source_stays_inside(sandbox: Scene, destination: str) -> None:
    assert arrives(sandbox, destination=destination)
    forged = ("2001:db8:9::9", "fd5c:a7e:10:12::1") if ":" in destination else ("203.0.113.9", "10.201.0.37")
    for source in forged:
        assert not arrives(sandbox, source=source, destination=destination)
    assert not arrives(sandbox, mac="06:00:ac:10:00:66", destination=destination)


def test_connections_at_once_are_limited(sandbox: Scene) -> None:
    sandbox.slot.sh("conntrack -F 2>/dev/null || true")
    v = sandbox.values
    sender, watcher = Wire(sandbox.guest, "eth0"), Wire(sandbox.outside, "eth0")
    try:
        count = 0
        for port in range(10000, 12200):
            payload = packets.udp(v["guest_address"], OUTSIDE4, port, 4445, b"flow")
            packet = packets.ipv4(v["guest_address"], OUTSIDE4, 17, payload)
            sender.send(packets.ethernet(v["gateway_mac"], v["guest_mac"], 0x0800, packet))
            if port % 50 == 0:  # before the watcher's buffer is full
                while watcher.received(lambda frame: frame.endswith(b"flow"), 0.02):
                    count += 1
        while watcher.received(lambda frame: frame.endswith(b"flow"), 0.1):
            count += 1
    finally:
        sender.close()
        watcher.close()
    assert count == 2048


def test_a_guest_is_no_router(sandbox: Scene) -> None:
    """A router advertisement must not change the slot's routes, and none may reach root."""
    v = sandbox.values
    sandbox.slot.sysctl(ipv6__conf__tap0__accept_ra=2)
    before = sandbox.slot.sh("ip -6 route")
    rest = bytes([64, 0, 7, 8]) + bytes(8)
    prefix = bytes([3, 4, 64, 0xC0]) + b"\xff" * 8 + bytes(4) + socket.inet_pton(socket.AF_INET6, "2001:db8:bad::")
    body = packets.icmp6("fe80::1", "ff02::1", 134, 0, rest[:4], rest[4:] + prefix)
    packet = packets.ipv6("fe80::1", "ff02::1", 58, body, hops=255)
    sender = Wire(sandbox.guest, "eth0")
    try:
        sender.send(packets.ethernet("33:33:00:00:00:01", v["guest_mac"], 0x86DD, packet))
    finally:
        sender.close()
    assert sandbox.tcp(OUTSIDE6) == "open"  # the advertisement has been dealt with by then
    assert sandbox.slot.sh("ip -6 route") == before


@pytest.fixture(scope="module", params=["netslot6.toml", "netslot6-nft.toml"])
def guarded(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A slot without rules (but NAT) behind a root with its rules."""
    spec = load(EXAMPLES / "sandbox" / request.param)
    rules = spec.root.rules
    with ExitStack() as stack:
        scene = build(stack, spec)
        v = scene.values
        scene.slot.sh(f"iptables-legacy -t nat -A POSTROUTING -s {v['guest_address']} -o up0 -j MASQUERADE")
        scene.slot.sh(f"ip6tables-legacy -t nat -A POSTROUTING -s {v['guest_address6']} -o up0 -j MASQUERADE")
        put(scene.root, rules, spec.root_values())
        yield scene


@pytest.mark.parametrize(
    ("address", "port", "meets"),
    [
        (OUTSIDE4, 80, "open"),
        (OUTSIDE4, 25, "refused"),
        ("8.8.8.8", 53, "open"),
        ("169.254.169.254", 80, "silence"),
        ("10.9.9.9", 80, "prohibited"),
        ("198.51.100.254", 22, "refused"),
        ("198.51.100.254", 4321, "silence"),
        (OUTSIDE6, 80, "open"),
        ("fd00:ec2::254", 80, "prohibited"),
    ],
)
def test_what_root_forbids_every_tenant(guarded: Scene, address: str, port: int, meets: str) -> None:
    assert guarded.tcp(address, port) == meets


@pytest.mark.parametrize(("name", "in_slot"), [("netslot.toml", 34), ("netslot-nft.toml", 32)])
def test_the_sandbox_holds_as_many_rules_as_its_page_says(name: str, in_slot: int) -> None:
    """nftables has a set where iptables has a rule for each resolver."""
    spec = load(EXAMPLES / "sandbox" / name)
    rules = spec.classes["default"].rules
    assert rules is not None
    counts = [counted(rules, spec.values(SLOT)), counted(spec.root.rules, spec.root_values())]
    assert counts == [in_slot, 144]
    assert counts[0] * spec.slots + counts[1] > 125_000


def counted(rules: Rules, values: dict[str, str]) -> int:
    """How many rules the kernel holds after loading."""
    with nets("count") as (net,):
        put(net, rules, values)
        saved = net.sh("iptables-legacy-save").count("\n-A ")
        listed = json.loads(net.sh("nft -j list ruleset"))["nftables"]
        return saved + sum("rule" in entry for entry in listed)
