"""``netslot acquire``: lease a slot."""

from __future__ import annotations

import click

from netslot.cli.main import Context
from netslot.cli.output import print_json
from netslot.errors import UsageError


def parameters(texts: tuple[str, ...]) -> dict[str, str]:
    """``name=value`` options as a mapping; a name given twice makes a list."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{text!r} is no parameter", hint="--param NAME=VALUE; lists with commas")
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


@click.command("acquire")
@click.option("--owner", required=True, help="Who takes the slot; asking again gives the same lease.")
@click.option("--class", "class_name", metavar="NAME", help="Default: the spec's first class.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the spec; repeatable.")
@click.option("--wait", type=click.FloatRange(min=0), default=0.0, help="Seconds to wait for a free slot.")
@click.option("--ttl", type=click.FloatRange(min=0), help="Seconds after which the lease ends unless renewed.")
@click.pass_obj
def command(
    options: Context, owner: str, class_name: str | None, params: tuple[str, ...], wait: float, ttl: float | None
) -> None:
    """Lease a free slot to OWNER and print what a workload needs to attach. Exit status 3 when none is free.

    \b
    Examples:
      netslot acquire --owner vm-17
      netslot acquire --owner vm-17 --param allow=192.0.2.0/24,198.51.100.7/32 --wait 5
    """
    bound = parameters(params)
    if (daemon := options.daemon()) is not None:
        with daemon:
            fields = daemon.acquire(owner, class_name=class_name, params=bound, wait=wait, ttl=ttl)
    else:
        with options.host() as host:
            fields = host.lease(owner, class_name=class_name, params=bound, wait=wait, ttl=ttl).fields
    if options.json:
        print_json(fields)
        return
    for name, value in fields.items():
        if value not in (None, {}, []):
            click.echo(f"{name}: {value}")
