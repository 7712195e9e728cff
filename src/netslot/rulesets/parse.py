"""From text in iptables-save form to a Dump.

    dump = parse(text, file="host.rules")         # the family is found from the banner or the addresses
    ruleset = parse(text, family=4).rulesets[0]   # or said by the caller

Accepted: what iptables-save, iptables-legacy-save, iptables-nft-save and their ip6tables twins of any version
print, with and without ``-c``; IPv4 and IPv6 one after the other in one text; and rule files that people write
for iptables-restore (``-N``, ``-P``, ``-I``, several addresses in one ``-s``, options out of order).

Every error is a SpecError with the line number and what was expected there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Literal

from netslot.errors import SpecError
from netslot.rulesets import words as lexical
from netslot.rulesets.clauses import BASIC, ClauseParser, RuleParts
from netslot.rulesets.graph import deepest, loop
from netslot.rulesets.model import BUILTIN_CHAINS, Chain, Counters, Dump, Family, Rule, Ruleset, Table

TABLES = ("raw", "mangle", "nat", "filter", "security")

_COUNTERS = re.compile(r"\[(\d+):(\d+)\]\Z")
_BANNER = re.compile(r"# (?:Generated|Completed) by (ip6?tables)\S*-save ", re.IGNORECASE)
_PART_OF_TABLE = re.compile(r"-[A-Za-z-]|:\S|COMMIT\b|\[\d+:\d+\]")
_ADDRESS = re.compile(
    r"(?:^| )(?:-[sd]|--to-destination|--to-source|--src-range|--dst-range|--to) "
    r"(?:(?P<v4>\d+\.\d+\.)|(?P<v6>\[?[0-9a-fA-F]*:[0-9a-fA-F]*:))"
    r"|(?P<word>ipv6-icmp|icmpv6|icmp6-|-m (?:icmp6|ipv6header) )"
)
_NAMED_V6 = re.compile(r"v6|ip6", re.IGNORECASE)
_MAX_CHAIN_NAME = 28  # XT_EXTENSION_MAXNAMELEN - 1, include/uapi/linux/netfilter/x_tables.h
_MAX_DEPTH = 100  # the kernel takes 16 of nf_tables; of iptables-legacy more, which nobody has
_HINT = "give the output of iptables-save (IPv4) or ip6tables-save (IPv6), both may be with -c"


def parse(text: str, *, file: str | None = None, family: Family | None = None, pasted: bool = False) -> Dump:
    """Parse one text. ``family`` overrules what the text says. ``file`` is for error messages, and its name says
    which family it is where nothing in the text does. ``pasted``: what stands around the tables and is no part of
    one (a shell's prompt, a warning of sudo) is left out with a note, instead of refused.

    Raises SpecError when the text is not a whole, well-formed dump.
    """
    lines = text.split("\n")
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise SpecError("there is a NUL byte; expected text", file=file, line=number, hint=_HINT)
    _refuse_other_formats(lines, file)
    collected: dict[Family, _Collected] = {}
    for section_family, first, last in _sections(lines, family, file):
        here = collected.setdefault(section_family, _Collected())
        _Reader(lines, section_family, file, here, pasted).read(first, last)
    noise = sorted(number for found in collected.values() for number in found.noise)
    if noise and not any(found.tables for found in collected.values()):
        text = lines[noise[0] - 1].strip()
        raise SpecError(
            f"'{text[:40]}' is not understood; expected '*TABLE', ':CHAIN', '-A CHAIN ...' or 'COMMIT'",
            file=file,
            line=noise[0],
            hint=_HINT,
        )
    for found in collected.values():
        if found.noise:
            many = "1 line is" if len(found.noise) == 1 else f"{len(found.noise)} lines are"
            found.notes.append(f"{many} no part of a table and left out, the first is line {found.noise[0]}")
    rulesets = tuple(
        Ruleset(number, found.tables, tuple(found.notes), found.tool) for number, found in sorted(collected.items())
    )
    if not any(ruleset.tables for ruleset in rulesets):
        raise SpecError("there is no table in it; expected a line such as '*filter'", file=file, hint=_HINT)
    return Dump(tuple(ruleset for ruleset in rulesets if ruleset.tables))


def merge(*dumps: Dump) -> Dump:
    """One Dump of an IPv4 and an IPv6 one. Raises SpecError when a family comes twice."""
    rulesets = sorted((ruleset for dump in dumps for ruleset in dump.rulesets), key=lambda r: r.family)
    families = [ruleset.family for ruleset in rulesets]
    if len(set(families)) != len(families):
        raise SpecError("two dumps of the same address family; expected one for IPv4 and one for IPv6")
    return Dump(tuple(rulesets))


class _Collected:
    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.notes: list[str] = []
        self.noise: list[int] = []  # numbers of lines that belong to no table and are no comments
        self.tool: Literal["", "legacy", "nft"] = ""


def _refuse_other_formats(lines: list[str], file: str | None) -> None:
    """Say what a well-known other format is, instead of failing at its first word."""
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if stripped.startswith("*"):
            return
        if re.match(r"(add )?table (ip|ip6|inet|arp|bridge|netdev) \S+", stripped) or stripped.startswith(
            ("{", "flush ruleset")
        ):
            raise SpecError(
                "this is an nftables ruleset; expected iptables-save form (a line such as '*filter')",
                file=file,
                line=number,
                hint="if iptables wrote these tables, run 'iptables-nft-save' on that host and give its output; "
                "native nftables rules have no iptables-save form and cannot be read",
            )
        if re.match(r"-[PNA] \S+", stripped):
            raise SpecError(
                "a rule stands before any table; expected a line such as '*filter' (is this 'iptables -S'?)",
                file=file,
                line=number,
                hint=_HINT,
            )
        if re.match(r"Chain \S+ \((policy|\d+ references)", stripped):
            raise SpecError(
                "this is the listing of 'iptables -L', which leaves out conditions",
                file=file,
                line=number,
                hint=_HINT,
            )


def _sections(lines: list[str], forced: Family | None, file: str | None) -> Iterator[tuple[Family, int, int]]:
    """Stretches of lines of one family: (family, first index, index after the last).

    A banner decides for all that follows; where there is none at all, each table's own words decide.
    """
    if forced is not None:
        yield forced, 0, len(lines)
        return
    marks: list[tuple[int, Family]] = []
    for index, line in enumerate(lines):
        if "-save" in line and (banner := _BANNER.match(line.strip())):
            marks.append((index, 6 if banner[1].lower() == "ip6tables" else 4))
    marks = marks or _guessed(lines, file)
    start, current = 0, marks[0][1]
    for index, number in marks:
        if number != current:
            yield current, start, index
            start, current = index, number
    yield current, start, len(lines)


def _guessed(lines: list[str], file: str | None) -> list[tuple[int, Family]]:
    """Where tables begin, with the family that their addresses tell; a silent table is of its neighbour's family."""
    starts = [index for index, line in enumerate(lines) if line.lstrip().startswith("*")] or [0]
    told = [_told_family(lines[first:last]) for first, last in pairwise([*starts, len(lines)])]
    unsaid: Family = 6 if file and _NAMED_V6.search(file.rpartition("/")[2]) else 4
    current = next((family for family in told if family is not None), unsaid)
    marks: list[tuple[int, Family]] = []
    for index, family in zip(starts, told, strict=True):
        current = family or current
        marks.append((index, current))
    return marks


def _told_family(lines: list[str]) -> Family | None:
    """The family of the first address, or of a word that only ip6tables knows; None without any."""
    for line in lines:
        if line.lstrip().startswith("#"):
            continue
        found = _ADDRESS.search(line)
        if found:
            return 4 if found["v4"] else 6
    return None


class _OpenChain:
    """A chain while its rules are being read."""

    __slots__ = ("counters", "line", "name", "policy", "rules")

    def __init__(self, name: str, policy: str | None, counters: Counters | None, line: int) -> None:
        self.name = name
        self.policy = policy
        self.counters = counters
        self.line = line
        self.rules: list[Rule] = []

    def close(self) -> Chain:
        return Chain(self.name, self.policy, tuple(self.rules), self.counters, self.line)


class _Reader:
    """Reads the lines of one family into tables."""

    def __init__(self, lines: list[str], family: Family, file: str | None, found: _Collected, pasted: bool) -> None:
        self._pasted = pasted
        self._lines = lines
        self._family: Family = family
        self._file = file
        self._found = found
        self._clauses = ClauseParser(family)
        self._table = ""
        self._table_line = 0
        self._chains: dict[str, _OpenChain] = {}
        self._number = 0

    def read(self, first: int, last: int) -> None:
        """Read the lines with these indices. Raises SpecError."""
        for index in range(first, last):
            line = self._lines[index]
            self._number = index + 1
            if "\t" in line and '"' not in line:
                line = line.replace("\t", " ")
            try:
                if line.startswith("-A "):
                    self._append(line, None)
                else:
                    self._line(line.strip(" \t\r"))
            except ValueError as error:
                raise self._error(str(error)) from None
        if self._table:
            raise SpecError(
                f"table {self._table} has no COMMIT; expected it before the end of the dump",
                file=self._file,
                line=self._table_line,
                hint="the dump was cut off: save it again",
            )

    def _error(self, message: str) -> SpecError:
        return SpecError(message, file=self._file, line=self._number)

    def _line(self, line: str) -> None:
        if not line:
            return
        if self._pasted and not self._table and line[0] not in "#*" and not _PART_OF_TABLE.match(line):
            self._found.noise.append(self._number)
            return
        match line[0]:
            case "#":
                self._note(line)
            case "*":
                self._begin(line[1:].strip())
            case ":":
                self._declare(line[1:].split())
            case "[":
                counters, _, rest = line.partition(" ")
                self._command(rest.strip(), _counters(counters))
            case _:
                if line == "COMMIT":
                    self._commit()
                else:
                    self._command(line, None)

    def _note(self, line: str) -> None:
        if _BANNER.match(line):
            self._found.tool = "nft" if "(nf_tables)" in line else "legacy"
        if "is incompatible" in line or "tables present, use" in line:
            self._found.notes.append(line.lstrip("# ").strip())

    def _begin(self, name: str) -> None:
        if self._table:
            raise ValueError(f"table {name} begins inside table {self._table}; expected COMMIT before it")
        if name not in TABLES:
            raise ValueError(f"'{name}' is not a table; expected one of {', '.join(TABLES)}")
        self._table, self._table_line = name, self._number
        self._chains = {}
        self._clauses.enter_table(self._chains)

    def _commit(self) -> None:
        self._need_table("COMMIT")
        if self._table in self._found.tables:
            raise ValueError(f"table {self._table} comes a second time; iptables-restore would flush the first")
        chains = {name: chain.close() for name, chain in self._chains.items()}
        table = Table(self._table, chains, self._table_line)
        if (closing := loop(table)) is not None:
            chain, rule = closing
            self._number = rule.line
            raise ValueError(
                f"the jump in chain {chain.name} leads back to where it came from; the kernel takes no loops"
            )
        if deepest(table) > _MAX_DEPTH:
            raise ValueError(f"jumps of table {table.name} go more than {_MAX_DEPTH} chains deep; expected fewer")
        self._found.tables[table.name] = table
        self._table = ""

    def _need_table(self, what: str) -> None:
        if not self._table:
            raise ValueError(f"'{what}' stands outside a table; expected a line such as '*filter' before it")

    def _declare(self, words: list[str]) -> None:
        """``:NAME POLICY [packets:bytes]``."""
        self._need_table(":" + " ".join(words[:1]))
        if len(words) not in (2, 3):
            raise ValueError("a chain's line is ':NAME POLICY [packets:bytes]'")
        counters = _counters(words[2]) if len(words) == 3 else None
        self._new_chain(words[0], words[1], counters)

    def _new_chain(self, name: str, policy: str, counters: Counters | None) -> None:
        if not name or name[0] in "-!" or " " in name:
            raise ValueError(f"'{name}' is no name of a chain; expected one word that does not begin with - or !")
        if name in self._chains:
            raise ValueError(f"chain {name} is declared twice in table {self._table}")
        builtin = name in BUILTIN_CHAINS
        if builtin and policy not in ("ACCEPT", "DROP"):
            raise ValueError(f"the policy of {name} is '{policy}'; expected ACCEPT or DROP")
        if not builtin and policy != "-":
            raise ValueError(f"chain {name} has the policy '{policy}'; expected '-': only built-in chains have one")
        if len(name.encode(errors="surrogateescape")) > _MAX_CHAIN_NAME:
            raise ValueError(f"chain name {name} is longer than {_MAX_CHAIN_NAME} bytes")
        self._chains[name] = _OpenChain(name, policy if builtin else None, counters, self._number)

    def _command(self, line: str, counters: Counters | None) -> None:
        verb, _, rest = line.partition(" ")
        rest = rest.strip()
        if verb in ("-A", "--append"):
            self._append("-A " + rest, counters)
        elif verb in ("-I", "--insert"):
            self._insert(rest, counters)
        elif verb in ("-N", "--new-chain"):
            self._need_table(line)
            self._new_chain(rest, "-", None)
        elif verb in ("-P", "--policy"):
            self._policy(rest.split())
        elif verb in ("-D", "-R", "-F", "-X", "-Z", "-E", "-t", "--delete", "--replace", "--flush"):
            raise ValueError(f"'{verb}' edits a ruleset; expected a dump, which has only -A lines")
        else:
            raise ValueError(
                f"'{line[:40]}' is not understood; expected '*TABLE', ':CHAIN', '-A CHAIN ...' or 'COMMIT'"
            )

    def _policy(self, words: list[str]) -> None:
        self._need_table("-P")
        if len(words) != 2 or words[1] not in ("ACCEPT", "DROP") or words[0] not in BUILTIN_CHAINS:
            raise ValueError("expected '-P CHAIN ACCEPT' or '-P CHAIN DROP' for a built-in chain")
        chain = self._chains.get(words[0])
        if chain is None:
            self._new_chain(words[0], words[1], None)
        else:
            chain.policy, chain.counters = words[1], (0, 0)  # setting a policy clears its counters

    def _append(self, line: str, counters: Counters | None) -> None:
        """``-A CHAIN rule``."""
        name, _, text = line[3:].strip().partition(" ")
        text = text.lstrip()
        chain = self._chains.get(name) or self._chain(name)
        parts = self._clauses.parse_plain(text)
        if parts is not None:
            chain.rules.append(Rule(parts.matches, parts.target, text, self._number, "", counters))
        else:
            chain.rules.extend(self._rules(text, counters))

    def _insert(self, line: str, counters: Counters | None) -> None:
        """``-I CHAIN [number] rule``."""
        name, _, text = line.partition(" ")
        place = 1
        head, _, tail = text.partition(" ")
        if head.isdigit():
            place, text = int(head), tail
        chain = self._chain(name)
        if not 1 <= place <= len(chain.rules) + 1:
            raise ValueError(f"-I {name} {place}: the chain has {len(chain.rules)} rules")
        chain.rules[place - 1 : place - 1] = self._rules(text, counters)

    def _chain(self, name: str) -> _OpenChain:
        chain = self._chains.get(name)
        if chain is None:
            self._need_table(f"-A {name}")
            if name not in BUILTIN_CHAINS:
                raise ValueError(f"chain {name} is not declared in this table; expected a line ':{name} - [0:0]'")
            self._new_chain(name, "ACCEPT", None)
            chain = self._chains[name]
        return chain

    def _rules(self, text: str, counters: Counters | None) -> list[Rule]:
        """The rule of a line; several where one option holds several addresses; none for the other family."""
        words = lexical.split(text)
        if "," in text:
            variants = _expand_addresses(words)
            if len(variants) > 1:
                return [rule for variant in variants for rule in self._rules(lexical.join(tuple(variant)), counters)]
        parts = self._clauses.parse_rule(words)
        if parts.only_family is not None:
            if parts.only_family != self._family:
                return []
            words = [word for word in words if BASIC.get(word) not in ("-4", "-6")]
            text = lexical.join(tuple(words))
        return [self._rule(parts, text, counters)]

    def _rule(self, parts: RuleParts, text: str, counters: Counters | None) -> Rule:
        if "! " in text or parts.counters is not None:
            text = _current_form(text)
        return Rule(parts.matches, parts.target, text, self._number, parts.comment, counters or parts.counters)


def _counters(text: str) -> Counters:
    found = _COUNTERS.match(text)
    if found is None:
        raise ValueError(f"'{text}' are no counters; expected [packets:bytes]")
    return int(found[1]), int(found[2])


def _expand_addresses(words: list[str]) -> list[list[str]]:
    """One list of words for each combination of ``-s A,B`` and ``-d C,D``, in the order of iptables."""
    places = [
        index for index in range(1, len(words)) if BASIC.get(words[index - 1]) in ("-s", "-d") and "," in words[index]
    ]
    variants = []
    for chosen in product(*(words[place].split(",") for place in places)):
        variant = list(words)
        for place, address in zip(places, chosen, strict=True):
            variant[place] = address
        variants.append(variant)
    return variants


def _current_form(text: str) -> str:
    """The same rule without what today's iptables-restore refuses: ``-s ! A`` and counters behind ``-c``."""
    words = lexical.split(text)
    changed = False
    for index in range(1, len(words) - 1):
        option = words[index - 1]
        if words[index] == "!" and option.startswith("-") and not words[index + 1].startswith("-"):
            words[index - 1 : index + 1] = ["!", option]
            changed = True
    for index, word in enumerate(words):
        if BASIC.get(word) == "-c":
            del words[index : index + (2 if "," in words[index + 1] else 3)]
            changed = True
            break
    return lexical.join(tuple(words)) if changed else text
