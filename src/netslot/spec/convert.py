"""From plain TOML values to the structs of :mod:`netslot.spec.document`, collecting every problem, not the first."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from netslot.spec.lines import Path
from netslot.spec.problems import Problems
from netslot.spec.render import nearest

S = TypeVar("S", bound=msgspec.Struct)

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text in quotes",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
    "datetime": "a date",
    "date": "a date",
    "time": "a time",
}
_INVALID = object()


def convert(raw: Mapping[str, Any], kind: type[S], path: Path, problems: Problems) -> S | None:
    """``raw`` as a ``kind``, or None after noting what is wrong with it."""
    fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    misspelt: set[str] = set()
    bad = False
    for key in raw:
        if key not in fields:
            free = [name for name in fields if name not in raw]
            close = nearest(key, free) or nearest(key, list(fields))
            misspelt |= {close} if close else set()
            hint = f"did you mean '{close}'?" if close else f"known here: {', '.join(fields)}"
            problems.add((*path, key), "there is no such key", hint=hint)
            bad = True
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in raw:
            value = _value(raw[name], hints[spec.name], (*path, name), problems)
            bad = bad or value is _INVALID
            values[spec.name] = value
        elif spec.required:
            bad = True
            if name not in misspelt:
                problems.add(path, f"'{name}' is missing", hint=_about(kind, spec.name))
    return None if bad else kind(**values)


def _value(raw: Any, hint: Any, path: Path, problems: Problems) -> Any:
    plain = _without_annotation(hint)
    if get_origin(plain) in (Union, types.UnionType) and type(None) in get_args(plain):
        inner = [option for option in get_args(plain) if option is not type(None)]
        if len(inner) == 1:
            return _value(raw, inner[0], path, problems)
    if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
        if not isinstance(raw, dict):
            problems.add(path, f"expected a table, got {_describe(raw)}")
            return _INVALID
        converted = convert(raw, plain, path, problems)
        return _INVALID if converted is None else converted
    if get_origin(plain) is dict and isinstance(raw, dict):
        items = {key: _value(item, get_args(plain)[1], (*path, key), problems) for key, item in raw.items()}
        return _INVALID if any(item is _INVALID for item in items.values()) else items
    if get_origin(plain) is tuple and isinstance(raw, list):
        sequence = [_value(item, get_args(plain)[0], (*path, str(n)), problems) for n, item in enumerate(raw)]
        return _INVALID if any(item is _INVALID for item in sequence) else tuple(sequence)
    if get_origin(plain) is Literal and raw not in get_args(plain):
        options = [str(option) for option in get_args(plain)]
        close = nearest(raw, options) if isinstance(raw, str) else None
        hint = f"did you mean '{close}'?" if close else None
        problems.add(path, f"{raw!r} is not one of {', '.join(options)}", hint=hint)
        return _INVALID
    try:
        return msgspec.convert(raw, hint)
    except msgspec.ValidationError as error:
        problems.add(path, _explain(str(error), raw))
        return _INVALID


def _without_annotation(hint: Any) -> Any:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint


def _explain(message: str, raw: Any) -> str:
    """msgspec's message in the spec's own words."""
    message = message.partition(" - at `")[0]
    if match := re.fullmatch(r"Expected `([\w |]+)`, got `\w+`", message):
        wanted = " or ".join(_WORDS.get(word, word) for word in match[1].split(" | "))
        return f"expected {wanted}, got {_describe(raw)}"
    if "matching regex" in message:
        return f"{raw!r} does not have the right form ({message.split('regex ')[-1].strip('`')!r})"
    message = message.replace("`int`", "a number").replace("`str` of length", "a text of length")
    return f"{message[0].lower()}{message[1:]}, got {_describe(raw)}".replace("`", "")


def _describe(raw: Any) -> str:
    if isinstance(raw, dict | list):
        return "a table" if isinstance(raw, dict) else "a list"
    return str(raw).lower() if isinstance(raw, bool) else repr(raw)


def _about(kind: type[msgspec.Struct], name: str) -> str | None:
    text = field_docs(kind).get(name)
    return text.split(". ")[0].rstrip(".") if text else None


def field_docs(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The texts under the fields of ``kind`` in its source, by field name. The JSON schema is made with them too."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    docs: dict[str, str] = {}
    name = ""
    for node in cast(ast.ClassDef, body).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[name] = inspect.cleandoc(str(node.value.value))
            name = ""
    return docs
