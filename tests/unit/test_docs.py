"""Pages: every link leads somewhere, and every page can be found from the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INDEX = REPOSITORY / "docs" / "index.md"
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("examples/**/*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def _links(page: Path) -> list[Path]:
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in _LINK.findall(text) if "://" not in target]
    return [(page.parent / target).resolve() for target in targets if target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = [str(target) for target in _links(page) if not target.exists()]
    assert not broken


def test_every_page_is_in_the_index() -> None:
    """By itself or with the directory that it is in."""
    listed = set(_links(INDEX))
    pages = [page for page in PAGES if page.is_relative_to(INDEX.parent) and page != INDEX]
    lost = [page for page in pages if not listed & {page, page.parent}]
    assert not lost, f"docs/index.md has no link to {', '.join(page.name for page in lost)}"
