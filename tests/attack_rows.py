"""The rows of the attack matrix: who may try what from where, how one would know that it worked, and what stops it.

``docs/security/attacks.md`` holds them as a table, which ``tests/attack_table.py`` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import attack_acts as a
import attack_stops as s
from attack_acts import EVIL, METADATA, METADATA6, Act
from attack_lab import HOST, HOST6, INTERNAL, INTERNAL6, OUTSIDE, OUTSIDE6, Kind, Scene
from attack_stops import Stop

GUESTS, PROCESS, ALL = ("tap", "veth"), ("process",), ("tap", "veth", "process")
FRAMES = "a process writes packets; frames only with a packet socket, for which it lacks the capability"
FILLED = "the kernel fills in its own"
ITS_KERNEL = "its sockets are its own kernel's or namespace's affair"
ITS_OWN = "it is its own loopback"
INSIDE = "it is in the slot itself"
# What the kernel minds.
NOWHERE = "what has no source is not forwarded"
UNHAD = "an IPv4 socket sends only from addresses that its namespace has"
LOOP = "nobody outside may ask for ::1"
BROADCAST = "what came to everybody is not forwarded"
NO_DEVICE = "root has no device for that VLAN or protocol"
Check = Callable[[Scene], bool]
SERVICE = "metadata service"
STRANGER = "192.0.2.66"
CROWD = 300
FORGET = (("other", "ip neigh flush dev {other_link}"),)
LEAVE = (("other", "ip -6 route flush proto ra"),)


@dataclass(frozen=True)
class Row:
    """One attack. It has worked when its mark is seen at ``seen`` (a key of ``Scene.seen``), or ``achieved``."""

    title: str
    family: str
    act: Act
    stops: tuple[Stop, ...]
    kinds: tuple[str, ...] = ALL
    seen: str = "outside"
    achieved: Check | None = None
    twin: Act | None = None
    """What no rule stops, but the kernel itself, has nothing that could be taken away: then this act, which is the
    same but for what the kernel minds, must work where the attack does not."""
    kernel: str = ""
    """What the kernel minds."""
    tidy: tuple[tuple[str, str], ...] = ()
    """Commands, by namespace, that take away what the attack left when it worked."""
    tracked: bool = False
    """Whether it is about connection tracking, which slots with ``nat.kind = "nftables"`` do not use."""
    why_not: str = ""
    """Why the attachments that are not in ``kinds`` cannot be attacked so."""

    def __str__(self) -> str:
        return f"{self.family} {self.title}"

    def concerns(self, kind: Kind) -> bool:
        return kind.attachment in self.kinds and not (self.tracked and kind.nat == "nftables")

    def stops_of(self, kind: Kind) -> tuple[Stop, ...]:
        return tuple(stop for stop in self.stops if stop.only(kind))


def sections() -> dict[str, list[Row]]:
    """All rows, under the headings of the table."""
    return {
        "Who it says it is": list(_identity()),
        "Where it may not go": list(_destinations()),
        "The metadata service by other ways": list(_disguises()),
        "Fragments": list(_fragments()),
        "Headers that hide what follows": list(_headers()),
        "The host's own stack, and the slot's": list(_host()),
        "Broadcast and multicast": list(_multicast()),
        "Frames that are not plain IP": list(_frames()),
        "What the other end must not believe": list(_beliefs()),
        "What it may have too much of": list(_resources()),
    }


def rows() -> list[Row]:
    return [row for each in sections().values() for row in each]


def _family(six: bool) -> str:
    return "IPv6" if six else "IPv4"


def _identity() -> Iterator[Row]:
    """What it says it is."""
    for six, spoof in ((False, s.SPOOF4), (True, s.SPOOF6)):
        key = "address6" if six else "address"
        sources = {
            "a stranger's": "2001:db8:66::1" if six else "192.0.2.66",
            "a neighbour's on its own link": "fd00:16::3" if six else "172.16.0.3",
            "another tenant's": f"its.{key}",
            "the metadata service's": METADATA6 if six else METADATA,
            "the resolver's": "2001:db8::53" if six else "198.51.100.53",
        }
        if six:
            sources["an IPv4 address in IPv6's clothes"] = "::ffff:192.0.2.66"
        for whose, source in sources.items():
            stops = (spoof, s.REVERSE, s.NAT_SOURCE, s.NAT_PROGRAM) + (() if six else (s.SLOT_FILTER, s.ROOT_FILTER))
            yield Row(f"source address: {whose}", _family(six), a.udp(a.outside(six), source=source), stops)
        none = a.udp(a.outside(six), source="::" if six else "0.0.0.0")
        honest = a.udp(a.outside(six))
        yield Row("source address: none", _family(six), none, (), GUESTS, twin=honest, kernel=NOWHERE, why_not=FILLED)
        stops = (spoof, s.REVERSE) if six else ()
        own = None if six else a.bound(six, own=True)
        title = "source address: bound to a socket (IP_FREEBIND)"
        yield Row(title, _family(six), a.bound(six), stops, PROCESS, twin=own, kernel=UNHAD, why_not=ITS_KERNEL)
        act = a.udp(a.outside(six), source_mac=EVIL)
        yield Row("source MAC of another", _family(six), act, (s.MAC,), GUESTS, why_not=FRAMES)


def _destinations() -> Iterator[Row]:
    """Where it may not go."""
    for six in (False, True):
        v, own = _family(six), "6" if six else ""
        metadata, where = (METADATA6, s.PRIVATE6) if six else (METADATA, s.LINK_LOCAL)
        private = s.PRIVATE6 if six else s.TEN
        yield Row("mail", v, a.tcp(a.outside(six), 25), (s.MAIL,))
        yield Row("metadata service", v, a.tcp(metadata, 80), (where,))
        yield Row("metadata service, UDP", v, a.udp(metadata, 80), (where,))
        yield Row("another resolver", v, a.udp(a.outside(six), 53), (s.RESOLVERS,))
        yield Row("another resolver, TCP", v, a.tcp(a.outside(six), 53), (s.RESOLVERS,))
        yield Row("another tenant", v, a.tcp(f"its.address{own}", 80), (private, s.ROOT_FORWARD), seen="neighbour")
        stops = (private, s.ROOT_INPUT)
        yield Row("root's end of another tenant's link", v, a.tcp(f"its.root_address{own}", 80), stops, seen="root")


def _disguises() -> Iterator[Row]:
    """The metadata service by other ways."""
    for name, address in (
        ("IPv4 mapped", "::ffff:a9fe:a9fe"),
        ("IPv4 compatible", "::a9fe:a9fe"),
        ("NAT64", "64:ff9b::a9fe:a9fe"),
        ("local NAT64", "64:ff9b:1::a9fe:a9fe"),
        ("6to4", "2002:a9fe:a9fe::1"),
        ("Teredo", "2001:0:a9fe:a9fe::1"),
    ):
        yield Row(f"{SERVICE} as {name}", "IPv6", a.udp(address, 80), (s.DRESSED,))
    loose, strict = 131, 137
    over_slot: tuple[Stop, ...] = (s.SLOT_SOURCE_ROUTE, s.SEVENTEEN, s.ROOT_SOURCE_ROUTE)
    act = a.source_route(loose, "gateway", METADATA)
    yield Row(f"{SERVICE} by loose source routing over the slot", "IPv4", act, over_slot, GUESTS, why_not=INSIDE)
    act = a.source_route(strict, "gateway", "root_address")
    stops = (*over_slot, s.ROOT_INPUT)
    yield Row("the host by strict source routing over the slot", "IPv4", act, stops, GUESTS, "root", why_not=INSIDE)
    act = a.source_route(loose, "root_address", METADATA)
    stops = (s.SLOT_SOURCE_ROUTE, s.TEN, s.ROOT_SOURCE_ROUTE)
    yield Row(f"{SERVICE} by loose source routing over root", "IPv4", act, stops)
    act = a.routing_header(a.SEGMENTS, "gateway", METADATA6)
    stops = (s.SEGMENTS, s.INPUT, s.ROUTING, s.PRIVATE6, s.REVERSE, s.NAT_PROGRAM)
    yield Row(f"{SERVICE} by segment routing over the slot", "IPv6", act, stops, GUESTS, why_not=INSIDE)
    act = a.routing_header(a.SEGMENTS, "root_address6", METADATA6)
    stops = (s.ROUTING, s.PRIVATE6, s.ROOT_SEGMENTS, s.ROOT_INPUT, *s.PROGRAM)
    yield Row(f"{SERVICE} by segment routing over root", "IPv6", act, stops)


def _fragments() -> Iterator[Row]:
    for six in (False, True):
        v = _family(six)
        for size in (24, 40) if six else (8, 16, 24):
            short = s.STATELESS if size < 20 else ()
            yield Row(f"mail in fragments of {size} bytes", v, a.tcp(a.outside(six), 25, size), (s.MAIL, *short))
            metadata, where = (METADATA6, s.PRIVATE6) if six else (METADATA, s.LINK_LOCAL)
            yield Row(f"metadata service in fragments of {size} bytes", v, a.tcp(metadata, 80, size), (where, *short))
        yield Row("overlapping fragments", v, a.overlapping(six), (s.TRACKING,))
        yield Row("fragments of datagrams without end", v, a.unfinished(six), (s.TRACKING,))
    yield Row("tiny first fragment", "IPv6", a.tiny(True), (s.TRACKING, s.NAT_PROGRAM))
    yield Row("first fragment without the port", "IPv6", a.hidden_port, (s.TRACKING, s.NAT_PROGRAM))


def _headers() -> Iterator[Row]:
    """Headers that hide what follows."""
    yield Row("mail behind 40 bytes of options", "IPv4", a.options4(OUTSIDE, 25, b"\1" * 40), (s.MAIL,))
    chains = {
        "mail behind 1,280 bytes of options headers": ([(60, b"\1\x7c" + bytes(124))] * 10, s.PROGRAM),
        "mail behind 7 options headers": ([(60, a.PADDING)] * 7, s.PROGRAM),
        "mail behind 60 options headers": ([(60, a.PADDING)] * 60, s.PROGRAM),
        "mail behind 255 destination options": ([(60, a.MANY_OPTIONS)], ()),
        "mail behind a hop-by-hop header": ([(0, a.PADDING)], ()),
        "mail behind an authentication header": ([(a.AUTHENTICATION, bytes(14))], (s.AUTHENTICATION, *s.PROGRAM)),
    }
    for title, (headers, more) in chains.items():
        yield Row(title, "IPv6", a.chain6(25, headers), (s.MAIL, *more))
    flood = a.chain6(443, [(0, a.MANY_OPTIONS)])
    yield Row("255 hop-by-hop options", "IPv6", flood, (s.OPTIONS, s.ROOT_OPTIONS))
    for name, kind in a.ROUTING_TYPES.items():
        act = a.routing_header(kind, OUTSIDE6, "2001:db8::66")
        yield Row(f"routing header, type {name}", "IPv6", act, (s.ROUTING, *s.PROGRAM))


def _host() -> Iterator[Row]:
    """The host's own stack."""
    for six in (False, True):
        v, private = _family(six), s.PRIVATE6 if six else s.TEN
        for title, to in (
            ("on its end of the link", "root_address6" if six else "root_address"),
            ("on its uplink's address", HOST6 if six else HOST),
            ("on an internal address", INTERNAL6 if six else INTERNAL),
            ("on its network's address for all", "2001:db8::" if six else "198.51.100.255"),
        ):
            stops: tuple[Stop, ...] = (private, s.ROOT_INPUT) if to.startswith("root") else (s.ROOT_INPUT,)
            yield Row(f"the host's services {title}", v, a.tcp(to, 22), stops, seen="root")
            yield Row(f"the host's services {title}, UDP", v, a.udp(to, 9), stops, seen="root")
        end = "6" if six else ""
        for title, to in (("gateway", f"gateway{end}"), ("uplink", f"address{end}")):
            whole = f"the slot's services on its {title}"
            yield Row(whole, v, a.udp(to, 9), (s.INPUT,), GUESTS, "slot", why_not=INSIDE)
        routers = (s.ROUTERS,) if six else ()
        act = a.redirect(f"gateway{end}")
        yield Row("redirect to the slot", v, act, (s.INPUT, *routers), GUESTS, "slot", why_not=INSIDE)
        act, stops = a.redirect(HOST6 if six else HOST), (s.INVALID, s.NO_ERRORS, *routers, s.ROOT_INPUT)
        yield Row("redirect to the host", v, act, (*stops, *s.reverse(six)), GUESTS, "root")
        yield Row("redirect to the host", v, act, (s.ROOT_INPUT,), PROCESS, "root")
        slot = (s.INVALID, s.NO_ERRORS, *s.reverse(six))
        title, act = "ICMP error about a connection of the host's", a.error_about(six, neighbours=False)
        yield Row(title, v, act, (*slot, s.ROOT_INPUT), GUESTS, "root")
        yield Row(title, v, act, (s.ROOT_INPUT,), PROCESS, "root")
        title, act = "ICMP error about another tenant's connection", a.error_about(six, neighbours=True)
        yield Row(title, v, act, (*slot, s.NAT_QUOTE, s.ROOT_FORWARD), GUESTS, "neighbour")
        yield Row(title, v, act, (s.ROOT_FORWARD,), PROCESS, "neighbour")
    stops = (s.ROUTES_LOCALNET, s.INPUT)
    yield Row("127.0.0.1", "IPv4", a.udp("127.0.0.1"), stops, GUESTS, "slot", why_not=ITS_OWN)
    yield Row("::1", "IPv6", a.udp("::1"), (), GUESTS, "slot", twin=a.udp("gateway6"), kernel=LOOP, why_not=ITS_OWN)


def _multicast() -> Iterator[Row]:
    """To all at once."""
    for six in (False, True):
        v = _family(six)
        for to, mac in (
            [("ff02::1", "33:33:00:00:00:01"), ("ff0e::1234", "33:33:00:00:12:34")]
            if six
            else [
                ("255.255.255.255", "ff:ff:ff:ff:ff:ff"),
                ("224.0.0.1", "01:00:5e:00:00:01"),
                ("239.1.2.3", "01:00:5e:01:02:03"),
            ]
        ):
            act = a.udp(to, to_mac=mac)
            yield Row(f"to everybody: {to}", v, act, (s.ROUTER,), GUESTS, "link")
            local = to in ("ff02::1", "255.255.255.255", "224.0.0.1")
            multicast = s.MULTICAST6 if six else s.MULTICAST4
            yield Row(
                f"to everybody: {to}",
                v,
                act,
                (multicast, s.ROOT_INPUT, *((s.ROOT_MULTICAST6,) if six else ())) if local else (multicast,),
                PROCESS,
                "root" if local else "link",
            )
            if local:
                yield Row(f"to the slot: {to}", v, act, (s.INPUT,), GUESTS, "slot", why_not=INSIDE)
        yield Row("DHCP offer", v, a.dhcp_offer(six), (s.ROUTER,), GUESTS, "link")
        yield Row("DHCP offer", v, a.dhcp_offer(six), (s.MULTICAST6 if six else s.MULTICAST4,), PROCESS, "link")
        broadcast = a.udp(a.outside(six), to_mac="ff:ff:ff:ff:ff:ff")
        twin = a.udp(a.outside(six))
        yield Row(
            "to the outside in a broadcast frame",
            v,
            broadcast,
            (),
            GUESTS,
            twin=twin,
            kernel=BROADCAST,
            why_not=FRAMES,
        )


def _frames() -> Iterator[Row]:
    """What a link may carry besides IP; a process that could write frames meets root's end of its link."""
    for six in (False, True):
        v = _family(six)
        plain = a.framed(six, a.tagged())
        wraps = {
            "VLAN tag": a.tagged((0x8100, 5)),
            "two VLAN tags (QinQ)": a.tagged((0x88A8, 5), (0x8100, 7)),
            "two VLAN tags, the outer one 0": a.tagged((0x8100, 0), (0x8100, 7)),
            "802.3 with LLC and SNAP": a.snap,
        }
        for title, wrap in wraps.items():
            act = a.framed(six, wrap)
            yield Row(f"frame: {title}", v, act, (s.ROUTER,), GUESTS, "link")
            yield Row(f"frame: {title}", v, act, (), PROCESS, "outside", twin=plain, kernel=NO_DEVICE)
        for tags in (1, 2):
            title = f"mail in a frame with {tags} VLAN tag{'s' * (tags - 1)} that say{'s' * (2 - tags)} 0 (priority)"
            yield Row(title, v, a.priority(six, 25, tags), (s.MAIL,), GUESTS, why_not=FRAMES)


def _believes(scene: Scene, address: str) -> bool:
    """Whether the other end thinks that ``address`` is at the tenant's other MAC."""
    place, link = scene.other
    return EVIL in place.sh(f"ip neigh show {address} dev {link}")


def _beliefs() -> Iterator[Row]:
    """What the other end of the link must not believe."""

    def claim(kind: int, six: bool) -> tuple[Act, Check]:
        def act(scene: Scene, mark: bytes) -> None:
            if six:
                a.advertise(scene, scene.own(True))
            else:
                a.arp(scene, kind, scene.own(False), scene.gateway(False) if kind == 1 else scene.own(False))

        return act, lambda scene: _believes(scene, scene.own(six))

    for title, kind, six in (
        ("its address is at another MAC: ARP request", 1, False),
        ("its address is at another MAC: gratuitous ARP", 2, False),
        ("its address is at another MAC: neighbour advertisement", 0, True),
    ):
        act, achieved = claim(kind, six)
        guest, slot = (s.GUEST_ENTRY6, s.SLOT_ENTRY6) if six else (s.GUEST_ENTRY4, s.SLOT_ENTRY4)
        yield Row(title, _family(six), act, (guest,), GUESTS, achieved=achieved)
        yield Row(title, _family(six), act, (slot, *((s.ROOT_INPUT,) if six else ())), PROCESS, achieved=achieved)

    def gratuitous(scene: Scene, mark: bytes) -> None:
        a.arp(scene, 2, STRANGER, STRANGER)

    for kinds, stop in ((GUESTS, s.SLOT_GRATUITOUS), (PROCESS, s.ROOT_GRATUITOUS)):
        achieved = lambda scene: _believes(scene, STRANGER)  # noqa: E731
        yield Row(
            "somebody's address is here: gratuitous ARP",
            "IPv4",
            gratuitous,
            (stop,),
            kinds,
            achieved=achieved,
            tidy=FORGET,
        )
    yield from _questions()
    routers = (s.ROUTERS, s.SPOOF6, s.INPUT, s.SLOT_RA)
    believed = lambda scene: "proto ra" in scene.other[0].sh("ip -6 route show default")  # noqa: E731
    yield Row("router advertisement", "IPv6", a.advertise_router, routers, GUESTS, achieved=believed, tidy=LEAVE)
    routers = (s.REVERSE, s.ROOT_INPUT, s.ROOT_MULTICAST6, s.ROOT_RA)
    yield Row("router advertisement", "IPv6", a.advertise_router, routers, PROCESS, achieved=believed, tidy=LEAVE)


def _questions() -> Iterator[Row]:
    """Addresses of others that the other end must not answer for."""

    def ask(to: str) -> Act:
        def act(scene: Scene, mark: bytes) -> None:
            asked = a.resolve(scene, to)
            scene.sender.hears(lambda _: False)  # what came before is no answer
            (a.solicit if ":" in asked else a.ask)(scene, scene.own(":" in asked), asked)

        return act

    def answered(to: str) -> Check:
        return lambda scene: scene.sender.hears(a.answer(a.resolve(scene, to)))

    for kinds, to, stop in ((GUESTS, "address", s.SLOT_ANSWERS), (PROCESS, HOST, s.ROOT_ANSWERS)):
        title = "who has another address of the next hop: ARP"
        yield Row(title, "IPv4", ask(to), (stop,), kinds, achieved=answered(to))
    for kinds, to, stop in ((GUESTS, "root_address", s.SLOT_PROXY), (PROCESS, "its.address", s.ROOT_PROXY)):
        title = "who has somebody else's address: ARP"
        yield Row(title, "IPv4", ask(to), (stop,), kinds, achieved=answered(to))
    another, somebody = "who has another address of the next hop", "who has somebody else's address"
    for kinds, to, title in (
        (GUESTS, "address6", another),
        (PROCESS, HOST6, another),
        (GUESTS, "root_address6", somebody),
        (PROCESS, "its.address6", somebody),
    ):
        stops = (s.SLOT_PROXY6,) if kinds == GUESTS else (s.ROOT_PROXY6, s.ROOT_INPUT)
        yield Row(f"{title}: neighbour solicitation", "IPv6", ask(to), stops, kinds, achieved=answered(to))


def _resources() -> Iterator[Row]:
    """What all tenants share, or one of them may have too much of."""

    def crowd(six: bool) -> Act:
        def act(scene: Scene, mark: bytes) -> None:
            for at in range(CROWD):
                if six and scene.plan.guest_if:
                    a.solicit(scene, f"fe80::{at + 0x100:x}", scene.gateway(True))
                elif six:
                    a.solicit(scene, scene.values["address6"][:-1] + f"1:{at:x}", scene.gateway(True))
                else:
                    a.arp(scene, 1, f"192.0.{at // 250}.{at % 250 + 1}", scene.gateway(False))

        return act

    def crowded(scene: Scene) -> bool:
        place, link = scene.other
        return place.sh(f"ip neigh show dev {link}").count(EVIL) > CROWD // 4

    title = f"{CROWD} senders in the neighbour table"
    yield Row(f"{title}: ARP", "IPv4", crowd(False), (s.SLOT_FILTER,), GUESTS, achieved=crowded, tidy=FORGET)
    yield Row(f"{title}: ARP", "IPv4", crowd(False), (s.ROOT_FILTER,), PROCESS, achieved=crowded, tidy=FORGET)
    title += ": neighbour solicitations"
    yield Row(title, "IPv6", crowd(True), (s.SOLICITATIONS,), GUESTS, achieved=crowded, tidy=FORGET)
    yield Row(title, "IPv6", crowd(True), (s.ROOT_INPUT,), PROCESS, achieved=crowded, tidy=FORGET)
    for six in (False, True):
        check = partial(_too_many, six)
        yield Row(
            "connections without end", _family(six), a.connections(six), (s.COUNT,), achieved=check, tracked=True
        )


def _too_many(six: bool, scene: Scene) -> bool:
    """Whether more connections than the rules allow came out of the slot, of those just opened."""
    return a.opened(scene, six) > a.limit(scene)
