"""The rates policy: bandwidth, packets and connections of one slot, on its own links.

Bandwidth is shaped by a token bucket queue on the link that sends: towards the outside the uplink, towards the
workload its inner link. A workload that lives in the slot itself has no inner link, so what comes to it is
dropped above the limit instead of queued. Packets and connections are limited by a small nf_tables table, which is
one with the slot's other nf_tables rules: of these a slot has one die. All limits are per slot because the link, the
table and connection tracking's count are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from netslot.errors import SpecError
from netslot.kernel import netlink, rtnetlink, tc
from netslot.policy.base import NO_LINKS, Die, Difference, Links, Parameters, Values
from netslot.spec.policies import Quantity, Rate, RatesSection, quantity
from netslot.spec.render import render

TABLE = "netslot_rates"
"""The nf_tables table that the limits of packets and connections are in."""

_LEAST_BURST = 64 * 1024
"""Bytes: a segment as large as the kernel hands down in one piece (GSO) must fit the bucket."""
_LEAST_BITS, _MOST_BITS = 8_000, 200_000_000_000
_MOST_SECONDS = 250
"""How long a bucket may take to fill: the kernel counts its depth in 32 bits of 64 ns."""
_WORD = 0xFFFFFFFF
_MTU, _ETHERNET_HEADER = 1500, 14
_QUEUE_SECONDS = 0.05
"""How long a packet may wait in a full queue before it is dropped."""
_DEPTH_TOLERANCE_NS = 256
"""The kernel works out a bucket's depth by a multiplication that is not exact (psched_ratecfg_precompute())."""


def cast(section: RatesSection, *, values: Values, links: Links = NO_LINKS) -> RatesDie:
    """The token buckets of a template, checked by working them out for one slot. SpecError for a value that is none.

    Limits of packets and connections are rules: :func:`nft_text`, for which :func:`numbers` has the values.
    ``links`` are the indexes that links are known to have in a fresh slot; of others the kernel is asked.
    """
    die = RatesDie(section, bool(values.get("guest_if")), links)
    die.queues(values)
    numbers(section, values)
    return die


@dataclass(frozen=True, slots=True)
class _Shape:
    """A token bucket on one link: bytes a second, bucket and queue in bytes."""

    link: str
    rate: int
    burst: int
    limit: int


@dataclass(frozen=True, slots=True)
class RatesDie:
    """Token buckets that can be put on any slot's links; see :class:`netslot.policy.base.Die`."""

    section: RatesSection
    inner: bool
    links: Links

    @property
    def rules(self) -> int:
        """Queues do not count as rules."""
        return 0

    @property
    def fallback(self) -> str | None:
        return None

    def stamp(self, values: Values) -> None:
        """Costs least while the links are down, as with :func:`netslot.kernel.tc.add_clsact`."""
        self._set_queues(values, self.links)

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Change rates in place: queues keep their packets."""
        self._set_queues(values, NO_LINKS)

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        differences: list[Difference] = []
        with netlink.here() as sock:
            for shape in self.queues(values):
                present = [q for q in tc.queues(sock, rtnetlink.link_index(sock, shape.link)) if q.kind == "tbf"]
                if not present:
                    differences.append(Difference(f"rates {shape.link}", "the token bucket is missing"))
                    continue
                differences += [Difference(f"rates {shape.link}", what) for what in _changes(shape, present[0])]
        return differences

    def reset(self, values: Values) -> None:
        """As after a stamp: full buckets, empty queues. A bucket that is only changed keeps its debt."""
        with netlink.here() as sock:
            sock.execute([tc.del_root_queue(rtnetlink.link_index(sock, shape.link)) for shape in self.queues(values)])
        self._set_queues(values, NO_LINKS)

    def queues(self, values: Values) -> list[_Shape]:
        """The token buckets of one slot."""
        found: list[_Shape] = []
        directions = [("egress", self.section.egress, values["uplink_if"])]
        if self.inner:
            directions.append(("ingress", self.section.ingress, values["guest_if"]))
        for name, rate, link in directions:
            if rate.bandwidth is not None:
                amounts = _bandwidth(rate, values, name)
                found.append(_Shape(link, amounts[0], amounts[1], amounts[1] + int(amounts[0] * _QUEUE_SECONDS)))
        return found

    def _set_queues(self, values: Values, known: Links) -> None:
        shapes = self.queues(values)
        if not shapes:
            return
        with netlink.here() as sock:
            indexes = [known.get(shape.link) or rtnetlink.link_index(sock, shape.link) for shape in shapes]
            sock.execute(
                tc.set_token_bucket(index, shape.rate, shape.burst, shape.limit)
                for index, shape in zip(indexes, shapes, strict=True)
            )


def _changes(shape: _Shape, queue: tc.Queue) -> Iterator[str]:
    if queue.rate != shape.rate:
        yield f"{queue.rate * 8} bits a second, not {shape.rate * 8}"
        return  # the rest follows from the rate
    depth = shape.burst * 1_000_000_000 // shape.rate
    if abs(queue.depth - depth) > _DEPTH_TOLERANCE_NS + depth // 1000:
        yield f"a burst of {queue.depth * shape.rate // 1_000_000_000} bytes, not {shape.burst}"
    if queue.limit != shape.limit:
        yield f"{queue.limit} bytes may wait, not {shape.limit}"


def _amount(value: Quantity, values: Values, key: str, low: int, high: int) -> int:
    text = render(value, values, file="[rates]") if isinstance(value, str) else value
    number = quantity(text, key=key)
    if not low <= number <= high:
        raise SpecError(f"{number} is not from {low} to {high}", key=key)
    return number


def _bandwidth(rate: Rate, values: Values, name: str) -> tuple[int, int]:
    """Bytes a second, and the burst in bytes: within what the kernel's token bucket can hold and count."""
    key = f"rates.{name}.bandwidth"
    size = _amount(rate.bandwidth or 0, values, key, _LEAST_BITS, _MOST_BITS) // 8
    if rate.burst is None:
        return size, max(_LEAST_BURST, size // 100)
    key = f"rates.{name}.burst"
    burst = _amount(rate.burst, values, key, int(values.get("mtu", _MTU)) + _ETHERNET_HEADER, _WORD)
    if burst // size > _MOST_SECONDS or burst + int(size * _QUEUE_SECONDS) > _WORD:
        raise SpecError(f"{burst} bytes are too many for {size * 8} bits a second", key=key)
    return size, burst


def numbers(section: RatesSection, values: Values) -> dict[str, str]:
    """One slot's values of the variables that :func:`nft_text` uses. SpecError for one that nft cannot take."""
    given: dict[str, tuple[Quantity | None, str, int]] = {
        "rates_egress_packets": (section.egress.packets, "egress.packets", 1),
        "rates_egress_packets_burst": (section.egress.packet_burst, "egress.packet_burst", 1),
        "rates_ingress_packets": (section.ingress.packets, "ingress.packets", 1),
        "rates_ingress_packets_burst": (section.ingress.packet_burst, "ingress.packet_burst", 1),
        "rates_new_connections": (section.new_connections, "new_connections", 1),
        "rates_new_connections_burst": (section.new_connections_burst, "new_connections_burst", 1),
        "rates_connections": (section.connections, "connections", 0),
    }
    found = {
        name: _amount(value, values, f"rates.{key}", least, _WORD)
        for name, (value, key, least) in given.items()
        if value is not None
    }
    for key in ("rates_egress_packets", "rates_ingress_packets"):
        if key in found:
            found.setdefault(f"{key}_burst", max(16, found[key] // 10))
    if "rates_new_connections" in found:
        found.setdefault("rates_new_connections_burst", max(1, found["rates_new_connections"]))
    if section.ingress.bandwidth is not None:
        size, burst = _bandwidth(section.ingress, values, "ingress")
        found |= {"rates_ingress_bytes": size, "rates_ingress_bytes_burst": burst}
    return {key: str(number) for key, number in found.items()}


@dataclass(frozen=True, slots=True)
class WithNumbers:
    """A die whose rules include :func:`nft_text`: gives it the numbers beside the slot's own values."""

    die: Die
    section: RatesSection

    @property
    def rules(self) -> int:
        return self.die.rules

    @property
    def fallback(self) -> str | None:
        return self.die.fallback

    def stamp(self, values: Values) -> None:
        self.die.stamp(self._with(values))

    def bind(self, values: Values, parameters: Parameters) -> None:
        self.die.bind(self._with(values), parameters)

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        return self.die.read(self._with(values), parameters)

    def reset(self, values: Values) -> None:
        self.die.reset(self._with(values))

    def _with(self, values: Values) -> dict[str, str]:
        return {**values, **numbers(self.section, values)}


def bindable(section: RatesSection) -> list[str]:
    """The variables of :func:`nft_text` that a lease's parameters can change."""
    limits = (section.egress, section.ingress)
    rates = [rate for limit in limits for rate in (limit.bandwidth, limit.burst, limit.packets, limit.packet_burst)]
    connections = [section.new_connections, section.new_connections_burst, section.connections]
    if not any(isinstance(value, str) and "${" in value for value in rates + connections):
        return []
    return [name for name in _VARIABLES if f"${{{name}}}" in nft_text(section, inner=False)]


_VARIABLES = tuple(
    f"rates_{name}{suffix}"
    for name in ("egress_packets", "ingress_packets", "ingress_bytes", "new_connections", "connections")
    for suffix in ("", "_burst")
)


def nft_text(section: RatesSection, *, inner: bool) -> str:
    """The table as nft reads it, with variables for all numbers; empty when nothing is limited by it.

    ``inner`` says that the slot has an inner link, which shapes what goes to the workload.
    """

    def over(name: str, unit: str = "", burst: str = " packets") -> str:
        return f"limit rate over ${{rates_{name}}}{unit}/second burst ${{rates_{name}_burst}}{burst} counter drop"

    police: list[str] = []
    out: list[str] = []
    admit: list[str] = []
    if section.ingress.packets is not None:
        police.append(f'iifname "${{uplink_if}}" {over("ingress_packets")}')
    if section.ingress.bandwidth is not None and not inner:
        police.append(f'iifname "${{uplink_if}}" {over("ingress_bytes", " bytes", " bytes")}')
    if section.egress.packets is not None:
        out.append(f'oifname "${{uplink_if}}" {over("egress_packets")}')
    if section.new_connections is not None:
        admit.append(over("new_connections"))
    if section.connections is not None:
        admit.append("ct count over ${rates_connections} counter drop")
    return _table(police, out, admit)


_FIRST = "ct state new ct status & confirmed == 0"
"""A connection's first packet: one that is never answered stays new, and every packet of it would count."""


def _table(police: list[str], out: list[str], admit: list[str]) -> str:
    """Connections are judged where they enter the slot: from a link, or from a process in it; loopback is free."""
    chains: list[str] = []
    if admit:
        chains.append(_chain("admit", "", admit))
        local = [f'oifname != "lo" {_FIRST} jump admit']
        chains.append(_chain("local", "type filter hook output priority -150;", local))
        police = [*police, f'iifname != "lo" {_FIRST} jump admit']
    if police:
        chains.append(_chain("enter", "type filter hook prerouting priority -150;", police))
    if out:
        chains.append(_chain("leave", "type filter hook postrouting priority 300;", out))
    return f"table inet {TABLE} {{\n{''.join(chains)}}}\n" if chains else ""


def _chain(name: str, hook: str, rules: list[str]) -> str:
    lines = [hook, *rules] if hook else rules
    return f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"
