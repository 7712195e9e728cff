"""Rule files loaded by the real tools, to compare with."""

from __future__ import annotations

import subprocess

from lab import Net
from netslot.spec.model import Rules
from netslot.spec.render import render

LOADERS = {
    "nftables": {"nft": ["nft", "-f", "-"]},
    "iptables-legacy": {"ipv4": ["iptables-legacy-restore"], "ipv6": ["ip6tables-legacy-restore"]},
    "iptables-nft": {"ipv4": ["iptables-nft-restore"], "ipv6": ["ip6tables-nft-restore"]},
}


def put(net: Net, rules: Rules, values: dict[str, str]) -> None:
    """Load rule files, rendered with ``values``, inside ``net``."""
    for kind, tool in LOADERS[rules.backend].items():
        file = getattr(rules, kind)
        if file is not None:
            text = render(file.text, values, file=file.name)
            subprocess.run(
                ["nsenter", f"--net=/run/netns/{net.name}", *tool],
                input=text,
                text=True,
                check=True,
                capture_output=True,
            )
