"""The benchmark's tenant rules as dies, one for each backend."""

from __future__ import annotations

from netslot.bench.tenants import GUEST, SLOT_IPTABLES, SLOT_NFT
from netslot.errors import NetslotError
from netslot.policy import iptables, nftables
from netslot.policy.base import Die

BACKENDS = ("iptables-legacy", "iptables-nft", "nftables")

_SAMPLES = [
    {"guest_address": guest, "address": address}
    for guest, address in ((GUEST, "10.201.0.1"), ("172.16.0.6", "10.201.3.5"), (GUEST, "10.77.31.255"))
]


def cast_backend(backend: str) -> Die:
    """The thirty rules and the NAT of a slot. NetslotError when they cannot be stamped as bytes."""
    die: Die
    if backend == "nftables":
        die = nftables.cast(SLOT_NFT, samples=_SAMPLES, file="bench.nft")
    elif backend == "iptables-nft":
        die = nftables.cast_iptables(SLOT_IPTABLES, samples=_SAMPLES, file="bench.rules")
    else:
        die = iptables.cast(SLOT_IPTABLES, samples=_SAMPLES, file="bench.rules")
    if die.fallback:
        raise NetslotError(f"the benchmark's {backend} rules are not stamped: {die.fallback}")
    return die
