"""What the pages of the container and process examples say, shown with packets; the container's parameters too."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

import packets
from kernel.test_examples import EXAMPLES, FOREIGN, OUTSIDE4, SLOT, Scene, arrives, build, listen
from lab import Net, Wire, nets
from netslot.policy import nftables
from netslot.policy.nftables import NftablesDie
from netslot.spec.load import load, parse
from netslot.spec.model import HostSpec
from netslot.spec.parameters import Bound
from tools import put

PUBLISHED, UNPUBLISHED, INNER = 8080, 8081, 80


class Container(Scene):
    """A container's slot whose rules are the die that netslot would stamp."""

    die: NftablesDie

    def bind(self, **given: object) -> None:
        """Bind parameters as acquiring the slot does."""
        bound = self.spec.classes["default"].bind(given)
        self.slot.run(self.die.bind, self.values, {name: tuple(value) for name, value in bound.items()})


def container_spec() -> HostSpec:
    """With a pool6, which the wiring of the scene wants; the rules are IPv4's."""
    path = EXAMPLES / "container" / "netslot.toml"
    return parse(path.read_text().replace("[attachment]", 'pool6 = "fd5c:a7e:10::/48"\n\n[attachment]'), path)


@pytest.fixture(scope="module")
def scene() -> Iterator[Container]:
    spec = container_spec()
    each = spec.classes["default"]
    assert each.rules is not None
    assert each.rules.nft is not None
    defaults: dict[str, Bound] = each.bind({})
    with ExitStack() as stack:
        made = build(stack, spec)
        container = Container(made.spec, made.values, made.outside, made.root, made.slot, made.guest)
        container.die = nftables.cast(
            each.rules.nft.text,
            samples=[spec.values(number) for number in (1, SLOT, 200)],
            lists=each.lists,
            defaults={name: tuple(value) for name, value in defaults.items()},
        )
        container.slot.run(container.die.stamp, container.values)
        listen(stack, container.guest, INNER, UNPUBLISHED)
        yield container


@pytest.fixture
def container(scene: Container) -> Iterator[Container]:
    """With nothing bound, before and after."""
    scene.slot.run(scene.die.reset, scene.values)
    yield scene
    scene.bind()


def test_the_container_example_is_stamped_and_not_loaded_by_the_tool(container: Container) -> None:
    assert container.die.fallback is None
    assert container.slot.run(container.die.read, container.values, {"allow": ("0.0.0.0/0",), "publish": ()}) == []


@pytest.mark.parametrize(
    ("address", "port", "meets"),
    [
        (OUTSIDE4, 80, "open"),
        ("8.8.8.8", 80, "open"),
        ("9.9.9.9", 53, "open"),
        ("169.254.169.254", 80, "silence"),
        ("10.9.9.9", 80, "prohibited"),
        ("172.20.0.1", 80, "prohibited"),
        ("192.168.7.7", 80, "prohibited"),
        ("100.64.1.1", 80, "prohibited"),
    ],
)
def test_where_a_container_may_connect(container: Container, address: str, port: int, meets: str) -> None:
    assert container.tcp(address, port) == meets


def test_an_allow_list_is_all_there_is_but_the_resolvers(container: Container) -> None:
    container.bind(allow=["198.51.100.0/24"])
    assert container.tcp(OUTSIDE4, 80) == "open"
    assert container.tcp("8.8.8.8", 80) == "prohibited"
    assert container.tcp("9.9.9.9", 53) == "open"
    container.bind()
    assert container.tcp("8.8.8.8", 80) == "open"


def test_what_is_published_and_nothing_else_can_be_reached(container: Container) -> None:
    address = container.values["address"]
    assert container.tcp(address, PUBLISHED, source=container.outside) == "silence"
    container.bind(publish=[f"tcp:{PUBLISHED}:{INNER}"])
    assert container.tcp(address, PUBLISHED, source=container.outside) == "open"
    assert container.tcp(address, UNPUBLISHED, source=container.outside) == "silence"
    assert container.tcp(address, INNER, source=container.outside) == "silence"
    container.slot.run(container.die.reset, container.values)
    assert container.tcp(address, PUBLISHED, source=container.outside) == "silence"


def test_a_container_cannot_pose_as_another(container: Container) -> None:
    assert arrives(container)
    assert not arrives(container, source="10.202.0.37")
    assert not arrives(container, mac="06:00:ac:10:00:66")


class Process:
    """A process's slot: outside - root - slot."""

    def __init__(self, spec: HostSpec, outside: Net, root: Net, slot: Net) -> None:
        self.values = spec.values(SLOT)
        self.outside, self.root, self.slot = outside, root, slot
        self._wire()

    def _wire(self) -> None:
        v = self.values
        self.outside.ip(
            f"link add eth0 type veth peer name eth0 netns {self.root.name}",
            f"addr add {OUTSIDE4}/24 dev eth0",
            *(f"addr add {address}/32 dev lo" for address in FOREIGN),
            "link set eth0 up",
            "route add default via 198.51.100.254",
        )
        self.root.ip(
            "addr add 198.51.100.254/24 dev eth0",
            "link set eth0 up",
            f"route add default via {OUTSIDE4}",
            f"link add {v['root_if']} type veth peer name {v['uplink_if']} netns {self.slot.name}",
            f"addr add {v['root_address']}/31 dev {v['root_if']}",
            f"link set {v['root_if']} up",
        )
        self.slot.ip(
            f"link set {v['uplink_if']} address {v['uplink_mac']}",
            f"addr add {v['address']}/31 dev {v['uplink_if']}",
            f"link set {v['uplink_if']} up",
            f"route add default via {v['root_address']}",
        )
        self.root.sysctl(ipv4__ip_forward=1)
        for net, link in ((self.root, "eth0"), (self.root, v["root_if"]), (self.slot, v["uplink_if"])):
            net.wait_for_carrier(link)

    def tcp(self, address: str, port: int, source: Net) -> str:
        with source.socket() as sock:
            sock.settimeout(0.4)
            try:
                sock.connect((address, port))
            except TimeoutError:
                return "silence"
            except ConnectionRefusedError:
                return "refused"
            except OSError:
                return "prohibited"
            return "open"


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    spec = load(EXAMPLES / "process" / "netslot.toml")
    rules = spec.classes["default"].rules
    assert rules is not None
    with ExitStack() as stack:
        made = Process(spec, *stack.enter_context(nets("outside", "root", "slot")))
        listen(stack, made.outside, 53, 80, 25)
        put(made.slot, rules, made.values)
        yield made


@pytest.mark.parametrize(
    ("address", "port", "meets"),
    [
        (OUTSIDE4, 80, "open"),
        (OUTSIDE4, 25, "refused"),
        ("9.9.9.9", 53, "open"),
        ("8.8.8.8", 80, "open"),
        ("8.8.8.8", 53, "refused"),
        ("169.254.169.254", 80, "silence"),
        ("10.9.9.9", 80, "prohibited"),
        ("172.20.0.1", 80, "prohibited"),
        ("192.168.7.7", 80, "prohibited"),
        ("100.64.1.1", 80, "prohibited"),
    ],
)
def test_where_a_process_may_connect(process: Process, address: str, port: int, meets: str) -> None:
    assert process.tcp(address, port, process.slot) == meets


def test_a_process_answers_ping_and_serves_nobody(process: Process) -> None:
    with ExitStack() as stack:
        listen(stack, process.slot, 7777)
        assert process.tcp(process.values["address"], 7777, process.outside) == "silence"
    assert "1 received" in process.outside.sh(f"ping -c1 -W1 {process.values['address']}")


@pytest.mark.parametrize(("source", "passes"), [("", True), ("10.203.0.37", False), ("203.0.113.9", False)])
def test_a_process_that_writes_its_own_headers_cannot_pose_as_another(
    process: Process, source: str, passes: bool
) -> None:
    source = source or process.values["address"]
    payload = packets.udp(source, OUTSIDE4, 3333, 4444, b"hello")
    packet = packets.ipv4(source, OUTSIDE4, 17, payload)
    watcher = Wire(process.outside, "eth0")
    raw = process.slot.run(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    try:
        with suppress(PermissionError):  # what a rule in OUTPUT drops, the sender is told
            raw.sendto(packet, (OUTSIDE4, 0))
        assert (watcher.received(lambda frame: frame.endswith(b"hello"), 0.4) is not None) == passes
    finally:
        raw.close()
        watcher.close()
