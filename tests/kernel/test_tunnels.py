"""Tunnels of every kind that this kernel has, with packets; ``tools/other_kernel`` has a kernel with all of them."""

from __future__ import annotations

import base64
import errno
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_network
from pathlib import Path

import msgspec
import pytest

import hostlab
import lab
import packets as p
from netslot.errors import HostError, SpecError
from netslot.host.host import Host
from netslot.kernel import netlink, wireguard
from netslot.kernel import rtnetlink as rt
from netslot.policy import nftables, tunnels
from netslot.policy import routes as policy
from netslot.policy.routes import RoutesDie
from netslot.spec.policies import Route, RouteRule, RoutesSection, Tunnel, WireguardPeer

Slot = tuple[lab.Net, lab.Net, lab.Net]
KEYS = {
    name: base64.b64encode(bytes([number]) + bytes(30) + b"\x40").decode()
    for number, name in ((8, "a"), (16, "b"), (24, "c"))
}
PUBLIC: dict[str, str] = {}
OVER = {
    "vxlan": (4, 6),
    "geneve": (4, 6),
    "gre": (4,),
    "gretap": (4,),
    "ipip": (4,),
    "sit": (4,),
    "ip6gre": (6,),
    "ip6gretap": (6,),
    "ip6tnl": (6,),
    "wireguard": (4, 6),
}
CARRIES = {"ipip": (4,), "sit": (6,)}
"""The others carry both."""
PAIRS = [(kind, over) for kind, versions in OVER.items() for over in versions]
ENDS = {4: ("${address}", "${root_address}"), 6: ("${address6}", "${root_address6}")}
INNER = {4: ("10.99.0.2/30", "10.99.0.1", "10.99.0.1/30"), 6: ("fd99::2/64", "fd99::1", "fd99::1/64")}
EVIL = "02:00:00:00:00:66"
OUTSIDE = {4: lab.OUTSIDE4, 6: lab.OUTSIDE6}
GUEST = {4: lab.GUEST4, 6: lab.GUEST6}


def public(name: str) -> str:
    """The public key, which the kernel works out."""
    if name not in PUBLIC:
        with lab.Net("key") as net:
            net.ip("link add wg0 type wireguard")
            config = wireguard.Config(wireguard.key(KEYS[name]), 0, ())
            PUBLIC[name] = net.run(_public, config)
    return PUBLIC[name]


def _public(config: wireguard.Config) -> str:
    with netlink.Socket() as sock:
        index = rt.link_index(sock, "wg0")
    wireguard.configure(index, config)
    with netlink.Socket(16) as sock:
        answers = sock.dump(wireguard._family(), bytes([0, 1, 0, 0]) + netlink.attr_u32(1, index), "read")
    return base64.b64encode(netlink.parse_attrs(answers[0].payload, 4)[4]).decode()


def tunnel(kind: str, over: int) -> Tunnel:
    inner = tuple(INNER[version][0] for version in CARRIES.get(kind, (4, 6)))
    if kind == "wireguard":
        remote = lab.ROOT4 if over == 4 else f"[{lab.ROOT6}]"
        peers = (WireguardPeer(public("b"), endpoint=f"{remote}:51820"),)
        return Tunnel("vpn0", kind="wireguard", address=inner, private_key=KEYS["a"], peers=peers)
    local, remote = ENDS[over]
    number = 77 if kind not in ("ipip", "sit", "ip6tnl") else None
    return Tunnel("vpn0", local=local, remote=remote, kind=kind, address=inner, id=number)  # type: ignore[arg-type]


def section(kind: str, over: int) -> RoutesSection:
    """The guest's default goes through the tunnel, the slot's own does not."""
    found = [
        Route("default" if version == 4 else "default6", via=INNER[version][1], device="vpn0", table=100)
        for version in CARRIES.get(kind, (4, 6))
    ]
    rule = RouteRule(priority=100, table=100, input="${guest_if}")
    return RoutesSection(tunnels=(tunnel(kind, over),), routes=tuple(found), rules=(rule,))


def cast(kind: str, over: int, **more: object) -> RoutesDie:
    """The policy, or a skip where the kernel has no such tunnels."""
    try:
        return policy.cast(section(kind, over), values=lab.VALUES | more, defaults={})  # type: ignore[arg-type]
    except (HostError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT CHECKED: {error}; tools/other_kernel has them")


def far_end(root: lab.Net, kind: str, over: int) -> None:
    """The other end, made by iproute2 (and by us where it takes wg)."""
    local, remote = (lab.ROOT4, lab.SLOT4) if over == 4 else (lab.ROOT6, lab.SLOT6)
    options = {
        "vxlan": f"id 77 local {local} remote {remote} dstport 4789",
        "geneve": f"id 77 remote {remote}",
        "wireguard": "",
        "ipip": f"local {local} remote {remote} ttl 64",
        "sit": f"local {local} remote {remote} ttl 64",
        "ip6tnl": f"local {local} remote {remote} mode any",
    }.get(kind, f"local {local} remote {remote} key 77")
    root.ip(f"link add vpn0 type {kind} {options}")
    if kind == "wireguard":
        root.run(_answering, wireguard.Config(wireguard.key(KEYS["b"]), 51820, (_slot_peer(),)))
    root.ip(*(f"addr add {INNER[v][2]} dev vpn0" + (" nodad" if v == 6 else "") for v in CARRIES.get(kind, (4, 6))))
    root.ip(
        "link set vpn0 up", *(f"route add {GUEST[v]} dev vpn0 {_via(kind, v)}" for v in CARRIES.get(kind, (4, 6)))
    )


def _via(kind: str, version: int) -> str:
    return f"via {INNER[version][0].partition('/')[0]}"


def _slot_peer() -> wireguard.Peer:
    everything = frozenset(ip_network(text) for text in ("0.0.0.0/0", "::/0"))
    return wireguard.Peer(wireguard.key(public("a")), allowed=everything)


def _answering(config: wireguard.Config) -> None:
    with netlink.Socket() as sock:
        wireguard.configure(rt.link_index(sock, "vpn0"), config)


def sent(net: lab.Net, link: str) -> int:
    """Packets that a link has sent."""
    line = next(text for text in net.sh("cat /proc/net/dev").splitlines() if text.strip().startswith(f"{link}:"))
    return int(line.partition(":")[2].split()[9])


@pytest.fixture
def slot() -> Iterator[Slot]:
    with lab.slot() as found:
        yield found


@pytest.mark.parametrize(("kind", "over"), PAIRS)
def test_the_guests_packets_go_through_and_the_slots_do_not(slot: Slot, kind: str, over: int) -> None:
    root, middle, guest = slot
    die = cast(kind, over)
    middle.run(die.stamp, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {}) == []
    far_end(root, kind, over)
    for version in CARRIES.get(kind, (4, 6)):
        server = lab.Echo(root, OUTSIDE[version])
        before = sent(middle, "vpn0")
        assert lab.connects(guest, OUTSIDE[version], timeout=5), "the guest gets there"
        through = sent(middle, "vpn0")
        assert through > before, "and by the tunnel"
        assert lab.connects(middle, OUTSIDE[version])
        assert sent(middle, "vpn0") <= through + 1, "the slot's own connection goes the other way"
        server.close()
    middle.run(die.reset, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {}) == []


CHANGES: dict[str, tuple[str, str]] = {
    "gone": ("link del vpn0", "tunnel vpn0 is missing"),
    "down": ("link set vpn0 down", "tunnel vpn0 is down"),
    "another address": ("addr add 10.77.0.1/24 dev vpn0", "tunnel vpn0 address 10.77.0.1/24 should not be there"),
    "no address": ("addr flush dev vpn0", "tunnel vpn0 address .* is missing"),
}


@pytest.mark.parametrize(("kind", "over"), PAIRS)
def test_what_somebody_changes_is_named_and_mended(slot: Slot, kind: str, over: int) -> None:
    _, middle, _ = slot
    die = cast(kind, over)
    middle.run(die.stamp, lab.VALUES)
    changes = dict(CHANGES)
    if kind in ("gre", "gretap", "ipip", "sit"):
        changes["another end"] = (f"link set vpn0 type {kind} remote 10.201.0.9", "tunnel vpn0 has other ends")
    for name, (command, words) in changes.items():
        middle.ip(command)
        found = "\n".join(map(str, middle.run(die.read, lab.VALUES, {})))
        assert re.search(words, found), f"{name}: {found}"
        middle.run(die.bind, lab.VALUES, {})
        assert middle.run(die.read, lab.VALUES, {}) == [], name


def test_keys_and_peers_are_read_back_and_bound(slot: Slot, tmp_path: Path) -> None:
    """A parameter may bring a key; a file may hold it; the words of a difference hold no secret."""
    _, middle, _ = slot
    cast("wireguard", 4)
    (tmp_path / "key1").write_text(KEYS["a"] + "\n")
    peer = WireguardPeer("${peer}", endpoint="192.0.2.1:51820", keepalive=25, allowed=("10.0.0.0/8", "fd00::/8"))
    made = Tunnel("vpn0", kind="wireguard", address="10.99.0.2/30", private_key_file="key${slot}", peers=(peer,))
    values = lab.VALUES | {"peer": public("b").rstrip("=")}
    die = policy.cast(RoutesSection(tunnels=(made,)), values=values, defaults={}, directory=tmp_path)
    middle.run(die.stamp, values)
    assert middle.run(die.read, values, {}) == []
    other = values | {"peer": public("c")}
    found = [str(each) for each in middle.run(die.read, other, {})]
    assert sorted(found) == sorted(
        [
            f"routes: tunnel vpn0 peer {public('c')} missing",
            f"routes: tunnel vpn0 peer {public('b')} not the slot's",
        ]
    )
    middle.run(die.bind, other, {})
    assert middle.run(die.read, other, {}) == []
    (tmp_path / "key1").write_text(KEYS["b"])
    assert [str(each) for each in middle.run(die.read, other, {})] == [
        "routes: tunnel vpn0 the private key is another one"
    ]


def test_two_uplinks_by_port_by_source_and_by_parameter(slot: Slot) -> None:
    """Two tunnels, each the default of a table; what goes where is the template's and a parameter's to say."""
    root, middle, guest = slot
    two = tuple(
        Tunnel(
            f"vpn{n}",
            local="${address}",
            remote="${root_address}",
            address=(f"10.9{n}.0.2/30", f"fd9{n}::2/64"),
            id=n,
        )
        for n in (1, 2)
    )
    section = RoutesSection(
        tunnels=two,
        routes=(
            *(Route("default", via=f"10.9{n}.0.1", device=f"vpn{n}", table=n) for n in (1, 2)),
            *(Route("default6", via=f"fd9{n}::1", device=f"vpn{n}", table=n) for n in (1, 2)),
            Route("@blocked", kind="prohibit", table=3),
        ),
        rules=(
            RouteRule(priority=10, table=3, input="${guest_if}"),
            RouteRule(priority=20, table=1, input="${guest_if}", protocol="tcp", ports="7001"),
            RouteRule(priority=30, table=2, source="${source}"),
            RouteRule(priority=40, table=2, source="${guest_address6}/128"),
            RouteRule(priority=50, kind="unreachable", input="${guest_if}", protocol="tcp", ports="7003-7004"),
        ),
    )
    values = lab.VALUES | {"source": "192.0.2.99/32"}
    die = policy.cast(section, values=values, defaults={"blocked": []})
    middle.run(die.stamp, values)
    for n in (1, 2):
        root.ip(
            f"link add vpn{n} type vxlan id {n} local {lab.ROOT4} remote {lab.SLOT4} dstport 4789",
            f"addr add 10.9{n}.0.1/30 dev vpn{n}",
            f"addr add fd9{n}::1/64 dev vpn{n} nodad",
            f"link set vpn{n} up",
        )
    root.ip(f"route add {lab.GUEST4} via {lab.SLOT4}", f"route add {lab.GUEST6} via {lab.SLOT6}")
    root.sysctl(ipv4__conf__all__rp_filter=0, ipv4__conf__vpn1__rp_filter=0, ipv4__conf__vpn2__rp_filter=0)
    ports = (7001, 7002, 7003)
    servers = {
        (version, port): lab.Echo(root, OUTSIDE[version], port) for version in (4, 6) for port in (7001, 7002, 7003)
    }

    def way(version: int, port: int) -> str:
        before = {link: sent(middle, link) for link in ("up0", "vpn1", "vpn2")}
        if not lab.connects(guest, OUTSIDE[version], port, timeout=2):
            return "refused"
        after = {link: sent(middle, link) - before[link] for link in before}
        return next((link for link in ("vpn1", "vpn2") if after[link] > 1), "up0")

    assert [way(4, port) for port in ports] == ["vpn1", "up0", "refused"]
    assert [way(6, port) for port in ports] == ["vpn1", "vpn2", "vpn2"]
    bound = values | {"source": f"{lab.GUEST4}/32"}
    middle.run(die.bind, bound, {"blocked": []})
    assert way(4, 7002) == "vpn2", "the parameter sends the guest the other way"
    middle.run(die.bind, bound, {"blocked": [f"{lab.OUTSIDE4}/32", f"{lab.OUTSIDE6}/128"]})
    assert [way(version, 7002) for version in (4, 6)] == ["refused", "refused"]
    assert middle.run(die.read, bound, {"blocked": [f"{lab.OUTSIDE4}/32", f"{lab.OUTSIDE6}/128"]}) == []
    middle.run(die.reset, values)
    assert [way(4, 7002), way(6, 7002)] == ["up0", "vpn2"]
    for server in servers.values():
        server.close()


@pytest.mark.parametrize("kind", ["blackhole", "prohibit", "unreachable"])
@pytest.mark.parametrize("version", [4, 6])
def test_what_a_guest_is_told_of_a_closed_way(slot: Slot, kind: str, version: int) -> None:
    """Silence, 'administratively prohibited' or 'unreachable': by a route of a list, and by a rule."""
    _, middle, guest = slot
    answers: dict[str, set[int | None]] = {
        "blackhole": {None},
        "prohibit": {errno.EHOSTUNREACH, errno.EACCES},
        "unreachable": {errno.EHOSTUNREACH, errno.ENETUNREACH},
    }
    expected = answers[kind]
    made = RoutesSection(routes=(Route("@closed", kind=kind),))  # type: ignore[arg-type]
    die = policy.cast(made, values=lab.VALUES, defaults={"closed": []})
    middle.run(die.stamp, lab.VALUES)
    middle.run(die.bind, lab.VALUES, {"closed": [f"{lab.OUTSIDE4}/32", f"{lab.OUTSIDE6}/128"]})
    assert _told(guest, OUTSIDE[version], 0.4 if None in expected else 5) in expected
    middle.run(die.bind, lab.VALUES, {"closed": []})
    whole = f"{OUTSIDE[version]}/{32 if version == 4 else 128}"
    by_rule = RouteRule(priority=5, kind=kind, destination=whole)  # type: ignore[arg-type]
    die = policy.cast(RoutesSection(rules=(by_rule,)), values=lab.VALUES, defaults={})
    middle.run(die.reset, lab.VALUES)
    assert _told(guest, OUTSIDE[version], 0.4 if None in expected else 5) in expected


def _told(guest: lab.Net, address: str, patience: float) -> int | None:
    """The error that a connection attempt meets within a while; None for silence."""
    with guest.socket(family=socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.settimeout(patience)  # the first answer may come while the socket is busy sending
        try:
            sock.connect((address, 7000))
        except TimeoutError:
            return None
        except OSError as error:
            return error.errno
    return 0


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Tunnel("t0", local="10.0.0.1", remote="fd00::1"), "both of one version"),
        (Tunnel("t0", local="fd00::1", remote="fd00::2", kind="gre"), "ends of a gre tunnel: IPv4"),
        (Tunnel("t0", local="10.0.0.1", remote="10.0.0.2", kind="ip6tnl"), "ends of a ip6tnl tunnel: IPv6"),
        (Tunnel("t0", local="10.0.0.1", kind="ipip"), "needs a remote end"),
        (Tunnel("t0", remote="10.0.0.1", kind="wireguard"), "ends of a wireguard tunnel: none"),
        (Tunnel("t0", kind="wireguard"), "needs a private_key or a private_key_file"),
        (Tunnel("t0", kind="wireguard", private_key="short"), "not a WireGuard key"),
        (Tunnel("t0", kind="wireguard", private_key_file="nowhere"), "cannot read the key in"),
    ],
)
def test_what_makes_no_tunnel_is_refused(made: Tunnel, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        policy.cast(RoutesSection(tunnels=(made,)), values=lab.VALUES, defaults={})


def test_a_kind_that_the_kernel_lacks_is_told_with_what_brings_it() -> None:
    lacking = next((kind for kind in ("gre", "ipip", "sit") if not _has(kind)), None)
    if lacking is None:
        pytest.skip("NOT CHECKED: this kernel has them all")
    made = Tunnel("t0", local="10.0.0.1", remote="10.0.0.2", kind=lacking)  # type: ignore[arg-type]
    with pytest.raises(HostError, match=f"no tunnels of kind {lacking}") as caught:
        policy.cast(RoutesSection(tunnels=(made,)), values=lab.VALUES, defaults={})
    assert "modprobe" in str(caught.value.hint)


def _has(kind: str) -> bool:
    with lab.Net("has") as net:
        return not net.sh(f"ip link add t9 type {kind} local 10.0.0.1 remote 10.0.0.2 2>&1", check=False)


HOST_SPEC = """\
prefix = "{prefix}"
uplink = "up0"
slots = 3
[addresses]
pool = "10.201.0.0/16"
{ipv6}
[attachment]
kind = "veth"
[rules]
backend = "nftables"
nft = "slot.nft"
[root]
backend = "nftables"
masquerade = false
[nat]
kind = "{nat}"
[parameters.far]
type = "address"
default = "192.0.2.2"
[[routes.tunnels]]
name = "vpn0"
kind = "{kind}"
local = "${{address}}"
remote = "${{far}}"
address = "10.99.0.2/30"
[[routes.routes]]
to = "default"
via = "10.99.0.1"
device = "vpn0"
table = 100
[[routes.rules]]
priority = 100
table = 100
family = 4
input = "${{guest_if}}"
[limits]
hold_down = "0s"
"""
HOST_RULES = """table ip slot {
    chain nat { type nat hook postrouting priority 100; oifname { "${uplink_if}", "vpn0" } masquerade; }
}
"""
HOST_RULES_BESIDE = """table ip slot {
    chain nat { type nat hook postrouting priority 100; oifname vpn0 masquerade; }
}
"""
"""Beside a NAT of netslot's own, which translates what leaves by the uplink."""
HOSTS = [("vxlan", "rules"), ("ipip", "rules"), ("gre", "rules")]
HOSTS += [(kind, nat) for nat in ("bpf", "nftables") for kind in ("vxlan", "gre")]


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[tuple[hostlab.PlayedHost, Host]]:
    kind, nat = request.param
    with hostlab.played() as where:
        ipv6 = "" if nat == "rules" else 'pool6 = "2001:db8:77::/48"'
        spec = HOST_SPEC.format(prefix=where.prefix, kind=kind, nat=nat, ipv6=ipv6)
        where.spec.write_text(spec, encoding="utf-8")
        Path(where.spec.parent, "slot.nft").write_text(HOST_RULES if nat == "rules" else HOST_RULES_BESIDE, "utf-8")
        with where.host() as made:
            try:
                made.up(where.spec)
            except HostError as error:
                pytest.skip(f"NOT CHECKED: {error}; tools/other_kernel has them")
            yield where, made


@pytest.mark.parametrize("host", HOSTS, indirect=True, ids=" beside ".join)
def test_a_host_whose_slots_have_tunnels(host: tuple[hostlab.PlayedHost, Host]) -> None:
    """Built, used from inside the container, verified, changed, repaired, sent elsewhere by a parameter, recycled."""
    where, made = host
    assert made.verify().drift == []
    lease = made.lease("tenant")
    assert lease is not None
    kind = made.engine.spec.classes["default"].routes.tunnels[0].kind  # type: ignore[union-attr]
    end = {"vxlan": "id 1 dstport 4789", "gre": "", "ipip": ""}[kind]
    where.outside.ip(
        f"link add vpn0 type {kind} local 192.0.2.2 remote {lease.fields['slot_address']} {end}",
        "addr add 10.99.0.1/30 dev vpn0",
        "link set vpn0 up",
    )
    where.outside.ip("route add 10.201.0.0/16 via 192.0.2.1")
    where.outside.sysctl(ipv4__conf__vpn0__rp_filter=0, ipv4__conf__all__rp_filter=0)
    server = lab.Echo(where.outside, hostlab.OUTSIDE)
    inner = ["nsenter", f"--net={lease.fields['workload_netns_path']}", "timeout", "3", "bash", "-c"]
    connect = [*inner, f": < /dev/tcp/{hostlab.OUTSIDE}/7000"]
    subprocess.run(connect, check=True)
    assert server.tcp.accept()[1][0] == "10.99.0.2", "by the tunnel"
    inside = partial(_inside, lease.netns)
    changes: list[tuple[str, str]] = [
        ("ip link set vpn0 down", "tunnel vpn0 is down"),
        ("ip route add 203.0.113.0/24 dev vpn0", "route table 254: 203.0.113.0/24"),
        ("ip link del vpn0", "tunnel vpn0 is missing"),
        ("sysctl -qw net.ipv4.conf.vpn0.forwarding=0", "tunnel vpn0 does not forward"),
    ]
    for command, words in changes:
        inside(command)
        assert words in "\n".join(map(str, made.verify(repair=True).drift))
        assert made.verify().drift == []
    subprocess.run(connect, check=True)
    made.update(lease.id, {"far": "192.0.2.77"})
    assert "192.0.2.77" in inside("ip -d link show vpn0")
    assert made.verify().drift == []
    assert subprocess.run(connect, check=False).returncode != 0, "nobody is at the other end now"
    made.release(owner="tenant")
    assert "192.0.2.2" in inside("ip -d link show vpn0")
    assert made.verify().drift == []
    server.close()


def _inside(netns: str, command: str) -> str:
    where = ["nsenter", f"--net=/run/netns/{netns}", "sh", "-c", command]
    return subprocess.run(where, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("over", [4, 6])
def test_nobody_inside_writes_what_comes_out_of_a_tunnel(slot: Slot, over: int) -> None:
    """VXLAN asks nobody who he is: from the workload, and from a process in the slot; without the table it works."""
    root, middle, guest = slot
    die = cast("vxlan", over)
    guard = nftables.cast(tunnels.nft_text(die.section.tunnels, inner=True), samples=[lab.VALUES])
    middle.run(die.stamp, lab.VALUES)
    far_end(root, "vxlan", over)
    inner = p.ipv4("10.99.0.1", "10.99.0.2", p.UDP, p.udp("10.99.0.1", "10.99.0.2", 1, 2, b"forged"))
    packet = struct.pack(">II", 0x08000000, 77 << 8) + p.ethernet("ff:ff:ff:ff:ff:ff", EVIL, p.ETH_P_IP, inner)
    family, target = (socket.AF_INET, lab.SLOT4) if over == 4 else (socket.AF_INET6, lab.SLOT6)

    wire = lab.Wire(middle, "vpn0")

    def comes_out(sender: lab.Net) -> bool:
        with sender.socket(socket.SOCK_DGRAM, family) as sock:
            sock.sendto(packet, (target, 4789))
        return wire.received(lambda frame: frame.endswith(b"forged"), 0.5) is not None

    assert comes_out(guest)
    assert comes_out(middle)
    middle.run(guard.stamp, lab.VALUES)
    assert not comes_out(guest)
    assert not comes_out(middle)
    assert comes_out(root), "the other end's still do"
    wire.close()


def test_what_tunnels_need_no_guard() -> None:
    assert tunnels.nft_text([Tunnel("a", kind="gre"), Tunnel("b", kind="wireguard")], inner=True) == ""
    text = tunnels.nft_text([Tunnel("a"), Tunnel("b", id=2), Tunnel("c", kind="geneve")], inner=False)
    assert text.count("udp dport 4789") == text.count("udp dport 6081") == 1
    assert "guest_if" not in text


def test_wireguard_beside_a_nat_needs_a_port() -> None:
    wireguard_tunnel = Tunnel("wg0", kind="wireguard", private_key=KEYS["a"])
    with pytest.raises(SpecError, match="WireGuard needs a port"):
        tunnels.arrivals([wireguard_tunnel])
    assert tunnels.arrivals([msgspec.structs.replace(wireguard_tunnel, port=51820)]) == ((17, 51820),)
    assert tunnels.arrivals([Tunnel("a"), Tunnel("b", id=2), Tunnel("c", kind="ip6tnl")]) == (
        (17, 4789),
        (4, 0),
        (41, 0),
    )
