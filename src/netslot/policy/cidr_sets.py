"""List parameters of CIDRs as IP sets: NAME holds the IPv4 ones, NAME6 the IPv6 ones, both of type ``hash:net``.

Used by the policies whose rules say ``-m set --match-set NAME dst``. Rules know a set by its index, so the sets of
a template are always made first and in one order in every slot; :func:`ready` tells whether that still holds.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from netslot.errors import KernelError, UsageError
from netslot.kernel import ipset, netlink
from netslot.policy.base import Difference

FILLING: Final = "netslot-filling"
"""Set in which new content is collected before it is swapped in; one that is found was left by a crash."""

_HALVES = {4: (("0.0.0.0", 1), ("128.0.0.0", 1)), 6: (("::", 1), ("8000::", 1))}
Forms = dict[int, list[tuple[bytes, bytes]]]


def _forms(form: Callable[[int, int], tuple[bytes, bytes]]) -> Forms:
    return {
        4: [form(ipset.FAMILY_IPV4, length) for length in range(33)],
        6: [form(ipset.FAMILY_IPV6, length) for length in range(129)],
    }


_ADDED: Final = _forms(ipset.element_form)
_LISTED: Final = _forms(ipset.listed_form)


@dataclass(frozen=True, slots=True)
class CidrSet:
    """One set of a slot: the family's half of list parameter ``parameter``."""

    name: str
    parameter: str
    version: int
    """4 or 6."""

    @property
    def family(self) -> int:
        return ipset.FAMILY_IPV4 if self.version == 4 else ipset.FAMILY_IPV6


def sets_of(parameters: Iterable[str], used: frozenset[str]) -> tuple[CidrSet, ...]:
    """The sets that rules which say the words ``used`` need, in the order in which they are made."""
    found = []
    for parameter in parameters:
        for name, version in ((parameter, 4), (f"{parameter}6", 6)):
            if name in used:
                found.append(CidrSet(ipset.check_name(name), parameter, version))
    return tuple(found)


def encode(cidrs: Sequence[str], version: int, forms_by_version: Forms = _ADDED) -> list[bytes]:
    """Elements for all CIDRs of one IP version; host bits are cleared by the kernel. UsageError for a wrong one.

    A prefix of length 0, which ``hash:net`` has no room for, becomes its two halves.
    """
    forms = forms_by_version[version]
    domain = socket.AF_INET if version == 4 else socket.AF_INET6
    top, pton = str(len(forms) - 1), socket.inet_pton
    found = []
    for cidr in cidrs:
        address, _, length = cidr.partition("/")
        if (":" in address) == (version == 4):
            continue
        try:
            raw = pton(domain, address)
            number = int(length or top)
            if number == 0:
                found += [forms[bits][0] + pton(domain, half) + forms[bits][1] for half, bits in _HALVES[version]]
                continue
            if number < 0:
                raise ValueError(length)
            before, behind = forms[number]
        except (OSError, ValueError, IndexError) as error:
            raise UsageError(f"not a CIDR: {cidr!r}", hint="write it as 203.0.113.0/24 or 2001:db8::/32") from error
        found.append(before + raw + behind)
    return found


def create(link: netlink.Socket, sets: Sequence[CidrSet], content: Mapping[str, Sequence[str]]) -> None:
    """Make and fill all sets in a namespace that has none. KernelError when they do not get the indexes 0, 1, ..."""
    requests = []
    for each in sets:
        elements = encode(content.get(each.parameter, ()), each.version)
        requests += _filled(each.name, each.family, elements)
    ipset.execute(link, requests)
    if not ready(sets):
        raise KernelError(
            "ipset create", 16, detail="other sets hold the places that the rules count on", hint="reset the slot"
        )


def ready(sets: Sequence[CidrSet]) -> bool:
    """Whether every set is there, with the index that the rules know it by; costs a microsecond or two a set."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as sock:
        return all(ipset.name_at(sock, number) == each.name for number, each in enumerate(sets))


def sound(link: netlink.Socket, sets: Sequence[CidrSet]) -> bool:
    """As :func:`ready`, and every set is of the type that it should be."""
    if not sets:
        return True
    headers = {header.name: header for header in ipset.headers(link)}
    kinds = [(headers[each.name].type, headers[each.name].family) for each in sets if each.name in headers]
    return kinds == [(ipset.TYPE, each.family) for each in sets] and ready(sets)


def any_other(sets: Sequence[CidrSet]) -> bool:
    """Whether the namespace has a set that was made after these; one of several may be missed if others went."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as sock:
        return ipset.name_at(sock, len(sets)) != ""


def bind(link: netlink.Socket, sets: Sequence[CidrSet], content: Mapping[str, Sequence[str]]) -> None:
    """Exchange the content of the sets whose parameter is in ``content``; each set changes at one instant."""
    for each in sets:
        if each.parameter not in content:
            continue
        elements = encode(content[each.parameter], each.version)
        try:
            # Not in one go: the kernel would carry out the swap also after an addition that failed.
            ipset.execute(link, [ipset.destroy(FILLING, missing_ok=True), *_filled(FILLING, each.family, elements)])
            ipset.execute(link, [ipset.swap(each.name, FILLING)])
        finally:
            ipset.execute(link, [ipset.destroy(FILLING, missing_ok=True)])


def _filled(name: str, family: int, elements: Sequence[bytes]) -> list[netlink.Request]:
    return [ipset.create(name, family, len(elements)), *ipset.add(name, family, elements)]


def read(sets: Sequence[CidrSet], content: Mapping[str, Sequence[str]], *, where: str = "ipset") -> list[Difference]:
    """Compare the sets of the calling thread's namespace with ``content`` by parameter."""
    if not sets and not any_other(sets):
        return []
    found = []
    with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
        headers = {header.name: header for header in ipset.headers(link)}
        for each in sets:
            header = headers.pop(each.name, None)
            if header is None:
                found.append(Difference(f"{where} {each.name}", "missing"))
            elif header.type != ipset.TYPE or header.family != each.family:
                found.append(Difference(f"{where} {each.name}", f"is a {header.type}, should be {ipset.TYPE}"))
            else:
                found += _compare(link, each, header.elements, content.get(each.parameter, ()), where)
    found += [Difference(f"{where} {name}", "a set that the template does not have") for name in headers]
    if not found and not ready(sets):
        found.append(Difference(where, "the sets are not in the order that the rules count on"))
    return found


def _compare(
    link: netlink.Socket, each: CidrSet, elements: int, cidrs: Sequence[str], where: str
) -> Iterable[Difference]:
    if not cidrs and not elements:
        return []
    ours = encode(cidrs, each.version, _LISTED)
    theirs = ipset.elements(link, each.name)
    if set(ours) == set(theirs):
        return []
    # Host bits, which the kernel clears, may be all that differs.
    wanted = {_key(raw, each.version) for raw in ours}
    present = {_key(raw, each.version) for raw in theirs}
    place = f"{where} {each.name}"
    missing, added = wanted - present, present - wanted
    found = [Difference(place, f"element {_words(key, each.version)} missing") for key in sorted(missing)[:10]]
    found += [Difference(place, f"element {_words(key, each.version)} added") for key in sorted(added)[:10]]
    rest = max(0, len(missing) - 10) + max(0, len(added) - 10)
    if rest:
        found.append(Difference(place, f"{rest} more elements differ"))
    return found


def _key(raw: bytes, version: int) -> tuple[int, int]:
    """(network as a number, prefix length) of an element's attributes, ours or the kernel's."""
    # Both write the address first and the prefix length behind it, as element_form does.
    size = 4 if version == 4 else 16
    length = raw[12 + size]
    shift = 8 * size - length
    return int.from_bytes(raw[8 : 8 + size], "big") >> shift << shift, length


def _words(key: tuple[int, int], version: int) -> str:
    size, domain = (4, socket.AF_INET) if version == 4 else (16, socket.AF_INET6)
    return f"{socket.inet_ntop(domain, key[0].to_bytes(size, 'big'))}/{key[1]}"


def restore(link: netlink.Socket, sets: Sequence[CidrSet], content: Mapping[str, Sequence[str]]) -> None:
    """Bring sets whose content is not that of ``content`` back to it; the others are left alone."""
    if not sets:
        return
    elements = {header.name: header.elements for header in ipset.headers(link)}
    for each in sets:
        cidrs = content.get(each.parameter, ())
        if _compare(link, each, elements[each.name], cidrs, ""):
            bind(link, [each], {each.parameter: cidrs})


def reset(link: netlink.Socket, sets: Sequence[CidrSet], content: Mapping[str, Sequence[str]]) -> None:
    """Bring sets that are :func:`sound` back to ``content``, and destroy all others."""
    restore(link, sets, content)
    mine = {each.name for each in sets}
    ipset.execute(link, [ipset.destroy(name) for name in ipset.names(link) if name not in mine])


def destroy_all(link: netlink.Socket) -> None:
    """Destroy every set of the namespace; no rule may refer to one."""
    ipset.execute(link, [ipset.destroy(name) for name in ipset.names(link)])
