"""From the words after ``-j`` to a Target value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from netslot.rulesets import targets as t
from netslot.rulesets import values, vocabulary
from netslot.rulesets.match_options import Option
from netslot.rulesets.model import Family

Builder = Callable[[str, list[Option], Family], t.Target]


class TargetKind(NamedTuple):
    """A modelled target: its options and how many words each takes, and what builds it."""

    arity: Mapping[str, int]
    build: Builder


VERDICTS: dict[str, t.Target] = {"ACCEPT": t.Accept(), "DROP": t.Drop(), "RETURN": t.Return()}

NO_TARGET = t.NoTarget()


def words_of(name: str, options: list[Option]) -> tuple[str, ...]:
    words = ["-j", name]
    for option in options:
        words += [option.name, *option.words]
    return tuple(words)


def _reject(_name: str, options: list[Option], family: Family) -> t.Target:
    default = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    return t.Reject(options[0].words[0] if options else default)


def _nat(options: list[Option], family: Family) -> t.NatTarget | None:
    """None when the words say more than one range, or name a port by service: then it is kept opaque."""
    address: tuple[int, int] | None = None
    ports: tuple[int, int] | None = None
    base: int | None = None
    flags = []
    destinations = 0
    for option in options:
        if option.name in ("--to-destination", "--to-source"):
            destinations += 1
            address, ports, base = _nat_range(option.words[0], family)
        elif option.name in ("--to-ports", "--to-port"):
            ports, base = _port_range(option.words[0])
        else:
            flags.append(option.name)
    return t.NatTarget(address, ports, base, frozenset(flags)) if destinations <= 1 else None


def _nat_range(text: str, family: Family) -> tuple[tuple[int, int] | None, tuple[int, int] | None, int | None]:
    """``[A[-B]][:P[-Q[/BASE]]]``; IPv6 addresses stand in brackets when a port follows."""
    if text.startswith("-"):
        raise ValueError(f"'{text}' stands where an address should; expected ADDRESS[-ADDRESS][:PORT[-PORT]]")
    port_text = ""
    if family == 6 and text.startswith("["):
        addresses, _, rest = text[1:].partition("]")
        if addresses.count("[") or rest.startswith("-["):
            addresses, _, rest = text.replace("[", "").rpartition("]")
            addresses = addresses.replace("]", "")
        port_text = rest.removeprefix(":")
    elif family == 6 and (text.startswith("::") or not text.startswith(":")):
        addresses = text
    else:
        addresses, _, port_text = text.partition(":")
    span = values.address_span(addresses, family) if addresses else None
    ports, base = _port_range(port_text) if port_text else (None, None)
    return span, ports, base


def _port_range(text: str) -> tuple[tuple[int, int], int | None]:
    ports, slash, base = text.partition("/")
    return values.span(ports, 65535, "-"), values.number(base, 65535) if slash else None


def _translation(make: Callable[[t.NatTarget], t.Target], long: str) -> Builder:
    """``long`` is what ``--to``, as people write it, is short for."""

    def build(name: str, options: list[Option], family: Family) -> t.Target:
        options = [option._replace(name=long) if option.name == "--to" else option for option in options]
        try:
            to = _nat(options, family)
        except values.NameNotNumber:
            to = None
        return make(to) if to is not None else t.OpaqueTarget(name, words_of(name, options))

    return build


def _netmap(_name: str, options: list[Option], family: Family) -> t.Target:
    if not options:
        raise ValueError("NETMAP needs --to PREFIX")
    return t.Netmap(*values.network(options[0].words[0], family))


def _set_mark(option: Option) -> tuple[int, int] | None:
    """(value, mask) with ``new = (old & ~mask) ^ value``, for the five ways to say it (libxt_MARK)."""
    ones = values.MARK_BITS
    match option.name:
        case "--set-xmark":
            return values.masked(option.words[0])
        case "--set-mark":
            value, mask = values.masked(option.words[0])
            return value, value | mask
        case "--and-mark":
            return 0, values.number(option.words[0], ones) ^ ones
        case "--or-mark":
            value = values.number(option.words[0], ones)
            return value, value
        case "--xor-mark":
            return values.number(option.words[0], ones), 0
    return None


def _mark(_name: str, options: list[Option], _family: Family) -> t.Target:
    change = _set_mark(options[0]) if len(options) == 1 else None
    if change is None:
        raise ValueError("MARK needs one of --set-xmark --set-mark --and-mark --or-mark --xor-mark")
    return t.SetMark(*change)


def _connmark(name: str, options: list[Option], _family: Family) -> t.Target:
    given = {option.name: option for option in options}
    ones = values.MARK_BITS
    masks = {key: values.number(given[key].words[0], ones) for key in _CONNMARK_MASKS if key in given}
    common = masks.get("--mask", ones)
    nfmask, ctmask = masks.get("--nfmask", common), masks.get("--ctmask", common)
    if "--save-mark" in given:
        return t.SaveMark(nfmask, ctmask)
    if "--restore-mark" in given:
        return t.RestoreMark(nfmask, ctmask)
    for option in options:
        change = _set_mark(option)
        if change is not None and len(options) == 1:
            return t.SetConnmark(*change)
    return t.Modify(name, words_of(name, options))


_CONNMARK_MASKS = ("--mask", "--nfmask", "--ctmask")


def _ct(name: str, options: list[Option], _family: Family) -> t.Target:
    words = words_of(name, options)
    if name == "NOTRACK" or any(option.name == "--notrack" for option in options):
        return t.Notrack(words)
    zone = next((option.words[0] for option in options if option.name == "--zone"), "")
    return t.CtTarget(words, values.number(zone, 65535) if zone.isdigit() else None)


_MARKS = dict.fromkeys(("--set-xmark", "--set-mark", "--and-mark", "--or-mark", "--xor-mark"), 1)
_NAT_OPTIONS = {"--to": 1, "--random": 0, "--random-fully": 0, "--persistent": 0}

TARGETS: dict[str, TargetKind] = {
    "REJECT": TargetKind({"--reject-with": 1}, _reject),
    "DNAT": TargetKind({"--to-destination": 1, **_NAT_OPTIONS}, _translation(t.Dnat, "--to-destination")),
    "SNAT": TargetKind({"--to-source": 1, **_NAT_OPTIONS}, _translation(t.Snat, "--to-source")),
    "MASQUERADE": TargetKind(
        {"--to-ports": 1, "--to-port": 1, **_NAT_OPTIONS}, _translation(t.Masquerade, "--to-ports")
    ),
    "REDIRECT": TargetKind({"--to-ports": 1, "--to-port": 1, **_NAT_OPTIONS}, _translation(t.Redirect, "--to-ports")),
    "NETMAP": TargetKind({"--to": 1}, _netmap),
    "MARK": TargetKind(_MARKS, _mark),
    "CONNMARK": TargetKind(
        {**_MARKS, "--save-mark": 0, "--restore-mark": 0, **dict.fromkeys(_CONNMARK_MASKS, 1)},
        _connmark,
    ),
    "CT": TargetKind(
        {
            "--notrack": 0,
            **dict.fromkeys(("--zone", "--zone-orig", "--zone-reply", "--helper", "--timeout"), 1),
            **dict.fromkeys(("--ctevents", "--expevents"), 1),
        },
        _ct,
    ),
    "NOTRACK": TargetKind({}, _ct),
}


def unmodelled(name: str, words: tuple[str, ...]) -> t.Target:
    """A target kept word for word; ``words`` are those after the name."""
    full = ("-j", name, *words)
    if name in vocabulary.LOG_TARGETS:
        return t.Log(name, full)
    if name in vocabulary.MODIFY_TARGETS:
        return t.Modify(name, full)
    return t.OpaqueTarget(name, full)
