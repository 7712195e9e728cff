"""Random rulesets of one host, and a kernel that judges what the model says of packets that meet them.

The host has three tenants and an interface to the outside. Rules are made of every condition that is modelled and
every target that ends, moves or marks; they are what a host's root could hold, not what anybody would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hypothesis import strategies as st

from netslot.host.replay import staged
from netslot.host.replay_links import Scene, SetContents
from netslot.host.replay_stage import Rules, Stage
from netslot.host.replay_trial import Replayed, Trial
from netslot.rulesets.model import Family
from netslot.rulesets.parse import parse
from netslot.rulesets.proof.journey import Side
from netslot.rulesets.proof.places import Places
from netslot.rulesets.proof.samples import samples
from netslot.rulesets.proof.tagged import FiledRuleset
from netslot.rulesets.tenants import Tenant, TenantAddress
from synthetic_host import as_ipv6

OUTSIDE = ("eth0",)
HOST = "192.0.2.1"
TENANTS = {"tap0": "10.64.0.2", "tap1": "10.64.0.6", "vm-a": "10.64.0.10"}
GATEWAYS = {"tap0": "10.64.0.1", "tap1": "10.64.0.5", "vm-a": "10.64.0.9"}
MACS = {"tap0": "02:aa:00:00:00:01", "tap1": "02:aa:00:00:00:02", "vm-a": "02:bb:00:00:00:01"}
SETS = {4: ("few", "more"), 6: ("few6", "more6")}

BEFORE, HERE, THROUGH, OUT, AFTER = "PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"
CHAINS = {
    "raw": (BEFORE, OUT),
    "mangle": (BEFORE, HERE, THROUGH, OUT, AFTER),
    "nat": (BEFORE, HERE, OUT, AFTER),
    "filter": (HERE, THROUGH, OUT),
}
_IN, _OUT = (BEFORE, HERE, THROUGH), (THROUGH, OUT, AFTER)

_STATES = ("NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED", "RELATED,ESTABLISHED", "NEW,INVALID")
_ANYWHERE = (
    *(f"-s {a}" for a in ("10.64.0.2/32", "10.64.0.0/29", "203.0.113.0/25", "192.0.2.1/32", "10.64.0.6/32")),
    *(f"-d {a}" for a in ("10.64.0.6/32", "10.64.0.8/29", "203.0.113.128/26", "192.0.2.1/32", "10.64.0.0/24")),
    "-p tcp",
    "-p udp",
    "-p icmp",
    "! -p tcp",
    *(f"-p tcp -m tcp --dport {p}" for p in ("22", "1000:2000", "8080", ":1023")),
    "-p tcp -m tcp ! --dport 80",
    "-p tcp -m tcp --sport 1024:40000",
    "-p udp -m udp --dport 53",
    "-p udp -m udp ! --sport 5000:65535",
    "-p udp -m multiport --dports 53,123,4000:4100",
    "-p tcp -m multiport ! --dports 22,80:90",
    "-p tcp -m multiport --ports 22,30000:40000",
    "-p icmp -m icmp --icmp-type 8",
    "-p icmp -m icmp ! --icmp-type 8",
    "-p icmp -m icmp --icmp-type 0",
    "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN",
    "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN",
    "-p tcp -m tcp --tcp-flags SYN,ACK ACK",
    *(f"-m conntrack --ctstate {s}" for s in _STATES),
    *(f"-m conntrack ! --ctstate {s}" for s in _STATES[:5]),
    "-m state --state NEW",
    "-m state --state RELATED,ESTABLISHED",
    "-m conntrack --ctdir ORIGINAL",
    "-m conntrack --ctdir REPLY",
    "-m conntrack --ctstate DNAT",
    "-m conntrack ! --ctstate DNAT",
    "-m mark --mark 0x1",
    "-m mark ! --mark 0x2/0x2",
    "-m mark --mark 0x4/0x6",
    "-m connmark --mark 0x1",
    "-m connmark ! --mark 0x1",
    "-m connmark --mark 0x2/0x2",
    "-m addrtype --dst-type LOCAL",
    "-m addrtype ! --dst-type LOCAL",
    "-m addrtype --src-type LOCAL",
    "-m addrtype --dst-type UNICAST",
    "-m addrtype ! --src-type UNICAST --dst-type LOCAL",
    "-m iprange --dst-range 203.0.113.10-203.0.113.200",
    "-m iprange ! --src-range 10.64.0.2-10.64.0.6",
    "-m length --length 0:60",
    "-m length ! --length 48:200",
    "-m ttl --ttl-lt 64",
    "-m ttl --ttl-eq 63",
    "-m ttl --ttl-gt 100",
    "-m dscp --dscp 0x00",
    "-m dscp ! --dscp 0x10",
    "-m pkttype --pkt-type unicast",
    "-m pkttype ! --pkt-type unicast",
    "-m set --match-set few src",
    "-m set ! --match-set few dst",
    "-m set --match-set more dst",
    "",
)
_INWARD = (
    *(f"-i {name}" for name in ("tap0", "tap+", "eth0", "eth+", "vm-a")),
    "! -i tap1",
    "! -i eth+",
    "-m mac --mac-source 02:aa:00:00:00:01",
    "-m mac ! --mac-source 02:aa:00:00:00:02",
    "-m devgroup --src-group 0x0",
    "-m devgroup ! --src-group 0x7",
    "-m addrtype --dst-type LOCAL --limit-iface-in",
)
_OUTWARD = (
    *(f"-o {name}" for name in ("tap0", "tap+", "eth0", "vm-a")),
    "! -o tap+",
    "-m devgroup --dst-group 0x0",
    "-m devgroup ! --dst-group 0x0",
    "-m addrtype --src-type LOCAL --limit-iface-out",
)
_MARKS = (
    "-j MARK --set-xmark 0x1/0xffffffff",
    "-j MARK --set-xmark 0x2/0x2",
    "-j MARK --set-xmark 0x4/0x0",
    "-j MARK --set-xmark 0x0/0xffffffff",
    "-j CONNMARK --set-xmark 0x1/0xffffffff",
    "-j CONNMARK --set-xmark 0x2/0x2",
    "-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
    "-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
    "-j CONNMARK --restore-mark --nfmask 0x1 --ctmask 0x3",
)
_REJECTS = (
    "-j REJECT --reject-with icmp-port-unreachable",
    "-j REJECT --reject-with icmp-host-prohibited",
    "-p tcp -j REJECT --reject-with tcp-reset",
)
_TARGETS = {
    "raw": ("-j ACCEPT", "-j DROP", "-j CT --notrack", "-j RETURN", ""),
    "mangle": ("-j ACCEPT", "-j DROP", "-j RETURN", *_MARKS, *_MARKS),
    "filter": ("-j ACCEPT", "-j ACCEPT", "-j DROP", "-j RETURN", "", *_REJECTS),
}
_TRANSLATIONS = {
    BEFORE: (
        "-j DNAT --to-destination 10.64.0.6",
        "-p tcp -j DNAT --to-destination 10.64.0.2:8080",
        "-p udp -j DNAT --to-destination 10.64.0.10:53",
        "-j DNAT --to-destination 192.0.2.1",
        "-j DNAT --to-destination 203.0.113.77",
        "-p tcp -j REDIRECT --to-ports 3128",
        "-d 203.0.113.0/24 -j NETMAP --to 192.0.2.0/24",
    ),
    OUT: ("-j DNAT --to-destination 10.64.0.2", "-p tcp -j DNAT --to-destination 10.64.0.6:8080"),
    HERE: ("-s 10.64.0.0/24 -j SNAT --to-source 203.0.113.9",),
    AFTER: (
        "-j MASQUERADE",
        "-o eth0 -j MASQUERADE",
        "-j SNAT --to-source 192.0.2.1",
        "-s 10.64.0.0/24 -j SNAT --to-source 203.0.113.200",
        "-p tcp -j MASQUERADE --to-ports 20000-60000",
        "-p udp -j SNAT --to-source 192.0.2.1:7000-9000",
    ),
}


def _fits_together(words: list[str]) -> bool:
    """Each condition once, and one protocol."""
    text = " ".join(words)
    protocols = {f"{a} {b}" for a, b in zip(text.split(), text.split()[1:], strict=False) if a == "-p"}
    negated = "! -p" in text
    options = [w for w in text.split() if w.startswith("-") and w not in ("-m", "-p")]
    modules = [b for a, b in zip(text.split(), text.split()[1:], strict=False) if a == "-m"]
    return (
        len(protocols) <= 1
        and not (negated and text.count("-p ") > 1)
        and len(set(options)) == len(options)
        and len(set(modules)) == len(modules)
    )


@st.composite
def rules(draw: st.DrawFn, table: str, hook: str, callees: tuple[str, ...]) -> str:
    """One rule for a chain that packets of this hook come to."""
    shapes = [*_ANYWHERE, *(_INWARD * 2 if hook in _IN else ()), *(_OUTWARD * 2 if hook in _OUT else ())]
    own = ("-j ACCEPT", "-j RETURN", *_TRANSLATIONS[hook] * 2) if table == "nat" else _TARGETS[table]
    targets = [*own, *(f"-{how} {name}" for name in callees for how in "jjg")]
    words = draw(st.lists(st.sampled_from(shapes), min_size=0, max_size=3, unique=True))
    words = [word for word in words if word]
    target = draw(st.sampled_from(targets))
    while not _fits_together([*words, target]):
        words.pop()
    found = _once_protocol(" ".join([*words, target]).split())
    return " ".join(found)


def _once_protocol(words: list[str]) -> list[str]:
    """``-p tcp`` once, in front of what needs it."""
    protocol: list[str] = []
    rest: list[str] = []
    place = 0
    while place < len(words):
        if words[place] == "-p":
            protocol = [*(["!"] if rest and rest[-1] == "!" else []), *words[place : place + 2]]
            if rest and rest[-1] == "!":
                rest.pop()
            place += 2
        else:
            rest.append(words[place])
            place += 1
    return protocol + rest


@st.composite
def rulesets(draw: st.DrawFn, most: int = 5) -> str:
    """iptables-save form, IPv4: some tables, some built-in chains with rules, user chains that they go to."""
    lines: list[str] = []
    for table, hooks in CHAINS.items():
        if table != "filter" and draw(st.integers(0, 2)) == 0:
            continue
        bodies: dict[str, list[str]] = {}
        policies: dict[str, str] = {}
        for hook in hooks:
            drop = table == "filter" and draw(st.integers(0, 3)) == 0
            policies[hook] = "DROP" if drop else "ACCEPT"
            callees: tuple[str, ...] = ()
            for name in (f"{hook[:3].lower()}-b", f"{hook[:3].lower()}-a")[: draw(st.integers(0, 2))]:
                bodies[name] = draw(st.lists(rules(table, hook, callees), min_size=1, max_size=3))
                callees = (*callees, name)
            bodies[hook] = draw(st.lists(rules(table, hook, callees), max_size=most))
        lines.append(f"*{table}")
        lines += [f":{hook} {policies[hook]} [0:0]" for hook in hooks]
        lines += [f":{name} - [0:0]" for name in bodies if name not in hooks]
        lines += [f"-A {name} {rule}" for name, body in bodies.items() for rule in body]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def for_family(text: str, family: Family) -> str:
    """The ruleset, or what it is in IPv6."""
    if family == 4:
        return text
    moved = as_ipv6(text)
    for four, six in zip(SETS[4], SETS[6], strict=True):
        moved = moved.replace(f"--match-set {four} ", f"--match-set {six} ")
    return moved


def _number(address: str, family: Family) -> int:
    text = f"*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -s {address}/32\nCOMMIT\n"
    ruleset = parse(for_family(text, family), family=family).rulesets[0]
    match = next(rule.matches[0] for _, _, rule in ruleset.rules())
    value = getattr(match, "value", None)
    assert isinstance(value, int)
    return value


def places() -> Places:
    """The host: its tenants, its addresses."""
    families: tuple[Family, Family] = (4, 6)
    ones = {4: (1 << 32) - 1, 6: (1 << 128) - 1}
    tenants = tuple(
        Tenant(name, (name,), tuple(TenantAddress(f, _number(a, f), ones[f]) for f in families), (MACS[name],))
        for name, a in TENANTS.items()
    )
    gateways = {f: tuple((_number(GATEWAYS[name], f),) for name in TENANTS) for f in families}
    hosts = {f: (_number(HOST, f),) for f in families}
    return Places(tenants, gateways, hosts, OUTSIDE, {})


def _contents(family: Family) -> dict[str, SetContents]:
    width = 32 if family == 4 else 128
    few, more = SETS[family]
    return {
        few: SetContents(
            family, ((_number("10.64.0.2", family), width), (_number("203.0.113.64", family), width - 26))
        ),
        more: SetContents(family, ((_number("10.64.0.6", family), width), (_number("10.64.0.10", family), width))),
    }


@dataclass
class Court:
    """One host in a namespace, for many rulesets."""

    stage: Stage
    scene: Scene

    def judge(self, text: str, family: Family, count: int, seed: int = 1) -> Replayed:
        """Load this ruleset and send packets through it; ``differences`` is what the model did not foresee."""
        ruleset = parse(for_family(text, family), family=family).rulesets[0]
        where = self.scene.places
        side = Side(FiledRuleset(ruleset, where), where)
        made = samples(side.root, where, self.scene.players, count, seed)
        trial = Trial(self.scene, [self.stage], [{family: side}])
        chosen = -(-2 * count // 3)
        rules = Rules({family: _with_all_tables(for_family(text, family))})
        self.stage.forget()
        trial.run(made[:chosen], [rules], count - chosen, made[chosen:])
        return trial.result()


def _with_all_tables(text: str) -> str:
    """So that nothing of the ruleset before stays."""
    for table, hooks in CHAINS.items():
        if f"*{table}\n" not in text:
            text += "\n".join([f"*{table}", *(f":{hook} ACCEPT [0:0]" for hook in hooks), "COMMIT\n"])
    return text


@contextmanager
def court() -> Iterator[Court]:
    """Build the host, and take it down."""
    scene = Scene(places(), (0, 1, 2), (4, 6), {**_contents(4), **_contents(6)})
    with staged(scene, "c", None) as stage:
        yield Court(stage, scene)
