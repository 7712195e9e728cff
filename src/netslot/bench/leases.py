"""What leasing costs on a host of many slots: to acquire, to recycle, to verify."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netslot.bench import clients, machine
from netslot.bench.field import prepare_root
from netslot.bench.statistics import percentile
from netslot.bench.tenants import GATEWAY, GUEST, RULES_PER_TENANT, UPLINK, nft_rules
from netslot.errors import NetslotError
from netslot.host import building, leasing, slots
from netslot.host.host import Host
from netslot.host.slots import Workshop
from netslot.kernel import netns
from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import Socket

Say = Callable[[str], None]

_SPEC = f"""
uplink = "{UPLINK}"
slots = {{slots}}

[addresses]
pool = "10.201.0.0/16"
guest = "{GUEST}/30"
gateway = "{GATEWAY}"

[attachment]
kind = "tap"

[rules]
backend = "nftables"
nft = "slot.nft"

[parameters.allow]
type = "cidrs"

[limits]
hold_down = "0s"
"""

_RULES = """table inet slot {{
    set allow {{ type ipv4_addr; flags interval; }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname "${{guest_if}}" ip daddr @allow accept
        iifname "${{guest_if}}" jump tenant
    }}
    chain tenant {{
        {rules}
    }}
    chain nat {{
        type nat hook postrouting priority 100;
        oifname "${{uplink_if}}" masquerade
    }}
}}
"""


def figures(times: Sequence[float]) -> dict[str, float]:
    """Microseconds: the median, the 99th percentile, and how many there were."""
    return {
        "samples": len(times),
        "p50_us": round(percentile(times, 0.5) * 1e6, 1),
        "p99_us": round(percentile(times, 0.99) * 1e6, 1),
    }


@contextmanager
def leased_host(count: int) -> Iterator[tuple[Host, Path]]:
    """A host of this many slots on the stage that the calling process is on, and its spec file."""
    with netns.Worker() as worker:
        worker.run(prepare_root)
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        spec = Path(directory, "netslot.toml")
        spec.write_text(_SPEC.format(slots=count), encoding="ascii")
        rules = "\n        ".join(nft_rules(GUEST))
        spec.with_name("slot.nft").write_text(_RULES.format(rules=rules), encoding="ascii")
        with Host(Path(directory, "state")) as host:
            host.up(spec)
            yield host, spec


def _timed(call: Callable[[int], object], count: int) -> list[float]:
    times = []
    for number in range(count):
        started = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - started)
    return times


def _give_back(host: Host) -> None:
    for lease in host.leases():
        host.release(lease=lease.id, clean=False)
    leasing.recover(host.engine)


# --- acquire -----------------------------------------------------------------------------------------


def measure_acquire(count: int, samples: int, say: Say = lambda _: None) -> dict[str, Any]:
    """Acquire in this process on a tenth of the slots and on all, with a long list, and over the daemon's socket."""
    result: dict[str, Any] = {"machine": machine.facts(), "slots": count}
    few = max(2, count // 10)
    long_list = [f"198.18.{high}.{low}/32" for high in range(4) for low in range(250)]
    with leased_host(few) as (host, spec):
        result["few"] = {"slots": few, **_in_process(host, min(samples, few - 1))}
        say(f"building {count} slots")
        spec.write_text(_SPEC.format(slots=count), encoding="ascii")
        host.up(spec)
        result["many"] = {"slots": count, **_in_process(host, min(samples, few - 1))}
        result["ratio"] = round(result["many"]["p50_us"] / result["few"]["p50_us"], 2)
        times = _timed(lambda number: host.lease(f"t{number}", params={"allow": long_list}), min(100, few - 1))
        result["list_of_1000"] = figures(times)
        _give_back(host)
        say("over the socket")
        with clients.daemon(host.engine.state_dir) as path:
            result["socket"] = clients.one_by_one(path, min(samples, few - 1))
            together = min(100, count // 2)
            result["socket_100_paced"] = clients.many(path, together, rounds=5, spread=1.0)
            result["socket_100_at_once"] = clients.many(path, together, rounds=5, spread=0.0)
    return result


def _in_process(host: Host, samples: int) -> dict[str, float]:
    host.lease("warm up")
    gc.collect()
    gc.freeze()
    times = _timed(lambda number: host.lease(f"tenant {number}"), samples)
    gc.unfreeze()
    _give_back(host)
    return figures(times)


# --- recycle -----------------------------------------------------------------------------------------


def measure_recycle(host: Host, samples: int) -> dict[str, Any]:
    """Recycle slots that had a tenant, and destroy and build as many, until the kernel has cleaned up."""
    for number in range(samples):
        host.lease(f"tenant {number}", params={"allow": ["192.0.2.0/24"]})
    for lease in host.leases():
        host.release(lease=lease.id, clean=False)
    times: list[float] = []
    leasing.recover(host.engine, observe=times.append)
    rebuild = host.engine.run(lambda workshop: _rebuild(host, workshop, samples))
    recycled = figures(times)
    return {"recycle": recycled, "rebuild_us": rebuild, "times_cheaper": round(rebuild / recycled["p50_us"], 1)}


def _rebuild(host: Host, workshop: Workshop, samples: int) -> float:
    """Microseconds a slot, the kernel's own clean-up counted."""
    engine = host.engine
    name = next(iter(engine.spec.classes))
    template = engine.template(name)
    started = time.perf_counter()
    for number in range(1, samples + 1):
        building.rebuild(engine, engine.plan(number, name), template, workshop)
    _wait_for_cleanup(workshop)
    return round((time.perf_counter() - started) / samples * 1e6, 1)


def _wait_for_cleanup(workshop: Workshop) -> None:
    """The kernel removes dead namespaces in the order in which they died: wait until one that dies now is gone."""
    with netns.fresh():
        last = netns.open_own()
    workshop.root.execute([rt.veth("sentinel", "gone", peer_netns=last)])
    os.close(last)
    while any(link.name == "sentinel" for link in rt.links(workshop.root)):
        time.sleep(0.001)


# --- verify ------------------------------------------------------------------------------------------


def measure_verify(count: int, rounds: int = 3) -> dict[str, Any]:
    """Verify everything; then seed one change of each kind and see whether it is found in that slot, and mended."""
    with leased_host(count) as (host, _):
        seconds = []
        for _ in range(rounds):
            report = host.verify()
            if report.drift:
                raise NetslotError(f"a host that nobody touched has drift: {report.drift[0]}")
            seconds.append(report.seconds)
        found = {name: _seeded(host, number, seed) for number, (name, seed) in enumerate(_SEEDS.items(), 1)}
    return {
        "machine": machine.facts(),
        "slots": count,
        "rules_per_slot": RULES_PER_TENANT + 4,
        "seconds": round(percentile(seconds, 0.5), 3),
        "us_per_slot": round(percentile(seconds, 0.5) / count * 1e6, 1),
        "seeded": found,
    }


def _seeded(host: Host, number: int, command: str) -> bool:
    """Whether the change is found in slot ``number`` alone, in words, and repaired."""
    plan = host.engine.plan(number, next(iter(host.engine.spec.classes)))

    def change(_: Workshop) -> None:
        with slots.inside(plan), Socket():
            status = os.system(command)
        if status:
            raise NetslotError(f"{command}: exit status {status}")

    host.engine.run(change)
    report = host.verify()
    named = {each.where.split(":")[0] for each in report.drift}
    repaired = host.verify(slots=[number], repair=True)
    return named == {f"slot {number}"} and repaired.unrepaired == 0


_SEEDS = {
    "a rule": "nft delete rule inet slot tenant handle "
    "$(nft -a list chain inet slot tenant | sed -n 's/.*dport 25 .*handle //p')",
    "a set element": "nft add element inet slot allow '{ 198.51.100.9 }'",
    "a chain's policy": "nft add chain inet slot forward '{ policy accept; }'",
    "a route": "ip route add 198.51.100.0/24 dev up0",
    "an address": "ip address add 198.51.100.1/32 dev up0",
    "a link that is down": "ip link set tap0 down",
    "a link's flag": "ip link set tap0 promisc on",
    "a sysctl": "sysctl -qw net.ipv4.conf.up0.rp_filter=2",
}


def acquire_lines(result: dict[str, Any]) -> str:
    """``bench acquire`` for people."""
    lines = []
    for name in ("few", "many", "list_of_1000", "socket", "socket_100_paced", "socket_100_at_once"):
        one = result[name]
        where = f"{one['slots']} slots" if "slots" in one else name.replace("_", " ")
        lines.append(
            f"{where:24} p50 {one['p50_us']:>10,.0f} µs   p99 {one['p99_us']:>10,.0f} µs   ({one['samples']})"
        )
    return "\n".join([*lines, f"many slots against few: {result['ratio']:.2f}"])


def verify_lines(result: dict[str, Any]) -> str:
    """``bench verify`` for people."""
    head = f"{result['slots']} slots in {result['seconds']:.2f} s, {result['us_per_slot']:.0f} µs a slot"
    return "\n".join([head, *(f"{name}: {'found' if ok else 'MISSED'}" for name, ok in result["seeded"].items())])
