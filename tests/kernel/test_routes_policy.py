"""The routes policy in a slot, with packets that take the routes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import lab
from netslot.errors import SpecError
from netslot.policy import routes as policy
from netslot.spec.policies import Route, RouteRule, RoutesSection, Tunnel

Slot = tuple[lab.Net, lab.Net, lab.Net]
SECTION = RoutesSection(
    routes=(
        Route("192.0.2.0/24", kind="blackhole"),
        Route("2001:db8:bad::/48", kind="prohibit"),
        Route("@blocked", kind="unreachable", metric=7),
        Route("default", via="${root_address}", table=100, source="${address}", mtu=1400),
        Route("default6", via="${root_address6}", table=100),
        Route("203.0.113.0/24", via=("${root_address}", "10.201.0.0"), onlink=True),
    ),
    rules=(
        RouteRule(priority=100, table=100, source="${guest_address}/32"),
        RouteRule(priority=200, table=100, mark=7),
        RouteRule(priority=50, kind="prohibit", protocol="tcp", ports="7001", input="${guest_if}", family=4),
    ),
)


@pytest.fixture
def slot() -> Iterator[Slot]:
    with lab.slot() as found:
        yield found


def test_routes_and_rules_as_iproute2_sees_them(slot: Slot) -> None:
    _, middle, _ = slot
    die = policy.cast(SECTION, values=lab.VALUES, defaults={"blocked": ["198.18.0.0/15", "2001:db8:1::/48"]})
    middle.run(die.stamp, lab.VALUES)
    defaults = {"blocked": ["198.18.0.0/15", "2001:db8:1::/48"]}
    assert middle.run(die.read, lab.VALUES, defaults) == []
    table = middle.sh("ip route show table all; ip -6 route show table all; ip rule; ip -6 rule")
    for line in (
        "blackhole 192.0.2.0/24",
        "prohibit 2001:db8:bad::/48",
        "unreachable 198.18.0.0/15",
        "unreachable 2001:db8:1::/48",
        "default via 10.201.0.0 dev up0 table 100 proto 78 src 10.201.0.1 mtu 1400",
        "from 172.16.0.2 lookup 100",
        "from all fwmark 0x7 lookup 100",
        "from all iif in0 ipproto tcp dport 7001 prohibit",
    ):
        assert line in table, table
    assert table.count("nexthop via 10.201.0.0 dev up0") == 2


def test_a_list_of_destinations_is_rebound_and_reset(slot: Slot) -> None:
    root, middle, guest = slot
    die = policy.cast(SECTION, values=lab.VALUES, defaults={"blocked": []})
    middle.run(die.stamp, lab.VALUES)
    root.ip(f"route add {lab.GUEST4} via {lab.SLOT4}")
    server = lab.Echo(root, lab.OUTSIDE4)
    other = lab.Echo(root, lab.OUTSIDE4, 7001)
    assert lab.connects(guest, lab.OUTSIDE4)
    assert not lab.connects(guest, lab.OUTSIDE4, 7001), "a rule prohibits it"
    # The guest's packets use table 100, where the list is not: block by a rule's table for this test.
    section = RoutesSection(routes=(Route("@blocked", kind="blackhole", table=100),), rules=SECTION.rules)
    middle.run(policy.cast(RoutesSection(), values=lab.VALUES, defaults={}).reset, lab.VALUES)
    die = policy.cast(section, values=lab.VALUES, defaults={"blocked": []})
    middle.run(die.stamp, lab.VALUES)
    assert lab.connects(guest, lab.OUTSIDE4)
    blocked = {"blocked": [f"{lab.OUTSIDE4}/32", "192.0.2.1/32"]}
    middle.run(die.bind, lab.VALUES, blocked)
    assert not lab.connects(guest, lab.OUTSIDE4)
    assert middle.run(die.read, lab.VALUES, blocked) == []
    assert [str(d) for d in middle.run(die.read, lab.VALUES, {"blocked": ["192.0.2.1/32"]})] == [
        "routes: blackhole 198.51.100.7/32 table 100 should not be there"
    ]
    middle.sh("ip rule del priority 200; ip route del blackhole 192.0.2.1/32 table 100")
    assert sorted(map(str, middle.run(die.read, lab.VALUES, blocked))) == [
        "routes: IPv4 rule 200 is missing",
        "routes: blackhole 192.0.2.1/32 table 100 is missing",
    ]
    middle.run(die.reset, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {"blocked": []}) == []
    assert lab.connects(guest, lab.OUTSIDE4)
    server.close()
    other.close()


def sent(net: lab.Net, link: str) -> int:
    """Packets that a link has sent."""
    line = next(text for text in net.sh("cat /proc/net/dev").splitlines() if text.strip().startswith(f"{link}:"))
    return int(line.partition(":")[2].split()[9])


def test_a_tunnel_for_one_tenant_only(slot: Slot) -> None:
    """The guest's default goes through a VXLAN tunnel to root; the slot's own traffic does not."""
    root, middle, guest = slot
    section = RoutesSection(
        tunnels=(Tunnel("vpn0", local="${address}", remote="${root_address}", address="10.99.0.2/30"),),
        routes=(Route("default", via="10.99.0.1", device="vpn0", table=100),),
        rules=(RouteRule(priority=100, table=100, input="${guest_if}", family=4),),
    )
    die = policy.cast(section, values=lab.VALUES, defaults={})
    middle.run(die.stamp, lab.VALUES)
    root.ip(
        f"link add vpn0 type vxlan id 1 local {lab.ROOT4} remote {lab.SLOT4} dstport 4789",
        "addr add 10.99.0.1/30 dev vpn0",
        "link set vpn0 up",
        f"route add {lab.GUEST4} via 10.99.0.2",
    )
    server = lab.Echo(root, lab.OUTSIDE4)
    before = sent(middle, "vpn0")
    assert lab.connects(guest, lab.OUTSIDE4, timeout=3)
    passed = sent(middle, "vpn0")
    assert passed > before
    assert lab.connects(middle, lab.OUTSIDE4)
    assert sent(middle, "vpn0") <= passed + 1
    assert middle.run(die.read, lab.VALUES, {}) == []
    middle.ip("link del vpn0")
    assert "tunnel vpn0 is missing" in str(middle.run(die.read, lab.VALUES, {})[0])
    middle.run(die.reset, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {}) == []
    server.close()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (RoutesSection(routes=(Route("default", via="10.0.0.1"),)), "slot's own default route"),
        (RoutesSection(routes=(Route("10.0.0.1/8"),)), "has host bits set"),
        (RoutesSection(routes=(Route("10.0.0.0/8", device="eth9"),)), "no link 'eth9'"),
        (RoutesSection(routes=(Route("10.0.0.0/8", via="fe80::1"),)), "no gateway of 10.0.0.0/8's family"),
        (RoutesSection(rules=(RouteRule(priority=1),)), "names a table"),
        (RoutesSection(rules=(RouteRule(priority=1, table=9, source="::/0", destination="10.0.0.0/8"),)), "families"),
        (RoutesSection(rules=(RouteRule(priority=1, table=9, source="10.0.0.0/8", family=6),)), "family is 6"),
        (RoutesSection(rules=(RouteRule(priority=1, table=9, input="a" * 16),)), "too long"),
        (RoutesSection(rules=(RouteRule(priority=1, table=9, protocol="tcp", ports="https"),)), "no port or range"),
        (RoutesSection(rules=(RouteRule(priority=1, table=9, protocol="tcp", ports="70000"),)), "no port or range"),
        (RoutesSection(rules=(RouteRule(priority=1, table=9, protocol="tcp", ports="9-8"),)), "no port or range"),
        (RoutesSection(rules=(RouteRule(priority=1, table=9), RouteRule(priority=1, table=8))), "have priority 1"),
        (
            RoutesSection(routes=(Route("10.0.0.0/8", source="fd00::1"),)),
            "source fd00::1 is not of 10.0.0.0/8's family",
        ),
        (
            RoutesSection(routes=(Route("10.0.0.0/8"), Route("10.0.0.0/8", kind="prohibit"))),
            "two routes to 10.0.0.0/8",
        ),
        (RoutesSection(tunnels=(Tunnel("a", remote="10.0.0.1", id=1 << 24),)), "id 16777216 is beyond 16777215"),
        (RoutesSection(tunnels=(Tunnel("a", remote="10.0.0.1", mtu=10),)), "mtu 10 is below 68"),
    ],
)
def test_what_makes_no_sense_is_refused(section: RoutesSection, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        policy.cast(section, values=lab.VALUES, defaults={})
    assert str(caught.value.key).startswith("routes.")
