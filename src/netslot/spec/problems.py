"""What is wrong with a spec, gathered so that all of it is reported at once."""

from __future__ import annotations

from collections.abc import Mapping

from netslot.errors import SpecError
from netslot.spec import variables
from netslot.spec.lines import Path, line_of, told_at
from netslot.spec.model import RuleFile
from netslot.spec.render import nearest


class Problems:
    """The problems found in one spec file so far."""

    def __init__(self, file: str, lines: Mapping[Path, int]) -> None:
        self.file = file
        self.lines = dict(lines)
        self._found: list[SpecError] = []

    def add(self, path: Path, message: str, *, hint: str | None = None) -> None:
        """Note a problem of the key ``path``; the same one twice is one."""
        path = told_at(path, self.lines)
        key = ".".join(path) or None
        self.note(SpecError(message, file=self.file, line=line_of(path, self.lines), key=key, hint=hint))

    def note(self, error: SpecError) -> None:
        """Note a problem of another file; the same one twice is one."""
        if str(error) not in (str(other) for other in self._found):
            self._found.append(error)

    def add_variable(self, file: RuleFile, name: str, known: set[str], path: Path) -> None:
        """Note that a rule file uses a variable that it cannot."""
        line = next((n for n, text in enumerate(file.text.splitlines(), 1) if f"${{{name}" in text), None)
        if name in variables.SLOT | variables.GUEST and path == ("root",):
            message, hint = f"${{{name}}} is one slot's own", "root's rules are the same for all slots"
        elif name in variables.ALL:
            message, hint = f"${{{name}}} has no value here", variables.ALL[name]
        else:
            close = nearest(name, sorted(known))
            message = f"there is no variable ${{{name}}}"
            hint = f"did you mean ${{{close}}}?" if close else "see docs/reference/variables.md for the names"
        self.note(SpecError(message, file=file.name, line=line, key=name, hint=hint))

    def raise_any(self) -> None:
        """Raise all that was found as one SpecError; the first gives file, line and key."""
        if not self._found:
            return
        first, *rest = sorted(self._found, key=lambda error: (error.file != self.file, error.line or 0))
        if not rest:
            raise first
        also = "".join(f"\n{error}" + (f" ({error.hint})" if error.hint else "") for error in rest)
        every = SpecError(first.message + also, hint=first.hint)
        every.file, every.line, every.key = first.file, first.line, first.key
        raise every
