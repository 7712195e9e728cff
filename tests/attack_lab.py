"""A hostile tenant on a host that `up` built, and everybody whom it may attack: root, the outside, a neighbour."""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import lab
import packets as p
from attack_rules import Ruleset
from netslot.host.host import Host
from netslot.host.plan import SlotPlan
from netslot.kernel import tun

EXAMPLES = Path(__file__).parent.parent / "examples"
VNET_HEADER = bytes(10)
OUTGOING = 4
"""The kind of packet (linux/if_packet.h) that a packet socket sees of its own namespace."""
HEARING = 0.02
"""Seconds to wait for an answer."""
HOSTILE, VICTIM = 1, 2
OUTSIDE, OUTSIDE6 = "198.51.100.7", "2001:db8::7"
HOST, HOST6 = "198.51.100.254", "2001:db8::fe"
"""The host's own addresses on its uplink, which the Internet knows."""
INTERNAL, INTERNAL6 = "203.0.113.200", "2001:db8:ad::1"
"""More addresses of the host, on another link: nothing in a slot's rules could know them."""

TOML = """\
slots = 2
prefix = "{prefix}"
uplink = "eth0"
[addresses]
pool = "10.201.0.0/24"
pool6 = "fd5c:a7e:10::/48"
dns = ["198.51.100.53", "2001:db8::53"]
[attachment]
kind = "{kind}"
[rules]
{rules}
[root]
backend = "{backend}"
[nat]
kind = "{nat}"
[limits]
hold_down = "0s"
"""


@dataclass(frozen=True)
class Kind:
    """One kind of host: what loads the rules of slots and root, how tenants are attached, what translates."""

    backend: str
    attachment: str
    nat: str = "rules"

    def __str__(self) -> str:
        return f"{self.attachment}-{self.backend}" + (f"-nat-{self.nat}" if self.nat != "rules" else "")


KINDS = [
    *(
        Kind(backend, attachment)
        for backend in ("iptables-legacy", "iptables-nft", "nftables")
        for attachment in ("tap", "veth", "process")
    ),
    *(Kind("nftables", attachment, nat) for nat in ("bpf", "nftables") for attachment in ("tap", "veth")),
]


class Sender(Protocol):
    """The tenant's ways out: IP packets, and whole frames."""

    def packet(self, packet: bytes, *, source_mac: str | None = None, to_mac: str | None = None) -> None: ...

    def frame(self, frame: bytes) -> None: ...

    def hears(self, wanted: Callable[[bytes], bool]) -> bool: ...

    def close(self) -> None: ...


class TapSender:
    """A virtual machine monitor's end of the tap."""

    def __init__(self, plan: SlotPlan, slot: lab.Place) -> None:
        self._values = plan.values
        self._fd = slot.run(tun.open_tap, plan.values["guest_if"], vnet_hdr=True)

    def packet(self, packet: bytes, *, source_mac: str | None = None, to_mac: str | None = None) -> None:
        self.frame(_ethernet(self._values, packet, source_mac, to_mac))

    def frame(self, frame: bytes) -> None:
        os.write(self._fd, VNET_HEADER + frame)

    def hears(self, wanted: Callable[[bytes], bool]) -> bool:
        """Whether a frame that ``wanted`` knows comes in now."""
        while select.select([self._fd], [], [], HEARING)[0]:
            if wanted(os.read(self._fd, 65536)[len(VNET_HEADER) :]):
                return True
        return False

    def close(self) -> None:
        os.close(self._fd)


class VethSender:
    """Root in the container's own namespace, with a packet socket."""

    def __init__(self, plan: SlotPlan, _: lab.Place) -> None:
        self._values = plan.values
        assert plan.inner_netns is not None
        with lab.Place(plan.inner_netns) as inner:
            self._wire = lab.Wire(inner, plan.of.attachment.peer)

    def packet(self, packet: bytes, *, source_mac: str | None = None, to_mac: str | None = None) -> None:
        self.frame(_ethernet(self._values, packet, source_mac, to_mac))

    def frame(self, frame: bytes) -> None:
        self._wire.send(frame)

    def hears(self, wanted: Callable[[bytes], bool]) -> bool:
        return self._wire.received(wanted, HEARING) is not None

    def close(self) -> None:
        self._wire.close()


class ProcessSender:
    """A process in the slot's own namespace that was left CAP_NET_RAW, which it should not have."""

    def __init__(self, plan: SlotPlan, slot: lab.Place) -> None:
        ip_hdrincl, ipv6_hdrincl = 3, 36
        raw = socket.IPPROTO_RAW
        self._four = slot.run(socket.socket, socket.AF_INET, socket.SOCK_RAW, raw)
        self._four.setsockopt(socket.IPPROTO_IP, ip_hdrincl, 1)
        self._four.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._six = slot.run(socket.socket, socket.AF_INET6, socket.SOCK_RAW, raw)
        self._six.setsockopt(socket.IPPROTO_IPV6, ipv6_hdrincl, 1)
        self._scope = slot.run(socket.if_nametoindex, plan.values["uplink_if"])
        self._wire = lab.Wire(slot, plan.values["uplink_if"])

    def packet(self, packet: bytes, *, source_mac: str | None = None, to_mac: str | None = None) -> None:
        """``source_mac`` and ``to_mac`` are the kernel's to choose, and not looked at."""
        with suppress(PermissionError):  # how a rule in OUTPUT tells the sender that it dropped the packet
            if packet[0] >> 4 == 4:
                self._four.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
            else:
                destination = socket.inet_ntop(socket.AF_INET6, packet[24:40])
                self._six.sendto(packet, (destination, 0, 0, self._scope if packet[24] == 0xFF else 0))

    def frame(self, frame: bytes) -> None:
        self._wire.send(frame)

    def hears(self, wanted: Callable[[bytes], bool]) -> bool:
        return self._wire.received(wanted, HEARING) is not None

    def close(self) -> None:
        for each in (self._four, self._six, self._wire):
            each.close()


def _ethernet(values: dict[str, str], packet: bytes, source_mac: str | None, to_mac: str | None) -> bytes:
    kinds = {4: p.ETH_P_IP, 6: p.ETH_P_IPV6}
    kind = kinds.get(packet[0] >> 4, p.ETH_P_ARP)
    return p.ethernet(to_mac or values["gateway_mac"], source_mac or values["guest_mac"], kind, packet)


SENDERS: dict[str, Callable[[SlotPlan, lab.Place], Sender]] = {
    "tap": TapSender,
    "veth": VethSender,
    "process": ProcessSender,
}


class Watch:
    """What comes in at one place; ``sockets`` see all of it."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = sockets
        self._kept: list[bytes] = []
        for each in sockets:
            each.setblocking(False)

    def take(self) -> list[bytes]:
        """What has come since the last time."""
        found, self._kept = self._kept, []
        for each in self._sockets:
            with suppress(BlockingIOError):
                while True:
                    frame, address = each.recvfrom(65536)
                    if each.family != socket.AF_PACKET or address[2] != OUTGOING:
                        found.append(frame)
        return found

    def keep(self) -> list[bytes]:
        """The same, and the next time again; what is not taken out soon enough is lost to the sockets' size."""
        self._kept = self.take()
        return self._kept

    def close(self) -> None:
        for each in self._sockets:
            each.close()


def arriving(net: lab.Place, link: str) -> Watch:
    """What comes in at one end of a link."""
    wire = net.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    wire.bind((link, 0))
    return Watch([wire])


def delivered(net: lab.Place) -> Watch:
    """What a namespace's own stack takes in, after all its rules: raw sockets of the protocols that attacks use."""
    protocols = {socket.AF_INET: (p.UDP, p.TCP, p.ICMP), socket.AF_INET6: (p.UDP, p.TCP, p.ICMPV6)}
    return Watch(
        [
            net.run(socket.socket, family, socket.SOCK_RAW, protocol)
            for family, each in protocols.items()
            for protocol in each
        ]
    )


class Scene:
    """A host, its hostile tenant, and what can be seen of the tenant's success; ``of`` says which kind of host."""

    def __init__(self, of: Kind, host: Host, root: lab.Net, outside: lab.Net, held: ExitStack) -> None:
        self.of, self.host, self.root, self.outside = of, host, root, outside
        self.plan, self.victim = (host.engine.plan(number, "default") for number in (HOSTILE, VICTIM))
        self.values = self.plan.values
        self.slot = held.enter_context(lab.Place(self.plan.netns))
        self.neighbour = held.enter_context(lab.Place(self.victim.netns))
        self.sender = SENDERS[of.attachment](self.plan, self.slot)
        held.callback(self.sender.close)
        self.honest = SENDERS[of.attachment](self.victim, self.neighbour)
        held.callback(self.honest.close)
        self.seen = {
            "outside": arriving(outside, "eth0"),
            "link": arriving(root, self.plan.root_if),
            "neighbour": arriving(self.neighbour, self.victim.uplink_if),
            "root": delivered(root),
            "slot": delivered(self.slot),
        }
        for each in self.seen.values():
            held.callback(each.close)
        self.other = (self.slot, self.plan.guest_if) if self.plan.guest_if else (root, self.plan.root_if)
        """Who is at the other end of the tenant's link, and its name there; root, if the tenant is in the slot."""
        self.rules = {"slot": Ruleset(of.backend, self.slot), "root": Ruleset(of.backend, root)}

        self.gone: set[str] = set()
        """What was taken away and is to be put back by :meth:`mend`."""

    def own(self, six: bool) -> str:
        """The address that an honest workload would send from."""
        key = "guest_address" if self.plan.guest_if else "address"
        return self.values[key + "6" if six else key]

    def its_own(self, six: bool) -> str:
        """The neighbour's."""
        return self.own(six) if self.plan.guest_if else self.victim.values["address6" if six else "address"]

    def gateway(self, six: bool) -> str:
        """The tenant's next hop."""
        key = "gateway" if self.plan.guest_if else "root_address"
        return self.values[key + "6" if six else key]

    def send(self, *packets: bytes, source_mac: str | None = None, to_mac: str | None = None) -> None:
        for packet in packets:
            self.sender.packet(packet, source_mac=source_mac, to_mac=to_mac)

    def macs(self) -> tuple[str, str]:
        """(the tenant's own, its next hop's) on the link that it can write frames to."""
        ends = ("guest_mac", "gateway_mac") if self.plan.guest_if else ("uplink_mac", "root_mac")
        return self.values[ends[0]], self.values[ends[1]]

    def mend(self) -> None:
        """Put everything back that was taken away, as an operator would."""
        report = self.host.verify(repair=True)
        assert not report.unrepaired, report
        self.gone.clear()
        for rules in self.rules.values():
            rules.mended()


def _spec(of: Kind, directory: Path) -> Path:
    """A host of two slots with the rules of the matching example."""
    source = EXAMPLES / ("process" if of.attachment == "process" else "sandbox")
    files = {"nft": "slot6.nft"} if of.backend == "nftables" else {"ipv4": "slot.rules", "ipv6": "slot.rules6"}
    for name in files.values():
        shutil.copy(source / name, directory / name)
    if of.nat != "rules":
        file = directory / files["nft"]
        file.write_text(_without_nat(file.read_text(), tracked=of.nat == "bpf"))
    rules = "\n".join([f'backend = "{of.backend}"', *(f'{key} = "{name}"' for key, name in files.items())])
    prefix = f"at{os.getpid() % 10000}{of.attachment[0]}"
    text = TOML.format(prefix=prefix, kind=of.attachment, rules=rules, backend=of.backend, nat=of.nat)
    spec = directory / "netslot.toml"
    spec.write_text(text)
    return spec


def _without_nat(text: str, *, tracked: bool) -> str:
    """The example's rules without what translates; and where nothing is tracked, without what asks for states."""
    text = re.sub(r"\n\tchain (in|out)bound_nat \{.*?\n\t\}", "", text, flags=re.DOTALL)
    return (
        text if tracked else "".join(line for line in text.splitlines(True) if " ct state" not in f" {line.strip()}")
    )


@contextmanager
def scene(of: Kind, directory: Path) -> Iterator[Scene]:
    """A host of this kind, brought up as an operator would, with a tenant in slot 1 and its neighbour in slot 2."""
    directory.mkdir()
    with lab.nets("root", "outside") as (root, outside), ExitStack() as held:
        _wire(root, outside)
        host = held.enter_context(Host(directory / "state", root_netns=root.name))
        held.callback(lambda: host.exists and host.down(force=True))
        host.up(_spec(of, directory))
        host.lease("mallory")
        host.lease("alice")
        with host.engine.holding(HOSTILE):
            pass  # what a host opens when it first needs it, and keeps open, is no test's to close
        root.wait_for_carrier(host.engine.plan(HOSTILE, "default").root_if)
        yield Scene(of, host, root, outside, held)


def _wire(root: lab.Net, outside: lab.Net) -> None:
    root.ip(
        f"link add eth0 address 02:00:00:00:00:01 type veth"
        f" peer name eth0 address 02:00:00:00:00:02 netns {outside.name}",
        f"addr add {HOST}/24 dev eth0",
        f"addr add {HOST6}/64 dev eth0 nodad",
        f"addr add {INTERNAL}/32 dev lo",
        f"addr add {INTERNAL6}/128 dev lo nodad",
        "link set eth0 up",
        *(f"neigh add {address} lladdr 02:00:00:00:00:02 dev eth0" for address in (OUTSIDE, OUTSIDE6)),
        f"route add default via {OUTSIDE}",
        f"route add default via {OUTSIDE6}",
    )
    outside.ip(
        f"addr add {OUTSIDE}/24 dev eth0",
        f"addr add {OUTSIDE6}/64 dev eth0 nodad",
        "link set eth0 up",
        *(f"neigh add {address} lladdr 02:00:00:00:00:01 dev eth0" for address in (HOST, HOST6)),
    )
    for net in (root, outside):
        net.wait_for_carrier("eth0")
