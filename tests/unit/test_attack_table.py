"""The attack matrix on paper is the one that is played, and it has no gap."""

from __future__ import annotations

import attack_table
from attack_lab import KINDS
from attack_rows import ALL, rows


def test_the_page_holds_the_rows_that_are_played() -> None:
    assert attack_table.PAGE.read_text(encoding="utf-8") == attack_table.page(), "run python tests/attack_table.py"


def test_every_attachment_is_attacked_or_it_is_said_why_not() -> None:
    for row in rows():
        others = [other for other in rows() if (other.title, other.family) == (row.title, row.family)]
        covered = {kind for other in others for kind in other.kinds}
        assert covered == set(ALL) or row.why_not, row


def test_every_row_has_what_stops_it() -> None:
    for row in rows():
        assert bool(row.stops) != (row.twin is not None), row
        assert (row.twin is None) or row.kernel, row
        for kind in KINDS:
            if row.stops and row.concerns(kind):
                assert row.stops_of(kind), (row, kind)


def test_no_row_is_there_twice_for_one_attachment() -> None:
    seen = [(row.title, row.family, kind) for row in rows() for kind in row.kinds]
    assert len(seen) == len(set(seen))
