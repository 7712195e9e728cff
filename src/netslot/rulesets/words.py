"""The lexical level of iptables-save: words, quotes, escapes.

The rules are those of iptables itself: ``"`` opens and closes a quoted word, a backslash escapes the next
character inside quotes only, and everything else is split at blanks
(iptables 1.8.9: add_param_to_argv in iptables/xshared.c, xtables_save_string in libxtables/xtables.c).
"""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[A-Za-z0-9_-]+\Z")
_ESCAPED = re.compile(r"([\"\\'])")


def split(text: str) -> list[str]:
    """The words of one line.

    Raises ValueError when a quote is left open.
    """
    if '"' not in text:
        return text.split()
    words: list[str] = []
    position, end = 0, len(text)
    while position < end:
        character = text[position]
        if character in " \t":
            position += 1
        elif character == '"':
            word, position = _quoted(text, position + 1)
            words.append(word)
        else:
            start = position
            while position < end and text[position] not in ' \t"':
                position += 1
            head = text[start:position]
            if position < end and text[position] == '"':
                tail, position = _quoted(text, position + 1)
                head += tail
            words.append(head)
    return words


def _quoted(text: str, start: int) -> tuple[str, int]:
    """The text up to the closing quote, and the place after it."""
    closing = text.find('"', start)
    if closing < 0:
        raise ValueError('a quote (") is opened and never closed')
    plain = text[start:closing]
    if "\\" not in plain:
        return plain, closing + 1
    parts: list[str] = []
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\" and position + 1 < len(text):
            parts.append(text[position + 1])
            position += 2
        elif character == '"':
            return "".join(parts), position + 1
        else:
            parts.append(character)
            position += 1
    raise ValueError('a quote (") is opened and never closed')


def quote(word: str) -> str:
    """One word as iptables-save prints a free text (a comment, a log prefix)."""
    if _PLAIN.match(word):
        return word
    return '"' + _ESCAPED.sub(r"\\\1", word) + '"'


def join(words: tuple[str, ...]) -> str:
    """Words to a line that splits into the same words; only those that need quotes get them."""
    return " ".join(quote(word) if not word or any(c in ' \t"\\' for c in word) else word for word in words)
