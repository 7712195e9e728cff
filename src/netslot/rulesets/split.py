"""Split a host's ruleset: a static root ruleset, a template per class of tenants, the tenants' values, a report.

    result = split(dump, tenants)
    result.files                  name -> text, what ``netslot split --out DIR`` writes
    result.refused                what could not be carried over, by name and with the reason

Nothing is dropped: a rule is moved, merged, mapped, stays, or is refused. A result with refusals has files too,
but they are not the host's ruleset; the caller must say so (exit status 3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from netslot.rulesets.ipsets import SETS, write_sets
from netslot.rulesets.model import Dump, Family
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import HOST, MANIFEST, ROOT, with_hosts
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.proof.members import Portraits
from netslot.rulesets.proof.places import Places, survey
from netslot.rulesets.proof.tagged import FiledRuleset
from netslot.rulesets.published import PUBLISH, write_published
from netslot.rulesets.splitting.counts import Counting, find_counting, never_both
from netslot.rulesets.splitting.lengths import longest, longest_after
from netslot.rulesets.splitting.naming import Naming, name_links
from netslot.rulesets.splitting.ordering import Ordering, find_ordering
from netslot.rulesets.splitting.plan import FATES, CannotSplit, Plan
from netslot.rulesets.splitting.rooting import FROM, RootWriter
from netslot.rulesets.splitting.sets import SetsWriter
from netslot.rulesets.splitting.slots import EARLY, Matches, SlotWriter
from netslot.rulesets.splitting.spec_file import add_spec
from netslot.rulesets.tenants import Tenant
from netslot.rulesets.write import write
from netslot.spec.render import render

UPLINK_IF = "up0"
BEFORE: Mapping[Family, str] = {4: "before.rules", 6: "before.rules6"}
"""The rules that were split, so that ``migrate`` can tell whether the host still has them."""

Method = Literal["slots", "sets"]
_MANY_CLASSES = 64
_GUEST_IF = {"tap": "tap0", "veth": "inner0", "process": ""}


@dataclass(frozen=True)
class Split:
    """``report``: the machine's answer, as ``--json`` prints it."""

    files: dict[str, str]
    report: dict[str, object]
    refused: list[str]
    notes: list[str]
    places: Places


def split(
    dump: Dump,
    tenants: Sequence[Tenant],
    *,
    attachment: Attachment = "tap",
    host_addresses: Sequence[tuple[Family, int]] = (),
    inward: Literal["slot", "root"] = "slot",
    method: Method | None = None,
) -> Split:
    """Split the dump among these tenants. ``host_addresses``: what the host is called, beside what rules say.

    ``method``: ``slots`` moves tenants' rules into slots; ``sets`` leaves them in root, as rules that name nobody
    with sets of addresses. By itself the first where every tenant has a link of its own, else the second.

    ``inward``: who decides about packets to a tenant. With ``slot`` a packet between two tenants has to be let
    pass by both slots; where one tenant's accept was enough before, only ``root`` keeps that.
    """
    places = survey(dump, tenants, host_addresses)
    plan = Plan()
    for why in dict.fromkeys(why for _, why in places.left_out):
        names = [name for name, reason in places.left_out if reason == why]
        plan.notes[f"{_some(names)}: {why}, so what concerns them stays as it is (--tenants FILE says more)"] = None
    if not places.tenants:
        why = "has a link and an address of its own" if places.left_out else "was found in the dump"
        plan.refusals.append(f"no tenant {why}; name them with --tenants FILE")
    without = [tenant.name for tenant in places.tenants if not tenant.interfaces]
    if method == "slots" and without:
        plan.refusals.append(
            f"{_some(without)}: no link of its own is known (a bridge's port is none). Tenants behind one bridge "
            "reach each other past root's rules; each needs a link of its own (name it with --tenants FILE)"
        )
    if plan.refusals:
        return Split({}, _report(dump, places, plan, [], 0, 0), plan.refusals, list(plan.notes), places)
    if without and method is None:
        why = "no link of its own is known (a bridge's port is none)"
        plan.notes[f"{_some(without)}: {why}, so rules stay in root, with sets"] = None
    by_sets = bool(without) or method == "sets"
    return _Splitter(dump, places, plan, attachment, inward == "root").run(by_sets)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{len(names)} tenant{'s' * (len(names) > 1)} ({shown}{', ...' if len(names) > 4 else ''})"


class _Splitter:
    def __init__(self, dump: Dump, places: Places, plan: Plan, attachment: Attachment, inward_here: bool) -> None:
        self._inward_here = inward_here
        self._dump, self._places, self._plan, self._attachment = dump, places, plan, attachment
        self._naming: Naming = name_links(places)
        self._filed = {r.family: FiledRuleset(r, places) for r in dump.rulesets}
        portraits = Portraits(places)
        for family, filed in self._filed.items():
            portraits.add(family, filed)
        self._kinds = portraits.classes()
        self._files: dict[str, str] = {}
        self._slot_sizes: list[int] = []
        self._after = 0
        self._walk_after = 0
        self._ordering: Ordering | None = None

    def run(self, by_sets: bool) -> Split:
        first: dict[int, int] = {}
        for tenant, kind in enumerate(self._kinds):
            first.setdefault(kind, tenant)
        in_order = {} if by_sets else self._find_order()
        for family in self._filed:
            if by_sets:
                self._with_sets(family)
            else:
                self._one_family(family, first, in_order[family])
            if family in self._places.guessed and not by_sets:
                note = (
                    f"no rule names an IPv{family} address of the host, and slots must know them: templates hold "
                    f"{HOST[family]} for them (--host-address says what they are)"
                )
                self._plan.notes[note] = None
        if len(first) > _MANY_CLASSES:
            self._plan.notes[
                f"tenants are of {len(first)} kinds: their rules differ in more than names, addresses and marks (a "
                "log prefix, a set, a count with a name?). There is a template for each, and a proof for each pair"
            ] = None
        self._files[MANIFEST] = self._manifest({} if by_sets else first)
        self._files |= add_spec(self._files, self._dump, self._places, self._plan)
        refused = [f"{e.table} {e.chain}: {e.rule.text}: {e.why}" for e in self._plan.of("refused")]
        refused += self._plan.refusals
        report = _report(self._dump, self._places, self._plan, self._slot_sizes, self._after, self._walk_after)
        report["classes"] = len(first)
        report["refused"] = refused
        self._files["report.json"] = "[\n" + ",\n".join(map(json.dumps, self._account())) + "\n]\n"
        return Split(self._files, report, refused, list(self._plan.notes), self._places)

    def _find_order(self) -> dict[Family, bool]:
        """For each family whether it matters between two tenants whose rules stand first; links are numbered then."""
        matters = {family: self._order_matters(filed) for family, filed in self._filed.items()}
        if any(matters.values()):
            asked = [filed for family, filed in self._filed.items() if matters[family]]
            self._ordering = find_ordering(asked, len(self._places.tenants))
            if self._ordering is not None:
                self._naming = replace(self._naming, numbers=self._ordering.numbers)
        return matters

    def _one_family(self, family: Family, first: dict[int, int], in_order: bool) -> None:
        filed = self._filed[family]
        writers, counting = self._write_slots(filed, first, in_order)
        undecided: dict[Matches, None] = {}
        early = frozenset(table for table in EARLY if self._take_drops(table, writers))
        for writer in writers.values():
            undecided |= writer.undecided
        checked = {kind: writer.checked for kind, writer in writers.items()}
        inward_here = self._inward(list(writers.values()), all(checked.values()))
        for kind, writer in writers.items():
            text = writer.render()
            self._files[f"class{kind}.rules{'' if family == 4 else '6'}"] = text
            self._slot_sizes.append(sum(line.startswith("-A") for line in text.splitlines()))
        slot_walk = max(
            (longest(parse(text, family=family).rulesets[0]) for text in self._templates(family, first)), default=0
        )
        passing = max((writer.passing for writer in writers.values()), default=0)
        root = RootWriter(
            filed,
            self._naming,
            self._plan,
            self._kinds,
            undecided,
            lambda tenant: not checked[self._kinds[tenant]],
            early,
            inward_here,
            self._attachment != "process",
        )
        root.counted = frozenset((kind, what) for kind, writer in writers.items() for what in writer.counted)
        root.moved = frozenset((kind, what) for kind, writer in writers.items() for what in writer.moved)
        root.in_order, root.ordering, root.counting = in_order, self._ordering, counting
        self._keep(family, root, slot_walk, passing)

    def _write_slots(
        self, filed: FiledRuleset, first: dict[int, int], in_order: bool
    ) -> tuple[dict[int, SlotWriter], Counting | None]:
        """The slots' chains by class. Tried again while a count that moved sees less in slots than in root."""
        counting = find_counting(filed, self._places)
        while True:
            writers = {
                kind: SlotWriter(filed, self._naming, self._plan, tenant, self._attachment, in_order, counting)
                for kind, tenant in first.items()
            }
            alone = all(writer.checks_sources() for writer in writers.values())
            for writer in writers.values():
                writer.alone = alone
                writer.forward()
            if counting is None:
                return writers, None
            undecided = [region for writer in writers.values() for region in writer.undecided]
            missed = {
                what
                for writer in writers.values()
                for what, met in writer.moved.items()
                if what in writer.counted
                or not all(never_both(packets, region) for packets in met for region in undecided)
            }
            narrowed = replace(
                counting, kept=counting.kept | missed, first_only=counting.first_only or bool(undecided)
            )
            if narrowed == counting and any(writer.moved for writer in writers.values()):
                return writers, counting
            counting = narrowed if narrowed != counting else None

    def _order_matters(self, filed: FiledRuleset) -> bool:
        try:
            from netslot.rulesets.proof.whose_first import order_matters
        except ModuleNotFoundError:
            return False  # without z3 nobody can tell here, and the proof will
        return order_matters(filed, self._places, self._kinds)

    def _with_sets(self, family: Family) -> None:
        root = SetsWriter(self._filed[family], self._places, self._plan)
        self._keep(family, root, 0, 0)

    def _keep(self, family: Family, root: RootWriter | SetsWriter, slot_walk: int, passing: int) -> None:
        """The files of root, and what they come to."""
        text = root.write()
        self._files[ROOT[family]] = text
        if root.set_rules.sets:
            self._files[SETS[family]] = write_sets(root.set_rules.sets)
        self._files[BEFORE[family]] = write(self._filed[family].ruleset)
        self._after += sum(line.startswith("-A") for line in text.splitlines())
        published = root.maps.published
        if published.rules:
            self._files[PUBLISH[family]] = write_published(published, family)
            self._after += self._files[PUBLISH[family]].count(" map @")
        walk = longest_after(parse(text, family=family).rulesets[0], FROM, slot_walk, passing)
        self._walk_after = max(self._walk_after, walk)

    def _templates(self, family: Family, first: dict[int, int]) -> list[str]:
        """Each class's template as its representative's slot holds it."""
        suffix = "" if family == 4 else "6"
        names = {"guest_if": _GUEST_IF[self._attachment] or "x0", "uplink_if": UPLINK_IF}
        return [
            render(
                with_hosts(self._files[f"class{kind}.rules{suffix}"], self._places.hosts[family], family),
                names | self._naming.variables(tenant),
                file="template",
            )
            for kind, tenant in first.items()
        ]

    def _inward(self, writers: list[SlotWriter], checked: bool) -> bool:
        """Whether root decides about packets from outside to tenants too, because slots cannot."""
        why = next((text for writer in writers for _, _, text in writer.refusals), "")
        if not why and not checked:
            why = "tenants may send under any address, so a slot cannot tell what came from outside"
        if self._inward_here:
            why = "as asked"
        if why:
            for writer in writers:
                writer.leave_inward_to_root()
            self._plan.notes[f"packets to tenants are decided in root, merged by class: {why}"] = None
        return bool(why)

    def _take_drops(self, table: str, writers: dict[int, SlotWriter]) -> bool:
        """Tenants' drops before routing go into the slots if those of all classes can."""
        try:
            lines = {kind: writer.drops(table) for kind, writer in writers.items()}
        except CannotSplit:
            for writer in writers.values():
                writer.checked = False
            return False
        for kind, writer in writers.items():
            setattr(writer.rules, table, lines[kind])
        return any(lines.values())

    def _manifest(self, first: dict[int, int]) -> str:
        classes = {
            f"class{kind}": {
                "ipv4": f"class{kind}.rules" if 4 in self._filed else None,
                "ipv6": f"class{kind}.rules6" if 6 in self._filed else None,
            }
            for kind in first
        }
        grouped = bool(first) and (
            not self._naming.stem
            or any("--src-group" in text or "--dst-group" in text for text in self._files.values())
        )
        tenants = [
            {
                "name": tenant.name,
                "class": f"class{self._kinds[index]}" if first else None,
                "link": self._places.link(index),
                "group": self._naming.group(self._kinds[index], index) if grouped else 0,
                "netns": tenant.netns,
                "variables": self._naming.variables(index),
            }
            for index, tenant in enumerate(self._places.tenants)
        ]
        manifest = {
            "attachment": self._attachment,
            "guest_interface": _GUEST_IF[self._attachment],
            "uplink_interface": UPLINK_IF,
            "classes": classes,
            "tenants": tenants,
        }
        return json.dumps(manifest, indent=1) + "\n"

    def _account(self) -> list[dict[str, object]]:
        """Every rule of the dump, in its order: where it went, and why."""
        found = []
        for ruleset in self._dump.rulesets:
            for table, chain, rule in ruleset.rules():
                entry = self._plan.entries.get(rule)
                fate, to, why = (entry.fate, entry.to, entry.why) if entry else ("refused", "", "nothing was decided")
                if entry is None:
                    self._plan.refusals.append(
                        f"{table.name} {chain.name}: {rule.text}: nothing was decided about it"
                    )
                found.append(
                    {
                        "family": ruleset.family,
                        "line": rule.line,
                        "table": table.name,
                        "chain": chain.name,
                        "rule": rule.text,
                        "fate": fate,
                        "to": to,
                        "why": why,
                    }
                )
        return found


def _report(
    dump: Dump,
    places: Places,
    plan: Plan,
    slot_sizes: list[int],
    after: int,
    walk_after: int,
) -> dict[str, object]:
    counts = {fate: len(plan.of(fate)) for fate in FATES}
    stayed = [
        {"table": entry.table, "chain": entry.chain, "rule": entry.rule.text, "reason": entry.why}
        for entry in plan.of("stayed")
    ]
    slot = max(slot_sizes, default=0)
    return {
        "root_rules_before": dump.rule_count(),
        "root_rules_after": after,
        "slot_rules_max": slot,
        "longest_walk_before": max(map(longest, dump.rulesets)),
        "longest_walk_after": walk_after,
        "tenants": len(places.tenants),
        "classes": 0,
        "moved": counts["moved"],
        "merged": counts["merged"] + counts["mapped"],
        "stayed": stayed,
        "refused": list(plan.refusals),
    }
