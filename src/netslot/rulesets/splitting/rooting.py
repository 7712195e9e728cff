"""The root ruleset that remains: common rules as they were, tenants' rules merged, and the doors to the slots.

Slots decide about packets between their tenants and the outside. Root decides about all others: those for the host,
those between tenants, and those that a rule with a memory of all tenants may decide. For these root's chains say what
they said, in the same order, with tenants' rules merged. Two doors at the head of FORWARD take what slots decide past
all that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.ipsets import Part
from netslot.rulesets.model import Chain, Family, Rule
from netslot.rulesets.proof.comparing import comparison
from netslot.rulesets.proof.places import NOBODY
from netslot.rulesets.proof.standing import Side, side_of
from netslot.rulesets.proof.tagged import Filed, FiledRuleset
from netslot.rulesets.splitting.counts import Counting, is_count, what_counts
from netslot.rulesets.splitting.merging import General, Generaliser, Text, merged, plain
from netslot.rulesets.splitting.naming import Naming
from netslot.rulesets.splitting.ordering import BITS, Ordering
from netslot.rulesets.splitting.plan import CannotSplit, Plan
from netslot.rulesets.splitting.publishing import Maps, rewritten
from netslot.rulesets.splitting.sets import SetRules
from netslot.rulesets.splitting.slots import Matches, is_slots_own
from netslot.rulesets.write import rule_text

FROM = "netslot-from"


class RootWriter:
    """Writes one family's root ruleset. ``kinds[tenant]`` is its class; ``first[class]`` its representative."""

    def __init__(
        self,
        filed: FiledRuleset,
        naming: Naming,
        plan: Plan,
        kinds: list[int],
        undecided: Iterable[Matches],
        spoofing: Callable[[int], bool],
        early: frozenset[str],
        inward_here: bool,
        frames: bool,
    ) -> None:
        self._filed, self._naming, self._plan, self._kinds = filed, naming, plan, kinds
        self._family: Family = filed.ruleset.family
        self._general = Generaliser(filed, naming, spoofing)
        self._undecided = list(undecided)  # regions that slots leave to root
        self._early = early  # tables whose tenants' drops before routing went into the slots
        self._inward_here = inward_here  # root, not the slot, decides about packets from outside to a tenant
        self._frames = frames  # those that come from slots are not the guests'
        self._first = {kind: tenant for tenant, kind in reversed(list(enumerate(kinds)))}
        self._class_chains: dict[str, list[str]] = {}
        self._kept: set[Rule] = set()  # rules that slots decide by, and that stand in root as they were
        self.in_order = False  # it matters between two tenants whose rules of FORWARD stand first
        self.ordering: Ordering | None = None
        self.counting: Counting | None = None
        self.counted: frozenset[tuple[int, Hashable]] = frozenset()  # by class: counts of one tenant's, kept here
        self.moved: frozenset[tuple[int, Hashable]] = frozenset()  # and those that slots keep
        self.set_rules = SetRules(naming.places, self._family)
        self.maps = Maps(naming.places, self._family, plan)

    def write(self) -> str:
        """The text for iptables-restore."""
        lines: list[str] = []
        for table in self._filed.ruleset.tables.values():
            self._class_chains = {}
            bodies = {chain.name: self._chain(table.name, chain) for chain in table.chains.values()}
            gone = {name for name in bodies if self._gone(table.name, name)}
            lines.append(f"*{table.name}")
            if table.name == "filter" and "FORWARD" in bodies:
                bodies[FROM] = [self._text(one) for one in self._from()]
            bodies |= self._class_chains
            everybody = range(len(self._kinds))
            for name, rules in self._general.chains(table.name).items():
                whole = [text for rule in rules for text in plain(rule, self._naming, everybody, self._own_set)]
                bodies[name] = [self._text(text) for text in whole]
            for name in bodies:
                chain = table.chains.get(name)
                policy = chain.policy if chain is not None else None
                if name not in gone:
                    lines.append(f":{name} {policy or '-'} [0:0]")
            for name, rules_of in bodies.items():
                if name not in gone:
                    lines += [f"-A {name} {text}" if text else f"-A {name}" for text in rules_of]
            lines.append("COMMIT")
        return "\n".join(lines) + "\n"

    def _gone(self, table: str, name: str) -> bool:
        """A tenant's own chain that no remaining rule leads to."""
        if (table, name) not in self._filed.chain_owner:
            return False
        return not self._stays_called(table, name)

    @cached_property
    def _callers(self) -> dict[tuple[str, str], list[tuple[str, Filed]]]:
        """For each chain the rules that lead there, each with its chain."""
        found: dict[tuple[str, str], list[tuple[str, Filed]]] = {}
        for (table, chain), items in self._filed.chains.items():
            for item in items:
                if isinstance(item.rule.target, t.Jump | t.Goto):
                    found.setdefault((table, item.rule.target.chain), []).append((chain, item))
        return found

    def _chain(self, table: str, chain: Chain) -> list[str]:
        items = self._filed.chains[table, chain.name]
        owner = self._filed.chain_owner.get((table, chain.name), NOBODY)
        if owner != NOBODY:
            return self._own_chain(table, chain.name, items)
        if table == "nat":
            self.maps.take(chain.name, items)
        body = self._doors() if (table, chain.name) == ("filter", "FORWARD") else []
        pending: list[Filed] = []
        for item in items:
            if item.tags:
                pending.append(item)
                continue
            body += self._segment(table, chain.name, pending)
            pending = []
            body.append(item.rule.text)
            self._stay(table, chain.name, item.rule)
        return body + self._segment(table, chain.name, pending)

    def _own_chain(self, table: str, chain: str, items: list[Filed]) -> list[str]:
        forwarding = table == "filter" and self._only_forward(chain)
        for item in items:
            if forwarding and self._kept:
                self._keep(table, chain, item.rule)
            elif self._stays_called(table, chain):
                why = "its chain is called from root"
                self._plan.settle(self._family, table, chain, item.rule, "stayed", "root", why)
            elif forwarding:
                self._move(table, chain, item.rule)
            else:
                why = "tenants' chains that say the same are one chain"
                self._plan.settle(self._family, table, chain, item.rule, "merged", "root", why)
        return [item.rule.text for item in items]

    def _stays_called(self, table: str, chain: str) -> bool:
        """Whether a rule that stays in root leads to this chain. Callers are settled first: built-in chains lead."""
        return any(
            self._plan.fate(item.rule) == "stayed" or item.rule in self._kept
            for _, item in self._callers.get((table, chain), ())
        )

    def _stay(self, table: str, chain: str, rule: Rule) -> None:
        why = "it names no tenant"
        if any(isinstance(x, m.Opaque) and x.stateful for x in rule.matches):
            why = "it keeps a count that all tenants share"
        elif table == "nat":
            why = "it translates addresses that live in root"
        elif isinstance(rule.target, t.SetMark):
            why = "it sets a mark that root's routing may read"
        self._plan.settle(self._family, table, chain, rule, "stayed", "root", why)

    def _move(self, table: str, chain: str, rule: Rule) -> None:
        why = "its slot decides by it; root keeps one copy for all tenants, for packets between them"
        self._plan.settle(self._family, table, chain, rule, "moved", f"slot {table}", why)

    def _keep(self, table: str, chain: str, rule: Rule) -> None:
        why = "its slot decides by it; root keeps it for packets between tenants, where its order matters"
        self._kept.add(rule)
        self._plan.settle(self._family, table, chain, rule, "moved", f"slot {table}, and root", why)

    def _segment(self, table: str, chain: str, pending: list[Filed]) -> list[str]:
        """Tenants' rules between two common ones: those that the slots repeat count as moved, others as merged."""
        left = [item for item in pending if self._plan.fate(item.rule) != "mapped"]
        early = table in self._early and chain == "PREROUTING"
        if early:
            for item in left:
                self._move(table, chain, item.rule)
            return []
        if not left:
            return []
        forwarding = table == "filter" and (chain == "FORWARD" or self._only_forward(chain))
        return self._merge(table, chain, left, forwarding)

    def _only_forward(self, chain: str) -> bool:
        """Whether FORWARD alone leads to this user chain."""
        if self._filed.policy("filter", chain) is not None:
            return False
        callers = {name for name, _ in self._callers.get(("filter", chain), ())}
        return all(name == "FORWARD" or self._only_forward(name) for name in callers)

    def _merge(self, table: str, chain: str, items: list[Filed], forwarding: bool) -> list[str]:
        """The rules merged by class, or with sets, or as they were; ``forwarding``: slots decide by them too."""
        if not items:
            return []
        try:
            if forwarding and self.in_order:
                general = self._in_their_order(table, chain, items)
            else:
                lists = self._by_class(table, chain, items, forwarding)
                general = self._merged({kind: tuple(rule for _, rule in rules) for kind, rules in lists.items()})
        except CannotSplit as reason:
            if not (forwarding and self.in_order):
                return self._one_by_one(table, chain, items, str(reason))
            for item in items:
                self._keep(table, chain, item.rule)
            self._plan.notes[
                f"root keeps tenants' rules of {chain} for packets between tenants, as they were: it matters whose "
                f"stand first, and {reason}"
            ] = None
            return [item.rule.text for item in items]
        for item in items:
            sides = {role for role, _ in item.tags}
            if self._plan.fate(item.rule) is not None:
                continue
            if forwarding and self._counts_in_slot(item):
                why = "its slot counts by it, for it leaves to root none of the packets that it is about"
                self._plan.settle(self._family, table, chain, item.rule, "moved", f"slot {table}", why)
            elif forwarding and ("in" in sides or ("out" in sides and not self._inward_here)):
                self._move(table, chain, item.rule)
            else:
                why = f"all tenants' rules of this kind say the same; {len(general)} rules say it once"
                self._plan.settle(self._family, table, chain, item.rule, "merged", "root", why)
        return [self._text(one) for one in general]

    def _one_by_one(self, table: str, chain: str, items: list[Filed], reason: str) -> list[str]:
        """With a set where rules differ in addresses only; what no set can say stays as it is."""
        texts: list[str] = []
        for text, members in self.set_rules.gather([(item.rule, item.tenant) for item in items]):
            for member in members:
                if text == member.text:
                    self._plan.settle(self._family, table, chain, member, "stayed", "root", reason)
                else:
                    why = "it differs from others in addresses and ports only; a set lists these"
                    self._plan.settle(self._family, table, chain, member, "merged", "root, with a set", why)
            texts.append(text)
        return texts

    def _in_their_order(self, table: str, chain: str, items: list[Filed]) -> list[Text]:
        """The sender's rules and the receiver's, merged, in the order in which each two tenants' stand."""
        place = self._family, chain, items[0].segment
        mode = self.ordering.modes.get(place, "in") if self.ordering is not None else "mixed"
        if mode == "mixed":
            raise CannotSplit("they stand in no order that all have")
        items = [item for item in items if not self._counts_in_slot(item)]
        beyond = next((item for item in items if self._only_slots_see(item)), None)
        if beyond is not None:
            raise CannotSplit(f"only a slot can ask it for all: {beyond.rule.text}")
        lists = self._by_class(table, chain, items, False)
        sent, got = (
            self._merged({kind: tuple(x for side, x in rules if side == wanted) for kind, rules in lists.items()})
            for wanted in ("in", "out")
        )
        if mode != "order":
            return [*sent, *got] if mode == "in" else [*got, *sent]
        senders = self._class_chain([*sent, *got], "sender")
        receivers = self._class_chain([*got, *sent], "receiver")
        compared: list[Text] = [
            (matches, t.Goto(senders if less else receivers)) for matches, less in comparison(0, BITS)
        ]
        here, there = self._naming.link("in"), self._naming.link("out")
        return [
            ((here, there), t.Jump(self._class_chain([*compared, ((), t.Goto(senders))], "order"))),
            ((self._naming.no_link("in"),), t.Jump(senders)),
            ((here, self._naming.no_link("out")), t.Jump(senders)),
        ]

    def _only_slots_see(self, item: Filed) -> bool:
        """Whether no rule of root's can ask it of packets that slots have sent on."""
        matches = item.rule.matches
        return any(map(is_count, matches)) or (self._frames and any(isinstance(x, m.Mac) for x in matches))

    def _by_class(
        self, table: str, chain: str, items: list[Filed], forwarding: bool
    ) -> dict[int, tuple[tuple[Side | None, General], ...]]:
        """What each class says here, and of which side; members of a class say the same."""
        by_tenant: dict[int, list[Filed]] = {}
        for item in items:
            if len({who for _, who in item.tags}) > 1:
                raise CannotSplit("it names two tenants")
            by_tenant.setdefault(item.tenant, []).append(item)
        members: dict[int, list[list[Filed]]] = {}
        for tenant, kind in enumerate(self._kinds):
            members.setdefault(kind, []).append(by_tenant.get(tenant, []))
        lists: dict[int, tuple[tuple[Side | None, General], ...]] = {}
        for kind, tenant in self._first.items():
            rows = zip(*members[kind], strict=True)  # members of a class say the same in the same order
            lists[kind] = tuple(
                (side_of(row[0]), self._row(table, chain, row, tenant))
                for row in rows
                if not (forwarding and self._slots_own(row[0]))
            )
        return lists

    def _merged(self, lists: Mapping[int, tuple[General, ...]]) -> list[Text]:
        return merged(lists, self._naming, self._kinds, self._class_chain, self._own_set)

    def _row(self, table: str, chain: str, row: tuple[Filed, ...], tenant: int) -> General:
        """One rule for all tenants of a class, whose first is ``tenant``; if there is none, theirs one by one."""
        try:
            counted, moved = (
                frozenset(what for kind, what in every if kind == self._kinds[tenant])
                for every in (self.counted, self.moved)
            )
            return self._general.rule(table, chain, row[0], tenant, counted, moved)
        except CannotSplit as reason:
            texts = self._one_by_one(table, chain, list(row), str(reason))
            return General(None, (), t.NoTarget(), tuple(texts))

    def _counts_in_slot(self, item: Filed) -> bool:
        if not self.moved or item.tenant == NOBODY:
            return False
        return (self._kinds[item.tenant], what_counts(item.rule)) in self.moved

    def _slots_own(self, item: Filed) -> bool:
        here = (self._kinds[item.tenant], what_counts(item.rule)) in self.counted
        return not here and is_slots_own(item, self._naming, self._family, self._frames)

    def _own_set(self, variable: str, with_link: bool, tenants: Iterable[int]) -> str:
        """The set of these tenants' addresses of that name, each with the tenant's link where it is asked for."""
        elements: list[tuple[Part, ...]] = []
        for tenant in tenants:
            link = self._naming.places.link(tenant)
            for pattern, name in self._naming.names(tenant, self._family).items():
                if name == variable:
                    elements.append((pattern, link) if with_link else (pattern,))
        return self.set_rules.set("hash:net,iface" if with_link else "hash:net", tuple(elements))

    def _class_chain(self, rules: list[Text], stem: str = "class") -> str:
        texts = [self._text(rule) for rule in rules]
        for name, known in self._class_chains.items():
            if known == texts:
                return name
        name = f"netslot-{stem}-{len(self._class_chains)}"
        self._class_chains[name] = texts
        return name

    def _doors(self) -> list[str]:
        """Past FORWARD's rules: what slots have let out, and what slots will decide."""
        texts = [self._text(((self._naming.link("in"),), t.Jump(FROM)))]
        pool = self._naming.pool(self._family)
        if not self._inward_here and pool is not None:
            near: tuple[m.Match, ...] = (self._naming.no_link("in"), self._naming.link("out"))
            texts.append(self._text(((*near, m.Address("src", *pool, negated=True)), t.Accept())))
        return texts

    def _from(self) -> list[Text]:
        """What slots have let pass: to another slot, undecided, or out."""
        found: list[Text] = [((self._naming.link("out"),), t.Return())]
        pools = self._naming.places.pools(self._family)
        if self.counting is not None:
            pools = [*self.counting.tenants, *self.counting.hosts]
        found += [((m.Address("dst", *pool),), t.Return()) for pool in pools]
        found += [(region, t.Return()) for region in self._undecided]
        if self._undecided or rewritten(self._filed, self._naming.places.link_owner.__contains__):
            found.append(((m.CtState("conntrack", frozenset(("DNAT",))),), t.Return()))
        found += [((m.Interface("out", name),), t.Accept()) for name in self._naming.places.outside]
        return found

    def _text(self, one: Text) -> str:
        return one if isinstance(one, str) else rule_text(one[0], one[1], self._family)
