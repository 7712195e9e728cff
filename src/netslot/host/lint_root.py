"""Root rules must name no slot: by its link, its address, its MAC, or its guest."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TypeAlias

from netslot.host import nft_text
from netslot.host.lint_finding import LintFinding
from netslot.spec.model import HostSpec, RuleFile
from netslot.spec.render import render

Network: TypeAlias = IPv4Network | IPv6Network
Reason: TypeAlias = tuple[str, str, bool]
"""Message, hint, fatal."""

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_SLOT_MAC = re.compile(r"02:6e:0[01]:[0-9a-f]{2}:[0-9a-f]{2}:[0-9a-f]{2}")
_BRACKETS = re.compile(r"\[([0-9a-fA-F:.]+)\](?::[\d-]+)?")
_ADDRESS_PORT = re.compile(r"(\d+(?:\.\d+){3}(?:-\d+(?:\.\d+){3})?):[\d-]+")
_FREE_TEXT = ("--comment", "--log-prefix", "--nflog-prefix", "comment", "prefix")
"""What follows these words is for people."""


@dataclass(frozen=True, slots=True)
class Names:
    """How a rule could name one slot of this host."""

    prefix: str
    pools: tuple[Network, ...]
    guests: tuple[Network, ...]
    guest_macs: frozenset[str]

    @classmethod
    def of(cls, spec: HostSpec) -> Names:
        plan = spec.addresses
        guests: list[Network] = []
        macs: set[str] = set()
        for each in spec.classes.values():
            if each.guest_interface is not None and each.residents is None:
                guests = [plan.guest.network, *([plan.guest6.network] if plan.pool6 is not None else [])]
                macs |= {each.attachment.guest_mac, each.attachment.gateway_mac}
        pools = tuple(pool for pool in (plan.pool, plan.pool6) if pool is not None)
        return cls(spec.prefix, pools, tuple(guests), frozenset(macs))


def lint(file: RuleFile, values: Mapping[str, str], names: Names, *, is_nft: bool) -> list[LintFinding]:
    """What in a root rule file names one slot, and an nftables file that would flush others' rules."""
    text = render(file.text, values, file=file.name)
    source = file.text.split("\n")
    found = []
    for line, words in _nft_statements(text) if is_nft else _iptables_rules(text):
        rule = source[line - 1].strip()
        reasons = [reason for reason in _reasons(words, names) if reason is not None]
        if reasons:
            message, hint, fatal = max(reasons, key=lambda reason: reason[2])
            found.append(LintFinding(file.name, line, rule, message, hint, fatal))
        elif words[:2] == ["flush", "ruleset"]:
            message = "this would remove the rules of every other program in root"
            found.append(LintFinding(file.name, line, rule, message, "leave it out: netslot removes its own"))
    return found


def _iptables_rules(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith((":", "-")):
            try:
                yield number, shlex.split(line.removeprefix(":"))
            except ValueError:  # an open quote: iptables-restore will say so in its own words
                yield number, line.split()


def _nft_statements(text: str) -> Iterator[tuple[int, list[str]]]:
    read = nft_text.read(text)
    statements = [(rule.line, rule.words) for rule in read.rules] + read.other
    statements += [(chain.line, [key.chain]) for key, chain in read.chains.items()]
    return iter(sorted(statements, key=lambda statement: statement[0]))


def _reasons(words: Sequence[str], names: Names) -> Iterator[Reason | None]:
    """For each word that names a slot, why that is wrong; None for the others."""
    link = re.compile(rf"{re.escape(names.prefix)}\d+[+*]?")
    yield from _masked(words, names)
    for previous, word in zip(["", *words], words, strict=False):
        if previous in _FREE_TEXT:
            continue
        for part in word.strip('"').split(","):
            if link.fullmatch(part):
                every = f"'{names.prefix}+' (iptables) or '{names.prefix}*' (nftables)"
                hint = f"{every} is every slot; what is one slot's goes in its own rules"
                yield f"'{part}' names one slot's link", hint, True
            elif _MAC.fullmatch(part.lower()):
                yield _mac(part.lower(), names)
            else:
                verdict = _address(part, names)
                yield _published(verdict) if previous == ":" else verdict


def _mac(mac: str, names: Names) -> Reason | None:
    if _SLOT_MAC.fullmatch(mac):
        return f"{mac} is the MAC of one slot's link", "neighbours are permanent entries; no rule needs the MAC", True
    if mac in names.guest_macs:
        return f"{mac} is a guest's MAC, which root never sees", "match it in the slot's rules", True
    return None


def _published(verdict: Reason | None) -> Reason | None:
    """What a map gives is where a packet to the host is sent: it must be in root, and elements are no rules."""
    if verdict is None:
        return None
    message, _, _ = verdict
    hint = "right for a port of the host's own address; one of the slot's address is a parameter of type ports"
    return f"{message}, and the map changes with every tenant", hint, False


def _address(word: str, names: Names) -> Reason | None:
    bounds = _bounds(word)
    if bounds is None:
        return None
    version, low, high = bounds
    for pool in names.pools:
        first, last = int(pool.network_address), int(pool.broadcast_address)
        if version == pool.version and low <= last and high >= first and not (low <= first and high >= last):
            return _one_slot(word, pool)
    for guest in names.guests:
        inside = int(guest.network_address) <= low and high <= int(guest.broadcast_address)
        if version == guest.version and inside:
            where = "every slot has a guest with it, and root sees the slot's own address instead"
            return f"{word} is a guest's address: {where}", "match it in the slot's rules", True
    return None


def _one_slot(word: str, pool: Network) -> Reason:
    name = "${pool}" if pool.version == 4 else "${pool6}"
    hint = f"{name} is all slots; what is one slot's goes in its own rules, what is one tenant's in a parameter"
    return f"{word} is part of the pool {pool}, so it names some slots and not others", hint, True


def _bounds(word: str) -> tuple[int, int, int] | None:
    """IP version, lowest and highest address of ``A``, ``A/len``, ``A-B``, with a port behind it or not."""
    if (match := _BRACKETS.fullmatch(word)) or (match := _ADDRESS_PORT.fullmatch(word)):
        word = match[1]
    if not re.match(r"[0-9a-fA-F:]", word) or not any(character in word for character in ".:"):
        return None
    try:
        if "-" in word:
            low, high = (ip_address(end) for end in word.split("-", 1))
            return low.version, int(low), int(high)
        network = ip_network(word, strict=False)
    except ValueError:
        return None
    return network.version, int(network.network_address), int(network.broadcast_address)


def _masked(words: Sequence[str], names: Names) -> Iterator[Reason | None]:
    """``A/m.a.s.k`` of iptables, ``ip saddr & MASK == A`` of nftables: a mask may pick slots by their low bits."""
    pairs = [word.split("/") for word in words if re.fullmatch(r"[\d.]+/\d+\.[\d.]+", word)]
    for position, word in enumerate(words[:-2]):
        if word in ("&", "and"):
            value = words[position + 2 + (words[position + 2] in ("==", "!="))] if len(words) > position + 3 else ""
            pairs.append([value or words[position + 2], words[position + 1]])
    for value, mask in pairs:
        try:
            address, bits = ip_address(value), int(ip_address(mask))
        except ValueError:
            continue
        for pool in names.pools:
            if pool.version != address.version:
                continue
            prefix = int(pool.netmask)
            meets = int(address) & bits & prefix == int(pool.network_address) & bits
            if meets and bits & int(pool.hostmask):
                yield _one_slot(f"{value} with the mask {mask}", pool)
