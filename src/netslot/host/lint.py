"""Rules in the wrong place, found before anything is touched.

A root rule that names one slot would have to change whenever a tenant comes or goes. A slot rule that must act
before root has chosen the slot never sees its packet. Both are refused, with the reason and the right place.
"""

from __future__ import annotations

from netslot.errors import SpecError
from netslot.host import lint_root, lint_slot
from netslot.host.lint_finding import LintFinding
from netslot.spec.model import ClassSpec, HostSpec

_LIST_FIELDS = {"proto": "tcp", "outer": "8080", "inner": "80"}


def lint(spec: HostSpec) -> list[LintFinding]:
    """Everything that is in the wrong place in the root's and the slots' rule files, in the files' order."""
    found = []
    names = lint_root.Names.of(spec)
    for file in spec.root.rules.files if spec.root.preset else ():
        found += lint_root.lint(file, spec.root_values(), names, is_nft=file is spec.root.rules.nft)
    for each in spec.classes.values():
        found += _slot_files(spec, each)
    return list(dict.fromkeys(found))


def refuse(spec: HostSpec) -> None:
    """Raise SpecError with what :func:`lint` finds and cannot work. Warnings do not raise."""
    fatal = [finding for finding in lint(spec) if finding.fatal]
    if fatal:
        first, more = fatal[0], len(fatal) - 1
        rest = f" (and {more} more: 'netslot check' lists them)" if more else ""
        raise SpecError(first.message + rest, file=first.file, line=first.line, key=first.rule, hint=first.hint)


def _slot_files(spec: HostSpec, each: ClassSpec) -> list[LintFinding]:
    number = spec.sample(each.name)
    if each.rules is None or not number:
        return []
    values = spec.values(number, each.name)
    for name, kind in each.lists.items():
        if kind == "ports":
            values |= {f"{name}.{field}": value for field, value in _LIST_FIELDS.items()}
    slot = lint_slot.Slot.of(spec, each, values)
    found: list[LintFinding] = []
    for file in each.rules.files:
        found += lint_slot.lint(file, values, slot, is_nft=file is each.rules.nft)
    return found


__all__ = ["LintFinding", "lint", "refuse"]
