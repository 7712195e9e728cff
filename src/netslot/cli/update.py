"""``netslot update``: change a running lease's parameters."""

from __future__ import annotations

import click

from netslot.cli.acquire import parameters
from netslot.cli.main import Context
from netslot.cli.output import print_json
from netslot.errors import RefusedError, UsageError


@click.command("update")
@click.argument("slot", type=click.IntRange(min=1), required=False)
@click.option("--owner", help="Change this owner's lease.")
@click.option("--lease", help="Change the lease with this id.")
@click.option("--param", "params", multiple=True, required=True, metavar="NAME=VALUE", help="Repeatable.")
@click.pass_obj
def command(
    options: Context, slot: int | None, owner: str | None, lease: str | None, params: tuple[str, ...]
) -> None:
    """Change parameters of a running lease; every packet meets the old values or the new ones, connections stay.

    \b
    Examples:
      netslot update --owner vm-17 --param allow=192.0.2.0/24
    """
    if sum(each is not None for each in (slot, owner, lease)) != 1:
        raise UsageError("name one of: a slot, --owner, --lease")
    changed = parameters(params)
    if (daemon := options.daemon()) is not None:
        with daemon:
            known = daemon.find(slot=slot, owner=owner, lease=lease)
            fields = daemon.update(known["lease"], changed) if known is not None else None
    else:
        with options.host() as host:
            found = host.find(slot=slot, owner=owner, lease=lease)
            fields = host.update(found.id, changed).fields if found is not None else None
    if fields is None:
        raise RefusedError("there is no such lease", hint="netslot ls --state leased")
    if options.json:
        print_json(fields)
    else:
        click.echo(f"slot {fields['slot']}: {fields['params']}")
