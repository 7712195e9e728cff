"""Hosts where a rule that stands for all tenants would say too much: they split another way, and are proved."""

from __future__ import annotations

import pytest

from netslot.rulesets.attribute import attribute
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import prove
from netslot.rulesets.split import Split, split

_HOOKS = {
    "raw": {"PREROUTING": "ACCEPT", "OUTPUT": "ACCEPT"},
    "nat": dict.fromkeys(("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"), "ACCEPT"),
    "filter": {"INPUT": "DROP", "FORWARD": "DROP", "OUTPUT": "ACCEPT"},
}
_SPOOF = "raw -A PREROUTING ! -s {a}/32 -i {l} -j DROP"
_OUT = "filter -A FORWARD -i {l} -o ens5 -j ACCEPT"
_HOST = ["filter -A INPUT -d 198.51.100.7/32 -p tcp -m tcp --dport 22 -j ACCEPT"]
_IN = ["filter -A FORWARD -o {l} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"]
_COUNT = "-p udp -m hashlimit --hashlimit-above 9/sec --hashlimit-mode srcip --hashlimit-name u -j DROP"

HOSTS: dict[str, list[str]] = {
    "whose rules stand first": [
        *("filter -A FORWARD -i {l} -p tcp -m tcp --dport 25 -j DROP", *_IN),
        *(_OUT, "filter -A FORWARD -o {l} -j REJECT --reject-with icmp-host-prohibited"),
    ],
    "a chain that is not come back from": [
        *("filter :o{k}", "filter -A FORWARD -i {l} -g o{k}", *_IN),
        *("filter -A o{k} -p tcp -m tcp --dport 25 -j DROP", "filter -A o{k} -o ens5 -j ACCEPT"),
    ],
    "a count in a chain": [
        *("filter :o{k}", "filter -A FORWARD -i {l} -j o{k}"),
        *(f"filter -A o{{k}} {_COUNT}", "filter -A o{k} -j ACCEPT"),
    ],
    "an address lent to one": [
        _OUT,
        "nat -A POSTROUTING -s {a}/32 -d 203.0.113.0/24 -o ens5 -j SNAT --to-source 192.0.2.{k}",
    ],
    "its own published port": [
        *(_SPOOF, _OUT, "filter -A FORWARD -o {l} -p tcp -m tcp --dport 80 -j ACCEPT"),
        "nat -A PREROUTING -d 198.51.100.7/32 -p tcp -m tcp --dport 4100{k} -j DNAT --to-destination {a}:80",
        "nat -A POSTROUTING -s {a}/32 -d {a}/32 -p tcp -m tcp --dport 80 -j MASQUERADE",
    ],
    "local addresses": [
        *("filter -A FORWARD -i {l} -m addrtype --dst-type LOCAL -j REJECT", _OUT),
    ],
    "several addresses": [
        *(f"raw -A PREROUTING -s {a}/32 -i {{l}} -j ACCEPT" for a in ("{a}", "203.0.113.{k}")),
        *("raw -A PREROUTING -i {l} -j DROP", _OUT, "filter -A INPUT -s 203.0.113.{k}/32 -i {l} -j ACCEPT"),
    ],
}
"""Rules of one tenant; global ones stand before them."""

_GLOBAL = {
    "local addresses": [
        "filter -A FORWARD -d 10.0.0.0/8 -j REJECT --reject-with icmp-net-prohibited",
        "filter -A FORWARD -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW -j DROP",
    ],
}


def _split(name: str) -> tuple[str, Split]:
    lines = [*_HOST, *_GLOBAL.get(name, ())]
    for k in (1, 2, 3):
        names = {"l": f"tap{k}", "a": f"100.64.0.{4 * k + 2}", "k": k}
        own = [*HOSTS[name], "filter -A INPUT -s {a}/32 -i {l} -p icmp -j ACCEPT"]
        lines += [line.format(**names) for line in own]
    text: list[str] = []
    for table, hooks in _HOOKS.items():
        rules = [line.partition(" ")[2] for line in lines if line.startswith(f"{table} ")]
        text += [f"*{table}", *(f":{hook} {policy} [0:0]" for hook, policy in hooks.items())]
        text += [f"{rule} - [0:0]" for rule in rules if rule.startswith(":")]
        text += [*(rule for rule in rules if not rule.startswith(":")), "COMMIT"]
    whole = "\n".join(text) + "\n"
    dump = parse(whole)
    return whole, split(dump, attribute(dump).tenants)


@pytest.mark.parametrize("name", HOSTS)
def test_what_no_rule_can_say_for_all_is_kept_and_proved(name: str) -> None:
    text, result = _split(name)
    assert result.refused == []
    dump = parse(text)
    verdict = prove(dump, survey(dump, attribute(dump).tenants), read(result.files), enough=1)
    assert verdict.equivalent, (verdict.counterexamples, verdict.obstacles)


def test_frames_that_only_a_slot_sees_are_refused_by_name_where_root_decides() -> None:
    HOSTS["frames"] = ["filter -A FORWARD -i {l} -m mac ! --mac-source 02:00:00:00:00:0{k} -j DROP", *_IN, _OUT]
    try:
        _, result = _split("frames")
    finally:
        del HOSTS["frames"]
    assert result.refused
    assert "only the slot sees" in result.refused[0]
