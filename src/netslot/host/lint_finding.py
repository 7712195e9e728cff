"""What the linters say about one rule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LintFinding:
    """``fatal``: the rule cannot do what it says, so the spec is refused; otherwise it is worth a look."""

    file: str
    line: int
    rule: str
    """The rule as it stands in the file."""
    message: str
    hint: str
    """Where it belongs, or what to write instead."""
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.message}"
