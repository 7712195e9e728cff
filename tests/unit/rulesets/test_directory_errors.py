"""A directory that somebody edited: whatever is wrong in it is told with its file, and never ends in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netslot.errors import SpecError
from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.split import split
from synthetic_host import make_host

Files = dict[str, str]
DUMP = parse(make_host(3).text)
TENANTS = attribute(DUMP).tenants
FILES: Mapping[str, str] = {n: t for n, t in split(DUMP, TENANTS).files.items() if n != "report.json"}
READ = sorted(FILES.keys() - {"before.rules", "netslot.toml"})
"""The files that make the arrangement; the others are for ``migrate`` and ``up``."""


def _changed(name: str, old: str, new: str) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        assert old in files[name]
        return files | {name: files[name].replace(old, new, 1)}

    return change


def _manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Files], Files]:
    def edit(files: Files) -> Files:
        found = json.loads(files["tenants.json"])
        change(found)
        return files | {"tenants.json": json.dumps(found, indent=1)}

    return edit


def _without(name: str) -> Callable[[Files], Files]:
    return lambda files: {other: text for other, text in files.items() if other != name}


EDITS: dict[str, tuple[Callable[[Files], Files], str]] = {
    "root: a line that is none": (lambda f: f | {"root.rules": "nonsense\n" + f["root.rules"]}, "root.rules:1"),
    "root: an option without value": (_changed("root.rules", "-j DROP", "-j"), "root.rules:"),
    "root: a jump to nowhere": (_changed("root.rules", ":netslot-from - [0:0]\n", ""), "netslot-from"),
    "root: not there": (_without("root.rules"), "root.rules"),
    "template: a line that is none": (_changed("class1.rules", "COMMIT\n", "COMIT\n"), "class1.rules:"),
    "template: a jump to nowhere": (_changed("class1.rules", ":netslot-out - [0:0]\n", ""), "class1.rules:"),
    "template: a variable nobody has": (_changed("class2.rules", "${address}", "${adress}"), "class2.rules:"),
    "template: not there": (_without("class0.rules"), "class0.rules"),
    "template: one too many": (lambda f: f | {"class9.rules": f["class0.rules"]}, "class9.rules"),
    "published: a rule of somebody's": (_changed("publish.nft", "\tchain", "\tdrop\n\tchain"), "publish.nft:"),
    "published: no address": (_changed("publish.nft", "10.64.0.10", "10"), "publish.nft:5:"),
    "published: no port": (_changed("publish.nft", "30002 :", "80000 :"), "publish.nft:5:"),
    "manifest: not there": (_without("tenants.json"), "tenants.json"),
    "manifest: no JSON": (_changed("tenants.json", "{", ""), "tenants.json:"),
    "manifest: a list": (lambda f: f | {"tenants.json": "[]"}, "tenants.json: expected an object"),
    "manifest: no classes": (_manifest(lambda x: x.pop("classes")), "tenants.json: classes"),
    "manifest: a class unknown": (_manifest(lambda x: x["tenants"][1].update({"class": "x"})), "tenant tap1"),
    "manifest: a group that is a text": (_manifest(lambda x: x["tenants"][0].update(group="7")), "tap0.group"),
    "manifest: an odd attachment": (_manifest(lambda x: x.update(attachment="wifi")), "attachment"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_wrong_directory_is_told_with_file_and_place(edit: str) -> None:
    change, place = EDITS[edit]
    with pytest.raises(SpecError) as caught:
        read(change(dict(FILES)))
    assert place in str(caught.value)


def test_the_directory_of_a_family_that_the_dump_has_not_is_no_proof() -> None:
    six = "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n"
    verdict = prove(DUMP, survey(DUMP, TENANTS), read({**FILES, "root.rules6": six}), enough=1)
    assert any("IPv6" in text for text in verdict.obstacles)


@st.composite
def _damaged(draw: st.DrawFn) -> Files:
    """One file with a line dropped, doubled, cut, exchanged or with odd characters in it."""
    name = draw(st.sampled_from(READ))
    lines = FILES[name].splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    line = lines[place]
    match draw(st.sampled_from(("drop", "double", "cut", "exchange", "insert", "truncate"))):
        case "drop":
            lines.pop(place)
        case "double":
            lines.insert(place, line)
        case "cut":
            lines[place] = line[: draw(st.integers(0, len(line)))] + "\n"
        case "exchange":
            other = draw(st.integers(0, len(lines) - 1))
            lines[place], lines[other] = lines[other], line
        case "insert":
            at = draw(st.integers(0, len(line)))
            lines[place] = line[:at] + draw(st.text(max_size=4)) + line[at:]
        case "truncate":
            lines = lines[:place]
    return dict(FILES) | {name: "".join(lines)}


@given(_damaged())
@settings(max_examples=120, deadline=None)
def test_a_damaged_directory_is_read_or_refused(files: Files) -> None:
    try:
        found = read(files)
    except SpecError as error:
        assert error.message
        return
    assert found.root
