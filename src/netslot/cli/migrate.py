"""``netslot migrate``: a running host's tenants into slots of their own, and back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from netslot.cli.audit import read_tenants
from netslot.cli.prove import read_directory
from netslot.errors import UsageError
from netslot.host.migrate import Migration, Status
from netslot.kernel import netns


@click.command("migrate")
@click.argument("directory", metavar="[DIR]", required=False)
@click.option("--rollback", is_flag=True, help="Take the last migration back.")
@click.option("--one", metavar="TENANT", help="Only this tenant's rules into its namespace; root stays as it is.")
@click.option("--tenants", "tenants_file", metavar="FILE", help="JSON or TOML list that names each tenant's netns.")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def migrate(
    context: click.Context,
    directory: str | None,
    rollback: bool,
    one: str | None,
    tenants_file: str | None,
    as_json: bool,
) -> None:
    """Put each tenant's rules into its own namespace, then exchange root's for the static ones.

    DIR is what netslot split wrote and netslot prove has proved.
    """
    if rollback == (directory is not None):
        raise UsageError("give DIR, or --rollback", hint="netslot migrate DIR; netslot migrate --rollback")
    root_name = getattr(context.obj, "root_netns", None)
    state_dir = Path(getattr(context.obj, "state_dir", "/run/netslot"))
    quiet = as_json or bool(getattr(context.obj, "json", False))
    root = netns.open_named(root_name) if root_name else None

    def say(text: str) -> None:
        if not quiet:
            click.echo(text)

    try:
        migration = Migration(state_dir, root)
        before = migration.status()
        if before.state not in ("none", "done") and not rollback:
            say(f"an earlier run stopped while '{before.state}'; {_standing(before)}")
        if rollback:
            migration.rollback(say)
        else:
            people = read_tenants(tenants_file) if tenants_file else ()
            homes = {tenant.name: tenant.netns for tenant in people}
            migration.forward(read_directory(Path(directory or "")), homes, one, say)
        if quiet:
            click.echo(json.dumps(asdict(migration.status())))
    finally:
        if root is not None:
            os.close(root)


def _standing(status: Status) -> str:
    """Which of root's rules are in force, table by table where not all are the same."""
    parts = ", ".join(f"{name} {which}" for name, which in status.tables.items())
    return f"root's rules in force: {status.in_force}" + (f" ({parts})" if status.in_force == "mixed" else "")
