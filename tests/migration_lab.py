"""A played host with tenants in namespaces of their own, each behind a veth, and servers outside."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from lab import Net, nets
from synthetic_host import SyntheticHost, make_host


@dataclass
class PlayedHost:
    """``homes``: each tenant's namespace, by the tenant's name."""

    rules: SyntheticHost
    root: Net
    outside: Net
    homes: dict[str, Net]


OUTSIDE = "198.18.7.1"
UPLINK = "198.18.7.2"


def load(net: Net, text: str, tool: str = "iptables-legacy-restore") -> None:
    subprocess.run(["nsenter", f"--net=/run/netns/{net.name}", tool], input=text, text=True, check=True)


@contextlib.contextmanager
def played_host(tenants: int, style: str = "mixed") -> Iterator[PlayedHost]:
    """root [tapN] -- [eth0] tenant N; root [eth0] -- [eth0] outside, which owns 203.0.113.0/24 too."""
    rules = make_host(tenants, style=style)
    with nets("root", "out", *(f"t{number}" for number in range(tenants))) as (root, outside, *homes):
        root.ip(
            f"link add eth0 type veth peer name eth0 netns {outside.name}",
            f"addr add {UPLINK}/30 dev eth0",
            "link set eth0 up",
            f"route add 203.0.113.0/24 via {OUTSIDE}",
        )
        outside.ip(f"addr add {OUTSIDE}/30 dev eth0", "link set eth0 up", "route add local 203.0.113.0/24 dev lo")
        root.sysctl(ipv4__ip_forward=1)
        for one, home in zip(rules.tenants, homes, strict=True):
            root.ip(
                f"link add {one.interface} type veth peer name eth0 netns {home.name}",
                f"addr add {one.gateway}/30 dev {one.interface}",
                f"link set {one.interface} up",
            )
            home.ip(f"addr add {one.address}/30 dev eth0", "link set eth0 up", f"route add default via {one.gateway}")
        load(root, rules.text)
        yield PlayedHost(rules, root, outside, {t.name: h for t, h in zip(rules.tenants, homes, strict=True)})
