"""Pages that are made from the code must be those that the code makes now."""

from __future__ import annotations

from pathlib import Path

import pytest

from netslot.spec import reference

DIRECTORY = Path(__file__).parents[3] / "docs" / "reference"


@pytest.mark.parametrize("name", reference.PAGES)
def test_committed_pages_are_current(name: str) -> None:
    command = "python -m netslot.spec.reference docs/reference"
    assert (DIRECTORY / name).read_text() == reference.PAGES[name](), f"make it anew: {command}"


def test_the_schema_tells_what_the_loader_accepts() -> None:
    definitions = reference.schema()["$defs"]
    assert definitions["Document"]["required"] == ["uplink"]
    assert definitions["AttachmentSection"]["properties"]["kind"]["enum"] == ["process", "tap", "veth"]
    assert all(definition["additionalProperties"] is False for definition in definitions.values())
