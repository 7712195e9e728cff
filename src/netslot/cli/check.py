"""``netslot check``: what this host has and lacks."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from netslot.host import probe
from netslot.host.finding import Finding
from netslot.kernel import netns
from netslot.spec.load import load

if TYPE_CHECKING:
    from netslot.cli.main import Context

_SPEC = "netslot.toml"
_SLOTS = 4000
_LACKING = 4


@click.command("check")
@click.argument("spec", required=False, metavar="[SPEC]", type=click.Path(path_type=Path))
@click.option("--slots", type=click.IntRange(min=1), help="Judge limits for this many slots instead of the spec's.")
@click.pass_context
def check(context: click.Context, spec: Path | None, slots: int | None) -> None:
    """Say what this host has and lacks for SPEC: kernel, tools, limits, conflicts; and how to mend it.

    Changes nothing. SPEC is netslot.toml by default; without one, 4,000 microVMs are assumed. The exit status is 4
    when slots cannot work here.

    \b
    Examples:
      netslot check
      netslot check examples/sandbox/netslot.toml --slots 400
    """
    options: Context = context.obj
    root_fd = netns.open_named(options.root_netns) if options.root_netns else None
    try:
        if spec is None and not Path(_SPEC).exists():
            wanted = probe.assumed_spec(slots or _SLOTS, root_fd)
        else:
            wanted = load(spec or _SPEC, slots=slots)
        findings = probe.check(wanted, root_fd)
    finally:
        if root_fd is not None:
            os.close(root_fd)
    ok = all(finding.level != "error" for finding in findings)
    if options.json:
        click.echo(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings, ok)
    if not ok:
        context.exit(_LACKING)


def _print(findings: list[Finding], ok: bool) -> None:
    for finding in findings:
        if finding.level == "info":
            continue
        click.secho(f"{finding.level}: {finding.what}", fg="red" if finding.level == "error" else "yellow", bold=True)
        click.echo(f"    why: {finding.why}")
        if finding.fix:
            click.echo(f"    fix: {finding.fix}")
    for finding in findings:
        if finding.level == "info":
            click.echo(f"- {finding.what}: {finding.why}")
            if finding.fix:
                click.echo(f"    to change it: {finding.fix}")
    counts = {level: sum(1 for finding in findings if finding.level == level) for level in ("error", "warning")}
    verdict = "slots can work here" if ok else "slots cannot work here"
    click.secho(f"{verdict} ({counts['error']} errors, {counts['warning']} warnings)", bold=True)
