"""``netslot status``: count slots and rules."""

from __future__ import annotations

from dataclasses import asdict

import click

from netslot.cli.main import Context
from netslot.cli.output import print_json, table
from netslot.cli.up import describe


@click.command("status")
@click.pass_obj
def command(options: Context) -> None:
    """Count the host's slots, by class and state, and its rules.

    \b
    Examples:
      netslot status
      netslot --json status
    """
    with options.host() as host:
        summary = host.status()
        counts = host.counts()
    if options.json:
        print_json(asdict(summary))
        return
    click.echo(describe(summary))
    rows = [(name, state, count) for (name, state), count in sorted(counts.items())]
    click.echo(table(("class", "state", "slots"), rows))
