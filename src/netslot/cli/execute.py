"""``netslot exec``: run a command in a slot."""

from __future__ import annotations

import signal

import click

from netslot.cli.main import Context


@click.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("slot", metavar="SLOT")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--as-tenant", is_flag=True, help="Without capabilities, as a user of the slot's own.")
@click.option("--user", metavar="UID[:GID]", help="With --as-tenant: the user to be, by number.")
@click.pass_context
def command(context: click.Context, slot: str, command: tuple[str, ...], as_tenant: bool, user: str | None) -> None:
    """Run COMMAND in SLOT's namespace, and in its cgroup where it has one; its exit status is passed on.

    SLOT is a number, or a tenant of the roster. In a slot of attachment veth, the command runs in the workload's own
    namespace. It keeps your user and capabilities, so that you can look around; start a process slot's workload
    with --as-tenant, which leaves it nothing that could change the slot's rules or pass them by.

    \b
    Examples:
      netslot exec 17 -- ip address
      netslot exec --as-tenant 17 -- python3 -m http.server
      netslot exec --as-tenant --user 1000:1000 17 -- ./work
    """
    options: Context = context.obj
    ids = _ids(user) if user is not None else None
    if ids is not None and not as_tenant:
        raise click.UsageError("--user goes with --as-tenant")
    with options.host() as host:
        process = host.start(host.number(slot), command, as_tenant=as_tenant, user=ids)
    # Whoever ends netslot means the command. A terminal's Ctrl-C reaches that by itself, and is its own affair.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, lambda *_: None)
    status = process.wait()
    context.exit(status if status >= 0 else 128 - status)


def _ids(text: str) -> tuple[int, int]:
    """``UID`` or ``UID:GID`` as numbers; the group is the user's number where none is named."""
    user, _, group = text.partition(":")
    if not user.isdecimal() or not (group or user).isdecimal():
        raise click.BadParameter(f"{text!r} is not UID or UID:GID, in numbers", param_hint="--user")
    return int(user), int(group or user)
