"""Where in a TOML file a key stands: the parser of the standard library does not say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

Path: TypeAlias = tuple[str, ...]
"""A key's place: ``("class", "big", "slots")``; members of an array of tables count from 0: ``("x", "1", "y")``."""

_PART = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*""")
_VALUE = re.compile(
    r'"{3}.*?(?<!\\)"{3}|\'{3}.*?\'{3}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}]|\n|[^"\'#\[\]{}\n]+',
    re.DOTALL,
)


def key_lines(text: str) -> dict[Path, int]:
    """The line (from 1) of every table header and key of ``text``, which must be valid TOML.

    Keys inside inline tables are not listed: their line is that of the key that holds them.
    """
    lines: dict[Path, int] = {}
    members: dict[Path, int] = {}
    table: Path = ()
    position = 0
    while position < len(text):
        if text[position] in " \t\r\n":
            position += 1
            continue
        if text[position] == "#":
            position = _end_of_line(text, position)
            continue
        line = text.count("\n", 0, position) + 1
        is_array = text.startswith("[[", position)
        is_header = text[position] == "["
        start = position + (2 if is_array else is_header)
        parts, position = _key(text, start)
        if is_header:
            table = _below_members(parts, members, new=is_array)
            lines.setdefault(table, line)
            position = _end_of_line(text, position)
        else:
            lines.setdefault(table + parts, line)
            position = _end_of_value(text, position)
    return lines


def line_of(path: Path, lines: Mapping[Path, int]) -> int | None:
    """The line of ``path``, or of the nearest key that holds it."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


def told_at(path: Path, lines: Mapping[Path, int]) -> Path:
    """``path``, or the host's key where a class has not set it itself: there it stands in the file."""
    if path[:1] == ("class",) and _depth(path[2:], lines) > max(0, _depth(path, lines) - 2):
        return path[2:]
    return path


def _depth(path: Path, lines: Mapping[Path, int]) -> int:
    """How much of ``path`` the file has."""
    return next((length for length in range(len(path), 0, -1) if path[:length] in lines), 0)


def _key(text: str, position: int) -> tuple[Path, int]:
    """A dotted key and the position after it (and after its ``=``, if one follows)."""
    parts: list[str] = []
    while (match := _PART.match(text, position)) is not None:
        parts.append(next(group for group in match.groups() if group is not None))
        position = match.end()
        if not text.startswith(".", position):
            break
        position += 1
    return tuple(parts), position + 1


def _below_members(parts: Path, members: dict[Path, int], *, new: bool) -> Path:
    """``parts`` with the number of the latest member put after every array of tables."""
    table: Path = ()
    for index, part in enumerate(parts):
        table = (*table, part)
        if new and index == len(parts) - 1:
            members[table] = members.get(table, -1) + 1
        if table in members:
            table = (*table, str(members[table]))
    return table


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end + 1


def _end_of_value(text: str, position: int) -> int:
    depth = 0
    for end, token in _tokens(text, position):
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
        elif token == "\n" and depth <= 0:
            return end
    return len(text)


def _tokens(text: str, position: int) -> Iterator[tuple[int, str]]:
    while (match := _VALUE.match(text, position)) is not None:
        position = match.end()
        yield position, match[0]
