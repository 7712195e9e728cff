"""The bpf policy on real links with real connections."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import random
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lab
import packets as p
from netslot.errors import KernelError, SpecError, UsageError
from netslot.kernel import bpf, cgroupfs, elf, netlink, tc
from netslot.policy import addresses, bpf_parts
from netslot.policy import bpf as policy
from netslot.policy.bpf_parts import Filter, Place
from netslot.spec.policies import BpfFilter, BpfProgram, BpfSection

SOURCES = Path(policy.__file__).parent.parent / "bpf"
Slot = tuple[lab.Net, lab.Net, lab.Net]
FILTER = BpfSection(counters=True, filter=BpfFilter(allow="allow", deny="deny", ports="ports"))
OPEN = {"allow": ["0.0.0.0/0", "::/0"], "deny": [], "ports": ["tcp:7000", "udp:7000", "icmp"]}


@pytest.fixture
def slot() -> Iterator[Slot]:
    with lab.slot() as found:
        yield found


def test_connections_through_nat_both_families(slot: Slot) -> None:
    root, middle, guest = slot
    die = policy.cast(BpfSection(), nat=True, samples=[lab.VALUES], defaults={})
    assert not lab.connects(guest, lab.OUTSIDE4), "without NAT root knows no way back"
    middle.run(die.stamp, lab.VALUES)
    for outside, own, inner in ((lab.OUTSIDE4, lab.SLOT4, lab.GUEST4), (lab.OUTSIDE6, lab.SLOT6, lab.GUEST6)):
        server = lab.Echo(root, outside)
        assert lab.connects(guest, outside)
        assert server.tcp.accept()[1][0] == own, "the outside sees the slot's address"
        backwards = lab.Echo(guest, inner, 8000)
        assert lab.connects(root, own, 8000), "and reaches the guest by it"
        server.close()
        backwards.close()
    assert middle.sh("cat /proc/net/nf_conntrack 2>/dev/null", check=False) == "", "nothing is tracked"
    die.close()


def test_path_mtu_discovery_through_nat(slot: Slot) -> None:
    """Root's 'fragmentation needed' quotes the translated packet; the guest must believe it is about its own."""
    root, middle, guest = slot
    die = policy.cast(BpfSection(), nat=True, samples=[lab.VALUES], defaults={})
    middle.run(die.stamp, lab.VALUES)
    with lab.Net("far") as far:
        root.ip(
            f"addr del {lab.OUTSIDE4}/32 dev lo",
            f"link add out type veth peer name in netns {far.name}",
            "addr add 198.51.100.1/24 dev out",
            "link set out up mtu 1300",
        )
        root.sysctl(ipv4__ip_forward=1)
        far.ip(f"addr add {lab.OUTSIDE4}/24 dev in", "link set in up", "route add default via 198.51.100.1")
        far.ip("link set in mtu 1500")
        with guest.socket(socket.SOCK_DGRAM) as sender:
            mtu_discover, do, mtu = 10, 2, 14  # IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_MTU
            sender.setsockopt(socket.IPPROTO_IP, mtu_discover, do)
            sender.connect((lab.OUTSIDE4, 9))
            sender.send(bytes(1400))
            for _ in range(100):
                if sender.getsockopt(socket.IPPROTO_IP, mtu) == 1300:
                    break
                time.sleep(0.01)
            assert sender.getsockopt(socket.IPPROTO_IP, mtu) == 1300
    die.close()


def test_filter_counts_and_changes_in_force_at_once(slot: Slot) -> None:
    root, middle, guest = slot
    die = policy.cast(FILTER, nat=True, samples=[lab.VALUES], defaults={"allow": [], "deny": [], "ports": []})
    middle.run(die.stamp, lab.VALUES)
    server = lab.Echo(root, lab.OUTSIDE4)
    other = lab.Echo(root, lab.OUTSIDE4, 7001)
    assert not lab.connects(guest, lab.OUTSIDE4), "nothing is allowed by default"
    middle.run(die.bind, lab.VALUES, OPEN)
    assert lab.connects(guest, lab.OUTSIDE4)
    assert not lab.connects(guest, lab.OUTSIDE4, 7001), "a port that is not listed"
    assert middle.run(die.read, lab.VALUES, OPEN) == []
    denied = OPEN | {"deny": [f"{lab.OUTSIDE4}/32"]}
    assert [str(d) for d in middle.run(die.read, lab.VALUES, denied)] == [
        "bpf egress filter, IPv4: the list of prefixes is not the one that was bound"
    ]
    middle.run(die.bind, lab.VALUES, denied)
    assert not lab.connects(guest, lab.OUTSIDE4)
    out, _ = middle.run(policy.traffic, lab.VALUES)
    assert out.packets > out.passed_packets > 0
    middle.run(die.reset, lab.VALUES)
    out, back = middle.run(policy.traffic, lab.VALUES)
    assert (out.packets, back.packets) == (0, 0)
    assert middle.run(die.read, lab.VALUES, {}) == []
    server.close()
    other.close()
    die.close()


@pytest.mark.parametrize("ports", ["published", ("tcp:7000", "icmp")])
def test_ports_are_the_templates_or_a_parameters(slot: Slot, ports: str | tuple[str, ...]) -> None:
    root, middle, guest = slot
    given = {"allow": [lab.OUTSIDE4], "published": ["tcp:7000:80"]}
    section = BpfSection(filter=BpfFilter(allow="allow", ports=ports))
    die = policy.cast(section, nat=True, samples=[lab.VALUES], defaults=given)
    middle.run(die.stamp, lab.VALUES)
    servers = [lab.Echo(root, lab.OUTSIDE4, port) for port in (7000, 7001)]
    assert [lab.connects(guest, lab.OUTSIDE4, port) for port in (7000, 7001)] == [True, False]
    assert middle.run(die.read, lab.VALUES, given) == []
    for server in servers:
        server.close()
    die.close()


def attach_foreign() -> None:
    program = bpf_parts.load_program(bpf_parts.built_in("parse"), "parse_egress", {})
    with netlink.Socket() as sock:
        sock.execute([tc.set_filter(socket.if_nametoindex("up0"), tc.EGRESS, 50, program, "foreign")])
    os.close(program)


def test_read_names_what_was_changed(slot: Slot) -> None:
    _, middle, _ = slot
    die = policy.cast(FILTER, nat=True, samples=[lab.VALUES], defaults=OPEN)
    middle.run(die.stamp, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, OPEN) == []
    middle.sh("tc filter del dev up0 egress prio 20")
    assert [str(d) for d in middle.run(die.read, lab.VALUES, OPEN)] == [
        "bpf up0 egress 20: program netslot/nat is missing"
    ]
    middle.run(die.reset, lab.VALUES)
    other_slot = lab.VALUES | {"slot": "5", "address": "10.201.0.77"}
    other = policy.cast(BpfSection(), nat=True, samples=[lab.VALUES, other_slot], defaults={})
    middle.run(other.stamp, other_slot)
    found = [str(d) for d in middle.run(die.read, lab.VALUES, OPEN)]
    assert found == [
        "bpf up0 egress 20: program netslot/nat works with number 5, not 1",
        "bpf up0 ingress 20: program netslot/nat works with number 5, not 1",
    ]
    middle.run(attach_foreign)
    found = [str(d) for d in middle.run(die.read, lab.VALUES, OPEN)]
    assert "bpf up0 egress 50: program foreign is not the slot's" in found
    middle.run(die.reset, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, OPEN) == []
    other.close()
    die.close()


def verdict(program: int, destination: str, *, protocol: int = p.UDP, port: int = 9) -> bool:
    """Whether the filter lets a packet pass, by a test run with what the parser leaves in cb[0]."""
    six = ":" in destination
    source = "fd00::1" if six else "10.0.0.1"
    payload = p.udp(source, destination, 1, port, b"x")
    packet = (p.ipv6 if six else p.ipv4)(source, destination, protocol, payload)
    frame = p.ethernet("02:00:00:00:00:01", "02:00:00:00:00:02", p.ETH_P_IPV6 if six else p.ETH_P_IP, packet)
    context = bytes(48) + struct.pack("=I", (54 if six else 34) | protocol << 16)
    return bpf.prog_test_run(program, frame, context=context).verdict == -1


def expected(destination: str, lists: dict[int, list[str]], default: int) -> bool:
    """The same by the definition: the longest prefix decides, and DROP between equals."""
    address = ipaddress.ip_address(destination)
    best, answer = -1, default
    for value in sorted(lists):
        for text in lists[value]:
            network = ipaddress.ip_network(text, strict=False)
            if address in network and network.prefixlen > best:
                best, answer = network.prefixlen, value
    return answer == addresses.ACCEPT


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("version", [4, 6])
def test_the_longest_prefix_decides(seed: int, version: int) -> None:
    """Random nested lists; every boundary and its neighbours are asked."""
    chance = random.Random(seed)
    bits = 32 if version == 4 else 128
    make = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    base = chance.getrandbits(bits)

    def prefix() -> str:
        length = chance.choice([0, 1, 8, bits // 2, bits - 12, bits - 8, bits - 4, bits - 1, bits])
        number = (base + chance.getrandbits(chance.choice([4, 12, bits]))) % (1 << bits)
        return f"{make(number >> (bits - length) << (bits - length) if length else 0)}/{length}"

    for size in (0, 1, 2, 20, 300):
        allow, deny = [prefix() for _ in range(size)], [prefix() for _ in range(chance.choice([0, size // 2]))]
        section = BpfFilter(default=chance.choice(["drop", "accept"]), allow="allow", deny="deny" if deny else "")
        part = Filter(section, {})
        attachments = part.rebind({}, {"allow": allow, "deny": deny})
        program = {a.place: a.program for a in attachments}[Place(tc.EGRESS, 3 if version == 4 else 4)]
        lists = {addresses.DROP: deny, addresses.ACCEPT: allow}
        default = addresses.ACCEPT if section.default == "accept" else addresses.DROP
        asked = {0, (1 << bits) - 1, base}
        for text in chance.sample(allow + deny, min(8, len(allow) + len(deny))):
            network = ipaddress.ip_network(text)
            first, last = int(network.network_address), int(network.broadcast_address)
            asked |= {first, last, max(0, first - 1), min((1 << bits) - 1, last + 1)}
        for number in asked:
            destination = str(make(number))
            assert verdict(program, destination) == expected(destination, lists, default), (
                destination,
                lists,
                default,
            )
        for attachment in attachments:
            if attachment.owned:
                os.close(attachment.program)
        part.close()


@pytest.mark.parametrize("wrong", ["10.0.0.0/33", "10.0.0/8", "hello/8", "10.0.0.0/8/8", "10.0.0.0/-1", "10.0.0.0/"])
def test_a_wrong_prefix_is_named(wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong.replace(".", r"\.")):
        addresses.table4({addresses.ACCEPT: ["192.0.2.0/24", wrong]}, addresses.DROP)


@pytest.mark.skipif(
    not shutil.which("clang"), reason="NOT CHECKED: clang is not here to rebuild the BPF objects with"
)
def test_the_shipped_objects_are_built_from_the_shipped_sources(tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "-C", str(SOURCES), f"OUT={tmp_path}"], check=True)
    shipped = sorted(SOURCES.glob("*.o"))
    assert len(shipped) == len(list(SOURCES.glob("*.c"))) > 0
    for file in shipped:
        built, ours = elf.parse((tmp_path / file.name).read_bytes(), "built"), elf.parse(file.read_bytes(), "shipped")
        assert built == ours, f"{file.name} is not what its source gives: run make bpf"


USER_PROGRAM = """
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
char gpl[] SEC("license") = "GPL";
const volatile __u32 number;
const volatile __u32 outside;
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, __u64); }
limit SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, __u32); __type(value, __u32); }
ports SEC(".maps");
static __noinline int too_long(__u32 size, __u64 most) { return most && size > most; }
SEC("tc") int big(struct __sk_buff *skb) {
    __u32 zero = 0; __u64 *most = bpf_map_lookup_elem(&limit, &zero);
    return number == 1 && most && too_long(skb->len, *most) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}
SEC("cgroup/connect4") int connect(struct bpf_sock_addr *ctx) {
    struct { __u8 protocol, unused; __u16 port; } key = { .protocol = 6, .port = ctx->user_port };
    return ctx->user_ip4 != outside || bpf_map_lookup_elem(&ports, &key) ? 1 : 0;
}
"""


@pytest.fixture(scope="module")
def user_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("clang"):
        pytest.skip("NOT CHECKED: clang is not here to compile a user's program with")
    directory = tmp_path_factory.mktemp("bpf")
    (directory / "user.c").write_text(USER_PROGRAM)
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    command = ["clang", "-O2", "-g", "-target", "bpf", include, "-c", "user.c", "-o", "user.o"]
    subprocess.run(command, cwd=directory, check=True)
    return directory


def test_a_users_program_on_the_uplink(slot: Slot, user_object: Path) -> None:
    """Constants of the slot, a map that a parameter fills and that an update changes in place."""
    root, middle, guest = slot
    program = BpfProgram("user.o", "big", "egress", constants={"number": "${slot}"}, maps={"limit": "size"})
    die = policy.cast(
        BpfSection(programs=(program,)),
        nat=True,
        samples=[lab.VALUES],
        defaults={"size": ["0"]},
        directory=user_object,
    )
    middle.run(die.stamp, lab.VALUES)
    server = lab.Echo(root, lab.OUTSIDE4)
    sender = guest.socket(socket.SOCK_DGRAM)
    for size, passes in (("0", True), ("500", False), ("1200", True)):
        middle.run(die.bind, lab.VALUES, {"size": [size]})
        assert middle.run(die.read, lab.VALUES, {"size": [size]}) == []
        sender.sendto(b"x" * 1000, (lab.OUTSIDE4, 7000))
        if passes:
            assert len(server.udp.recv(2000)) == 1000
        else:
            with pytest.raises(TimeoutError):
                server.udp.recv(2000)
    assert middle.run(die.read, lab.VALUES, {"size": ["7"]}) != []
    sender.close()
    server.close()
    die.close()


def test_a_users_program_on_the_cgroup(slot: Slot, user_object: Path) -> None:
    root, middle, _ = slot
    path = f"netslot-test-{os.getpid()}/slot1"
    values = lab.VALUES | {"cgroup": path}
    program = BpfProgram(
        "user.o", "connect", "cgroup/connect4", constants={"outside": lab.ROOT4}, maps={"ports": "open"}
    )
    die = policy.cast(BpfSection(programs=(program,)), samples=[values], defaults={"open": []}, directory=user_object)
    cgroupfs.create(path, ())
    server = lab.Echo(root, lab.ROOT4)
    try:
        middle.run(die.stamp, values)
        connect = f"echo 0 > {cgroupfs.unified(path)}/cgroup.procs; exec bash -c ': < /dev/tcp/{lab.ROOT4}/7000'"
        with pytest.raises(AssertionError, match="Operation not permitted"):
            middle.sh(connect)
        middle.run(die.bind, values, {"open": ["tcp:7000"]})
        middle.sh(connect)
        assert middle.run(die.read, values, {"open": ["tcp:7000"]}) == []
        middle.run(die.reset, values)
        assert middle.run(die.read, values, {"open": []}) == []
        with cgroupfs.opened(cgroupfs.unified(path)) as target:
            assert len(bpf.prog_query(target, 10)) == 1, "the new program took the old one's place"
    finally:
        cgroupfs.kill_and_wait(path)
        cgroupfs.remove(path, ())
        cgroupfs.remove(str(Path(path).parent), ())
        server.close()
        die.close()


def test_what_is_wrong_with_a_program_is_said(user_object: Path) -> None:
    section = BpfSection(programs=(BpfProgram("user.o", "bigg", "egress"),))
    with pytest.raises(SpecError, match="has no program bigg"):
        policy.cast(section, samples=[lab.VALUES], defaults={}, directory=user_object)
    broken = elf.parse((user_object / "user.o").read_bytes(), "user.o").programs["big"].instructions[8:]
    with pytest.raises(KernelError, match=r"bpf prog_load broken: .*R1 type=scalar expected=map_ptr"):
        bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, broken, "GPL", name="broken")


MORE = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
char gpl[] SEC("license") = "GPL";
const volatile __u32 number;
const volatile __u8 mac[6];
struct prefix { __u32 length; __u32 address; };
struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(max_entries, 3); __uint(map_flags, BPF_F_NO_PREALLOC);
  __type(key, struct prefix); __type(value, __u32); } blocked SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2); __type(key, __u32); __type(value, __u16); }
  largest SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, __u32); }
  a_map_of_a_long_name SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, __u32); }
  a_map_of_a_long_name_too SEC(".maps");
static __noinline int twice(int value) { return value * 2; }
static __noinline int more_than(struct __sk_buff *skb, int least) { return skb->len > twice(least); }
static __noinline int again(struct __sk_buff *skb) { return skb->mark == 1; }
SEC("tc") int watch(struct __sk_buff *skb)
{
    struct prefix key = {32, number};
    if (more_than(skb, 1 << 20))
        return 2;
    __u32 zero = 0;
    __u16 *most = bpf_map_lookup_elem(&largest, &zero);
    return bpf_map_lookup_elem(&blocked, &key) || mac[0] || (most && *most && skb->len > *most) ? 2 : -1;
}
SEC("tc") int watch_back(struct __sk_buff *skb)
{
    struct prefix key = {32, number};
    if (again(skb))
        return 2;
    return bpf_map_lookup_elem(&blocked, &key) ? 2 : -1;
}
SEC("cgroup/connect4") int connecting(struct bpf_sock_addr *ctx) { return ctx->user_port != number; }
SEC("anything") int reads_too_far(struct __sk_buff *skb) { return *(__u32 *)((void *)skb + 1000); }
"""
KINDS = {"deny": "cidrs", "pub": "ports", "size": "int", "word": "text"}


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("clang") is None:
        pytest.skip("NOT CHECKED: clang is not here to compile a user's program with")
    directory = tmp_path_factory.mktemp("more")
    (directory / "more.c").write_text(MORE, encoding="utf-8")
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    command = ["clang", "-O2", "-g", "-target", "bpf", include, "-c", "more.c", "-o", "more.o"]
    subprocess.run(command, cwd=directory, check=True)
    return directory


@pytest.mark.parametrize(
    ("more_of_it", "key", "message"),
    [
        ({"program": "wacth"}, "program", "has no program wacth"),
        ({"constants": {"numbre": 1}}, "constants", "has no constant numbre"),
        ({"constants": {"number": 1 << 32}}, "constants.number", "does not fit 4 bytes"),
        ({"constants": {"number": "hello"}}, "constants.number", "'hello' does not fit 4 bytes"),
        ({"constants": {"number": "${address6}"}}, "constants.number", "is 16 bytes wide, not 4"),
        ({"constants": {"mac": "zz:00:00:00:00:00"}}, "constants.mac", "does not fit 6 bytes"),
        ({"constants": {"mac": "192.0.2.1"}}, "constants.mac", "is 4 bytes wide, not 6"),
        ({"maps": {"blokced": "deny"}}, "maps", "has no map blokced"),
        ({"maps": {"blocked": "size"}}, "maps.blocked", "an LPM trie: cidrs fills it, not int"),
        ({"maps": {"largest": "word"}}, "maps.largest", "an array: int or rate or mark fills it, not text"),
        ({"maps": {"largest": "pub"}}, "maps.largest", "an array: int or rate or mark fills it, not ports"),
        ({"maps": {"a_map_of_a_long_name": "size"}}, "maps.a_map_of_a_long_name", "one name to the kernel"),
        ({"program": "connecting"}, "hook", r"written for another hook: SEC\("),
        (
            {"program": "reads_too_far"},
            "hook",
            "the kernel refuses reads_too_far of more.o for this hook: .*invalid bpf_context access",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_a_program_is_said_with_its_place(
    more: Path, more_of_it: dict[str, object], key: str, message: str
) -> None:
    entry = {"object": "more.o", "program": "watch", "hook": "egress", **more_of_it}
    section = BpfSection(counters=True, programs=(BpfProgram(**entry),))  # type: ignore[arg-type]
    values = lab.VALUES | {"size": "9", "word": "blue"}
    with pytest.raises(SpecError, match=message) as caught:
        policy.cast(section, samples=[values], defaults={"deny": [], "pub": []}, kinds=KINDS, directory=more)
    assert caught.value.key == f"bpf.programs.0.{key}"


def test_values_of_a_lease_that_do_not_fit_a_map_change_nothing(slot: Slot, more: Path) -> None:
    """And a full map is emptied of what goes before it is filled with what comes."""
    _, middle, _ = slot
    program = BpfProgram("more.o", "watch", "egress", maps={"blocked": "deny", "largest": "size"})
    values = lab.VALUES | {"size": "1500"}
    old = {"deny": ["192.0.2.0/24", "198.51.100.0/24"]}
    die = policy.cast(
        BpfSection(programs=(program,)), samples=[values], defaults={"deny": []}, kinds=KINDS, directory=more
    )
    middle.run(die.stamp, values)
    middle.run(die.bind, values, old)
    with pytest.raises(
        SpecError, match="parameter deny does not fit map blocked: 4 entries, and there is room for 3"
    ):
        middle.run(die.bind, values, {"deny": [f"10.{n}.0.0/16" for n in range(4)]})
    with pytest.raises(SpecError, match="parameter size does not fit map largest: 70000 does not fit 2 bytes"):
        middle.run(die.bind, values | {"size": "70000"}, old)
    assert middle.run(die.read, values, old) == []
    new = {"deny": ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]}
    middle.run(die.bind, values | {"size": "0x10"}, new)
    assert middle.run(die.read, values | {"size": "16"}, new) == []
    die.close()


def test_the_same_program_with_other_constants_is_another_one(slot: Slot, more: Path) -> None:
    """The kernel's digest of a program leaves its constants out."""
    _, middle, _ = slot
    die, other = (
        policy.cast(
            BpfSection(programs=(BpfProgram("more.o", "watch", "egress", constants={"number": number}),)),
            samples=[lab.VALUES],
            defaults={},
            directory=more,
        )
        for number in (1, 2)
    )
    middle.run(die.stamp, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {}) == []
    middle.run(other.reset, lab.VALUES)
    assert [str(each) for each in middle.run(die.read, lab.VALUES, {})] == [
        "bpf watch: works with other constants than the slot's"
    ]
    middle.run(die.reset, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {}) == []
    die.close()
    other.close()


def _blocked(link: str, hook: int) -> bpf.MapInfo:
    """The map ``blocked`` of the first user's program on a hook of a link, in the calling thread's namespace."""
    with netlink.here() as sock:
        found = {f.hook: f.program for f in tc.filters(sock, socket.if_nametoindex(link)) if "user" in f.name}
    fd = bpf_parts.map_of(found[hook], "blocked")
    info = bpf.map_info(fd)
    os.close(fd)
    return info


def test_a_program_brings_the_functions_that_it_calls_and_no_others(more: Path) -> None:
    """The verifier refuses a function that nobody calls."""
    source = elf.parse((more / "more.o").read_bytes(), "more.o")
    sizes = {name: len(program.instructions) for name, program in source.programs.items()}
    assert sizes["connecting"] < 100, "it calls none"
    section = BpfSection(
        programs=(BpfProgram("more.o", "watch", "egress"), BpfProgram("more.o", "watch_back", "egress"))
    )
    policy.cast(section, samples=[lab.VALUES], defaults={}, directory=more).close()


def test_callbacks_are_refused(tmp_path: Path) -> None:
    if shutil.which("clang") is None:
        pytest.skip("NOT CHECKED: clang is not here to compile a user's program with")
    text = """
        #include <linux/bpf.h>
        #include <bpf/bpf_helpers.h>
        static long each(__u32 index, void *context) { return 0; }
        SEC("tc") int looped(struct __sk_buff *skb) { return bpf_loop(2, each, 0, 0); }
    """
    (tmp_path / "loop.c").write_text(text, encoding="utf-8")
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    subprocess.run(["clang", "-O2", "-g", "-target", "bpf", include, "-c", "loop.c"], cwd=tmp_path, check=True)
    with pytest.raises(UsageError, match=r"a function's address \(a callback\) is not supported"):
        elf.parse((tmp_path / "loop.o").read_bytes(), "loop.o")


def test_programs_of_one_file_share_its_maps_in_a_slot(slot: Slot, more: Path) -> None:
    _, middle, _ = slot
    entries = (
        BpfProgram("more.o", "watch", "egress", maps={"blocked": "deny"}),
        BpfProgram("more.o", "watch_back", "ingress"),
    )
    section = BpfSection(programs=entries)
    die, other = (
        policy.cast(section, samples=[lab.VALUES], defaults={"deny": []}, kinds=KINDS, directory=more)
        for _ in range(2)
    )
    middle.run(die.stamp, lab.VALUES)
    shared = {middle.run(_blocked, "up0", hook) for hook in (tc.EGRESS, tc.INGRESS)}
    assert len(shared) == 1, "one map"
    loaded = other._user.load(lab.VALUES, {"deny": []})  # type: ignore[union-attr]
    back = loaded[1]

    def replace() -> None:
        with netlink.here() as sock:
            index = socket.if_nametoindex("up0")
            sock.execute([tc.set_filter(index, back.place.hook, back.place.priority, back.program, back.name)])

    middle.run(replace)
    bpf_parts.close_all([each.program for each in loaded])
    assert [str(each) for each in middle.run(die.read, lab.VALUES, {"deny": []})] == [
        "bpf watch_back: map blocked is not that of the others of its file"
    ]
    middle.run(die.reset, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {"deny": []}) == []
    other.close()
    die.close()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([BpfProgram("more.o", "watch", "egress")] * 11, "bpf.programs.10.hook: more than 10 programs on egress"),
        ([BpfProgram("more.o", "connecting", "cgroup/connect4")] * 2, "bpf.programs.1.program: two programs called"),
        (
            [BpfProgram("more.o", name, "egress", maps={"blocked": name}) for name in ("watch", "watch_back")],
            "bpf.programs.1.maps.blocked: map blocked is one for all programs of its file",
        ),
        (
            [BpfProgram("more.o", "watch_back", "egress", maps={"largest": "size"})],
            "bpf.programs.0.maps.largest: watch_back does not use map largest",
        ),
    ],
    ids=["too many", "twice on a cgroup", "two parameters", "unused"],
)
def test_programs_that_cannot_be_together_are_refused(more: Path, entries: list[BpfProgram], message: str) -> None:
    """The eleventh had the place of the NAT: either of the two was gone."""
    with pytest.raises(SpecError, match=message):
        policy.cast(BpfSection(programs=tuple(entries)), samples=[lab.VALUES], defaults={}, directory=more)


def test_ten_programs_on_a_link_leave_the_nat_its_place(slot: Slot, more: Path) -> None:
    root, middle, guest = slot
    entries = (BpfProgram("more.o", "watch", "ingress"), *[BpfProgram("more.o", "watch", "egress")] * 10)
    die = policy.cast(BpfSection(programs=entries), nat=True, samples=[lab.VALUES], defaults={}, directory=more)
    middle.run(die.stamp, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {}) == []
    server = lab.Echo(root, lab.OUTSIDE4)
    assert lab.connects(guest, lab.OUTSIDE4)
    server.close()
    die.close()


def test_a_slot_beyond_what_a_program_can_be_told_is_refused(slot: Slot) -> None:
    """Of an attachment's number a program sees 16 bits: NAT would use another slot's address."""
    _, middle, _ = slot
    far = lab.VALUES | {"slot": "65537", "address": str(ipaddress.IPv4Address(lab.SLOT4) + 2 * 65536)}
    far.pop("address6", None)
    near = {name: value for name, value in lab.VALUES.items() if name in far}
    die = policy.cast(BpfSection(), nat=True, samples=[near, far], defaults={})
    middle.run(die.stamp, near)
    with pytest.raises(SpecError, match="slot 65537 is beyond"):
        middle.run(die.stamp, far)
    die.close()


def test_known_links_need_their_hooks_and_an_error_names_the_program(slot: Slot) -> None:
    _, middle, _ = slot
    index = middle.run(socket.if_nametoindex, "up0")
    die = policy.cast(BpfSection(), nat=True, samples=[lab.VALUES], defaults={}, links={"up0": index})
    assert policy.cast(BpfSection(counters=True), samples=[lab.VALUES], defaults={}).at_birth(lab.VALUES) == []
    with pytest.raises(KernelError, match=f"tc filter netslot/nat on link {index}"):
        middle.run(die.stamp, lab.VALUES)

    def prepare() -> None:
        with netlink.Socket() as sock:
            sock.execute(die.at_birth(lab.VALUES))

    middle.run(prepare)
    middle.run(die.stamp, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {}) == []
    middle.sh("tc qdisc del dev up0 clsact")
    middle.run(die.reset, lab.VALUES)
    assert middle.run(die.read, lab.VALUES, {}) == []
    die.close()


def loaded() -> set[int]:
    """The ids of all programs of netslot's that the kernel holds (BPF_PROG_GET_NEXT_ID)."""
    found: set[int] = set()
    number = 0
    while True:
        request = ctypes.create_string_buffer(struct.pack("=III", number, 0, 0), 12)
        try:
            bpf._bpf(11, request, "next program")
            number = struct.unpack_from("=I", request.raw, 4)[0]
            fd = bpf.prog_by_id(number)
        except KernelError as error:
            if error.operation == "next program":
                assert error.errno == errno.ENOENT
                return found
            continue  # it went between the two calls
        if bpf.prog_info(fd).name.startswith("ns_"):
            found.add(number)
        os.close(fd)


def test_nothing_is_left_when_the_slot_is_gone() -> None:
    before = loaded()
    with lab.slot() as (_, middle, _guest):
        die = policy.cast(FILTER, nat=True, samples=[lab.VALUES], defaults=OPEN)
        middle.run(die.stamp, lab.VALUES)
        middle.run(die.bind, lab.VALUES, OPEN | {"allow": ["10.0.0.0/8"]})
        assert len(loaded() - before) >= 7
        die.close()
        middle.ip("link del up0")
        for _ in range(200):
            if not loaded() - before:
                break
            subprocess.run(["sleep", "0.05"], check=True)
        assert not loaded() - before
