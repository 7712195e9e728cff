"""The nftables policy on a real kernel: what a stamp leaves is what the tool would have left, and acts like it."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

import iptables_collection
from netslot.errors import SpecError, UsageError
from netslot.kernel import netns
from netslot.kernel import nf_tables as nf
from netslot.policy import nftables
from netslot.policy.base import Values
from netslot.policy.nft_cast import make_devices
from netslot.policy.nft_programs import NftProgram
from netslot.policy.nftables import NftablesDie
from netslot.spec import load as spec_load
from nft_collection import FILES, values

T = TypeVar("T")
SAMPLES = [values(slot) for slot in (1, 400, 77, 222)]
EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*/netslot*.toml"))
# What a kernel may be built without, or wants an object that is not there.
ABSENT_ON_SOME_KERNELS = (
    *("queue num", " last\n", "ibrname", "ct helper h", "secmark", "flowtable", "osf", "tproxy"),
    *("ipvs", "nfacct", "-j LED", "SECMARK", "CLUSTERIP", "--timeout long", "connlabel"),
)
# The tool rounds or counts in a way that no encoding expresses; these are loaded by the tool in each slot.
NOT_STAMPED = ("--limit ${slot}/minute", "--every ${slot}", '--string "a ${name}"')


@pytest.fixture(scope="module")
def worker() -> Iterator[netns.Worker]:
    with netns.Worker() as made:
        yield made


def in_fresh(worker: netns.Worker, function: Callable[[], T]) -> T:
    """Call ``function`` in a namespace of its own, with loopback up."""

    def call() -> T:
        with netns.fresh():
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            return function()

    return worker.run(call)


def listed() -> str:
    """What nft lists in the calling thread's namespace; the time left of elements is blanked."""
    text = nft("list", "ruleset")
    return re.sub(r" expires \w+", "", text)


def nft(*words: str) -> str:
    return subprocess.run(["nft", *words], capture_output=True, text=True, check=True).stdout


def saved(tool: str) -> list[str]:
    text = subprocess.run([f"{tool}-nft-save"], capture_output=True, text=True, check=True).stdout
    return [line for line in text.splitlines() if not line.startswith("#")]


def words(die: NftablesDie, slot: Values, **parameters: list[str]) -> list[str]:
    return [str(difference) for difference in die.read(slot, parameters)]


def chunks(items: Sequence[T]) -> list[Sequence[T]]:
    """Several to a test: what each test makes sure of at its end costs more than a statement."""
    return [items[at : at + 16] for at in range(0, len(items), 16)]


def optional(text: str) -> bool:
    return any(word in text for word in ABSENT_ON_SOME_KERNELS)


@pytest.mark.parametrize("texts", chunks([text for text in FILES if not optional(text)]))
def test_every_statement(worker: netns.Worker, texts: Sequence[str]) -> None:
    for text in texts:
        stamps_like_the_tool(worker, text)


@pytest.mark.parametrize("text", [text for text in FILES if optional(text)])
def test_statements_that_not_every_kernel_has(worker: netns.Worker, text: str) -> None:
    try:
        stamps_like_the_tool(worker, text)
    except SpecError as error:
        pytest.skip(f"not on this machine: {error}")


def stamps_like_the_tool(worker: netns.Worker, text: str) -> None:
    slot, program = values(321), NftProgram(text, "slot.nft")

    def loaded() -> str:
        make_devices(program.devices(slot), 300)
        program.load(slot, {})
        return listed()

    wanted = in_fresh(worker, loaded)
    die = nftables.cast(text, samples=SAMPLES)
    assert die.fallback is None, text

    def stamped() -> list[object]:
        make_devices(program.devices(slot), 30)
        die.stamp(slot)
        found: list[object] = [listed(), die.read(slot, {})]
        die.reset(slot)
        return [*found, listed(), die.read(slot, {})]

    assert in_fresh(worker, stamped) == [wanted, [], wanted, []]


IPTABLES = iptables_collection.collection()


@pytest.mark.parametrize("rules", chunks([rule for rule in IPTABLES if not optional(rule[2])]))
def test_every_match_and_target_of_iptables(worker: netns.Worker, rules: Sequence[tuple[str, str, str]]) -> None:
    for rule in rules:
        restores_like_the_tool(worker, *rule)


@pytest.mark.parametrize("rule", [rule for rule in IPTABLES if optional(rule[2])])
def test_extensions_that_not_every_kernel_has(worker: netns.Worker, rule: tuple[str, str, str]) -> None:
    try:
        restores_like_the_tool(worker, *rule)
    except SpecError as error:
        pytest.skip(f"not on this machine: {error}")


def restores_like_the_tool(worker: netns.Worker, tool: str, table: str, rule: str) -> None:
    text = iptables_collection.file_of(table, rule)
    files = ("", text) if tool == "ip6tables" else (text, None)
    slots = [iptables_collection.VALUES, iptables_collection.OTHER]
    die = nftables.cast_iptables(*files, samples=slots, lists={"allow": "cidrs"})
    assert (die.fallback is not None) == any(part in rule for part in NOT_STAMPED), (rule, die.fallback)
    program = die._program

    def stamped(slot: Values) -> tuple[list[str], list[str]]:
        die.stamp(slot)
        return saved(tool), words(die, slot)

    def restored(slot: Values) -> tuple[list[str], list[str]]:
        program.prepare()
        program.load(slot, {})
        return saved(tool), []

    for slot in slots:
        assert in_fresh(worker, partial(stamped, slot)) == in_fresh(worker, partial(restored, slot))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_examples_in_random_slots(worker: netns.Worker, path: Path) -> None:
    spec = spec_load.load(path)
    each = next(iter(spec.classes.values()))
    if each.rules is None or each.rules.backend != "nftables" or each.rules.nft is None:
        pytest.skip("its rules are not for nftables")
    samples = [spec.values(slot) for slot in (1, spec.slots, spec.slots // 2)]
    die = nftables.cast(each.rules.nft.text, samples=samples, lists=each.lists)
    program = NftProgram(each.rules.nft.text, "slot.nft")
    assert die.fallback is None

    def stamped(slot: Values) -> tuple[str, list[str]]:
        die.stamp(slot)
        return listed(), words(die, slot)

    def loaded(slot: Values) -> tuple[str, list[str]]:
        program.load(slot, {})
        return listed(), []

    for number in random.sample(range(1, spec.slots + 1), 5):
        slot = spec.values(number)
        assert in_fresh(worker, partial(stamped, slot)) == in_fresh(worker, partial(loaded, slot)), number


def large_ruleset() -> str:
    chains = "".join(
        f" chain c{n} {{\n"
        + "".join(f"  ip saddr 10.{n}.{m}.0/24 tcp dport {{ {m + 1}, {m + 300} }} counter drop\n" for m in range(20))
        + " }\n"
        for n in range(20)
    )
    elements = ", ".join(f"10.{n // 256}.{n % 256}.0/24" for n in range(0, 6000, 2))
    jumps = ", ".join(f"10.9.0.{n} : jump c{n}" for n in range(20))
    return (
        f"table inet big {{\n set nets {{\n  type ipv4_addr; flags interval\n  elements = {{ {elements} }}\n }}\n"
        f"{chains}"
        f" chain f {{\n  type filter hook forward priority 0; policy drop;\n  ip saddr @nets accept\n"
        f"  ip daddr vmap {{ {jumps} }}\n  ip saddr ${{address}} accept\n }}\n}}\n"
    )


def test_a_large_ruleset(worker: netns.Worker) -> None:
    die = nftables.cast(large_ruleset(), samples=SAMPLES)
    assert die.fallback is None
    assert die.rules == 403

    def stamped() -> tuple[str, list[str]]:
        die.stamp(values(9))
        return listed(), words(die, values(9))

    def loaded() -> tuple[str, list[str]]:
        NftProgram(large_ruleset(), "x").load(values(9), {})
        return listed(), []

    assert in_fresh(worker, stamped) == in_fresh(worker, loaded)


SMALL = """table inet fw {
	set allow {
		type ipv4_addr
		flags interval
	}
	set allow6 {
		type ipv6_addr
		flags interval
	}
	map publish {
		type inet_proto . inet_service : ipv4_addr . inet_service
	}
	set seen {
		type ipv4_addr
		flags dynamic,timeout
		timeout 1h
		size 100
	}
	set static {
		type ipv4_addr
		elements = { ${address}, 192.0.2.1 }
	}
	counter total {
	}
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		dnat ip to ip protocol . th dport map @publish
	}
	chain output {
		type filter hook output priority filter; policy accept;
		udp dport ${port} counter accept
		udp dport 9000-9100 ip daddr != @allow drop
		udp dport 9000-9100 add @seen { ip daddr } counter name total
		udp dport 9200 limit rate 1/hour burst 3 packets counter accept
		udp dport 9200 drop
		tcp dport { 25, 465 } drop
	}
}
"""
LISTS = {"allow": "cidrs", "publish": "ports"}
SLOT = {**values(7), "port": "7000", "guest_address": "172.16.0.2"}


@pytest.fixture(scope="module")
def small() -> NftablesDie:
    samples = [{**values(slot), "port": "7000", "guest_address": "172.16.0.2"} for slot in (1, 400, 77)]
    return nftables.cast(SMALL, samples=samples, lists=LISTS, scalars=["port"])


def udp_pair(address: str, port: int) -> tuple[socket.socket, socket.socket]:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((address, port))
    receiver.setblocking(False)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return receiver, sender


def arrives(address: str, port: int) -> bool:
    """Whether a datagram over loopback arrives; it is there, or not, when the call that sends it returns."""
    receiver, sender = udp_pair(address, port)
    with closing(receiver), closing(sender):
        try:
            sender.sendto(b"x", (address, port))
            return receiver.recv(10) == b"x"
        except (BlockingIOError, PermissionError):
            return False


SEEDED = [
    ("flush chain inet fw output", "nftables inet fw output: rule 1 of 6 missing"),
    ("insert rule inet fw output accept", "nftables inet fw output: rule added at the beginning"),
    ("add rule inet fw output accept", "nftables inet fw output: rule added after rule 6 of 6"),
    ("add element inet fw static { 192.0.2.7 }", "nftables inet fw: set static: element 192.0.2.7 added"),
    ("delete element inet fw static { 192.0.2.1 }", "nftables inet fw: set static: element 192.0.2.1 missing"),
    ("add element inet fw allow { 192.0.2.0/24 }", "nftables inet fw: set allow: element 192.0.2.0 added"),
    ("add chain inet fw output { policy drop; }", "nftables inet fw: chain output: policy is drop, should be accept"),
    ("add table ip other", "nftables ip other: foreign table"),
    ("add chain inet fw new", "nftables inet fw: chain new: foreign chain"),
    ("add set inet fw more { type mark; }", "nftables inet fw: set more: foreign set"),
    ("add counter inet fw more", "nftables inet fw: object more: foreign object"),
    ("delete table inet fw", "nftables inet fw: table missing"),
    ("flush ruleset", "nftables inet fw: table missing"),
    ("add table inet fw { flags dormant; }", "nftables inet fw: table changed"),
]


@pytest.mark.parametrize(("command", "expected"), SEEDED)
def test_read_names_every_change_and_reset_undoes_it(
    worker: netns.Worker, small: NftablesDie, command: str, expected: str
) -> None:
    def act() -> None:
        small.stamp(SLOT)
        fresh, generation = listed(), small.generation()
        assert words(small, SLOT) == []
        nft(*command.split(" "))
        assert expected in words(small, SLOT)
        assert expected in [str(d) for d in small.read(SLOT, {}, known_generation=generation)]
        small.reset(SLOT)
        assert words(small, SLOT) == []
        assert listed() == fresh

    in_fresh(worker, act)


def test_a_changed_rule_is_named(worker: netns.Worker, small: NftablesDie) -> None:
    def act() -> None:
        small.stamp(SLOT)
        handle = re.search(r"th dport map @publish # handle (\d+)", nft("-a", "list", "ruleset"))
        assert handle
        nft("replace", "rule", "inet", "fw", "prerouting", "handle", handle[1], "accept")
        assert words(small, SLOT) == ["nftables inet fw prerouting: rule 1 of 1 changed"]

    in_fresh(worker, act)


def test_reset_forgets_what_packets_did(worker: netns.Worker, small: NftablesDie) -> None:
    def act() -> None:
        small.stamp(SLOT)
        fresh = listed()
        small.bind(SLOT, {"allow": ["127.0.0.0/8"]})
        assert arrives("127.0.0.1", 9001)
        assert [arrives("127.0.0.1", 9200) for _ in range(5)] == [True] * 3 + [False] * 2
        assert "packets 1" in listed()
        assert "127.0.0.1" in nft("list", "set", "inet", "fw", "seen")
        assert words(small, SLOT, allow=["127.0.0.0/8"]) == []  # what packets change is no drift
        small.reset(SLOT)
        assert listed() == fresh
        assert [arrives("127.0.0.1", 9200) for _ in range(4)] == [True] * 3 + [False]  # the limit is full again
        assert not arrives("127.0.0.1", 9001)  # and the list empty

    in_fresh(worker, act)


def test_lists_decide_about_packets(worker: netns.Worker, small: NftablesDie) -> None:
    def act() -> None:
        small.stamp(SLOT)
        for networks, good, bad in (
            (["0.0.0.0/0"], "127.0.0.1", None),
            (["127.0.0.0/31", "127.0.0.2"], "127.0.0.2", "127.0.0.3"),
            (["127.0.0.3/32"], "127.0.0.3", "127.0.0.2"),
            (["127.0.0.0/9", "127.128.0.0/9", "::/0"], "127.255.255.254", None),
            ([], None, "127.0.0.1"),
        ):
            small.bind(SLOT, {"allow": networks})
            assert words(small, SLOT, allow=networks) == []
            assert good is None or arrives(good, 9001)
            assert bad is None or not arrives(bad, 9001)

    in_fresh(worker, act)


def test_published_ports(worker: netns.Worker, small: NftablesDie) -> None:
    def act() -> None:
        small.stamp(SLOT)
        small.bind(SLOT, {"publish": ["tcp:8080:80", "udp:53:5353"]})
        assert words(small, SLOT, publish=["tcp:8080:80", "udp:53:5353"]) == []
        shown = nft("list", "map", "inet", "fw", "publish")
        assert "tcp . 8080 : 172.16.0.2 . 80" in shown
        assert "udp . 53 : 172.16.0.2 . 5353" in shown
        assert words(small, SLOT) == [
            "nftables inet fw: map publish: element 0x060000001f900000 added",
            "nftables inet fw: map publish: element 0x1100000000350000 added",
        ]
        with pytest.raises(UsageError, match="published already"):
            small.bind(SLOT, {"publish": ["tcp:8080:80", "tcp:8080:81"]})
        small.bind(SLOT, {})
        assert words(small, SLOT) == []

    in_fresh(worker, act)


@pytest.mark.parametrize("count", [1, 50, 1000, 3000])
def test_a_bound_list_is_what_the_tool_would_have_loaded(
    worker: netns.Worker, small: NftablesDie, count: int
) -> None:
    def networks() -> list[str]:
        made = (
            ipaddress.ip_network((random.randrange(1 << 32), random.randint(12, 32)), False) for _ in range(count)
        )
        return [str(network) for network in made]

    first, second = networks(), networks()
    text = "table inet t {\n set allow {\n  type ipv4_addr; flags interval; auto-merge\n  elements = { ALL }\n }\n}\n"

    def loaded() -> str:
        nft_file = text.replace("ALL", ", ".join(second))
        subprocess.run(["nft", "-f", "-"], input=nft_file, text=True, check=True)
        return re.sub(r"\s+", "", nft("list", "set", "inet", "t", "allow").partition("elements")[2])

    def bound() -> str:
        small.stamp(SLOT)
        for each in (first, second):
            small.bind(SLOT, {"allow": each})
            assert words(small, SLOT, allow=each) == []
        return re.sub(r"\s+", "", nft("list", "set", "inet", "fw", "allow").partition("elements")[2])

    assert in_fresh(worker, bound) == in_fresh(worker, loaded)


def test_a_scalar_changes_its_rule_and_nothing_else(worker: netns.Worker, small: NftablesDie) -> None:
    def act() -> None:
        small.stamp(SLOT)
        small.bind(SLOT, {"allow": ["127.0.0.0/8"]})
        assert arrives("127.0.0.1", 9001)
        other = {**SLOT, "port": "7001"}
        small.bind(other, {"allow": ["127.0.0.0/8"]})
        assert words(small, other, allow=["127.0.0.0/8"]) == []
        assert words(small, SLOT, allow=["127.0.0.0/8"]) == ["nftables inet fw output: rule 1 of 6 changed"]
        shown = listed()
        assert "udp dport 7001" in shown
        assert "packets 1 bytes 29" in shown  # the named counter went on

    in_fresh(worker, act)


def test_rebinding_never_opens_a_gap(worker: netns.Worker, small: NftablesDie) -> None:
    """While lists change all the time, packets to an address on no list never arrive, and those to others always."""
    stop = threading.Event()
    leaked: list[bytes] = []
    lost = sent = 0

    def rebind() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            more = [f"10.{number % 200}.{n}.0/24" for n in range(20)]
            small.bind({**SLOT, "port": str(7000 + number % 2)}, {"allow": ["127.0.0.1/32", *more]})

    def act() -> None:
        nonlocal lost, sent
        small.stamp(SLOT)
        small.bind(SLOT, {"allow": ["127.0.0.1/32"]})
        allowed, forbidden = udp_pair("127.0.0.1", 9001), udp_pair("127.0.0.9", 9002)
        with netns.Worker() as other:  # begins in the caller's namespace, and stays there
            done = other.submit(rebind)
            end = time.monotonic() + 2
            while time.monotonic() < end:
                allowed[1].sendto(b"x", ("127.0.0.1", 9001))
                with contextlib.suppress(PermissionError):  # the drop of an own packet is told to its sender
                    forbidden[1].sendto(b"x", ("127.0.0.9", 9002))
                sent += 1
                try:
                    allowed[0].recv(10)
                except BlockingIOError:
                    lost += 1
                try:
                    leaked.append(forbidden[0].recv(10))
                except BlockingIOError:
                    continue
            stop.set()
            done.result()

    in_fresh(worker, act)
    assert sent > 1000
    assert (lost, leaked) == (0, [])


def test_established_connections_survive_bind_and_reset(worker: netns.Worker) -> None:
    text = (
        "table ip t {\n set allow {\n  type ipv4_addr; flags interval\n }\n chain i {\n"
        "  type filter hook input priority 0; policy drop;\n  ct state established accept\n"
        "  ip saddr @allow tcp dport ${port} accept\n }\n}\n"
    )
    slot = {"port": "7000"}
    die = nftables.cast(text, samples=[slot], lists={"allow": "cidrs"}, scalars=["port"])
    assert die.fallback is None

    def act() -> None:
        die.stamp(slot)
        die.bind(slot, {"allow": ["127.0.0.0/8"]})
        with closing(socket.create_server(("127.0.0.1", 7000))) as server:
            client = socket.create_connection(("127.0.0.1", 7000), timeout=5)
            peer, _ = server.accept()
            with closing(client), closing(peer):
                peer.settimeout(5)
                changes: list[Callable[[], None]] = [
                    lambda: die.bind({"port": "7001"}, {}),
                    lambda: die.bind(slot, {"allow": ["10.0.0.0/8"]}),
                    lambda: die.reset(slot),
                ]
                for change in changes:
                    change()
                    client.sendall(b"still here")
                    assert peer.recv(100) == b"still here"

    in_fresh(worker, act)


def test_values_that_no_cast_had_are_cast_for_the_slot(worker: netns.Worker) -> None:
    text = "table ip t {\n chain c {\n  ip daddr { ${dns} } accept\n  ip saddr ${address} drop\n }\n}\n"
    slots = [{**values(n), "dns": "9.9.9.9"} for n in (1, 400, 77)]
    die = nftables.cast(text, samples=slots)
    odd = {**values(5), "dns": "9.9.9.9, 1.1.1.1, 8.8.8.8"}

    def act() -> str:
        die.stamp(odd)
        assert words(die, odd) == []
        return listed()

    assert die.fallback is None
    shown = in_fresh(worker, act)
    assert "1.1.1.1, 8.8.8.8" in shown
    assert values(5)["address"] in shown


def test_a_scalar_that_changes_the_rules_form_can_be_bound_and_let_go(worker: netns.Worker) -> None:
    text = (
        "table ip t {\n set allow {\n  type ipv4_addr; flags interval\n }\n chain c {\n"
        "  ip daddr { ${dns} } accept\n  ip saddr ${address} drop\n }\n}\n"
    )
    slots = [{**values(n), "dns": "9.9.9.9"} for n in (1, 400, 77)]
    die = nftables.cast(text, samples=slots, lists={"allow": "cidrs"}, scalars=["dns"])
    assert die.fallback is None
    usual, odd = slots[1], {**slots[1], "dns": "1.1.1.1, 8.8.8.8"}

    def act() -> None:
        die.stamp(usual)
        for slot in (odd, odd, usual, usual):
            die.bind(slot, {"allow": ["192.0.2.0/24"]})
            assert words(die, slot, allow=["192.0.2.0/24"]) == []

    in_fresh(worker, act)


def test_elements_that_meet_in_one_slot_are_what_the_tool_makes_of_them(worker: netns.Worker) -> None:
    """Stamped in slots where the slot's own interval is by itself, cast anew where it touches another."""
    text = (
        "table ip t {\n set s {\n  type ipv4_addr; flags interval; auto-merge\n"
        "  elements = { ${address}/31, 10.201.0.64/31, 192.0.2.0/24, 192.0.3.0/24 }\n }\n}\n"
    )
    die = nftables.cast(text, samples=[values(n) for n in (2, 400, 78)])
    assert die.fallback is None

    def stamped(slot: Values) -> tuple[str, list[str]]:
        die.stamp(slot)
        return listed(), words(die, slot)

    def loaded(slot: Values) -> tuple[str, list[str]]:
        NftProgram(text, "x").load(slot, {})
        return listed(), []

    for number in (10, 62, 64, 66):
        slot = values(number)
        assert in_fresh(worker, partial(stamped, slot)) == in_fresh(worker, partial(loaded, slot)), number


def test_a_network_without_a_set_is_refused() -> None:
    text = "table ip t {\n set allow {\n  type ipv4_addr; flags interval\n }\n}\n"
    with pytest.raises(UsageError, match="no set for fd00::/8"):
        nftables.cast(text, samples=[{}], lists={"allow": "cidrs"}, defaults={"allow": ["fd00::/8"]})


def test_what_is_not_stamped_is_loaded_and_says_so(worker: netns.Worker) -> None:
    declared = "set allow {\n  type ipv4_addr; flags interval\n }"
    text = f"table ip t {{\n {declared}\n chain c {{\n  ip saddr ${{net}} drop\n }}\n}}\n"
    die = nftables.cast(text, samples=[{"net": "10.0.0.0/8"}, {"net": "10.1.2.0/23"}], lists={"allow": "cidrs"})
    assert die.fallback is not None
    assert "net" in die.fallback or "depend" in die.fallback

    def act() -> None:
        slot = {"net": "192.0.2.0/25"}
        die.stamp(slot)
        assert words(die, slot) == []
        die.bind(slot, {"allow": ["10.0.0.0/8"]})
        assert words(die, slot, allow=["10.0.0.0/8"]) == []
        nft("flush", "chain", "ip", "t", "c")
        assert words(die, slot, allow=["10.0.0.0/8"]) == ["nftables ip t c: rule 1 of 1 missing"]
        die.reset(slot)
        assert words(die, slot) == []

    in_fresh(worker, act)


def test_a_refused_rule_is_named_by_line() -> None:
    with pytest.raises(SpecError, match=r"slot\.nft:3: .*syntax error"):
        nftables.cast("table ip t {\n chain c {\n  no such thing\n }\n}\n", samples=[{}])


@pytest.mark.parametrize(
    ("declared", "kind"),
    [
        ("set allow { type ipv4_addr; }", "cidrs"),
        ("set allow { type ipv4_addr . inet_service; flags interval; }", "cidrs"),
        ("set allow { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }\n }", "cidrs"),
        ("map allow { type ipv4_addr : verdict; }", "ports"),
        ("set allow { type mark; }", "ports"),
        ("set other { type ipv4_addr; flags interval; }", "cidrs"),
    ],
)
def test_a_set_that_cannot_take_the_list_is_refused(declared: str, kind: str) -> None:
    text = "table ip t {\n " + declared.replace("{ ", "{\n").replace("; }", ";\n }") + "\n}\n"
    with pytest.raises(SpecError, match="allow"):
        nftables.cast(text, samples=[{}], lists={"allow": kind})


def test_a_list_that_only_other_sections_use_needs_no_set(worker: netns.Worker) -> None:
    """Of a BPF filter, say; one that has a set is filled as ever."""
    text = "table inet t {\n set deny {\n  type ipv4_addr; flags interval;\n }\n}\n"
    lists = {"allow": "cidrs", "deny": "cidrs"}
    die = nftables.cast(text, samples=[{}], lists=lists, optional=["allow", "deny"])

    def bound() -> str:
        die.stamp({})
        die.bind({}, {"allow": ["2001:db8::/32"], "deny": ["192.0.2.0/24"]})
        return nft("list", "ruleset")

    text = in_fresh(worker, bound)
    assert "192.0.2.0/24" in text
    assert "2001" not in text


def test_the_kernels_refusal_names_the_object(worker: netns.Worker, small: NftablesDie) -> None:
    def act() -> None:
        small.stamp(SLOT)
        item = nf.Command(nf.NEWRULE, 1, nf.APPEND, b"", "nftables inet fw: add a rule of chain nowhere")
        with nf.Socket() as sock, pytest.raises(Exception, match="add a rule of chain nowhere"):
            sock.commit(nf.Batch([item]))
        assert words(small, SLOT) == []  # nothing of the batch was done

    in_fresh(worker, act)


PORTS = """*nat
:PREROUTING ACCEPT [0:0]
-A PREROUTING -i up0 -j ACCEPT
-A PREROUTING -p ${publish.proto} --dport ${publish.outer} -j DNAT --to-destination ${guest}:${publish.inner}
-A PREROUTING -i up1 -s ${address} -j ACCEPT
COMMIT
*filter
:FORWARD DROP [0:0]
-A FORWARD -m set --match-set allow dst -j ACCEPT
COMMIT
"""


def test_iptables_lists(worker: netns.Worker) -> None:
    slots = [{**values(n), "guest": "172.16.0.2"} for n in (1, 400, 77)]
    die = nftables.cast_iptables(PORTS, samples=slots, lists=LISTS, defaults={"allow": ["192.0.2.0/24"]})
    assert die.fallback is None

    def act() -> None:
        slot = slots[1]
        die.stamp(slot)
        fresh = saved("iptables")
        assert words(die, slot) == []
        asked = {"publish": ["tcp:8080:80", "udp:53:5353"], "allow": ["10.0.0.0/8"]}
        die.bind(slot, asked)
        assert [line for line in saved("iptables") if "--to-destination" in line] == [
            "-A PREROUTING -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.16.0.2:80",
            "-A PREROUTING -p udp -m udp --dport 53 -j DNAT --to-destination 172.16.0.2:5353",
        ]
        assert words(die, slot, **asked) == []
        assert words(die, slot) != []
        die.reset(slot)
        assert saved("iptables") == fresh
        assert words(die, slot) == []

    in_fresh(worker, act)
