"""The ``netslot`` command: global options, the verbs, and how errors and exit statuses look."""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from netslot.errors import NetslotError
from netslot.host.engine import DEFAULT_STATE_DIR
from netslot.host.host import Host
from netslot.serve.client import Client, connect

_VERBS = {
    "acquire": "Lease a slot, with a tenant's own parameters.",
    "audit": "Say what a host's rules cost, and whose they are.",
    "bench": "Measure on this machine.",
    "check": "Say what this host has and lacks.",
    "demo": "Play a host: the usual arrangement and slots, side by side.",
    "down": "Remove the host with all it made.",
    "exec": "Run a command in a slot.",
    "ls": "List the slots.",
    "migrate": "Move a host's tenants to slots of their own.",
    "prove": "Show that a split changes no verdict.",
    "release": "End a lease.",
    "schema": "Print the JSON schema of the spec.",
    "serve": "Run the daemon.",
    "show": "Show a slot: links, rules with counters, how to attach.",
    "split": "Split a host's rules into a static root and templates.",
    "status": "Count slots and rules.",
    "up": "Build the host that a spec describes.",
    "update": "Change a running lease's parameters.",
    "verify": "Compare the kernel with what it should hold.",
}
"""Every verb and its line in ``--help``; each is ``netslot.cli.VERB``, imported when it is used."""


@dataclass(frozen=True)
class Context:
    """The global options."""

    state_dir: Path
    root_netns: str | None
    json: bool

    def host(self) -> Host:
        """The host that the options name; the caller closes it."""
        return Host(self.state_dir, root_netns=self.root_netns)

    def daemon(self) -> Client | None:
        """The host's daemon where one runs; the caller closes the client."""
        return connect(self.state_dir)


class Verbs(click.Group):
    """Loads a verb's module when the verb is used, so that no command pays for another's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"netslot.cli.{'execute' if cmd_name == 'exec' else cmd_name}")
        command = getattr(module, "command", None) or getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_STATE_DIR,
    show_default=True,
    envvar="NETSLOT_STATE_DIR",
    help="Where the host's ledger lives; one directory, one host.",
)
@click.option(
    "--root-netns", metavar="NAME", help="The host's root namespace, as ip netns knows it; default: this one."
)
@click.option("--json", "as_json", is_flag=True, help="Machine output on standard output, and nothing else there.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="netslot")
@click.pass_context
def cli(context: click.Context, state_dir: Path, root_netns: str | None, as_json: bool, debug: bool) -> None:
    """Every tenant's rules in the tenant's own network namespace; a root ruleset that never changes.

    \b
    Examples:
      netslot check netslot.toml          what this host has and lacks
      netslot up netslot.toml             build the slots
      netslot acquire --owner vm-17       lease one
      netslot verify                      compare the kernel with what it should hold
    """
    context.obj = Context(state_dir, root_netns, as_json)


def main() -> None:
    """The entry point: errors become one line, one line of hint, and an exit status."""
    debug = "--debug" in sys.argv[1:]
    try:
        status = cli.main(standalone_mode=False)
    except NetslotError as error:
        _fail(str(error), error.hint, error.exit_status, debug=debug)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context is not None else None
        _fail(error.format_message(), hint, 2, debug=debug)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", None, 1, debug=debug)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), None, 1, debug=debug)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, hint: str | None, status: int, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    click.echo(f"netslot: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    sys.exit(status)
