"""A slot's links, addresses, routes and neighbours: made, read back, compared and mended by netlink.

Nothing here opens a way for packets before :func:`root_side` is executed, which brings up root's end of the link.
"""

from __future__ import annotations

import errno
import functools
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Network, ip_address, ip_interface
from typing import NamedTuple, TypeVar

from netslot.errors import KernelError, NetslotError
from netslot.host.plan import GUEST, INNER_UPLINK, LOOPBACK, UPLINK, SlotPlan, any_network, own_values, parse_tag
from netslot.host.wiring import GuestLink
from netslot.kernel import fib, tun
from netslot.kernel import rtnetlink as rt
from netslot.kernel.ethtool import notice_carrier
from netslot.kernel.netlink import Message, Request, Socket
from netslot.kernel.sysctl import Sysctls
from netslot.kernel.tunnels import FALLBACK
from netslot.spec.model import ClassSpec, HostSpec

T = TypeVar("T", rt.AddressRecord, rt.RouteRecord, rt.NeighbourRecord)

ROOT_GROUP = 0x6E73
"""The interface group of root's ends: lets a static rule name all slots' links; a resident may have another."""
DOOMED_GROUP = 0x6E736478
"""The group of root's ends that are about to be removed."""

_FORWARD = {
    rt.IPV4_DEVCONF_FORWARDING: 1,
    rt.IPV4_DEVCONF_PROXY_ARP: 0,
    rt.IPV4_DEVCONF_ACCEPT_REDIRECTS: 0,
    rt.IPV4_DEVCONF_ACCEPT_SOURCE_ROUTE: 0,
}
"""What a namespace would otherwise have of the machine's own settings, which are made for other links."""
_DISTRUST = {**_FORWARD, rt.IPV4_DEVCONF_RP_FILTER: 1, rt.IPV4_DEVCONF_ARP_IGNORE: 1, rt.IPV4_DEVCONF_ARP_ACCEPT: 0}
"""For the links behind which a tenant is: each sender that ARP tells of costs an entry in the neighbour table, which
is one for the whole machine, so only those count that could be there."""
_SLOT_WIDE = {f"net/ipv4/conf/all/{each}": "0" for each in ("rp_filter", "proxy_arp", "arp_accept", "route_localnet")}
"""Where the kernel takes the larger of a link's own setting and this one, and a machine's may be large."""
_CHECKED = (1, 3, 4, 8, 9, 19, 21)
"""The IPV4_DEVCONF_* above: of root's links the only ones that are netslot's."""
ROOT_IPV4 = slice(0, 4 * _CHECKED[-1])
"""Which bytes of a root link's IPv4 settings hold these."""
_UNFILTERED = {**_FORWARD, rt.IPV4_DEVCONF_RP_FILTER: 0}
_ANSWER = {**_DISTRUST, rt.IPV4_DEVCONF_PROXY_ARP: 1, rt.IPV4_DEVCONF_RP_FILTER: 0}
"""A resident's: what sources it may use its rules say, as they did before it had a slot. Of root's end of its link
netslot sets no more than _FORWARD, so that the kernel's own check is what root has for new links."""
DISABLE6 = slice(26 * 4, 27 * 4)
"""DEVCONF_DISABLE_IPV6 of a link's IPv6 settings, linux/ipv6.h."""
_MULTICAST6 = IPv6Network("ff00::/8")


def prepare(plan: SlotPlan, sysctls: Sysctls) -> None:
    """Set a new slot's own sysctls. The calling thread is in the slot, which has no links but ``lo`` yet."""
    sysctls.insist(_SLOT_WIDE)
    if plan.ipv6:
        sysctls.write("net/ipv6/conf/default/accept_ra", "0")
        sysctls.write("net/ipv6/conf/default/accept_redirects", "0")
        sysctls.write("net/ipv6/conf/all/forwarding", "1")
        if plan.wiring.guest is not None and plan.wiring.guest.proxied:
            sysctls.write("net/ipv6/conf/all/proxy_ndp", "1")
    else:
        sysctls.write("net/ipv6/conf/all/disable_ipv6", "1")  # also the default of links that come later


def make_uplink(plan: SlotPlan, slot: Socket, root: Socket, root_fd: int, at_birth: Sequence[Request] = ()) -> None:
    """The veth to root (``root_fd``). A link of that name that a dying slot left behind there is removed first.

    ``at_birth`` is asked for together with the link.
    NetslotError when a resident's link is there and is not this slot's.
    """
    values = plan.values
    pair = rt.veth(
        plan.uplink_if,
        plan.root_if,
        index=UPLINK,
        mac=values["uplink_mac"],
        mtu=plan.of.attachment.mtu,
        peer_netns=root_fd,
        peer_mac=values["root_mac"],
        peer_group=root_group(plan),
    )
    try:
        slot.execute([pair, *at_birth])
    except KernelError as error:
        if error.errno != errno.EEXIST:
            raise
        if plan.resident is not None:
            _refuse_others(plan, root)
        root.execute([rt.delete_link(0, plan.root_if)._replace(ignore=(errno.ENODEV,))])
        slot.execute([pair, *at_birth])


def root_group(plan: SlotPlan) -> int:
    """The interface group of root's end."""
    return plan.resident.group if plan.resident is not None and plan.resident.group else ROOT_GROUP


def _refuse_others(plan: SlotPlan, root: Socket) -> None:
    """A tenant's link has a name that people gave it: whoever has it is not always a slot that dies."""
    there = next((link for link in rt.links(root) if link.name == plan.root_if), None)
    tag = parse_tag(there.alias) if there is not None else None
    if there is not None and (tag is None or tag[:2] != (plan.host_id, plan.number)):
        owner = f"slot {tag[1]}'s" if tag is not None and tag[0] == plan.host_id else "not netslot's"
        hint = f"ip link del {plan.root_if}, once nobody needs it; or another link for it in the roster"
        raise NetslotError(f"root has a link {plan.root_if}, which is {owner}", hint=hint)


def make_guest_link(plan: SlotPlan, slot: Socket, inner_fd: int | None) -> None:
    """The tap, or the veth whose far end is born in the container's namespace; nothing for a process."""
    attachment = plan.of.attachment
    if plan.guest_if is None:
        return
    if attachment.kind == "tap":
        tun.create_tap(
            plan.guest_if,
            index=GUEST,
            user=attachment.user,
            group=attachment.group,
            vnet_hdr=attachment.vnet_hdr,
            multi_queue=attachment.multi_queue,
        )
        notice_carrier(slot, plan.guest_if)
        return
    pair = rt.veth(
        plan.guest_if,
        attachment.peer,
        peer_netns=inner_fd,
        index=GUEST,
        peer_index=INNER_UPLINK,
        mac=attachment.gateway_mac,
        peer_mac=attachment.guest_mac,
        mtu=attachment.mtu,
    )
    slot.execute([pair])


def _quiet(plan: SlotPlan, index: int) -> list[Request]:
    """No link-local address where IPv6 is on; a message of its own, as the kernel brings a link up before it
    looks at this setting in the same message (do_setlink() in net/core/rtnetlink.c)."""
    return [rt.set_link(index, quiet_ipv6=True)] if plan.ipv6 else []


def slot_side(plan: SlotPlan, *, born: bool = False) -> list[Request]:
    """Configure the slot's own links and bring them up; may be repeated.

    ``born`` leaves out what :func:`make_uplink` has just given the uplink: the kernel tells everybody of a MAC again
    even if it is the one that the link has.
    """
    values, wiring = plan.values, plan.wiring
    mtu = None if born else plan.of.attachment.mtu
    mac = None if born else values["uplink_mac"]
    requests = [
        rt.set_link(LOOPBACK, up=True, alias=plan.tag),
        *_quiet(plan, UPLINK),
        rt.set_link(UPLINK, up=True, mac=mac, mtu=mtu, ipv4=_FORWARD if plan.resident is None else _UNFILTERED),
    ]
    requests += [rt.add_address(UPLINK, own) for own in wiring.own]
    for hop in wiring.hops:
        requests += [
            rt.add_neighbour(UPLINK, hop, values["root_mac"]),
            rt.add_route(any_network(hop), index=UPLINK, gateway=hop, onlink=wiring.onlink),
        ]
    if wiring.guest is None:
        return requests
    if plan.resident is None:
        return [*requests, *_shared_guest_side(plan.spec, plan.of)]
    return requests + _guest_side(plan, wiring.guest)


@functools.lru_cache(maxsize=64)
def _shared_guest_side(spec: HostSpec, of: ClassSpec) -> tuple[Request, ...]:
    """The slot's own end of the link to its workload: the same in every numbered slot of a class."""
    any_slot = SlotPlan(spec, of, 1, "")
    return tuple(_guest_side(any_slot, any_slot.wiring.guest)) if any_slot.wiring.guest is not None else ()


def _guest_side(plan: SlotPlan, guest: GuestLink) -> list[Request]:
    attachment = plan.of.attachment
    ipv4 = _DISTRUST if plan.resident is None else _ANSWER
    return [
        *_quiet(plan, GUEST),
        rt.set_link(GUEST, up=True, mac=attachment.gateway_mac, mtu=attachment.mtu, ipv4=ipv4),
        *(rt.add_address(GUEST, own) for own in guest.own),
        *(rt.add_neighbour(GUEST, address, guest.mac) for address in guest.neighbours),
        *(rt.add_route(network, index=GUEST) for network in guest.routes),
        *(rt.add_proxy(GUEST, address) for address in guest.proxied),
    ]


def answer_at_once(plan: SlotPlan, sysctls: Sysctls) -> None:
    """Let the slot answer for root without the delay that is meant for proxies beside the real owner: up to 0.8 s
    (arp_process() in net/ipv4/arp.c). The calling thread is in the slot."""
    guest = plan.wiring.guest
    if guest is None or plan.resident is None:
        return
    for family in ("ipv4", "ipv6") if guest.proxied else ("ipv4",):
        sysctls.write(f"net/{family}/neigh/{plan.guest_if}/proxy_delay", "0")


def inner_side(plan: SlotPlan) -> list[Request]:
    """Configure the container's end of a ``veth`` attachment, in its inner namespace."""
    attachment, guest = plan.of.attachment, plan.wiring.guest
    requests = [
        rt.set_link(LOOPBACK, up=True),
        rt.set_link(INNER_UPLINK, quiet_ipv6=True),
        rt.set_link(INNER_UPLINK, up=True, mac=guest.mac if guest is not None else attachment.guest_mac),
    ]
    if guest is None:
        return requests
    requests += [rt.add_address(INNER_UPLINK, address) for address in guest.inner]
    for hop, onlink in guest.hops:
        requests += [
            rt.add_neighbour(INNER_UPLINK, hop, attachment.gateway_mac),
            rt.add_route(any_network(hop), index=INNER_UPLINK, gateway=hop, onlink=onlink),
        ]
    return requests


def root_side(plan: SlotPlan, index: int, *, born: bool = False) -> list[Request]:
    """Configure root's end of the link (``index``) and bring it up; may be repeated.

    ``born`` as in :func:`slot_side`. Each message about a link of root's that the kernel makes costs a walk of the
    namespaces that root knows by number (peernet2id() in net/core/net_namespace.c).
    """
    values, wiring = plan.values, plan.wiring
    settings = rt.set_link(
        index,
        up=None if plan.ipv6 else True,
        mac=None if born else values["root_mac"],
        mtu=None if born else plan.of.attachment.mtu,
        group=None if born else root_group(plan),
        alias=plan.tag,
        ipv4=_DISTRUST if plan.resident is None else _FORWARD,
        quiet_ipv6=plan.ipv6,
        dormant=plan.ipv6 and born,
    )
    # A change of a link that is up has the kernel walk all IPv6 routes of root (rt6_sync_up()): see decision 0104.
    requests = [settings, rt.set_link(index, up=True)] if plan.ipv6 else [settings]
    requests += [rt.add_address(index, root, alone=root.version == 6) for root in wiring.root]
    requests += [rt.add_neighbour(index, far, values["uplink_mac"]) for far in wiring.far]
    for network, hop, metric in wiring.routes:
        requests.append(rt.add_route(network, index=index, gateway=hop, onlink=True, metric=metric))
    return requests


def root_side_connected(plan: SlotPlan, index: int) -> list[Request]:
    """What root's end of the link needs once the kernel has noticed its carrier.

    Every link that comes up adds a route of ff00::/8, and all links' hang in one list that is walked at each
    addition. Root sends no multicast to slots, whose neighbours are permanent.
    """
    if not plan.ipv6:
        return []
    gone = rt.delete_route(_MULTICAST6, index=index, table=rt.RT_TABLE_LOCAL, kind=rt.RTN_MULTICAST)
    return [gone._replace(ignore=(errno.ESRCH,))]


def quiet_root_side(plan: SlotPlan, sysctls: Sysctls) -> None:
    """Turn IPv6 off on root's end, if slots have none. The calling thread is in the root namespace."""
    if not plan.ipv6:
        sysctls.write(f"net/ipv6/conf/{plan.root_if}/disable_ipv6", "1")


class State(NamedTuple):
    """What a namespace holds of links and addressing; comparable, with a slot's own values taken out."""

    links: dict[int, rt.Link]
    addresses: frozenset[rt.AddressRecord]
    routes: frozenset[rt.RouteRecord]
    neighbours: frozenset[rt.NeighbourRecord]


class Answers(NamedTuple):
    """What the kernel said about a namespace, or about one link of it; nothing of it parsed."""

    links: list[Message]
    addresses: list[Message]
    routes: list[Message]
    neighbours: list[Message]

    def all(self) -> list[Message]:
        return [*self.links, *self.addresses, *self.routes, *self.neighbours]


def ask(plan: SlotPlan, sock: Socket) -> Answers:
    """The slot's links, addresses, routes, and those neighbours that it should have.

    Other neighbours are not looked for: that would cost a walk of the table that all namespaces share. They cannot
    outlive a tenant, see :func:`forget_neighbours`.
    """
    return Answers(
        rt.dump_links(sock), rt.dump_addresses(sock), rt.dump_routes(sock), sock.execute(_neighbours_asked(plan))
    )


def read(plan: SlotPlan, sock: Socket) -> State:
    """What :func:`ask` gives, as a state: see :func:`state_of`."""
    return state_of(ask(plan, sock), plan)


def state_of(answers: Answers, plan: SlotPlan) -> State:
    """A slot's state, without links and routes of the routes policy, which looks after its own, and without carriers,
    which are the workload's."""
    links = [rt.parse_link(message) for message in answers.links]
    outside = apart(plan, links)
    ours = fib.PROTOCOL if plan.of.routes is not None else None
    addresses = map(rt.parse_address, answers.addresses)
    return State(
        {link.ifindex: link._replace(carrier=False) for link in links if link.ifindex not in outside},
        frozenset(record for record in addresses if record.link not in outside),
        frozenset(route for route in rt.parse_routes(answers.routes) if not _apart(route, outside, ours)),
        frozenset(map(rt.parse_neighbour, answers.neighbours)),
    )


def apart(plan: SlotPlan, links: Iterable[rt.Link]) -> frozenset[int]:
    """The indexes of links that are not looked at here: tunnels of the routes policy, and the kernel's own."""
    tunnels = {tunnel.name for tunnel in plan.of.routes.tunnels} if plan.of.routes is not None else set[str]()
    return frozenset(
        link.ifindex for link in links if link.name in tunnels or (link.name in FALLBACK and not link.up)
    )


def _apart(route: rt.RouteRecord, links: frozenset[int], ours: int | None) -> bool:
    """Routes of the routes policy, and those that the kernel adds for addresses of its tunnels."""
    return route.protocol == ours or (route.link in links and route.protocol == rt.RTPROT_KERNEL)


def _neighbours_asked(plan: SlotPlan) -> list[Request]:
    guest = plan.wiring.guest
    asked = [rt.get_neighbour(UPLINK, hop.packed) for hop in plan.wiring.hops]
    return asked + [rt.get_neighbour(GUEST, each.packed) for each in (guest.neighbours if guest is not None else ())]


def packed(address: str) -> bytes:
    """An address as its 4 or 16 bytes."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def forget_neighbours(plan: SlotPlan) -> list[Request]:
    """Drop every neighbour of the slot's links, and put the permanent ones back.

    Giving a link a MAC, also the one that it has, makes the kernel drop all its entries, permanent ones included
    (NETDEV_CHANGEADDR and neigh_changeaddr() in net/core/neighbour.c); no table is walked.
    """
    values = plan.values
    requests = [rt.set_link(UPLINK, mac=values["uplink_mac"])]
    requests += [rt.add_neighbour(UPLINK, hop, values["root_mac"]) for hop in plan.wiring.hops]
    guest = plan.wiring.guest
    if guest is not None:
        requests.append(rt.set_link(GUEST, mac=plan.of.attachment.gateway_mac))
        requests += [rt.add_neighbour(GUEST, address, guest.mac) for address in guest.neighbours]
    return requests


def ask_root(sock: Socket) -> dict[str, Answers]:
    """By name, each link of the root namespace and what is configured on it. One dump of each kind for all slots."""
    dumps = (rt.dump_links(sock), rt.dump_addresses(sock), rt.dump_routes(sock), rt.dump_neighbours(sock))
    by_index: dict[int, Answers] = {}
    for kind, messages in enumerate(dumps):
        for message in messages:
            index = rt.message_link(message)
            found = by_index.get(index)
            if found is None:
                by_index[index] = found = Answers([], [], [], [])
            found[kind].append(message)
    return {rt.link_name(answers.links[0]): answers for answers in by_index.values() if answers.links}


def root_state_of(answers: Answers) -> State:
    """The state of root's end of a link, with link indexes taken out; of its neighbours the permanent ones."""
    neighbours = map(rt.parse_neighbour, answers.neighbours)
    return State(
        {0: _own_settings(rt.parse_link(answers.links[0]))},
        frozenset(rt.parse_address(message)._replace(link=0) for message in answers.addresses),
        frozenset(route._replace(link=0) for route in rt.parse_routes(answers.routes)),
        frozenset(entry._replace(link=0) for entry in neighbours if entry.permanent),
    )


def read_root(sock: Socket) -> dict[str, State]:
    """The state of each link of the root namespace, by name; see :func:`root_state_of`."""
    return {name: root_state_of(answers) for name, answers in ask_root(sock).items()}


def _own_settings(link: rt.Link) -> rt.Link:
    """Root's end of a link without what is not netslot's to decide: its index, and most of its sysctls."""
    tag = parse_tag(link.alias)
    checked = _FORWARD if tag is not None and own_values(tag[3]) else _CHECKED
    ipv4 = b"".join(link.ipv4_conf[4 * number - 4 : 4 * number] for number in sorted(checked))
    return link._replace(ifindex=0, carrier=False, ipv4_conf=ipv4, ipv6_conf=link.ipv6_conf[DISABLE6])


def mend(plan: SlotPlan, wanted: State, slot: Socket) -> None:
    """Take away what is not the slot's and configure the rest again. Links must be there; see :func:`make_links`."""
    found = read(plan, slot)
    requests = [rt.delete_link(index) for index in sorted(found.links.keys() - wanted.links.keys())]
    gone = {errno.ENODEV, errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL}
    ours, outside = fib.PROTOCOL if plan.of.routes is not None else None, apart(plan, rt.links(slot))
    requests += rt.delete_routes(slot, lambda each: not _apart(each, outside, ours) and each not in wanted.routes)
    for record in found.addresses - wanted.addresses:
        address = ip_interface((ip_address(record.address), record.prefix_length))
        requests.append(rt.delete_address(record.link, address))
    slot.execute(request._replace(ignore=tuple(gone)) for request in requests)
    settings = [
        rt.set_link(index, ipv4=link.ipv4_settings(), alias=link.alias, group=link.group)
        for index, link in wanted.links.items()
        if index in found.links and found.links[index] != link
    ]
    slot.execute(settings)
    slot.execute(slot_side(plan))


def clear_root(wanted: State, answers: Answers) -> list[Request]:
    """Take from root's end of a link what is not ``wanted`` there: the kernel takes back the message that it sent."""
    requests = []
    for message in answers.addresses:
        if rt.parse_address(message)._replace(link=0) not in wanted.addresses:
            gone = (errno.EADDRNOTAVAIL,)
            requests.append(Request(rt.RTM_DELADDR, 0, message.payload, "delete address", gone))
    for message in answers.routes:
        if any(route._replace(link=0) not in wanted.routes for route in rt.parse_routes([message])):
            requests.append(Request(rt.RTM_DELROUTE, 0, message.payload, "delete route", (errno.ESRCH,)))
    return requests
