"""A slot's life: built, recycled, destroyed.

A slot is built unseen and appears all at once: its pin in ``/run/netns`` is made last. A process that dies before
leaves nothing, since the kernel removes an unpinned namespace and both ends of its links with it.
All functions run on a :class:`netslot.kernel.netns.Worker` thread whose home is the root namespace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from netslot.errors import KernelError, NetslotError
from netslot.host import links, strange
from netslot.host.expectation import Expectation
from netslot.host.plan import GUEST, LOOPBACK, UPLINK, SlotPlan, own_values, parse_tag
from netslot.kernel import cgroupfs, conntrack, netns, sockets
from netslot.kernel import rtnetlink as rt
from netslot.kernel.ethtool import notice_carrier
from netslot.kernel.netlink import Request, Socket, lent
from netslot.kernel.sysctl import Sysctls
from netslot.policy.base import Die, Difference, Parameters, Values

_DATAGRAM = 64


class NotCleanError(NetslotError):
    """A slot could not be brought back to what a fresh one is; the message says what is left in it."""


@dataclass(frozen=True)
class Template:
    """What the slots of one class are made from: dies, and what a slot looks like afterwards."""

    early: Sequence[Die]
    """Stamped while all links are down: no packet meets a slot without them, and the kernel need not wait for
    packets to leave a link before it changes the link's queues and hooks (dev_deactivate_many())."""
    late: Sequence[Die]
    """Stamped when the slot's own links are up, as routes need, but root's end is not yet."""
    expectation: Expectation | None = field(default=None)
    at_birth: Sequence[Request] = ()
    """What the dies ask for together with the uplink."""

    @property
    def dies(self) -> tuple[Die, ...]:
        return (*self.early, *self.late)

    def differences(
        self, plan: SlotPlan, values: Values, parameters: Parameters, *, thorough: bool = True
    ) -> list[Difference]:
        """What the slot that the calling thread is in holds otherwise than it should.

        Unless ``thorough``, it is not looked for what nobody's policy knows of: see :mod:`netslot.host.strange`.
        """
        assert self.expectation is not None
        with Socket() as slot:
            answers = links.ask(plan, slot)
            result = [Difference(*pair) for pair in self.expectation.slot_drift(plan, answers)]
            if thorough:
                result += [Difference(*pair) for pair in strange.differences(plan, slot, answers)]
        for die in self.dies:
            result += die.read(values, parameters)
        return result


class Workshop:
    """What making slots needs to have open; ``seconds`` holds the time spent by phase since it was made."""

    def __init__(self) -> None:
        self.home = netns.open_own()
        self.root = Socket()
        self._ioctl = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.sysctls = Sysctls()
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def close(self) -> None:
        self.root.close()
        self._ioctl.close()
        self.sysctls.close()
        os.close(self.home)

    # --- building ------------------------------------------------------------------------------------

    def build(self, plan: SlotPlan, template: Template) -> None:
        """Make the slot with everything in it, and pin it. KernelError leaves nothing of it behind."""
        with self.unseen(plan, template) as (slot_fd, inner_fd):
            if plan.inner_netns is not None and inner_fd is not None:
                repin(plan.inner_netns, inner_fd)
            netns.pin(plan.netns, slot_fd)
            self._lap("pin")

    @contextlib.contextmanager
    def unseen(self, plan: SlotPlan, template: Template) -> Iterator[tuple[int, int | None]]:
        """A slot that is whole but not pinned, and its container's namespace, as descriptors.

        Unless they are pinned they go with the block.
        """
        self._last = time.perf_counter()
        with contextlib.ExitStack() as held:
            inner_fd = held.enter_context(_new_namespace()) if plan.inner_netns else None
            slot_fd = held.enter_context(_new_namespace())
            self._lap("namespace")
            try:
                with netns.entered(slot_fd):
                    slot = held.enter_context(Socket())
                    self._furnish(plan, template, slot, inner_fd)
                self.open_root_side(plan, slot, born=True)
                if inner_fd is not None:
                    _connect_inner(plan, slot, inner_fd)
                    self._lap("guest link")
                yield slot_fd, inner_fd
            except BaseException:
                with netns.entered(slot_fd), Socket() as slot:  # with it goes root's end, whatever that is called
                    slot.execute([rt.delete_link(UPLINK)._replace(ignore=(errno.ENODEV,))])
                self.destroy([plan.netns])
                if template.dies and (cgroup := plan.values.get("cgroup")) is not None:
                    cgroupfs.remove(cgroup, cgroupfs.CONTROLLERS)
                raise

    def _furnish(self, plan: SlotPlan, template: Template, slot: Socket, inner_fd: int | None) -> None:
        """Everything inside the slot, which the calling thread is in."""
        links.prepare(plan, self.sysctls)
        self._lap("sysctls")
        with lent(slot):
            links.make_uplink(plan, slot, self.root, self.home, template.at_birth)
            self._lap("veth")
            links.make_guest_link(plan, slot, inner_fd)
            self._lap("guest link")
            for die in template.early:
                die.stamp(plan.values)
            self._lap("rules")
            slot.execute(links.slot_side(plan, born=True))
            links.answer_at_once(plan, self.sysctls)
            self._lap("addresses")
            if template.late:
                for die in template.late:
                    die.stamp(plan.values)
                self._lap("routes")

    def open_root_side(self, plan: SlotPlan, slot: Socket, *, born: bool = False) -> None:
        """Configure root's end of the link and bring it up; ``born`` when it was just made.

        Both ends carry packets afterwards.
        """
        index = rt.link_index(self._ioctl, plan.root_if)
        links.quiet_root_side(plan, self.sysctls)
        self.root.execute(links.root_side(plan, index, born=born))
        notice_carrier(self._ioctl, plan.root_if)
        if connected := links.root_side_connected(plan, index):
            self.root.execute(connected)
        notice_carrier(slot, plan.uplink_if)
        self._lap("root side")

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    # --- the end -------------------------------------------------------------------------------------

    def destroy(self, names: Sequence[str], ends: Mapping[str, int] | None = None) -> None:
        """Remove whatever there is of the slots ``names``; absence is success.

        ``ends``: the indexes of root's ends of links, where they are known.
        Their links go at once and together: the kernel waits for its readers at each removal, tens of milliseconds,
        and a group of links is one removal. The namespaces go when the kernel gets to it, or when the last process
        in one ends.
        """
        known = ends or {}
        found = (known.get(name) or self._index_or_none(name) or self._end_of(name) for name in names)
        indexes = [index for index in found if index]
        if indexes:
            gone = (errno.ENODEV,)
            for at in range(0, len(indexes), _DATAGRAM):
                doomed = (rt.set_link(index, group=links.DOOMED_GROUP) for index in indexes[at : at + _DATAGRAM])
                self.root.execute(request._replace(ignore=gone) for request in doomed)
            self.root.execute([rt.delete_group(links.DOOMED_GROUP)._replace(ignore=gone)])
        for name in names:
            netns.unpin(f"{name}-in")
            netns.unpin(name)

    def _end_of(self, name: str) -> int | None:
        """Root's end of the link of the slot ``name``, seen from inside, if it carries the slot's own tag."""
        try:
            fd = netns.open_named(name)
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):  # EINVAL: a pin that is half taken away
                raise
            return None
        try:
            with netns.entered(fd), Socket() as slot:
                uplink = slot.execute([rt.get_link(UPLINK)._replace(ignore=(errno.ENODEV,))])
                loopback = slot.execute([rt.get_link(LOOPBACK)])
        finally:
            os.close(fd)
        peer, tag = next(map(rt.peer, uplink), 0), rt.parse_link(loopback[0]).alias
        if not peer or parse_tag(tag) is None:
            return None
        asked = rt.get_link(peer)._replace(ignore=(errno.ENODEV,))
        return next((peer for each in self.root.execute([asked]) if rt.parse_link(each).alias == tag), None)

    def _index_or_none(self, name: str) -> int | None:
        try:
            return rt.link_index(self._ioctl, name)
        except KernelError as error:
            if error.errno != errno.ENODEV:
                raise
            return None


def repin(name: str, fd: int) -> None:
    """Give ``name`` to another namespace."""
    netns.unpin(name)
    netns.pin(name, fd)


@contextlib.contextmanager
def _new_namespace() -> Iterator[int]:
    """A new namespace; it dies with the block unless it was pinned."""
    with netns.fresh():
        fd = netns.open_own()
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def inside(plan: SlotPlan) -> Iterator[None]:
    """Put the calling worker thread into the slot for the length of the block."""
    fd = netns.open_named(plan.netns)
    try:
        with netns.entered(fd):
            yield
    finally:
        os.close(fd)


# --- between two tenants -----------------------------------------------------------------------------


def recycle(plan: SlotPlan, template: Template, workshop: Workshop, running: Callable[[int], list[int]]) -> None:
    """Bring the slot back to what a fresh one is, and show that it is one.

    ``running`` gives the processes in the namespace with that inode. Raises NotCleanError when something is left.
    """
    _refuse_processes(plan, running)
    _refuse_others_values(plan)
    with contextlib.ExitStack() as held:
        slot = _renew(plan, template, held)
        with inside(plan):
            for die in template.late:
                die.reset(plan.values)
            assert template.expectation is not None
            wanted = template.expectation.slot(plan)
            strange.clear(plan, slot, None)
            changed = mend_links(plan, wanted, workshop, slot)
            slot.execute(links.forget_neighbours(plan))
            left = template.differences(plan, plan.values, plan.defaults, thorough=False)
        if left:
            raise NotCleanError(f"slot {plan.number} is not as new: {'; '.join(map(str, left[:3]))}")
        if changed:  # the link was made again, or the template is another: root's end names it too
            workshop.open_root_side(plan, slot)


def _renew(plan: SlotPlan, template: Template, held: contextlib.ExitStack) -> Socket:
    """Reset the dies that a slot has before its links are up; the socket is inside, and open as long as ``held``.

    A container may have changed anything in its own namespace: the next one gets another, and a link that is up only
    once everything is in force again.
    """
    inner_fd = held.enter_context(_new_namespace()) if plan.inner_netns else None
    with inside(plan):
        slot = held.enter_context(Socket())
        _empty(plan)
        if inner_fd is not None:
            slot.execute([rt.delete_link(GUEST)._replace(ignore=(errno.ENODEV,))])
            links.make_guest_link(plan, slot, inner_fd)
        for die in template.early:
            die.reset(plan.values)
    if inner_fd is not None and plan.inner_netns is not None:
        slot.execute(links.slot_side(plan))
        _connect_inner(plan, slot, inner_fd)
        repin(plan.inner_netns, inner_fd)
    return slot


def mend_links(plan: SlotPlan, wanted: links.State, workshop: Workshop, slot: Socket) -> bool:
    """Give the slot that the calling thread is in its links, addresses and routes back; whether any had changed."""
    found = links.read(plan, slot)
    if found == wanted:
        return False
    restore_links(plan, workshop, slot)
    strange.restore(plan, wanted, found, slot, workshop.sysctls)
    links.mend(plan, wanted, slot)
    return True


def _refuse_others_values(plan: SlotPlan) -> None:
    """What root has of a resident that changed is not looked for: such a slot is built anew."""
    if plan.resident is None:
        return
    with inside(plan), Socket() as slot:
        tag = parse_tag(rt.parse_link(slot.execute([rt.get_link(LOOPBACK)])[0]).alias)
    if tag is None or own_values(tag[3]) != plan.resident.digest:
        raise NotCleanError(f"slot {plan.number} was made for other values than {plan.resident.name} has now")


def _refuse_processes(plan: SlotPlan, running: Callable[[int], list[int]]) -> None:
    for name in filter(None, (plan.netns, plan.inner_netns)):
        try:
            fd = netns.open_named(name)
        except KernelError as error:
            if error.errno == errno.ENOENT and name == plan.inner_netns:
                continue  # it is replaced anyway
            raise
        try:
            pids = running(netns.inode(fd))
        finally:
            os.close(fd)
        if pids:
            raise NotCleanError(f"processes still run in {name}: {', '.join(map(str, pids[:8]))}")


def _empty(plan: SlotPlan) -> None:
    """Take the last tenant's connections and sockets out of the slot that the calling thread is in."""
    conntrack.flush()
    if sockets.in_use():
        sockets.destroy_all()
        if left := sockets.in_use() or sockets.bound():
            raise NotCleanError(f"sockets are left in {plan.netns}: {left}")
    if plan.of.attachment.kind == "tap":
        with Socket() as slot:
            if any(link.carrier for link in rt.links(slot) if link.ifindex == GUEST):
                raise NotCleanError(f"a process still holds {plan.guest_if} of {plan.netns} open")


def _connect_inner(plan: SlotPlan, slot: Socket, inner_fd: int) -> None:
    """Configure the container's end of its link and bring it up. Both ends carry packets afterwards."""
    assert plan.guest_if is not None
    with netns.entered(inner_fd), Socket() as inner:
        inner.execute(links.inner_side(plan))
        notice_carrier(inner, plan.of.attachment.peer)
    notice_carrier(slot, plan.guest_if)


def restore_links(plan: SlotPlan, workshop: Workshop, slot: Socket) -> None:
    """Make again those of the slot's links that are gone. The calling thread is in the slot."""
    there = {link.ifindex: link for link in rt.links(slot)}
    wanted = {UPLINK: plan.uplink_if, GUEST: plan.guest_if}
    right = {LOOPBACK} | links.apart(plan, there.values())
    wrong = [link for link in there.values() if link.ifindex not in right and wanted.get(link.ifindex) != link.name]
    # The other end of a pair goes with the first.
    slot.execute(rt.delete_link(link.ifindex)._replace(ignore=(errno.ENODEV,)) for link in wrong)
    names = {link.name for link in there.values() if link not in wrong}
    if plan.uplink_if not in names:
        links.make_uplink(plan, slot, workshop.root, workshop.home)
    if plan.guest_if is not None and plan.guest_if not in names and plan.inner_netns is None:
        links.make_guest_link(plan, slot, None)
        links.answer_at_once(plan, workshop.sysctls)
