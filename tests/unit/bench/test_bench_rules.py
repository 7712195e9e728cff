"""The rules that the shapes are made of: as many, and of the same meaning, in every form."""

from __future__ import annotations

import re

from netslot.bench import rivals, shapes
from netslot.bench.tenants import (
    GUEST,
    RULES_PER_TENANT,
    SLOT_IPTABLES,
    SLOT_NFT,
    Tenant,
    iptables_rules,
    nft_rules,
)

TENANTS = [Tenant(number) for number in (1, 2, 3)]


def test_both_languages_have_the_same_rules_in_the_same_order() -> None:
    old, new = iptables_rules("FORWARD", GUEST, None), nft_rules(GUEST)
    assert len(old) == len(new) == RULES_PER_TENANT
    for legacy, nft in zip(old, new, strict=True):
        assert legacy.split()[-1].lower() == nft.split()[-1]
        address = re.search(r"-[sd] (\S+?)(?:/32)? ", legacy)
        assert address is None or address[1] in nft.replace("/32", "")
        port = re.search(r"--dport (\S+)", legacy)
        assert (port[1].replace(":", "-") if port else None) == (
            m[1] if (m := re.search(r"dport (\S+)", nft)) else None
        )


def test_tenants_have_addresses_and_names_of_their_own() -> None:
    everyone = [Tenant(number) for number in range(1, 30_001)]
    assert len({one.address for one in everyone} | {one.root_address for one in everyone}) == 60_000
    assert max(len(one.interface) for one in everyone) <= 15


def test_root_rules_are_counted_as_they_are_written() -> None:
    flat = shapes.flat(3, shapes.LEGACY, "flat")
    assert flat.root_rules == sum(line.startswith("-A") for line in flat.text.splitlines()) == 92
    chains = shapes.chains(3)
    assert chains.root_rules == sum(line.startswith("-A") for line in chains.text.splitlines())
    assert shapes.verdict_map(3).root_rules == _nft_rules(rivals.verdict_map(TENANTS))
    assert shapes.tables(3).root_rules == _nft_rules(rivals.tables(TENANTS))
    assert shapes.sets(3).root_rules == _nft_rules(rivals.sets(TENANTS))


def _nft_rules(text: str) -> int:
    verdict = re.compile(r"^    .*\b(accept|drop|masquerade|vmap @tenants)$", re.MULTILINE)
    return sum("policy" not in match[0] for match in verdict.finditer(text))


def test_the_static_root_names_no_tenant() -> None:
    assert not re.search(r"(slot|bare)\d", shapes.static_root().text)
    assert shapes.static_root().root_rules > 0


def test_what_is_added_is_what_the_next_tenant_would_have() -> None:
    for make in (lambda n: shapes.flat(n, shapes.LEGACY, "flat"), shapes.chains):
        assert set(make(2).more.splitlines()) <= set(make(3).text.splitlines())
    assert shapes.tables(2).more in shapes.tables(3).text


def test_a_slot_has_the_tenants_rules_once() -> None:
    assert SLOT_IPTABLES.count("-A egress") == RULES_PER_TENANT
    assert all(rule in SLOT_NFT for rule in nft_rules("${guest_address}"))
