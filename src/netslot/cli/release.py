"""``netslot release``: end a lease."""

from __future__ import annotations

import click

from netslot.cli.main import Context
from netslot.cli.output import print_json
from netslot.errors import RefusedError, UsageError
from netslot.serve.client import Client


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
    if (daemon := options.daemon()) is not None:
        with daemon:
            released = _ask(daemon, slot, owner, lease)
    else:
        with options.host() as host:
            released = host.release(slot=slot, owner=owner, lease=lease)
    if options.json:
        print_json({"slot": released if released is not None else slot, "released": released is not None})
    if released is None:
        raise RefusedError("there is no such lease", hint="netslot ls --state leased")
    if not options.json:
        click.echo(f"slot {released} released")


def _ask(daemon: Client, slot: int | None, owner: str | None, lease: str | None) -> int | None:
    """Have the daemon release; the slot, or None when there was nothing to release."""
    known = daemon.find(slot=slot, owner=owner, lease=lease)
    if known is None and slot is None:
        return None
    answer = daemon.release(known["lease"]) if known is not None else daemon.take_back(slot or 0)
    return int(answer["slot"]) if answer["released"] else None
