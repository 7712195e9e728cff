"""What the linter wants to know of a rule, the same for iptables and nftables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from netslot.host import nft_text
from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.model import BUILTIN_CHAINS, Rule, Ruleset, Table
from netslot.rulesets.parse import parse
from netslot.rulesets.values import prefix_length

_OPERATORS = frozenset(("==", "!=", "!", "<", ">", "<=", ">="))


@dataclass(frozen=True, slots=True)
class Span:
    """Addresses from ``low`` to ``high``."""

    low: int
    high: int

    def __contains__(self, address: int) -> bool:
        return self.low <= address <= self.high

    def overlaps(self, other: Span) -> bool:
        return self.low <= other.high and other.low <= self.high

    def covers(self, other: Span) -> bool:
        return self.low <= other.low and other.high <= self.high


@dataclass(frozen=True, slots=True)
class LinkName:
    """An interface as a rule names it; ``wildcard``: every one that begins so."""

    name: str
    wildcard: bool = False

    @property
    def text(self) -> str:
        return f"{self.name}*" if self.wildcard else self.name

    def matches(self, link: str) -> bool:
        return link.startswith(self.name) if self.wildcard else link == self.name


@dataclass(slots=True)
class RuleView:
    """One rule. ``version`` is 4 or 6; ``verdict`` is drop (also for reject), accept, or empty for the rest."""

    line: int
    version: int
    hooks: frozenset[str]
    inputs: list[LinkName] = field(default_factory=list)
    outputs: list[LinkName] = field(default_factory=list)
    destinations: list[Span] = field(default_factory=list)
    destination_negated: bool = False
    is_dnat: bool = False
    dnat_to: int | None = None
    sets_mark: bool = False
    reads_mark: bool = False
    restores_mark: bool = False
    physdev: bool = False
    verdict: str = ""


def from_iptables(text: str, file: str) -> list[RuleView]:
    """The rules of a file in iptables-save form. SpecError where it is not one."""
    if not any(line.startswith("*") for line in text.split("\n")):
        return []  # an empty file is loaded as nothing
    views = []
    for ruleset in parse(text, file=file).rulesets:
        for table in ruleset.tables.values():
            hooks = _iptables_hooks(table)
            for chain, rule in table.rules():
                views.append(_iptables_view(rule, ruleset, frozenset(hooks.get(chain.name, ()))))
    return views


def _iptables_hooks(table: Table) -> Mapping[str, set[str]]:
    """From which built-in chains each chain can be reached."""
    reached: dict[str, set[str]] = {}
    for hook in BUILTIN_CHAINS:
        waiting = [hook] if hook in table.chains else []
        while waiting:
            name = waiting.pop()
            if name not in table.chains or hook.lower() in reached.setdefault(name, set()):
                continue
            reached[name].add(hook.lower())
            rules = table.chains[name].rules
            waiting += [rule.target.chain for rule in rules if isinstance(rule.target, t.Jump | t.Goto)]
    return reached


def _iptables_view(rule: Rule, ruleset: Ruleset, hooks: frozenset[str]) -> RuleView:
    view = RuleView(rule.line, ruleset.family, hooks)
    for match in rule.matches:
        match match:
            case m.Interface(direction, name, wildcard, _):
                (view.inputs if direction == "in" else view.outputs).append(LinkName(name, wildcard))
            case m.Address("dst", value, mask, negated) if prefix_length(mask, ruleset.family) is not None:
                ones = (1 << (32 if ruleset.family == 4 else 128)) - 1
                view.destinations.append(Span(value, value | (mask ^ ones)))
                view.destination_negated |= negated
            case m.IpRange("dst", low, high, negated):
                view.destinations.append(Span(low, high))
                view.destination_negated |= negated
            case m.Mark():
                view.reads_mark = True
            case m.Physdev() | m.PhysdevIs():
                view.physdev = True
    match rule.target:
        case t.Dnat(to):
            view.is_dnat = True
            view.dnat_to = to.address[0] if to.address else None
        case t.SetMark():
            view.sets_mark = True
        case t.RestoreMark():
            view.sets_mark = view.restores_mark = True
        case t.SaveMark():
            view.reads_mark = True
        case t.Drop() | t.Reject():
            view.verdict = "drop"
        case t.Accept():
            view.verdict = "accept"
    return view


def from_nft(text: str) -> list[RuleView]:
    """The rules of an nftables file."""
    read = nft_text.read(text)
    hooks = read.hooks()
    return [_nft_view(rule, hooks.get(rule.where, frozenset())) for rule in read.rules]


def _nft_view(rule: nft_text.NftRule, hooks: frozenset[str]) -> RuleView:
    words = rule.words
    version = 6 if rule.where.family == "ip6" or "ip6" in words else 4
    view = RuleView(rule.line, version, hooks)
    for position, word in enumerate(words):
        rest = words[position + 1 :]
        if word in ("iifname", "iif", "oifname", "oif"):
            names = [_link(value) for value in _values(rest)[1] if value[:1] not in "@$"]
            (view.inputs if word.startswith("i") else view.outputs).extend(names)
        elif word == "daddr" and words[position - 1] in ("ip", "ip6"):
            view.destination_negated, values = _values(rest)
            view.destinations += list(_spans(values))
        elif word in ("ibrname", "obrname", "ibridgename", "obridgename"):
            view.physdev = True
        elif word == "mark":
            _nft_mark(view, words[position - 1 : position] == ["ct"], rest)
        elif word in ("dnat", "redirect"):
            view.is_dnat = word == "dnat"
            to = next(iter(_spans(value.split(":")[0] for value in rest if value not in ("ip", "ip6", "to"))), None)
            view.dnat_to = to.low if to else None
        elif word in ("drop", "reject"):
            view.verdict = "drop"
        elif word == "accept":
            view.verdict = "accept"
    return view


def _nft_mark(view: RuleView, of_connection: bool, rest: list[str]) -> None:
    """``meta mark set …`` and ``ct mark set meta mark``, ``meta mark set ct mark``, ``meta mark 1``."""
    if of_connection:
        return
    if rest[:1] == ["set"]:
        view.sets_mark = True
        view.restores_mark = rest[1:3] == ["ct", "mark"]
    else:
        view.reads_mark = True


def _values(rest: list[str]) -> tuple[bool, list[str]]:
    """Whether what follows a selector is negated, and the value or the members of the set."""
    negated = bool(rest) and rest[0] in ("!=", "!")
    while rest and rest[0] in _OPERATORS:
        rest = rest[1:]
    if not rest:
        return negated, []
    if rest[0] != "{":
        return negated, rest[:1]
    end = rest.index("}") if "}" in rest else len(rest)
    return negated, [word for word in rest[1:end] if word != ","]


def _link(word: str) -> LinkName:
    name = word.strip('"')
    return LinkName(name.removesuffix("*"), name.endswith("*"))


def _spans(words: Iterable[str]) -> Iterable[Span]:
    for word in words:
        low, dash, high = word.partition("-")
        try:
            if dash:
                yield Span(int(ip_address(low)), int(ip_address(high)))
            else:
                network = ip_network(word, strict=False)
                yield Span(int(network.network_address), int(network.broadcast_address))
        except ValueError:
            continue  # a named set, a map, an expression: not known here
