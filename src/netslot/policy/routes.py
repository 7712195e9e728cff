"""The routes policy: tunnels, tables and rules inside the slot.

Routes and rules carry netslot's protocol number and tunnels an alias, by which they are found again. The slot's
own addresses and default route are not the business of this policy. ``values["uplink_if"]`` must be up.
"""

from __future__ import annotations

import errno
import functools
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TypeVar

from netslot.errors import KernelError, SpecError
from netslot.kernel import fib, netlink
from netslot.policy import tunnels
from netslot.policy.base import NO_LINKS, Difference, Links, Parameters, Values
from netslot.spec.policies import Route, RouteRule, RoutesSection
from netslot.spec.render import render

_IFNAME_BYTES = 15
_PROTOCOLS = {"": 0, "icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58}


def cast(
    section: RoutesSection,
    *,
    values: Values,
    defaults: Parameters,
    links: Links = NO_LINKS,
    directory: Path = Path(),
) -> RoutesDie:
    """Check a template by working it out for one slot; ``defaults`` is what ``stamp`` binds. SpecError otherwise.

    ``links`` are the indexes that links are known to have in a fresh slot; of others the kernel is asked.
    Paths of keys are relative to ``directory``. HostError when the kernel lacks a kind of tunnel.
    """
    die = RoutesDie(section, defaults, links, directory)
    tunnels.probe(tunnels.wanted(section.tunnels, values, directory))
    names = {values["uplink_if"], values.get("guest_if", ""), *(tunnel.name for tunnel in section.tunnels)}
    given = die.wanted_routes(values, defaults, dict.fromkeys(names, 1))
    _check_unique(given, die.wanted_rules(values))
    return die


def _check_unique(routes: Sequence[fib.Route], rules: Sequence[fib.Rule]) -> None:
    """The kernel refuses the second of two routes. Which of two rules of one priority is tried first would hang on
    which was added first, also by a repair."""
    if again := _twice([_key(route) for route in routes]):
        raise SpecError(f"two routes to {again[0]} in table {again[1]}, metric {again[2]}", key="routes.routes")
    if again := _twice([(rule.family, rule.priority) for rule in rules]):
        raise SpecError(f"two rules of one family have priority {again[1]}", key="routes.rules")


def _twice(keys: Sequence[tuple[object, ...]]) -> tuple[object, ...] | None:
    """The first key that is there twice."""
    seen: set[tuple[object, ...]] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


@dataclass(frozen=True, slots=True)
class RoutesDie:
    """Routes that can be put into any number of slots; see :class:`netslot.policy.base.Die`."""

    section: RoutesSection
    defaults: Parameters
    links: Links
    directory: Path

    @property
    def rules(self) -> int:
        """Routing rules do not count as firewall rules."""
        return 0

    @property
    def fallback(self) -> str | None:
        return None

    def stamp(self, values: Values) -> None:
        with netlink.here() as sock:
            self._converge_tunnels(sock, values)
            links = _links(self.section, values, self.links)
            requests = [fib.add_route(route) for route in self.wanted_routes(values, self.defaults, links)]
            sock.execute(requests + [fib.add_rule(rule) for rule in self.wanted_rules(values)])

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Add what is new, then remove what is not wanted any more. A tunnel whose ends change is made anew."""
        with netlink.here() as sock:
            self._converge_tunnels(sock, values)
            self._converge(sock, values, parameters)

    def reset(self, values: Values) -> None:
        """Remove all of netslot's routes and rules that a stamp does not make, and make what is missing."""
        with netlink.here() as sock:
            self._converge_tunnels(sock, values)
            self._converge(sock, values, self.defaults)

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        with netlink.here() as sock:
            found = tunnels.read(sock, tunnels.wanted(self.section.tunnels, values, self.directory))
            try:
                links = _links(self.section, values)
            except KernelError as error:
                return found or [Difference("routes", str(error))]
            wanted_routes = set(self.wanted_routes(values, parameters, links))
            wanted_rules = set(self.wanted_rules(values))
            routes, rules = set(fib.routes(sock)), set(fib.rules(sock))
        missing = sorted([str(r) for r in wanted_routes - routes] + [str(r) for r in wanted_rules - rules])
        surplus = sorted([str(r) for r in routes - wanted_routes] + [str(r) for r in rules - wanted_rules])
        differences = [Difference("routes", f"{text} is missing") for text in missing]
        return found + differences + [Difference("routes", f"{text} should not be there") for text in surplus]

    def _converge_tunnels(self, sock: netlink.Socket, values: Values) -> None:
        if self.section.tunnels:
            tunnels.converge(sock, tunnels.wanted(self.section.tunnels, values, self.directory))

    def _converge(self, sock: netlink.Socket, values: Values, parameters: Parameters) -> None:
        links = _links(self.section, values)
        wanted_routes = self.wanted_routes(values, parameters, links)
        routes, rules, wanted_rules = fib.routes(sock), fib.rules(sock), self.wanted_rules(values)
        # A route that changes in anything but its key is refused beside the old one: those go first.
        keys = {_key(route) for route in wanted_routes}
        surplus = [route for route in routes if route not in wanted_routes]
        requests = [fib.delete_route(route) for route in surplus if _key(route) in keys]
        requests += [fib.add_route(route) for route in wanted_routes if route not in routes]
        requests += [fib.add_rule(rule) for rule in wanted_rules if rule not in rules]
        requests += [fib.delete_rule(rule) for rule in rules if rule not in wanted_rules]
        requests += [fib.delete_route(route) for route in surplus if _key(route) not in keys]
        sock.execute(requests)

    def wanted_routes(self, values: Values, parameters: Parameters, links: Links) -> list[fib.Route]:
        """The routes of one slot; ``links`` are the indexes of the interfaces that they name."""
        found: list[fib.Route] = []
        for number, entry in enumerate(self.section.routes):
            found += _keyed(f"routes.routes.{number}", partial(_routes, entry, values, parameters, links))
        return found

    def wanted_rules(self, values: Values) -> list[fib.Rule]:
        """The routing rules of one slot."""
        found: list[fib.Rule] = []
        for number, entry in enumerate(self.section.rules):
            texts = [_rendered(each, values) for each in (entry.source, entry.destination, entry.ports, entry.input)]
            found += _keyed(f"routes.rules.{number}", partial(_rules, entry, *texts))
        return found


_T = TypeVar("_T")


def _keyed(key: str, work: Callable[[], Sequence[_T]]) -> Sequence[_T]:
    """What ``work`` returns; its SpecErrors and ValueErrors are the entry's that ``key`` names."""
    try:
        return work()
    except ValueError as error:
        raise SpecError(str(error), key=key) from None
    except SpecError as error:
        raise SpecError(error.message, key=key, hint=error.hint) from None


def _key(route: fib.Route) -> tuple[object, ...]:
    return route.destination, route.table, route.metric


def _rendered(text: str, values: Values) -> str:
    return render(text, values, file="[routes]")


def _links(section: RoutesSection, values: Values, known: Links = NO_LINKS) -> Links:
    names = {_rendered(entry.device, values) for entry in section.routes if entry.kind == "unicast"}
    if names <= known.keys():
        return known
    found = {name: known[name] for name in names & known.keys()}
    for name in names - known.keys():
        try:
            found[name] = socket.if_nametoindex(name)
        except OSError as error:
            raise KernelError(f"look up link {name}", error.errno or errno.ENODEV, detail="no such link") from error
    return found


def _destinations(to: str, values: Values, parameters: Parameters) -> list[str]:
    if to.startswith("@"):
        return list(parameters.get(to[1:], ()))
    text = _rendered(to, values)
    return [{"default": "0.0.0.0/0", "default6": "::/0"}.get(text, text)]


def _routes(entry: Route, values: Values, parameters: Parameters, links: Links) -> list[fib.Route]:
    gateways = (entry.via,) if isinstance(entry.via, str) else entry.via
    via = tuple(_rendered(text, values) for text in gateways if text)
    device, source = _rendered(entry.device, values), _rendered(entry.source, values)
    if entry.kind == "unicast" and device not in links:
        hint = f"it has: {', '.join(sorted(links))}"
        raise SpecError(f"the slot has no link {device!r}", hint=hint)
    index = links[device] if entry.kind == "unicast" else 0
    return [_route(entry, to, via, index, source) for to in _destinations(entry.to, values, parameters)]


_network = functools.lru_cache(maxsize=1024)(ip_network)


@functools.lru_cache(maxsize=1024)
def _route(entry: Route, to: str, gateways: tuple[str, ...], device: int, preferred: str) -> fib.Route:
    """Most routes are the same in all slots, so that working them out once is enough; here and below."""
    destination = _network(to)
    via = [ip_address(text) for text in gateways]
    # An entry that a list fills serves both families: each destination takes the gateways of its own.
    own = tuple(gateway for gateway in via if gateway.version == destination.version)
    source = ip_address(preferred) if preferred else None
    if via and not own:
        raise SpecError(f"no gateway of {destination}'s family")
    if source is not None and source.version != destination.version:
        raise SpecError(f"source {source} is not of {destination}'s family")
    if not destination.prefixlen and entry.table == fib.MAIN_TABLE and not entry.metric:
        hint = "put it into a table of its own (table = 100) and say with a rule who uses that"
        raise SpecError("the main table has the slot's own default route", hint=hint)
    return fib.Route(
        destination=destination,
        kind=fib.KINDS[entry.kind],
        gateways=own if entry.kind == "unicast" else (),
        device=device,
        source=source,
        table=entry.table,
        metric=entry.metric,
        mtu=entry.mtu,
        onlink=entry.onlink,
    )


@functools.lru_cache(maxsize=1024)
def _rules(entry: RouteRule, sender: str, receiver: str, range_: str, link: str) -> tuple[fib.Rule, ...]:
    source = ip_network(sender) if sender else None
    destination = ip_network(receiver) if receiver else None
    if len(link.encode()) > _IFNAME_BYTES:
        raise SpecError(f"{link!r} is too long for an interface's name")
    if (entry.kind == "table") != bool(entry.table):
        raise SpecError("a rule names a table, or a kind that drops")
    versions = {net.version for net in (source, destination) if net is not None} or {entry.family} - {0} or {4, 6}
    if len(versions) == 2 and (source or destination):
        raise SpecError("source and destination are of two families")
    if entry.family and versions != {entry.family}:
        raise SpecError(f"family is {entry.family}, and the addresses are IPv{versions.pop()}")
    ports = _ports(range_)
    return tuple(
        fib.Rule(
            family=socket.AF_INET if version == 4 else socket.AF_INET6,
            priority=entry.priority,
            action=fib.ACTIONS[entry.kind],
            table=entry.table,
            source=source,
            destination=destination,
            mark=entry.mark,
            input=link,
            protocol=_PROTOCOLS[entry.protocol],
            ports=ports,
        )
        for version in sorted(versions)
    )


def _ports(text: str) -> tuple[int, int] | None:
    """A port or a range of them; none is any."""
    if not text:
        return None
    low, dash, high = text.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()) or not 1 <= int(low) <= int(high or low) <= 65535:
        raise SpecError(f"{text!r} is no port or range of ports", hint="443 or 8000-8999")
    return int(low), int(high or low)
