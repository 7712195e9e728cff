"""The root namespace's rules: put in place by ``up``, compared by ``verify``, taken away by ``down``.

netslot owns its tables (nftables) or its chains and the jumps to them (iptables), and touches nothing else.
All functions run on a worker thread that is in the root namespace. The operator's tool is run here, once per
ruleset, never per slot.
"""

from __future__ import annotations

import errno
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from netslot.errors import HostError, KernelError, NetslotError, SpecError
from netslot.host import root_text
from netslot.host.root_text import CHAIN, TABLE, Chains
from netslot.kernel.sysctl import Sysctls
from netslot.policy.base import Difference
from netslot.spec.model import HostSpec
from netslot.spec.render import render

_TIMEOUT = 120
_PACKAGES = {"nft": "nftables"}


@dataclass(frozen=True)
class Snapshot:
    """What netslot put into the root namespace, as the tools print it; ``parts`` is by owner (a table or tool)."""

    parts: dict[str, list[str]]
    rules: int

    def dump(self) -> str:
        return json.dumps({"parts": self.parts, "rules": self.rules})

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        fields = json.loads(text)
        return cls(fields["parts"], fields["rules"])


def apply(spec: HostSpec, before: Snapshot | None) -> Snapshot:
    """Put the static ruleset in place, each table in one transaction; what ``before`` had and it lacks goes.

    SpecError when a tool refuses the operator's additions: then that table is as it was.
    """
    if spec.root.backend == "nftables":
        wanted = _apply_nft(spec, before)
        variants = [variant for variant in ("legacy", "nft") if _drops_forward(variant)]
        for variant in variants:
            wanted += _apply_iptables(variant, False, [Chains("filter", _rules(root_text.forward(spec)))], None)
            if spec.addresses.pool6 is not None:
                wanted += _apply_iptables(variant, True, [Chains("filter", _rules(root_text.forward(spec)))], None)
    else:
        variant = spec.root.backend.removeprefix("iptables-")
        wanted = _apply_iptables(variant, False, root_text.iptables(spec, ipv6=False), spec.root.rules.ipv4)
        if spec.addresses.pool6 is not None or spec.root.rules.ipv6 is not None:
            wanted += _apply_iptables(variant, True, root_text.iptables(spec, ipv6=True), spec.root.rules.ipv6)
        other = "nft" if variant == "legacy" else "legacy"
        if _drops_forward(other):
            wanted += _apply_iptables(other, False, [Chains("filter", _rules(root_text.forward(spec)))], None)
    stale = [owner for owner in (before.parts if before else {}) if owner not in wanted]
    _remove(stale)
    parts = {owner: _read(owner) for owner in wanted}
    return Snapshot(parts, sum(_count(lines) for lines in parts.values()))


def differences(snapshot: Snapshot) -> list[Difference]:
    """What of netslot's rules in the root namespace is not as ``apply`` left it."""
    found = []
    for owner, wanted in snapshot.parts.items():
        actual = _read(owner)
        if actual == wanted:
            continue
        missing = [line.strip() for line in wanted if line not in actual]
        added = [line.strip() for line in actual if line not in wanted]
        where = f"root {owner}"
        found += [Difference(where, f"missing: {line}") for line in missing]
        found += [Difference(where, f"not netslot's: {line}") for line in added]
        if not missing and not added:
            found.append(Difference(where, "rules are in another order"))
    return found


def remove(snapshot: Snapshot) -> None:
    """Take netslot's rules away; absence is success."""
    _remove(snapshot.parts)


def _remove(owners: Iterable[str]) -> None:
    for owner in owners:
        tool, *rest = owner.split()
        if tool == "nft":
            _run(["nft", "-f", "-"], f"add table {' '.join(rest)}\ndelete table {' '.join(rest)}\n", None)
            continue
        own = [name for name in rest[1].split(",") if name] if len(rest) > 1 else []
        there = _save(tool, rest[0])
        names = {line.split()[0][1:] for line in there if line.startswith(":")}
        lines = [f"*{rest[0]}"]
        lines += [line.replace("-A ", "-D ", 1) for line in there if _is_jump(line)]
        mine = [name for name in names if name.startswith(f"{CHAIN}-") or name in own]
        lines += [f"-F {name}" for name in mine] + [f"-X {name}" for name in mine] + ["COMMIT", ""]
        if len(lines) > 3:
            _run([_restore(tool), "--noflush"], "\n".join(lines), None)


# --- forwarding --------------------------------------------------------------------------------------


def enable_forwarding(spec: HostSpec) -> str:
    """Let the uplink forward, and IPv6 as a whole where slots have it; returns what was set before, for ``down``.

    IPv4 is switched for the uplink alone. IPv6 forwards only where ``net.ipv6.conf.all.forwarding`` says so.
    """
    before: dict[str, str] = {}
    sysctls = Sysctls()
    try:
        names = [f"net/ipv4/conf/{spec.uplink}/forwarding"]
        names += ["net/ipv6/conf/all/forwarding"] if spec.addresses.pool6 is not None else []
        for name in names:
            try:
                before[name] = sysctls.read(name)
            except KernelError as error:
                raise SpecError(
                    f"the root namespace has no link {spec.uplink!r}", key="uplink", hint="ip link shows them"
                ) from error
            if before[name] == "0":
                sysctls.write(name, "1")
    finally:
        sysctls.close()
    return json.dumps(before)


def restore_forwarding(saved: str | None) -> None:
    """Undo :func:`enable_forwarding`; a link that is gone is left alone."""
    sysctls = Sysctls()
    try:
        for name, value in json.loads(saved or "{}").items():
            try:
                if sysctls.read(name) != value:
                    sysctls.write(name, value)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
    finally:
        sysctls.close()


# --- nftables ----------------------------------------------------------------------------------------


def _apply_nft(spec: HostSpec, before: Snapshot | None) -> list[str]:
    file = spec.root.rules.nft
    text = render(file.text, spec.root_values(), file=file.name) if file is not None else ""
    tables = [("inet", TABLE), *root_text.nft_tables(text)]
    there = _run(["nft", "list", "tables"], "", None)
    owners = [f"nft {family} {name}" for family, name in tables]
    known = set(before.parts) if before else set()
    for owner, (family, name) in zip(owners[1:], tables[1:], strict=True):
        if f"table {family} {name}" in there.splitlines() and owner not in known:
            raise SpecError(
                f"table {family} {name} exists in the root namespace and is not netslot's",
                file=file.name if file else None,
                hint="give your own tables a name that nobody else uses",
            )
    fresh = "".join(f"add table {family} {name}\ndelete table {family} {name}\n" for family, name in tables)
    # The operator's text comes first in the file, so that line numbers in errors are theirs.
    _run(["nft", "-c", "-f", "-"], text, file.name if file else None)
    _run(["nft", "-f", "-"], fresh + text + root_text.nft_preset(spec), None)
    return owners


# --- iptables ----------------------------------------------------------------------------------------


def _apply_iptables(variant: str, ipv6: bool, tables: Sequence[Chains], file: object) -> list[str]:
    tool = f"{'ip6tables' if ipv6 else 'iptables'}-{variant}"
    owners = []
    text: list[str] = []
    for each in tables:
        there = _save(tool, each.table)
        text.append(f"*{each.table}")
        text += [f":{name} - [0:0]" for name in each.rules]
        text += [f"-A {name} {rule}" for name, rules in each.rules.items() for rule in rules]
        jumps = {line.split()[1] for line in there if _is_jump(line)}
        text += [f"-I {built_in} 1 -j {name}" for built_in, name in each.jumps if built_in not in jumps]
        text.append("COMMIT")
        own = ",".join(name for name in each.rules if not name.startswith(f"{CHAIN}-"))
        owners.append(f"{tool} {each.table} {own}".rstrip())
    name = getattr(file, "name", None)
    _run([_restore(tool), "--noflush"], "\n".join([*text, ""]), name)
    return owners


def _rules(rules: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for chain, rule in rules:
        found.setdefault(f"{CHAIN}-{chain}", []).append(rule)
    return found


def _drops_forward(variant: str) -> bool:
    """Whether another program, as Docker does, has set this variant's FORWARD chain to drop by default."""
    if variant == "legacy":
        try:
            with open("/proc/thread-self/net/ip_tables_names", encoding="ascii") as names:
                if "filter" not in names.read().split():
                    return False  # looking with the tool would make the table
        except FileNotFoundError:
            return False
    try:
        return any(line.startswith(":FORWARD DROP") for line in _save(f"iptables-{variant}", "filter"))
    except HostError:
        return False  # the tool is not there, so nobody set anything with it


def _save(tool: str, table: str) -> list[str]:
    return _run([f"{tool}-save", "-t", table], "", None).splitlines()


def _restore(tool: str) -> str:
    return f"{tool}-restore"


def _is_jump(line: str) -> bool:
    return bool(re.fullmatch(rf"-A [A-Z]+ -j {CHAIN}-[A-Z]+", line))


# --- both --------------------------------------------------------------------------------------------


def _read(owner: str) -> list[str]:
    """What the kernel holds of one owner's rules, as the tool prints it, without counters."""
    tool, *rest = owner.split()
    if tool == "nft":
        try:
            return _run(["nft", "-s", "-nn", "list", "table", *rest], "", None).splitlines()
        except SpecError:
            return []  # the table is gone
    own = set(rest[1].split(",")) if len(rest) > 1 else set()
    mine = []
    for line in _save(tool, rest[0]):
        words = line.split()
        if line.startswith(":") and (words[0][1:] in own or words[0].startswith(f":{CHAIN}-")):
            mine.append(f"{words[0]} {words[1]}")
        elif line.startswith("-A") and (words[1] in own or words[1].startswith(f"{CHAIN}-") or _is_jump(line)):
            mine.append(line)
    return mine


def _count(lines: Sequence[str]) -> int:
    """How many rules there are in what :func:`_read` returned."""
    if any(line.startswith("table ") for line in lines):
        depth_two = [line for line in lines if line.startswith("\t\t") and not line.startswith("\t\ttype ")]
        return sum(1 for line in depth_two if line.strip() not in ("}", ""))
    return sum(1 for line in lines if line.startswith("-A "))


def _run(command: Sequence[str], text: str, file: str | None) -> str:
    """Run a tool in the calling thread's namespace; SpecError when it refuses what it was given."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except FileNotFoundError as error:
        package = _PACKAGES.get(command[0], "iptables")
        raise HostError(f"{command[0]} is not installed", hint=f"apt-get install {package}") from error
    except subprocess.TimeoutExpired as error:
        raise NetslotError(f"{' '.join(command)} did not end within {_TIMEOUT} s") from error
    if done.returncode:
        message = done.stderr.strip().splitlines()
        raise SpecError(f"{' '.join(command)}: {message[0] if message else done.returncode}", file=file)
    return done.stdout
