"""The slot's own rules: what root's FORWARD says of one tenant's packets, in the slot's words.

From the tenant, the slot walks root's whole FORWARD chain as it concerns this tenant, common rules included, so
that the order of verdicts stays what it was. Some kinds of packet it passes on undecided, and root decides: those for
the host, those for other tenants, those that root changes before its FORWARD sees them, and those that a rule with a
memory shared by all tenants may decide. What the chain begins with, if it only drops, is asked of all packets: the
first drop is the last word.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.arrangement import HOST
from netslot.rulesets.proof.conditions import depends_on_place, interface_is, kept_apart_by
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.proof.places import NOBODY, Pattern, cover
from netslot.rulesets.proof.tagged import Filed, FiledRuleset, Roles, memories
from netslot.rulesets.splitting.counts import (
    MOST_PATTERNS,
    Counting,
    ends_between,
    ends_open,
    goes_outside,
    is_count,
    only_first,
    what_counts,
)
from netslot.rulesets.splitting.naming import Naming
from netslot.rulesets.splitting.plan import CannotSplit, Plan
from netslot.rulesets.splitting.publishing import rewritten
from netslot.rulesets.write import rule_text

OUT, IN = "netslot-out", "netslot-in"
_RAW = ("raw", "PREROUTING")
EARLY = ("raw", "mangle")
"""Tables whose drops of a tenant's packets may go before the veth."""

Matches = tuple[m.Match, ...]


def is_slots_own(item: Filed, naming: Naming, family: Family, frames: bool) -> bool:
    """Whether no rule of root's can say it for all tenants: it counts for one, or knows one's address or frames.

    ``frames``: those that reach root are the slot's, not the guest's.
    """
    if item.tenant == NOBODY:
        return False
    matches = item.rule.matches
    if any(map(is_count, matches)):
        return not isinstance(item.rule.target, t.Log | t.NoTarget)
    if frames and any(isinstance(x, m.Mac) for x in matches):
        return True
    own = {(a.value, a.mask) for a in naming.places.addresses(item.tenant, family)}
    return any(
        isinstance(x, m.Address) and x.negated and x.side == "src" and (x.value, x.mask) in own for x in matches
    )


def _asks_way_out(rule: Rule) -> bool:
    return any(isinstance(x, m.Interface) and x.direction == "out" for x in rule.matches)


@dataclass
class SlotRules:
    """Lines of one template by table, in iptables-save form without ``-A``: chain and text."""

    raw: list[str] = field(default_factory=list)
    mangle: list[str] = field(default_factory=list)
    chains: dict[str, list[str]] = field(default_factory=dict)
    moved: int = 0


class SlotWriter:
    """Writes one class's template from its representative's rules."""

    def __init__(
        self,
        filed: FiledRuleset,
        naming: Naming,
        plan: Plan,
        tenant: int,
        attachment: Attachment,
        in_order: bool = False,
        counting: Counting | None = None,
    ) -> None:
        self._filed, self._naming, self._plan = filed, naming, plan
        self._tenant, self._attachment = tenant, attachment
        self._family: Family = filed.ruleset.family
        self._names = naming.names(tenant, self._family)
        self._counting = counting  # None: what the tenant's rules count is counted in root, but for first drops
        self._in_order = in_order  # packets between tenants are for root alone: whose rules come first matters
        self._link = naming.places.link(tenant)
        self._copied: dict[str, str] = {}
        self._moved_in: dict[str, Set[Hashable]] = {}  # what moved with a chain that was copied
        self._rewritten = rewritten(filed, naming.places.link_owner.__contains__)
        self._changed = [region for region in self._rewritten if not self._to_host(region)]
        self.undecided: dict[Matches, None] = dict.fromkeys(self._changed)
        self.refusals: list[tuple[str, Rule, str]] = []
        self._past: frozenset[str] = frozenset()  # of which packets rules so far have decided: "open", "between"
        self.counted: set[Hashable] = set()  # what keeps a count that only root can keep
        self.moved: dict[Hashable, list[Matches]] = {}  # what counts here instead, and which packets
        self.alone = False  # no other tenant sends under this one's address: root and slots drop that first thing
        self.checked = False  # what the tenant sends under another's address is dropped first thing
        self.passing = 0  # rules that a packet is tested against here which root decides about
        self.rules = SlotRules()

    def forward(self) -> None:
        """Fill the chains that the tenant's packets walk in the slot, out of it and into it."""
        table = self._filed.ruleset.tables.get("filter")
        if table is None or "FORWARD" not in table.chains:
            return
        self.rules.chains[OUT] = [self._all_of("dst", host) for host in self.hosts()]
        self.rules.chains[IN] = [self._all_of("src", host) for host in self.hosts()]
        if self._family in self._naming.places.guessed:
            self.rules.chains[OUT].append(f"-d {HOST[self._family]} -j ACCEPT")
            self.rules.chains[IN].append(f"-s {HOST[self._family]} -j ACCEPT")
        self._refuse_unseen_frames()
        self._chain("FORWARD", OUT, outward=True, top=True)
        self._chain("FORWARD", IN, outward=False, top=True)

    def _refuse_unseen_frames(self) -> None:
        """What FORWARD asks of the guest's frames must be asked here, also of what root turns to other tenants."""
        why = ""
        if self._in_order:
            why = "between two tenants it matters whose rules stand first, which root keeps"
        elif any(map(self._to_host, self._rewritten)):
            why = "packets for the host's address that root turns to tenants are forwarded only after that"
        for item in self._everything("FORWARD") if self._attachment != "process" else ():
            if not any(isinstance(x, m.Mac) for x in item.rule.matches):
                continue
            reason = why if item.tags else "root has to ask it too, of packets between tenants"
            if reason:
                reason = f"it asks for the guest's frames, which only the slot sees, and {reason}"
                self._plan.settle(self._family, "filter", "FORWARD", item.rule, "refused", "", reason)

    def _all_of(self, side: m.Side, pattern: Pattern) -> str:
        """Let pass what goes to these addresses, or comes from them; they are not this tenant's, but all tenants'."""
        return rule_text((m.Address(side, *pattern),), t.Accept(), self._family)

    def leave_inward_to_root(self) -> None:
        """Let root decide about packets to the tenant; the slot lets them pass."""
        for name in [name for name in self.rules.chains if name == IN or name.startswith(("i-", f"{IN}-"))]:
            del self.rules.chains[name]
        self.rules.chains[IN] = ["-j ACCEPT"]

    def hosts(self) -> list[Pattern]:
        """The host's addresses: all tenants' gateways in one pattern, and those that rules name."""
        places = self._naming.places
        found = (
            [] if self._family in places.guessed else [(value, self._ones) for value in places.hosts[self._family]]
        )
        return [*self._gateways, *found]

    @cached_property
    def _gateways(self) -> list[Pattern]:
        """The host's addresses on tenants' links: in one pattern, which holds addresses of nobody's too.

        What root cannot repeat has to be asked of packets for these as well; then the patterns are exact.
        """
        if self._counting is not None:
            return list(self._counting.hosts)
        places = self._naming.places
        pool = places.gateway_pool(self._family)
        if pool is None:
            return []
        frames = self._attachment != "process"
        own = any(is_slots_own(item, self._naming, self._family, frames) for item in self._everything("FORWARD"))
        exact = cover(places.gateway_patterns(self._family)) if own else []
        return exact if 0 < len(exact) <= MOST_PATTERNS else [pool]

    def _everything(self, chain: str) -> Iterator[Filed]:
        """The rules that the tenant's packets to the outside may meet, those of its chains included."""
        for item in self._mine("filter", chain, True):
            yield item
            if isinstance(item.rule.target, t.Jump | t.Goto):
                yield from self._everything(item.rule.target.chain)

    def _to_host(self, region: Matches) -> bool:
        """Whether all of it is for an address of the host's that rules name, which slots leave to root anyway."""
        places = self._naming.places
        known = [value for value, _ in self.hosts()] if self._family not in places.guessed else []
        own = frozenset(known).union(*places.gateways[self._family])
        return any(
            isinstance(x, m.Address) and x.side == "dst" and not x.negated and x.mask == self._ones and x.value in own
            for x in region
        )

    @cached_property
    def _spares(self) -> bool:
        """Whether addresses that are nobody's are passed to root, because one pattern holds all gateways."""
        known = {value for own in self._naming.places.gateways[self._family] for value in own}
        return len(known) < sum(1 << (self._ones & ~mask).bit_count() for _, mask in self._gateways)

    @property
    def _ones(self) -> int:
        return (1 << (32 if self._family == 4 else 128)) - 1

    def _chain(self, chain: str, name: str, outward: bool, top: bool = False) -> None:
        lines = self.rules.chains.setdefault(name, [])
        drops = top and outward
        if top and not outward:
            lines += self._between_tenants(outward)
            self.passing += 2 + len(lines)
        items = self._mine("filter", chain, outward)
        alone = self._last_alone(items) if drops and not self._in_order else -1
        first = next((item.position for item in self._filed.chains["filter", chain] if item.tags), 0)
        changed = self._changed if top and outward else []
        if changed:
            items = self._drops_first(items, first)
        for number, item in enumerate(items):
            early = drops and self._before_all(item, first, number <= alone)
            if changed and not (early and self._as_root_sees(item.rule)):
                lines += [self._text(region, t.Accept()) for region in changed]
                changed = []
            if drops and not early:
                drops = False
                lines += self._between_tenants(outward)
                self.passing += len(lines)
            try:
                self._check_count(item, chain, outward, early and not (self._changed and not changed))
                lines += self._lines(item, chain, outward)
                if outward:
                    self._pass(item.rule)
            except CannotSplit as reason:
                if self._counts(item, chain):
                    self.counted.add(what_counts(item.rule))
                if not outward:
                    self.refusals.append((chain, item.rule, str(reason)))
                    continue
                region = self._region(item.rule, str(reason))
                lines.append(self._text(region, t.Accept()))
                if not region:
                    self._leave_counts(items[number:], chain)
                    break
        lines += [self._text(region, t.Accept()) for region in changed]
        if drops:
            lines += self._between_tenants(outward)
            self.passing += len(lines)

    def _drops_first(self, items: list[Filed], first: int) -> list[Filed]:
        """Among the drops that the chain begins with, those first that may be asked before root changes anything.

        So are those of packets that root changes. In what order packets are denied in one way makes no difference.
        """
        number = next((n for n, item in enumerate(items) if not self._before_all(item, first, False)), len(items))
        early: list[Filed] = []
        passed: list[Filed] = []
        for item in items[:number]:
            alike = all(other.rule.target == item.rule.target for other in passed)
            (early if alike and self._as_root_sees(item.rule) else passed).append(item)
        return [*early, *passed, *items[number:]]

    def _as_root_sees(self, rule: Rule) -> bool:
        """Whether the rule asks for nothing that root changes before its FORWARD: where a packet goes, its state."""
        untracked = any(isinstance(item.rule.target, t.Notrack) for item in self._filed.chains.get(_RAW, ()))
        return not any(
            isinstance(x, m.Ports)
            or (isinstance(x, m.Address) and x.side == "dst")
            or (isinstance(x, m.CtState) and untracked)
            for x in rule.matches
        )

    def _before_all(self, item: Filed, first: int, needed: bool) -> bool:
        """Whether packets between tenants may be asked it here, before root is.

        A drop before which nothing else can have decided, or what stands before a drop that only the slot knows.
        """
        if _asks_way_out(item.rule):
            return False
        if self._in_order and (item.tags or item.position > first):
            return False
        if not item.tags and item.position > first:
            return False
        return needed or isinstance(item.rule.target, t.Drop | t.Reject | t.Log | t.NoTarget)

    def _last_alone(self, items: list[Filed]) -> int:
        """The place of the last drop that root cannot repeat for all tenants; -1 if there is none."""
        frames = self._attachment != "process"
        items = list(takewhile(lambda item: not _asks_way_out(item.rule), items))  # none behind is before all
        denials = [isinstance(item.rule.target, t.Drop | t.Reject) for item in items]
        return max(
            (
                n
                for n, item in enumerate(items)
                if denials[n] and is_slots_own(item, self._naming, self._family, frames)
            ),
            default=-1,
        )

    def _region(self, rule: Rule, reason: str) -> Matches:
        """The packets that the rule may be about, in words that mean the same in the slot and in root."""
        found = tuple(x for x in rule.matches if not self._only_here(x))
        self.undecided[found] = None
        self._plan.notes[f"slots leave to root what '{rule.text}' may be about: {reason}"] = None
        return found

    def _only_here(self, match: m.Match) -> bool:
        if isinstance(match, m.Interface | m.Opaque | m.Mark) or depends_on_place(match):
            return True
        return isinstance(match, m.Address) and (match.value, match.mask) in self._names

    def _between_tenants(self, outward: bool) -> list[str]:
        """Let packets between tenants pass: root decides. Those to the tenant itself turn round here."""
        pool = self._naming.pool(self._family)
        if pool is None:
            return []
        own = [a for a in self._naming.places.addresses(self._tenant, self._family) if self._attachment != "process"]
        turning = [self._text((m.Address("dst", a.value, a.mask),), t.Return()) for a in own] if outward else []
        side: m.Side = "dst" if outward else "src"
        tenants = self._counting.tenants if outward and self._counting is not None else [pool]
        return [*turning, *(self._all_of(side, pattern) for pattern in tenants)]

    def _mine(self, table: str, chain: str, outward: bool) -> list[Filed]:
        here = frozenset((self._tenant,))
        roles: Roles = {"in": here, "src": here} if outward else {"out": here, "dst": here}
        return self._filed.candidates(table, chain, roles)

    def _lines(self, item: Filed, chain: str, outward: bool) -> list[str]:
        rule = item.rule
        matches = self._slot_matches(rule, outward)
        if matches is None:
            return []
        stateful = list(filter(is_count, matches))
        owned = bool(item.tags) or self._filed.chain_owner.get(("filter", chain)) == self._tenant
        for match in matches:
            if isinstance(match, m.Mark):
                raise CannotSplit("marks of root's do not reach a slot")
            if match not in stateful and depends_on_place(match) and not self._sees_alike(match, outward):
                raise CannotSplit(f"'{type(match).__name__}' may answer differently in another namespace")
        target = self._target(rule, outward)
        if stateful and not owned:
            if not isinstance(target, t.Log | t.NoTarget):
                raise CannotSplit("it keeps a count that all tenants share")
            self._plan.notes[
                f"'{rule.text}' stays in root and only reports; slots hold a copy that counts for itself"
            ] = None
        return [self._text(matches, target)]

    def _counts(self, item: Filed, chain: str) -> bool:
        """Whether the rule decides by a count of the tenant's."""
        counts = any(map(is_count, item.rule.matches))
        owned = bool(item.tags) or self._filed.chain_owner.get(("filter", chain)) == self._tenant
        return counts and owned and not isinstance(item.rule.target, t.Log | t.NoTarget)

    def _leave_counts(self, items: Sequence[Filed], chain: str) -> None:
        """Root decides by these rules, and those that they lead to: what counts must count there."""
        for item in items:
            if self._counts(item, chain):
                self.counted.add(what_counts(item.rule))
            if isinstance(item.rule.target, t.Jump | t.Goto):
                inner = item.rule.target.chain
                self._leave_counts(self._mine("filter", inner, True), inner)

    def _check_count(self, item: Filed, chain: str, outward: bool, asked_of_all: bool) -> None:
        """A rule that decides by a count of the tenant's must count in one place: here if it sees all packets."""
        if not self._counts(item, chain):
            return
        if not self._filed.shared_memories.isdisjoint(memories(item.rule)):
            apart = (kept_apart_by(x) for x in item.rule.matches if isinstance(x, m.Opaque) and x.stateful)
            if not (outward and self.alone and all("src" in sides for sides in apart)):
                raise CannotSplit("it keeps a count that tenants share, by its name")
        if outward and asked_of_all and not self._spares and not any(map(self._to_host, self._rewritten)):
            return
        if not (outward and self._sees_all(item.rule)):
            raise CannotSplit("it keeps a count of one tenant's, and root sees some of what it counts")
        packets = tuple(x for x in item.rule.matches if not self._only_here(x))
        self.moved.setdefault(what_counts(item.rule), []).append(packets)

    def _sees_all(self, rule: Rule) -> bool:
        """Whether the slot leaves to root none of the packets that the rule may be about."""
        how = self._counting
        return (
            how is not None
            and what_counts(rule) not in how.kept
            and ("between" in self._past or goes_outside(rule, self._naming.places))
            and (not how.first_only or "open" in self._past or only_first(rule))
        )

    def _pass(self, rule: Rule) -> None:
        """Remember what the rules that follow are no longer asked of."""
        if ends_open(rule, self._link):
            self._past |= {"open"}
        if ends_between(rule, self._link, self._naming.places):
            self._past |= {"between"}

    def _sees_alike(self, match: m.Match, outward: bool) -> bool:
        """The frame that a guest sends is the same in its slot as it was in root."""
        return isinstance(match, m.Mac) and outward and self._attachment != "process"

    def _target(self, rule: Rule, outward: bool) -> t.Target:
        target = rule.target
        if isinstance(target, t.Jump | t.Goto):
            name = self._user_chain(target.chain, outward)
            return t.Jump(name) if isinstance(target, t.Jump) else t.Goto(name)
        if isinstance(target, t.Accept | t.Drop | t.Reject | t.Return | t.Log | t.NoTarget):
            return target
        raise CannotSplit(f"a slot cannot do what {type(target).__name__} does for root")

    def _user_chain(self, chain: str, outward: bool) -> str:
        """A copy of the chain as this tenant's packets meet it, under a name that names nobody."""
        owned = self._filed.chain_owner.get(("filter", chain)) == self._tenant
        side = OUT if outward else IN
        name = f"{side}-{len(self.rules.chains)}" if owned else f"{'o' if outward else 'i'}-{chain}"[:28]
        key = f"{side} {chain}"
        known = self._copied.get(key)
        if known is not None:
            self.counted |= self._moved_in[key]  # who comes to the chain by this way may have been asked less before
            return known
        self._copied[key] = name
        past, before = self._past, set(self.moved)
        self._chain(chain, name, outward)
        self._past, self._moved_in[key] = past, self.moved.keys() - before
        return name

    def _slot_matches(self, rule: Rule, outward: bool) -> Matches | None:
        """The conditions as they read in the slot; None when this tenant's packets cannot meet them."""
        found: list[m.Match] = []
        for match in rule.matches:
            if isinstance(match, m.Interface):
                if not self._interface(match, outward):
                    return None
            elif not outward and self._elsewhere(match):
                return None
            elif isinstance(match, m.AddrType) and match.types == {"LOCAL"}:
                if not match.negated:
                    return None  # what is for the host, or from it, is not forwarded
            else:
                found.append(match)
        return tuple(found)

    def _elsewhere(self, match: m.Match) -> bool:
        """A destination that is none of this tenant's addresses: packets to the tenant never match it."""
        if not isinstance(match, m.Address) or match.side != "dst" or match.negated:
            return False
        own = self._naming.places.addresses(self._tenant, self._family)
        return bool(own) and all((a.value ^ match.value) & a.mask & match.mask for a in own)

    def _interface(self, match: m.Interface, outward: bool) -> bool:
        """Whether the packets that are still to be decided meet it: from the tenant, or from outside to it."""
        near: m.Direction = "in" if outward else "out"
        if match.direction == near:
            return interface_is(match, self._link) != match.negated
        places = self._naming.places
        if not outward:
            raise CannotSplit("it asks by which interface a packet came to the host, which the slot cannot see")
        spans = [interface_is(match, name) != match.negated for name in places.outside]
        if any(spans) and not all(spans):
            raise CannotSplit("it asks which way out a packet takes, which the slot cannot see")
        return all(spans)

    def _text(self, matches: Matches, target: t.Target) -> str:
        """The rule's text, with the tenant's own addresses as variables."""
        marked: list[m.Match] = []
        replaced: dict[str, str] = {}
        for match in matches:
            name = self._names.get((match.value, match.mask)) if isinstance(match, m.Address) else None
            if name is not None and isinstance(match, m.Address):
                text = rule_text((m.Address("src", match.value, match.mask),), t.NoTarget(), self._family)[3:]
                replaced[text] = f"${{{name}}}"
            marked.append(match)
        words = rule_text(marked, target, self._family).split(" ")
        return " ".join(replaced.get(word, word) for word in words)

    def drops(self, table: str) -> list[str]:
        """The tenant's own drops before routing, for the slot's first hook; CannotSplit if they are not that."""
        lines: list[str] = []
        passed = ended = accepts = False  # ended: common rules follow, which an accept keeps the packet from
        for item in self._mine(table, "PREROUTING", True):
            rule = item.rule
            if not item.tags:
                met = all(
                    interface_is(x, self._link) != x.negated
                    for x in rule.matches
                    if isinstance(x, m.Interface) and x.direction == "in"
                )
                passed = passed or (met and isinstance(rule.target, t.Accept | t.Return | t.Jump | t.Goto))
                ended = ended or (met and bool(lines))
                continue
            own = isinstance(rule.target, t.Drop | t.Accept) and any(role == "in" for role, _ in item.tags)
            accepts = accepts or isinstance(rule.target, t.Accept)
            if not own or passed:
                raise CannotSplit("only drops of the tenant's own packets can go before the veth")
            matches = [x for x in rule.matches if not isinstance(x, m.Interface)]
            if any(isinstance(x, m.Mark) or depends_on_place(x) for x in matches if not isinstance(x, m.Mac)):
                raise CannotSplit("it asks what only root can answer")
            lines.append(self._text(tuple(matches), rule.target))
            self.checked = self.checked or (not accepts and self._is_check(matches))
        if accepts and ended:
            raise CannotSplit("an accept would no longer keep packets from root's rules that follow")
        return lines

    def checks_sources(self) -> bool:
        """Whether what goes before the veth drops all that the tenant sends under another's address."""
        try:
            for table in EARLY:
                self.drops(table)
        except CannotSplit:
            return False
        finally:
            found, self.checked = self.checked, False
        return found

    def _is_check(self, matches: Sequence[m.Match]) -> bool:
        """Whether these are all packets but those under the tenant's own address."""
        own = self._naming.places.addresses(self._tenant, self._family)
        return len(own) == 1 and list(matches) == [m.Address("src", own[0].value, own[0].mask, negated=True)]

    def render(self) -> str:
        """The template: iptables-save form with variables."""
        process = self._attachment == "process"
        ruleset = self._filed.ruleset
        text = []
        first = "OUTPUT" if process else "PREROUTING"
        tap = "-o ${uplink_if}" if process else "-i ${guest_if}"
        for table in ("raw", "mangle"):
            lines = getattr(self.rules, table)
            if lines:
                text += [f"*{table}", f":{first} ACCEPT [0:0]"]
                text += [f"-A {first} {tap} {line}" for line in lines]
                text.append("COMMIT")
        policy = ruleset.tables["filter"].chains["FORWARD"].policy if self.rules.chains else "ACCEPT"
        text.append("*filter")
        hooks = (
            (("OUTPUT", OUT, "-o ${uplink_if}"), ("INPUT", IN, "-i ${uplink_if}"))
            if process
            else (("FORWARD", OUT, "-i ${guest_if}"), ("FORWARD", IN, "-o ${guest_if}"))
        )
        for hook in dict.fromkeys(hook for hook, _, _ in hooks):
            text.append(f":{hook} {policy} [0:0]")
        text += [f":{name} - [0:0]" for name in self.rules.chains]
        if self.rules.chains:
            if process:  # what it says to itself never was root's to forward; refusals come to it that way too
                text += ["-A OUTPUT -o lo -j ACCEPT", "-A INPUT -i lo -j ACCEPT"]
            text += [f"-A {hook} {where} -j {name}" for hook, name, where in hooks]
        for name, lines in self.rules.chains.items():
            text += [f"-A {name} {line}" for line in lines]
        return "\n".join([*text, "COMMIT"]) + "\n"
