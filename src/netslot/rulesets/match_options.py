"""From the options of one match module to Match values.

``MODULES`` says for each modelled module which options it has and how many words each takes. A builder gets
all options of one ``-m`` and returns the conditions they add, which iptables combines with *and*. An option
that is known but not modelled becomes an Opaque of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from netslot.rulesets import matches as m
from netslot.rulesets import values, vocabulary
from netslot.rulesets.model import Family


class Option(NamedTuple):
    """One option as written: its name, whether a ``!`` stands before it, its words."""

    name: str
    negated: bool
    words: tuple[str, ...]


Builder = Callable[[str, list[Option], Family], list[m.Match]]


class Module(NamedTuple):
    """A modelled module: its options and how many words each takes, and what builds its conditions."""

    arity: Mapping[str, int]
    build: Builder


def opaque(module: str, options: list[Option]) -> m.Opaque:
    """The options word for word."""
    words = ["-m", module]
    for option in options:
        words += (["!"] if option.negated else []) + [option.name, *option.words]
    return m.Opaque(module, tuple(words))


def _one_by_one(convert: Callable[[str, Option, Family], m.Match | None]) -> Builder:
    """A builder for modules whose options are independent conditions; names of hosts or services go opaque."""

    def build(module: str, options: list[Option], family: Family) -> list[m.Match]:
        found: list[m.Match] = []
        for option in options:
            try:
                match = convert(module, option, family)
            except values.NameNotNumber:
                match = None
            found.append(match if match is not None else opaque(module, [option]))
        return found

    return build


def _names(text: str, known: frozenset[str], what: str) -> frozenset[str]:
    names = frozenset(text.upper().split(","))
    unknown = names - known
    if unknown:
        raise ValueError(f"'{sorted(unknown)[0]}' is not {what}; expected some of {', '.join(sorted(known))}")
    return names


_PORT_SIDES: dict[str, m.PortSide] = {
    "--sport": "src",
    "--source-port": "src",
    "--sports": "src",
    "--source-ports": "src",
    "--dport": "dst",
    "--destination-port": "dst",
    "--dports": "dst",
    "--destination-ports": "dst",
    "--ports": "either",
}


def _ports(module: str, option: Option, _family: Family) -> m.Match | None:
    side = _PORT_SIDES.get(option.name)
    if side is None:
        return None
    text = option.words[0]
    parts = text.split(",") if module == "multiport" else [text]
    return m.Ports(module, side, tuple(values.span(part, 65535) for part in parts), option.negated)


def _tcp(module: str, option: Option, family: Family) -> m.Match | None:
    match option.name:
        case "--syn":
            return m.TcpFlags(0x17, 0x02, option.negated)
        case "--tcp-flags":
            mask, value = (_flags(word) for word in option.words)
            return m.TcpFlags(mask, value, option.negated)
        case "--tcp-option":
            return m.TcpOption(values.number(option.words[0], 255), option.negated)
    return _ports(module, option, family)


def _flags(text: str) -> int:
    bits = 0
    for name in text.upper().split(","):
        if name not in vocabulary.TCP_FLAGS:
            raise ValueError(f"'{name}' is not a TCP flag; expected {', '.join(vocabulary.TCP_FLAGS)}")
        bits |= vocabulary.TCP_FLAGS[name]
    return bits


def _icmp(module: str, option: Option, _family: Family) -> m.Match | None:
    text = option.words[0].lower()
    table = vocabulary.ICMP if module == "icmp" else vocabulary.ICMP6
    if text in table:
        return m.IcmpType(module, *table[text], option.negated)
    if text[0].isalpha():
        return None
    type_text, slash, code_text = text.partition("/")
    kind = values.number(type_text, 255)
    low, high = values.span(code_text, 255) if slash else (0, 255)
    return m.IcmpType(module, kind, low, high, option.negated)


def _state(module: str, option: Option, _family: Family) -> m.Match | None:
    return m.CtState(
        module,
        _names(option.words[0], vocabulary.CT_STATES, "a connection state"),
        option.negated,
    )


def _conntrack(module: str, options: list[Option], family: Family) -> list[m.Match]:
    """Independent conditions, but for one thing.

    A packet without a connection is INVALID or UNTRACKED, and xt_conntrack then looks at the state alone:
    where the state admits these two and other options stand beside it, they are not a plain *and*.
    """
    found = _one_by_one(_conntrack_option)(module, options, family)
    states = [match for match in found if isinstance(match, m.CtState)]
    if len(found) > 1 and any(_admits_no_connection(state) for state in states):
        return [opaque(module, options)]
    return found


def _admits_no_connection(state: m.CtState) -> bool:
    without_connection = {"INVALID", "UNTRACKED"}
    if state.negated:
        return not state.states >= without_connection
    return bool(state.states & without_connection)


_CT_TUPLES: dict[str, tuple[str, m.Side]] = {
    "--ctorigsrc": ("orig", "src"),
    "--ctorigdst": ("orig", "dst"),
    "--ctreplsrc": ("repl", "src"),
    "--ctrepldst": ("repl", "dst"),
}


def _conntrack_option(module: str, option: Option, family: Family) -> m.Match | None:
    text = option.words[0]
    if option.name == "--ctstate":
        return _state(module, option, family)
    if option.name == "--ctstatus":
        statuses = _names(text, vocabulary.CT_STATUSES, "a connection status")
        return m.CtStatus(statuses, option.negated)
    if option.name == "--ctdir" and not option.negated and text.upper() in ("ORIGINAL", "REPLY"):
        return m.CtDirection("ORIGINAL" if text.upper() == "ORIGINAL" else "REPLY")
    if option.name == "--ctproto":
        number = vocabulary.PROTOCOLS.get(text.lower())
        return m.CtProtocol(values.number(text, 255) if number is None else number, option.negated)
    if option.name in _CT_TUPLES:
        which, side = _CT_TUPLES[option.name]
        value, mask = values.network(text, family)
        return m.CtAddress("orig" if which == "orig" else "repl", side, value, mask, option.negated)
    base = option.name.removesuffix("port")
    if base in _CT_TUPLES:
        which, side = _CT_TUPLES[base]
        low, high = values.span(text, 65535)
        return m.CtPorts("orig" if which == "orig" else "repl", side, low, high, option.negated)
    return None


def _mark(module: str, option: Option, _family: Family) -> m.Match:
    value, mask = values.masked(option.words[0])
    if module == "mark":
        return m.Mark(value, mask, option.negated)
    return m.Connmark(value, mask, option.negated)


def _addrtype(_module: str, options: list[Option], _family: Family) -> list[m.Match]:
    limit: m.Direction | None = None
    for option in options:
        if option.name == "--limit-iface-in":
            limit = "in"
        elif option.name == "--limit-iface-out":
            limit = "out"
    found: list[m.Match] = []
    for option in options:
        if option.name in ("--src-type", "--dst-type"):
            types = _names(option.words[0], vocabulary.ADDRESS_TYPES, "an address type")
            side: m.Side = "src" if option.name == "--src-type" else "dst"
            found.append(m.AddrType(side, types, option.negated, limit))
    return found


def _iprange(_module: str, option: Option, family: Family) -> m.Match:
    low, high = values.address_span(option.words[0], family)
    return m.IpRange("src" if option.name == "--src-range" else "dst", low, high, option.negated)


def _mac(_module: str, option: Option, _family: Family) -> m.Match:
    text = option.words[0].lower()
    octets = text.split(":")
    if len(octets) != 6 or not all(1 <= len(o) <= 2 and int(o, 16) >= 0 for o in octets):
        raise ValueError(f"'{option.words[0]}' is not an Ethernet address")
    return m.Mac(":".join(octet.zfill(2) for octet in octets), option.negated)


_PHYSDEV_IS = {"--physdev-is-in": "in", "--physdev-is-out": "out", "--physdev-is-bridged": "bridged"}


def _physdev(_module: str, option: Option, _family: Family) -> m.Match:
    match option.name:
        case "--physdev-is-in":
            return m.PhysdevIs("in", option.negated)
        case "--physdev-is-out":
            return m.PhysdevIs("out", option.negated)
        case "--physdev-is-bridged":
            return m.PhysdevIs("bridged", option.negated)
    name, wildcard = interface_name(option.words[0])
    return m.Physdev("in" if option.name == "--physdev-in" else "out", name, wildcard, option.negated)


def interface_name(text: str) -> tuple[str, bool]:
    """``eth0`` -> (eth0, False), ``tap+`` -> (tap, True)."""
    if len(text.encode(errors="surrogateescape")) > 15:
        raise ValueError(f"interface name '{text}' is longer than 15 bytes")
    return (text[:-1], True) if text.endswith("+") else (text, False)


def _devgroup(_module: str, option: Option, _family: Family) -> m.Match:
    text = option.words[0]
    if not text[0].isdigit():
        raise values.NameNotNumber(text)
    value, mask = values.masked(text)
    return m.DevGroup("in" if option.name == "--src-group" else "out", value, mask, option.negated)


def _set(_module: str, options: list[Option], _family: Family) -> list[m.Match]:
    others: list[str] = []
    for option in options:
        if option.name != "--match-set":
            others += (["!"] if option.negated else []) + [option.name, *option.words]
    sets = [option for option in options if option.name == "--match-set"]
    if len(sets) != 1:
        raise ValueError("-m set takes one --match-set NAME FLAGS")
    name, flags = sets[0].words
    return [m.SetMatch(name, tuple(flags.split(",")), sets[0].negated, tuple(others))]


def _rpfilter(_module: str, options: list[Option], _family: Family) -> list[m.Match]:
    given = {option.name for option in options}
    return [m.RpFilter("--loose" in given, "--validmark" in given, "--accept-local" in given, "--invert" in given)]


def _length(_module: str, option: Option, _family: Family) -> m.Match:
    return m.Length(*values.span(option.words[0], 65535), option.negated)


def _ttl(_module: str, option: Option, _family: Family) -> m.Match:
    value = values.number(option.words[0], 255)
    match option.name[-2:]:
        case "lt":
            return m.Ttl("lt", value)
        case "gt":
            return m.Ttl("gt", value)
    return m.Ttl("eq", value, option.negated)


def _dscp(_module: str, option: Option, _family: Family) -> m.Match | None:
    if option.name == "--dscp-class":
        return None
    return m.Dscp(values.number(option.words[0], 63), option.negated)


def _pkttype(_module: str, option: Option, _family: Family) -> m.Match | None:
    kind = option.words[0].lower()
    return m.PktType(kind, option.negated) if kind in ("unicast", "broadcast", "multicast") else None


def _owner(_module: str, option: Option, _family: Family) -> m.Match | None:
    if option.name == "--socket-exists":
        return m.Owner("socket", 0, 0, option.negated)
    if option.name == "--suppl-groups":
        return None
    low, high = values.span(option.words[0], MAX_ID, "-")
    return m.Owner("uid" if option.name == "--uid-owner" else "gid", low, high, option.negated)


MAX_ID = (1 << 32) - 2

_PORT = dict.fromkeys(("--sport", "--source-port", "--dport", "--destination-port"), 1)
_MULTIPORT = dict.fromkeys(("--sports", "--source-ports", "--dports", "--destination-ports", "--ports"), 1)
_CONNTRACK = {
    **dict.fromkeys(("--ctstate", "--ctstatus", "--ctdir", "--ctproto", "--ctexpire"), 1),
    **dict.fromkeys(_CT_TUPLES, 1),
    **{name + "port": 1 for name in _CT_TUPLES},
}
_SET = {
    "--match-set": 2,
    "--return-nomatch": 0,
    "--update-counters": 0,
    "--update-subcounters": 0,
    **dict.fromkeys(("--packets-eq", "--packets-lt", "--packets-gt", "--bytes-eq", "--bytes-lt", "--bytes-gt"), 1),
}

MODULES: dict[str, Module] = {
    "tcp": Module(
        {**_PORT, "--syn": 0, "--tcp-flags": 2, "--tcp-option": 1},
        _one_by_one(_tcp),
    ),
    "udp": Module(_PORT, _one_by_one(_ports)),
    "udplite": Module(_PORT, _one_by_one(_ports)),
    "sctp": Module({**_PORT, "--chunk-types": 2}, _one_by_one(_ports)),
    "dccp": Module({**_PORT, "--dccp-types": 1, "--dccp-option": 1}, _one_by_one(_ports)),
    "multiport": Module(_MULTIPORT, _one_by_one(_ports)),
    "icmp": Module({"--icmp-type": 1}, _one_by_one(_icmp)),
    "icmp6": Module({"--icmpv6-type": 1}, _one_by_one(_icmp)),
    "state": Module({"--state": 1}, _one_by_one(_state)),
    "conntrack": Module(_CONNTRACK, _conntrack),
    "mark": Module({"--mark": 1}, _one_by_one(_mark)),
    "connmark": Module({"--mark": 1}, _one_by_one(_mark)),
    "addrtype": Module(
        {"--src-type": 1, "--dst-type": 1, "--limit-iface-in": 0, "--limit-iface-out": 0},
        _addrtype,
    ),
    "iprange": Module({"--src-range": 1, "--dst-range": 1}, _one_by_one(_iprange)),
    "mac": Module({"--mac-source": 1}, _one_by_one(_mac)),
    "physdev": Module(
        {"--physdev-in": 1, "--physdev-out": 1, **dict.fromkeys(_PHYSDEV_IS, 0)},
        _one_by_one(_physdev),
    ),
    "devgroup": Module({"--src-group": 1, "--dst-group": 1}, _one_by_one(_devgroup)),
    "set": Module(_SET, _set),
    "rpfilter": Module({"--loose": 0, "--validmark": 0, "--accept-local": 0, "--invert": 0}, _rpfilter),
    "length": Module({"--length": 1}, _one_by_one(_length)),
    "ttl": Module({"--ttl": 1, "--ttl-eq": 1, "--ttl-lt": 1, "--ttl-gt": 1}, _one_by_one(_ttl)),
    "hl": Module({"--hl-eq": 1, "--hl-lt": 1, "--hl-gt": 1}, _one_by_one(_ttl)),
    "dscp": Module({"--dscp": 1, "--dscp-class": 1}, _one_by_one(_dscp)),
    "pkttype": Module({"--pkt-type": 1}, _one_by_one(_pkttype)),
    "owner": Module(
        {"--uid-owner": 1, "--gid-owner": 1, "--socket-exists": 0, "--suppl-groups": 0},
        _one_by_one(_owner),
    ),
}
