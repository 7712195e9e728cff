"""Random matches, targets and rulesets (hypothesis)."""

from __future__ import annotations

from hypothesis import strategies as st

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets.write import rule_text

_MASKS = [0xFFFFFFFF ^ ((1 << (32 - n)) - 1) for n in range(1, 33)] + [0xFF00FF00]
_NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-.", min_size=1, max_size=12)
_BITS = st.integers(0, 0xFFFFFFFF)
_PORT = st.integers(0, 65535)
_NEGATED = st.booleans()
_SIDES = st.sampled_from(["src", "dst"])
_WAYS = st.sampled_from(["in", "out"])


def _address(side: m.Side, value: int, mask: int, negated: bool) -> m.Address:
    return m.Address(side, value & mask, mask, negated)


_SPAN = st.tuples(_PORT, _PORT).map(lambda pair: (min(pair), max(pair)))
_STATES = st.frozensets(st.sampled_from(["NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED"]), min_size=1)

MATCHES = st.one_of(
    st.builds(_address, _SIDES, _BITS, st.sampled_from(_MASKS), _NEGATED),
    st.builds(m.Interface, _WAYS, _NAMES, _NEGATED, _NEGATED),
    st.builds(m.Protocol, st.integers(1, 255), _NEGATED),
    st.builds(m.Fragment, _NEGATED),
    st.builds(m.Ports, st.sampled_from(["tcp", "udp"]), _SIDES, st.tuples(_SPAN), _NEGATED),
    st.builds(
        m.Ports,
        st.just("multiport"),
        st.sampled_from(["src", "dst", "either"]),
        st.lists(_SPAN, min_size=1, max_size=5).map(tuple),
        _NEGATED,
    ),
    st.builds(m.TcpFlags, st.integers(1, 63), st.integers(0, 63), _NEGATED),
    st.builds(m.CtState, st.sampled_from(["state", "conntrack"]), _STATES, _NEGATED),
    st.builds(m.Mark, _BITS, _BITS, _NEGATED),
    st.builds(m.Connmark, _BITS, _BITS, _NEGATED),
    st.builds(m.AddrType, _SIDES, st.frozensets(st.sampled_from(["LOCAL", "UNICAST"]), min_size=1), _NEGATED),
    st.builds(m.Physdev, _WAYS, _NAMES, _NEGATED, _NEGATED),
    st.builds(m.PhysdevIs, st.sampled_from(["in", "out", "bridged"]), _NEGATED),
    st.builds(m.SetMatch, _NAMES.map(lambda name: "s" + name), st.tuples(_SIDES), _NEGATED),
    st.builds(m.Length, st.integers(0, 99), st.integers(100, 65535), _NEGATED),
    st.builds(m.Ttl, st.sampled_from(["lt", "gt"]), st.integers(0, 255)),
    st.builds(m.Dscp, st.integers(0, 63), _NEGATED),
    st.builds(m.PktType, st.sampled_from(["unicast", "broadcast", "multicast"]), _NEGATED),
    st.builds(m.IcmpType, st.just("icmp"), st.integers(0, 254), st.just(0), st.just(255), _NEGATED),
    st.just(m.Opaque("limit", ("-m", "limit", "--limit", "5/sec"))),
)

_PORTS = st.one_of(st.none(), _SPAN.filter(lambda span: span[0] > 0))
_SINGLE = _BITS.map(lambda value: (value, value))

TARGETS = st.one_of(
    st.sampled_from([t.NoTarget(), t.Accept(), t.Drop(), t.Return(), t.Jump("user"), t.Goto("user")]),
    st.builds(t.Reject, st.sampled_from(["icmp-port-unreachable", "tcp-reset"])),
    st.builds(t.SetMark, _BITS, _BITS),
    st.builds(t.SetConnmark, _BITS, _BITS),
    st.builds(t.SaveMark, _BITS, _BITS),
    st.builds(t.RestoreMark, _BITS, _BITS),
    st.builds(t.Dnat, st.builds(t.NatTarget, _SINGLE, _PORTS)),
    st.builds(t.Snat, st.builds(t.NatTarget, _SINGLE, _PORTS)),
    st.builds(t.Masquerade, st.builds(t.NatTarget, st.none(), _PORTS)),
    st.just(t.Log("LOG", ("-j", "LOG", "--log-prefix", 'a "quoted" prefix'))),
)

COMMENTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40).map(
    lambda text: " ".join(text.split())
)


# Rulesets for walks: few names and values, so that rules meet, shadow and name one another.

_WALK_MATCHES: st.SearchStrategy[m.Match] = st.sampled_from(
    [
        *(
            m.Address(side, 0x0A000000 + k, 0xFFFFFFFF, negated)
            for side in ("src", "dst")
            for k in (1, 2)
            for negated in (False, True)
        ),
        m.Address("src", 0x0A000000, 0xFF000000),
        *(
            m.Interface(way, name, False, negated)
            for way in ("in", "out")
            for name in ("tap1", "tap2")
            for negated in (False, True)
        ),
        m.Interface("in", "tap", True),
        m.Protocol(6),
        m.Ports("tcp", "dst", ((80, 80),)),
        m.Ports("tcp", "dst", ((1, 1024),)),
        m.CtState("conntrack", frozenset(("NEW",))),
        m.CtState("conntrack", frozenset(("RELATED", "ESTABLISHED"))),
        m.CtState("conntrack", frozenset(("NEW", "ESTABLISHED"))),
        m.Mark(1, 1),
        m.SetMatch("some", ("src",)),
        m.Opaque("limit", ("-m", "limit", "--limit", "5/sec")),
    ]
)
_WALK_TARGETS: st.SearchStrategy[t.Target] = st.sampled_from(
    [t.NoTarget(), t.Accept(), t.Drop(), t.Return(), t.SetMark(1, 1), t.SetMark(0, 1), t.Log("LOG", ("-j", "LOG"))]
)


@st.composite
def walk_rulesets(draw: st.DrawFn) -> str:
    """A filter table with FORWARD and up to three chains; jumps go to later chains only."""
    names = ["FORWARD", "c1", "c2", "c3"]
    lines = ["*filter", ":FORWARD DROP [0:0]", *(f":{name} - [0:0]" for name in names[1:])]
    for place, name in enumerate(names):
        later = names[place + 1 :]
        jumps: list[t.Target] = [kind(chain) for chain in later for kind in (t.Jump, t.Goto)]
        targets = _WALK_TARGETS | st.sampled_from(jumps) if jumps else _WALK_TARGETS
        for _ in range(draw(st.integers(0, 8))):
            matches = draw(st.lists(_WALK_MATCHES, max_size=3))
            text = rule_text(matches, draw(targets), 4)
            lines.append(f"-A {name} {text}")
    return "\n".join([*lines, "COMMIT", ""])
