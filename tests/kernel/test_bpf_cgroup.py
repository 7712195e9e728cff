"""Users' programs on every hook of a slot's cgroup, with packets: filled by a lease, changed in place, read back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hostlab
import lab
from netslot.host.host import Host
from netslot.kernel import bpf, cgroupfs
from netslot.policy.bpf_user import CGROUP_HOOKS

PROGRAM = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
char gpl[] SEC("license") = "GPL";
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, __u32); }
open SEC(".maps");
static __always_inline int allowed(void) {
    __u32 zero = 0; __u32 *value = bpf_map_lookup_elem(&open, &zero);
    return value && *value;
}
"""
HOOKS = {name: name.removeprefix("cgroup/") for name in CGROUP_HOOKS}
SKB = ("ingress", "egress")
PARENT = f"netslot-test-{os.getpid()}"
SPEC = """\
prefix = "{prefix}"
uplink = "up0"
slots = 2
[addresses]
pool = "10.201.0.0/16"
pool6 = "fd5c:7::/48"
[attachment]
kind = "process"
[root]
backend = "nftables"
[parameters.open]
type = "int"
default = "0"
[cgroup]
parent = "{parent}"
[[bpf.programs]]
object = "user.o"
program = "on_{hook}"
hook = "cgroup/{hook}"
maps = {{ open = "open" }}
[limits]
hold_down = "0s"
"""
OUTSIDE6 = "2001:db8:7::10"
CLIENT = """
import socket, sys
kind, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    sock.settimeout(0.7)
    if kind == "tcp":
        sock.connect((address, port))
    else:
        sock.sendto(b"x", (address, port))
except OSError as error:
    sys.exit(f"{type(error).__name__} {error}")
"""


@pytest.fixture(scope="module")
def user_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("clang"):
        pytest.skip("NOT CHECKED: clang is not here to compile a user's program with")
    directory = tmp_path_factory.mktemp("bpf")
    text = PROGRAM
    for hook in HOOKS.values():
        context = "__sk_buff" if hook in SKB else "bpf_sock" if hook == "sock_create" else "bpf_sock_addr"
        section = f"cgroup_skb/{hook}" if hook in SKB else f"cgroup/{hook}"
        text += f'SEC("{section}") int on_{hook}(struct {context} *ctx) {{ return allowed(); }}\n'
    (directory / "user.c").write_text(text, encoding="utf-8")
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    command = ["clang", "-O2", "-g", "-target", "bpf", include, "-c", "user.c", "-o", "user.o"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "user.o"


@pytest.fixture(params=HOOKS.values())
def made(request: pytest.FixtureRequest, user_object: Path) -> Iterator[tuple[str, hostlab.PlayedHost, Host]]:
    with hostlab.played() as where:
        where.spec.write_text(SPEC.format(prefix=where.prefix, parent=PARENT, hook=request.param), encoding="utf-8")
        shutil.copy(user_object, where.spec.parent)
        where.root.ip("addr add 2001:db8:2::1/64 dev up0 nodad", "route add default via 2001:db8:2::2")
        where.outside.ip(
            "addr add 2001:db8:2::2/64 dev eth0 nodad",
            f"addr add {OUTSIDE6}/128 dev lo nodad",
            "route add 10.201.0.0/16 via 192.0.2.1",
            "route add fd5c:7::/48 via 2001:db8:2::1",
        )
        with where.host() as host:
            host.up(where.spec)
            yield request.param, where, host
    assert not (cgroupfs.unified_root() / PARENT).exists()


def _tries(hook: str) -> list[tuple[str, str]]:
    """(tcp or udp, address) of what the hook judges."""
    kinds = ["udp"] if hook.startswith("sendmsg") else ["tcp"] if hook.startswith("connect") else ["tcp", "udp"]
    kinds = ["tcp"] if hook == "ingress" else kinds  # nothing comes back to a datagram
    addresses = {"4": [hostlab.OUTSIDE], "6": [OUTSIDE6]}.get(hook[-1], [hostlab.OUTSIDE, OUTSIDE6])
    return [(kind, address) for kind in kinds for address in addresses]


def _others(hook: str) -> list[tuple[str, str]]:
    """What the hook does not judge: it must work whatever the map says."""
    every = [(kind, address) for kind in ("tcp", "udp") for address in (hostlab.OUTSIDE, OUTSIDE6)]
    return [] if hook in (*SKB, "sock_create") else [each for each in every if each not in _tries(hook)]


def _works(host: Host, slot: int, kind: str, address: str) -> bool:
    """Whether a process that ``netslot exec`` puts into the slot and its cgroup gets through."""
    process = host.start(slot, [sys.executable, "-c", CLIENT, kind, address, "7000"])
    return process.wait(timeout=20) == 0


def _attached(slot: str, hook: str) -> list[int]:
    with cgroupfs.opened(cgroupfs.unified(f"{PARENT}/{slot}")) as target:
        return list(bpf.prog_query(target, CGROUP_HOOKS[f"cgroup/{hook}"].attach_type))


def test_a_lease_opens_and_closes_a_hook_in_place(made: tuple[str, hostlab.PlayedHost, Host]) -> None:
    hook, where, host = made
    echoes = [lab.Echo(where.outside, address) for address in (hostlab.OUTSIDE, OUTSIDE6)]
    lease = host.lease("tenant")
    assert lease is not None
    before = _attached(lease.netns, hook)
    assert len(before) == 1
    assert not any(_works(host, lease.slot, *each) for each in _tries(hook)), "closed"
    assert all(_works(host, lease.slot, *each) for each in _others(hook)), "and nothing else"
    host.update(lease.id, {"open": "1"})
    assert all(_works(host, lease.slot, *each) for each in _tries(hook)), "open"
    assert _attached(lease.netns, hook) == before, "the same program: its map was changed"
    host.release(owner="tenant")
    again = host.lease("next")
    assert again is not None
    assert not _works(host, again.slot, *_tries(hook)[0]), "closed again for the next tenant"
    host.release(owner="next")
    opened = host.lease("third", params={"open": "1"})
    assert opened is not None
    assert all(_works(host, opened.slot, *each) for each in _tries(hook)), "open from the first packet on"
    host.release(owner="third")
    cgroupfs.create(f"{PARENT}/{where.prefix}7", ())  # as of a build that was killed: down removes it
    for echo in echoes:
        echo.close()


def test_what_somebody_changes_is_named_and_mended(made: tuple[str, hostlab.PlayedHost, Host]) -> None:
    hook, where, host = made
    deadline = time.monotonic() + 3
    while host.verify().drift and time.monotonic() < deadline:
        time.sleep(0.05)  # IPv6 adds routes a moment after addresses
    name, attach_type = f"{where.prefix}1", CGROUP_HOOKS[f"cgroup/{hook}"].attach_type
    whose = f"slot 1: bpf cgroup/{hook} of cgroup {PARENT}/{name}"
    (number,) = _attached(name, hook)
    program = bpf.prog_by_id(number)
    value = bpf.map_by_id(bpf.prog_info(program).map_ids[0])
    bpf.map_update(value, bytes(4), b"\1\0\0\0")
    os.close(value)
    assert [str(each) for each in host.verify(repair=True).drift] == [
        f"slot 1: bpf on_{hook}: map open does not hold what was bound"
    ]
    assert host.verify().drift == []
    (number,) = _attached(name, hook)
    os.close(program)
    program = bpf.prog_by_id(number)
    with cgroupfs.opened(cgroupfs.unified(f"{PARENT}/{name}")) as target:
        bpf.prog_detach(target, program, attach_type)
    os.close(program)
    assert [str(each) for each in host.verify(repair=True).drift] == [f"{whose}: program on_{hook} is missing"]
    assert host.verify().drift == []
    with cgroupfs.opened(cgroupfs.unified(f"{PARENT}/{name}")) as target:
        info = bpf.prog_by_id(_attached(name, hook)[0])
        kind = bpf.prog_info(info).kind
        code = b"\xb7\0\0\0\1\0\0\0\x95\0\0\0\0\0\0\0"  # r0 = 1; exit
        other = bpf.prog_load(kind, code, "GPL", name=f"on_{hook}", attach_type=attach_type)
        bpf.prog_attach(target, other, attach_type, replace=info)
        os.close(info)
        os.close(other)
    assert [str(each) for each in host.verify(repair=True).drift] == [f"{whose}: program on_{hook} is another one"]
    assert host.verify().drift == []
