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
    named = any(slot.tenant is not None for slot in chosen)
    rows = [
        (
            slot.number,
            *((slot.tenant or "",) if named else ()),
            slot.netns,
            slot.address,
            slot.class_name,
            slot.state,
            slot.owner or slot.reason,
        )
        for slot in chosen
    ]
    head = ("slot", *(("tenant",) if named else ()), "netns", "address", "class", "state", "owner")
    click.echo(table(head, rows))
