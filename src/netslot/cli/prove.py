"""``netslot prove``: whether a split does with every packet what the dump did."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netslot.cli.audit import read_dumps, read_tenants
from netslot.cli.split import REFUSED, host_addresses
from netslot.errors import HostError, RefusedError, UsageError
from netslot.rulesets.attribute import attribute
from netslot.rulesets.model import Dump

if TYPE_CHECKING:
    from netslot.rulesets.proof.arrangement import Arrangement
    from netslot.rulesets.proof.places import Places


@click.command("prove")
@click.argument("dumps", metavar="DUMP...", nargs=-1, required=True)
@click.argument("directory", metavar="DIR")
@click.option("--tenants", "tenants_file", metavar="FILE", help="JSON or TOML list of tenants.")
@click.option("--host-address", "hosts", metavar="ADDRESS", multiple=True, help="An address of the host's own.")
@click.option("--replay", metavar="N", type=int, default=0, help="Also send N real packets both ways (root).")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def prove(
    context: click.Context,
    dumps: tuple[str, ...],
    directory: str,
    tenants_file: str | None,
    hosts: tuple[str, ...],
    replay: int,
    as_json: bool,
) -> None:
    """Prove that DIR, which netslot split wrote, does with every packet what the rules of DUMP did.

    Exit status 3 when it does not, with a packet that shows it, or when it cannot be proved, with the reason.
    """
    try:
        from netslot.rulesets.proof import arrangement, places, prover, spec_says
    except ModuleNotFoundError as error:
        raise HostError("the prover needs z3", hint="pip install 'netslot[prove]'") from error
    gc.disable()  # the model is built once and kept
    try:
        dump = read_dumps(dumps)
        people = attribute(dump, read_tenants(tenants_file) if tenants_file else None).tenants
        world = places.survey(dump, people, host_addresses(hosts))
        files = read_directory(Path(directory))
        after = arrangement.read(files)
        verdict = prover.prove(dump, world, after)
        verdict.obstacles += spec_says.differences(files, after)
    finally:
        gc.enable()
    replayed = _replay(dump, world, after, files, replay) if replay else {}
    differing = replayed.pop("differences", [])
    examples = [
        {"tenant": c.tenant, "packet": c.packet, "before": c.before, "after": c.after, "parts": c.parts}
        for c in verdict.counterexamples
    ] + differing
    answer = {
        "equivalent": verdict.equivalent and not differing,
        "tenants": verdict.tenants,
        "classes": verdict.classes,
        "packets_replayed": replayed.get("sent", 0),
        "packets_skipped": replayed.get("skipped", {}),
        "packets_by_state": replayed.get("kinds", {}),
        "counterexamples": examples,
        "obstacles": verdict.obstacles,
        "assumptions": verdict.assumptions,
        "notes": verdict.notes + replayed.get("notes", []),
    }
    if as_json or bool(getattr(context.obj, "json", False)):
        click.echo(json.dumps(answer))
    else:
        _print(answer, verdict.scenarios)
    if not answer["equivalent"]:
        context.exit(3)


def _replay(dump: Dump, world: Places, after: Arrangement, files: Mapping[str, str], count: int) -> dict[str, Any]:
    from netslot.host.replay import replay_packets

    return vars(replay_packets(dump, world, after, files, count))


def read_directory(directory: Path) -> dict[str, str]:
    """All files of a directory that ``netslot split`` wrote, by name. Raises UsageError, RefusedError."""
    try:
        files = {
            path.name: path.read_text(encoding="utf-8", errors="surrogateescape")
            for path in sorted(directory.iterdir())
            if path.is_file() and path.name != "report.json"
        }
    except OSError as error:
        raise UsageError(
            f"{directory}: {error.strerror}", hint="give the directory that netslot split wrote"
        ) from None
    refused = files.get(REFUSED)
    if refused is not None:
        reasons = refused.splitlines()
        more = f" (and {len(reasons) - 1} more in {directory / REFUSED})" if len(reasons) > 1 else ""
        raise RefusedError(
            f"the split was refused, so there is nothing to go by: {''.join(reasons[:1])}{more}",
            hint="run netslot split again once the reasons are gone; it takes that file away",
        )
    return files


def _print(answer: dict[str, Any], scenarios: int) -> None:
    count = f"{answer['tenants']} tenants in {answer['classes']} classes" + (
        f", {scenarios} ways" if scenarios else ""
    )
    if answer["equivalent"]:
        click.echo(f"the same for every packet: {count}")
    else:
        click.echo(f"NOT shown to be the same: {count}")
    if answer["packets_replayed"]:
        states = ", ".join(f"{count} {state}" for state, count in sorted(answer["packets_by_state"].items()))
        click.echo(f"{answer['packets_replayed']} real packets were sent through both arrangements ({states})")
    for reason, count in answer["packets_skipped"].items():
        click.echo(f"  {count} more were not compared: {reason}")
    for example in answer["counterexamples"]:
        _print_example(example)
    for text in answer["obstacles"]:
        click.echo(f"cannot be proved: {text}")
    for text in answer["notes"]:
        click.echo(f"note: {text}")
    click.echo("taken for granted:")
    for text in answer["assumptions"]:
        click.echo(f"  - {text}")


def _print_example(example: dict[str, Any]) -> None:
    packet = ", ".join(f"{name} {value}" for name, value in example["packet"].items())
    click.echo(f"\ntenant {example['tenant'] or '(none)'}: {packet}")
    paths = [example[side].get("path", []) for side in ("before", "after")]
    for side, path in zip(("before", "after"), paths, strict=True):
        result = example[side]
        leaves = f", leaves by {result['leaves']}" if result.get("leaves", "to the host") != "to the host" else ""
        click.echo(f"  {side}: {result['verdict']}{leaves}")
        for line in path:
            click.echo(f"    {line}")
    if example.get("parts"):
        click.echo(f"  they differ in: {example['parts']}")
