"""The wheel, not the tree: what users install is complete and runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without network: the build backend is one of the developers' dependencies."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    _pip("wheel", source, "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", directory)
    (built,) = directory.glob("netslot-*.whl")
    return built


def test_the_wheel_holds_everything_that_the_tree_does(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("netslot/")}
    tree = REPOSITORY / "src"
    files = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert packed == {name for name in files if not name.endswith(".pyc")}
    assert "netslot/py.typed" in packed
    programs = {name.removesuffix(".c") for name in packed if name.startswith("netslot/bpf/") and name.endswith(".c")}
    assert programs
    assert {f"{name}.o" for name in programs} <= packed, "a BPF program without its object needs a compiler"


def test_the_installed_command_runs(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    _pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    paths = {key: sysconfig.get_path(key) for key in ("purelib", "platlib")}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    # Where the dependencies are. A path in a .pth file does not run that directory's own .pth files, so the tree
    # itself, which is installed there as editable, is not found by this way.
    (site / "dependencies.pth").write_text("\n".join(sorted(set(paths.values()))), encoding="utf-8")

    where = _output(python, "-c", "import netslot; print(netslot.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "acquire" in _output(environment / "bin" / "netslot", "--help")
    assert "0.1.0" in _output(environment / "bin" / "netslot", "--version")


def _output(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout
