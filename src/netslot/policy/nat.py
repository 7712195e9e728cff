"""Stateless one-to-one NAT with nftables alone, for kernels that forbid BPF; the bpf policy has the other one.

Addresses are rewritten before connection tracking sees the packet, and it is told to keep out unless connections
are to be counted. The packet that an
ICMP error quotes is rewritten as well, with the checksum that this takes: nft has no words for the latter, so it is
put into the rules that nft made (:func:`correct_checksums`).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from netslot.errors import SpecError
from netslot.kernel import nf_attrs as attrs
from netslot.kernel import nf_tables as nf
from netslot.kernel.netlink import NLA_TYPE_MASK
from netslot.kernel.nf_attrs import Node, Nodes
from netslot.policy import nftables
from netslot.policy.base import Values
from netslot.policy.nft_template import Item, new, snapshot
from netslot.policy.nftables import NftablesDie
from netslot.policy.tunnels import Arrival

TABLE = "netslot_nat"
"""The nf_tables tables (ip, and ip6 where the slot has an address) that the NAT is in."""


def cast(samples: Sequence[Values], own: Sequence[Arrival] = ()) -> NftablesDie:
    """The NAT of slots like ``samples``; SpecError when they have no guest behind them."""
    if not samples[0].get("guest_address"):
        raise SpecError("NAT needs a guest's address behind the slot", key="nat.kind")
    text = nft_text(ipv6=bool(samples[0].get("guest_address6")), own=own)
    return nftables.cast(text, samples=samples, file=TABLE, finish=correct_checksums)


def nft_text(*, ipv6: bool, tracked: bool = False, own: Sequence[Arrival] = ()) -> str:
    """The tables as nft reads them, with the slot's variables; ``own`` is what comes to the slot itself.

    ``tracked`` lets connection tracking see the packets, with the guest's addresses, for rules that count
    connections; addresses are translated without it either way.
    """
    keep_out = "" if tracked else " notrack"
    text = _table("ip", "${address}", "${guest_address}", _QUOTES, keep_out, own)
    return text + _table("ip6", "${address6}", "${guest_address6}", _QUOTES6, keep_out, own) if ipv6 else text


class _Quotes(NamedTuple):
    """Which ICMP messages quote a packet, and where in bits its addresses are in them, and the packet's own.

    In this form nft takes an address for the number that it wants to write.
    """

    errors: tuple[str, ...]
    quoted_source: str
    quoted_destination: str
    source: str
    destination: str
    quoted_protocol: str
    quoted_ports: tuple[str, str]
    """Source and destination, behind a header without options."""


# Behind eight bytes of ICMP; the addresses are at byte 12 and 16 of an IPv4 header, 8 and 24 of an IPv6 one.
_QUOTES = _Quotes(
    ("icmp type destination-unreachable", "icmp type 11-12"),
    "@th,160,32",
    "@th,192,32",
    "@nh,96,32",
    "@nh,128,32",
    "@th,136,8",
    ("@th,224,16", "@th,240,16"),
)
_QUOTES6 = _Quotes(
    ("icmpv6 type < 128",),
    "@th,128,128",
    "@th,256,128",
    "@nh,64,128",
    "@nh,192,128",
    "@th,112,8",
    ("@th,384,16", "@th,400,16"),
)


def _table(family: str, address: str, guest: str, quotes: _Quotes, keep_out: str, own: Sequence[Arrival]) -> str:
    """``raw`` runs before connection tracking (-200) and before routing; ``leave`` is the last to see a packet.

    Of what is forwarded (it came in by the inner link, iif is known) only the guest's own packets leave. What an
    error quotes has the addresses that its receiver knows: those of the error's own header, the other way round.
    """
    back = f'iifname "${{uplink_if}}" {family} daddr {guest}'
    quoted_in = [f"{back} {error} {quotes.quoted_source} set {quotes.destination}" for error in quotes.errors]
    quoted_out = [f"{error} {quotes.quoted_destination} set {quotes.source}" for error in quotes.errors]
    raw = [
        "type filter hook prerouting priority -300;",
        f"{back} drop",
        *(
            f'iifname "${{uplink_if}}" {family} daddr {address} {each}{keep_out} accept'
            for each in _owned(own, quotes)
        ),
        f'iifname "${{uplink_if}}" {family} daddr {address}{keep_out} {family} daddr set {guest}',
        *quoted_in,
        *([f'iifname "${{guest_if}}" {family} saddr {guest}{keep_out}'] if keep_out else []),
    ]
    leave = [
        "type filter hook postrouting priority 300;",
        'oifname != "${uplink_if}" return',
        f'iifname "${{guest_if}}" {family} saddr != {guest} drop',
        f"{family} saddr {guest} {family} saddr set {address}",
        *quoted_out,
    ]
    return f"table {family} {TABLE} {{\n{_chain('raw', raw)}{_chain('leave', leave)}}}\n"


def _owned(own: Sequence[Arrival], quotes: _Quotes) -> Iterator[str]:
    """The packets that stay the slot's, and the errors about those that it sent."""
    for protocol, port in own:
        yield f"meta l4proto {protocol} th dport {port}" if port else f"meta l4proto {protocol}"
        for error in quotes.errors:
            quoted = f"{error} {quotes.quoted_protocol} {protocol}"
            yield from (f"{quoted} {place} {port}" for place in quotes.quoted_ports) if port else (quoted,)


def _chain(name: str, lines: Sequence[str]) -> str:
    return f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"


def correct_checksums() -> None:
    """Have the rules that rewrite quoted packets correct a checksum; in the calling thread's namespace, after nft.

    In IPv4 that of the quoted header: then the sum over the ICMP message stays what it was. An IPv6 header has
    none, so there it is the message's own. Places count from the ICMP header (nft_payload_set_eval()).
    """
    with nf.Socket() as sock:
        changes = [
            new(changed, Node(attrs.RULE_HANDLE, attrs.leaf(rule.nodes, attrs.RULE_HANDLE)), flags=nf.REPLACE)
            for rule in snapshot(sock).items[attrs.RULE]
            if rule.table == TABLE and (changed := _corrected(rule)) is not rule
        ]
        sock.commit(nf.Batch(changes))


_BASE, _SOURCE_REGISTER, _CHECKSUM, _CHECKSUM_AT = 2, 5, 6, 7  # NFTA_PAYLOAD_*
_ICMP_CHECKSUM_AT, _QUOTED_CHECKSUM_AT = 2, 18
_TRANSPORT_HEADER, _INTERNET_CHECKSUM = 2, 1


def _corrected(rule: Item) -> Item:
    place = _QUOTED_CHECKSUM_AT if rule.family == socket.AF_INET else _ICMP_CHECKSUM_AT
    nodes = _with_checksum(rule.nodes, place)
    return rule if nodes == rule.nodes else Item(attrs.RULE, rule.family, nodes)


def _with_checksum(nodes: Nodes, place: int) -> Nodes:
    """The nodes, with a checksum to correct in every write to what is behind the network header."""
    base = attrs.number(nodes, _BASE) == _TRANSPORT_HEADER
    writes = base and bool(attrs.leaf(nodes, _SOURCE_REGISTER)) and bool(attrs.leaf(nodes, _CHECKSUM))
    numbers = {_CHECKSUM: _INTERNET_CHECKSUM, _CHECKSUM_AT: place} if writes else {}
    found = []
    for node in nodes:
        value = node.value
        if isinstance(value, tuple):
            value = _with_checksum(value, place)
        elif node.kind & NLA_TYPE_MASK in numbers:
            value = numbers[node.kind & NLA_TYPE_MASK].to_bytes(4, "big")
        found.append(node._replace(value=value))
    return tuple(found)
