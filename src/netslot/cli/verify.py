"""``netslot verify``: compare the kernel with what it should hold."""

from __future__ import annotations

import time

import click

from netslot.cli.main import Context
from netslot.cli.output import Progress, print_json
from netslot.host.host import Host
from netslot.host.verifying import Report

_DRIFT = 3


@click.command("verify")
@click.argument("slots", type=click.IntRange(min=1), nargs=-1)
@click.option("--repair", is_flag=True, help="Put right what is netslot's own.")
@click.option(
    "--thorough",
    is_flag=True,
    help="Look in every slot for queues, hooks, routing rules and neighbours that nobody's policy put there; without "
    "it, in up to 250 slots, each time others.",
)
@click.option("--watch", type=click.FloatRange(min=0.1), metavar="SECONDS", help="Again and again, this far apart.")
@click.pass_context
def command(
    context: click.Context, slots: tuple[int, ...], repair: bool, thorough: bool, watch: float | None
) -> None:
    """Read back the root ruleset and every slot (or SLOTS) and say what differs. Exit status 3 when drift remains.

    \b
    Examples:
      netslot verify
      netslot verify 17 --repair
    """
    options: Context = context.obj
    with options.host() as host:
        while True:
            report = _once(options, host, slots, repair, thorough)
            if watch is None:
                break
            time.sleep(watch)
    if report.unrepaired:
        context.exit(_DRIFT)


def _once(options: Context, host: Host, slots: tuple[int, ...], repair: bool, thorough: bool) -> Report:
    report = host.verify(slots=slots or None, repair=repair, thorough=thorough, progress=Progress())
    if options.json:
        print_json(
            {
                "slots": report.slots,
                "checked": report.checked,
                "drift": [{"where": each.where, "what": each.what} for each in report.drift],
                "repaired": report.repaired,
                "seconds": report.seconds,
            }
        )
        return report
    for each in report.drift:
        click.echo(str(each))
    verdict = f"{len(report.drift)} differences, {report.repaired} places repaired" if report.drift else "no drift"
    click.echo(f"{report.checked} of {report.slots} slots and root checked in {report.seconds:.2f} s: {verdict}")
    return report
