"""Whether a match holds for a flow.

A match whose meaning is in the packet is computed. One that asks something the model does not hold (a set's
members, a MAC, a bridge port) is put to the oracle, under a key that says how far its answer can be the same:
on the same packet, in the same namespace, on the same hop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from netslot.rulesets import matches as m
from netslot.rulesets.proof.flow import ICMP, INVALID, NEW, STATES, UNTRACKED, Flow
from netslot.rulesets.proof.places import Places
from netslot.rulesets.proof.rewriting import read_by
from netslot.rulesets.proof.terms import (
    Number,
    Truth,
    any_of,
    both,
    either,
    equal,
    masked_equal,
    negate,
    within,
)
from netslot.rulesets.write import match_words

CONTENT_ONLY = frozenset(("string", "u32", "bpf", "ecn", "tos", "tcpmss", "time", "ipv6header", "frag", "rt", "dst"))
"""Opaque matches that read nothing but the packet and the clock: moved elsewhere they answer the same."""

_PROTOCOLS_OF = {"tcp": (6,), "udp": (17,), "udplite": (136,), "sctp": (132,), "dccp": (33,)}


def holds(match: m.Match, flow: Flow, places: Places) -> Truth:
    """True, False, or a formula."""
    compute = _COMPUTED.get(type(match))
    if compute is None:
        return _ask(match, flow)
    truth = compute(match, flow, places)
    return negate(truth) if getattr(match, "negated", False) else truth


def _ask(match: m.Match, flow: Flow) -> Truth:
    words = match_words(match, flow.family)
    seen = (*flow.contents(), *(flow.written.get(part, 0) for part in read_by(match)))
    if isinstance(match, m.Opaque) and match.module in CONTENT_ONLY:
        return flow.oracle(words, seen)
    if isinstance(match, m.TcpOption):
        return flow.oracle(words, seen)
    if isinstance(match, m.Mac | m.PktType):
        return flow.oracle((*words, "on", flow.frame), ())
    if isinstance(match, m.RpFilter) and match.validmark:
        seen = (*seen, flow.mark)
    return flow.oracle((*words, "in", flow.place, flow.iif, flow.oif), seen)


def asked_by(match: m.Opaque, flow: Flow) -> tuple[Number, ...]:
    """What of the packet a condition with a memory goes by: what differs elsewhere gets the same answer."""
    words = match.words
    if match.module in ("limit", "statistic", "quota"):
        return ()
    if match.module == "connlimit":
        return (flow.dst if "--connlimit-daddr" in words else flow.src,)
    if match.module == "hashlimit" and "--hashlimit-mode" in words:
        mode = words[words.index("--hashlimit-mode") + 1]
        if mode in ("srcip", "dstip"):
            return (flow.src if mode == "srcip" else flow.dst,)
    if match.module == "recent":
        return (flow.dst if "--rdest" in words else flow.src,)
    return flow.contents()


def kept_apart_by(match: m.Opaque) -> frozenset[str]:
    """Of which addresses ("src", "dst") each has a count of its own, whoever else asks the same memory."""
    words = match.words
    if match.module != "hashlimit" or "--hashlimit-mode" not in words:
        return frozenset()
    modes = words[words.index("--hashlimit-mode") + 1].split(",")
    return frozenset(
        side for side in ("src", "dst") if f"{side}ip" in modes and f"--hashlimit-{side}mask" not in words
    )


def depends_on_place(match: m.Match) -> bool:
    """Whether the answer may differ in another namespace, so that the rule cannot be moved or compared."""
    if isinstance(match, m.Opaque):
        return match.module not in CONTENT_ONLY
    if isinstance(match, m.CtState):
        return bool(match.states & {"SNAT", "DNAT"})
    if isinstance(match, m.AddrType | m.DevGroup):
        return True
    return (type(match) not in _COMPUTED and not isinstance(match, m.TcpOption)) or isinstance(match, m.Connmark)


def _address(x: m.Address, flow: Flow, _p: Places) -> Truth:
    return masked_equal(flow.src if x.side == "src" else flow.dst, x.mask, x.value, flow.width)


def _iprange(x: m.IpRange, flow: Flow, _p: Places) -> Truth:
    return within(flow.src if x.side == "src" else flow.dst, x.low, x.high)


def interface_is(x: m.Interface, name: str) -> bool:
    return name.startswith(x.name) if x.wildcard else name == x.name


def _interface(x: m.Interface, flow: Flow, _p: Places) -> Truth:
    return interface_is(x, flow.iif if x.direction == "in" else flow.oif)


def _protocol(x: m.Protocol, flow: Flow, _p: Places) -> Truth:
    return equal(flow.proto, x.number)


def _fragment(_x: m.Fragment, flow: Flow, _p: Places) -> Truth:
    return equal(flow.fragment, 1)


def _ports(x: m.Ports, flow: Flow, _p: Places) -> Truth:
    sides = {"src": (flow.sport,), "dst": (flow.dport,), "either": (flow.sport, flow.dport)}[x.side]
    truth = any_of(within(port, low, high) for port in sides for low, high in x.ranges)
    if x.negated:
        truth = negate(truth)
    truth = both(truth, equal(flow.fragment, 0))
    return negate(truth) if x.negated else truth  # holds() turns it round again


def _icmp(x: m.IcmpType, flow: Flow, _p: Places) -> Truth:
    if x.module == "icmp" and x.type == 255:
        truth: Truth = True
    else:
        truth = both(equal(flow.icmp_type, x.type), within(flow.icmp_code, x.code_low, x.code_high))
    return _unfragmented(truth, x.negated, flow)


def _tcp_flags(x: m.TcpFlags, flow: Flow, _p: Places) -> Truth:
    return _unfragmented(masked_equal(flow.flags, x.mask, x.value, 8), x.negated, flow)


def _unfragmented(truth: Truth, negated: bool, flow: Flow) -> Truth:
    """A later fragment has no header to look at: never a match, negated or not."""
    wanted = negate(truth) if negated else truth
    wanted = both(wanted, equal(flow.fragment, 0))
    return negate(wanted) if negated else wanted


def _ct_state(x: m.CtState, flow: Flow, _p: Places) -> Truth:
    plain = [STATES.index(name) for name in sorted(x.states) if name in STATES]
    tracked = any_of(equal(flow.state, number) for number in plain if number != UNTRACKED)
    truth = both(flow.tracked, either(tracked, equal(flow.state, UNTRACKED) if UNTRACKED in plain else False))
    if UNTRACKED in plain:
        truth = either(truth, negate(flow.tracked))
    for name in sorted(x.states & {"SNAT", "DNAT"}):
        unknown = flow.oracle(("ctstate", name, "in", flow.place), flow.contents())
        if name == "DNAT" and flow.place == "root":  # of replies it is not known how their first packet went
            unknown = either(flow.redirected, both(both(has_connection(flow), equal(flow.reply, 1)), unknown))
        truth = either(truth, unknown)
    return truth


def has_connection(flow: Flow) -> Truth:
    """Whether conntrack knows the packet: neither INVALID nor UNTRACKED."""
    return both(flow.tracked, negate(either(equal(flow.state, INVALID), equal(flow.state, UNTRACKED))))


def _ct_direction(x: m.CtDirection, flow: Flow, _p: Places) -> Truth:
    return both(has_connection(flow), equal(flow.reply, 1 if x.direction == "REPLY" else 0))


def _mark(x: m.Mark, flow: Flow, _p: Places) -> Truth:
    return masked_equal(flow.mark, x.mask, x.value, 32)


def _connmark(x: m.Connmark, flow: Flow, _p: Places) -> Truth:
    """A packet without a connection never matches, negated or not (connmark_mt() in net/netfilter/xt_connmark.c)."""
    truth = masked_equal(flow.ctmark, x.mask, x.value, 32)
    truth = both(negate(truth) if x.negated else truth, has_connection(flow))
    return negate(truth) if x.negated else truth  # holds() turns it round again


def _addrtype(x: m.AddrType, flow: Flow, places: Places) -> Truth:
    address = flow.src if x.side == "src" else flow.dst
    if x.types != {"LOCAL"} or flow.place != "root":
        key = ("addrtype", x.side, *sorted(x.types), x.interface or "", "in", flow.place, flow.iif, flow.oif)
        return flow.oracle(key, (address,))
    if x.interface is None:
        return places.is_local(address, flow.family)
    return places.is_local_on(address, flow.iif if x.interface == "in" else flow.oif, flow.family)


def _devgroup(x: m.DevGroup, flow: Flow, places: Places) -> Truth:
    name = flow.iif if x.direction == "in" else flow.oif
    group = places.groups.get(name)
    if group is None and flow.place == "root" and places.is_slots_group(x.value, x.mask):
        return False
    if flow.place != "root" or group is None:
        return flow.oracle(("devgroup", x.direction, str(x.value), str(x.mask), flow.place, name), ())
    return group & x.mask == x.value


def _length(x: m.Length, flow: Flow, _p: Places) -> Truth:
    return within(flow.length, x.low, x.high)


def _ttl(x: m.Ttl, flow: Flow, _p: Places) -> Truth:
    if x.op == "eq":
        return equal(flow.ttl, x.value)
    if x.op == "lt":
        return within(flow.ttl, 0, x.value - 1) if x.value else False
    return within(flow.ttl, x.value + 1, 255) if x.value < 255 else False


def _dscp(x: m.Dscp, flow: Flow, _p: Places) -> Truth:
    return equal(flow.dscp, x.value)


_COMPUTED: dict[type, Callable[[Any, Flow, Places], Truth]] = {
    m.Address: _address,
    m.IpRange: _iprange,
    m.Interface: _interface,
    m.OtherLink: lambda x, flow, _p: (flow.iif if x.direction == "in" else flow.oif) not in x.names,
    m.Protocol: _protocol,
    m.Fragment: _fragment,
    m.Ports: _ports,
    m.IcmpType: _icmp,
    m.TcpFlags: _tcp_flags,
    m.CtState: _ct_state,
    m.CtDirection: _ct_direction,
    m.Mark: _mark,
    m.Connmark: _connmark,
    m.AddrType: _addrtype,
    m.DevGroup: _devgroup,
    m.Length: _length,
    m.Ttl: _ttl,
    m.Dscp: _dscp,
}


def needs_translation(flow: Flow) -> Truth:
    """Whether the nat table is asked: the first packet of a connection, or of an expected one (not its errors)."""
    related = both(equal(flow.state, 2), negate(equal(flow.proto, ICMP[flow.family])))
    return both(flow.tracked, either(equal(flow.state, NEW), related))
