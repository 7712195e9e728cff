"""Real dumps split, or the reason why not is said; nothing is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

from dumps import each_dump
from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.split import split


@each_dump
def test_every_rule_has_a_fate_or_the_whole_is_refused(dump: Path) -> None:
    parsed = parse(dump.read_text(), file=str(dump))
    result = split(parsed, attribute(parsed).tenants)
    if not result.files:
        assert result.refused and all(len(reason) > 20 for reason in result.refused)
        return
    account = json.loads(result.files["report.json"])
    assert len(account) == parsed.rule_count()
    assert all(entry["why"] for entry in account)
    assert ("refused" in {entry["fate"] for entry in account}) <= bool(result.refused)
