"""``netslot ls``: list the slots."""

from __future__ import annotations

import click

from netslot.cli.main import Context
from netslot.cli.output import print_json, table


@click.command("ls")
@click.option("--state", help="Only slots in this state: free, leased, dirty, quarantined, unknown.")
@click.option("--class", "class_name", help="Only slots of this class.")
@click.pass_obj
def command(options: Context, state: str | None, class_name: str | None) -> None:
    """List the slots.

    \b
    Examples:
      netslot ls
      netslot ls --state leased
    """
    with options.host() as host:
        slots = host.slots()
    chosen = [
        slot
        for slot in slots
        if (state is None or slot.state == state) and (class_name is None or slot.class_name == class_name)
    ]
    if options.json:
        print_json([slot.fields for slot in chosen])
        return
    rows = [
        (slot.number, slot.netns, slot.address, slot.class_name, slot.state, slot.owner or slot.reason)
        for slot in chosen
    ]
    click.echo(table(("slot", "netns", "address", "class", "state", "owner"), rows))
