"""The bpf policy: programs on a slot's own links and cgroup, none of them shared with other slots' packets.

Nothing is pinned. What is attached to a link goes with the link, what is attached to a cgroup with the cgroup,
maps with the programs that use them; so a crash at any moment leaves nothing that removing the slot does not
remove. Filters carry names that begin with ``netslot/``.

Besides what every die needs, ``stamp`` and ``reset`` need ``values["uplink_if"]``, ``values["guest_if"]`` where a
program is for the link to the workload, and ``values["cgroup"]`` (below the hierarchy's root) where one is for the
cgroup, which must be there: stamp the cgroup policy first.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from netslot.errors import NetslotError, SpecError
from netslot.kernel import netlink, rtnetlink, tc
from netslot.policy import bpf_parts, bpf_user
from netslot.policy.base import NO_LINKS, Difference, Links, Parameters, Values
from netslot.policy.bpf_counters import Counters, Traffic
from netslot.policy.bpf_parts import Attachment, Filter, Identity, Nat, Part
from netslot.policy.bpf_user import UserPrograms
from netslot.policy.tunnels import Arrival
from netslot.spec.policies import BpfSection

__all__ = ["BpfDie", "Traffic", "cast", "hooked", "traffic"]

_MOST_PREPARED = 256
"""Datagrams that a die keeps: programs of a slot's own make another one each time."""


def hooked(section: BpfSection | None, *, nat: bool) -> set[str]:
    """The links that get hook points, by the variables that name them: making these costs time (decision 0094)."""
    links = {bpf_parts.UPLINK} if nat else set()
    if section is not None:
        links |= bpf_user.links_of(section.programs)
        if section.counters or section.filter is not None:
            links.add(bpf_parts.UPLINK)
    return links


def cast(
    section: BpfSection,
    *,
    nat: bool = False,
    own: Sequence[Arrival] = (),
    samples: Sequence[Values],
    defaults: Parameters,
    kinds: Mapping[str, str] | None = None,
    directory: Path = Path(),
    links: Links = NO_LINKS,
) -> BpfDie:
    """Load what all slots share and check the rest.

    ``nat`` asks for the stateless NAT between ``guest_address`` (and ``guest_address6``), the same in every slot,
    and each slot's ``address`` (and ``address6``), which must follow from its number ``slot`` in even steps; ``own``
    is what the NAT leaves to the slot itself.
    ``samples`` are the values of one or more slots, best the first, the last and some between; ``defaults`` is
    what ``stamp`` binds; ``kinds`` are those of all parameters, by which maps are checked; paths of object files
    are relative to ``directory``. ``links`` are the indexes that links are known to have in a fresh slot; of others
    the kernel is asked.
    Raises SpecError for what does not fit, KernelError when the verifier refuses a program.
    """
    parts: list[Part] = []
    user = None
    try:
        if section.counters:
            parts += [Counters(link) for link in sorted(hooked(section, nat=nat))]
        if section.filter is not None:
            parts.append(Filter(section.filter, defaults))
        if section.programs:
            user = UserPrograms(section.programs, directory, samples[0], defaults, kinds)
            parts.append(user)
        if nat:
            if not samples[0].get("guest_address"):
                raise SpecError("NAT needs a guest's address behind the slot", key="nat.kind")
            parts.append(Nat(samples, own))
    except NetslotError:
        _close_parts(parts)
        raise
    return BpfDie(parts, user, defaults, links, sorted(hooked(section, nat=nat), reverse=True))


class BpfDie:
    """Programs that can be put on any number of slots' links; see :class:`netslot.policy.base.Die`."""

    def __init__(
        self,
        parts: Sequence[Part],
        user: UserPrograms | None,
        defaults: Parameters,
        links: Links,
        hooked: Sequence[str],
    ) -> None:
        self._parts = parts
        self._hooked = hooked
        self._links = links
        self._close = weakref.finalize(self, _close_parts, parts)
        self._user = user
        self._defaults = defaults
        self._prepared: dict[tuple[int, ...], netlink.Prepared] = {}

    @property
    def rules(self) -> int:
        """Programs do not count as rules."""
        return 0

    @property
    def fallback(self) -> str | None:
        return None

    def close(self) -> None:
        """Give up what is loaded for all slots, as happens with the die's end; slots keep what is attached."""
        self._close()

    def at_birth(self, values: Values) -> list[netlink.Request]:
        """What to ask for together with a fresh slot's uplink, if its index is known: its hook points.

        While a link is up, the kernel waits for packets to leave it before it makes them; and the first program
        on one waits for an RCU grace period since it was made, which other steps of building a slot may have had
        meanwhile (see :func:`netslot.kernel.tc.add_clsact`).
        """
        index = self._links.get(values[bpf_parts.UPLINK])
        return [tc.add_clsact(index)] if index is not None and bpf_parts.UPLINK in self._hooked else []

    def stamp(self, values: Values) -> None:
        """Attach all programs, with the parameters' defaults bound. :meth:`at_birth` must have been done."""
        indexes = {link: self._links.get(values[link]) for link in self._hooked}
        known = {link: index for link, index in indexes.items() if index is not None}
        if len(known) < len(indexes):
            self._attach_anywhere(values)
        else:
            self._attach(values, known, [known[link] for link in known if link != bpf_parts.UPLINK])

    def _attach_anywhere(self, values: Values) -> None:
        """Attach all programs; what is attached already is replaced."""
        with netlink.here() as sock:
            indexes = _indexes(sock, values, self._hooked)
        self._attach(values, indexes, list(indexes.values()))

    def _attach(self, values: Values, indexes: Links, unhooked: Sequence[int]) -> None:
        """Attach all programs to links, of which the ``unhooked`` get their hook points first, in one datagram."""
        made = [a for part in self._parts for a in part.load(values, self._defaults)]
        attachments = [a for a in made if a.place.hook != bpf_parts.CGROUP]
        programs = (*indexes.values(), len(unhooked), *(attachment.program for attachment in attachments))
        try:
            prepared = self._prepared.get(programs)
            if prepared is None:
                prepared = netlink.Prepared([*map(tc.add_clsact, unhooked), *_requests(indexes, attachments)])
                if len(self._prepared) == _MOST_PREPARED:
                    self._prepared.clear()
                self._prepared[programs] = prepared
            numbers = {place: attachment.number for place, attachment in enumerate(attachments, len(unhooked))}
            if prepared.by_seq:  # all programs may be the cgroup's
                with netlink.here() as sock:
                    sock.repeat(prepared, numbers)
            if self._user is not None:
                self._user.attach_cgroup(values, [a for a in made if a.place.hook == bpf_parts.CGROUP])
        finally:
            _release(made)

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Replace the filter's programs and fill the user's maps; one packet sees one list, old or new."""
        attachments: list[Attachment] = []
        try:
            for part in self._parts:
                attachments += part.rebind(values, parameters)
            if not attachments:
                return
            with netlink.here() as sock:
                sock.execute(_requests(_indexes(sock, values, self._hooked), attachments))
        finally:
            _release(attachments)

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        with netlink.here() as sock:
            found = bpf_parts.attached(sock, values, self._hooked)
        differences: list[Difference] = []
        wanted = {place: tag for part in self._parts for place, tag in part.tags(values).items()}
        for place, identity in wanted.items():
            attached = found.get(place)
            where = f"bpf {values[place.link]} {place}"
            if attached is None:
                differences.append(Difference(where, f"program {identity.name} is missing"))
            elif (attached.name, attached.tag) != identity[:2]:
                differences.append(Difference(where, f"program {identity.name} is another one ({attached.name})"))
            elif attached.number != identity.number:
                what = f"program {identity.name} works with number {attached.number}, not {identity.number}"
                differences.append(Difference(where, what))
        for place in found.keys() - wanted.keys():
            where = f"bpf {values[place.link]} {place}"
            differences.append(Difference(where, f"program {found[place].name} is not the slot's"))
        intact = {
            place: attached for place, attached in found.items() if attached.tag == wanted.get(place, _NOBODY).tag
        }
        for part in self._parts:
            differences += part.content(values, parameters, intact)
        return differences

    def reset(self, values: Values) -> None:
        """As after a stamp: fresh programs and maps take the places of all others, and what is foreign goes."""
        self._attach_anywhere(values)
        wanted = {place for part in self._parts for place in part.tags(values)}
        with netlink.here() as sock:
            indexes = _indexes(sock, values, self._hooked)
            foreign = [place for place in bpf_parts.attached(sock, values, self._hooked) if place not in wanted]
            sock.execute([tc.del_filter(indexes[place.link], place.hook, place.priority) for place in foreign])


def traffic(values: Values, link: str = bpf_parts.UPLINK) -> tuple[Traffic, Traffic]:
    """What a slot's counters on a link have counted, egress and ingress; KernelError ENOENT without counters."""
    with netlink.here() as sock:
        found = bpf_parts.attached(sock, values, [link])
    return Counters.read(int(values["slot"]), found, link)


def _close_parts(parts: Sequence[Part]) -> None:
    for part in parts:
        part.close()


_NOBODY = Identity("", b"")


def _indexes(sock: netlink.Socket, values: Values, links: Sequence[str]) -> Links:
    return {link: rtnetlink.link_index(sock, values[link]) for link in links}


def _requests(indexes: Links, attachments: Sequence[Attachment]) -> list[netlink.Request]:
    return [
        tc.set_filter(indexes[a.place.link], a.place.hook, a.place.priority, a.program, a.name, number=a.number)
        for a in attachments
    ]


def _release(attachments: Sequence[Attachment]) -> None:
    """Close the descriptors of a slot's own programs, which live on where they are attached."""
    bpf_parts.close_all([attachment.program for attachment in attachments if attachment.owned])
