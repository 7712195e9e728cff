"""The bpf policy: programs on a slot's own uplink and cgroup, none of them shared with other slots' packets.

Nothing is pinned. What is attached to a link goes with the link, what is attached to a cgroup with the cgroup,
maps with the programs that use them; so a crash at any moment leaves nothing that removing the slot does not
remove. Filters carry names that begin with ``netslot/``.

Besides what every die needs, ``stamp`` and ``reset`` need ``values["uplink_if"]``, and ``values["cgroup"]`` (below
the hierarchy's root) where a program is for the cgroup, which must be there: stamp the cgroup policy first.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from netslot.errors import SpecError
from netslot.kernel import netlink, rtnetlink, tc
from netslot.policy import bpf_parts
from netslot.policy.base import NO_LINKS, Difference, Links, Parameters, Values
from netslot.policy.bpf_counters import Counters, Traffic
from netslot.policy.bpf_parts import Attachment, Filter, Identity, Nat, Part, Place
from netslot.policy.bpf_user import UserPrograms
from netslot.spec.policies import BpfSection

__all__ = ["BpfDie", "Traffic", "cast"]


def cast(
    section: BpfSection,
    *,
    nat: bool = False,
    samples: Sequence[Values],
    defaults: Parameters,
    directory: Path = Path(),
    links: Links = NO_LINKS,
) -> BpfDie:
    """Load what all slots share and check the rest.

    ``nat`` asks for the stateless NAT between ``guest_address`` (and ``guest_address6``), the same in every slot,
    and each slot's ``address`` (and ``address6``), which must follow from its number ``slot`` in even steps.
    ``samples`` are the values of one or more slots, best the first, the last and some between; ``defaults`` is
    what ``stamp`` binds; paths of object files are relative to ``directory``. ``links`` are the indexes that
    links are known to have in a fresh slot; of others the kernel is asked.
    Raises SpecError for what does not fit, KernelError when the verifier refuses a program.
    """
    parts: list[Part] = []
    if section.counters:
        parts.append(Counters())
    if section.filter is not None:
        parts.append(Filter(section.filter, defaults))
    user = UserPrograms(section.programs, directory, samples[0], defaults) if section.programs else None
    if user is not None:
        parts.append(user)
    if nat:
        if not samples[0].get("guest_address"):
            raise SpecError("NAT needs a guest's address behind the slot", key="nat.kind")
        parts.append(Nat(samples))
    return BpfDie(parts, user, defaults, links)


class BpfDie:
    """Programs that can be put on any number of slots' links; see :class:`netslot.policy.base.Die`."""

    def __init__(self, parts: Sequence[Part], user: UserPrograms | None, defaults: Parameters, links: Links) -> None:
        self._parts = parts
        self._links = links
        self._close = weakref.finalize(self, _close_parts, parts)
        self._user = user
        self._defaults = defaults

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

    def stamp(self, values: Values) -> None:
        """Attach all programs, with the parameters' defaults bound; what is attached already is replaced.

        Costs least while the uplink is down: see :func:`netslot.kernel.tc.add_clsact`.
        """
        self._attach(values, self._links)

    def _attach(self, values: Values, links: Links) -> None:
        attachments = [a for part in self._parts for a in part.load(values, self._defaults)]
        with netlink.here() as sock, _released(attachments):
            name = values["uplink_if"]
            link = links.get(name) or rtnetlink.link_index(sock, name)
            sock.execute([tc.add_clsact(link), *_requests(link, attachments)])
        if self._user is not None:
            self._user.attach_cgroup(values, self._defaults)

    def bind(self, values: Values, parameters: Parameters) -> None:
        """Replace the filter's programs and fill the user's maps; one packet sees one list, old or new."""
        attachments = [a for part in self._parts for a in part.rebind(values, parameters)]
        if not attachments:
            return
        with netlink.here() as sock, _released(attachments):
            sock.execute(_requests(rtnetlink.link_index(sock, values["uplink_if"]), attachments))

    def read(self, values: Values, parameters: Parameters) -> list[Difference]:
        with netlink.here() as sock:
            found = _attached(sock, rtnetlink.link_index(sock, values["uplink_if"]))
        differences: list[Difference] = []
        wanted = {place: tag for part in self._parts for place, tag in part.tags(values).items()}
        for place, identity in wanted.items():
            attached = found.get(place)
            where = f"bpf {values['uplink_if']} {place}"
            if attached is None:
                differences.append(Difference(where, f"program {identity.name} is missing"))
            elif (attached.name, attached.tag) != identity[:2]:
                differences.append(Difference(where, f"program {identity.name} is another one ({attached.name})"))
            elif attached.number != identity.number:
                what = f"program {identity.name} works with number {attached.number}, not {identity.number}"
                differences.append(Difference(where, what))
        for place in found.keys() - wanted.keys():
            where = f"bpf {values['uplink_if']} {place}"
            differences.append(Difference(where, f"program {found[place].name} is not the slot's"))
        intact = {
            place: attached for place, attached in found.items() if attached.tag == wanted.get(place, _NOBODY).tag
        }
        for part in self._parts:
            differences += part.content(values, parameters, intact)
        return differences

    def reset(self, values: Values) -> None:
        """As after a stamp: fresh programs and maps take the places of all others, and what is foreign goes."""
        self._attach(values, NO_LINKS)
        wanted = {place for part in self._parts for place in part.tags(values)}
        with netlink.here() as sock:
            link = rtnetlink.link_index(sock, values["uplink_if"])
            foreign = [place for place in _attached(sock, link) if place not in wanted]
            sock.execute([tc.del_filter(link, place.hook, place.priority) for place in foreign])

    def traffic(self, values: Values) -> tuple[Traffic, Traffic]:
        """What was counted on the way out and on the way in; KernelError ENOENT without counters."""
        with netlink.here() as sock:
            found = _attached(sock, rtnetlink.link_index(sock, values["uplink_if"]))
        return Counters.read(int(values["slot"]), found)


def _close_parts(parts: Sequence[Part]) -> None:
    for part in parts:
        part.close()


_NOBODY = Identity("", b"")


def _requests(link: int, attachments: Sequence[Attachment]) -> list[netlink.Request]:
    return [
        tc.set_filter(link, a.place.hook, a.place.priority, a.program, a.name, number=a.number) for a in attachments
    ]


def _attached(sock: netlink.Socket, link: int) -> dict[Place, tc.Filter]:
    return {Place(found.hook, found.priority): found for found in tc.filters(sock, link)}


@contextmanager
def _released(attachments: Sequence[Attachment]) -> Iterator[None]:
    """Close the descriptors of a slot's own programs, which live on where they are attached."""
    try:
        yield
    finally:
        bpf_parts.close_all([attachment.program for attachment in attachments if attachment.owned])
