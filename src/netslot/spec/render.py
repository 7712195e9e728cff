"""Variables in rule files and values: ``${name}`` stands for a slot's own value, ``$${`` for a literal ``${``.

The form is the same in iptables-save files, nftables files and TOML strings.
A single ``$`` means nothing to us, so nftables' own ``$define`` variables pass through untouched.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from netslot.errors import SpecError

# ``$${`` first, so that an escaped brace is never taken for a variable.
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}\n]*)\}?")


def render(text: str, values: Mapping[str, str], *, file: str) -> str:
    """Put ``values`` in place of the variables of ``text``.

    ``file`` is only named in errors.
    Raises SpecError with the line of the first variable that has no value.
    """

    if "${" not in text:
        return text

    def value(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name = match[1]
        if match[0].endswith("}") and name in values:
            return values[name]
        raise _unknown(text, match, list(values), file)

    return _REFERENCE.sub(value, text)


def variables_in(text: str) -> frozenset[str]:
    """The names of all variables that ``text`` uses, known or not."""
    return frozenset(match[1] for match in _REFERENCE.finditer(text) if match[0] != "$${")


def nearest(name: str, known: list[str]) -> str | None:
    """The valid name that ``name`` was probably meant to be, or None if nothing comes close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return close[0] if close else None


def _unknown(text: str, match: re.Match[str], known: list[str], file: str) -> SpecError:
    line = text.count("\n", 0, match.start()) + 1
    if not match[0].endswith("}"):
        return SpecError("'${' without its closing '}'", file=file, line=line, hint="write '$${' for a literal '${'")
    name = match[1]
    close = nearest(name, known)
    hint = f"did you mean ${{{close}}}?" if close else "see docs/reference/variables.md for the names"
    return SpecError(f"there is no variable ${{{name}}}", file=file, line=line, key=name, hint=hint)
