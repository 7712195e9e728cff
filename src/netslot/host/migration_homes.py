"""The namespaces that tenants live in already: found, looked at, given their rules, and emptied again.

No process is started for a namespace: rules are cast once for each class and put in as bytes. What a namespace
holds is read before it is touched, so that nobody's own rules are lost.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import ParamSpec, TypeVar

from netslot.errors import KernelError, RefusedError
from netslot.host.tables import ORDER, Variant
from netslot.kernel import netlink, netns, pairs, rtnetlink, xtables
from netslot.kernel import nf_tables as nf
from netslot.kernel.pairs import End
from netslot.policy import iptables, iptables_image, iptables_tool, iptables_words, nftables
from netslot.policy.base import Die, Values
from netslot.policy.iptables_image import Image
from netslot.rulesets.model import Family
from netslot.rulesets.proof.arrangement import Arrangement, Member, with_hosts

P = ParamSpec("P")
T = TypeVar("T")

_TRACK = "netslot-track"
_TRACKING = f"table inet {_TRACK} {{\n\tchain track {{\n\t\tct state established\n\t}}\n}}\n"
_INET = 1
_SIZES: Mapping[Family, int] = {4: 4, 6: 16}
_TABLE_NAME = 1  # NFTA_TABLE_NAME
_SO_NETNS_COOKIE = 71
_SAMPLES = 4
_REQUESTS = 500  # a datagram must fit the socket's buffer
_AT_ONCE, _PAUSE_S = 400, 0.15
"""A socket that removed something is closed 0.1 s later (kernel/nf_tables.py): so many may be open meanwhile."""


@dataclass(frozen=True, slots=True)
class Found:
    """A tenant's namespace as it was found. ``own``: what it holds, in words, by tool and table.

    ``values``: what its class's template needs. ``counters``: those of empty tables, as the journal keeps them.
    """

    member: Member
    place: str
    cookie: int
    values: Values
    own: Mapping[str, str]
    counters: Mapping[str, str]


def exists(place: str) -> bool:
    """Whether there is such a namespace: a name of ``ip netns``, or the path of a namespace file."""
    return _path(place).exists()


def _path(place: str) -> Path:
    return Path(place) if "/" in place else netns.NETNS_DIR / place


class Homes:
    """Everything that is done in tenants' namespaces, on one thread. Close it."""

    def __init__(self, root: int | None, variant: Variant) -> None:
        self._worker = netns.Worker(name="netslot-migrate")
        self._root = os.dup(root) if root is not None else netns.open_own()
        self._variant = variant
        self._empty = _empty_tables()
        self._tracking = _tracking()
        self._root_links: dict[str, End] = {}

    def close(self) -> None:
        self._worker.close()
        os.close(self._root)

    def root(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the root namespace."""

        def act() -> T:
            with netns.entered(self._root):
                return call(*args, **kwargs)

        return self._worker.run(act)

    @contextmanager
    def _opened(self, place: str) -> Iterator[int]:
        fd = netns.open_path(_path(place))
        try:
            yield fd
        finally:
            os.close(fd)

    def addresses(self, family: Family) -> tuple[int, ...]:
        """What root is called: its own addresses, without those that mean the machine or the link everywhere."""

        def act() -> list[rtnetlink.AddressRecord]:
            with netlink.Socket(netlink.NETLINK_ROUTE) as sock:
                return rtnetlink.addresses(sock)

        found = (ip_address(one.address) for one in self.root(act) if len(one.address) == _SIZES[family])
        return tuple(sorted({int(one) for one in found if not (one.is_loopback or one.is_link_local)}))

    def groups(self) -> dict[str, int]:
        """The group of every link in root."""
        return {end.name: end.group for end in self.root(_ends)[0]}

    def set_groups(self, wanted: Mapping[str, int]) -> None:
        """Change the groups of these links in root; one that has gone needs none."""

        def act() -> None:
            requests = [
                rtnetlink.set_link(end.index, group=wanted[end.name])
                for end in _ends()[0]
                if wanted.get(end.name, end.group) != end.group
            ]
            with netlink.Socket(netlink.NETLINK_ROUTE) as sock:
                for start in range(0, len(requests), _REQUESTS):
                    sock.execute(requests[start : start + _REQUESTS])

        self.root(act)

    def inside(self, place: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a tenant's namespace. RefusedError when the namespace has gone."""

        def act() -> T:
            with self._opened(place) as fd, netns.entered(fd):
                return call(*args, **kwargs)

        try:
            return self._worker.run(act)
        except KernelError as error:
            if error.operation == f"open {_path(place)}":
                raise RefusedError(
                    f"namespace {place} has gone", hint="run again without it, or --rollback"
                ) from error
            raise

    # looking

    def look(self, arrangement: Arrangement, member: Member, place: str) -> Found:
        """What the namespace is and holds. RefusedError when it is not the tenant's as the directory says."""
        if not self._root_links:
            self._root_links = {end.name: end for end in self.root(_ends)[0]}
        link = self._root_links.get(member.link)
        if link is None:
            raise RefusedError(f"{member.name}: root has no link {member.link}")
        cookie, (links, root), own, counters = self.inside(place, self._look_here)
        near = {one.index for one in self._root_links.values() if link.index in (one.index, one.master)}
        ends = [one.name for one in links if one.peer in near and one.namespace == root]
        if len(ends) != 1:
            raise RefusedError(
                f"{member.name}: {len(ends)} links of namespace {place} are pairs with {member.link}"
                " in root, or with a port of it; needed is one",
                hint="the tenant's link must be a veth into its namespace before its rules can move there",
            )
        values = {**member.variables, "uplink_if": ends[0]}
        if arrangement.attachment != "process":
            inner = [one.name for one in links if one.name not in (*ends, "lo")]
            if len(inner) != 1:
                raise RefusedError(
                    f"{member.name}: namespace {place} has {len(inner)} links beside {ends[0]}, needed is one",
                    hint=f"with attachment {arrangement.attachment} the tenant's packets pass through its namespace",
                )
            values["guest_if"] = inner[0]
        return Found(member, place, cookie, values, own, counters)

    def _look_here(self) -> tuple[int, tuple[list[End], int], dict[str, str], dict[str, str]]:
        own, counters = self._holds()
        return _cookie(), _ends(self._root), own, counters

    def _holds(self) -> tuple[dict[str, str], dict[str, str]]:
        """What the namespace that the thread is in holds, by tool and table; counters of tables that are empty."""
        own: dict[str, str] = {}
        counters: dict[str, str] = {}
        for family in xtables.FAMILIES:
            for table in xtables.existing_tables(family):
                with closing(xtables.open_socket(family)) as sock:
                    info, raw = xtables.read_table(sock, family, table)
                image = iptables_image.take_apart(family, table, info, raw)
                key = f"{family.tool} {table}"
                if image == self._empty.get((family.tool, table)):
                    counters[key] = _counters(family, raw).hex()
                else:
                    own[key] = f"{iptables_words.count_rules(image)} rules in {key}"
        own.update({f"nft {name}": f"nft table {name}" for name in _nft_tables() if name != f"inet {_TRACK}"})
        return own, counters

    # putting in

    def cast(self, arrangement: Arrangement, found: list[Found]) -> dict[str, Die]:
        """A die for each class of these tenants."""
        by_kind: dict[str, list[Values]] = {}
        for one in found:
            by_kind.setdefault(one.member.kind, []).append(one.values)
        return {kind: _cast(arrangement, kind, self._variant, values) for kind, values in by_kind.items()}

    def holds_already(self, found: Found, die: Die) -> bool:
        """Whether a namespace that was begun holds the tenant's rules, or nothing of them or whole tables of them.

        RefusedError when it holds something else.
        """

        def read() -> set[str]:
            self._untrack_here()
            return {" ".join(one.where.split(" ", 2)[:2]).removesuffix(":") for one in die.read(found.values, {})}

        wrong = self.inside(found.place, read)
        nft_is_other = self._variant == "legacy" or bool(wrong)
        if other := [
            what for key, what in found.own.items() if key in wrong or (nft_is_other and key.startswith("nft "))
        ]:
            raise RefusedError(
                f"{found.member.name}: what namespace {found.place} holds has been changed since: {', '.join(other)}",
                hint="netslot migrate --rollback",
            )
        return not wrong

    def track(self, place: str) -> None:
        """Have the namespace track its connections from now on."""

        def act() -> None:
            if f"inet {_TRACK}" not in _nft_tables():
                self._tracking.stamp({})

        self.inside(place, act)

    def stamp(self, found: Found, die: Die) -> None:
        """The tenant's rules, each table at once."""
        self.inside(found.place, die.stamp, found.values)

    def untrack(self, places: list[str]) -> None:
        """Take away what :meth:`track` brought; the rules track for themselves."""
        for number, place in enumerate(places, 1):
            self.inside(place, self._untrack_here)
            if number % _AT_ONCE == 0:
                time.sleep(_PAUSE_S)

    def _untrack_here(self) -> None:
        if f"inet {_TRACK}" in _nft_tables():
            _delete_nft((_INET, _TRACK))

    # taking out

    def cookie(self, place: str) -> int:
        """The number of the namespace that has this name now."""
        return self.inside(place, _cookie)

    def fingerprint(self, place: str) -> str:
        """What the namespace's rules are, for comparison: changed by whoever changes them, but not by packets."""
        return self.inside(place, self._fingerprint_here)

    def _fingerprint_here(self) -> str:
        if self._variant == "nft":
            with nf.Socket() as link:
                return str(link.generation())
        found = hashlib.sha256()
        for family in xtables.FAMILIES:
            for table in sorted(xtables.existing_tables(family)):
                with closing(xtables.open_socket(family)) as sock:
                    raw = xtables.read_table(sock, family, table)[1]
                found.update(f"{family.tool} {table}\0".encode())
                found.update(iptables_image.mask(family, raw, xtables.entry_offsets(family, raw)))
        return found.hexdigest()

    def clear(self, place: str, counters: Mapping[str, str]) -> None:
        """Empty the tables of iptables. Those that were there before hold their old counters again."""
        self.inside(place, self._clear_here, counters)

    def _clear_here(self, counters: Mapping[str, str]) -> None:
        self._untrack_here()
        if self._variant == "nft":
            present = _nft_tables()
            mine = ((number, word, table) for word, number in (("ip", 2), ("ip6", 10)) for table in ORDER)
            _delete_nft(*((number, table) for number, word, table in mine if f"{word} {table}" in present))
            return
        for family in xtables.FAMILIES:
            for table in xtables.existing_tables(family):
                empty = self._empty.get((family.tool, table))
                if empty is not None:
                    self._replace(empty, bytes.fromhex(counters.get(f"{family.tool} {table}", "")))

    @staticmethod
    def _replace(empty: Image, counters: bytes) -> None:
        family, table = empty.family, empty.table
        flat = empty.flatten()
        with closing(xtables.open_socket(family)) as sock:
            while True:
                info, raw = xtables.read_table(sock, family, table)
                if iptables_image.take_apart(family, table, info, raw) == empty:
                    break
                xtables.replace(sock, family, table, flat.info, flat.blob, info.entries)
            # Counters only grow: those that are less than they were are of a table that was put in afresh.
            if _smaller(_counters(family, raw), counters):
                xtables.add_counters(sock, family, table, counters)


def _ends(other: int | None = None) -> tuple[list[End], int]:
    """The links of the thread's namespace, and its number for the namespace ``other``."""
    with netlink.Socket(netlink.NETLINK_ROUTE) as sock:
        found = pairs.ends(sock)  # before the number, which this makes
        return found, -1 if other is None else pairs.number(sock, other)


def _cookie() -> int:
    """A number that no other namespace has or will have (socket(7): SO_NETNS_COOKIE, Linux 5.14)."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")


@functools.cache
def _empty_tables() -> Mapping[tuple[str, str], Image]:
    def look() -> dict[tuple[str, str], Image]:
        with netns.fresh():
            return iptables_tool.empty_tables()

    with netns.Worker() as worker:
        return worker.run(look)


@functools.cache
def _tracking() -> Die:
    return nftables.cast(_TRACKING, samples=[{}])


def _counters(family: xtables.Family, raw: bytes | bytearray) -> bytes:
    """The counters of a blob's entries: struct xt_counters is the last thing before an entry's matches."""
    size = xtables.COUNTER_SIZE
    ends = [start + family.head for start in xtables.entry_offsets(family, raw)]
    return b"".join(bytes(raw[end - size : end]) for end in ends)


def _smaller(now: bytes, before: bytes) -> bool:
    numbers = (struct.unpack(f"={len(each) // 8}Q", each) for each in (now, before))
    return any(one < other for one, other in zip(*numbers, strict=len(now) == len(before)))


def _nft_tables() -> list[str]:
    """Every nf_tables table of the thread's namespace: ``inet NAME``."""
    with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
        messages = sock.dump(nf.kind(nf.GETTABLE), nf.generic_header(0), "nf_tables: list tables")
    found = []
    for message in messages:
        name = netlink.parse_attrs(message.payload, 4)[_TABLE_NAME].rstrip(b"\0").decode()
        found.append(f"{nf.FAMILIES[message.payload[0]]} {name}")
    return found


def _delete_nft(*tables: tuple[int, str]) -> None:
    """Delete tables, given by family and name, all at once."""
    commands = [
        nf.Command(nf.DELTABLE, family, 0, netlink.attr_str(_TABLE_NAME, name), f"delete table {name}")
        for family, name in tables
    ]
    with nf.Socket() as sock:
        sock.commit(nf.Batch(commands))


def _cast(arrangement: Arrangement, kind: str, variant: Variant, values: list[Values]) -> Die:
    """A class's template as bytes, learnt from the values of a few of its tenants."""
    step = max(1, len(values) // _SAMPLES)
    templates: Mapping[Family, str] = {
        family: with_hosts(text, arrangement.hosts.get(family, ()), family)
        for family, text in arrangement.templates[kind].items()
    }
    if arrangement.attachment == "process":
        templates = {family: _with_own_packets(text, family) for family, text in templates.items()}
    compiled = iptables.cast if variant == "legacy" else nftables.cast_iptables
    return compiled(
        templates.get(4, ""),
        templates.get(6),
        samples=[*values[::step][:_SAMPLES], values[-1]],
        file=f"the template of {kind}",
        file6=f"the IPv6 template of {kind}",
    )


_OWN_PACKETS: Mapping[Family, tuple[str, ...]] = {
    4: (
        "-A OUTPUT -d 224.0.0.0/24 -j ACCEPT",
        "-A OUTPUT -m addrtype --dst-type BROADCAST -j ACCEPT",
        "-A INPUT -d 224.0.0.0/24 -j ACCEPT",
        "-A INPUT -m addrtype --dst-type BROADCAST -j ACCEPT",
    ),
    6: (
        "-A OUTPUT -d ff02::/16 -j ACCEPT",
        "-A OUTPUT -d fe80::/10 -j ACCEPT",
        "-A INPUT -d ff02::/16 -j ACCEPT",
        "-A INPUT -s fe80::/10 -j ACCEPT",
    ),
}


def _with_own_packets(text: str, family: Family) -> str:
    """A template for a namespace that the workload itself is in, with packets let pass that root never forwarded.

    The template says in OUTPUT and INPUT what root's FORWARD said. These see more: what stays on the link, neighbour
    discovery above all. That is for the host's INPUT to judge, as before.
    """
    before, star, after = text.partition("*filter\n")
    lines = after.splitlines()
    first = next((number for number, line in enumerate(lines) if not line.startswith(":")), len(lines))
    lines[first:first] = _OWN_PACKETS[family] if star else []
    return "\n".join([before + star.rstrip("\n"), *lines, ""]) if star else text
