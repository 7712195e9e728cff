"""Wrong splits: what somebody could break in a directory that ``netslot split`` wrote, at random places.

``broken(files, kind, dice)`` gives the files with one fault of that kind, or None where the directory has nothing
that could be broken so. A fault need not change anything: a rule that is dropped may never have been reached.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

Files = dict[str, str]

_RULES = re.compile(r"(?:root|class\d+)\.rules6?")
_SETS = re.compile(r"root\.sets6?")
_PUBLISHED = re.compile(r"publish\.nft6?")


def _lines(files: Mapping[str, str], names: re.Pattern[str], wanted: Callable[[str], bool]) -> list[tuple[str, int]]:
    return [
        (name, number)
        for name in sorted(files)
        if names.fullmatch(name)
        for number, line in enumerate(files[name].splitlines())
        if wanted(line)
    ]


def _edited(files: Files, place: tuple[str, int], *instead: str) -> Files:
    name, number = place
    lines = files[name].splitlines()
    lines[number : number + 1] = instead
    return files | {name: "\n".join(lines) + "\n"}


def _line(files: Files, place: tuple[str, int]) -> str:
    return files[place[0]].splitlines()[place[1]]


def _table(files: Files, place: tuple[str, int]) -> str:
    return next(x for x in reversed(files[place[0]].splitlines()[: place[1]]) if x.startswith("*"))


def _dropped(files: Files, dice: random.Random) -> Files | None:
    places = _lines(files, _RULES, lambda line: line.startswith("-A "))
    return _edited(files, dice.choice(places)) if places else None


def _nat_lost(files: Files, dice: random.Random) -> Files | None:
    places = [x for x in _lines(files, _RULES, lambda line: line.startswith("-A ")) if _table(files, x) == "*nat"]
    places += _lines(files, _PUBLISHED, lambda line: " : " in line and line.strip()[0].isdigit())
    return _edited(files, dice.choice(places)) if places else None


def _reordered(files: Files, dice: random.Random) -> Files | None:
    """Two neighbours of one chain change places."""
    places = _lines(files, _RULES, lambda line: line.startswith("-A "))
    pairs = [
        (name, number)
        for name, number in places
        if (name, number + 1) in places
        and _line(files, (name, number)).split()[1] == _line(files, (name, number + 1)).split()[1]
        and _line(files, (name, number)) != _line(files, (name, number + 1))
    ]
    if not pairs:
        return None
    name, number = dice.choice(pairs)
    lines = files[name].splitlines()
    lines[number], lines[number + 1] = lines[number + 1], lines[number]
    return files | {name: "\n".join(lines) + "\n"}


def _widened(files: Files, dice: random.Random) -> Files | None:
    """A prefix gets shorter, or a tenant's own address becomes its neighbourhood."""
    found = re.compile(r"(-[sd]) (\S+?)/(\d+)(?=\s)|(-[sd]) \$\{address6?\}")
    places = _lines(files, _RULES, lambda line: line.startswith("-A ") and bool(found.search(line)))
    if not places:
        return None
    place = dice.choice(places)

    def wider(match: re.Match[str]) -> str:
        if match[4]:
            six = "6" in match[0]
            return f"{match[4]} {'2001:db8:a40::/56' if six else '10.64.0.0/24'}"
        return f"{match[1]} {match[2]}/{max(0, int(match[3]) - dice.choice((1, 2, 8)))}"

    return _edited(files, place, found.sub(wider, _line(files, place), count=1))


def _other_hook(files: Files, dice: random.Random) -> Files | None:
    other = {"-A INPUT ": "-A FORWARD ", "-A FORWARD ": "-A INPUT "}
    places = [
        x
        for x in _lines(files, _RULES, lambda line: line.startswith(tuple(other)) and " -o " not in line)
        if _table(files, x) == "*filter" and x[0].startswith("root")
    ]
    if not places:
        return None
    place = dice.choice(places)
    line = _line(files, place)
    old = next(start for start in other if line.startswith(start))
    return _edited(files, place, line.replace(old, other[old], 1))


def _stateless(files: Files, dice: random.Random) -> Files | None:
    asks = re.compile(r" -m (?:conntrack !? ?--ctstate|state !? ?--state) \S+")
    places = _lines(files, _RULES, lambda line: bool(asks.search(line)))
    if not places:
        return None
    place = dice.choice(places)
    return _edited(files, place, asks.sub("", _line(files, place), count=1))


def _exchanged(files: Files, dice: random.Random, *keys: str) -> Files | None:
    """Two tenants' values of these keys change places; ``variables.X`` is one of the template's."""
    manifest: dict[str, Any] = json.loads(files["tenants.json"])
    people = manifest["tenants"]
    one, other = dice.sample(people, 2)
    for key in keys:
        head, _, inner = key.partition(".")
        a, b = (one[head], other[head]) if inner else (one, other)
        name = inner or head
        if name not in a or a[name] == b[name]:
            return None
        a[name], b[name] = b[name], a[name]
    return files | {"tenants.json": json.dumps(manifest, indent=1)}


def _element_lost(files: Files, dice: random.Random) -> Files | None:
    places = _lines(files, _SETS, lambda line: line.startswith("add "))
    return _edited(files, dice.choice(places)) if places else None


def _policy(files: Files, dice: random.Random) -> Files | None:
    places = _lines(
        files, _RULES, lambda line: re.match(r":(?:INPUT|FORWARD|OUTPUT) (?:ACCEPT|DROP)", line) is not None
    )
    places = [place for place in places if _table(files, place) == "*filter"]
    if not places:
        return None
    place = dice.choice(places)
    line = _line(files, place)
    changed = line.replace(" ACCEPT ", " DROP ") if " ACCEPT " in line else line.replace(" DROP ", " ACCEPT ")
    return _edited(files, place, changed)


def _ports_exchanged(files: Files, dice: random.Random) -> Files | None:
    """Two published ports lead to each other's tenant."""
    places = _lines(files, _PUBLISHED, lambda line: " : " in line and line.strip()[0].isdigit())
    if len(places) < 2:
        return None
    one, other = dice.sample(places, 2)
    if one[0] != other[0]:
        return None
    (p, a), (q, b) = (_line(files, x).split(" : ") for x in (one, other))
    return _edited(_edited(files, one, f"{p} : {b}"), other, f"{q} : {a}")


FAULTS: Mapping[str, Callable[[Files, random.Random], Files | None]] = {
    "rule dropped": _dropped,
    "order changed": _reordered,
    "mask widened": _widened,
    "hook swapped": _other_hook,
    "state match removed": _stateless,
    "interface exchanged between tenants": lambda files, dice: _exchanged(files, dice, "link"),
    "address exchanged between tenants": lambda files, dice: _exchanged(
        files, dice, "variables.address6" if "root.rules6" in files else "variables.address"
    ),
    "template exchanged between tenants": lambda files, dice: _exchanged(files, dice, "class"),
    "NAT lost": _nat_lost,
    "set element missing": _element_lost,
    "policy changed": _policy,
    "published port exchanged": _ports_exchanged,
}


def broken(files: Mapping[str, str], kind: str, dice: random.Random) -> Files | None:
    """The files with one fault; None when there is nothing to break, or nothing changed."""
    found = FAULTS[kind](dict(files), dice)
    return None if found is None or found == dict(files) else found
