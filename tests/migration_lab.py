"""A played host with tenants in namespaces of their own, each behind a veth, and servers outside.

    root [tapN] -- [eth0] tenant's namespace                                 attachment process
    root [tapN] -- [eth0] tenant's namespace [in0] -- [eth0] workload        attachment veth
    root [tapN] -- [eth0] tenant's namespace [tap0] == [eth0] workload       attachment tap

Root's [eth0] leads outside, which owns 203.0.113.0/24 too. With ``families`` 6 and (4, 6) the IPv6 rules are the
IPv4 ones, said of mapped addresses.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lab import Net, nets
from netslot.host import tables
from netslot.kernel import tun
from netslot.rulesets.model import Dump, Ruleset
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import Verdict, prove
from netslot.rulesets.split import Split, split
from netslot.rulesets.tenants import Tenant, tenant_address
from synthetic_host import SyntheticHost, SyntheticTenant, make_host

OUTSIDE = "198.18.7.1"
UPLINK = "198.18.7.2"
_ADDRESS = re.compile(r"(?<![\d.:])(\d+\.\d+\.\d+\.\d+)(?:/(\d+))?")
_NEIGHBOURS = [f"-A INPUT -p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j ACCEPT" for kind in (133, 134, 135, 136)]


@dataclass
class PlayedHost:
    """``homes``: each tenant's namespace, by the tenant's name; ``guests``: where its workload is."""

    rules: SyntheticHost
    root: Net
    outside: Net
    homes: dict[str, Net]
    guests: dict[str, Net]
    families: Sequence[int]
    attachment: Attachment
    variant: str

    def save(self, family: int = 4, net: Net | None = None) -> str:
        """What iptables-save prints, with counters and without the lines that say when."""
        word = "iptables" if family == 4 else "ip6tables"
        text = (net or self.root).sh(f"{word}-{self.variant}-save -c")
        return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))

    def everything(self) -> dict[str, str]:
        """All rules of root and of every tenant's namespace."""
        places = {"root": self.root, **self.homes}
        return {f"{name} IPv{n}": self.save(n, net) for name, net in places.items() for n in self.families}

    def tenants(self) -> list[SyntheticTenant]:
        return self.rules.tenants


def address(text: str, family: int) -> str:
    """An address of the played host in this family."""
    return text if family == 4 else str(ipaddress.IPv6Address((0x2001_0DB8 << 96) | int(ipaddress.IPv4Address(text))))


def six(text: str) -> str:
    """IPv4 rules of the synthetic host, said of IPv6."""
    text = _ADDRESS.sub(lambda m: address(m[1], 6) + (f"/{96 + int(m[2])}" if m[2] else ""), text)
    text = re.sub(r"--to-destination (\S+):(\d+)$", r"--to-destination [\1]:\2", text, flags=re.MULTILINE)
    text = text.replace("-p icmp -m icmp --icmp-type 8", "-p ipv6-icmp -m icmp6 --icmpv6-type 128")
    text = text.replace("-p icmp ", "-p ipv6-icmp ").replace("icmp-port-unreachable", "icmp6-port-unreachable")
    return text.replace("-A INPUT -i lo -j ACCEPT", "\n".join(["-A INPUT -i lo -j ACCEPT", *_NEIGHBOURS]))


def load(net: Net, text: str, *tool: str) -> None:
    """Feed a text to a tool inside, iptables-legacy-restore unless said."""
    words = tool or ("iptables-legacy-restore",)
    subprocess.run(["nsenter", f"--net=/run/netns/{net.name}", *words], input=text, text=True, check=True)


def _mac(number: int, end: int) -> str:
    return f"02:00:{end:02x}:00:{number >> 8:02x}:{number & 255:02x}"


@dataclass
class Pump:
    """Carries frames between the taps of namespaces, as a virtual machine monitor does with its guest's."""

    pairs: dict[int, int] = field(default_factory=dict)
    _stop: tuple[int, int] = field(default_factory=os.pipe)

    def join(self, one: Net, name: str, other: Net, other_name: str) -> None:
        ends = []
        for net, link in ((one, name), (other, other_name)):
            net.run(tun.create_tap, link, vnet_hdr=False)
            ends.append(net.run(tun.open_tap, link))
            os.set_blocking(ends[-1], False)
        self.pairs |= {ends[0]: ends[1], ends[1]: ends[0]}

    def __enter__(self) -> Pump:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stop[1], b"x")
        self._thread.join()
        for fd in (*self.pairs, *self._stop):
            os.close(fd)

    def _run(self) -> None:
        poll = select.poll()
        for fd in (*self.pairs, self._stop[0]):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop[0]:
                    return
                with contextlib.suppress(OSError):  # a link that is down or full, as a wire would
                    os.write(self.pairs[fd], os.read(fd, 65536))


@contextlib.contextmanager
def played_host(
    tenants: int,
    style: str = "mixed",
    families: Sequence[int] = (4,),
    attachment: Attachment = "process",
    variant: str = "legacy",
) -> Iterator[PlayedHost]:
    """The host, with its rules loaded."""
    rules = make_host(tenants, style=style)
    # The synthetic host publishes a port that its own FORWARD denies; here it is one that it lets pass.
    rules = replace(rules, text=re.sub(r":8080$", ":8082", rules.text, flags=re.MULTILINE))
    inner = attachment != "process"
    roles = [f"t{number}" for number in range(tenants)] + [f"w{number}" for number in range(tenants if inner else 0)]
    with nets("root", "out", *roles) as (root, outside, *others), contextlib.ExitStack() as stack:
        homes, guests = others[:tenants], others[tenants:] or others[:tenants]
        _uplink(root, outside, families)
        if attachment == "tap":
            pump = Pump()
            for home, guest in zip(homes, guests, strict=True):
                pump.join(home, "tap0", guest, "eth0")
            stack.enter_context(pump)
        for number, (one, home, guest) in enumerate(zip(rules.tenants, homes, guests, strict=True)):
            _pair(root, home, one, number, families, inner)
            if attachment == "veth":
                home.ip(f"link add in0 type veth peer name eth0 netns {guest.name}")
            if inner:
                _inner(home, guest, one, number, families, "tap0" if attachment == "tap" else "in0")
        for net in (outside, root, *others):
            net.sysctl(ipv6__conf__eth0__router_solicitations=0)
        for family in families:
            word = "iptables" if family == 4 else "ip6tables"
            load(root, rules.text if family == 4 else six(rules.text), f"{word}-{variant}-restore")
        if 6 in families:
            for net in (outside, root, *others):
                net.wait_for_carrier("eth0")
        named = [{t.name: net for t, net in zip(rules.tenants, each, strict=True)} for each in (homes, guests)]
        yield PlayedHost(rules, root, outside, named[0], named[1], families, attachment, variant)


def _uplink(root: Net, outside: Net, families: Sequence[int]) -> None:
    root.ip(f"link add eth0 type veth peer name eth0 netns {outside.name}")
    for net, text in ((root, UPLINK), (outside, OUTSIDE)):
        net.ip(*(f"addr add {address(text, f)}/{_length(30, f)} dev eth0{_nodad(f)}" for f in families))
        net.ip("link set eth0 up")
    for f in families:
        network = f"{address('203.0.113.0', f)}/{_length(24, f)}"
        root.ip(f"route add {network} via {address(OUTSIDE, f)}")
        outside.ip(f"route add local {network} dev lo")
    root.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    outside.sysctl(ipv6__ip_nonlocal_bind=1)


def _length(length: int, family: int) -> int:
    return length if family == 4 else 96 + length


def _nodad(family: int) -> str:
    return " nodad" if family == 6 else ""


def _pair(root: Net, home: Net, one: SyntheticTenant, number: int, families: Sequence[int], inner: bool) -> None:
    """Root's link to a tenant's namespace; the tenant's addresses are there unless its workload is further in."""
    link = one.interface
    root.ip(
        f"link add {link} address {_mac(number, 1)} type veth peer name eth0 address {_mac(number, 2)}"
        f" netns {home.name}",
        *(f"addr add {address(one.gateway, f)}/{_length(30, f)} dev {link}{_nodad(f)}" for f in families),
        f"link set {link} up",
    )
    home.ip("link set eth0 up")
    for f in families:
        own, gateway = address(one.address, f), address(one.gateway, f)
        if inner:
            root.ip(f"neigh replace {own} lladdr {_mac(number, 2)} dev {link}")
            home.ip(
                f"route add {gateway} dev eth0",
                f"route add default via {gateway} dev eth0",
                f"neigh replace {gateway} lladdr {_mac(number, 1)} dev eth0",
            )
        else:
            home.ip(
                f"addr add {own}/{_length(30, f)} dev eth0{_nodad(f)}", f"route add default via {gateway} dev eth0"
            )


def _inner(home: Net, guest: Net, one: SyntheticTenant, number: int, families: Sequence[int], link: str) -> None:
    """The workload behind the tenant's namespace, which passes packets on."""
    home.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    home.ip(f"link set {link} address {_mac(number, 3)}", f"link set {link} up")
    guest.ip(f"link set eth0 address {_mac(number, 4)}", "link set eth0 up")
    for f in families:
        own, gateway = address(one.address, f), address(one.gateway, f)
        home.ip(f"route add {own} dev {link}", f"neigh replace {own} lladdr {_mac(number, 4)} dev {link}")
        guest.ip(
            f"addr add {own}/{_length(30, f)} dev eth0{_nodad(f)}",
            f"route add default via {gateway} dev eth0",
            f"neigh replace {gateway} lladdr {_mac(number, 3)} dev eth0",
        )


def same_bytes(host: PlayedHost, before: Mapping[str, str]) -> list[str]:
    """Where the host's rules are not, byte for byte, what :meth:`PlayedHost.everything` gave before.

    Legacy tables cannot be unmade: one that a namespace did not have may be there now, if it is empty.
    """
    wrong = []
    for name, text in host.everything().items():
        known = tables.by_table(before[name])
        now = {table: part for table, part in tables.by_table(text).items() if table in known or tables.plain(part)}
        if now != known or (name.startswith("root") and text != before[name]):
            wrong.append(f"{name}: {tables.difference(tables.plain(before[name]), tables.plain(text)) or 'counters'}")
    return wrong


def same_rules(host: PlayedHost, before: Mapping[str, str]) -> list[str]:
    """The same, with other counters."""
    now = host.everything()
    changed = {name: tables.difference(tables.plain(text), tables.plain(now[name])) for name, text in before.items()}
    return [f"{name}: {text}" for name, text in changed.items() if text]


def hush(host: PlayedHost) -> None:
    """Keep root's iptables from counting what links say whenever something about them changes (MLD reports)."""
    hooks = "prerouting", "output"
    chains = (
        f"chain {hook} {{ type filter hook {hook} priority -400; icmpv6 type mld2-listener-report drop; }}"
        for hook in hooks
    )
    load(host.root, "\n".join(["table ip6 lab {", *chains, "}", ""]), "nft", "-f", "-")


def still(host: PlayedHost) -> dict[str, str]:
    """All rules, at a time when no packet changes a counter: what new links have to say comes to an end."""
    before = host.everything()
    for _ in range(20):
        time.sleep(1.2)
        now = host.everything()
        if now == before:
            return now
        before = now
    raise AssertionError("packets keep coming")


def dump_of(host: PlayedHost) -> Dump:
    """Root's rules of now, parsed."""
    rulesets: list[Ruleset] = []
    for family in host.families:
        word = "iptables" if family == 4 else "ip6tables"
        rulesets += parse(host.root.sh(f"{word}-{host.variant}-save"), family=4 if family == 4 else 6).rulesets
    return Dump(tuple(rulesets))


def people(host: PlayedHost) -> list[Tenant]:
    """The tenants as a person would name them, each with its namespace."""
    return [
        Tenant(
            one.name,
            (one.interface,),
            tuple(tenant_address(address(one.address, f)) for f in host.families),
            netns=host.homes[one.name].name,
        )
        for one in host.tenants()
    ]


def split_host(host: PlayedHost) -> Split:
    """What ``netslot split`` makes of the host's rules of now."""
    return split(dump_of(host), people(host), attachment=host.attachment)


def prove_host(host: PlayedHost, files: Mapping[str, str]) -> Verdict:
    """Whether that is the same for every packet."""
    dump = dump_of(host)
    return prove(dump, survey(dump, people(host)), read(files))


class Traffic:
    """Allowed and denied traffic of all tenants that does not stop, in a process of its own.

    ``lines`` stay open; ``calls`` are new connections, ``questions`` datagrams with an answer: all must go through.
    ``denied`` datagrams and ``knocks`` (connections) must not. Everything is tried in every sweep.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.plan = plan
        path = directory / "traffic.json"
        path.write_text(json.dumps(plan))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("migration_traffic.py")), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def wake(self) -> None:
        """Let a second connection beside each line, silent since it was made, say something."""
        assert self._process.stdin is not None
        self._process.stdin.write("wake\n")
        self._process.stdin.flush()

    def end(self) -> Seen:
        """Stop, and what was seen."""
        answer, _ = self._process.communicate(timeout=60)
        return Seen(**json.loads(answer))

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


Plan = dict[str, dict[str, dict[str, Any]]]


def entry(near: str, to: str, port: int, far: str, answer: str = "", answer_port: int = 0) -> dict[str, Any]:
    """One thing to try: from namespace ``near`` to an address, where namespace ``far`` has it as ``answer``."""
    where = {"near": near, "address": to, "port": port}
    return {**where, "far": far, "answer": answer or to, "answer_port": answer_port or port}


@dataclass
class Seen:
    """As migration_traffic.py says."""

    sweeps: list[float]
    lost: dict[str, str]
    refused: dict[str, int]
    breaches: dict[str, int]

    def between(self, begin: float, end: float) -> int:
        """Whole sweeps between two times of the monotonic clock."""
        return sum(begin <= one and other <= end for one, other in pairwise(self.sweeps))


def plan_of(host: PlayedHost) -> Plan:
    """What all tenants of the host try."""
    plan: Plan = {kind: {} for kind in ("lines", "calls", "questions", "denied", "knocks")}
    for f in host.families:
        host.outside.ip(f"route replace {address('10.64.0.0', f)}/{_length(12, f)} via {address(UPLINK, f)}")
        for number, one in enumerate(host.tenants()):
            few = number < _BUSY
            for kind, name, entry in _tenants_plan(host, one, number, f, few):
                plan[kind][f"{one.name} IPv{f} {name}"] = entry
    return plan


_BUSY = 9
"""So many tenants do everything in every sweep; the others what is denied, and their lines."""


def _tenants_plan(
    host: PlayedHost, one: SyntheticTenant, number: int, f: int, few: bool
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, name, entry) of all that one tenant tries and that is tried with it."""
    guest, out, root = host.guests[one.name].name, host.outside.name, host.root.name
    own, gateway, uplink = (address(each, f) for each in (one.address, one.gateway, UPLINK))
    place = 20 * one.klass
    server = address(f"203.0.113.{place}", f)

    outward = entry(guest, server, 1000 + place, out)
    inward = entry(out, own, 8080 + one.klass, guest)
    published = entry(out, uplink, 30000 + int(one.name[3:]) % 30000, guest, own, 8082)
    yield "lines", "to a server", outward
    yield "lines", "from outside", inward
    yield "lines", "inside itself", entry(guest, _LOOPBACK[f], 7001, guest)
    if one.klass == 2:
        yield "lines", "published", published
    if few:
        yield "calls", "to a server", outward
        yield "calls", "from outside", inward
        yield "questions", "to the host", entry(guest, gateway, 53, root)
        yield "questions", "inside itself", entry(guest, _LOOPBACK[f], 7002, guest)
        if one.klass == 2:
            yield "calls", "published", published
        if one.klass:
            yield "questions", "to outside", entry(guest, address("203.0.113.201", f), 9000 + number, out)
    deaf = address("203.0.113.200", f)
    if one.klass == 0:
        yield "denied", "SSDP", {**entry(guest, deaf, 1900, out), "source": own}
        yield "denied", "to outside", {**entry(guest, deaf, 4321, out), "source": own}
    else:
        spoofed = address("10.99.0.1", f)
        host.guests[one.name].ip(f"addr add {spoofed}/{_length(32, f)} dev lo{_nodad(f)}")
        yield "denied", "spoofed", {**entry(guest, deaf, 4322, out), "source": spoofed}
    yield "denied", "to the host", {**entry(guest, gateway, 54, root), "source": own}
    yield "denied", "from outside", {**entry(out, own, 7, guest), "source": address(OUTSIDE, f)}
    neighbour = host.tenants()[number - 1]
    theirs = address(neighbour.address, f)
    yield "denied", "to a neighbour", {**entry(guest, theirs, 9, host.guests[neighbour.name].name), "source": own}
    if few:
        yield "knocks", "from outside", entry(out, own, 22, guest)
        yield "knocks", "to a neighbour", entry(guest, theirs, 23, host.guests[neighbour.name].name)


_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
