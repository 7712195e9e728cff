"""Writing: the same words for what was read, the same values for what was composed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dumps import each_dump
from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets import words
from netslot.rulesets.parse import parse
from netslot.rulesets.write import rule_text, write
from unit.rulesets.strategies import COMMENTS, MATCHES, TARGETS


@settings(deadline=None)  # the machine may be busy
@given(st.lists(MATCHES, max_size=5), TARGETS, COMMENTS)
def test_a_composed_rule_is_read_back_as_the_same_values(
    matches: list[m.Match], target: t.Target, comment: str
) -> None:
    text = rule_text(matches, target, 4, comment)
    whole = f"*filter\n:FORWARD ACCEPT [0:0]\n:user - [0:0]\n-A FORWARD {text}\nCOMMIT\n"
    (rule,) = parse(whole, family=4).rulesets[0].tables["filter"].chains["FORWARD"].rules
    assert Counter(rule.matches) == Counter(matches)
    assert (rule.target, rule.comment) == (target, comment)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Z"]), min_size=1), max_size=6))
def test_words_survive_joining_and_splitting(given_words: list[str]) -> None:
    spaced = [f"{word} x" if index % 2 else word for index, word in enumerate(given_words)]
    assert words.split(words.join(tuple(spaced))) == spaced


def test_quotes_as_iptables_save_prints_them() -> None:
    assert words.quote("plain-word_1") == "plain-word_1"
    assert words.quote('it\'s "so" \\') == '"it\\\'s \\"so\\" \\\\"'
    assert words.quote("") == '""'


@each_dump
def test_dumps_are_written_as_they_were_read(dump: Path) -> None:
    text = dump.read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-P "))]
    written = write(parse(text, file=dump.name).rulesets[0]).splitlines()
    if "-P " not in text:
        assert sorted(written) == sorted(lines)
    assert write(parse("\n".join(written) + "\n").rulesets[0]).splitlines() == written
