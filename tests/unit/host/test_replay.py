"""Who plays in a replay, and the bytes of its packets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netslot.host import replay_wire as wire
from netslot.host.replay import MOST_PLAYERS, players
from netslot.rulesets.model import Family


@given(st.lists(st.integers(0, 40), min_size=1, max_size=200))
def test_each_class_plays_while_there_is_room_and_the_largest_twice(classes: list[int]) -> None:
    chosen = players(classes)
    assert len(chosen) == len(set(chosen)) <= MOST_PLAYERS
    shown = {classes[tenant] for tenant in chosen}
    assert len(shown) >= min(len(set(classes)), MOST_PLAYERS - 2)
    sizes = {number: classes.count(number) for number in classes}
    largest = sorted(sizes.values(), reverse=True)[:2]
    twice = [number for number in shown if sum(classes[tenant] == number for tenant in chosen) > 1]
    assert len(twice) >= sum(size > 1 for size in largest)


@given(
    st.sampled_from((4, 6)),
    st.sampled_from((6, 17, 0)),
    st.integers(1, 1 << 31),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.integers(0, 1200),
)
def test_a_packet_is_read_as_it_was_written(
    number: int, proto: int, mark: int, sport: int, dport: int, length: int
) -> None:
    family: Family = 4 if number == 4 else 6
    values = {"src": 0x0A000001, "dst": 0x0A000002, "proto": proto or (1 if family == 4 else 58)}
    values |= {"sport": sport, "dport": dport, "flags": 2, "ttl": 64, "dscp": 5, "length": length}
    values |= {"icmp_type": wire.ECHO[family][0], "icmp_code": 0}
    data = wire.written(family, values, wire.tag(mark))
    assert len(data) == max(length, wire.natural_length(family, values))
    seen = wire.read(family, data)
    assert (seen.number, seen.src, seen.dst, seen.sport) == (mark, values["src"], values["dst"], sport)
    assert seen.dport == (dport if proto else 0)
    assert wire.checksum(data[:20]) == 0 or family == 6


@given(st.sampled_from((4, 6)), st.integers(0, 255))
def test_an_echo_reply_is_told_by_its_code_too(number: int, code: int) -> None:
    family: Family = 4 if number == 4 else 6
    values = {"src": 0x0A000001, "dst": 0x0A000002, "proto": 1 if family == 4 else 58, "sport": 7, "dport": 0}
    values |= {"flags": 0, "ttl": 64, "dscp": 0, "length": 0, "icmp_type": wire.ECHO[family][1], "icmp_code": code}
    assert wire.read(family, wire.written(family, values, wire.tag(1))).answer == (wire.ECHO[family][1], code)
