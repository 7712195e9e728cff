"""Rules that count for one tenant: in its slot where it sees all that they count, else in root; the same verdicts."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from count_hosts import COUNTS, OPEN, SYN, CountHost, any_host
from netslot.rulesets.model import Family
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.arrangement import read
from netslot.rulesets.proof.places import survey
from netslot.rulesets.proof.prover import Verdict, prove
from netslot.rulesets.proof.tagged import FiledRuleset
from netslot.rulesets.split import Split, split
from netslot.rulesets.tenants import Tenant, TenantAddress

HOST: tuple[Family, int] = (4, 0xC6336401)
LIMIT = COUNTS["limit"]
USUAL = CountHost(
    range(4),
    [["-d 169.254.169.254/32 -j DROP", f"-o eth0 {SYN} {LIMIT} -j ACCEPT", "-o eth0 -p udp -j ACCEPT"]],
    [["-p tcp -m tcp --dport 8080 -j ACCEPT"]],
)


def moved(host: CountHost) -> tuple[Split, Verdict]:
    dump = parse(host.text())
    tenants = [
        Tenant(f"tap{k}", (f"tap{k}",), (TenantAddress(4, 0x0A010002 + 4 * place, 0xFFFFFFFF),))
        for k, place in enumerate(host.places)
    ]
    found = split(dump, tenants, host_addresses=[HOST])
    assert not found.refused
    return found, prove(dump, survey(dump, tenants, [HOST]), read(found.files))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("by_tenant", [False, True])
def test_a_count_of_what_leaves_by_the_uplink_is_the_slots(count: str, chains: bool, by_tenant: bool) -> None:
    sizes = set()
    for tenants in (4, 8):
        out = [[rule.replace(LIMIT, COUNTS[count]) for rule in USUAL.out[0]]]
        found, verdict = moved(replace(USUAL, places=range(tenants), out=out, chains=chains, by_tenant=by_tenant))
        assert verdict.equivalent
        assert f"-m {count} " not in found.files["root.rules"]
        assert found.files["class0.rules"].count(f"-m {count} ") == 1
        sizes.add(found.files["root.rules"].count("\n-A "))
    assert len(sizes) == 1, "root does not grow with tenants"


def test_where_packets_between_tenants_were_ended_before_a_count_may_be_of_all_the_rest() -> None:
    out = [[f"{SYN} {LIMIT} -j ACCEPT"]]
    found, verdict = moved(replace(USUAL, out=out, common=[OPEN, "-i tap+ -o tap+ -j DROP"]))
    assert verdict.equivalent
    assert "-m limit" not in found.files["root.rules"]


METADATA = "-d 169.254.169.254/32 -i tap+ -p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.9:8080"
PUBLISHED = "-d 198.51.100.1/32 -p tcp -m tcp --dport 30000 -j DNAT --to-destination 10.1.0.2:8080"
STAYS = {
    "it counts packets between tenants too": replace(USUAL, out=[[f"{SYN} {LIMIT} -j ACCEPT"]]),
    "root may send what it translates outside": replace(USUAL, nat=[METADATA]),
    "a count of all may come before it": replace(USUAL, common=["-p tcp -m limit --limit 10/sec -j ACCEPT"]),
    "later packets of translated connections": replace(USUAL, nat=[PUBLISHED], common=[]),
    "no few patterns hold tenants alone": replace(USUAL, places=[3 * k for k in range(20)]),
}


@pytest.mark.parametrize("why", STAYS)
def test_a_count_that_a_slot_would_see_in_part_stays_in_root(why: str) -> None:
    host = STAYS[why]
    found, verdict = moved(host)
    assert verdict.equivalent
    assert found.files["root.rules"].count("-m limit --limit 50/sec") == len(host.places)
    assert "-m limit --limit 50/sec" not in found.files["class0.rules"]


ABOVE = "-o eth0 -m hashlimit --hashlimit-above 50/sec --hashlimit-mode {} --hashlimit-name all -j DROP"
SHARED = {
    "one for each destination": replace(USUAL, out=[[ABOVE.format("dstip"), "-j ACCEPT"]]),
    "one for all": replace(USUAL, out=[[ABOVE.replace("--hashlimit-mode {} ", ""), "-j ACCEPT"]]),
    "one for each source, under which others may send": replace(
        USUAL, out=[[ABOVE.format("srcip"), "-j ACCEPT"]], spoofing=True
    ),
    "one that a rule for all asks too": replace(
        USUAL,
        out=[[ABOVE.format("dstip").replace("all", "tap0"), "-j ACCEPT"]],
        places=[0],
        after=[ABOVE.format("dstip").replace("all", "tap0")],
    ),
}


@pytest.mark.parametrize("what", SHARED)
def test_a_memory_that_tenants_share_by_its_name_stays_in_root(what: str) -> None:
    host = SHARED[what]
    found, verdict = moved(host)
    assert verdict.equivalent
    assert "hashlimit" not in found.files["class0.rules"]
    assert found.files["root.rules"].count("hashlimit-above") == len(host.places) + len(host.after)


@pytest.mark.parametrize("what", SHARED)
def test_such_a_memory_in_each_slot_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = replace(SHARED[what], after=[])
    with monkeypatch.context() as blind:
        blind.setattr(FiledRuleset, "shared_memories", frozenset())
        found, verdict = moved(host)
        assert "hashlimit-above" in found.files["class0.rules"]
        assert verdict.equivalent, "but for what the tables are called"
    dump = parse(replace(host, after=SHARED[what].after).text())
    assert not prove(dump, survey(dump, list(found.places.tenants), [HOST]), read(found.files)).equivalent


def test_a_memory_with_a_count_for_each_source_is_each_tenants_own() -> None:
    found, verdict = moved(replace(USUAL, out=[[ABOVE.format("srcip"), "-j ACCEPT"]]))
    assert verdict.equivalent
    assert "hashlimit" in found.files["class0.rules"]
    assert "hashlimit" not in found.files["root.rules"]


NAMED = (
    "-o eth0 -p tcp -m tcp --dport {1} -m hashlimit --hashlimit-upto 50/sec --hashlimit-mode dstip "
    "--hashlimit-name {0}-{1} -j ACCEPT"
)


def named(places: range) -> CountHost:
    """A host of whose tenants each has two memories of its own."""
    own = [[NAMED.format(f"vm{k}", port) for port in (80, 443)] for k in places]
    return replace(USUAL, places=places, out=own)


@pytest.mark.parametrize("chains", [False, True])
def test_memories_with_a_name_for_each_tenant_make_no_classes(chains: bool) -> None:
    for tenants in (4, 7):
        found, verdict = moved(replace(named(range(tenants)), chains=chains))
        assert verdict.equivalent
        assert verdict.classes <= 3, "of addresses that the host's patterns tell apart"
        assert "hashlimit" not in found.files["root.rules"]
        assert found.files["class0.rules"].count("hashlimit-name") == 2


def test_exchanged_names_are_found() -> None:
    host = named(range(4))
    dump = parse(host.text())
    found, _ = moved(host)
    swap = {"vm0-80": "vm0-443", "vm0-443": "vm0-80"}
    text = re.sub(r"vm0-\d+", lambda name: swap[name.group()], found.files["class0.rules"])
    files = dict(found.files) | {"class0.rules": text}
    assert not prove(dump, survey(dump, list(found.places.tenants), [HOST]), read(files)).equivalent


EDITS = {
    "the slot no longer counts": ("class0.rules", f" {LIMIT} ", " "),
    "it counts otherwise": ("class0.rules", "--limit 50/sec", "--limit 500/sec"),
    "it counts more": ("class0.rules", "--tcp-flags FIN,SYN,RST,ACK SYN ", ""),
    "root takes up what slots decide": ("root.rules", "-d 10.1.0.2/255.255.255.243 -j RETURN", "-j RETURN"),
    "slots leave more to root": ("class0.rules", "-d 10.1.0.2/255.255.255.243", "-d 10.1.0.2/255.255.0.3"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_count_is_found(name: str) -> None:
    file, old, new = EDITS[name]
    dump = parse(USUAL.text())
    found, _ = moved(USUAL)
    assert old in found.files[file]
    files = dict(found.files) | {file: found.files[file].replace(old, new)}
    tenants = found.places.tenants
    assert not prove(dump, survey(dump, list(tenants), [HOST]), read(files)).equivalent


@pytest.mark.parametrize("seed", range(30))
def test_any_host_is_the_same(seed: int) -> None:
    _, verdict = moved(any_host(seed))
    assert verdict.equivalent
