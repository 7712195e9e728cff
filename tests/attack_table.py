"""The tables of ``docs/security/attacks.md``, made of the rows that tests play; ``python tests/attack_table.py``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from attack_process import Way, Without, ways
from attack_rows import ALL, Row, rows, sections

PAGE = Path(__file__).parent.parent / "docs" / "security" / "attacks.md"
BEGIN, END = "<!-- made by tests/attack_table.py -->", "<!-- end -->"


class Codes:
    """Short names for what many rows have in common, given out as it comes."""

    def __init__(self) -> None:
        self.given: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}

    def code(self, letter: str, text: str, where: str) -> str:
        if (text, where) not in self.given:
            self._counts[letter] = self._counts.get(letter, 0) + 1
            self.given[text, where] = f"{letter}{self._counts[letter]}"
        return self.given[text, where]

    def legend(self, letters: str) -> Iterator[str]:
        ordered = sorted(self.given.items(), key=lambda each: (letters.find(each[1][0]), int(each[1][1:])))
        return (f"| {code} | {text} | {where} |" for (text, where), code in ordered if code[0] in letters)


def tables() -> str:
    """All tables with their headings; what their codes mean comes first."""
    codes = Codes()
    lines: list[str] = []
    for title, each in sections().items():
        lines += [f"### {title}", "", *_table(each, codes), ""]
    lines += ["### What a process does besides sending", "", *_process_table(), ""]
    legend = ["| | what stops it | where |", "| --- | --- | --- |", *codes.legend("SRK")]
    reasons = ["| | why not from there | |", "| --- | --- | --- |", *codes.legend("N")]
    return "\n".join(["### The defences", "", *legend, "", *reasons, "", *lines])


def _table(some: list[Row], codes: Codes) -> Iterator[str]:
    yield "| attack | from | stopped by |"
    yield "| --- | --- | --- |"
    merged: dict[tuple[str, str], dict[str, str]] = {}
    for row in some:
        merged.setdefault((row.title, _from(row, codes)), {})[row.family] = _stops(row, codes)
    for (title, where), by_family in merged.items():
        stops: dict[str, list[str]] = {}
        for family, text in by_family.items():
            stops.setdefault(text, []).append(family)
        cell = "; ".join(f"{' and '.join(families)}: {text}" for text, families in stops.items())
        yield f"| {title} | {where} | {cell} |"


def _from(row: Row, codes: Codes) -> str:
    """The attachments, and why not the others; what another row has for those is no gap."""
    others = {
        kind for other in rows() if (other.title, other.family) == (row.title, row.family) for kind in other.kinds
    }
    reason = "" if others == set(ALL) else f" ({codes.code('N', row.why_not, '')})"
    return ", ".join(row.kinds) + reason


def _stops(row: Row, codes: Codes) -> str:
    if row.twin is not None:
        return codes.code("K", row.kernel, "the kernel, whatever is set")
    letters = {"slot": "S", "root": "R", "kernel": "K"}
    return ", ".join(_once(codes.code(letters[stop.layer], stop.text, stop.where) for stop in row.stops))


def _once(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _process_table() -> Iterator[str]:
    yield "| what it does | families | stopped because |"
    yield "| --- | --- | --- |"
    merged: dict[tuple[str, Without], list[str]] = {}
    for way in ways():
        merged.setdefault((way.title, way.without), []).append(_family(way))
    for (title, without), families in merged.items():
        yield f"| {title} | {', '.join(_once(families))} | {without.value} |"


def _family(way: Way) -> str:
    return way.family or "any"


def page() -> str:
    """The page with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
