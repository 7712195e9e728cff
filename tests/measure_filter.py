"""What a look-up in the egress filter costs, in a list of 10 and of 100,000 prefixes.

python tests/measure_filter.py, as root: nanoseconds of the whole filter program for packets to listed addresses, the
median of rounds that take the two lists in turn. ``repeated``: each address 10,000 times; ``first``: once.
"""

from __future__ import annotations

import random
import statistics
import struct
from ipaddress import IPv4Address, IPv6Address

import packets as p
from netslot.kernel import bpf, tc
from netslot.policy.bpf_parts import Filter, Place, close_all
from netslot.spec.policies import BpfFilter

SIZES, ROUNDS, ADDRESSES = (10, 100_000), 9, 200


def networks(version: int, size: int) -> list[str]:
    chance = random.Random(size)
    if version == 4:
        return [f"{IPv4Address(chance.getrandbits(24) << 8)}/24" for _ in range(size)]
    return [f"{IPv6Address(1 << 125 | chance.getrandbits(61) << 64)}/64" for _ in range(size)]


def nanoseconds(program: int, destination: str, repeat: int) -> int:
    six = ":" in destination
    source = "fd00::1" if six else "10.0.0.1"
    packet = (p.ipv6 if six else p.ipv4)(source, destination, p.UDP, p.udp(source, destination, 1, 9, b"x"))
    frame = p.ethernet("02:00:00:00:00:01", "02:00:00:00:00:02", p.ETH_P_IPV6 if six else p.ETH_P_IP, packet)
    context = bytes(48) + struct.pack("=I", (54 if six else 34) | p.UDP << 16)
    run = bpf.prog_test_run(program, frame, context=context, repeat=repeat)
    assert run.verdict == -1, destination
    return run.nanoseconds


def main() -> None:
    for version in (4, 6):
        part = Filter(BpfFilter(allow="allow"), {})
        lists = {size: networks(version, size) for size in SIZES}
        made = {size: part.rebind({}, {"allow": lists[size]}) for size in SIZES}
        place = Place(tc.EGRESS, 3 if version == 4 else 4)
        programs = {size: next(a.program for a in made[size] if a.place == place) for size in SIZES}
        for name, repeat in (("repeated", 10_000), ("first", 1)):
            found: dict[int, list[float]] = {size: [] for size in SIZES}
            for turn in range(ROUNDS):
                for size in SIZES:
                    chosen = random.Random(turn).choices(lists[size], k=ADDRESSES)
                    times = [nanoseconds(programs[size], each.partition("/")[0], repeat) for each in chosen]
                    found[size].append(statistics.fmean(times))
            few, many = (statistics.median(found[size]) for size in SIZES)
            print(f"IPv{version} {name}: {few:.0f} ns in 10, {many:.0f} ns in 100,000, ratio {many / few:.2f}")
        close_all([a.program for attachments in made.values() for a in attachments if a.owned])
        part.close()


if __name__ == "__main__":
    main()
