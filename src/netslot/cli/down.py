"""``netslot down``: remove the host with all it made."""

from __future__ import annotations

import click

from netslot.cli.main import Context
from netslot.cli.output import Progress, print_json


@click.command("down")
@click.option("--force", is_flag=True, help="Also when slots are leased.")
@click.pass_obj
def command(options: Context, force: bool) -> None:
    """Remove the host: its slots, its rules in root, its state directory. Absence is success.

    \b
    Examples:
      netslot down
      netslot --state-dir /run/netslot-test down --force
    """
    with options.host() as host:
        count = host.down(force=force, progress=Progress()) if host.exists else 0
    if options.json:
        print_json({"slots": count})
    else:
        click.echo(f"{count} slots removed")
