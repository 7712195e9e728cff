"""The JSON schema of the spec file, for editors; ``docs/reference/netslot.schema.json`` is its committed form.

``python -m netslot.spec.schema`` prints it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from netslot.spec import document, policies
from netslot.spec.convert import field_docs

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """The schema as plain values. Descriptions are the texts under the fields in the source."""
    made = msgspec.json.schema(document.Document)
    structs = {
        name: kind
        for module in (document, policies)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    }
    for name, definition in made["$defs"].items():
        texts = field_docs(structs[name])
        for field in msgspec.structs.fields(structs[name]):
            if text := texts.get(field.name):
                definition["properties"][field.encode_name]["description"] = " ".join(text.replace("``", "`").split())
        if "description" in definition:
            definition["description"] = " ".join(definition["description"].replace("``", "`").split())
    return {"$schema": DIALECT, "title": "netslot.toml", **made}


def text() -> str:
    """The schema as the file that is committed."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
