"""Send real packets through the host as it was and as it will be, and compare what comes out.

Both arrangements are built in namespaces of their own: root with its rules, a link for each tenant that plays
(two of each class), links to the outside; in the second one, slots. All other ends are in one namespace, where
packets are written to and read from the wire. What the kernel did in the two is compared with each other, and
with what the model said: the prover's model is on trial here too.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from netslot.errors import HostError, RefusedError
from netslot.host import tables
from netslot.kernel import netns
from netslot.rulesets.model import Dump
from netslot.rulesets.proof.arrangement import PUBLISH, ROOT, Arrangement
from netslot.rulesets.proof.journey import Journey, Result, Side, Way
from netslot.rulesets.proof.places import NOBODY, Places
from netslot.rulesets.proof.prover import Sides, aligned, both_sides, classes_of
from netslot.rulesets.proof.samples import Sample, packet, samples
from netslot.rulesets.proof.scenarios import cast
from netslot.rulesets.values import address_text
from netslot.rulesets.write import write
from netslot.spec.render import render

UPLINK = "198.18.255.1"
_NEXT_HOP = "198.18.255.2"
_PACE = 64  # packets between two looks at what came out: under the kernel's limit of ICMP errors a second
_MOST_PLAYERS = 8
_TCP, _UDP, _ICMP = 6, 17, 1

_REFUSED_FAR = ("refused by the receiver's slot",)

Outcome = tuple[Any, ...]
"""``("out", link, src, dst, sport, dport)``, ``("answered",)`` (refused, or delivered here) or ``("nothing",)``."""


@dataclass
class Replayed:
    """``differences``: as the prover's counterexamples. ``skipped``: packets that the model has no answer for."""

    sent: int = 0
    skipped: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)


def replay_packets(
    dump: Dump, places: Places, arrangement: Arrangement, files: Mapping[str, str], count: int
) -> Replayed:
    """Send ``count`` packets through both arrangements. Only IPv4, and only slots that a link leads on from."""
    show = Replay(dump, places, arrangement, files)
    return show.send(samples(show.sides.before.root, places, show.players, count))


class Replay:
    """Both arrangements of one host. RefusedError when they cannot be played."""

    def __init__(self, dump: Dump, places: Places, arrangement: Arrangement, files: Mapping[str, str]) -> None:
        ruleset = dump.family(4)
        if ruleset is None or arrangement.attachment == "process":
            raise RefusedError(
                "replay needs IPv4 rules and an attachment with a link (tap or veth): what a process receives cannot "
                "be told from what only reached its namespace"
            )
        if not {tenant.interfaces[0] for tenant in places.tenants} <= {member.link for member in arrangement.members}:
            raise RefusedError("the directory has not a slot for every tenant of the dump")
        arrangement = aligned(places, arrangement)
        self._places, self._arrangement, self._files = places, arrangement, files
        self._before = write(ruleset)
        self.sides = both_sides(dump, places, arrangement, 4)
        chosen = cast(classes_of(places, arrangement, [self.sides]))
        pairs = zip(chosen.first, chosen.second, strict=True)
        self.players = [tenant for pair in pairs for tenant in pair if tenant != NOBODY][:_MOST_PLAYERS]

    def send(self, made: Sequence[Sample]) -> Replayed:
        """Send these packets through both; they must be between tenants that play."""
        result = Replayed()
        with (
            _stage(self._places, self.players) as before,
            _stage(self._places, self.players, self._arrangement) as after,
        ):
            before.load(self._before, None)
            after.load(self._files[ROOT[4]], self._files.get(PUBLISH[4]))
            for start in range(0, len(made), _PACE):
                batch = made[start : start + _PACE]
                kernel = [stage.send(batch, start) for stage in (before, after)]
                for number, sample in enumerate(batch):
                    _judge(sample, [outcomes[number] for outcomes in kernel], self.sides, result)
        return result


def _judge(sample: Sample, kernel: list[Outcome], sides: Sides, result: Replayed) -> None:
    places = sides.before.places
    asked: list[str] = []
    numbers = {f"address of {name}": _number(UPLINK) for name in places.outside}
    predicted = [_predicted(sample, side, numbers, asked) for side in (sides.before, sides.after)]
    result.sent += 1
    if asked:
        result.skipped += 1
        return
    fits = all(_fits(outcome, expected) for outcome, (expected, _) in zip(kernel, predicted, strict=True))
    between = sample.entry in places.link_owner and _receiver(sample, places) != NOBODY
    if fits and (kernel[0] == kernel[1] or (between and all(outcome[0] != "out" for outcome in kernel))):
        return
    said = packet(sample, 4, {}, []).describe() | {"from": sample.entry}
    stories = [
        {"verdict": outcome[0], "kernel": outcome, "model": expected, "path": list(story.ledger.trace or ())}
        for outcome, (expected, story) in zip(kernel, predicted, strict=True)
    ]
    who = places.link_owner.get(sample.entry, NOBODY)
    name = places.tenants[who].name if who != NOBODY else ""
    result.differences.append({"tenant": name, "packet": said, "before": stories[0], "after": stories[1]})


def _fits(outcome: Outcome, expected: Outcome) -> bool:
    """Whether the kernel did what the model said. An answer from the far slot may be lost on its way back."""
    return outcome == expected or (expected == _REFUSED_FAR and outcome in (("answered",), ("nothing",)))


def _receiver(sample: Sample, places: Places) -> int:
    return places.owner_of(sample.values["dst"], 0xFFFFFFFF, 4)


def _predicted(sample: Sample, side: Side, numbers: dict[str, int], asked: list[str]) -> tuple[Outcome, Result]:
    """What the model says comes out."""
    way = Way(sample.entry, side.places.outside[0])
    one = packet(sample, 4, numbers, asked)
    result = Journey(side, way, one.number, trace=True).travel(one.flow())
    flow = result.flow
    if result.ledger.alive is not True:
        kind = next(kind for kind, when in result.ledger.denied.items() if when is True)
        if not kind.startswith("REJECT"):
            return ("nothing",), result
        if result.exit is not None and (result.ledger.trace or [""])[-1].startswith("slot"):
            return _REFUSED_FAR, result
        return (("answered",) if kind != "REJECT tcp-reset" or _answerable(sample) else ("nothing",)), result
    if result.exit == "":
        return (("answered",) if _answerable(sample) else ("nothing",)), result
    ports = (flow.sport, flow.dport) if flow.proto in (_TCP, _UDP) else (0, 0)
    return ("out", result.exit, flow.src, flow.dst, *ports), result


def _answerable(sample: Sample) -> bool:
    """Whether a host that such a packet is delivered to says anything: nothing to a reset or to an echo reply."""
    v = sample.values
    if v["proto"] == _TCP:
        return not v["flags"] & 4
    return v["proto"] != _ICMP or v["icmp_type"] == 8


def _number(address: str) -> int:
    return int.from_bytes(socket.inet_aton(address))


class _Stage:
    """One arrangement: namespaces, links, rules, and the wires' ends."""

    def __init__(self, places: Places, players: Sequence[int], arrangement: Arrangement | None, prefix: str) -> None:
        self._places, self._players, self._arrangement = places, players, arrangement
        self.root, self.world = f"{prefix}-root", f"{prefix}-world"
        self._slots = {tenant: f"{prefix}-slot{tenant}" for tenant in players} if arrangement else {}
        self.names: list[str] = []
        self._wires: dict[str, socket.socket] = {}
        self._macs: dict[str, bytes] = {}

    def build(self) -> None:
        for name in (self.root, self.world, *self._slots.values()):
            netns.create(name)
            self.names.append(name)
            _quiet(name)
        for number, tenant in enumerate(self._players):
            self._tenant(tenant, f"w{number}")
        lines = ["link set lo up", f"addr add {UPLINK}/24 dev lo"]
        for number, name in enumerate(self._places.outside):
            _ip(self.root, f"link add {name} type veth peer name o{number} netns {self.world}", f"link set {name} up")
            self._wire(f"o{number}", name, self.root, name)
        first = self._places.outside[0]
        lines += [f"addr add {UPLINK}/24 dev {first}", f"neigh add {_NEXT_HOP} lladdr 02:00:00:00:00:01 dev {first}"]
        lines += [f"addr add {address_text(value, 4)}/32 dev lo" for value in self._places.hosts[4]]
        lines.append(f"route add default via {_NEXT_HOP} dev {first}")
        lines.remove(f"addr add {UPLINK}/24 dev lo")
        _ip(self.root, *lines)
        for name in self.names:
            _proc(name, "net/ipv4/ip_forward", "1")

    def _tenant(self, tenant: int, wire: str) -> None:
        places = self._places
        link = places.link(tenant)
        own = [str(address) for address in places.addresses(tenant, 4)]
        slot = self._slots.get(tenant)
        if slot is None or self._arrangement is None:
            _ip(self.root, f"link add {link} type veth peer name {wire} netns {self.world}")
            self._wire(wire, link, self.root, link)
        else:
            up, guest = self._arrangement.uplink_if, self._arrangement.guest_if
            _ip(self.root, f"link add {link} type veth peer name {up} netns {slot}")
            _ip(slot, f"link add {guest} type veth peer name {wire} netns {self.world}")
            _ip(slot, f"link set {up} up", f"link set {guest} up", "link set lo up")
            hop = "169.254.77.1"
            _ip(
                slot,
                f"neigh add {hop} lladdr {_mac(self.root, link)} dev {up}",
                f"addr add 169.254.77.2/32 dev {up}",
                f"route add default via {hop} dev {up} onlink",
            )
            _ip(slot, *(f"route add {net} dev {guest}" for net in own))
            _ip(slot, *(f"neigh add {net.split('/')[0]} lladdr 02:00:00:00:00:02 dev {guest}" for net in own))
            self._wire(wire, link, slot, guest)
            group = self._arrangement.members[tenant].group
            _ip(self.root, f"link set {link} group {group}")
        _ip(self.root, f"link set {link} up")
        far = _mac(slot, self._arrangement.uplink_if) if slot and self._arrangement else "02:00:00:00:00:02"
        lines = [f"addr add {address_text(value, 4)}/32 dev {link}" for value in places.gateways[4][tenant]]
        lines += [f"route add {net} dev {link}" for net in own]
        lines += [f"neigh add {net.split('/')[0]} lladdr {far} dev {link}" for net in own]
        _ip(self.root, *lines)

    def _wire(self, wire: str, name: str, facing: str, device: str) -> None:
        """Bring up and open the outer end of a link, known by root's name for it."""
        _ip(self.world, f"link set {wire} up")
        fd = netns.open_named(self.world)
        try:
            sock = netns.run_in(fd, socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        finally:
            os.close(fd)
        sock.bind((wire, 0))
        sock.setblocking(False)
        self._wires[name] = sock
        self._macs[name] = bytes.fromhex(_mac(facing, device).replace(":", ""))

    def load(self, rules: str, published: str | None) -> None:
        """Root's rules, and those of every slot."""
        if published is not None:
            _inside(self.root, tables.nft, published)
        _inside(self.root, tables.restore, "legacy", 4, rules)
        for tenant, slot in self._slots.items():
            assert self._arrangement is not None
            member = self._arrangement.members[tenant]
            names = {"guest_if": self._arrangement.guest_if, "uplink_if": self._arrangement.uplink_if}
            template = self._arrangement.templates[member.kind].get(4)
            if template is not None:
                text = render(template, {**member.variables, **names}, file=member.kind)
                _inside(slot, tables.restore, "legacy", 4, text)

    def send(self, batch: Sequence[Sample], start: int) -> list[Outcome]:
        """Send these packets one after the other; what became of each. Connections are forgotten first."""
        for name in self.names:
            _inside(name, _forget)
        tags = {}
        for number, sample in enumerate(batch, start):
            tag = b"nslt" + struct.pack(">I", number)
            tags[tag] = number - start
            self._wires[sample.entry].send(self._macs[sample.entry] + b"\2\0\0\0\0\x99\x08\0" + _written(sample, tag))
        outcomes: list[Outcome] = [("nothing",)] * len(batch)
        deadline = time.monotonic() + 0.25
        sockets = {sock: name for name, sock in self._wires.items()}
        while (left := deadline - time.monotonic()) > 0:
            for sock in select.select(list(sockets), [], [], left)[0]:
                frame, origin = sock.recvfrom(65536)
                if origin[2] == socket.PACKET_OUTGOING or frame[12:14] != b"\x08\0":
                    continue
                found = _recognised(frame[14:], sockets[sock], tags, batch)
                if found is not None:
                    outcomes[found[0]] = found[1]
        return outcomes

    def close(self) -> None:
        for sock in self._wires.values():
            sock.close()
        for name in self.names:
            netns.unpin(name)


def _recognised(
    data: bytes, link: str, tags: dict[bytes, int], batch: Sequence[Sample]
) -> tuple[int, Outcome] | None:
    """Which packet this is, or which one it answers."""
    head, proto = (data[0] & 15) * 4, data[9]
    src, dst = int.from_bytes(data[12:16]), int.from_bytes(data[16:20])
    place = data.find(b"nslt", head)
    number = tags.get(data[place : place + 8]) if place >= 0 else None
    is_error = proto == _ICMP and data[head] in (3, 5, 11, 12)
    is_reply = proto == _ICMP and number is not None and data[head] == 0 and batch[number].values["icmp_type"] == 8
    if number is not None and not is_error and not is_reply:
        ports = struct.unpack_from(">HH", data, head) if proto in (_TCP, _UDP) else (0, 0)
        return number, ("out", link, src, dst, *ports)
    if number is not None:
        return number, ("answered",)
    if proto == _TCP and data[head + 13] & 4:  # a reset carries nothing but the ends that it answers
        sport, dport = struct.unpack_from(">HH", data, head)
        for index, sample in enumerate(batch):
            v = sample.values
            if (v["src"], v["sport"], v["dport"], v["proto"]) == (dst, dport, sport, _TCP) and sample.entry == link:
                return index, ("answered",)
    return None


def _written(sample: Sample, tag: bytes) -> bytes:
    v = sample.values
    ends = struct.pack(">II", v["src"], v["dst"])
    if v["proto"] == _TCP:
        body = struct.pack(">HHIIBBHHH", v["sport"], v["dport"], 1, 1, 5 << 4, v["flags"], 8192, 0, 0) + tag
        place = 16
    elif v["proto"] == _UDP:
        body = struct.pack(">HHHH", v["sport"], v["dport"], 8 + len(tag), 0) + tag
        place = 6
    else:
        body = struct.pack(">BBHHH", v["icmp_type"], v["icmp_code"], 0, v["sport"], 1) + tag
        place = 2
    covered = body if v["proto"] == _ICMP else ends + struct.pack(">HH", v["proto"], len(body)) + body
    body = body[:place] + struct.pack(">H", _checksum(covered) or 0xFFFF) + body[place + 2 :]
    head = struct.pack(">BBHHHBBH", 0x45, v["dscp"] << 2, 20 + len(body), 0, 0, v["ttl"], v["proto"], 0) + ends
    return head[:10] + struct.pack(">H", _checksum(head)) + head[12:] + body


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~int(total) & 0xFFFF


def _forget() -> None:
    from netslot.kernel import conntrack

    conntrack.flush()


def _inside(name: str, function: Any, *args: Any) -> Any:
    fd = netns.open_named(name)
    try:
        return netns.run_in(fd, function, *args)
    finally:
        os.close(fd)


def _ip(name: str, *lines: str) -> None:
    done = subprocess.run(
        ["ip", "-n", name, "-batch", "-"], input="\n".join(lines), text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise HostError(f"building the replay: {done.stderr.strip()}")


def _mac(name: str, device: str) -> str:
    def read() -> str:
        with contextlib.closing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as sock:
            sock.bind((device, 0))
            return str(sock.getsockname()[4].hex(":"))

    return str(_inside(name, read))


def _proc(name: str, path: str, value: str) -> None:
    def put() -> None:
        with open(f"/proc/sys/{path}", "w") as file:
            file.write(value)

    _inside(name, put)


def _quiet(name: str) -> None:
    """No source checks of the kernel's own, no limit on ICMP errors, no redirects, no IPv6 chatter."""
    for setting in ("all", "default"):
        _proc(name, f"net/ipv4/conf/{setting}/rp_filter", "0")
        _proc(name, f"net/ipv4/conf/{setting}/send_redirects", "0")
        _proc(name, f"net/ipv6/conf/{setting}/disable_ipv6", "1")
    _proc(name, "net/ipv4/icmp_ratelimit", "0")


@contextlib.contextmanager
def _stage(places: Places, players: Sequence[int], arrangement: Arrangement | None = None) -> Iterator[_Stage]:
    kind: Literal["b", "a"] = "b" if arrangement is None else "a"
    stage = _Stage(places, players, arrangement, f"nsr-{os.getpid()}-{kind}")
    try:
        stage.build()
        yield stage
    finally:
        stage.close()
