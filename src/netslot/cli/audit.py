"""``netslot audit``: what a host's firewall rules cost, tenant by tenant."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click

from netslot.cli.audit_report import html_report
from netslot.errors import HostError, SpecError, UsageError
from netslot.host import census as host_census
from netslot.kernel import netns
from netslot.rulesets import audit as auditor
from netslot.rulesets.attribute import GLOBAL, SHARED
from netslot.rulesets.audit import Audit, Finding
from netslot.rulesets.discover import discover
from netslot.rulesets.flaws import find_missing
from netslot.rulesets.interfaces import Kind, kind
from netslot.rulesets.model import Dump
from netslot.rulesets.parse import merge, parse
from netslot.rulesets.tenants import Tenant, TenantAddress, parse_tenants, tenant_address, with_links

_SCREEN = 8  # chains, findings: a person should see the answer without scrolling


@click.command("audit")
@click.argument("dumps", metavar="[DUMP]...", nargs=-1)
@click.option("--live", is_flag=True, help="Read the rules of this host, and count its other linear walks.")
@click.option(
    "--tenants", "tenants_file", metavar="FILE", help="JSON or TOML list of tenants: name, interfaces, addresses."
)
@click.option("--measure", is_flag=True, help="Time the walks on this machine, in throwaway namespaces (root).")
@click.option("--report", metavar="FILE.html", help="Write one self-contained page with a picture.")
@click.option("--rules", "list_rules", is_flag=True, help="List every rule with its owner.")
@click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
@click.pass_context
def audit(
    context: click.Context,
    dumps: tuple[str, ...],
    live: bool,
    tenants_file: str | None,
    measure: bool,
    report: str | None,
    list_rules: bool,
    as_json: bool,
) -> None:
    """Say what the rules of a host cost and whose they are.

    DUMP is the output of iptables-save or ip6tables-save (or both, as one file or two), '-' for stdin.
    """
    root = str(getattr(context.obj, "root_netns", None) or "")
    gc.disable()  # the model is built once and kept: collecting it in between costs a third of the time
    try:
        tenants = read_tenants(tenants_file) if tenants_file else None
        dump = read_dumps(dumps, live, root)
        census = _in_root(root, host_census.take) if live else None
        if census is not None and tenants is None:
            tenants = with_links(discover(dump), _guests(census))
        result = auditor.audit(dump, tenants)
    finally:
        gc.enable()
    if census is not None:
        result = _with_census(result, census)
    if measure:
        result = _with_measurement(result)
    if report:
        Path(report).write_text(html_report(result), encoding="utf-8")
        click.echo(f"report: {report}", err=True)
    if as_json or bool(getattr(context.obj, "json", False)):
        click.echo(json.dumps(result.as_dict()))
    elif list_rules:
        _print_rules(result)
    else:
        _print(result)


_T = TypeVar("_T")


def _in_root(name: str, function: Callable[[], _T]) -> _T:
    """Call ``function`` in the namespace that owns the host's rules: the named one, or this one."""
    if not name:
        return function()
    fd = netns.open_named(name)
    try:
        return netns.run_in(fd, function)
    finally:
        os.close(fd)


def read_dumps(paths: tuple[str, ...], live: bool = False, root: str = "") -> Dump:
    """The dumps of these files ('-' is stdin), and of this host. Raises UsageError, SpecError, HostError."""
    if not paths and not live:
        raise UsageError("no dump to read", hint="give a file written by iptables-save, '-' for stdin, or --live")
    read = [parse(_read(path), file=path, pasted=True) for path in paths]
    return merge(*read, *(_in_root(root, _live_dumps) if live else ()))


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    try:
        return Path(path).read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def read_tenants(path: str) -> tuple[Tenant, ...]:
    """The tenants of a file. Raises SpecError."""
    return parse_tenants(_read(path), file=path)


def _live_dumps() -> list[Dump]:
    """This namespace's IPv4 and IPv6 rules; a family without any is left out."""
    found: list[Dump] = []
    for tool in ("iptables-save", "ip6tables-save"):
        try:
            saved = subprocess.run([tool, "-c"], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise HostError(
                f"{tool} is not installed", hint="install iptables, or audit a dump of another host"
            ) from None
        if saved.returncode:
            raise HostError(f"{tool}: {saved.stderr.strip().splitlines()[-1:]}", hint="run as root")
        try:
            found.append(parse(saved.stdout, file=tool))
        except SpecError:
            if "*" in saved.stdout:
                raise
    if not found:
        raise UsageError("this host has no iptables rules", hint="native nftables rules cannot be read")
    return found


def _guests(census: host_census.Census) -> dict[str, list[TenantAddress]]:
    """The host's links that are guests' by their names, with the small networks behind them."""
    return {
        name: [
            tenant_address(str(network))
            for network in census.routed.get(name, ())
            if network.prefixlen >= (_SMALLEST_V4 if network.version == 4 else _SMALLEST_V6)
        ]
        for name in sorted(census.links)
        if kind(name) is Kind.GUEST
    }


_SMALLEST_V4, _SMALLEST_V6 = 29, 64  # as for addresses in rules: see netslot.rulesets.discover


def _with_census(result: Audit, census: host_census.Census) -> Audit:
    """Findings about the host's other linear walks, and rules about links that no longer exist."""
    many = result.tenants
    found = [
        Finding("live", f"{census.ip_rules} policy routing rules, tried one after the other at each routing decision")
    ]
    worst = max(census.base_chains.items(), key=lambda item: item[1], default=None)
    if worst:
        (family, hook), count = worst
        found.append(
            Finding(
                "live", f"{count} of 1,024 nftables base chains on {family} {hook} (MAX_HOOK_COUNT, netfilter/core.c)"
            )
        )
    if census.gc_thresh3 is None:
        found.append(
            Finding(
                "live", f"{census.neighbours} neighbours here; gc_thresh3 can be read in the initial namespace only"
            )
        )
    else:
        text = (
            f"{census.neighbours} neighbours here, the limit for all namespaces is {census.gc_thresh3:,} (gc_thresh3)"
        )
        if many >= census.gc_thresh3:
            text += f": too few for {many:,} tenants"
        found.append(Finding("live", text))
    found.append(Finding("live", f"{census.local_routes} IPv6 link-local and multicast routes beside one another"))
    found.append(Finding("live", f"{census.mounts} mounts, which systemd reads anew at each change"))
    missing = find_missing(result.attribution, census.links)
    if missing:
        found.insert(0, Finding("dead", f"about interfaces that do not exist: {len(missing):,} rules", len(missing)))
    return replace(result, flaws=[*missing, *result.flaws], findings=[*found, *result.findings])


def _with_measurement(result: Audit) -> Audit:
    from netslot.bench.walk import measure

    return replace(result, findings=[*(Finding("measured", line) for line in measure(result)), *result.findings])


def _print(result: Audit) -> None:
    """One screen."""
    per_tenant = result.rules_per_tenant()
    _, common, shared = result.attribution.counts()
    if result.tenants:
        spread = "" if per_tenant["min"] == per_tenant["max"] else f" ({per_tenant['min']} to {per_tenant['max']})"
        click.echo(
            f"{result.rules:,} rules: {_count(result.tenants, 'tenant')} with {per_tenant['median']} each{spread}, "
            f"and {common + shared:,} common ones ({common:,} global, {shared:,} shared)"
        )
        click.echo(
            f"{_count(result.class_count, 'class', 'classes')} of tenants with rules that differ only in names"
        )
    else:
        click.echo(f"{result.rules:,} rules; no tenant can be recognised in them")
        click.echo("name tenants with --tenants FILE if there are some")
    longest = _count(result.walks.longest, "rule")
    which = "A packet" if result.tenants else "A packet whose addresses and port no rule names"
    click.echo(f"{which} is tested against up to {longest} on its way through the host.\n")
    _print_chains(result)
    if result.findings:
        click.echo("\nWhat stands out")
        for finding in result.findings[:_SCREEN]:
            click.echo(f"  - {finding.text}")
        if len(result.findings) > _SCREEN:
            click.echo(f"  - and {len(result.findings) - _SCREEN} more (--json)")
    if result.limits:
        nearest = result.limits[0]
        click.echo(
            f"\nNearest kernel limit: {nearest.name}, {nearest.used:,} of {nearest.limit:,} ({nearest.source})"
        )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _print_chains(result: Audit) -> None:
    if not result.chains:
        return
    families = {chain.family for chain in result.chains}
    click.echo(f"  {'rules tested in':<26}{'':<13}{'first tenant':>14}{'median':>10}{'worst':>10}  worst tenant")
    for chain in result.chains[:_SCREEN]:
        name = f"{chain.table} {chain.chain}" + (f" (v{chain.family})" if len(families) > 1 else "")
        for state, spread in chain.states.items():
            first, median, worst = (spread[key].tested for key in ("first", "median", "worst"))
            who = spread["worst"]
            place = f"{who.tenant}, {who.position:,} of {result.tenants:,}" if result.tenants else who.tenant
            click.echo(f"  {name:<26}{state:<13}{first:>14,}{median:>10,}{worst:>10,}  {place}")
            name = ""
    if len(result.chains) > _SCREEN:
        click.echo(f"  and {len(result.chains) - _SCREEN} more chains (--json)")


def _print_rules(result: Audit) -> None:
    """Every rule after its owner and, where it is shared, the reason."""
    attribution = result.attribution
    for ruleset in attribution.dump.rulesets:
        for table, chain, rule in ruleset.rules():
            index = attribution.owner[rule]
            owner = {GLOBAL: "global", SHARED: "shared"}.get(index) or attribution.tenants[index].name
            why = f"   # {attribution.why[rule]}" if index == SHARED else ""
            click.echo(f"{owner}\t{table.name}\t-A {chain.name} {rule.text}{why}")
