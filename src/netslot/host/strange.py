"""What is in a slot, or on its cgroup, that no policy put there: queues, hooks, programs, routing rules, neighbours.

The policies read back what is theirs. Here is looked for what somebody added beside them, where the kernel
would use it: it is named, and taken away. The calling thread is in the slot.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Final, NamedTuple

from netslot.errors import KernelError
from netslot.host.links import Answers, State
from netslot.host.plan import GUEST, UPLINK, SlotPlan
from netslot.kernel import bpf, cgroupfs, fib
from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import Message, Request, Socket, parse_attrs
from netslot.kernel.sysctl import IPV6_CONF, Sysctls
from netslot.policy import bpf as bpf_policy
from netslot.policy import bpf_parts
from netslot.policy.bpf_user import CGROUP_HOOKS

_GETQDISC, _DELQDISC = 38, 37
_TCMSG = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info; linux/rtnetlink.h
_TCA_KIND = 1
_NDMSG = struct.Struct("=BxxxiHBB")
_CGROUP_TYPES: Final = (*range(4), 6, *range(8, 16), *range(18, 23), *range(29, 33), 34)
"""Hooks of a cgroup by enum bpf_attach_type: packets, sockets, addresses, options, sysctls, devices."""
_HOOK_NAMES: Final = {hook.attach_type: name for name, hook in CGROUP_HOOKS.items()}
_KNOWN_RULES: set[bytes] = set()
"""Dumps of routing rules that hold nothing strange; slots' rules are mostly the same bytes."""
_MOST_KNOWN = 256


class Stray(NamedTuple):
    """One thing that does not belong to the slot, with its removal."""

    where: str
    what: str
    request: Request
    """What puts it right."""


def differences(plan: SlotPlan, sock: Socket, answers: Answers) -> list[tuple[str, str]]:
    """(where, what) of what does not belong; ``answers`` is what the kernel said of links and neighbours."""
    found = [(each.where, each.what) for each in strays(plan, sock, answers)]
    found += [(f"link {name} tcx {hook}", f"program {number} not the slot's") for name, hook, number in _tcx(plan)]
    return found + [(where, what) for where, what, _, _ in _cgroup_programs(plan)]


def strays(plan: SlotPlan, sock: Socket, answers: Answers | None) -> Iterator[Stray]:
    """What netlink tells of; without ``answers``, not of neighbours."""
    yield from _queues(plan, sock)
    yield from _rules(plan, sock)
    if answers is not None:
        yield from _neighbours(sock, answers)


def clear(plan: SlotPlan, sock: Socket, answers: Answers | None) -> None:
    """Take away everything that :func:`differences` names; without ``answers``, neighbours excepted."""
    sock.execute([each.request for each in strays(plan, sock, answers)])
    for name, hook, program in _tcx(plan):
        index = rt.link_index(sock, name)
        for attached in bpf.tcx_query(index, bpf.TCX_HOOKS[hook]):
            if attached.program == program:
                _detach_tcx(index, hook, attached)
    for _, _, kind, program in _cgroup_programs(plan):
        _detach_from_cgroup(plan.values["cgroup"], kind, program)


def restore(plan: SlotPlan, wanted: State, found: State, sock: Socket, sysctls: Sysctls) -> None:
    """Give links back their IPv6 sysctls and their queues' lengths, and take XDP programs from them.

    Addresses and neighbours that IPv6 took with it when it was turned off are put back afterwards, by others.
    """
    for index, link in wanted.links.items():
        there = found.links.get(index)
        if there is None or there == link:
            continue
        if (there.queue_length, there.xdp) != (link.queue_length, link.xdp):
            sock.execute(rt.restore_queueing(index, link.queue_length))
        for number, value in _changed(link.ipv6_conf, there.ipv6_conf):
            if IPV6_CONF[number] == "mtu" and there.mtu != link.mtu:
                continue  # it follows the link's
            sysctls.write(f"net/ipv6/conf/{link.name}/{IPV6_CONF[number]}", str(value))


def _changed(wanted: bytes, found: bytes) -> Iterator[tuple[int, int]]:
    """(number, wanted value) of the settings that are otherwise and that have a name."""
    values = struct.unpack(f"={len(wanted) // 4}i", wanted)
    there = struct.unpack(f"={len(found) // 4}i", found)
    for number, (value, other) in enumerate(zip(values, there, strict=False)):
        if value != other and number in IPV6_CONF:
            yield number, value


# --- queues --------------------------------------------------------------------------------------------------------


def _queues(plan: SlotPlan, sock: Socket) -> Iterator[Stray]:
    """Queues that nobody configured have no handle (qdisc_create_dflt() in net/sched/sch_generic.c)."""
    for message in sock.dump(_GETQDISC, _TCMSG.pack(0, 0, 0, 0, 0), "list queues"):
        _, index, handle, parent, _ = _TCMSG.unpack_from(message.payload)
        if not handle:
            continue
        kind = parse_attrs(message.payload, _TCMSG.size)[_TCA_KIND].rstrip(b"\0").decode()
        if kind in _own_queues(plan, index):
            continue
        payload = _TCMSG.pack(0, index, handle, parent, 0)
        gone = (errno.ENOENT, errno.EINVAL)
        request = Request(_DELQDISC, 0, payload, f"delete queue {kind} of link {index}", gone)
        yield Stray(f"link {_name(plan, index)}", f"queue {kind} {handle >> 16:x}: not the slot's", request)


def _own_queues(plan: SlotPlan, index: int) -> tuple[str, ...]:
    if index not in (UPLINK, GUEST):
        return ()
    link, rates, of = (bpf_parts.UPLINK if index == UPLINK else bpf_parts.GUEST), plan.of.rates, plan.of
    rate = None if rates is None else rates.egress if index == UPLINK else rates.ingress
    shaped = rate is not None and rate.bandwidth is not None
    hooked = link in bpf_policy.hooked(of.bpf, nat=of.nat.kind == "bpf")
    return (("tbf",) if shaped else ()) + (("clsact",) if hooked else ())


def _name(plan: SlotPlan, index: int) -> str:
    known: Mapping[int, str | None] = {1: "lo", UPLINK: plan.uplink_if, GUEST: plan.guest_if}
    return known.get(index) or str(index)


# --- routing rules -------------------------------------------------------------------------------------------------


def _rules(plan: SlotPlan, sock: Socket) -> Iterator[Stray]:
    """Rules that are neither the kernel's own nor the routes policy's, which reads its own back."""
    messages = sock.dump(rt.RTM_GETRULE, bytes(12), "list routing rules")
    digest = bytes([plan.of.routes is not None]) + b"".join(message.payload for message in messages)
    if digest in _KNOWN_RULES:
        return
    found = list(_strange_rules(messages, plan.of.routes is not None))
    if not found and len(_KNOWN_RULES) < _MOST_KNOWN:
        _KNOWN_RULES.add(digest)
    yield from found


def _strange_rules(messages: list[Message], with_own: bool) -> Iterator[Stray]:
    missing = {(rule.family, rule.priority, rule.table): rule for rule in fib.KERNEL_RULES}
    for message in messages:
        family = message.payload[0]
        if family not in (socket.AF_INET, socket.AF_INET6):  # of multicast routing, which slots do not do
            continue
        rule, protocol = fib.parse_rule(message.payload)
        if rule in fib.KERNEL_RULES:
            missing.pop((rule.family, rule.priority, rule.table), None)
        elif not (with_own and protocol == fib.PROTOCOL):
            gone = (errno.ENOENT,)
            request = Request(fib.RTM_DELRULE, 0, message.payload, f"delete {rule}", gone)
            yield Stray("routing rules", f"{rule} not the slot's", request)
    for rule in missing.values():
        yield Stray("routing rules", f"{rule}, the kernel's own, is missing", fib.add_kernel_rule(rule))


# --- neighbours ----------------------------------------------------------------------------------------------------


def _neighbours(sock: Socket, answers: Answers) -> Iterator[Stray]:
    """Permanent entries beside those that were asked for."""
    asked = {(entry.link, entry.address) for entry in map(rt.parse_neighbour, answers.neighbours)}
    for message in rt.dump_neighbours(sock):
        if not _NDMSG.unpack_from(message.payload)[2] & rt.NUD_PERMANENT:
            continue
        entry = rt.parse_neighbour(message)
        if (entry.link, entry.address) not in asked:
            address = ip_address(entry.address)
            request = rt.delete_neighbour(entry.link, address)._replace(ignore=(errno.ENOENT,))
            yield Stray(f"link {entry.link}", f"neighbour {address} {entry.mac} not the slot's", request)


# --- programs ------------------------------------------------------------------------------------------------------


def _tcx(plan: SlotPlan) -> Iterator[tuple[str, str, int]]:
    """(link, hook, program id) of what is on the hooks that run before tc's own: netslot uses none of them."""
    for index in (UPLINK, *((GUEST,) if plan.guest_if is not None else ())):
        for hook, kind in bpf.TCX_HOOKS.items():
            try:
                for attached in bpf.tcx_query(index, kind):
                    yield _name(plan, index), hook, attached.program
            except KernelError as error:
                if error.errno != errno.ENODEV:  # a link that is gone is reported as such
                    raise


def _detach_tcx(index: int, hook: str, attached: bpf.Attached) -> None:
    if attached.link:
        bpf.link_detach(attached.link)
        return
    program = bpf.prog_by_id(attached.program)
    try:
        bpf.prog_detach(index, program, bpf.TCX_HOOKS[hook])
    finally:
        os.close(program)


def _cgroup_programs(plan: SlotPlan) -> Iterator[tuple[str, str, int, int]]:
    """(where, what, attach type, program id) of programs on the slot's cgroup that its spec does not name."""
    path = plan.values.get("cgroup")
    if path is None:
        return
    programs = plan.of.bpf.programs if plan.of.bpf is not None else ()
    wanted = Counter((CGROUP_HOOKS[p.hook].attach_type, p.program[:15]) for p in programs if p.hook in CGROUP_HOOKS)
    try:
        with cgroupfs.opened(cgroupfs.unified(path)) as target:
            for kind in _CGROUP_TYPES:
                for number in _attached(target, kind):
                    name = _program_name(number)
                    if wanted[kind, name] > 0:
                        wanted[kind, name] -= 1
                        continue
                    where = f"cgroup {path} {_HOOK_NAMES.get(kind, f'hook {kind}')}"
                    yield where, f"program {name or number} not the slot's", kind, number
    except KernelError as error:
        if error.errno != errno.ENOENT:  # a cgroup that is gone is the cgroup policy's to report
            raise


def _attached(target: int, kind: int) -> tuple[int, ...]:
    try:
        return bpf.prog_query(target, kind)
    except KernelError as error:
        if error.errno != errno.EINVAL:  # this kernel has no such hook
            raise
        return ()


def _program_name(number: int) -> str:
    fd = bpf.prog_by_id(number)
    try:
        return bpf.prog_info(fd).name
    finally:
        os.close(fd)


def _detach_from_cgroup(path: str, kind: int, number: int) -> None:
    place = cgroupfs.unified(path)
    held = bpf.cgroup_links(place.stat().st_ino, number, kind)
    for link in held:
        bpf.link_detach(link)
    if held:
        return
    program = bpf.prog_by_id(number)
    try:
        with cgroupfs.opened(place) as target:
            bpf.prog_detach(target, program, kind)
    finally:
        os.close(program)
