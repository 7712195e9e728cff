"""``netslot exec``: run a command in a slot."""

from __future__ import annotations

import signal

import click

from netslot.cli.main import Context


@click.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("slot", metavar="SLOT")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--as-tenant", is_flag=True, help="Without CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN.")
@click.pass_context
def command(context: click.Context, slot: str, command: tuple[str, ...], as_tenant: bool) -> None:
    """Run COMMAND in SLOT's namespace, and in its cgroup where it has one; its exit status is passed on.

    SLOT is a number, or a tenant of the roster. In a slot of attachment veth, the command runs in the workload's own
    namespace. It keeps your capabilities, so that you can look around; start a process slot's workload with
    --as-tenant, which takes away what could change the slot's rules or pass them by.

    \b
    Examples:
      netslot exec 17 -- ip address
      netslot exec --as-tenant 17 -- python3 -m http.server
    """
    options: Context = context.obj
    with options.host() as host:
        process = host.start(host.number(slot), command, as_tenant=as_tenant)
    # Whoever ends netslot means the command. A terminal's Ctrl-C reaches that by itself, and is its own affair.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, lambda *_: None)
    status = process.wait()
    context.exit(status if status >= 0 else 128 - status)
