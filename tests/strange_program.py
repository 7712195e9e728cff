"""Hang a BPF program where netslot hangs none, as somebody else on the host might.

python strange_program.py xdp|ingress|egress LINK      on a link of this namespace, by itself
python strange_program.py cgroup NUMBER DIRECTORY      on a cgroup, by itself (enum bpf_attach_type)
... held                                               as a BPF link, which this process holds until it reads a line
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from netslot.kernel import bpf, cgroupfs, rtnetlink
from netslot.kernel.netlink import Request, Socket, attr, nested

_LINK_CREATE = 28
_XDP = 6


def _returns(value: int) -> bytes:
    """r0 = value; exit."""
    return struct.pack("<BBhiBBhi", 0xB7, 0, 0, value, 0x95, 0, 0, 0)


def _attach(target: int, program: int, kind: int, held: bool) -> None:
    if held:
        request = struct.pack("=IIII48x", program, target, kind, 0)
        bpf._bpf(_LINK_CREATE, request, "bpf link_create")
    elif kind in bpf.TCX_HOOKS.values():
        bpf._bpf(8, struct.pack("=IIIIII8x", target, program, kind, 0, 0, 0), "bpf prog_attach")
    else:
        bpf.prog_attach(target, program, kind)


def main(kind: str, *arguments: str) -> None:
    held = arguments[-1] == "held"
    if kind == "cgroup":
        number = int(arguments[0])
        program = bpf.prog_load(bpf.PROG_TYPE_CGROUP_SKB, _returns(1), "GPL", name="strange", attach_type=number)
        with cgroupfs.opened(Path(arguments[1])) as target:
            _attach(target, program, number, held)
    else:
        with Socket() as sock:
            index = rtnetlink.link_index(sock, arguments[0])
            if kind == "xdp":
                program = bpf.prog_load(_XDP, _returns(2), "GPL", name="strange")
                payload = struct.pack("=BxHiII", 0, 0, index, 0, 0)
                payload += nested(rtnetlink.IFLA_XDP, attr(rtnetlink.IFLA_XDP_FD, struct.pack("=i", program)))
                sock.execute([Request(rtnetlink.RTM_SETLINK, 0, payload, "attach XDP")])
            else:
                program = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, _returns(-1), "GPL", name="strange")
                _attach(index, program, bpf.TCX_HOOKS[kind], held)
    if held:
        print("held", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
