"""A small host in throwaway namespaces: a root with an uplink, an outside behind it, a spec, a state directory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import Net, nets
from netslot.host.host import Host
from netslot.kernel import netns

NETSLOT = str(Path(sys.executable).with_name("netslot"))
_numbers = itertools.count()
OUTSIDE = "203.0.113.10"

RULES = """table inet slot {
    set allow { type ipv4_addr; flags interval; }
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname "${guest_if}" ip daddr @allow accept
        iifname "${guest_if}" ip daddr 169.254.169.254 drop
        iifname "${guest_if}" tcp dport 25 drop
        iifname "${guest_if}" counter accept
    }
    chain nat {
        type nat hook postrouting priority 100;
        oifname "${uplink_if}" masquerade
    }
}
"""

SPEC = """prefix = "{prefix}"
uplink = "up0"
slots = {slots}

[addresses]
pool = "10.201.0.0/16"

[attachment]
kind = "{kind}"

[rules]
backend = "nftables"
nft = "slot.nft"

[root]
backend = "nftables"

[parameters.allow]
type = "cidrs"

[limits]
hold_down = "{hold_down}"
"""


class PlayedHost:
    """A spec and a state directory for a host whose root namespace is ``root``."""

    def __init__(
        self, directory: Path, root: Net, outside: Net, *, prefix: str, slots: int, kind: str, hold_down: str
    ) -> None:
        self.root = root
        self.outside = outside
        self.prefix = prefix
        self.state_dir = directory / "state"
        self.spec = directory / "netslot.toml"
        self._text = SPEC.format(prefix=prefix, slots="{slots}", kind=kind, hold_down=hold_down)
        self.write(slots)
        (directory / "slot.nft").write_text(RULES, encoding="utf-8")

    def write(self, slots: int) -> None:
        """Write the spec for this many slots."""
        self.spec.write_text(self._text.format(slots=slots), encoding="utf-8")

    def host(self) -> Host:
        return Host(self.state_dir, root_netns=self.root.name)

    def netslot(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line on this host."""
        command = [NETSLOT, "--state-dir", str(self.state_dir), "--root-netns", self.root.name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if check and done.returncode:
            raise AssertionError(f"{arguments}: {done.returncode} {done.stdout}{done.stderr}")
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.netslot("--json", *arguments).stdout)

    def traces(self) -> set[str]:
        """Everything in the kernel that is this host's: pins, links of root, rules of root."""
        pins = {f"pin {name}" for name in netns.names() if name.startswith(self.prefix)}
        links = json.loads(self.root.sh("ip -j link show"))
        found = {f"link {link['ifname']}" for link in links if link["ifname"].startswith(self.prefix)}
        tables = {f"nft {line}" for line in self.root.sh("nft list tables").splitlines()}
        return pins | found | tables


@contextmanager
def played(*, slots: int = 3, kind: str = "tap", hold_down: str = "0s") -> Iterator[PlayedHost]:
    """A host that is not up yet; what is left of it afterwards is an error."""
    prefix = f"h{os.getpid() % 10000}{chr(ord('a') + next(_numbers) % 26)}"
    with nets("outside", "root") as (outside, root), tempfile.TemporaryDirectory() as directory:
        root.ip(
            f"link add up0 type veth peer name eth0 netns {outside.name}",
            "link set up0 up",
            "addr add 192.0.2.1/24 dev up0",
            "route add default via 192.0.2.2",
        )
        outside.ip("link set eth0 up", "addr add 192.0.2.2/24 dev eth0", f"addr add {OUTSIDE}/32 dev lo")
        host = PlayedHost(Path(directory), root, outside, prefix=prefix, slots=slots, kind=kind, hold_down=hold_down)
        try:
            yield host
        finally:
            with host.host() as last:
                if last.exists:
                    last.down(force=True)
            left = host.traces()
            assert not left, left
