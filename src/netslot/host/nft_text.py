"""A light reader of nftables files: which rule stands where, in words. It judges no syntax; ``nft`` does that.

Understood are nested blocks (``table … { chain … { … } }``) and commands (``add rule ip t c …``), ``define``,
sets in braces over several lines, comments. ``include`` is not followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_TOKEN = re.compile(
    r"(?P<skip>[ \t\r]+|\\\n|#[^\n]*)|(?P<end>[\n;])"
    r"|(?P<word>\"[^\"]*\"|[{},]|[!=<>]=|[=<>&|^]|[^\s{},;\"#=<>&|^!]+|!)"
)
_FAMILIES = frozenset(("ip", "ip6", "inet", "arp", "bridge", "netdev"))
_OBJECTS = frozenset(
    ("set", "map", "flowtable", "counter", "quota", "limit", "ct", "secmark", "synproxy", "meter", "tunnel")
)


class Word(NamedTuple):
    """One word and its line, from 1. Texts in quotes keep them."""

    text: str
    line: int


class ChainKey(NamedTuple):
    family: str
    table: str
    chain: str


@dataclass
class NftChain:
    """``hook`` and ``kind`` are empty for a chain that is only jumped to."""

    hook: str = ""
    kind: str = ""
    line: int = 0


@dataclass
class NftRule:
    """One rule; ``words`` have defines put in."""

    where: ChainKey
    words: list[str]
    line: int


@dataclass
class NftText:
    """What one file holds. ``other`` are statements that are no rules: elements of sets, commands."""

    chains: dict[ChainKey, NftChain] = field(default_factory=dict)
    rules: list[NftRule] = field(default_factory=list)
    other: list[tuple[int, list[str]]] = field(default_factory=list)

    def hooks(self) -> dict[ChainKey, frozenset[str]]:
        """From which hooks each chain can be reached, by jumps and gotos."""
        reached: dict[ChainKey, set[str]] = {key: {c.hook} if c.hook else set() for key, c in self.chains.items()}
        jumps = [(rule.where, rule.where._replace(chain=to)) for rule in self.rules for to in _targets(rule.words)]
        changed = True
        while changed:
            changed = False
            for source, target in jumps:
                if target in reached and not reached.get(source, set()) <= reached[target]:
                    reached[target] |= reached[source]
                    changed = True
        return {key: frozenset(hooks) for key, hooks in reached.items()}


def read(text: str) -> NftText:
    """Read one file."""
    return _Reader().read(text)


def _targets(words: list[str]) -> Iterator[str]:
    for position, word in enumerate(words[:-1]):
        if word in ("jump", "goto"):
            yield words[position + 1]


def _statements(text: str) -> Iterator[tuple[list[Word], str]]:
    """Words up to each end of line, semicolon, or brace that opens or closes a block (given beside them)."""
    words: list[Word] = []
    line, inner = 1, 0
    for match in _TOKEN.finditer(text):
        here, line = line, line + match[0].count("\n")
        if match["word"] is not None:
            token = match["word"]
            if token == "{" and inner == 0 and _opens_block([word.text for word in words]):
                yield words, "{"
                words = []
            elif token == "}" and inner == 0:
                yield words, "}"
                words = []
            else:
                inner += (token == "{") - (token == "}")
                words.append(Word(token, here))
        elif match["end"] is not None and inner == 0 and words:
            yield words, ""
            words = []
    if words:
        yield words, ""


def _opens_block(words: list[str]) -> bool:
    """Whether a brace after ``words`` opens a table, chain or object rather than a set inside a rule."""
    head = words[1:] if words[:1] and words[0] in ("add", "create") else words
    if not head:
        return False
    return head[0] in ("table", "chain") or (head[0] in _OBJECTS and len(head) <= 4 and "=" not in head)


class _Reader:
    def __init__(self) -> None:
        self._found = NftText()
        self._blocks: list[tuple[str, ...]] = []
        self._defines: dict[str, list[str]] = {}

    def read(self, text: str) -> NftText:
        for words, brace in _statements(text):
            if brace == "{":
                self._open(words)
                continue
            if words:
                self._statement(words)
            if brace == "}" and self._blocks:
                self._blocks.pop()
        return self._found

    def _open(self, words: list[Word]) -> None:
        head = [word.text for word in words if word.text not in ("add", "create")]
        if head[0] == "table":
            family, table, *_ = (*_family(head[1:]), "")
            self._blocks.append(("table", family, table))
        elif head[0] == "chain":
            family, table = self._table(head[1:-1])
            self._blocks.append(("chain", family, table, head[-1]))
            self._found.chains.setdefault(ChainKey(family, table, head[-1]), NftChain(line=words[0].line))
        else:
            self._blocks.append(("object", *head))

    def _table(self, named: list[str]) -> tuple[str, str]:
        """The table a chain belongs to: the one it names, or the block around it."""
        if named:
            family, table, *_ = (*_family(named), "")
            return family, table
        around = next((block for block in reversed(self._blocks) if block[0] == "table"), ("table", "ip", ""))
        return around[1], around[2]

    def _statement(self, words: list[Word]) -> None:
        line = words[0].line
        texts = list(_put_in([word.text for word in words], self._defines))
        block = self._blocks[-1] if self._blocks else ()
        if texts[0] == "define" and "=" in texts:
            self._defines[texts[1]] = texts[texts.index("=") + 1 :]
        elif block and block[0] == "chain":
            self._in_chain(ChainKey(block[1], block[2], block[3]), texts, line)
        elif texts[0] in ("add", "insert", "create") and len(texts) > 4 and texts[1] == "rule":
            family, table, chain, *rest = _family(texts[2:])
            self._found.rules.append(NftRule(ChainKey(family, table, chain), rest, line))
        else:
            self._found.other.append((line, texts))

    def _in_chain(self, key: ChainKey, texts: list[str], line: int) -> None:
        if texts[0] == "type" and "hook" in texts:
            chain = self._found.chains[key]
            chain.kind, chain.hook = texts[1], texts[texts.index("hook") + 1]
        elif texts[0] not in ("policy", "comment", "devices", "device"):
            self._found.rules.append(NftRule(key, texts, line))


def _family(words: list[str]) -> list[str]:
    return words if words and words[0] in _FAMILIES else ["ip", *words]


def _put_in(texts: list[str], defines: Mapping[str, list[str]]) -> Iterator[str]:
    for text in texts:
        if text.startswith("$") and text[1:] in defines:
            yield from defines[text[1:]]
        else:
            yield text
