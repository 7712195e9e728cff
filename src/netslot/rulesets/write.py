"""From values back to text.

``write`` gives the whole ruleset in iptables-save form: rules word for word as they were read. ``rule_text``
makes the text of a rule from values, for rules that a program composes; parsing it gives the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from netslot.rulesets import matches as m
from netslot.rulesets import targets as t
from netslot.rulesets import values, vocabulary
from netslot.rulesets import words as lexical
from netslot.rulesets.model import Chain, Family, Ruleset


def write(ruleset: Ruleset) -> str:
    """Text that iptables-restore (ip6tables-restore for family 6) loads; give it ``-c`` to restore counters."""
    lines: list[str] = []
    for table in ruleset.tables.values():
        lines.append(f"*{table.name}")
        for chain in table.chains.values():
            packets, volume = chain.counters or (0, 0)
            lines.append(f":{chain.name} {chain.policy or '-'} [{packets}:{volume}]")
        for chain in table.chains.values():
            lines += _rule_lines(chain)
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def _rule_lines(chain: Chain) -> Iterable[str]:
    head = f"-A {chain.name}"
    for rule in chain.rules:
        line = f"{head} {rule.text}" if rule.text else head
        yield line if rule.counters is None else f"[{rule.counters[0]}:{rule.counters[1]}] {line}"


def rule_text(matches: Iterable[m.Match], target: t.Target, family: Family, comment: str = "") -> str:
    """The text after ``-A CHAIN ``. Matches are written in the order given, protocol and addresses first."""
    words: list[str] = []
    given: set[str] = set()  # the options of the module that was written last
    module = ""
    for match in sorted(matches, key=_basic_first):
        these = match_words(match, family)
        named = these[1] if these[0] == "-m" else ""
        options = {word for word in these if word.startswith("--")}
        if named and named == module and named not in _SEPARATE and not given & options:
            these = these[2:]
            given |= options
        else:
            module, given = named, options
        words.append(lexical.join(these))
    if comment:
        words.append(f"-m comment --comment {lexical.quote(comment)}")
    tail = target_words(target, family)
    if tail:
        words.append(lexical.join(tail))
    return " ".join(words)


_SEPARATE = ("set", "conntrack")
"""Modules whose options mean something else side by side than in two matches (see match_options._conntrack)."""


def _basic_first(match: m.Match) -> int:
    order: tuple[type, ...] = (m.Address, m.Interface, m.Protocol, m.Fragment)
    return order.index(type(match)) if type(match) in order else len(order)


def match_words(match: m.Match, family: Family) -> tuple[str, ...]:
    """The words of one condition, its ``-m`` included."""
    if isinstance(match, m.Opaque):
        return match.words
    if isinstance(match, m.RpFilter):
        return _rpfilter_words(match)
    writer = _WRITERS[type(match)]
    module, options = writer(match, family)
    sign = ("!",) if getattr(match, "negated", False) else ()
    head = ("-m", module) if module else ()
    return (*head, *sign, *options)


_Words = tuple[str, tuple[str, ...]]  # module ("" for a basic option); option and its values


def _address(x: m.Address, family: Family) -> _Words:
    return "", ("-s" if x.side == "src" else "-d", values.network_text(x.value, x.mask, family))


def _iprange(x: m.IpRange, family: Family) -> _Words:
    low, high = (values.address_text(value, family) for value in (x.low, x.high))
    return "iprange", (f"--{x.side}-range", f"{low}-{high}")


def _interface(x: m.Interface, _family: Family) -> _Words:
    return "", ("-i" if x.direction == "in" else "-o", x.name + "+" * x.wildcard)


def _protocol(x: m.Protocol, _family: Family) -> _Words:
    return "", ("-p", vocabulary.PROTOCOL_NAMES.get(x.number, str(x.number)))


def _ports(x: m.Ports, _family: Family) -> _Words:
    plural = "s" if x.module == "multiport" else ""
    side = {"src": "--sport", "dst": "--dport", "either": "--port"}[x.side]
    return x.module, (side + plural, ",".join(values.span_text(low, high) for low, high in x.ranges))


def _icmp(x: m.IcmpType, _family: Family) -> _Words:
    option = "--icmp-type" if x.module == "icmp" else "--icmpv6-type"
    if x.module == "icmp" and x.type == 255:
        return x.module, (option, "any")
    codes = "" if (x.code_low, x.code_high) == (0, 255) else "/" + values.span_text(x.code_low, x.code_high)
    return x.module, (option, f"{x.type}{codes}")


def _flag_names(bits: int) -> str:
    names = [name for name, bit in vocabulary.TCP_FLAGS.items() if bit in (1, 2, 4, 8, 16, 32) and bits & bit]
    return ",".join(names) or "NONE"


def _tcp_flags(x: m.TcpFlags, _family: Family) -> _Words:
    return "tcp", ("--tcp-flags", _flag_names(x.mask), _flag_names(x.value))


def _ct_state(x: m.CtState, _family: Family) -> _Words:
    return x.module, ("--state" if x.module == "state" else "--ctstate", ",".join(sorted(x.states)))


def _ct_address(x: m.CtAddress, family: Family) -> _Words:
    return "conntrack", (f"--ct{x.tuple_}{x.side}", values.network_text(x.value, x.mask, family))


def _addrtype(x: m.AddrType, _family: Family) -> _Words:
    limit = (f"--limit-iface-{x.interface}",) if x.interface else ()
    return "addrtype", (f"--{x.side}-type", ",".join(sorted(x.types)), *limit)


def _physdev_is(x: m.PhysdevIs, _family: Family) -> _Words:
    return "physdev", (f"--physdev-is-{x.what}",)


def _devgroup(x: m.DevGroup, _family: Family) -> _Words:
    option = "--src-group" if x.direction == "in" else "--dst-group"
    return "devgroup", (option, values.masked_text(x.value, x.mask))


def _rpfilter_words(x: m.RpFilter) -> tuple[str, ...]:
    given = {
        "--loose": x.loose,
        "--validmark": x.validmark,
        "--accept-local": x.accept_local,
        "--invert": x.negated,
    }
    return ("-m", "rpfilter", *(name for name, on in given.items() if on))


def _ttl(x: m.Ttl, family: Family) -> _Words:
    name = "ttl" if family == 4 else "hl"
    return name, (f"--{name}-{x.op}", str(x.value))


def _owner(x: m.Owner, _family: Family) -> _Words:
    if x.kind == "socket":
        return "owner", ("--socket-exists",)
    return "owner", (f"--{x.kind}-owner", values.span_text(x.low, x.high, "-"))


_WRITERS: dict[type, Callable[[Any, Family], _Words]] = {
    m.Address: _address,
    m.IpRange: _iprange,
    m.Interface: _interface,
    m.Protocol: _protocol,
    m.Fragment: lambda x, f: ("", ("-f",)),
    m.Ports: _ports,
    m.IcmpType: _icmp,
    m.TcpFlags: _tcp_flags,
    m.TcpOption: lambda x, f: ("tcp", ("--tcp-option", str(x.number))),
    m.CtState: _ct_state,
    m.CtStatus: lambda x, f: ("conntrack", ("--ctstatus", ",".join(sorted(x.statuses)))),
    m.CtDirection: lambda x, f: ("conntrack", ("--ctdir", x.direction)),
    m.CtAddress: _ct_address,
    m.CtPorts: lambda x, f: ("conntrack", (f"--ct{x.tuple_}{x.side}port", values.span_text(x.low, x.high))),
    m.CtProtocol: lambda x, f: ("conntrack", ("--ctproto", str(x.number))),
    m.Mark: lambda x, f: ("mark", ("--mark", values.masked_text(x.value, x.mask))),
    m.Connmark: lambda x, f: ("connmark", ("--mark", values.masked_text(x.value, x.mask))),
    m.AddrType: _addrtype,
    m.Mac: lambda x, f: ("mac", ("--mac-source", x.address)),
    m.Physdev: lambda x, f: ("physdev", (f"--physdev-{x.direction}", x.name + "+" * x.wildcard)),
    m.PhysdevIs: _physdev_is,
    m.DevGroup: _devgroup,
    m.SetMatch: lambda x, f: ("set", ("--match-set", x.name, ",".join(x.flags), *x.options)),
    m.Length: lambda x, f: ("length", ("--length", values.span_text(x.low, x.high))),
    m.Ttl: _ttl,
    m.Dscp: lambda x, f: ("dscp", ("--dscp", f"{x.value:#04x}")),
    m.PktType: lambda x, f: ("pkttype", ("--pkt-type", x.type)),
    m.Owner: _owner,
}


def target_words(target: t.Target, family: Family) -> tuple[str, ...]:
    """The words of a target, its ``-j`` or ``-g`` included; none for NoTarget."""
    match target:
        case t.NoTarget():
            return ()
        case t.Accept() | t.Drop() | t.Return():
            return ("-j", type(target).__name__.upper())
        case t.Jump():
            return ("-j", target.chain)
        case t.Goto():
            return ("-g", target.chain)
        case t.Reject():
            return ("-j", "REJECT", "--reject-with", target.with_)
        case t.Dnat() | t.Snat() | t.Masquerade() | t.Redirect():
            return _nat_words(target, family)
        case t.Netmap():
            return ("-j", "NETMAP", "--to", values.network_text(target.value, target.mask, family))
        case t.SetMark():
            return ("-j", "MARK", "--set-xmark", f"{target.value:#x}/{target.mask:#x}")
        case t.SetConnmark():
            return ("-j", "CONNMARK", "--set-xmark", f"{target.value:#x}/{target.mask:#x}")
        case t.SaveMark() | t.RestoreMark():
            option = "--save-mark" if isinstance(target, t.SaveMark) else "--restore-mark"
            masks = ("--nfmask", f"{target.nfmask:#x}", "--ctmask", f"{target.ctmask:#x}")
            return ("-j", "CONNMARK", option, *masks)
        case t.Notrack() | t.CtTarget() | t.Log() | t.Modify() | t.OpaqueTarget():
            return target.words


def _nat_words(target: t.Dnat | t.Snat | t.Masquerade | t.Redirect, family: Family) -> tuple[str, ...]:
    to = target.to
    ports = ""
    if to.ports is not None:
        ports = values.span_text(*to.ports, "-") + (f"/{to.base_port}" if to.base_port is not None else "")
    flags = tuple(sorted(to.flags))
    name = type(target).__name__.upper()
    if isinstance(target, t.Masquerade | t.Redirect):
        return ("-j", name, *(("--to-ports", ports) if ports else ()), *flags)
    addresses = ""
    if to.address is not None:
        low, high = to.address
        ends = [values.address_text(low, family)] + [values.address_text(high, family)] * (high != low)
        addresses = "-".join(ends)
        if family == 6 and ports:
            addresses = f"[{addresses}]"
    option = "--to-destination" if isinstance(target, t.Dnat) else "--to-source"
    text = addresses + (f":{ports}" if ports else "")
    return ("-j", name, *((option, text) if text else ()), *flags)
