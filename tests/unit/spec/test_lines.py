from __future__ import annotations

import tomllib
from typing import Any

from netslot.spec.lines import Path, key_lines, line_of

TEXT = '''# a comment
slots = 4000   # another = one
prefix = "a#b = [c]"

[addresses]
dns = [   # [not.a.table]
  "1.1.1.1",
  "key = 3",
]
note = """
[fake]
also = "fake"
"""
"quoted key" = 1
dotted.key = { inner = "x", more = [1, 2] }

[[bpf.programs]]
object = 'a.o'
[[bpf.programs]]
object = "b.o"
[bpf.programs.maps]
x = "y"
[class."big"]
slots = 3'''


def test_every_key_has_its_line() -> None:
    expected: dict[Path, int] = {
        ("slots",): 2,
        ("prefix",): 3,
        ("addresses",): 5,
        ("addresses", "dns"): 6,
        ("addresses", "note"): 10,
        ("addresses", "quoted key"): 14,
        ("addresses", "dotted", "key"): 15,
        ("bpf", "programs", "0"): 17,
        ("bpf", "programs", "0", "object"): 18,
        ("bpf", "programs", "1"): 19,
        ("bpf", "programs", "1", "object"): 20,
        ("bpf", "programs", "1", "maps"): 21,
        ("bpf", "programs", "1", "maps", "x"): 22,
        ("class", "big"): 23,
        ("class", "big", "slots"): 24,
    }
    assert key_lines(TEXT) == expected


def test_the_keys_are_those_that_the_parser_finds() -> None:
    parsed = tomllib.loads(TEXT)
    for path in key_lines(TEXT):
        value: Any = parsed
        for part in path:
            value = value[int(part)] if isinstance(value, list) else value[part]


def test_a_key_without_a_line_has_that_of_what_holds_it() -> None:
    lines = key_lines(TEXT)
    assert line_of(("addresses", "dotted", "key", "inner"), lines) == 15
    assert line_of(("nowhere",), lines) is None
