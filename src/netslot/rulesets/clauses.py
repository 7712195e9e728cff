"""One clause of a rule: a basic option, one ``-m module`` with its options, or ``-j target`` with its options.

The clause is the unit that the parser remembers: hosts write the same clauses over and over, so each distinct
clause is analysed once per dump and its Match and Target objects are shared between all rules.

iptables lets options of a match stand anywhere after the match is loaded (``-m state --dport 22 --state NEW``
after ``-p tcp``). Such a clause returns the strangers, and ``parse_rule`` gives them to the match that owns
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets import values, vocabulary
from netslot.rulesets.match_options import MODULES, Option, interface_name
from netslot.rulesets.model import Family
from netslot.rulesets.target_options import NO_TARGET, TARGETS, VERDICTS, unmodelled

BASIC = {
    "-s": "-s",
    "--source": "-s",
    "--src": "-s",
    "-d": "-d",
    "--destination": "-d",
    "--dst": "-d",
    "-i": "-i",
    "--in-interface": "-i",
    "-o": "-o",
    "--out-interface": "-o",
    "-p": "-p",
    "--protocol": "-p",
    "--proto": "-p",
    "-m": "-m",
    "--match": "-m",
    "-j": "-j",
    "--jump": "-j",
    "-g": "-g",
    "--goto": "-g",
    "-f": "-f",
    "--fragment": "-f",
    "--fragments": "-f",
    "-c": "-c",
    "--set-counters": "-c",
    "-4": "-4",
    "--ipv4": "-4",
    "-6": "-6",
    "--ipv6": "-6",
}
"""Options that begin a clause, and the short form of each."""

FREE_TEXT = frozenset(
    (
        "--comment",
        "--log-prefix",
        "--nflog-prefix",
        "--ulog-prefix",
        "--string",
        "--algo",
        "--physdev-in",
        "--physdev-out",
    )
)
"""Options whose value may look like an option."""

_CUT = re.compile(r" (?=(?:! )?-[sdiopmjg] )")
_OLD_NEGATION = re.compile(r"-\S+ ! [^-]")

_POLICY = ["-m", "policy"]  # has an option --proto of its own

_NO_MATCHES: tuple[m.Match, ...] = ()


class Clause(NamedTuple):
    """What one clause adds to a rule. ``strangers`` are options that belong to another match."""

    matches: tuple[m.Match, ...] = _NO_MATCHES
    target: t.Target | None = None
    comment: str = ""
    module: str = ""
    strangers: tuple[Option, ...] = ()
    counters: tuple[int, int] | None = None
    family: Family | None = None


class RuleParts(NamedTuple):
    """A rule before it has a text and a line. ``families`` restricts it by ``-4`` or ``-6``."""

    matches: tuple[m.Match, ...]
    target: t.Target
    comment: str
    counters: tuple[int, int] | None
    only_family: Family | None


class ClauseParser:
    """Analyses clauses of one dump, each distinct one once. ``chains`` are the current table's chain names.

    All methods raise ValueError with a sentence that says what was expected.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._known: dict[tuple[str, ...], Clause] = {}
        self._plain: dict[str, Clause] = {}
        self._tuples: dict[tuple[m.Match, ...], tuple[m.Match, ...]] = {}
        self._targets: dict[t.Target, t.Target] = {}
        self._matches: dict[m.Match, m.Match] = {}
        self._chains: Mapping[str, object] = {}

    def enter_table(self, chains: Mapping[str, object]) -> None:
        """Start of a table: what a bare ``-j NAME`` means depends on the chains declared in it."""
        self._chains = chains
        self._known = {words: clause for words, clause in self._known.items() if clause.target is None}
        self._plain = {text: clause for text, clause in self._plain.items() if clause.target is None}

    def parse_plain(self, text: str) -> RuleParts | None:
        """A rule in the form that nearly all of a dump has: no quotes, comments or counters, options in order.

        None for any other, also for one that is wrong: ``parse_rule`` is for these, and knows what to say.
        """
        if '"' in text:
            return None
        known = self._plain
        matches: list[m.Match] = []
        target: t.Target | None = None
        for piece in _CUT.split(text):
            clause = known.get(piece)
            if clause is None:
                clause = self._plain_clause(piece)
                if clause is None:
                    return None
            matches += clause.matches
            if clause.target is not None:
                if target is not None:
                    return None
                target = clause.target
        return RuleParts(tuple(matches), target or NO_TARGET, "", None, None)

    def _plain_clause(self, piece: str) -> Clause | None:
        pieces = split_clauses(piece.split())
        if len(pieces) != 1 or _OLD_NEGATION.search(piece):
            return None
        clause = self._known.get(pieces[0])
        if clause is None:
            try:
                clause = self._known[pieces[0]] = self._analyse(pieces[0])
            except ValueError:  # parse_rule meets it again, and tells
                return None
        if clause.comment or clause.strangers or clause.counters or clause.family:
            return None
        self._plain[piece] = clause
        return clause

    def parse_rule(self, words: list[str]) -> RuleParts:
        """The words of one rule, after ``-A CHAIN``."""
        known = self._known
        matches: list[m.Match] = []
        target: t.Target | None = None
        comment = ""
        strangers: list[Option] = []
        counters = None
        only_family: Family | None = None
        pieces = split_clauses(words)
        for clause_words in pieces:
            clause = known.get(clause_words)
            if clause is None:
                clause = known[clause_words] = self._analyse(clause_words)
            matches += clause.matches
            if clause.target is not None:
                if target is not None:
                    raise ValueError("a rule has one target; expected a single -j or -g")
                target = clause.target
            elif clause.comment:
                comment = f"{comment} {clause.comment}" if comment else clause.comment
            elif clause.counters or clause.family:
                counters = clause.counters or counters
                only_family = clause.family or only_family
            if clause.strangers:
                strangers += clause.strangers
        if strangers:
            matches += self._adopt(strangers, [known[piece].module for piece in pieces], matches)
        return RuleParts(tuple(matches), target or NO_TARGET, comment, counters, only_family)

    def _adopt(self, strangers: list[Option], modules: list[str], found: list[m.Match]) -> list[m.Match]:
        """Give options that stand in another match's clause to the loaded or implicit match that owns them."""
        protocol = next((x.number for x in found if isinstance(x, m.Protocol) and not x.negated), None)
        implicit = vocabulary.IMPLICIT_MODULES.get(protocol or 0, "")
        candidates = [name for name in [*modules, implicit] if name in MODULES]
        adopted: list[m.Match] = []
        for option in strangers:
            owner = next((name for name in candidates if option.name in MODULES[name].arity), None)
            if owner is None:
                raise ValueError(
                    f"option {option.name} belongs to no match or target of this rule; "
                    "expected the -m MODULE (or -p PROTOCOL) that it is an option of before it"
                )
            arity = MODULES[owner].arity[option.name]
            if len(option.words) < arity:
                raise ValueError(f"option {option.name} needs {arity} value(s)")
            adopted += MODULES[owner].build(owner, [option._replace(words=option.words[:arity])], self._family)
        return [self._matches.setdefault(match, match) for match in adopted]

    def _analyse(self, words: tuple[str, ...]) -> Clause:
        negated = words[0] == "!"
        option = BASIC.get(words[negated], "") if len(words) > negated else ""
        rest = words[negated + 1 :]
        if not option:
            raise ValueError(f"'{words[0]}' stands where an option should; expected -s, -d, -i, -o, -p, -m, -j or -g")
        if option in ("-f", "-4", "-6"):
            clause = self._flag(option, negated, rest)
        elif not rest:
            raise ValueError(f"option {words[negated]} has no value")
        elif option == "-c":
            clause = Clause(counters=_counter_words(rest))
        elif negated and option in ("-m", "-j", "-g"):
            raise ValueError(f"'!' cannot stand before {option}; expected it before the option that it negates")
        elif option in ("-j", "-g"):
            clause = self._target(option, rest)
        elif option == "-m":
            clause = self._module(rest[0], rest[1:])
        else:
            clause = self._basic(option, negated, rest)
        shared = tuple(self._matches.setdefault(match, match) for match in clause.matches)
        target = None if clause.target is None else self._targets.setdefault(clause.target, clause.target)
        return clause._replace(matches=shared, target=target)

    def _flag(self, option: str, negated: bool, rest: tuple[str, ...]) -> Clause:
        strangers = tuple(_unknown_options(rest))
        if option == "-f":
            return Clause((m.Fragment(negated),), strangers=strangers)
        return Clause(family=4 if option == "-4" else 6, strangers=strangers)

    def _basic(self, option: str, negated: bool, rest: tuple[str, ...]) -> Clause:
        value, extra = rest[0], rest[1:]
        if value == "!" and extra:
            # Saves of iptables before 1.4.3 wrote the sign behind the option.
            negated, value, extra = not negated, extra[0], extra[1:]
        strangers = tuple(_unknown_options(extra))
        match = self._basic_match(option, value, negated)
        return Clause((match,) if match is not None else (), strangers=strangers)

    def _basic_match(self, option: str, text: str, negated: bool) -> m.Match | None:
        words = (*(("!",) if negated else ()), option, text)
        if option == "-p":
            number = vocabulary.PROTOCOLS.get(text.lower(), 0 if text.lower() == "all" else None)
            if number is None and text[0].isalpha():
                return m.Opaque("-p", words)
            number = values.number(text, 255) if number is None else number
            return m.Protocol(number, negated) if number or negated else None
        if option in ("-i", "-o"):
            name, wildcard = interface_name(text)
            if wildcard and not name and not negated:
                return None
            return m.Interface("in" if option == "-i" else "out", name, wildcard, negated)
        try:
            value, mask = values.network(text, self._family)
        except values.NameNotNumber:
            return m.Opaque(option, words)
        if mask == 0 and not negated:
            return None
        return m.Address("src" if option == "-s" else "dst", value, mask, negated)

    def _module(self, name: str, words: tuple[str, ...]) -> Clause:
        if name == "comment":
            return _comment(words)
        module = MODULES.get(name)
        if module is None:
            if not name[:1].isalnum():
                raise ValueError(f"'{name}' is no name of a match; expected -m MODULE")
            return Clause((m.Opaque(name, ("-m", name, *words)),), module=name)
        own, strangers = scan_options(words, module.arity)
        matches = tuple(module.build(name, own, self._family)) if own or name == "rpfilter" else ()
        return Clause(matches, module=name, strangers=strangers)

    def _target(self, option: str, words: tuple[str, ...]) -> Clause:
        name, rest = words[0], words[1:]
        if option == "-g" or (name in self._chains and name not in VERDICTS):
            if name not in self._chains:
                raise ValueError(f"chain {name} is not declared in this table; expected a line ':{name} - [0:0]'")
            strangers = tuple(_unknown_options(rest))
            return Clause(target=t.Goto(name) if option == "-g" else t.Jump(name), strangers=strangers)
        if name in VERDICTS:
            return Clause(target=VERDICTS[name], strangers=tuple(_unknown_options(rest)))
        kind = TARGETS.get(name)
        if kind is not None:
            own, strangers = scan_options(rest, kind.arity)
            return Clause(target=kind.build(name, own, self._family), strangers=strangers)
        if not name.isupper():
            raise ValueError(f"chain {name} is not declared in this table; expected a line ':{name} - [0:0]'")
        return Clause(target=unmodelled(name, rest))


def split_clauses(words: list[str]) -> list[tuple[str, ...]]:
    """Cut the words of a rule before each basic option (and the ``!`` in front of it)."""
    pieces: list[tuple[str, ...]] = []
    start, value = 0, -1  # value: place of a word that is one, whatever it looks like
    for place, word in enumerate(words):
        if place == value:
            continue
        if word in FREE_TEXT:
            value = place + 1
        elif word in BASIC:
            if place > start and not (word == "--proto" and words[start : start + 2] == _POLICY):
                cut = place - 1 if words[place - 1] == "!" and value != place - 1 else place
                if cut > start:
                    pieces.append(tuple(words[start:cut]))
                    start = cut
            if BASIC[word] in ("-i", "-o"):
                value = place + 1
    if start < len(words):
        pieces.append(tuple(words[start:]))
    return pieces


def scan_options(words: tuple[str, ...], arity: Mapping[str, int]) -> tuple[list[Option], tuple[Option, ...]]:
    """Options that the table knows, and the others with all words up to the next option."""
    own: list[Option] = []
    strangers: list[Option] = []
    place, negated = 0, False
    while place < len(words):
        name = words[place]
        if name == "!":
            negated = not negated
            place += 1
            continue
        joined, equals, value = name.partition("=")
        if equals and joined in arity:
            words = (*words[:place], joined, value, *words[place + 1 :])
            name = joined
        if name in arity:
            values_ = words[place + 1 : place + 1 + arity[name]]
            if values_ and values_[0] == "!" and (name not in FREE_TEXT or len(words) > place + 2):
                negated = not negated
                place += 1
                values_ = words[place + 1 : place + 1 + arity[name]]
            if len(values_) < arity[name]:
                raise ValueError(f"option {name} needs {arity[name]} value(s)")
            own.append(Option(name, negated, values_))
            place += 1 + arity[name]
        else:
            end = place + 1
            while end < len(words) and words[end] != "!" and not words[end].startswith("--"):
                end += 1
            strangers.append(Option(name, negated, words[place + 1 : end]))
            place = end
        negated = False
    return own, tuple(strangers)


def _unknown_options(words: tuple[str, ...]) -> tuple[Option, ...]:
    return scan_options(words, {})[1]


def _comment(words: tuple[str, ...]) -> Clause:
    own, strangers = scan_options(words, {"--comment": 1})
    if not own:
        raise ValueError("-m comment needs --comment TEXT")
    return Clause(comment=own[0].words[0], module="comment", strangers=strangers)


def _counter_words(words: tuple[str, ...]) -> tuple[int, int]:
    """``-c PACKETS BYTES`` or ``-c PACKETS,BYTES``."""
    parts = words[0].split(",") if "," in words[0] else list(words)
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError("-c needs two numbers: packets and bytes")
    return int(parts[0]), int(parts[1])
