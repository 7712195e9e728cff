"""The pages of ``docs/reference`` that are made from the code: the spec's JSON schema, its keys, the variables.

``python -m netslot.spec.reference DIRECTORY`` writes them; a test keeps the committed ones current.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from netslot.spec import document, policies, roster, variables
from netslot.spec.convert import field_docs

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ESCAPES = str.maketrans({"|": "\\|", "\n": " "})


def schema() -> dict[str, Any]:
    """The JSON schema of ``netslot.toml``, for editors. Descriptions are the texts under the fields in the source."""
    structs = {kind.__name__: kind for kind in _structs()}
    made = msgspec.json.schema(document.Document)
    for name, definition in made["$defs"].items():
        _describe(definition, structs[name])
    return {"$schema": _DIALECT, "title": "netslot.toml", **made}


def _describe(definition: dict[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The definition with the texts of the struct's source."""
    texts = field_docs(kind)
    definition["description"] = _plain(definition.get("description", ""))
    for field in msgspec.structs.fields(kind):
        if text := texts.get(field.name):
            definition["properties"][field.encode_name]["description"] = _plain(text)
    return definition


def _structs() -> list[type[msgspec.Struct]]:
    """The whole document, then its sections in the order of the source."""
    found: list[type[msgspec.Struct]] = [document.Document]
    for module in (document, policies):
        own = [kind for kind in vars(module).values() if getattr(kind, "__module__", "") == module.__name__]
        found += [kind for kind in own if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    return list(dict.fromkeys(found))


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def schema_file() -> str:
    """``netslot.schema.json``."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def keys_page() -> str:
    """``keys.md``: every key of the spec file, section by section."""
    parts = [
        "# Every key of netslot.toml\n\n"
        "Made from the code. [spec.md](spec.md) explains how the sections work together; for editors there is a\n"
        "[JSON schema](netslot.schema.json). A key without a default must be there.\n"
    ]
    definitions = schema()["$defs"]
    parts += [_section(definitions[kind.__name__]) for kind in _structs()]
    of_roster = msgspec.json.schema(roster.ResidentSection)["$defs"]["ResidentSection"]
    return "".join([*parts, _section(_describe(of_roster, roster.ResidentSection))])


def _section(definition: dict[str, Any]) -> str:
    required = definition.get("required", [])
    title, _, text = definition["description"].partition(": ")
    if not title.startswith("`"):
        title, text = "At the top", definition["description"]
    rows = [
        f"| `{key}` | {_type(value)} | {'' if key in required else _default(value)} "
        f"| {value.get('description', '').translate(_ESCAPES)} |"
        for key, value in definition["properties"].items()
    ]
    text = text[:1].upper() + text[1:]
    head = f"\n## {title}\n{text}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n"


def _type(value: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(_type(option) for option in value["anyOf"] if option.get("type") != "null")
    if "$ref" in value:
        return "table"
    if "enum" in value:
        return "one of " + ", ".join(f"`{option}`" for option in value["enum"])
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    if value.get("type") == "object":
        return f"table of {_type(value['additionalProperties'])}"
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[
        value["type"]
    ]


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    return "none" if default in (None, "", [], {}) or isinstance(default, dict) else f"`{json.dumps(default)}`"


def variables_page() -> str:
    """``variables.md``: what rule files and texts may use."""
    tables = [
        (
            "For the whole host",
            "The same in every slot; the only ones that root's rule files may use.",
            variables.HOST,
        ),
        ("Of one slot", "Different in every slot, except where it says otherwise.", variables.SLOT),
        ("Of the workload", "With attachments `tap` and `veth`; a process uses the slot's own.", variables.GUEST),
        (
            "Of a tenant in a roster",
            "Beside `address`, `address6`, `gateway` and `gateway6`, which are the tenant's own there.",
            variables.RESIDENT,
        ),
    ]
    parts = [
        "# Variables\n\n"
        "Rule files and texts of the spec take a slot's own values as `${name}`; a literal `${` is written `$${`.\n"
        "A `$` without a brace means nothing to netslot, so nft's own variables (`$name`) pass through.\n"
        "A parameter that is not a list is a variable of the parameter's name.\n"
        "A rule of iptables that uses `${name.proto}`, `${name.outer}` or `${name.inner}` of a parameter of type\n"
        "`ports` stands once for every port that the lease publishes.\n"
    ]
    for title, text, table in tables:
        rows = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in table.items())
        parts.append(f"\n## {title}\n{text}\n\n| variable | value |\n| --- | --- |\n{rows}")
    return "".join(parts)


PAGES = {"netslot.schema.json": schema_file, "keys.md": keys_page, "variables.md": variables_page}


def main(directory: str) -> None:
    """Write all pages into ``directory``."""
    for name, page in PAGES.items():
        (Path(directory) / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
