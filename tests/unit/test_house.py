"""The rooms of the house and the arrows between them, as docs and newcomers rely on them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "netslot"

ARROWS = {
    "errors": set(),
    "spec": {"errors"},
    "kernel": {"errors", "spec"},
    "rulesets": {"errors", "spec"},
    "policy": {"errors", "spec", "kernel"},
    "host": {"errors", "spec", "kernel", "policy", "rulesets"},
    "bench": {"errors", "spec", "kernel", "policy", "rulesets", "host", "serve"},
    "serve": {"errors", "spec", "kernel", "policy", "rulesets", "host"},
    "cni": {"errors", "spec", "kernel", "policy", "rulesets", "host", "serve"},
    "cli": {"errors", "spec", "kernel", "policy", "rulesets", "host", "bench", "serve"},
    "__init__": {"errors", "spec", "host"},
}
"""Which rooms a room may import from, besides itself."""
PURE = {"socket", "subprocess", "fcntl", "ctypes", "sqlite3", "threading", "asyncio"}
"""What a room that touches neither kernel nor files has no use for."""
HARD_CAP, SCREEN = 600, 70


def modules() -> list[Path]:
    found = sorted(SOURCE.rglob("*.py"))
    assert len(found) > 50
    return found


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, also inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            if node.module == "netslot":
                yield from ((node.lineno, f"netslot.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


@pytest.mark.parametrize("name", sorted({room(path) for path in modules()}))
def test_arrows_between_rooms_point_one_way(name: str) -> None:
    allowed = ARROWS[name] | {name}
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {imported}"
        for path in modules()
        if room(path) == name
        for line, imported in imports(path)
        if imported.startswith("netslot.") and imported.split(".")[1] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_analyst_touches_neither_kernel_nor_files() -> None:
    wrong = []
    for path in modules():
        if room(path) != "rulesets":
            continue
        wrong += [f"{path.name}:{line} {name}" for line, name in imports(path) if name.split(".")[0] in PURE]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
                wrong.append(f"{path.name}:{node.lineno} opens a file")
    assert not wrong, "\n".join(wrong)


def test_modules_and_functions_stay_small() -> None:
    wrong = []
    for path in modules():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > HARD_CAP:
            wrong.append(f"{path.relative_to(SOURCE)} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (length := node.end_lineno - node.lineno + 1) > SCREEN:
                    wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_no_error_is_swallowed_and_nothing_is_left_to_do() -> None:
    wrong = []
    for path in modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and all(isinstance(each, ast.Pass) for each in node.body):
                wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno} swallows an error")
            if isinstance(node, ast.Name) and node.id == "NotImplementedError":
                wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno} is not implemented")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is_for() -> None:
    silent = [path for path in modules() if ast.get_docstring(tree(path)) is None]
    assert not silent
