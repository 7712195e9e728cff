"""The OpenAPI 3.1 description, made from the operations and the types of their bodies."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import msgspec

from netslot.serve.wire import OPERATIONS, Operation


def description() -> dict[str, Any]:
    """What ``GET /openapi.json`` answers."""
    types = {each.body for each in OPERATIONS if each.body is not None}
    types |= {kind for each in OPERATIONS for kind in each.answers.values() if _is_struct(kind)}
    ordered = sorted(types, key=lambda kind: str(kind.__name__))
    _, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each)
    return {
        "openapi": "3.1.0",
        "info": {"title": "netslot", "version": version("netslot")},
        "servers": [
            {"url": "http://localhost", "description": "the unix socket netslot.sock in the state directory"}
        ],
        "paths": paths,
        "components": {"schemas": components},
    }


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _operation(each: Operation) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", each.path)
    ]
    parameters += [
        {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
        for name, text in each.queries.items()
    ]
    found: dict[str, Any] = {
        "operationId": each.name,
        "summary": each.summary,
        "parameters": parameters,
        "responses": {str(status): _answer(status, kind) for status, kind in sorted(each.answers.items())},
    }
    if each.body is not None:
        found["requestBody"] = {"required": True, "content": _content(each.body)}
    return found


def _answer(status: int, kind: Any) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}} if kind is None else _content(kind)
    return {"description": "done" if status < 400 else "refused", "content": content}


def _content(kind: Any) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"} if _is_struct(kind) else {"type": "object"}
    return {"application/json": {"schema": schema}}
