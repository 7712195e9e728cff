"""The attack matrix: what a hostile tenant sends, what stops it, and that nothing else would have.

Each row is run twice: as netslot builds the slot, where it must fail, and without what is named as stopping it,
where it must succeed. docs/security/attacks.md explains the rows.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

import attack_lab
import packets as p
from attack_lab import Tenant
from netslot.host.plan import SlotPlan
from netslot.kernel import netns

MARK = b"\xa5" * 8
"""What the attacks carry: it stays whole in any fragment of 8 bytes that holds nothing else."""
OUTSIDE, OUTSIDE6 = "198.51.100.7", "2001:db8::7"
METADATA = "169.254.169.254"
EVIL = "0e:00:00:00:66:66"
GUESTS, ALL = ("tap", "veth"), ("tap", "veth", "process")
Act = Callable[["Scene"], None]
Check = Callable[["Scene"], bool]


@dataclass
class Scene:
    """Who attacks whom, with shorthands for what the rows are made of."""

    tenant: Tenant
    victim: SlotPlan
    patience: float = 1.0
    """Seconds to wait for what the attack is to achieve."""

    def own(self, six: bool) -> str:
        """The address that an honest workload would send from."""
        values, key = self.tenant.values, "guest_address" if self.tenant.plan.guest_if else "address"
        return values[key + "6" if six else key]

    def gateway(self, six: bool) -> str:
        return self.tenant.values["gateway6" if six else "gateway"]

    def udp(self, to: str, *, source: str = "", port: int = 9, sport: int = 5) -> bytes:
        source = source or self.own(":" in to)
        datagram = p.udp(source, to, sport, port, MARK)
        return p.ipv6(source, to, p.UDP, datagram) if ":" in to else p.ipv4(source, to, p.UDP, datagram)

    def tcp(self, to: str, port: int) -> bytes:
        source = self.own(":" in to)
        segment = p.tcp(source, to, 5, port, data=MARK * 4)
        return p.ipv6(source, to, p.TCP, segment) if ":" in to else p.ipv4(source, to, p.TCP, segment)

    def send(self, *packets: bytes, source_mac: str | None = None, to_mac: str | None = None) -> None:
        for packet in packets:
            self.tenant.sender.packet(packet, source_mac=source_mac, to_mac=to_mac)


def gets_out(act: Act, mark: bytes = MARK) -> Check:
    """Whether a frame with ``mark`` reaches root's end of the link."""

    def check(scene: Scene) -> bool:
        scene.tenant.watch.drain()
        act(scene)
        return scene.tenant.leaves(lambda frame: mark in frame, scene.patience)

    return check


def fragments(packet: bytes, size: int) -> list[bytes]:
    """An IPv4 or IPv6 packet cut into pieces of ``size`` bytes of payload."""
    six = packet[0] >> 4 == 6
    head, payload = (packet[:40], packet[40:]) if six else (packet[:20], packet[20:])
    source, to = p.parse(packet).source, p.parse(packet).destination
    protocol = head[6] if six else head[9]
    pieces = []
    for start in range(0, len(payload), size):
        part, more = payload[start : start + size], start + size < len(payload)
        if six:
            pieces.append(p.ipv6(source, to, p.FRAGMENT, p.fragment6(protocol, part, offset=start, more=more)))
        else:
            pieces.append(p.ipv4(source, to, protocol, part, fragment=start, more=more))
    return pieces


@dataclass(frozen=True)
class Row:
    """One attack. ``stops``: lines of the slot's rules (regular expressions), and shell commands that undo the
    slot's other defences; with all of them gone the attack must succeed. ``undo`` puts the latter back."""

    name: str
    where: tuple[str, ...]
    succeeds: Check
    rules: tuple[str, ...] = ()
    without: str = ""
    undo: str = ""

    def __str__(self) -> str:
        return self.name


# What stops a row, by where it is written; the process example has its own forms.
SPOOF, SPOOF6 = r"! -s (172\.16\.0\.2|10\.201\.0\.3) -j DROP", r"! -s (fd00:16::2|fd5c:\S+) -j DROP"
MAIL, LINK_LOCAL, PRIVATE = r"--dports 25,465,587", r"-d 169\.254\.0\.0/16", r"-d 10\.0\.0\.0/8"
MULTICAST, PRIVATE6, MULTICAST6 = r"-d 224\.0\.0\.0/3", r"-d fc00::/7", r"-d ff00::/8"
NO_ERRORS = r"! --icmp(v6)?-type echo-request -j DROP"
COUNT = r"--connlimit-above"
TO_DNS = r"-A egress -p (udp|tcp) -m (udp|tcp) --dport 53 -j REJECT"

BRIDGED = (
    "ip link add br9 type bridge && ip link set br9 addrgenmode none up && "
    "ip link set up0 master br9 && ip link set {guest_if} master br9 && "
    "for f in ip ip6; do sysctl -qw net.bridge.bridge-nf-call-${{f}}tables=0; done"
)
UNBRIDGED = "ip link del br9"


def from_source(to: str, source: str, scene: Scene) -> None:
    scene.send(scene.udp(to, source=source))


def from_neighbour(to: str, key: str, scene: Scene) -> None:
    scene.send(scene.udp(to, source=scene.victim.values[key]))


def from_mac(to: str, scene: Scene) -> None:
    scene.send(scene.udp(to), source_mac=EVIL)


def to_port(to: str, port: int, size: int, scene: Scene) -> None:
    """TCP, in fragments of ``size`` bytes unless that is 0."""
    packet = scene.tcp(to, port)
    scene.send(*(fragments(packet, size) if size else [packet]))


def to_udp(to: str, port: int, scene: Scene) -> None:
    scene.send(scene.udp(to, port=port))


def to_host(suffix: str, scene: Scene) -> None:
    scene.send(scene.tcp(scene.tenant.values[f"root_address{suffix}"], 22))


def to_neighbour(suffix: str, scene: Scene) -> None:
    scene.send(scene.tcp(scene.victim.values[f"address{suffix}"], 80))


def arp_claim(scene: Scene) -> bool:
    """The guest says that its address is at another MAC, so that the slot's answers go there."""
    values = scene.tenant.values
    claim = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + bytes.fromhex(EVIL.replace(":", ""))
    claim += p.pack(values["guest_address"]) + bytes(6) + p.pack(values["gateway"])
    scene.send(claim)
    return poisoned(scene, values["guest_address"])


def neighbour_claim(scene: Scene) -> bool:
    """The same with an unsolicited neighbour advertisement that overrides."""
    values = scene.tenant.values
    own, gateway = values["guest_address6"], values["gateway6"]
    option = b"\2\1" + bytes.fromhex(EVIL.replace(":", ""))
    message = p.icmp6(own, gateway, 136, 0, struct.pack(">I", 0x20000000), p.pack(own) + option)
    scene.send(p.ipv6(own, gateway, p.ICMPV6, message, hops=255))
    return poisoned(scene, own)


def poisoned(scene: Scene, address: str) -> bool:
    for _ in range(10):
        if EVIL in scene.tenant.sh(f"ip neigh show {address}"):
            return True
        time.sleep(0.02)
    return False


def router_advertisement(scene: Scene) -> bool:
    """The guest says that it is a router, so that the slot sends everything to it."""
    message = p.icmp6("fe80::66", "ff02::1", 134, 0, struct.pack(">BBH", 64, 0, 1800), bytes(8))
    scene.send(p.ipv6("fe80::66", "ff02::1", p.ICMPV6, message, hops=255), to_mac="33:33:00:00:00:01")
    for _ in range(10):
        if "proto ra" in scene.tenant.sh("ip -6 route show default"):
            return True
        time.sleep(0.02)
    return False


def redirect(scene: Scene) -> None:
    """An ICMP redirect to the host: the way to the metadata service is through me."""
    root, own = scene.tenant.values["root_address"], scene.own(False)
    quoted = p.ipv4(root, METADATA, p.UDP, p.udp(root, METADATA, 1, 2, MARK))
    scene.send(p.ipv4(own, root, p.ICMP, p.icmp(5, 1, p.pack(own), quoted)))


def redirect6(scene: Scene) -> None:
    root, own = scene.tenant.values["root_address6"], scene.own(True)
    quoted = p.ipv6(root, OUTSIDE6, p.UDP, p.udp(root, OUTSIDE6, 1, 2, MARK))
    option = struct.pack(">BBHI", 4, (8 + len(quoted)) // 8, 0, 0) + quoted
    message = p.icmp6(own, root, 137, 0, bytes(4), p.pack(own) + p.pack(OUTSIDE6) + option)
    scene.send(p.ipv6(own, root, p.ICMPV6, message, hops=255))


def source_route(scene: Scene) -> None:
    """Loose source routing: to the slot itself first, which is to pass it on to the metadata service."""
    own, gateway = scene.own(False), scene.gateway(False)
    option = struct.pack(">BBB", 131, 7, 4) + p.pack(METADATA)
    datagram = p.udp(own, METADATA, 5, 80, MARK, zero=True)
    scene.send(p.ipv4(own, gateway, p.UDP, datagram, options=option))


def options_before_mail(scene: Scene) -> None:
    segment = p.tcp(scene.own(False), OUTSIDE, 5, 25, data=MARK)
    scene.send(p.ipv4(scene.own(False), OUTSIDE, p.TCP, segment, options=b"\1" * 40))


def headers_before_mail(scene: Scene) -> None:
    """TCP behind five long destination options headers, 1,280 bytes of them."""
    segment = p.tcp(scene.own(True), OUTSIDE6, 5, 25, data=MARK)
    chain = b""
    for left in range(5, 0, -1):
        following = 60 if left > 1 else p.TCP
        chain += struct.pack(">BB", following, 15) + b"\1\x7c" + bytes(124)
    scene.send(p.ipv6(scene.own(True), OUTSIDE6, 60, chain + segment))


def dhcp_offer(scene: Scene) -> None:
    offer = p.udp("172.16.0.2", "255.255.255.255", 67, 68, b"\2\1\6\0" + bytes(232) + MARK)
    packet = p.ipv4("172.16.0.2", "255.255.255.255", p.UDP, offer)
    scene.send(packet, to_mac="ff:ff:ff:ff:ff:ff")


def multicast(scene: Scene) -> None:
    scene.send(scene.udp("239.1.2.3"), to_mac="01:00:5e:01:02:03")


def multicast6(scene: Scene) -> None:
    scene.send(scene.udp("ff0e::1234"), to_mac="33:33:00:00:12:34")


def too_many(outside: str, scene: Scene) -> bool:
    """Whether the tenant has more connections open at once than the rules' limit."""
    tenant = scene.tenant
    limit = 1024 if tenant.kind == "process" else 2048
    tenant.sh("conntrack -F 2>/dev/null")
    tenant.watch.drain()
    opened = 0
    for sport in range(10_000, 10_000 + limit + 200):
        scene.send(scene.udp(outside, sport=sport))
        while tenant.leaves(lambda frame: MARK in frame, 0.0001):
            opened += 1
    while tenant.leaves(lambda frame: MARK in frame, 0.1):
        opened += 1
    tenant.sh("conntrack -F 2>/dev/null")
    return opened > limit


def rows() -> list[Row]:
    found: list[Row] = []

    def add(name: str, where: tuple[str, ...], check: Check, *rules: str, without: str = "", undo: str = "") -> None:
        found.append(Row(name, where, check, rules, without, undo))

    # What it says it is.
    for six, spoof, outside in ((False, SPOOF, OUTSIDE), (True, SPOOF6, OUTSIDE6)):
        v, key = ("v6", "address6") if six else ("v4", "address")
        for source in ("2001:db8:66::1", "fd00:16::3") if six else ("192.0.2.66", "172.16.0.3"):
            add(f"{v} source {source}", ALL, gets_out(partial(from_source, outside, source)), spoof)
        add(f"{v} source of another tenant", ALL, gets_out(partial(from_neighbour, outside, key)), spoof)
        add(f"{v} source MAC of another", GUESTS, gets_out(partial(from_mac, outside)), r"--mac-source")
    # Where it may not go.
    # IPv6 fragments must hold the whole TCP header in the first, or the kernel drops them by itself (RFC 8200).
    for size in (0, 8, 16, 24):
        suffix = f" in fragments of {size} bytes" if size else ""
        add(f"v4 mail{suffix}", ALL, gets_out(partial(to_port, OUTSIDE, 25, size)), MAIL)
        if size in (0, 24):
            add(f"v6 mail{suffix}", ALL, gets_out(partial(to_port, OUTSIDE6, 25, size)), MAIL)
        add(f"v4 metadata service{suffix}", ALL, gets_out(partial(to_port, METADATA, 80, size)), LINK_LOCAL)
    add("v4 mail behind 40 bytes of options", ALL, gets_out(options_before_mail), MAIL)
    add("v6 mail behind long extension headers", ALL, gets_out(headers_before_mail), MAIL)
    for name, prefix, rule in (
        ("mapped", "::ffff:a9fe:a9fe", r"-d ::ffff:0:0/96"),
        ("by NAT64", "64:ff9b::a9fe:a9fe", r"-d 64:ff9b::/96"),
        ("by 6to4", "2002:a9fe:a9fe::1", r"-d 2002::/16"),
    ):
        add(f"v6 metadata service {name}", ALL, gets_out(partial(to_udp, prefix, 9)), rule)
    add(
        "v4 metadata service by source routing",
        GUESTS,
        gets_out(source_route),
        # The address that rules see in FORWARD is still the first hop, the slot's own.
        r"-d 172\.16\.0\.0/12",
        without="for d in all default up0 {guest_if}; do sysctl -qw net.ipv4.conf.$d.accept_source_route=1; done",
        undo="sysctl -qw net.ipv4.conf.all.accept_source_route=0",
    )
    add("v4 redirect to the host", GUESTS, gets_out(redirect), PRIVATE, r"--ctstate INVALID", NO_ERRORS)
    redirects = (PRIVATE6, r"icmpv6-type redirect", r"--ctstate INVALID", NO_ERRORS)
    add("v6 redirect to the host", GUESTS, gets_out(redirect6), *redirects)
    for suffix, rule in (("", PRIVATE), ("6", PRIVATE6)):
        v = f"v{suffix or 4}"
        add(f"{v} the host's own service", ALL, gets_out(partial(to_host, suffix)), rule)
        add(f"{v} another tenant", ALL, gets_out(partial(to_neighbour, suffix)), rule)
    add("v4 another resolver", ALL, gets_out(partial(to_udp, OUTSIDE, 53)), TO_DNS)
    add("v6 another resolver", ALL, gets_out(partial(to_udp, OUTSIDE6, 53)), TO_DNS)
    add("v4 multicast", ("process",), gets_out(multicast), MULTICAST)
    add("v6 multicast", ("process",), gets_out(multicast6), MULTICAST6)
    add("v4 broadcast", ("process",), gets_out(partial(to_udp, "255.255.255.255", 9)), MULTICAST)
    # How much it may take.
    for outside in (OUTSIDE, OUTSIDE6):
        v = "v6" if ":" in outside else "v4"
        add(f"{v} connections without end", ALL, partial(too_many, outside), COUNT)
    # What its link may not carry: the slot is a router, and a router passes on no frames.
    for name, act in (("v4 multicast", multicast), ("v6 multicast", multicast6), ("DHCP offer", dhcp_offer)):
        add(name, GUESTS, gets_out(act), without=BRIDGED, undo=UNBRIDGED)
    # What the slot must not believe.
    add(
        "ARP poisoning",
        GUESTS,
        arp_claim,
        without="ip neigh del {guest_address} dev {guest_if}",
        undo="ip neigh replace {guest_address} lladdr {guest_mac} dev {guest_if} nud permanent",
    )
    add(
        "neighbour advertisement poisoning",
        GUESTS,
        neighbour_claim,
        without="ip neigh replace {guest_address6} lladdr {guest_mac} dev {guest_if} nud stale",
        undo="ip neigh replace {guest_address6} lladdr {guest_mac} dev {guest_if} nud permanent",
    )
    add(
        "router advertisement",
        GUESTS,
        router_advertisement,
        r"router-advertisement",
        SPOOF6,
        r"^:INPUT",
        without="sysctl -qw net.ipv6.conf.{guest_if}.accept_ra=2; ip6tables-legacy -P INPUT ACCEPT",
        undo="sysctl -qw net.ipv6.conf.{guest_if}.accept_ra=0; ip -6 route flush proto ra",
    )
    return found


@pytest.fixture(scope="module", params=ALL)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with attack_lab.tenants(request.param, tmp_path_factory.mktemp(request.param)) as (tenant, victim):
        yield Scene(tenant, victim)


def by_kind(kind: str) -> list[Row]:
    return [row for row in rows() if kind in row.where]


def test_every_attack_is_stopped_by_what_is_said_to_stop_it(scene: Scene) -> None:
    kind, wrong = scene.tenant.kind, []
    for row in by_kind(kind):
        scene.patience = 0.1
        if row.succeeds(scene):
            wrong.append(f"{kind}: {row}: not stopped")
            continue
        if row.rules:
            scene.tenant.remove_rules(*row.rules)
        if row.without:
            scene.tenant.sh(row.without.format(**scene.tenant.values))
        scene.patience = 1.0
        if not row.succeeds(scene):
            wrong.append(f"{kind}: {row}: fails also without what is said to stop it")
        if row.undo:
            scene.tenant.sh(row.undo.format(**scene.tenant.values))
        scene.tenant.restore()
    assert not wrong, "\n".join(wrong)


def test_a_tenant_with_no_connection_left_leaves_its_neighbour_all(scene: Scene) -> None:
    """Both use up to the limit of connections; the neighbour's are its own to count."""
    assert not too_many(OUTSIDE, scene)
    fd = netns.open_named(scene.victim.netns)
    with _server(scene) as server, netns.run_in(fd, socket.socket) as client:
        client.settimeout(2)
        client.connect((OUTSIDE, 7000))
        server.accept()[0].close()
    os.close(fd)


def _server(scene: Scene) -> socket.socket:
    server = scene.tenant.root.socket()
    server.bind((OUTSIDE, 7000))
    server.listen()
    return server


FLUSH = "iptables-legacy -F 2>&1; ip6tables-legacy -F 2>&1; iptables-legacy-save -t filter | grep -c connlimit"
RAW = "exec python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)' 2>/dev/null"


@pytest.mark.parametrize("scene", ["process"], indirect=True)
@pytest.mark.parametrize(("capability", "command"), [("net_admin", FLUSH), ("net_raw", RAW)])
def test_a_process_cannot_change_its_rules_nor_pass_by_them(scene: Scene, capability: str, command: str) -> None:
    """What stops it is the capability that `netslot exec` takes away; with it, the same command succeeds."""

    def succeeds(drop: str) -> bool:
        where = ["nsenter", f"--net=/run/netns/{scene.tenant.plan.netns}"]
        limited = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}"] if drop else []
        done = subprocess.run([*where, *limited, "sh", "-c", command], capture_output=True, text=True, check=False)
        return done.stdout.strip() == "0" if capability == "net_admin" else done.returncode == 0

    assert not succeeds(f"-{capability}")
    assert succeeds("")
    scene.tenant.restore()


@pytest.mark.parametrize("scene", ["veth"], indirect=True)
def test_root_in_a_container_is_root_over_its_own_namespace_only(scene: Scene) -> None:
    """A container has a namespace of its own, behind the slot that holds the rules."""
    inner = f"--net=/run/netns/{scene.tenant.plan.inner_netns}"
    subprocess.run(["nsenter", inner, "sh", "-c", "iptables-legacy -F; ip6tables-legacy -F"], check=True)
    assert scene.tenant.inside(scene.tenant.die.read, scene.tenant.values, {}) == []
    scene.tenant.sh("iptables-legacy -F")
    assert scene.tenant.inside(scene.tenant.die.read, scene.tenant.values, {}) != []
    scene.tenant.restore()
