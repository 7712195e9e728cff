"""A hostile tenant's slot, built as netslot builds it, and the tenant's own ways to send what nobody should."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import lab
import packets as p
from netslot.host.plan import SlotPlan
from netslot.host.slots import Template, Workshop
from netslot.kernel import netns, tun
from netslot.policy import iptables
from netslot.policy.base import Die
from netslot.spec.load import parse
from netslot.spec.model import HostSpec

EXAMPLES = Path(__file__).parent.parent / "examples"
VNET_HEADER = bytes(10)
HOSTILE, VICTIM = 1, 2

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
backend = "iptables-legacy"
ipv4 = "slot.rules"
ipv6 = "slot.rules6"
"""


class Sender(Protocol):
    """The tenant's way out: takes IP packets, or whole frames where it has a link of its own."""

    def packet(self, packet: bytes, *, source_mac: str | None = None, to_mac: str | None = None) -> None: ...

    def close(self) -> None: ...


class TapSender:
    """A virtual machine monitor's end of the tap."""

    def __init__(self, tenant: Tenant) -> None:
        self._values = tenant.values
        self._fd = tenant.inside(tun.open_tap, tenant.values["guest_if"], vnet_hdr=True)

    def packet(self, packet: bytes, *, source_mac: str | None = None, to_mac: str | None = None) -> None:
        os.write(self._fd, VNET_HEADER + _frame(self._values, packet, source_mac, to_mac))

    def close(self) -> None:
        os.close(self._fd)


class VethSender:
    """Root in the container's own namespace, with a raw socket."""

    def __init__(self, tenant: Tenant) -> None:
        self._values = tenant.values
        assert tenant.plan.inner_netns is not None
        fd = netns.open_named(tenant.plan.inner_netns)
        self._socket = netns.run_in(fd, socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
        os.close(fd)
        self._socket.bind((tenant.plan.of.attachment.peer, 0))

    def packet(self, packet: bytes, *, source_mac: str | None = None, to_mac: str | None = None) -> None:
        self._socket.send(_frame(self._values, packet, source_mac, to_mac))

    def close(self) -> None:
        self._socket.close()


class ProcessSender:
    """A process in the slot's own namespace that was left CAP_NET_RAW: it writes whole IP packets."""

    def __init__(self, tenant: Tenant) -> None:
        ip_hdrincl, ipv6_hdrincl = 3, 36
        raw = socket.IPPROTO_RAW
        self._four = tenant.inside(socket.socket, socket.AF_INET, socket.SOCK_RAW, raw)
        self._four.setsockopt(socket.IPPROTO_IP, ip_hdrincl, 1)
        self._four.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._six = tenant.inside(socket.socket, socket.AF_INET6, socket.SOCK_RAW, raw)
        self._six.setsockopt(socket.IPPROTO_IPV6, ipv6_hdrincl, 1)
        self._scope = tenant.inside(socket.if_nametoindex, tenant.values["uplink_if"])

    def packet(self, packet: bytes, *, source_mac: str | None = None, to_mac: str | None = None) -> None:
        with suppress(PermissionError):  # how a rule in OUTPUT tells the sender that it dropped the packet
            if packet[0] >> 4 == 4:
                self._four.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
            else:
                destination = socket.inet_ntop(socket.AF_INET6, packet[24:40])
                self._six.sendto(packet, (destination, 0, 0, self._scope if packet[24] == 0xFF else 0))

    def close(self) -> None:
        self._four.close()
        self._six.close()


def _frame(values: dict[str, str], packet: bytes, source_mac: str | None, to_mac: str | None) -> bytes:
    kinds = {4: p.ETH_P_IP, 6: p.ETH_P_IPV6}
    kind = kinds.get(packet[0] >> 4, p.ETH_P_ARP)
    return p.ethernet(to_mac or values["gateway_mac"], source_mac or values["guest_mac"], kind, packet)


SENDERS: dict[str, Callable[[Tenant], Sender]] = {"tap": TapSender, "veth": VethSender, "process": ProcessSender}


@dataclass
class Tenant:
    """The hostile tenant: its slot's plan, the root namespace around it, and what watches root's end of its link."""

    kind: str
    plan: SlotPlan
    die: Die
    directory: Path
    root: lab.Net
    workshop: Workshop
    values: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = self.plan.values
        self._fd = netns.open_named(self.plan.netns)
        self.worker = netns.Worker(self._fd)
        self.sender = SENDERS[self.kind](self)
        self.watch = lab.Wire(self.root, self.plan.root_if)

    def inside(self, function: Callable[lab.P, lab.T], *args: lab.P.args, **kwargs: lab.P.kwargs) -> lab.T:
        return self.worker.run(function, *args, **kwargs)

    def sh(self, command: str) -> str:
        """Run a command in the slot."""
        where = f"--net=/run/netns/{self.plan.netns}"
        done = subprocess.run(["nsenter", where, "sh", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def remove_rules(self, *patterns: str) -> None:
        """Load the slot's rules without the lines that match; each pattern must take something away."""
        for name, command in (("slot.rules", "iptables-legacy-restore"), ("slot.rules6", "ip6tables-legacy-restore")):
            text = (self.directory / name).read_text()
            for key, value in self.values.items():
                text = text.replace(f"${{{key}}}", value)
            lines = text.splitlines()
            kept = [line for line in lines if not any(re.search(pattern, line) for pattern in patterns)]
            rules = "\n".join(kept) + "\n"
            where = f"--net=/run/netns/{self.plan.netns}"
            subprocess.run(["nsenter", where, command], input=rules, text=True, check=True)

    def restore(self) -> None:
        self.inside(self.die.reset, self.values)

    def leaves(self, marked: Callable[[bytes], bool], timeout: float) -> bool:
        """Whether a frame that ``marked`` knows comes out of the slot."""
        return self.watch.received(marked, timeout) is not None

    def close(self) -> None:
        self.sender.close()
        self.watch.close()
        self.worker.close()
        os.close(self._fd)


def load_spec(kind: str, directory: Path) -> HostSpec:
    """A host of two slots with the rules of the matching example."""
    example = EXAMPLES / ("process" if kind == "process" else "sandbox")
    for name in ("slot.rules", "slot.rules6"):
        shutil.copy(example / name, directory / name)
    file = directory / "netslot.toml"
    return parse(TOML.format(kind=kind, prefix=f"at{os.getpid() % 10000}{kind[0]}"), file)


def cast(spec: HostSpec, directory: Path) -> Die:
    samples = [spec.values(number) for number in (1, 2)]
    rules, rules6 = (directory / "slot.rules").read_text(), (directory / "slot.rules6").read_text()
    die = iptables.cast(rules, rules6, samples=samples)
    assert die.fallback is None, die.fallback
    return die


@contextmanager
def tenants(kind: str, directory: Path) -> Iterator[tuple[Tenant, SlotPlan]]:
    """The hostile tenant, and its neighbour's plan."""
    spec = load_spec(kind, directory)
    die = cast(spec, directory)
    with lab.Net("root") as root:
        root.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        root.ip("addr add 198.51.100.7/32 dev lo", "addr add 2001:db8::7/128 dev lo nodad")
        plans = [SlotPlan(spec, spec.classes["default"], number, "attack") for number in (HOSTILE, VICTIM)]
        workshop = root.run(Workshop)
        tenant = None
        try:
            for plan in plans:
                root.run(workshop.build, plan, Template([die], []))
            for _ in range(300):
                if "state UP" in root.sh(f"ip link show {plans[0].root_if}"):
                    break
                root.sh("sleep 0.01")
            tenant = Tenant(kind, plans[0], die, directory, root, workshop)
            yield tenant, plans[1]
        finally:
            if tenant is not None:
                tenant.close()
            for plan in plans:
                root.run(workshop.destroy, [plan.netns])
            root.run(workshop.close)
