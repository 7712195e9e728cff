"""``netslot split``: from a host's ruleset to a static root and a template per class of tenants."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any, Literal, cast

import click

from netslot.cli.audit import read_dumps, read_tenants
from netslot.errors import UsageError
from netslot.rulesets.attribute import attribute
from netslot.rulesets.model import Family
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.split import Method, Split
from netslot.rulesets.split import split as split_dump
from netslot.rulesets.values import address

_SHOWN = 8
REFUSED = "refused.txt"
"""Stands in the directory of a split that was refused: the reasons, a line each."""
_OURS = re.compile(
    r"(?:root|before)\.rules6?|root\.sets6?|publish\.nft6?|class\d+\.rules6?|(?:tenants|report)\.json|netslot\.toml|refused\.txt"
)


@click.command("split")
@click.argument("dumps", metavar="[DUMP]...", nargs=-1)
@click.option("--out", "out", metavar="DIR", required=True, help="Where to write; made if it is not there.")
@click.option("--live", is_flag=True, help="Read the rules of this host.")
@click.option("--tenants", "tenants_file", metavar="FILE", help="JSON or TOML list of tenants.")
@click.option("--host-address", "hosts", metavar="ADDRESS", multiple=True, help="An address of the host's own.")
@click.option(
    "--attachment",
    type=click.Choice(["tap", "veth", "process"]),
    default="tap",
    show_default=True,
    help="How a tenant's workload will meet its slot.",
)
@click.option(
    "--inward",
    type=click.Choice(["slot", "root"]),
    default="slot",
    show_default=True,
    help="Who decides about packets to a tenant.",
)
@click.option(
    "--method",
    type=click.Choice(["slots", "sets"]),
    help="Where tenants' rules go: into slots, or into rules of root's with sets. By itself slots where every tenant "
    "has a link of its own, else sets.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def split(
    context: click.Context,
    dumps: tuple[str, ...],
    out: str,
    live: bool,
    tenants_file: str | None,
    hosts: tuple[str, ...],
    attachment: str,
    inward: Literal["slot", "root"],
    method: Method | None,
    as_json: bool,
) -> None:
    """Split the rules of a host among its tenants' slots.

    DUMP is the output of iptables-save or ip6tables-save (or both), '-' for stdin. Exit status 3 when some rule
    cannot be carried over; each is named with its reason.
    """
    root = str(getattr(context.obj, "root_netns", None) or "")
    gc.disable()  # the model is built once and kept
    try:
        dump = read_dumps(dumps, live, root)
        tenants = attribute(dump, read_tenants(tenants_file) if tenants_file else None).tenants
        result = split_dump(
            dump,
            tenants,
            attachment=cast(Attachment, attachment),
            host_addresses=host_addresses(hosts),
            inward=inward,
            method=method,
        )
    finally:
        gc.enable()
    _write(Path(out), result)
    if as_json or bool(getattr(context.obj, "json", False)):
        click.echo(json.dumps(result.report))
    else:
        _print(result, out)
    if result.refused:
        context.exit(3)


def host_addresses(texts: tuple[str, ...]) -> list[tuple[Family, int]]:
    """Addresses given on the command line. Raises UsageError."""
    found: list[tuple[Family, int]] = []
    for text in texts:
        family: Family = 6 if ":" in text else 4
        try:
            found.append((family, address(text, family)))
        except ValueError as error:
            raise UsageError(f"--host-address: {error}") from None
    return found


def _write(directory: Path, result: Split) -> None:
    """The files, and none that an earlier split left: each of those would be taken for a part of this one."""
    files = dict(result.files)
    if result.refused:
        files[REFUSED] = "".join(f"{reason}\n" for reason in result.refused)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in files and path.is_file():
                path.unlink()
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}") from None


def _print(result: Split, out: str) -> None:
    report: dict[str, Any] = dict(result.report)
    if result.files:
        click.echo(f"{report['tenants']} tenants in {report['classes']} classes; written to {out}")
        for name, key in (("root rules", "root_rules"), ("longest walk", "longest_walk")):
            click.echo(f"  {name:15}  {report[f'{key}_before']:>8,} before, {report[f'{key}_after']:,} after")
        click.echo(f"  rules in a slot  {report['slot_rules_max']:>8,} at most")
        click.echo(
            f"  {report['moved']:,} rules moved into slots, {report['merged']:,} merged into rules that name no "
            f"tenant, {len(report['stayed']):,} stay (every one with its reason: {out}/report.json)"
        )
    for note in result.notes:
        click.echo(f"note: {note}")
    for text in result.refused[:_SHOWN]:
        click.echo(f"refused: {text}")
    if len(result.refused) > _SHOWN:
        click.echo(f"... and {len(result.refused) - _SHOWN} more")
    if result.files and not result.refused:
        click.echo(f"next: netslot prove DUMP {out}")
