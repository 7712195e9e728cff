"""``netslot show``: everything about one slot."""

from __future__ import annotations

from typing import Any

import click

from netslot.cli.main import Context
from netslot.cli.output import print_json


@click.command("show")
@click.argument("slot", metavar="SLOT")
@click.pass_obj
def command(options: Context, slot: str) -> None:
    """Show SLOT: its links and addresses, its rules with counters, its lease, what a workload needs to attach.

    A slot of a roster goes by its tenant's name too.

    \b
    Examples:
      netslot show 17
      netslot --json show 17
    """
    with options.host() as host:
        fields = host.show(host.number(slot))
    if options.json:
        print_json(fields)
        return
    rules = fields.pop("rules")
    _print(fields, "")
    for tool, lines in rules.items():
        click.echo(f"{tool}:")
        click.echo("\n".join(f"  {line}" for line in lines))


def _print(value: Any, indent: str) -> None:
    for key, item in value.items():
        if isinstance(item, dict):
            click.echo(f"{indent}{key}:")
            _print(item, indent + "  ")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            click.echo(f"{indent}{key}:")
            for each in item:
                click.echo(f"{indent}  - " + ", ".join(f"{name} {part}" for name, part in each.items()))
        elif item not in (None, [], {}):
            text = ", ".join(map(str, item)) if isinstance(item, list | tuple) else item
            click.echo(f"{indent}{key}: {text}")
