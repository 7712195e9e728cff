"""What a process in a slot tries besides sending packets: to change its rules, to pass them by, to get out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Without(Enum):
    """What takes the defence away, so that the same command must work."""

    CAPABILITIES = "it has no capability"
    USER = "it is a user of its own, not root"
    OWN_USER = "it is a user of its own, not another tenant's"
    TWIN = "capabilities count over what its own user namespace made, and it did not make the slot"


@dataclass(frozen=True)
class Way:
    """One command for the tenant's shell; it has worked if it says so by its exit status. ``twin`` is the same
    command, turned against something that is the tenant's own."""

    title: str
    family: str
    command: str
    without: Without
    backend: str = ""
    twin: str = ""

    def __str__(self) -> str:
        return f"{self.family} {self.title}".strip()


def _python(*lines: str) -> str:
    """Not the interpreter that runs the tests: tenants cannot read everybody's home."""
    return '/usr/bin/python3 -c "' + "; ".join(lines) + '"'


_NFNETLINK = _python(
    "import socket, struct",
    "s = socket.socket(16, 3, 12)",
    "m = lambda t, f, b: struct.pack('=IHHII', 16 + len(b), t, f, 1, 0) + b",
    "edge = struct.pack('>BBH', 0, 0, 10)",
    "new = struct.pack('>BBH', 2, 0, 0) + struct.pack('=HH', 8, 1) + b'own' + bytes(1)",
    "s.send(m(16, 1, edge) + m(0xA00, 0x405, new) + m(17, 1, edge))",
    "exit(-struct.unpack_from('=i', s.recv(999), 16)[0])",
)
_BPF = _python(
    "import ctypes, os",
    "c = ctypes.CDLL(None, use_errno=True)",
    "i = ctypes.create_string_buffer(bytes([0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0]))",
    "l = ctypes.create_string_buffer(b'GPL')",
    "import struct",
    "a = struct.pack('=IIQQIIQII', 3, 2, ctypes.addressof(i), ctypes.addressof(l), 0, 0, 0, 0, 0) + bytes(72)",
    "n = {'x86_64': 321, 'aarch64': 280}[os.uname().machine]",
    "exit(c.syscall(n, 5, a, len(a)) < 0)",
)
_TRACE = _python(
    "import ctypes",
    "c = ctypes.CDLL(None, use_errno=True)",
    "c.ptrace.argtypes = [ctypes.c_long] * 4",
    "exit(c.ptrace(0x4206, {pid}, 0, 0) < 0)",
)


def ways() -> Iterator[Way]:
    yield from _rules()
    for family, flag, network in (("IPv4", "", "192.0.2.0/24"), ("IPv6", "-6 ", "2001:db8:66::/64")):
        address = network.replace("0/24", "9/32").replace("::/64", "::9/128")
        path = f"/proc/sys/net/{family.lower()}/conf/all"
        setting = "accept_source_route" if family == "IPv4" else "seg6_enabled"
        route = f"ip {flag}route add blackhole {network}"
        caps = Without.CAPABILITIES
        yield Way("adds a route", family, route, caps)
        yield Way("adds an address", family, f"ip {flag}address add {address} dev up0", caps)
        neighbour = f"ip {flag}neigh replace {{root{6 if flag else 4}}} lladdr 0e:00:00:00:66:66 dev up0"
        yield Way("gives its next hop another MAC", family, neighbour, caps)
        yield Way("writes to /proc/sys/net", family, f"echo 1 > {path}/{setting}", Without.USER)
        kind = "socket.AF_INET6" if flag else "socket.AF_INET"
        raw = _python("import socket", f"socket.socket({kind}, socket.SOCK_RAW, 255)")
        yield Way("writes whole packets (raw socket)", family, raw, caps)
        mark = _python("import socket", f"socket.socket({kind}).setsockopt(1, 36, 7)")
        yield Way("marks its packets, for root's rules and routes", family, mark, caps)
        own, twin = f"unshare -Ur {route}", f"unshare -Urn {route}"
        yield Way("changes the slot as root of a user namespace", family, own, Without.TWIN, twin=twin)
    yield from _ways_out()


def _rules() -> Iterator[Way]:
    caps = Without.CAPABILITIES
    for variant in ("legacy", "nft"):
        for family, program in (("IPv4", "iptables"), ("IPv6", "ip6tables")):
            command = f"XTABLES_LOCKFILE=/dev/null {program}-{variant} -F OUTPUT"
            yield Way(f"changes its rules ({program}-{variant})", family, command, caps, f"iptables-{variant}")
    for family, table in (("IPv4", "ip slot"), ("IPv6", "ip6 slot")):
        yield Way("changes its rules (nft)", family, f"nft flush chain {table} output", caps, "nftables")
    yield Way("writes to nf_tables itself (netlink socket)", "", _NFNETLINK, caps)


def _ways_out() -> Iterator[Way]:
    caps, twin = Without.CAPABILITIES, Without.TWIN
    packet = _python("import socket", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)")
    yield Way("writes frames (packet socket)", "", packet, caps)
    yield Way("changes its link", "", "ip link set up0 mtu 1400", caps)
    yield Way("makes a link", "", "ip link add v8 type veth peer name v9", caps)
    yield Way("makes a tap", "", "ip tuntap add dev t9 mode tap", caps)
    yield Way("loads a BPF program", "", _BPF, caps)
    yield Way("hangs a queue on its link", "", "tc qdisc add dev up0 clsact", caps)
    yield Way("goes to root's namespace", "", "nsenter --net={root} true", caps)
    yield Way("goes to another tenant's namespace", "", "nsenter --net={neighbour} true", caps)
    yield Way("traces a process of root's", "", _TRACE.replace("{pid}", "{root_pid}"), caps)
    yield Way("traces a process of another tenant's", "", _TRACE.replace("{pid}", "{tenant_pid}"), Without.OWN_USER)
    yield Way("ends a process of another tenant's", "", "kill -0 {tenant_pid}", Without.OWN_USER)
    make = "unshare -Urn ip link add v8 type veth peer name v9"
    yield Way("puts a link of its own namespace into the slot", "", f"{make} netns $$", twin, twin=make)
    enter = "unshare -Urn nsenter --net={} true"
    into = enter.format("{root}")
    yield Way(
        "goes to root's namespace as root of a user namespace", "", into, twin, twin=enter.format("/proc/self/ns/net")
    )
