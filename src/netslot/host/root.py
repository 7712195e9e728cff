"""The root namespace's rules: put in place by ``up``, compared by ``verify``, taken away by ``down``.

netslot owns its tables (nftables) or its chains and the jumps to them (iptables), and touches nothing else.
All functions run on a worker thread that is in the root namespace. The operator's tool is run here, once per
ruleset, never per slot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from netslot.errors import HostError, SpecError
from netslot.host import root_given, root_text
from netslot.host.root_text import BUILT_IN, Chains
from netslot.host.root_tools import nft_places, restore, run, save
from netslot.policy.base import Difference
from netslot.spec.model import HostSpec
from netslot.spec.render import render


@dataclass(frozen=True)
class Snapshot:
    """What netslot put into the root namespace.

    An owner is a table, as in ``nft inet netslot-slot`` and ``iptables-legacy filter``.
    """

    parts: dict[str, list[str]]
    """Rules by owner, as the tools print them."""
    chains: dict[str, list[str]] = field(default_factory=dict)
    """netslot's own chains, by iptables table."""
    made: list[str] = field(default_factory=list)
    """Tables and base chains, as nft names them, that were not there before iptables-nft made them for netslot."""
    digest: str = ""
    """Of the text that was loaded."""
    rules: int = 0

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        return cls(**json.loads(text))


_NOTHING = Snapshot({})


@dataclass(frozen=True)
class _Job:
    """One run of a tool, which replaces what netslot owns of it in one transaction."""

    tool: str
    owners: dict[str, list[str]]
    """Chains by owner; an nftables table is owned whole, so it lists none."""
    text: str
    file: str | None

    def run(self, *, test: bool) -> None:
        """SpecError when the tool refuses the text; then nothing was changed."""
        if self.tool == "nft":
            run(["nft", *(["-c"] if test else []), "-f", "-"], self.text, self.file)
        else:
            restore(self.tool, self.text, file=self.file, test=test)


def apply(spec: HostSpec, before: Snapshot | None, note: Callable[[Snapshot], None]) -> Snapshot:
    """Put the static ruleset in place; what ``before`` had and it lacks goes. Nothing happens when all is right.

    ``note`` is called with what will be netslot's before the first change, so that whatever happens next can be
    removed. SpecError when a tool refuses the operator's additions, or when they would take over a table or chain
    that is somebody else's: then nothing was changed.
    """
    before = before or _NOTHING
    if not spec.root.preset:
        remove(before)
        return Snapshot({}, rules=root_given.count(spec))
    families = _families(spec)
    nft_text = _nft_text(spec) if spec.root.backend == "nftables" else ""
    digest = hashlib.sha256(repr((nft_text, families)).encode()).hexdigest()[:16]
    if before.digest == digest and not differences(before):
        return before
    jobs = [_nft_job(spec, nft_text, before)] if nft_text else []
    jobs += [_iptables_job(spec, family, before) for family in families]
    for job in jobs:
        job.run(test=True)
    owners = {owner: chains for job in jobs for owner, chains in job.owners.items()}
    made = _to_be_made(jobs, before)
    parts = {**before.parts, **{owner: before.parts.get(owner, []) for owner in owners}}
    chains = {owner: sorted({*before.chains.get(owner, []), *owners.get(owner, [])}) for owner in parts}
    note(replace(before, parts=parts, chains=chains, made=made, digest=""))
    for job in jobs:
        job.run(test=False)
    _remove([owner for owner in before.parts if owner not in owners], before)
    parts = {owner: _read(owner, chains) for owner, chains in owners.items()}
    return Snapshot(parts, owners, made, digest, sum(_count(lines) for lines in parts.values()))


def differences(snapshot: Snapshot) -> list[Difference]:
    """What of netslot's rules in the root namespace is not as ``apply`` left it."""
    found = []
    for owner, wanted in snapshot.parts.items():
        actual = _read(owner, snapshot.chains.get(owner, []))
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
    """Take netslot's rules away, and what iptables-nft made for them; absence is success."""
    _remove(snapshot.parts, snapshot)
    for kind, depth in (("chain", 2), ("table", 1)):
        there = nft_places()
        for place in snapshot.made:
            if place.count(" ") == depth and place in there and _is_bare(place, there):
                run(["nft", "delete", kind, *place.split()])


def _is_bare(place: str, there: Iterable[str]) -> bool:
    """Whether a base chain accepts and holds no rule, or a table holds no chain any more."""
    family, table, *chain = place.split()
    if not chain:
        return not any(other.startswith(f"{place} ") for other in there)
    lines = save("ip6tables-nft" if family == "ip6" else "iptables-nft", table)
    policies = {line.partition(" [")[0] for line in lines}
    return f":{chain[0]} ACCEPT" in policies and not any(line.startswith(f"-A {chain[0]} ") for line in lines)


def _remove(owners: Iterable[str], snapshot: Snapshot) -> None:
    for owner in owners:
        tool, *rest = owner.split()
        if tool == "nft":
            run(["nft", "-f", "-"], f"add table {' '.join(rest)}; delete table {' '.join(rest)}\n")
            continue
        if lines := _removal(save(tool, rest[0]), snapshot.chains.get(owner, [])):
            restore(tool, "\n".join([f"*{rest[0]}", *lines, "COMMIT", ""]))


def _removal(there: Sequence[str], chains: Iterable[str]) -> list[str]:
    """The lines that take ``chains`` out of a saved table, with the jumps to them from anywhere."""
    names = {line.split()[0][1:] for line in there if line.startswith(":")} & set(chains)
    jumps = [line for line in there if line.startswith("-A ") and _jumped_to(line) in names]
    from_outside = [line for line in jumps if line.split()[1] not in names]
    ordered = sorted(names)
    return [
        *(line.replace("-A ", "-D ", 1) for line in from_outside),
        *(f"-F {name}" for name in ordered),
        *(f"-X {name}" for name in ordered),
    ]


def _jumped_to(line: str) -> str:
    words = line.split()
    return next((words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-j", "-g")), "")


# --- what is wanted ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """What one iptables program is to hold, and the operator's file that it comes from."""

    tool: str
    tables: list[Chains]
    file: str | None


def _families(spec: HostSpec) -> list[_Family]:
    """netslot's iptables rules: all of them with that backend, otherwise what gets past a policy of drop."""
    found: list[_Family] = []
    programs = ["iptables"] + (["ip6tables"] if spec.ipv6 else [])
    others = ["legacy", "nft"]
    if spec.root.backend != "nftables":
        variant = spec.root.backend.removeprefix("iptables-")
        others.remove(variant)
        for program, file in (("iptables", spec.root.rules.ipv4), ("ip6tables", spec.root.rules.ipv6)):
            if program in programs or file is not None:
                tables = root_text.iptables(spec, ipv6=program == "ip6tables")
                found.append(_Family(f"{program}-{variant}", tables, file.name if file is not None else None))
    tools = [f"{program}-{variant}" for program in programs for variant in others]
    return found + [_Family(tool, [root_text.forward_only(spec)], None) for tool in tools if _drops_forward(tool)]


def _drops_forward(tool: str) -> bool:
    """Whether another program, as Docker does, has set this tool's FORWARD chain to drop by default."""
    if tool.endswith("-legacy"):
        names = "ip6_tables_names" if tool.startswith("ip6") else "ip_tables_names"
        try:
            with open(f"/proc/thread-self/net/{names}", encoding="ascii") as file:
                if "filter" not in file.read().split():
                    return False  # looking with the tool would make the table
        except FileNotFoundError:
            return False
    elif f"{_nft_family(tool)} filter" not in nft_places():
        return False
    try:
        return any(line.startswith(":FORWARD DROP") for line in save(tool, "filter"))
    except HostError:
        return False  # the tool is not there, so nobody set anything with it


def _nft_family(tool: str) -> str:
    return "ip6" if tool.startswith("ip6") else "ip"


def _nft_text(spec: HostSpec) -> str:
    file = spec.root.rules.nft
    text = render(file.text, spec.root_values(), file=file.name) if file is not None else ""
    return f"{text}\n{root_text.nft_preset(spec)}"


def _nft_job(spec: HostSpec, text: str, before: Snapshot) -> _Job:
    file = spec.root.rules.nft
    name = file.name if file is not None else None
    own = ("inet", root_text.table(spec))
    tables = list(dict.fromkeys([*root_text.nft_tables(text), own]))
    there = nft_places()
    for family, table in tables:
        if f"{family} {table}" in there and f"nft {family} {table}" not in before.parts and (family, table) != own:
            raise _taken(f"table {family} {table}", name, "give your own tables a name that nobody else uses")
    # On the text's first line, so that line numbers in errors are those of the operator's file.
    fresh = "".join(f"add table {family} {table}; delete table {family} {table}; " for family, table in tables)
    return _Job("nft", {f"nft {family} {table}": [] for family, table in tables}, fresh + text, name)


def _iptables_job(spec: HostSpec, family: _Family, before: Snapshot) -> _Job:
    text: list[str] = []
    owners = {}
    for each in family.tables:
        owner = f"{family.tool} {each.table}"
        there = save(family.tool, each.table)
        names = {line.split()[0][1:] for line in there if line.startswith(":")}
        known = before.chains.get(owner, [])
        own = {name for _, name in each.jumps}
        for name in each.rules:
            if name in names and name not in known and name not in own:
                what = f"chain {name} of {family.tool}'s table {each.table}"
                raise _taken(what, family.file, "give your own chains names that nobody else uses")
        text.append(f"*{each.table}")
        text += _removal(there, [name for name in known if name not in each.rules])
        text += [f":{name} - [0:0]" for name in each.rules]
        text += [f"-A {name} {rule}" for name, rules in each.rules.items() for rule in rules]
        text += [f"-I {at} 1 -j {name}" for at, name in each.jumps if f"-A {at} -j {name}" not in there]
        text.append("COMMIT")
        owners[owner] = list(each.rules)
    return _Job(family.tool, owners, "\n".join([*text, ""]), family.file)


def _taken(what: str, file: str | None, hint: str) -> SpecError:
    return SpecError(f"{what} exists in the root namespace and is not netslot's", file=file, hint=hint)


def _to_be_made(jobs: Sequence[_Job], before: Snapshot) -> list[str]:
    """Tables and base chains that iptables-nft makes by itself when it is used, and that are not there yet."""
    there = nft_places()
    made = list(before.made)
    for job in jobs:
        for owner in job.owners:
            tool, table = owner.split()[:2]
            if tool.endswith("-nft"):
                place = f"{_nft_family(tool)} {table}"
                made += [each for each in (place, *(f"{place} {name}" for name in BUILT_IN)) if each not in there]
    return sorted(set(made))


# --- what is there -----------------------------------------------------------------------------------


def _read(owner: str, chains: Iterable[str]) -> list[str]:
    """What the kernel holds of one owner's rules, as the tool prints it, without counters."""
    tool, *rest = owner.split()
    if tool == "nft":
        try:
            return run(["nft", "-s", "-nn", "list", "table", *rest]).splitlines()
        except SpecError:
            return []  # the table is gone
    own = set(chains)
    mine = []
    for line in save(tool, rest[0]):
        words = line.split()
        if line.startswith(":") and words[0][1:] in own:
            mine.append(f"{words[0]} {words[1]}")
        elif line.startswith("-A") and (words[1] in own or (len(words) == 4 and _jumped_to(line) in own)):
            mine.append(line)
    return mine


def _count(lines: Sequence[str]) -> int:
    """How many rules there are in what :func:`_read` returned."""
    if any(line.startswith("table ") for line in lines):
        depth_two = [line for line in lines if line.startswith("\t\t") and not line.startswith("\t\ttype ")]
        return sum(1 for line in depth_two if line.strip() not in ("}", ""))
    return sum(1 for line in lines if line.startswith("-A "))
