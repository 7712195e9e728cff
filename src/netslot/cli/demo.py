"""``netslot demo``: the difference that slots make, on this machine, in about a minute."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from netslot.bench import demo as bench_demo
from netslot.bench import picture
from netslot.cli.bench import measured, show
from netslot.errors import HostError, UsageError


@click.command("demo")
@click.option("--slots", default=4000, show_default=True, help="Tenants of the host that is played.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Where the picture and the figures are saved.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def demo(context: click.Context, slots: int, out: Path, as_json: bool) -> None:
    """Play a host with all tenants' rules in its root namespace, then one with slots, and compare.

    Everything happens in namespaces of its own, which go when it ends; no root where user namespaces are allowed.

    \b
    netslot demo
    netslot demo --slots 1000 --out /tmp/demo
    """

    make_directory(out)
    tell(f"Playing a host with {slots:,} tenants in throwaway namespaces; about a minute.")
    result = measured(context, lambda: bench_demo.measure_demo(slots, tell))
    tell("")
    show(context, result, bench_demo.story, as_json)
    save(result, out)


def make_directory(out: Path) -> None:
    """Find out before the minute is spent whether the result can be saved."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the directory {out}: {error.strerror}", hint="choose another with --out"
        ) from error
    if not os.access(out, os.W_OK):
        raise UsageError(f"cannot write to the directory {out}", hint="choose another with --out")


def save(result: dict[str, Any], out: Path) -> None:
    """Write the figures and, where matplotlib is installed, the picture."""
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    try:
        picture.draw(result, out / "demo.svg")
    except HostError as error:
        tell(f"No picture: {error} ({error.hint})")
        return
    tell(f"Saved {out / 'demo.svg'} and {out / 'demo.json'}.")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
