"""``netslot up``: build the host that a spec describes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click

from netslot.cli.main import Context
from netslot.cli.output import Progress, print_json
from netslot.host.building import Summary


@click.command("up")
@click.argument("spec", type=click.Path(path_type=Path), default=Path("netslot.toml"), required=False)
@click.option("--slots", type=click.IntRange(min=0), help="Build this many instead of the spec's number.")
@click.pass_obj
def command(options: Context, spec: Path, slots: int | None) -> None:
    """Build the host that SPEC describes (default: netslot.toml), or bring it up to date.

    What is already right is not touched: with more slots it adds, with fewer it removes free ones, with a changed
    template it restamps. Ctrl-C stops after the slot at hand; up again continues.

    \b
    Examples:
      netslot up examples/sandbox/netslot.toml
      netslot up netslot.toml --slots 400
    """
    stop = threading.Event()
    with options.host() as host, ThreadPoolExecutor(1) as pool:
        task = pool.submit(host.up, spec, slots=slots, progress=Progress(), stop=stop)
        try:
            summary = task.result()
        except KeyboardInterrupt:
            stop.set()
            summary = task.result()
    if options.json:
        print_json(asdict(summary))
    else:
        click.echo(describe(summary))
        click.echo(f"built in {summary.seconds:.1f} s")


def describe(summary: Summary) -> str:
    """The numbers of a host in a sentence."""
    return (
        f"{summary.slots} slots ({summary.free} free), {summary.rules_per_slot} rules each, "
        f"{summary.root_rules} rules in root, {summary.rules_total} in all"
    )
