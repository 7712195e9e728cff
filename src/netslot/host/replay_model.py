"""What the model says will come of a packet that a replay sends, and how that is compared with what came of it.

The model leaves open what a dump does not say (a set's members, a MAC address). Where the replay built it, it
knows the answer; a packet that meets anything else proves nothing, and is told apart with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from netslot.host import replay_wire as wire
from netslot.host.replay_links import Scene, root_mac, slot_mac
from netslot.host.replay_stage import Sighting
from netslot.rulesets.model import Family, Rule
from netslot.rulesets.proof.flow import FIELDS, ICMP
from netslot.rulesets.proof.journey import OWN_ADDRESS, Journey, Result, Side, Way
from netslot.rulesets.proof.samples import Sample
from netslot.rulesets.proof.solving import ConcretePacket
from netslot.rulesets.proof.terms import Number

_REJECTS: Mapping[str, tuple[int, int]] = {
    "icmp-net-unreachable": (3, 0),
    "icmp-host-unreachable": (3, 1),
    "icmp-proto-unreachable": (3, 2),
    "icmp-port-unreachable": (3, 3),
    "icmp-net-prohibited": (3, 9),
    "icmp-host-prohibited": (3, 10),
    "icmp-admin-prohibited": (3, 13),
    "icmp6-no-route": (1, 0),
    "icmp6-adm-prohibited": (1, 1),
    "icmp6-addr-unreachable": (1, 3),
    "icmp6-port-unreachable": (1, 4),
    "icmp6-policy-fail": (1, 5),
    "icmp6-reject-route": (1, 6),
}
"""Type and code of what REJECT answers (net/ipv4/netfilter/ipt_REJECT.c, net/ipv6/netfilter/ip6t_REJECT.c)."""

NOTHING: Sighting = ("nothing",)


@dataclass(frozen=True)
class Memory:
    """What a namespace remembers of a connection: translated ends by the model's names, connection marks by place."""

    numbers: Mapping[str, int] = field(default_factory=dict)
    marks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Foreseen:
    """``outcome`` as a sighting, with the mark where it goes on. ``loose``: what of it only the kernel chooses.

    ``unforeseen``: why the model does not know; empty when it does. ``muted``: an answer may not get back.
    """

    outcome: Sighting
    mark: int
    loose: frozenset[str]
    unforeseen: tuple[str, ...]
    muted: bool
    result: Result

    @property
    def passes(self) -> bool:
        return self.outcome[0] in ("out", "local")

    def fits(self, seen: Sighting, mark: int | None) -> bool:
        """Whether this is what was seen."""
        if not self.passes:
            return seen == self.outcome or (self.muted and seen == NOTHING)
        if seen[0] != self.outcome[0] or (mark is not None and mark != self.mark):
            return False
        names = (
            ("", "link", "src", "dst", "sport", "dport") if seen[0] == "out" else ("", "src", "dst", "sport", "dport")
        )
        return all(
            name in self.loose or one == other for name, one, other in zip(names, seen, self.outcome, strict=True)
        )


class Foresight:
    """Predicts for one arrangement and family."""

    def __init__(self, side: Side, scene: Scene, family: Family) -> None:
        self._side, self._scene, self._family = side, scene, family
        self._answers_can_die = _denies_own(side)

    def predict(self, sample: Sample, memory: Memory) -> Foreseen:
        """What comes of this packet."""
        asked: dict[str, None] = {}
        loose: set[str] = set()
        values = {**sample.values, "ctmark": memory.marks.get("root", 0)}
        packet = ConcretePacket(self._family, values, self._oracle(sample, memory, asked))
        way = Way(sample.entry, self._side.places.outside[0], dst_translated=True, src_translated=True)
        journey = Journey(self._side, way, self._numbers(memory, loose), trace=True)
        result = journey.travel(packet.flow())
        for words, when in result.ledger.changes.items():
            if when is True:
                asked.setdefault(f"what {words} changes is not modelled")
        outcome, muted = self._outcome(sample, result)
        return Foreseen(outcome, result.flow.mark, frozenset(loose), tuple(asked), muted, result)

    def _outcome(self, sample: Sample, result: Result) -> tuple[Sighting, bool]:
        flow = result.flow
        if result.ledger.alive is not True:
            kind = next(kind for kind, when in result.ledger.denied.items() if when is True)
            refused = _refusal(kind, self._family, sample.values)
            in_slot = (result.ledger.trace or [""])[-1].startswith("slot")
            slots = self._side.slot_of is not None
            muted = self._answers_can_die or not sample.entry or (slots and (in_slot or self._from_slot(sample)))
            return refused, muted
        ports = (flow.sport, flow.dport) if flow.proto in (wire.TCP, wire.UDP) else (flow.sport, 0)
        if wire.is_error(self._family, sample.values):
            ports = (0, 0)
        ends = (flow.src, flow.dst, *ports)
        return (("local", *ends) if result.exit == "" else ("out", result.exit, *ends)), False

    def _from_slot(self, sample: Sample) -> bool:
        return sample.entry in self._side.places.link_owner

    def _numbers(self, memory: Memory, loose: set[str]) -> Callable[[str, int, Number], Number]:
        """The model's unknown numbers: what is remembered, addresses that the stage has, or the kernel's choice."""
        places, family = self._side.places, self._family
        fixed = {f"address of {name}": self._scene.own_address(family) for name in places.outside}
        for tenant in self._scene.players:
            own = places.gateways[family][tenant]
            if len(own) == 1:
                fixed[f"address of {places.link(tenant)}"] = own[0]

        def number(name: str, _width: int, default: Number) -> Number:
            if name.startswith("connection mark in "):
                return memory.marks.get(name.removeprefix("connection mark in "), 0)
            if name.startswith("tracked "):
                words = name.split()[1:-1]  # 'dst', or 'port dst'; the hook does not matter
                return memory.numbers.get(" ".join(words), default)
            where = name.replace(OWN_ADDRESS, "address of", 1)
            if where in fixed:
                return fixed[where]
            side = "src" if name.startswith(("Snat", "Masquerade", "address of")) else "dst"
            loose.add(("s" if side == "src" else "d") + "port" if name.endswith(" port") else side)
            return default

        return number

    def _oracle(self, sample: Sample, memory: Memory, asked: dict[str, None]) -> Callable[..., bool]:
        def answers(key: tuple[str, ...], contents: tuple[Number, ...]) -> bool:
            if key[:2] == ("ctstate", "DNAT"):  # asked of replies: was the first packet sent on to somebody else?
                v, numbers = sample.values, memory.numbers
                ends = numbers.get("src", v["src"]), numbers.get("port src", v["sport"])
                return bool(v["reply"]) and ends != (v["src"], v["sport"])
            answer = self._known(key, contents, sample)
            if answer is None:
                asked.setdefault(f"the model does not foresee: {_shortened(key)}")
                return False
            return answer

        return answers

    def _known(self, key: tuple[str, ...], contents: tuple[Number, ...], sample: Sample) -> bool | None:
        """What the stage knows of a condition that the model leaves open."""
        negated = "!" in key[:3]
        if key[0] == "addrtype":
            return self._address_type(key, contents[0])
        if key[0] == "devgroup":
            value, mask, place, name = int(key[2]), int(key[3]), key[4], key[5]
            return value & mask == 0 if place == "root" and name else None
        if key[:2] == ("-m", "pkttype"):
            return (key[-3] == "unicast") != negated
        if key[:2] == ("-m", "physdev"):
            return negated  # no link of a stage is a bridge's port
        if key[:2] == ("-m", "mac"):
            mac = self._mac(key[-1], sample)
            return None if mac is None else (mac == key[-3].lower()) != negated
        if key[:2] == ("-m", "set"):
            words = list(key[:-4])
            contents_of = self._scene.sets.get(words[words.index("--match-set") + 1])
            flags = words[words.index("--match-set") + 2].split(",")
            if contents_of is None or len(words) > words.index("--match-set") + 3:
                return None
            holds = contents_of.family == self._family and contents_of.holds(contents[0 if flags[0] == "src" else 1])
            return holds != negated
        return None

    def _mac(self, frame: str, sample: Sample) -> str | None:
        if frame.startswith("from slot "):
            return slot_mac(frame.removeprefix("from slot "))
        if frame.startswith("into "):
            return root_mac(self._side.places.link(int(frame.removeprefix("into "))))
        entry = frame.removeprefix("from ")
        return self._scene.mac_behind(entry, sample.values["src"], self._family) if entry else None

    def _address_type(self, key: tuple[str, ...], address: Number) -> bool | None:
        """What root's routing table says of an address; IPv6 takes local for unicast too (xt_addrtype.c)."""
        types, interface, place = set(key[2:-5]), key[-5], key[-3]
        if place != "root" or interface or not types <= {"LOCAL", "UNICAST", "BROADCAST", "MULTICAST"}:
            return None
        local = self._side.places.is_local(address, self._family) is True
        if self._family == 6:
            return "MULTICAST" not in types and (local or "LOCAL" not in types) and "BROADCAST" not in types
        return ("LOCAL" if local else "UNICAST") in types


def _shortened(key: Sequence[str]) -> str:
    words = [word for word in key if word]
    return " ".join(words[: words.index("in")] if "in" in words else words[:8])


def _refusal(kind: str, family: Family, values: Mapping[str, int]) -> Sighting:
    """What the sender of a denied packet gets to see."""
    how = kind.removeprefix("REJECT ")
    if how == kind:
        return NOTHING
    if how in ("tcp-reset", "tcp-rst"):
        reset = values["proto"] == wire.TCP and not values["flags"] & wire.RST
        return ("refused", "tcp-reset", 0) if reset else NOTHING
    if wire.is_error(family, values) or (values["proto"] == ICMP[family] and values["icmp_type"] in (5, 137)):
        return NOTHING  # no error is sent about an error (RFC 1122, 3.2.2)
    return ("refused", *_REJECTS[how])


def _denies_own(side: Side) -> bool:
    """Whether root's rules may stop the answers that its own REJECT sends: they pass OUTPUT and POSTROUTING."""
    for table in side.root.ruleset.tables.values():
        for name in ("OUTPUT", "POSTROUTING"):
            chain = table.chains.get(name)
            if chain is None or (name == "POSTROUTING" and table.name == "nat"):
                continue
            if chain.policy == "DROP" or any(_may_deny(rule) for rule in chain.rules):
                return True
    return False


def _may_deny(rule: Rule) -> bool:
    return type(rule.target).__name__ not in ("Accept", "NoTarget", "Log", "SetMark", "SetConnmark", "Return")


def remembered(opener: Sample, outcome: Sighting) -> tuple[dict[str, int], dict[str, int]]:
    """Where packets of a connection go, by the model's names: those of the other direction, and of its own."""
    place = 1 if outcome[0] == "local" else 2
    src, dst, sport, dport = outcome[place : place + 4]
    v = opener.values
    back = {"dst": v["src"], "src": v["dst"]}
    on = {"dst": dst, "src": src}
    if v["proto"] in (wire.TCP, wire.UDP):
        back |= {"port dst": v["sport"], "port src": v["dport"]}
        on |= {"port dst": dport, "port src": sport}
    return back, on


def describe(sample: Sample) -> dict[str, str | int]:
    """The packet for a reader."""
    fields = {name: sample.values[name] for name in FIELDS}
    said = ConcretePacket(sample.family, fields, lambda _key, _contents: False).describe()
    return said | {"from": sample.entry or "the host itself"}
