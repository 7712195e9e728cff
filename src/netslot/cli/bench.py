"""``netslot bench``: what a host pays for its tenants' rules, measured on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from netslot.bench import churn, leases, nat, picture, policies, policy_report, provision, report, skew, stage
from netslot.errors import UsageError


@click.group("bench")
def bench() -> None:
    """Measure on this machine, in throwaway namespaces: nothing outside them is touched.

    Needs root, or user namespaces.
    """


@bench.command("skew")
@click.option("--slots", default=4000, show_default=True, help="Tenants of the host that is played.")
@click.option("--policy", type=click.Choice(("iptables", *policies.POLICIES)), help="What is skewed.  [iptables]")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(skew.SHAPES), help="Only this one; repeatable.")
@click.option(
    "--positions", default=5, show_default=True, help="How many tenants are measured, first and last among them."
)
@click.option("--samples", default=400, show_default=True, help="Connections of each tenant.")
@click.option("--picture", "file", metavar="FILE", help="Draw the result as .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def skew_command(
    context: click.Context,
    slots: int,
    policy: str | None,
    shapes: tuple[str, ...],
    positions: int,
    samples: int,
    file: str | None,
    as_json: bool,
) -> None:
    """Time a TCP connect for the first, the last and some tenants between, for every arrangement of rules.

    \b
    netslot bench skew --slots 400
    netslot bench skew --picture skew.svg
    netslot bench skew --shape root-nft-verdict-map --shape slots-nftables --json
    netslot bench skew --policy routes --slots 1000
    """
    if policy not in (None, "iptables"):
        if shapes or file is not None:
            raise UsageError("--shape and --picture are for rules", hint="leave them out with --policy")
        other = policies.Plan(policy, slots, positions=positions, samples=samples)
        result = measured(context, lambda: policies.measure_policy(other, say))
        show(context, result, policy_report.policy_table, as_json)
        return
    plan = skew.Plan(slots, shapes or skew.SHAPES, positions=positions, samples=samples)
    if file is not None:
        picture.check_name(file)
    result = measured(context, lambda: skew.measure_skew(plan, say))
    if file is not None:
        picture.draw(result, file)
    show(context, result, report.skew_table, as_json)


@bench.command("nat")
@click.option("--samples", default=1000, show_default=True, help="Connections of each kind.")
@click.option("--connections", default=20_000, show_default=True, help="Flows that are opened for their memory.")
@click.option("--setups", default=100, show_default=True, help="Slots of each kind that are set up.")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def nat_command(context: click.Context, samples: int, connections: int, setups: int, as_json: bool) -> None:
    """Compare NAT in the slot with and without connection tracking: set-up, latency, connections/s, memory.

    \b
    netslot bench nat
    netslot bench nat --json
    """
    plan = nat.Plan(samples=samples, connections=connections, setups=setups)
    result = measured(context, lambda: nat.measure_nat(plan, say))
    show(context, result, policy_report.nat_table, as_json)


@bench.command("provision")
@click.option("--slots", default=4000, show_default=True, help="Slots that netslot and the bare loop build.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(provision.METHODS), help="Only this one; repeatable."
)
@click.option("--script-samples", default=30, show_default=True, help="Slots by script, before and after the others.")
@click.option("--cni-slots", default=60, show_default=True, help="Containers that the CNI plugins connect.")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def provision_command(
    context: click.Context,
    slots: int,
    methods: tuple[str, ...],
    script_samples: int,
    cni_slots: int,
    as_json: bool,
) -> None:
    """Time the building of slots: netslot, a bare loop of the same system calls, a script, CNI plugins.

    The method `policies`, slots that have all policies, must be asked for.

    \b
    netslot bench provision --slots 400
    netslot bench provision --method netslot --method floor --json
    netslot bench provision --slots 1000 --method netslot --method policies
    """
    plan = provision.Plan(
        slots, methods or provision.DEFAULT_METHODS, script_samples=script_samples, cni_slots=cni_slots
    )
    result = measured(context, lambda: provision.measure_provision(plan, say))
    show(context, result, report.provision_table, as_json)


@bench.command("acquire")
@click.option("--slots", default=4000, show_default=True, help="Slots of the host; a tenth of them is tried first.")
@click.option("--samples", default=1000, show_default=True, help="Leases of each kind.")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def acquire_command(context: click.Context, slots: int, samples: int, as_json: bool) -> None:
    """Time acquires: in this process, with a list of 1,000 networks, over the daemon's socket, by 100 clients.

    \b
    netslot bench acquire --slots 400
    """
    result = measured(context, lambda: leases.measure_acquire(slots, samples, say))
    show(context, result, leases.acquire_lines, as_json)


@bench.command("churn")
@click.option("--slots", default=4000, show_default=True, help="Slots of the host.")
@click.option("--cycles", default=50_000, show_default=True, help="Acquires and releases in all.")
@click.option("--clients", default=100, show_default=True, help="Processes that acquire and release.")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def churn_command(context: click.Context, slots: int, cycles: int, clients: int, as_json: bool) -> None:
    """Time recycling; then have clients acquire and release while they and the daemon are killed at random.

    \b
    netslot bench churn --slots 400 --cycles 5000
    """
    plan = churn.Plan(slots, cycles, clients)
    result = measured(context, lambda: churn.measure_churn(plan, say))
    show(context, result, churn.churn_lines, as_json)


@bench.command("verify")
@click.option("--slots", default=4000, show_default=True, help="Slots of the host.")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def verify_command(context: click.Context, slots: int, as_json: bool) -> None:
    """Time the verifying of all slots, and seed one change of each kind to see it found.

    \b
    netslot bench verify --slots 400
    """
    result = measured(context, lambda: leases.measure_verify(slots))
    show(context, result, leases.verify_lines, as_json)


def say(text: str) -> None:
    """Progress goes to stderr, and only where a person sees it."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def measured(context: click.Context, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure on a stage; where that fails it has said why, and the command ends with its exit status."""
    status, result = stage.compute(measure)
    if result is None:
        context.exit(status)
    return result


def show(
    context: click.Context,
    result: dict[str, Any],
    words: Callable[[dict[str, Any]], str],
    as_json: bool,
) -> None:
    """Print a result for a program or for a person."""
    wanted = as_json or bool(getattr(context.obj, "json", False))
    click.echo(json.dumps(result, indent=1) if wanted else words(result))
