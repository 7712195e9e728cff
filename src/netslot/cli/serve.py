"""``netslot serve``: run the daemon."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from netslot.cli.main import Context
from netslot.errors import HostError, UsageError


@click.command("serve")
@click.argument("spec", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--group", metavar="NAME", help="Members of this group may use the socket besides root.")
@click.option("--low", type=click.IntRange(min=0), help="Build slots of a class when fewer than this are free ...")
@click.option("--high", type=click.IntRange(min=1), help="... until so many are free. Default: build all at once.")
@click.option(
    "--verify-seconds",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    help="Time in which all slots are verified and repaired once; 0 for never.",
)
@click.pass_obj
def command(
    options: Context, spec: Path | None, group: str | None, low: int | None, high: int | None, verify_seconds: float
) -> None:
    """Serve leases over HTTP on netslot.sock in the state directory, and keep the host in order behind it.

    With SPEC the host is made or brought up to date; without, the host that is there is served. SIGHUP reads the
    spec again. SIGTERM ends the daemon; slots and leases stay, and the next one takes them over.

    \b
    Examples:
      netslot serve netslot.toml --group netslot
      netslot serve netslot.toml --low 50 --high 200
      curl --unix-socket /run/netslot/netslot.sock http://localhost/v1/slots
    """
    if (low is None) != (high is None) or (low is not None and high is not None and low > high):
        raise UsageError("--low and --high belong together, the lower one first")
    try:
        from netslot.serve.daemon import serve
        from netslot.serve.upkeep import Settings
    except ImportError as error:
        raise HostError(f"the daemon needs {error.name}", hint="pip install 'netslot[serve]'") from error
    logging.basicConfig(level=logging.INFO, format="netslot: %(message)s")
    path = spec.resolve() if spec is not None else None
    with options.host() as host:
        serve(host, Settings(path, low, high, verify_seconds), group=group)
