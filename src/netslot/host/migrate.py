"""Move a running host over to what ``netslot split`` wrote, and back.

The order keeps every verdict at every moment. First each tenant's rules go into its own namespace, where they say
what root says too; before that the namespace is told of the tenant's connections, so that they are known as
established from the first packet on. Then root's tables are exchanged one by one, each at once, in the order in which
a packet meets them: whatever a table relies on has been done, by tables before it or by the slots, as it was written
for. The way back is the same way backwards. Every step is in the journal before it is taken, and can be taken again.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path

from netslot.errors import RefusedError
from netslot.host import migration_homes, tables
from netslot.host.migration_homes import Found, Homes
from netslot.host.migration_journal import Journal, State, locked, put
from netslot.host.migration_root import FAMILIES, Exchange, prepare
from netslot.kernel import connections, netns
from netslot.rulesets.ipsets import SETS
from netslot.rulesets.proof.arrangement import Arrangement, Member, read
from netslot.rulesets.split import BEFORE

Say = Callable[[str], None]
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Status:
    """``slots``: tenants whose namespace may have been changed. ``in_force``: old, new, mixed, or somebody other's.

    ``tables``: which of the two rulesets each of root's tables holds, of those that the move changes.
    """

    state: State
    slots: int
    in_force: str
    tables: Mapping[str, str]


class Migration:
    """One host's move. ``root``: an open namespace, or None for the caller's own."""

    def __init__(self, state_dir: Path, root: int | None) -> None:
        self._directory = state_dir / "migration"
        self._lock = state_dir / "migration.lock"
        self._root = root

    @contextmanager
    def _begun(self) -> Iterator[_Run]:
        with locked(self._lock, "another netslot migrate is at work on this host") as lock:
            run = _Run(self._directory, self._root, lock)
            try:
                yield run
            finally:
                run.homes.close()

    def status(self) -> Status:
        """Where the move stands."""
        with self._begun() as run:
            found = run.exchange.in_force()
            kinds = set(found.values())
            return Status(
                run.journal.state,
                len(run.journal.slots),
                "old" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed",
                {f"IPv{family} {table}": which for (family, table), which in found.items()},
            )

    def forward(self, files: Mapping[str, str], homes: Mapping[str, str], only: str | None, say: Say) -> int:
        """Move every tenant (or ``only`` one), and then root. Returns how many namespaces were changed now.

        ``homes``: the namespace of each tenant, where the directory does not say. RefusedError when something
        that is needed is missing; nothing has been changed then.
        """
        arrangement = read(files)
        members = [member for member in arrangement.members if only in (None, member.name)]
        if not members and only is not None:
            raise RefusedError(f"there is no tenant {only} with a slot in the directory")
        with self._begun() as run:
            return run.forward(files, arrangement, members, homes, only is None, say)

    def rollback(self, say: Say) -> None:
        """Root's old tables first, then the namespaces' own."""
        with self._begun() as run:
            run.rollback(say)


class _Run:
    """One command's work, under the lock."""

    def __init__(self, directory: Path, root: int | None, lock: int) -> None:
        self.directory = directory
        self.journal = Journal.load(directory)
        if self.journal.state == "none":
            look = tables.variant_in_use
            self.journal.variant = look() if root is None else netns.run_in(root, look)
        self.homes = Homes(root, self.journal.variant)
        self.exchange = Exchange(directory, self.journal, self.homes, lock)

    # forward

    def forward(
        self,
        files: Mapping[str, str],
        arrangement: Arrangement,
        members: list[Member],
        homes: Mapping[str, str],
        everything: bool,
        say: Say,
    ) -> int:
        places = _places(arrangement, members, homes)
        self._may_go_on(files)
        if self.journal.state == "none":
            prepare(self.directory, self.homes, self.journal.variant, files)
        else:
            self.exchange.check_old_or_new()
        hosts = {family: self.homes.addresses(family) for family in FAMILIES} if arrangement.asks_for_hosts else {}
        arrangement = replace(arrangement, hosts=hosts)
        found = [self.homes.look(arrangement, member, places[member.name]) for member in members]
        changed = self._slots(files, arrangement, found)
        say(f"{changed} namespaces have their rules now")
        if everything:
            self._still_there(found)
            self.journal.write({"step": "root"})
            self.exchange.forward(files)
            self.journal.write({"step": "done"})
            say("root has the static rules; what it held is kept for --rollback")
        return changed

    def _may_go_on(self, files: Mapping[str, str]) -> None:
        if self.journal.state == "done":
            raise RefusedError("this host has been migrated", hint="netslot migrate --rollback takes it back")
        if self.journal.state != "none" and self.journal.digest != _digest(files):
            raise RefusedError(
                "a move to other rules than this directory's was begun",
                hint="go on with that directory, or netslot migrate --rollback first",
            )

    def _slots(self, files: Mapping[str, str], arrangement: Arrangement, found: list[Found]) -> int:
        """Rules into the namespaces that do not have them yet; returns how many."""
        begun = {one.member.name for one in found if self._begun(one)}
        _nobodys(one for one in found if one.member.name not in begun)
        dies = self.homes.cast(arrangement, found)
        todo = [
            one
            for one in found
            if not (one.member.name in begun and self.homes.holds_already(one, dies[one.member.kind]))
        ]
        links = _links(files, found)
        self._note(files, todo, links)
        self.homes.set_groups(links)
        for one in todo:
            self.homes.track(one.place)
        self._tell(todo)
        for one in todo:
            self.homes.stamp(one, dies[one.member.kind])
        self.homes.untrack([one.place for one in todo])
        prints = ((one.member.name, self.homes.fingerprint(one.place)) for one in todo)
        self.journal.write(*({"step": "stamped", "tenant": name, "print": text} for name, text in prints))
        return len(todo)

    def _still_there(self, found: list[Found]) -> None:
        """What root stops doing must be done by namespaces that are still the tenants'."""
        gone = [one.member.name for one in found if self.homes.cookie(one.place) != one.cookie]
        if gone:
            raise RefusedError(
                f"{_names(gone)}: the namespace is another one by now", hint="run again: root still has its old rules"
            )

    def _begun(self, found: Found) -> bool:
        """Whether an earlier run may have changed this very namespace."""
        entry = self.journal.slots.get(found.member.name)
        return entry is not None and (entry.netns, entry.cookie) == (found.place, found.cookie)

    def _note(self, files: Mapping[str, str], todo: list[Found], links: Mapping[str, int]) -> None:
        """Into the journal, before it is done: which namespaces and links will be changed, and what they hold."""
        lines: list[dict[str, object]] = [{"step": "slots"}]
        if self.journal.state == "none":
            sets = [name for file in SETS.values() for name in tables.set_names(files.get(file, ""))]
            about = {"variant": self.journal.variant, "digest": _digest(files), "sets": sets}
            lines[0] = {"step": "begin", **about}
        groups = self.homes.groups()
        lines += [{"step": "group", "link": link, "was": groups[link]} for link in links.keys() - self.journal.links]
        for one in todo:
            if not self._begun(one):
                where = {"netns": one.place, "cookie": one.cookie, "link": one.member.link}
                lines.append({"step": "slot", "tenant": one.member.name, **where, "counters": dict(one.counters)})
        self.journal.write(*lines)

    def _tell(self, found: list[Found]) -> None:
        """What root tracks for these tenants is told to their namespaces, which by now track what begins."""
        owners = _Owners(found)
        mine: dict[str, list[connections.Connection]] = {}
        for number in (socket.AF_INET, socket.AF_INET6):
            for one in self.homes.root(connections.connections, number):
                for end in {one.original.src, one.reply.src}:
                    place = owners.of(end)
                    seen = one.untranslated([end])
                    if place is not None and seen is not None:
                        mine.setdefault(place, []).append(seen)
        for place, theirs in mine.items():
            self.homes.inside(place, connections.tell, theirs)

    # back

    def rollback(self, say: Say) -> None:
        if self.journal.state == "none":
            raise RefusedError("nothing has been migrated here")
        self.journal.write({"step": "back"})
        self.exchange.back(say)
        say("root has its old rules")
        self.homes.set_groups(self.journal.links)
        left = []
        for name, entry in self.journal.slots.items():
            if not (migration_homes.exists(entry.netns) and self.homes.cookie(entry.netns) == entry.cookie):
                left.append(name)
                continue
            known = self.journal.prints.get(name)
            if known not in (None, self.homes.fingerprint(entry.netns)):
                self._keep_other(name, entry.netns, say)
            self.homes.clear(entry.netns, entry.counters)
        if left:
            say(f"{_names(left)}: the namespace has gone, and its rules with it")
        self.journal.forget()
        say("the namespaces hold what they held")

    def _keep_other(self, tenant: str, place: str, say: Say) -> None:
        for family in FAMILIES:
            path = self.directory.parent / f"replaced-by-rollback.v{family}.{tenant.replace('/', '_')}"
            put(path, self.homes.inside(place, tables.save, self.journal.variant, family))
        say(f"{tenant}: the rules in namespace {place} have been changed by others since; they are kept in {path}")


class _Owners:
    """Whose an address is: the longest prefix of the tenants' addresses that holds it."""

    def __init__(self, found: list[Found]) -> None:
        self._places: dict[tuple[int, int], dict[int, str]] = {}
        for one in found:
            for name, text in one.member.variables.items():
                if name.startswith("address"):
                    network = ip_network(text)
                    kind = (network.max_prefixlen, network.max_prefixlen - network.prefixlen)
                    self._places.setdefault(kind, {})[int(network.network_address) >> kind[1]] = one.place
        self._kinds = sorted(self._places, key=lambda kind: kind[1])

    def of(self, address: bytes) -> str | None:
        value, bits = int.from_bytes(address), 8 * len(address)
        found = (self._places[kind].get(value >> kind[1]) for kind in self._kinds if kind[0] == bits)
        return next((place for place in found if place is not None), None)


def _digest(files: Mapping[str, str]) -> str:
    found = hashlib.sha256()
    for name in sorted(files):
        found.update(f"{name}\0{files[name]}\0".encode(errors="surrogateescape"))
    return found.hexdigest()


def _places(arrangement: Arrangement, members: list[Member], homes: Mapping[str, str]) -> dict[str, str]:
    """The namespace of each member. RefusedError names those that have none."""
    found: dict[str, str] = {}
    missing: list[str] = []
    links: list[str] = []
    for member in members:
        home = homes.get(member.name) or member.netns
        if home and migration_homes.exists(home):
            found[member.name] = home
        else:
            links.append(member.link)
            missing.append(f"{member.name} ({'no namespace is named' if not home else 'no namespace ' + home})")
    if missing:
        guest = {"tap": "a tap", "veth": "a pair to the workload's own namespace", "process": "no further link"}
        raise RefusedError(
            f"{len(missing)} tenants have no namespace of their own: {_names(missing)}",
            hint="name it (netns) with --tenants; or build slots: for each tenant `netslot up` makes a namespace, a "
            f"pair from its {links[0] if len(links) == 1 else 'link'} in root to up0 in it, and inside "
            f"{guest[arrangement.attachment]}; the workload has to be attached there",
        )
    return found


def _links(files: Mapping[str, str], found: list[Found]) -> dict[str, int]:
    """The groups that root's new rules know links by. RefusedError when old rules ask for groups too."""
    links = {one.member.link: one.member.group for one in found if one.member.group}
    old = (line for name in BEFORE.values() for line in files.get(name, "").splitlines())
    asking = next((line for line in old if " -m devgroup " in line), None)
    if links and asking is not None:
        raise RefusedError(
            f"links are given groups for the new rules, and a rule of root asks for a group: {asking}",
            hint="write that rule with the names of links, then split again",
        )
    return links


def _nobodys(found: Iterator[Found]) -> None:
    """RefusedError when namespaces hold rules that netslot did not put there."""
    own = [f"{one.member.name} (namespace {one.place}: {', '.join(one.own.values())})" for one in found if one.own]
    if own:
        raise RefusedError(
            f"{len(own)} namespaces hold rules of their own: {_names(own)}",
            hint="nothing was changed; move these rules into root's or remove them, then split again",
        )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
