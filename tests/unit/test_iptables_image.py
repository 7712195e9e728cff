"""Tables as numbered entries: what is put in moves jumps, hooks and chain ends as the tool would have."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from netslot.kernel import xtables
from netslot.kernel.xtables import IPV4, IPV6, Family, Info
from netslot.policy import iptables_words
from netslot.policy.iptables_image import NEXT, NO_HOOK, Entry, Image, closed, inserted, mask, take_apart


def entry(family: Family, tag: bytes, *, verdict: int = xtables.VERDICT_ACCEPT, jump: int | None = None) -> Entry:
    """An entry with a standard target; ``tag`` fills the first bytes of its addresses."""
    target = struct.pack("=H29sBi4x", 40, b"", 0, 0 if jump is not None else verdict)
    return Entry(_data(family, tag, target), jump, family.head + 32)


def head(family: Family, name: bytes) -> Entry:
    return Entry(_data(family, b"", struct.pack("=H29sB32s", 64, b"ERROR", 0, name)), None, family.head + 32)


def _data(family: Family, tag: bytes, target: bytes) -> bytes:
    raw = bytearray(family.head)
    raw[: len(tag)] = tag
    struct.pack_into("=HH", raw, family.offsets_at, family.head, family.head + len(target))
    return bytes(raw) + target


def filter_image(family: Family, rules: list[bytes], chain: list[bytes]) -> Image:
    """A filter table with ``rules`` in FORWARD, then a jump to the chain ``own``, which holds ``chain``."""
    start = 1
    policy = start + len(rules) + 1
    own = policy + 3  # OUTPUT's policy, then the chain's head
    entries = [
        entry(family, b"", verdict=xtables.VERDICT_DROP),
        *(entry(family, tag, jump=NEXT) for tag in rules),
        entry(family, b"jump", jump=own),
        entry(family, b"", verdict=xtables.VERDICT_DROP),
        entry(family, b""),
        head(family, b"own"),
        *(entry(family, tag) for tag in chain),
        entry(family, b"", verdict=-5),
        head(family, b"ERROR"),
    ]
    hooks = (-1, 0, start, policy + 1, -1)
    return Image(family, "filter", 14, hooks, (-1, 0, policy, policy + 1, -1), tuple(entries))


TAGS = st.lists(st.binary(min_size=1, max_size=8), max_size=5)
FAMILIES = st.sampled_from([IPV4, IPV6])


@given(FAMILIES, TAGS, TAGS)
def test_taking_apart_undoes_flattening(family: Family, rules: list[bytes], chain: list[bytes]) -> None:
    image = filter_image(family, rules, chain)
    flat = image.flatten()
    assert take_apart(family, "filter", flat.info, flat.blob) == image
    assert list(flat.starts) == xtables.entry_offsets(family, flat.blob)
    assert flat.info.size == len(flat.blob)


@given(FAMILIES, TAGS, TAGS, st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=3), st.data())
def test_what_was_put_in_is_found_again(
    family: Family, rules: list[bytes], chain: list[bytes], extra: list[bytes], data: st.DataObject
) -> None:
    """The rules of a chain with some in the middle are those without, with the middle put in."""
    in_chain = data.draw(st.booleans())
    where = data.draw(st.integers(0, len(chain if in_chain else rules)))
    base = filter_image(family, rules, chain)
    grown = [*(chain if in_chain else rules)]
    grown[where:where] = extra
    longer = filter_image(family, rules, grown) if in_chain else filter_image(family, grown, chain)
    found = inserted(base, longer)
    assert found is not None
    place, run = found
    assert base.flatten({place: run}) == longer.flatten()


def test_a_jump_to_a_chain_meets_what_was_put_in_at_its_start() -> None:
    image = filter_image(IPV4, [b"a"], [b"b"])
    own = image.hook_entry[3] + 2
    flat = image.flatten({own: [entry(IPV4, b"new")]})
    made = take_apart(IPV4, "filter", flat.info, flat.blob)
    chains = iptables_words.chains(made)
    assert [rule[:3].rstrip(b"\0") for rule, _ in chains["own"].rules] == [b"new", b"b"]
    assert chains["FORWARD"].rules[-1][1] == "own"


def test_what_is_put_in_at_a_chains_end_comes_before_its_policy() -> None:
    image = filter_image(IPV4, [], [])
    flat = image.flatten({image.underflow[2]: [entry(IPV4, b"new")]})
    chains = iptables_words.chains(take_apart(IPV4, "filter", flat.info, flat.blob))
    assert [rule[:4].rstrip(b"\0") for rule, _ in chains["FORWARD"].rules] == [b"jump", b"new"]
    assert chains["FORWARD"].policy == "DROP"


def test_entries_that_differ_in_more_than_one_place_are_not_a_run() -> None:
    base = filter_image(IPV4, [b"a", b"b"], [])
    assert inserted(base, filter_image(IPV4, [b"x", b"a", b"b", b"y"], [])) is None
    assert inserted(base, filter_image(IPV4, [b"a"], [])) is None


def test_masking_leaves_what_a_person_wrote() -> None:
    flat = filter_image(IPV6, [b"a"], []).flatten()
    used = bytearray(flat.blob)
    for start in flat.starts:
        used[start + IPV6.private_at : start + IPV6.head] = b"\xff" * IPV6.private
    assert bytes(mask(IPV6, used, flat.starts)) == flat.blob
    used[0] ^= 1
    assert bytes(mask(IPV6, used, flat.starts)) != flat.blob


def test_a_closed_table_drops_at_every_hook() -> None:
    empty = take_apart(IPV4, "filter", *_empty())
    chains = iptables_words.chains(take_apart(IPV4, "filter", *(closed(empty).info, closed(empty).blob)))
    assert {name: chain.policy for name, chain in chains.items()} == {"INPUT": "DROP", "FORWARD": "DROP"}


def _empty() -> tuple[Info, bytes]:
    blob = entry(IPV4, b"").data * 2 + head(IPV4, b"ERROR").data
    size = len(entry(IPV4, b"").data)
    hooks = (NO_HOOK, 0, size, NO_HOOK, NO_HOOK)
    return Info(6, hooks, hooks, 3, len(blob)), blob


def test_differences_in_words() -> None:
    wanted = filter_image(IPV4, [b"a", b"b", b"c"], [b"d"])
    words = {
        "rule 2 of 4 missing": filter_image(IPV4, [b"a", b"c"], [b"d"]),
        "rule 2 of 4 changed": filter_image(IPV4, [b"a", b"x", b"c"], [b"d"]),
        "rule 1 added": filter_image(IPV4, [b"x", b"a", b"b", b"c"], [b"d"]),
    }
    for text, present in words.items():
        assert [str(each) for each in iptables_words.differences(wanted, present)] == [
            f"iptables filter FORWARD: {text}"
        ]
    assert iptables_words.count_rules(wanted) == 5
