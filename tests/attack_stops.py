"""What stops attacks: each defence with the place where it is, and the way to take it away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attack_lab import HOST6, Kind, Scene
from attack_rules import NAT, Edit


@dataclass(frozen=True)
class Stop:
    """One defence. ``edits`` take it out of the rules of ``layer`` (``slot`` or ``root``); what is no rule is taken
    away by ``take`` and put back by ``put``, shell commands by namespace."""

    text: str
    where: str
    layer: str = "kernel"
    iptables: tuple[Edit, ...] = ()
    nft: tuple[Edit, ...] = ()
    take: tuple[tuple[str, str], ...] = ()
    put: tuple[tuple[str, str], ...] = ()
    only: Callable[[Kind], bool] = lambda _: True
    mend: bool = False
    """To be put back by netslot's own repair."""
    untracked: bool = False
    """To be taken away with all rules that need connection tracking, which is all of them."""

    def edits(self, kind: Kind) -> tuple[Edit, ...]:
        return self.nft if kind.backend == "nftables" else self.iptables


def rule(text: str, where: str, iptables: str, nft: str, **more: object) -> Stop:
    """A rule of the slot's, as a regular expression in each language."""
    return Stop(text, f"slot, {where}", "slot", ((iptables, ""),), ((nft, ""),), **more)  # type: ignore[arg-type]


def to_mend(stops: tuple[Stop, ...]) -> set[str]:
    """What only netslot's own repair puts back, which costs more than all else."""
    return {stop.text for stop in stops if stop.mend}


def take_away(scene: Scene, stops: tuple[Stop, ...]) -> None:
    """Leave the host without these, and with all else."""
    if scene.gone - to_mend(stops):
        scene.mend()
    if any(each.untracked for each in stops):
        for rules in scene.rules.values():
            rules.bare(nat=False)
    else:
        for layer, rules in scene.rules.items():
            edits = [edit for each in stops if each.layer == layer for edit in each.edits(scene.of)]
            rules.edit(dict.fromkeys(edits))
    for each in stops:
        if each.text not in scene.gone:
            run(scene, each.take)
    scene.gone |= to_mend(stops)


def put_back(scene: Scene, stops: tuple[Stop, ...]) -> None:
    """Undo what was no rule and needs no repair; rules are loaded whole by whoever needs them next."""
    for each in reversed(stops):
        run(scene, each.put)


def run(scene: Scene, commands: tuple[tuple[str, str], ...]) -> None:
    for where, command in commands:
        other, link = scene.other
        place = {"slot": scene.slot, "root": scene.root, "other": other}[where]
        names = {"guest_link": scene.plan.guest_if or scene.plan.uplink_if, "other_link": link}
        place.sh(command.format(**scene.values, **names, its_address6=scene.victim.values["address6"]))


def guests(kind: Kind) -> bool:
    return kind.attachment != "process"


def processes(kind: Kind) -> bool:
    return kind.attachment == "process"


# --- in the slot's rules -----------------------------------------------------------------------------

EGRESS = "egress"
SPOOF4 = rule(
    "the source must be the tenant's own: `! -s ${guest_address} -j DROP`",
    "raw PREROUTING (process: OUTPUT)",
    r"-A (PREROUTING|OUTPUT) ! -s (172\.16\.0\.2|10\.201\.0\.3)\S* .*-j DROP",
    r"(antispoof|output): .*ip saddr != \S+ drop",
)
SPOOF6 = rule(
    "the source must be the tenant's own: `! -s ${guest_address6} -j DROP`",
    "raw PREROUTING (process: OUTPUT)",
    r"-A (PREROUTING|OUTPUT) ! -s (fd00:16::2|fd5c:)\S* .*-j DROP",
    r"(antispoof|output): .*ip6 saddr != \S+ drop",
)
MAC = rule("the MAC must be the guest's: `--mac-source`", "raw PREROUTING", "--mac-source", "ether saddr !=")
MAIL = rule("`--dports 25,465,587`", EGRESS, "--dports 25,465,587", r"tcp dport \{ 25, 465, 587 \}")
LINK_LOCAL = rule("`-d 169.254.0.0/16`", EGRESS, r"-d 169\.254\.0\.0/16", r"ip daddr 169\.254\.0\.0/16")
TEN = rule("`-d 10.0.0.0/8`", EGRESS, r"-d 10\.0\.0\.0/8", r"ip daddr 10\.0\.0\.0/8")
SEVENTEEN = rule("`-d 172.16.0.0/12`", EGRESS, r"-d 172\.16\.0\.0/12", r"ip daddr 172\.16\.0\.0/12")
PRIVATE6 = rule("`-d fc00::/7`", EGRESS, "-d fc00::/7", "ip6 daddr fc00::/7")
MULTICAST4 = rule("`-d 224.0.0.0/3`", EGRESS, r"-d 224\.0\.0\.0/3", r"ip daddr 224\.0\.0\.0/3")
MULTICAST6 = rule("`-d ff00::/8`", EGRESS, "-d ff00::/8", r"ip6 daddr \{ fe80::/10, ff00::/8 \}")
DRESSED = rule(
    "`-d ::/96`, `::ffff:0:0/96`, `64:ff9b::/96`, `64:ff9b:1::/48`, `2002::/16`, `2001::/32`",
    EGRESS,
    r"-d (::/96|::ffff:0\S+/96|64:ff9b\S+|2002::/16|2001::/32) ",
    r"ip6 daddr \{ ::/96, .*2002::/16",
)
NO_ERRORS = rule(
    "of ICMP only echo requests may leave", EGRESS, r"! --icmp(v6)?-type (8|128|echo-request)", r"icmp(v6)? type !="
)
INVALID = rule(
    "`--ctstate INVALID`",
    "FORWARD",
    "--ctstate INVALID",
    "ct state invalid",
    only=lambda kind: kind.nat != "nftables",
)
RESOLVERS = rule("port 53 to others is refused", EGRESS, "--dport 53 -j REJECT", "dport 53 reject")
COUNT = rule("`connlimit`", EGRESS, "connlimit-above", "ct count over")
ROUTING = rule(
    "routing headers are dropped: `-m rt`", "raw PREROUTING (process: OUTPUT)", "-m rt ", "exthdr rt exists"
)
ROUTERS = rule(
    "router advertisements and redirects are dropped",
    "raw PREROUTING",
    r"icmpv6-type (134|137|redirect|router)",
    r"nd-router-advert, nd-redirect",
)
SOLICITATIONS = Stop(
    "neighbour solicitations from link-local addresses are few: one a second",
    "slot, raw PREROUTING",
    "slot",
    ((r"(-s fe80::/10 .*--icmpv6-type \S+) -m limit --limit \S+ --limit-burst 10", r"\1"),),
    ((r"(ip6 saddr fe80::/10 icmpv6 type nd-neighbor-solicit) limit rate 1/second burst 10 packets", r"\1"),),
)
INPUT = Stop(
    "the slot is no service: `:INPUT DROP`",
    "slot, INPUT",
    "slot",
    ((r":INPUT DROP", ":INPUT ACCEPT"),),
    ((r"(hook input .*)policy drop", r"\1policy accept"),),
)

# --- in root's ---------------------------------------------------------------------------------------

REVERSE = Stop(
    "no source that is not the slot's own: reverse-path filter",
    "root's preset, raw PREROUTING",
    "root",
    ((r"-m rpfilter --invert -j DROP", ""),),
    ((r"fib saddr \. iif oif missing drop", ""),),
)
ROOT_INPUT = Stop(
    "slots may ping the host, and nothing else",
    "root's preset, INPUT",
    "root",
    ((r"-A NETSLOT-\S+-IN -i \S+ -j DROP", ""),),
    ((r"input: .*iifname \"at\S+\" drop", ""),),
)
ROOT_FORWARD = Stop(
    "from slots only to the uplink",
    "root's preset, FORWARD",
    "root",
    ((r"-A NETSLOT-\S+-FWD -i \S+( -o at\S+)? -j DROP", ""),),
    ((r"forward: .*iifname \"at\S+\" (oifname \"at\S+\" )?drop", ""),),
)

# --- elsewhere ---------------------------------------------------------------------------------------


def nat_rule(text: str, pattern: str) -> Stop:
    """A rule of the stateless NAT by nftables; ``pattern`` is sed's."""
    listed = f"nft -a list chain $f {NAT} leave | sed -n 's/.*{pattern} # handle //p'"
    delete = f'test -n "$({listed})" && for h in $({listed}); do nft delete rule $f {NAT} leave handle $h; done'
    return Stop(
        f'`nat.kind = "nftables"`: {text}',
        "slot, the NAT's POSTROUTING",
        take=(("slot", f"set -e; for f in ip ip6; do {delete}; done"),),
        only=lambda kind: kind.nat == "nftables",
        mend=True,
    )


NAT_QUOTE = nat_rule("a quoted packet is made the slot's own", "icmp.* set ip6* saddr")
NAT_SOURCE = nat_rule("only the guest's own packets leave", "saddr != [^ ]* drop")
NAT_PROGRAM = Stop(
    '`nat.kind = "bpf"`: only what is the guest\'s and can be read to the end leaves',
    "slot, the NAT program on the uplink",
    take=(("slot", "tc qdisc del dev up0 clsact"),),
    only=lambda kind: kind.nat == "bpf",
    mend=True,
)
NAT_RULE = nat_rule("what is too short for its checksum is not translated", "saddr [^ ]* ip6* saddr set .*")
PROGRAM = (NAT_PROGRAM, replace(REVERSE, only=lambda kind: kind.nat == "bpf"))
"""Without the program nothing is translated, and root's filter knows no guest's address."""
AUTHENTICATION = rule("authentication headers are dropped: `-m ah`", EGRESS, "-m ah ", "meta l4proto ah|exthdr auth")
ROOT_MULTICAST6 = Stop(
    "root takes no multicast from slots",
    "root, no route for ff00::/8",
    take=(("root", "ip -6 route add multicast ff00::/8 dev {root_if} table local"),),
    put=(("root", "ip -6 route del multicast ff00::/8 dev {root_if} table local"),),
)


def sysctl(
    text: str, name: str, value: str, *, root: bool = False, only: Callable[[Kind], bool] = lambda _: True
) -> Stop:
    """A setting of the kernel's; in ``name``, a per-link one, ``*`` stands for ``all`` and the link to the tenant."""
    place, link = ("root", "{root_if}") if root else ("slot", "{guest_link}")
    names = [name.replace("*", each) for each in ("all", link)] if "*" in name else [name]
    kept = f"/run/attack-{place}-"
    commands = [f"sysctl -n net.{each} > {kept}{each}; sysctl -qw net.{each}={value}" for each in names]
    back = [f"sysctl -qw net.{each}=$(cat {kept}{each}); rm {kept}{each}" for each in names]
    shown = name.replace("{guest_if}", "tap0").replace("{root_if}", "slot1")
    return Stop(
        text,
        f"{'root' if root else 'slot'}, `net.{shown}`",
        take=((place, " && ".join(commands)),),
        put=((place, " && ".join(back)),),
        only=only,
    )


SLOT_SOURCE_ROUTE = sysctl("source-routed packets are not taken", "ipv4.conf.*.accept_source_route", "1", only=guests)
ROOT_SOURCE_ROUTE = sysctl("source-routed packets are not taken", "ipv4.conf.*.accept_source_route", "1", root=True)
SEGMENTS = sysctl("segment routing is off", "ipv6.conf.*.seg6_enabled", "1", only=guests)
ROOT_SEGMENTS = sysctl("segment routing is off", "ipv6.conf.*.seg6_enabled", "1", root=True)
OPTIONS = sysctl("at most 8 hop-by-hop options", "ipv6.max_hbh_opts_number", "2147483647")
ROOT_OPTIONS = sysctl("at most 8 hop-by-hop options", "ipv6.max_hbh_opts_number", "2147483647", root=True)
ROUTES_LOCALNET = sysctl("nobody outside may ask for 127.0.0.0/8", "ipv4.conf.*.route_localnet", "1", only=guests)
SLOT_RA = sysctl("router advertisements are not believed", "ipv6.conf.{guest_if}.accept_ra", "2", only=guests)
ROOT_RA = sysctl("routers do not believe router advertisements", "ipv6.conf.{root_if}.accept_ra", "2", root=True)
SLOT_FILTER = sysctl("no sender that is not behind the link", "ipv4.conf.*.rp_filter", "0", only=guests)
ROOT_FILTER = sysctl("no sender that is not behind the link", "ipv4.conf.*.rp_filter", "0", root=True)
SLOT_GRATUITOUS = sysctl("gratuitous ARP makes no entries", "ipv4.conf.*.arp_accept", "1", only=guests)
ROOT_GRATUITOUS = sysctl("gratuitous ARP makes no entries", "ipv4.conf.*.arp_accept", "1", root=True)
SLOT_ANSWERS = sysctl("ARP is answered for the link's own address only", "ipv4.conf.*.arp_ignore", "0", only=guests)
ROOT_ANSWERS = sysctl("ARP is answered for the link's own address only", "ipv4.conf.*.arp_ignore", "0", root=True)
SLOT_PROXY = sysctl("ARP is answered for nobody else", "ipv4.conf.*.proxy_arp", "1", only=guests)
ROOT_PROXY = sysctl("ARP is answered for nobody else", "ipv4.conf.*.proxy_arp", "1", root=True)


def proxies(place: str, link: str, *addresses: str) -> Stop:
    """There being no neighbour proxies."""

    def commands(on: int, delay: int, verb: str) -> tuple[tuple[str, str], ...]:
        settings = f"sysctl -qw net.ipv6.conf.all.proxy_ndp={on} net.ipv6.neigh.{link}.proxy_delay={delay}"
        return (
            (place, "; ".join([settings, *(f"ip -6 neigh {verb} proxy {each} dev {link}" for each in addresses)])),
        )

    where = f"{place}, no proxies"
    return Stop(
        "neighbour solicitations are answered for the link's own address only",
        where,
        take=commands(1, 0, "add"),
        put=commands(0, 80, "del"),
    )


SLOT_PROXY6 = proxies("slot", "{guest_link}", "{address6}", "{root_address6}")
ROOT_PROXY6 = proxies("root", "{root_if}", HOST6, "{its_address6}")
STATELESS = (
    NAT_PROGRAM,
    NAT_RULE,
    *(replace(each, only=lambda kind: kind.nat != "rules") for each in (REVERSE, ROOT_FILTER)),
)
TRACKING = replace(
    ROOT_FILTER,
    text="connection tracking puts fragments together, or drops what cannot be",
    where='slot (`nat.kind = "nftables"`: root), before all rules',
    untracked=True,
)
"""Without it nothing is translated either, which root's filter must not mind."""

ROUTER = Stop(
    "the slot is a router and passes on no frames",
    "slot, by there being no bridge",
    take=(
        (
            "slot",
            "ip link add br9 type bridge && ip link set br9 addrgenmode none up && "
            "ip link set up0 master br9 && ip link set {guest_link} master br9 && "
            "for f in ip ip6; do sysctl -qw net.bridge.bridge-nf-call-${{f}}tables=0; done",
        ),
    ),
    put=(("slot", "ip link del br9"),),
    only=guests,
)


def reverse(six: bool) -> tuple[Stop, ...]:
    """Root's filters of sources; of IPv6 the kernel has none beside the rule."""
    return (REVERSE,) if six else (REVERSE, ROOT_FILTER)


def permanent(where: str, address: str, mac: str, link: str) -> Stop:
    """A permanent neighbour entry."""
    text = f"ip neigh replace {{{address}}} lladdr {{{mac}}} dev {{{link}}} nud"
    return Stop(
        "the neighbour entry is permanent",
        f"{where}, neighbour table",
        take=((where, f"{text} stale"),),
        put=((where, f"{text} permanent"),),
    )


GUEST_ENTRY4 = permanent("slot", "guest_address", "guest_mac", "guest_if")
GUEST_ENTRY6 = permanent("slot", "guest_address6", "guest_mac", "guest_if")
SLOT_ENTRY4 = permanent("root", "address", "uplink_mac", "root_if")
SLOT_ENTRY6 = permanent("root", "address6", "uplink_mac", "root_if")
