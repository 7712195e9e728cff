"""What one rtnetlink request costs from Python: netslot's own code against pyroute2.

    unshare -rn python tests/measure_netlink.py netslot
    unshare -rn python tests/measure_netlink.py pyroute2      # in an environment that has it

The request makes a veth pair under a name that is taken: the kernel looks the name up and refuses, so that what is
measured is the library and one round trip through the kernel, not the making of links. Medians in microseconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

ROUNDS = 1000
MAC = "02:00:00:00:00:01"
EEXIST = 17


def netslot() -> tuple[Callable[[], bytes], Callable[[], None]]:
    """How netslot encodes the request, and how it makes it."""
    from netslot.errors import KernelError
    from netslot.kernel import netlink, rtnetlink

    sock = netlink.Socket()

    def request() -> netlink.Request:
        return rtnetlink.veth("slot1", "up0", mtu=1500, peer_mac=MAC)

    def encode() -> bytes:
        made = request()
        return netlink.message(made.kind, made.flags, made.payload, 1)

    def make() -> None:
        try:
            sock.execute([request()])
        except KernelError as error:
            if error.errno != EEXIST:
                raise

    return encode, make


def pyroute2() -> tuple[Callable[[], bytes], Callable[[], None]]:
    """The same by pyroute2: its message class, and its IPRoute."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    peer = [("IFLA_IFNAME", "up0"), ("IFLA_ADDRESS", MAC), ("IFLA_MTU", 1500)]
    data = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
    info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
    ip = IPRoute()

    def encode() -> bytes:
        message = ifinfmsg()
        message["attrs"] = [("IFLA_IFNAME", "slot1"), ("IFLA_MTU", 1500), ("IFLA_LINKINFO", info)]
        message["header"]["type"] = 16
        message.encode()
        return bytes(message.data)

    def make() -> None:
        try:
            ip.link("add", ifname="slot1", kind="veth", mtu=1500, peer={"ifname": "up0", "mtu": 1500, "address": MAC})
        except NetlinkError as error:
            if error.code != EEXIST:
                raise

    return encode, make


def median(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e6


def main() -> None:
    library = sys.argv[1]
    encode, make = {"netslot": netslot, "pyroute2": pyroute2}[library]()
    make()
    print(f"{library}: {len(encode())} bytes, encode {median(encode):.1f} us, make {median(make):.1f} us")


if __name__ == "__main__":
    main()
