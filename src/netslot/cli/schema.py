"""``netslot schema``: the JSON schema of the spec, for editors."""

from __future__ import annotations

import click

from netslot.cli.main import Context
from netslot.cli.output import print_json
from netslot.spec.reference import schema


@click.command("schema")
@click.pass_obj
def command(_: Context) -> None:
    """Print the JSON schema of netslot.toml, which editors can check a spec with.

    \b
    Example:
      netslot schema > netslot.schema.json
    """
    print_json(schema())
