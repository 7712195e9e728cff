"""One arrangement of a host, in namespaces: root with its rules, slots if it has any, and all links' other ends.

The other ends are in one more namespace, where packets are written to the wire and read from it. What a host or a
process receives is read from raw sockets, which see a packet after INPUT (raw_local_deliver() in net/ipv4/raw.c);
the mark with which a packet leaves root is read from a packet socket on the link (SO_RCVMARK, Linux 5.19).
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from netslot.errors import HostError, NetslotError
from netslot.host import replay_wire as wire
from netslot.host import tables
from netslot.host.replay_links import Plan, Scene, guest_mac, root_mac
from netslot.kernel import conntrack, ipset, netlink, netns
from netslot.rulesets.model import Family
from netslot.rulesets.proof.arrangement import Arrangement
from netslot.rulesets.proof.flow import ICMP
from netslot.rulesets.values import address_text

_SO_RCVMARK = 75
_OUR_MARK = 0x6E736C74
_ETHER: Mapping[Family, bytes] = {4: b"\x08\x00", 6: b"\x86\xdd"}
_AF = {4: socket.AF_INET, 6: socket.AF_INET6}

_GUARD = f"""table inet netslot-replay {{
    chain out {{
        type filter hook output priority -450
        meta mark {_OUR_MARK:#x} meta mark set 0 accept
        tcp flags & rst == rst drop
        icmp type {{ destination-unreachable, echo-reply }} drop
        icmpv6 type {{ destination-unreachable, echo-reply }} drop
    }}
}}
"""
"""Where a process is played, the kernel's own answers to packets that nobody waits for would end connections."""

Kind = Literal["b", "a"]


@dataclass(frozen=True, slots=True)
class Sent:
    """What is told of a packet when it is sent, so that answers to it are known again."""

    number: int
    family: Family
    entry: str
    values: Mapping[str, int]


Sighting = tuple[Any, ...]
"""``("out", link, src, dst, sport, dport)``, ``("local", src, dst, sport, dport)``, ``("refused", type, code)``."""


@dataclass(frozen=True)
class Rules:
    """What to load: iptables-save text by family, and by tenant and family; nft text; ipset text."""

    root: Mapping[Family, str]
    slots: Mapping[tuple[int, Family], str] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


class Stage:
    """One arrangement. ``arrangement`` is None for the one without slots."""

    def __init__(self, scene: Scene, prefix: str, arrangement: Arrangement | None = None) -> None:
        self._scene = scene
        self.root, self.world = f"{prefix}-root", f"{prefix}-world"
        self._slots = (
            {t: f"{prefix}-slot{t}" for t in scene.players if arrangement.members[t].kind} if arrangement else {}
        )
        self._plan = Plan(scene, arrangement, self._slots, self.world)
        self.of_processes = self._plan.of_processes
        self.names: list[str] = []
        self._wires: dict[str, socket.socket] = {}
        self._facing: dict[str, bytes] = {}
        self._makers: dict[tuple[str, Family], socket.socket] = {}
        self._readers = selectors.DefaultSelector()
        self._open: list[socket.socket] = []
        self._sent: dict[int, Sent] = {}
        self._resets: dict[tuple[int, ...], int] = {}
        self.sightings: dict[int, Sighting] = {}
        self.marks: dict[int, int] = {}
        self.sees_marks = True

    @property
    def last(self) -> int:
        """The number of the packet sent last, 0 before the first."""
        return next(reversed(self._sent), 0)

    # Building

    def build(self) -> None:
        """Namespaces, links, addresses, routes, sets; not yet any rules."""
        for name in (self.root, self.world, *self._slots.values()):
            netns.create(name)
            self.names.append(name)
            inside(name, _quiet, self._scene.families)
        _ip(self.root, self._plan.root())
        for tenant, slot in self._slots.items():
            _ip(slot, self._plan.slot(tenant))
        _ip(self.world, self._plan.world())
        for name in (self.root, *self._slots.values()):
            inside(name, self._make_sets)
        self._open_sockets(self._plan.wires)

    def _make_sets(self) -> None:
        if not self._scene.sets:
            return
        with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
            for name, contents in self._scene.sets.items():
                af = ipset.FAMILY_IPV4 if contents.family == 4 else ipset.FAMILY_IPV6
                elements = []
                for value, length in contents.members:
                    head, tail = ipset.element_form(af, length)
                    elements.append(head + value.to_bytes(4 if contents.family == 4 else 16, "big") + tail)
                ipset.execute(sock, [ipset.create(name, af, 1024), *ipset.add(name, af, elements)])

    # Sockets

    def _open_sockets(self, wires: Mapping[str, str]) -> None:
        places = self._scene.places
        outside = set(places.outside)
        for link in self._plan.links():
            slot = None if link in outside else self._slots.get(places.link_owner[link])
            tap = inside(self.root, self._packet_socket, link)
            self._watch(tap, self._tapped)
            if slot is not None and self.of_processes:
                self._deliveries(slot, link)
                continue
            sock = inside(self.world, self._packet_socket, wires[link])
            self._wires[link] = sock
            self._watch(sock, partial(self._read_wire, link=link))
            self._facing[link] = bytes.fromhex((root_mac(link) if slot is None else guest_mac(link)).replace(":", ""))
        self._deliveries(self.root, "")

    def _packet_socket(self, device: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind((device, 0))
        return sock

    def _deliveries(self, name: str, link: str) -> None:
        """Read what is delivered in a namespace, and be able to send from inside it."""
        for family in self._scene.families:
            for proto in (wire.TCP, wire.UDP, ICMP[family]):
                sock = inside(name, socket.socket, _AF[family], socket.SOCK_RAW, proto)
                if family == 6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                self._watch(sock, partial(self._delivered, family=family, proto=proto, link=link))
            maker = inside(name, socket.socket, _AF[family], socket.SOCK_RAW, socket.IPPROTO_RAW)
            if link:
                maker.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _OUR_MARK)
            self._open.append(maker)
            self._makers[link, family] = maker

    def _watch(self, sock: socket.socket, read: Callable[[socket.socket], None]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVMARK, 1)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            self.sees_marks = False
        self._open.append(sock)
        self._readers.register(sock, selectors.EVENT_READ, read)

    # Rules

    def load(self, rules: Rules) -> None:
        """Root's rules, and those of every slot."""
        for text in rules.sets:
            inside(self.root, _restore_sets, text)
        for text in rules.published:
            self._put(self.root, tables.nft, text)
        for family in self._scene.families:
            self._restore(self.root, family, rules.root.get(family, ""))
            for tenant, slot in self._slots.items():
                self._restore(slot, family, rules.slots.get((tenant, family), ""))

    def let_everything_pass(self, rules: Rules) -> None:
        """Rules that track connections and drop only what the kernel itself would answer.

        They stand in every table that ``rules`` has, so that loading those leaves nothing of these.
        """
        for name in (self.root, *self._slots.values()):
            if self.of_processes and name != self.root:
                inside(name, tables.nft, _GUARD)
            for family in self._scene.families:
                self._restore(name, family, _open_rules(family, rules.root.get(family, "")))

    def _restore(self, name: str, family: Family, text: str) -> None:
        self._put(name, tables.restore, "legacy", family, completed(text))

    def _put(self, name: str, load: Callable[..., None], *what: Any) -> None:
        try:
            inside(name, load, *what)
        except NetslotError as error:
            raise HostError(
                f"the rules cannot be loaded here for the replay: {error.message}",
                hint="prove without --replay needs no kernel",
            ) from error

    def forget(self) -> None:
        """Drop all connections."""
        for name in (self.root, *self._slots.values()):
            inside(name, conntrack.flush)

    # Packets

    def send(self, sent: Sent, seq: int = 1, ack: int = 1) -> None:
        """Put one packet on its way."""
        self._sent[sent.number] = sent
        values, family = sent.values, sent.family
        if values["proto"] == wire.TCP:
            self._resets[family, values["src"], values["sport"], values["dst"], values["dport"]] = sent.number
        data = wire.written(family, values, wire.tag(sent.number), seq, ack)
        sock = self._wires.get(sent.entry)
        if sock is not None:
            mac = bytes.fromhex(self._scene.mac_behind(sent.entry, values["src"], family).replace(":", ""))
            sock.send(self._facing[sent.entry] + mac + _ETHER[family] + data)
            return
        maker = self._makers[sent.entry, family]
        to: Any = (address_text(values["dst"], family), 0)
        try:
            maker.sendto(data, to)
        except OSError as error:
            if error.errno != errno.EPERM:  # what OUTPUT drops; an answer of REJECT is read where it comes in
                raise HostError(f"sending from {sent.entry or 'the host'}: {error}") from error

    def settle(self, wanted: Iterable[int], patience: float = 0.4, grace: float = 0.005) -> None:
        """Read until all of ``wanted`` have been seen and nothing more comes for a moment, at most ``patience`` s."""
        left = set(wanted) - self.sightings.keys()
        deadline = time.monotonic() + patience
        while True:
            now = time.monotonic()
            ready = self._readers.select(grace if not left else max(0.0, min(deadline - now, 0.05)))
            for key, _ in ready:
                key.data(key.fileobj)
            left -= self.sightings.keys()
            if not ready and (not left or time.monotonic() >= deadline):
                return

    def _tapped(self, sock: socket.socket) -> None:
        for data, control, origin in _datagrams(sock):
            if origin[2] != socket.PACKET_OUTGOING:
                continue
            found = wire.read_frame(data)
            if found is not None and found[1].number is not None and found[1].number in self._sent:
                self._note_mark(found[1].number, found[1], control)

    def _note_mark(self, number: int, seen: wire.Seen, control: Sequence[tuple[int, int, bytes]]) -> None:
        if not self._is_itself(number, seen):
            return
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SO_MARK):
                self.marks[number] = struct.unpack("=I", data[:4])[0]

    def _is_itself(self, number: int, seen: wire.Seen) -> bool:
        """Whether this is the tagged packet and not an answer to it."""
        sent = self._sent[number]
        if wire.is_error(sent.family, sent.values):
            return True
        if seen.proto != sent.values["proto"]:
            return False
        if seen.proto != ICMP[sent.family]:
            return True
        return seen.answer is None or seen.answer == (sent.values["icmp_type"], sent.values["icmp_code"])

    def _read_wire(self, sock: socket.socket, link: str) -> None:
        for data, _, origin in _datagrams(sock):
            found = wire.read_frame(data)
            if origin[2] != socket.PACKET_OUTGOING and found is not None:
                self._saw(found[0], found[1], link)

    def _delivered(self, sock: socket.socket, family: Family, proto: int, link: str) -> None:
        for data, control, origin in _datagrams(sock):
            if family == 4:
                seen = wire.read(4, data)
            else:
                dst = next((int.from_bytes(d[:16], "big") for _, k, d in control if k == socket.IPV6_PKTINFO), 0)
                src = int.from_bytes(socket.inet_pton(socket.AF_INET6, origin[0].partition("%")[0]), "big")
                seen = wire.read_body(6, proto, src, dst, data)
            number = seen.number
            if number in self._sent and number is not None and self._is_itself(number, seen):
                ends = (seen.src, seen.dst, seen.sport, seen.dport)
                self.sightings[number] = ("out", link, *ends) if link else ("local", *ends)
                if not link:
                    self._note_mark(number, seen, control)
            else:
                self._saw(family, seen, link)

    def _saw(self, family: Family, seen: wire.Seen, link: str) -> None:
        number = seen.number if seen.number in self._sent else None
        if number is not None and self._is_itself(number, seen):
            if link:
                self.sightings[number] = ("out", link, seen.src, seen.dst, seen.sport, seen.dport)
            return
        if number is not None and seen.answer is not None and seen.answer[0] in wire.ERRORS[family]:
            self.sightings.setdefault(number, ("refused", *seen.answer))
        elif seen.proto == wire.TCP and seen.flags & wire.RST:
            number = self._resets.get((family, seen.dst, seen.dport, seen.src, seen.sport))
            if number is not None:
                self.sightings.setdefault(number, ("refused", "tcp-reset", 0))

    def close(self) -> None:
        """Take everything down."""
        self._readers.close()
        for sock in self._open:
            sock.close()
        for name in self.names:
            netns.unpin(name)


def _datagrams(sock: socket.socket) -> Iterable[tuple[bytes, Sequence[tuple[int, int, bytes]], Any]]:
    """All that a socket holds, with what the kernel says of each."""
    while True:
        try:
            data, control, _, origin = sock.recvmsg(65536, 256)
        except BlockingIOError:
            return
        except OSError as error:  # an ICMP error that came for this socket is told here once
            if error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM):
                continue
            raise
        yield data, control, origin


def completed(text: str) -> str:
    """The rules with the tables emptied that they leave out and :meth:`Stage.let_everything_pass` fills."""
    missing = [table for table in ("raw", "filter") if f"*{table}\n" not in text]
    return text + "".join(f"*{table}\n{_EMPTY[table]}COMMIT\n" for table in missing)


_EMPTY = {
    "raw": ":PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n",
    "filter": ":INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n",
}


def _open_rules(family: Family, text: str) -> str:
    icmp, unreachable = ("icmp", "--icmp-type 3") if family == 4 else ("ipv6-icmp", "--icmpv6-type 1")
    raw = f"-A OUTPUT -p tcp --tcp-flags RST RST -j DROP\n-A OUTPUT -p {icmp} {unreachable} -j DROP\n"
    lines = [f"*raw\n{_EMPTY['raw']}{raw}COMMIT\n"]
    lines.append(f"*filter\n{_EMPTY['filter']}-A FORWARD -m conntrack --ctstate NEW\nCOMMIT\n")
    for table in ("mangle", "nat", "security"):
        if f"*{table}\n" in text:
            lines.append(f"*{table}\nCOMMIT\n")
    return "".join(lines)


def inside(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in the namespace of this name."""
    fd = netns.open_named(name)
    try:
        return netns.run_in(fd, function, *args)
    finally:
        os.close(fd)


def _restore_sets(text: str) -> None:
    done = subprocess.run(["ipset", "restore"], input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise HostError(
            f"the sets cannot be made here for the replay: {done.stderr.strip()}",
            hint="prove without --replay needs no kernel",
        )


def _ip(name: str, lines: Sequence[str]) -> None:
    done = subprocess.run(
        ["ip", "-n", name, "-batch", "-"], input="\n".join(lines), text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise HostError(f"building the replay: {done.stderr.strip()}")


_SETTINGS = {
    "net/ipv4/conf/{}/rp_filter": "0",
    "net/ipv4/conf/{}/send_redirects": "0",
    "net/ipv6/conf/{}/addr_gen_mode": "1",
    "net/ipv6/conf/{}/accept_dad": "0",
    "net/ipv6/conf/{}/accept_ra": "0",
}
_ONCE = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/icmp_ratelimit": "0",
    "net/ipv4/icmp_msgs_per_sec": "100000",
    "net/ipv4/icmp_msgs_burst": "100000",
    "net/ipv6/icmp/ratelimit": "0",
    "net/netfilter/nf_conntrack_tcp_be_liberal": "1",
}

_OPTIONAL = ("net/netfilter/nf_conntrack_tcp_be_liberal", "net/ipv4/icmp_msgs_per_sec", "net/ipv4/icmp_msgs_burst")
"""Not there until connection tracking is; of each namespace only since Linux 6.13."""


def _quiet(families: Sequence[Family]) -> None:
    """Forward; no source checks of the kernel's own, no limit on ICMP errors, no redirects, no IPv6 chatter."""
    values = {path.format(scope): value for path, value in _SETTINGS.items() for scope in ("all", "default")}
    if 6 not in families:
        values = {f"net/ipv6/conf/{scope}/disable_ipv6": "1" for scope in ("all", "default")} | {
            path: value for path, value in values.items() if "ipv6" not in path
        }
    for path, value in {**values, **_ONCE}.items():
        if "ipv6" in path and "disable" not in path and 6 not in families:
            continue
        if path in _OPTIONAL and not os.path.exists(f"/proc/sys/{path}"):
            continue
        with open(f"/proc/sys/{path}", "w") as file:
            file.write(value)
