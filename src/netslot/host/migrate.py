"""Move a running host over to what ``netslot split`` wrote, and back.

The order keeps every verdict at every moment: first each tenant's rules go into its own namespace, where they
say what root says too; then root's tables are exchanged, each at once. Before a namespace gets rules it is told
of the tenant's connections, so that they are known as established from the first packet on. The journal is
written ahead of every step; whatever it says, each table of root is the old one or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from itertools import islice
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from netslot.errors import NetslotError, RefusedError
from netslot.host import tables
from netslot.host.tables import Variant
from netslot.kernel import connections, netlink, netns, rtnetlink
from netslot.rulesets.proof.arrangement import PUBLISH, PUBLISH_TABLE, ROOT, Arrangement, Member, read
from netslot.rulesets.split import BEFORE
from netslot.spec.render import render

P = ParamSpec("P")
T = TypeVar("T")
State = Literal["none", "preparing", "slots", "root", "done", "rolling back"]
_FAMILIES: tuple[tuple[Literal[4, 6], int], ...] = ((4, socket.AF_INET), (6, socket.AF_INET6))
_IFLA_LINK = 5
_FRESH = 1.0  # seconds that a reading of root's connections is used


@dataclass
class Journal:
    """What has been done, on disk before it is done. ``slots``: names of tenants whose namespace has been changed."""

    path: Path
    state: State = "none"
    variant: Variant = "legacy"
    slots: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Journal:
        path = directory / "journal.json"
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(path)
        return cls(path, found["state"], found["variant"], found["slots"])

    def write(self) -> None:
        """Whole or not at all, and on the disk when this returns."""
        text = json.dumps({"state": self.state, "variant": self.variant, "slots": self.slots})
        put(self.path, text)


def put(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


class Migration:
    """One host's move. ``root``: an open namespace, or None for the caller's own."""

    def __init__(self, state_dir: Path, root: int | None) -> None:
        self._directory = state_dir / "migration"
        self._root = root
        self.journal = Journal.load(self._directory)
        self._table: dict[bytes, list[connections.Connection]] = {}
        self._read_at = -_FRESH

    def _in_root(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return call(*args, **kwargs) if self._root is None else netns.run_in(self._root, call, *args, **kwargs)

    # what is in force

    def in_force(self) -> str:
        """``old``, ``new`` or ``mixed``: which of the two rulesets each of root's tables holds now."""
        found = set()
        for family, _ in _FAMILIES:
            old, new = (self._saved(name, family) for name in ("old", "new"))
            if old is None or new is None:
                continue
            now = tables.plain(self._in_root(tables.save, self.journal.variant, family))
            before, after = tables.plain(old), tables.plain(new)
            for name in before.keys() | after.keys():
                if before.get(name) != after.get(name):
                    found.add(
                        "old"
                        if now.get(name) == before.get(name)
                        else "new"
                        if now.get(name) == after.get(name)
                        else "other"
                    )
        return found.pop() if len(found) == 1 else "mixed" if found else "old"

    def _saved(self, name: str, family: int) -> str | None:
        path = self._directory / f"{name}.v{family}"
        return path.read_text(errors="surrogateescape") if path.exists() else None

    # forward

    def forward(
        self, files: Mapping[str, str], homes: Mapping[str, str], only: str | None, say: Callable[[str], None]
    ) -> int:
        """Move every tenant (or ``only`` one), and then root. Returns how many slots were changed now.

        ``homes``: the namespace of each tenant, where the directory does not say. RefusedError when something
        that is needed is missing; nothing has been changed then.
        """
        arrangement = read(files)
        members = [member for member in arrangement.members if only in (None, member.name)]
        if not members:
            raise RefusedError(f"there is no tenant {only} in the directory")
        places = self._check(arrangement, members, homes)
        if self.journal.state == "done":
            raise RefusedError("this host has been migrated", hint="netslot migrate --rollback takes it back")
        if self.journal.state == "none":
            self._prepare(files)
        self.journal.state = "slots"
        changed = 0
        for member in members:
            if not self.journal.slots.get(member.name, {}).get("loaded"):
                self._slot(arrangement, member, places[member.name])
                changed += 1
        self._read_at = -_FRESH
        for member in members:  # connections that began in between
            fd = netns.open_named(places[member.name])
            try:
                self._tell(member, fd)
            finally:
                os.close(fd)
        say(f"{changed} namespaces have their rules")
        if only is None:
            self._exchange_root(files)
            say("root has the static rules; what it held is kept for --rollback")
        return changed

    def _check(self, arrangement: Arrangement, members: list[Member], homes: Mapping[str, str]) -> dict[str, str]:
        """The namespace of each member."""
        known = set(netns.names())
        found: dict[str, str] = {}
        missing: list[str] = []
        for member in members:
            home = homes.get(member.name) or member.netns
            if home in known and home:
                found[member.name] = home
            else:
                missing.append(f"{member.name} ({'no namespace is named' if not home else 'no namespace ' + home})")
        if missing:
            raise RefusedError(
                f"{len(missing)} tenants have no namespace of their own: {', '.join(missing[:4])}",
                hint=f"name it (netns) with --tenants; or build slots: netslot up makes a namespace with a "
                f"{arrangement.attachment} for each tenant, to which its workload has to be attached",
            )
        return found

    def _prepare(self, files: Mapping[str, str]) -> None:
        """Try everything that can be tried, and keep what rollback needs."""
        variant = self._in_root(tables.variant_in_use)
        self.journal = Journal(self.journal.path, "preparing", variant)
        for family, _ in _FAMILIES:
            if ROOT[family] not in files:
                continue
            held = self._in_root(tables.save, variant, family)
            if BEFORE[family] not in files or tables.plain(files[BEFORE[family]]) != tables.plain(held):
                raise RefusedError(
                    f"the host's IPv{family} rules are not those that were split",
                    hint="split and prove the rules of now: netslot split --live --out DIR",
                )
            self._in_root(tables.restore, variant, family, files[ROOT[family]], test=True)
            put(self._directory / f"old.v{family}", held)
            put(self._directory / f"new.v{family}", _as_saved(variant, family, files[ROOT[family]]))
        self.journal.write()

    def _slot(self, arrangement: Arrangement, member: Member, home: str) -> None:
        """One tenant's namespace: its connections made known, then its rules."""
        fd = netns.open_named(home)
        try:
            names = self._names(arrangement, member, fd)
            held = {str(f): netns.run_in(fd, tables.save, self.journal.variant, f) for f, _ in _FAMILIES}
            entry = {
                "netns": home,
                "link": member.link,
                "held": held,
                "group": self._group(member.link),
                "loaded": False,
            }
            self.journal.slots.setdefault(member.name, entry)
            self.journal.write()
            if member.group:
                self._set_group(member.link, member.group)
            self._tell(member, fd)
            for family, _ in _FAMILIES:
                template = arrangement.templates[member.kind].get(family)
                if template is not None:
                    text = render(template, {**member.variables, **names}, file=member.kind)
                    netns.run_in(fd, tables.restore, self.journal.variant, family, text)
            self.journal.slots[member.name]["loaded"] = True
            self.journal.write()
        finally:
            os.close(fd)

    def _names(self, arrangement: Arrangement, member: Member, fd: int) -> dict[str, str]:
        """What the namespace calls its link to root, and its link to the workload."""
        index = self._in_root(_index, member.link)
        links = netns.run_in(fd, _links)
        uplink = next((name for name, peer in links.items() if peer == index), None)
        if uplink is None:
            raise RefusedError(
                f"{member.name}: {member.link} in root is not one end of a veth whose other end is in its namespace",
                hint="the tenant's link must be a veth into its namespace before its rules can move there",
            )
        names = {"uplink_if": uplink}
        if arrangement.attachment != "process":
            inner = [name for name in links if name not in (uplink, "lo")]
            if len(inner) != 1:
                raise RefusedError(
                    f"{member.name}: its namespace has {len(inner)} links beside {uplink}, needed is one"
                )
            names["guest_if"] = inner[0]
        return names

    def _tell(self, member: Member, fd: int) -> None:
        """Connections that root tracks for the tenant, told to the tenant's namespace."""
        known = self._known()
        for address in _addresses(member):
            mine = [found for one in known.get(address, ()) if (found := one.untranslated([address])) is not None]
            if mine:
                netns.run_in(fd, connections.tell, mine)

    def _known(self) -> dict[bytes, list[connections.Connection]]:
        """Root's connections by both ends that can be a tenant's. Read again after a second, not for each tenant."""
        now = time.monotonic()
        if now - self._read_at > _FRESH:
            self._table = {}
            for _, number in _FAMILIES:
                for one in self._in_root(connections.connections, number):
                    for end in {one.original.src, one.reply.src}:
                        self._table.setdefault(end, []).append(one)
            self._read_at = now
        return self._table

    def _group(self, link: str) -> int:
        return self._in_root(_link_group, link)

    def _set_group(self, link: str, group: int) -> None:
        self._in_root(_change_group, link, group)

    def _exchange_root(self, files: Mapping[str, str]) -> None:
        """The published ports first (the first translation wins, and both say the same), then table by table."""
        self.journal.state = "root"
        self.journal.write()
        variant = self.journal.variant
        for family, _ in _FAMILIES:
            published = files.get(PUBLISH[family])
            if published is not None:
                self._in_root(tables.nft, _anew(family, published))
            if ROOT[family] in files:
                self._in_root(tables.restore, variant, family, files[ROOT[family]])
        if self.in_force() != "new":
            raise NetslotError("root's rules are not what was loaded", hint="netslot migrate --rollback")
        self.journal.state = "done"
        self.journal.write()

    # back

    def rollback(self, say: Callable[[str], None]) -> None:
        """Root's old tables first, then the namespaces' own."""
        if self.journal.state == "none":
            raise RefusedError("nothing has been migrated here")
        self.journal.state = "rolling back"
        self.journal.write()
        variant = self.journal.variant
        for family, _ in _FAMILIES:
            old = self._saved("old", family)
            if old is not None and self.in_force() != "old":
                self._in_root(tables.restore, variant, family, old, counters=True)
            self._in_root(tables.nft, _gone(family))
        say("root has its old rules")
        for name, entry in list(self.journal.slots.items()):
            self._slot_back(entry)
            del self.journal.slots[name]
            self.journal.write()
        say("the namespaces have theirs")
        self._forget()

    def _slot_back(self, entry: Mapping[str, Any]) -> None:
        if entry["netns"] not in netns.names():
            return
        self._set_group(entry["link"], entry["group"])
        fd = netns.open_named(entry["netns"])
        try:
            for family, _ in _FAMILIES:
                held = entry["held"][str(family)]
                text = tables.emptied(netns.run_in(fd, tables.save, self.journal.variant, family)) + held
                netns.run_in(fd, tables.restore, self.journal.variant, family, text, counters=True)
        finally:
            os.close(fd)

    def _forget(self) -> None:
        for path in self._directory.iterdir():
            path.unlink()
        self.journal = Journal(self._directory / "journal.json")


def _addresses(member: Member) -> list[bytes]:
    """The tenant's addresses; of a network the first 256."""
    networks = [ip_network(text) for name, text in sorted(member.variables.items()) if name.startswith("address")]
    sizes = {4: 4, 6: 16}
    return [int(host).to_bytes(sizes[network.version]) for network in networks for host in islice(network, 256)]


def _as_saved(variant: Variant, family: int, text: str) -> str:
    """What iptables-save prints when these rules are loaded: load them where nobody is."""

    def load() -> str:
        with netns.fresh():
            tables.restore(variant, family, text)
            return tables.save(variant, family)

    with netns.Worker() as worker:
        return worker.run(load)


def _word(family: int) -> str:
    return "ip" if family == 4 else "ip6"


def _gone(family: int) -> str:
    """Delete the table whether or not it is there."""
    return f"table {_word(family)} {PUBLISH_TABLE} {{ }}\ndelete table {_word(family)} {PUBLISH_TABLE}\n"


def _anew(family: int, text: str) -> str:
    return _gone(family) + text


def _index(link: str) -> int:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        return rtnetlink.link_index(sock, link)


def _links() -> dict[str, int]:
    """Every link's name and, for one end of a pair, the index of the other."""
    found = {}
    with netlink.Socket(netlink.NETLINK_ROUTE) as sock:
        for message in sock.dump(rtnetlink.RTM_GETLINK, b"\0" * 16, "list links"):
            attrs = netlink.parse_attrs(message.payload, 16)
            peer = int.from_bytes(attrs.get(_IFLA_LINK, b"\0\0\0\0"), "little")
            found[rtnetlink.parse_link(message).name] = peer
    return found


def _link_group(link: str) -> int:
    with netlink.Socket(netlink.NETLINK_ROUTE) as sock:
        return next((one.group for one in rtnetlink.links(sock) if one.name == link), 0)


def _change_group(link: str, group: int) -> None:
    with netlink.Socket(netlink.NETLINK_ROUTE) as sock:
        sock.execute([rtnetlink.set_link(_index(link), group=group)])
