"""Hosts where it matters between two tenants whose rules stand first: root keeps the order, and names nobody."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from netslot.rulesets.model import Family
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.comparing import compared_bits, out_of_order
from netslot.rulesets.proof.journey import Attachment
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import Verdict, prove
from netslot.rulesets.proof.standing import standings
from netslot.rulesets.proof.tagged import FiledRuleset
from netslot.rulesets.split import Split, split
from netslot.rulesets.tenants import Tenant, TenantAddress
from netslot.spec.load import load

NAMES = [f"vm{k}" for k in range(1, 7)]
OUT = ["-p tcp -m tcp --dport 25 -j DROP", "-m conntrack --ctstate ESTABLISHED -j ACCEPT", "-j ACCEPT"]
IN = ["-m conntrack --ctstate ESTABLISHED -j ACCEPT", "-p tcp -m tcp --dport 80 -j ACCEPT", "-j DROP"]
Files = dict[str, str]


def tenants() -> list[Tenant]:
    return [
        Tenant(name, (name,), (TenantAddress(4, 0x0A4D0002 + 4 * k, 0xFFFFFFFF),)) for k, name in enumerate(NAMES)
    ]


def host(layout: str, *, classes: int = 2, again: bool = False) -> str:
    """Each tenant behind dispatch rules; ``layout``: how these stand. ``again``: a second row, in another order."""
    lines = ["*filter", ":INPUT ACCEPT [0:0]", ":FORWARD DROP [0:0]", ":OUTPUT ACCEPT [0:0]"]
    lines += [f":{name}-{way} - [0:0]" for name in NAMES for way in ("out", "in")]
    sent, got = (
        [f"-A FORWARD {flag} {name} -j {name}-{way}" for name in NAMES] for flag, way in (("-i", "out"), ("-o", "in"))
    )
    rows = {
        "each": [line for pair in zip(sent, got, strict=True) for line in pair],
        "senders": [*sent, *got],
        "receivers": [*got, *sent],
        "mixed": [sent[0], sent[1], got[0], got[1], *sent[2:], *got[2:]],
    }
    lines += rows[layout]
    if again:
        lines += ["-A FORWARD -p icmp -j DROP"]
        lines += [
            f"-A FORWARD {flag} {name} -p udp -j {to}"
            for name in reversed(NAMES)
            for flag, to in (("-i", "ACCEPT"), ("-o", "DROP"))
        ]
    for k, name in enumerate(NAMES):
        own = [f"-p tcp -m tcp --dport {3300 + k % classes} -j DROP", *OUT]
        lines += [f"-A {name}-out {rule}" for rule in own] + [f"-A {name}-in {rule}" for rule in IN]
    return "\n".join([*lines, "COMMIT", ""])


def proof(text: str, files: Mapping[str, str]) -> Verdict:
    dump = parse(text)
    return prove(dump, survey(dump, tenants(), ()), read(files))


@functools.cache
def moved(text: str) -> Split:
    found = split(parse(text), tenants(), attachment="process")
    assert not found.refused
    return found


@pytest.mark.parametrize("layout", ["each", "senders", "receivers"])
def test_root_keeps_the_order_and_names_nobody(layout: str) -> None:
    text = host(layout)
    found = moved(text)
    root = found.files["root.rules"]
    assert not any(name in root for name in NAMES)
    assert ("netslot-order" in root) == (layout == "each")
    assert proof(text, found.files).equivalent


def test_rules_that_stand_in_no_order_are_kept_as_they_were() -> None:
    text = host("mixed")
    found = moved(text)
    assert any("they stand in no order that all have" in note for note in found.notes)
    assert "-i vm3 -j vm3-out" in found.files["root.rules"]
    assert proof(text, found.files).equivalent


def test_two_orders_on_one_host_have_no_number() -> None:
    text = host("each", again=True)
    assert proof(text, moved(text).files).equivalent


@pytest.mark.parametrize("attachment", ["tap", "process"])
def test_slots_can_be_built_for_them(attachment: Attachment, tmp_path: Path) -> None:
    """A class whose links have a number each is still one class."""
    dump = parse(host("each"))
    address: tuple[Family, int] = (4, 0xC6336401)
    found = split(dump, tenants(), attachment=attachment, host_addresses=[address])
    for name, text in found.files.items():
        (tmp_path / name).write_text(text)
    spec = load(tmp_path / "netslot.toml")
    assert sorted(len(each.residents or {}) for each in spec.classes.values()) == [3, 3]
    assert prove(dump, survey(dump, tenants(), [address]), read(found.files)).equivalent


def _numbers(change: Callable[[list[int]], None]) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        manifest = json.loads(files["tenants.json"])
        groups = [tenant["group"] for tenant in manifest["tenants"]]
        change(groups)
        for tenant, group in zip(manifest["tenants"], groups, strict=True):
            tenant["group"] = group
        files["tenants.json"] = json.dumps(manifest)

    return edit


def _exchanged(groups: list[int]) -> None:
    groups[1], groups[3] = groups[3], groups[1]


def _the_same(groups: list[int]) -> None:
    groups[4] = groups[2]


def _text(old: str, new: str) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        assert old in files["root.rules"]
        files["root.rules"] = files["root.rules"].replace(old, new, 1)

    return edit


LESS = "-m devgroup --src-group 0x0/0x2 --dst-group 0x2/0x2 -g netslot-sender-0\n"
MORE = "-m devgroup --src-group 0x2/0x2 --dst-group 0x0/0x2 -g netslot-receiver-1\n"
LOWER = "-m devgroup --src-group 0x0/0x1 --dst-group 0x1/0x1 -g netslot-sender-0\n"


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(_numbers(_exchanged), id="two numbers exchanged"),
        pytest.param(_numbers(_the_same), id="two links with one number"),
        pytest.param(_text(f"-A netslot-order-2 {LESS}", ""), id="a comparison lost"),
        pytest.param(_text(LESS, LESS.replace("sender-0", "receiver-1")), id="a comparison that leads elsewhere"),
        pytest.param(_text(MORE, MORE.replace("--dst-group 0x0/0x2", "--dst-group 0x2/0x2")), id="a bit changed"),
        pytest.param(_text(LESS, f"{LOWER}-A netslot-order-2 {LESS}"), id="a lower bit first"),
        pytest.param(_text("-o vm+ -j netslot-order-2", "-o vm+ -j netslot-sender-0"), id="no comparison"),
    ],
)
def test_a_wrong_order_is_found(edit: Callable[[Files], None]) -> None:
    text = host("each")
    files = dict(moved(text).files)
    edit(files)
    verdict = proof(text, files)
    assert verdict.counterexamples


def test_a_rule_that_asks_for_one_number_is_looked_at_tenant_by_tenant() -> None:
    text = host("each", classes=1)
    files = dict(moved(text).files)
    _text(
        "-A FORWARD -i vm+ -o vm+", "-A FORWARD -m devgroup --src-group 0x50000003 -j DROP\n-A FORWARD -i vm+ -o vm+"
    )(files)
    assert compared_bits([parse(files["root.rules"]).rulesets[0]]) == 0
    assert {found.tenant for found in proof(text, files).counterexamples} == {"vm4"}


def test_numbers_that_do_not_rise_and_those_they_stand_wrongly_to() -> None:
    assert out_of_order([0, 1, 2, 3], [10, 20, 30, 40], [0, 0, 0, 0]) == set()
    assert out_of_order([0, 1, 2, 3], [10, 40, 20, 30], [0, 0, 0, 1]) == {1, 2, 3}
    assert out_of_order([3, 2, 1, 0], [40, 30, 20, 10], [0, 0, 0, 0]) == set()
    assert out_of_order(range(100), [-place for place in range(100)], [0] * 100) is None


@pytest.mark.parametrize(
    ("layout", "mode"), [("each", "order"), ("senders", "in"), ("receivers", "out"), ("mixed", "mixed")]
)
def test_how_rules_stand(layout: str, mode: str) -> None:
    dump = parse(host(layout))
    (standing,) = standings(FiledRuleset(dump.rulesets[0], survey(dump, tenants(), ())))
    assert standing.mode == mode
    assert standing.tenants == (tuple(range(6)) if mode == "order" else ())
