"""``netslot release``: end a lease."""

from __future__ import annotations

import click

from netslot.cli.main import Context
from netslot.cli.output import print_json
from netslot.errors import RefusedError, UsageError


@click.command("release")
@click.argument("slot", type=click.IntRange(min=1), required=False)
@click.option("--owner", help="End this owner's lease.")
@click.option("--lease", help="End the lease with this id.")
@click.pass_obj
def command(options: Context, slot: int | None, owner: str | None, lease: str | None) -> None:
    """End the lease of SLOT, of an owner, or with an id; the slot is cleaned for the next tenant.

    \b
    Examples:
      netslot release 17
      netslot release --owner vm-17
    """
    if sum(each is not None for each in (slot, owner, lease)) != 1:
        raise UsageError("name one of: a slot, --owner, --lease")
    with options.host() as host:
        released = host.release(slot=slot, owner=owner, lease=lease)
    if options.json:
        print_json({"slot": released if released is not None else slot, "released": released is not None})
    if released is None:
        raise RefusedError("there is no such lease", hint="netslot ls --state leased")
    if not options.json:
        click.echo(f"slot {released} released")
