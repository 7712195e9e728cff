"""Stateless one-to-one NAT with nftables alone, for kernels that forbid BPF; the bpf policy has the other one.

Addresses are rewritten before connection tracking sees the packet, and it is told to keep out. What nf_tables
cannot do is arithmetic, so the packet that an ICMP error quotes stays untranslated: errors about the guest's own
packets reach it but are not believed. To keep path MTU discovery from stalling on that, TCP's maximum segment
size is held to the uplink's MTU; for other protocols, and for narrower paths beyond it, use the bpf kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from netslot.errors import SpecError
from netslot.policy import nftables
from netslot.policy.base import Values
from netslot.policy.nftables import NftablesDie

TABLE = "netslot_nat"
"""The nf_tables tables (ip, and ip6 where the slot has an address) that the NAT is in."""


def cast(samples: Sequence[Values]) -> NftablesDie:
    """The NAT of slots like ``samples``; SpecError when they have no guest behind them."""
    if not samples[0].get("guest_address"):
        raise SpecError("NAT needs a guest's address behind the slot", key="nat.kind")
    return nftables.cast(nft_text(ipv6=bool(samples[0].get("guest_address6"))), samples=samples, file=TABLE)


def nft_text(*, ipv6: bool) -> str:
    """The tables as nft reads them, with the slot's variables."""
    text = _table("ip", "${address}", "${guest_address}")
    return text + _table("ip6", "${address6}", "${guest_address6}") if ipv6 else text


def _table(family: str, address: str, guest: str) -> str:
    """``raw`` runs before connection tracking (-200) and before routing; ``leave`` is the last to see a packet.

    Of what is forwarded (it came in by the inner link, iif is known) only the guest's own packets leave.
    """
    return f"""\
table {family} {TABLE} {{
	chain raw {{
		type filter hook prerouting priority -300;
		iifname "${{uplink_if}}" {family} daddr {guest} drop
		iifname "${{uplink_if}}" {family} daddr {address} notrack {family} daddr set {guest}
		iifname "${{guest_if}}" {family} saddr {guest} notrack
	}}
	chain leave {{
		type filter hook postrouting priority 300;
		oifname != "${{uplink_if}}" return
		iifname "${{guest_if}}" {family} saddr != {guest} drop
		tcp flags syn tcp option maxseg size set rt mtu
		{family} saddr {guest} {family} saddr set {address}
	}}
}}
"""
