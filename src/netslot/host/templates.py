"""From a class of the spec to what its slots are made from: dies cast once, and what a fresh slot looks like."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial

from netslot.errors import SpecError
from netslot.host import links
from netslot.host.expectation import Expectation
from netslot.host.plan import GUEST, LOOPBACK, UPLINK, SlotPlan
from netslot.host.slots import Template, Workshop
from netslot.kernel import cgroupfs, netns
from netslot.kernel import rtnetlink as rt
from netslot.kernel.netlink import Socket
from netslot.policy import bpf, cgroup, iptables, nat, nftables, rates, routes, tunnels
from netslot.policy.base import Die, Parameters, Values
from netslot.policy.nft_programs import NftProgram
from netslot.spec import crosschecks
from netslot.spec.model import ClassSpec, HostSpec
from netslot.spec.policies import BpfSection

_SETTLE_SECONDS = 0.05


def cast(spec: HostSpec, of: ClassSpec, host_id: str) -> Template:
    """Compile everything that the slots of class ``of`` share. Runs the real tools, in scratch namespaces.

    SpecError when a rule file is refused, HostError when a tool or kernel feature is missing.
    """
    try:
        return _cast(spec, of, host_id)
    except SpecError as error:
        raise spec.placed(error, of.name) from error


def _cast(spec: HostSpec, of: ClassSpec, host_id: str) -> Template:
    if not spec.sample(of.name):
        return Template((), ())  # nobody of the roster is in this class
    sample = SlotPlan(spec, of, spec.sample(of.name), host_id)
    samples = [spec.values(number, of.name) for number in _spread(spec, of)]
    first, defaults, known = samples[0], sample.defaults, _known_links(sample)
    # Programs come last: of all that is cast, they alone hold something open, which a later refusal would leave.
    limits = cgroup.cast(of.cgroup, values=first) if of.cgroup is not None else None
    with _scratch_cgroups(of, samples) as castable:  # rules may name the slot's cgroup
        rules = _rules(of, castable, defaults)
    queues = rates.cast(of.rates, values=first, links=known) if of.rates is not None else None
    late: list[Die] = []
    if of.routes is not None:
        late.append(routes.cast(of.routes, values=first, defaults=defaults, links=known, directory=spec.file.parent))
    programs = _programs(spec, of, samples, defaults, known)
    at_birth = programs.at_birth(first) if programs is not None else []
    early = [die for die in (limits, *rules, programs, queues) if die is not None]
    return Template(early, late, _learn(sample), at_birth)


def _programs(
    spec: HostSpec, of: ClassSpec, samples: Sequence[Values], defaults: Parameters, known: dict[str, int]
) -> bpf.BpfDie | None:
    stateless = of.nat.kind == "bpf"
    if of.bpf is None and not stateless:
        return None
    return bpf.cast(
        of.bpf or BpfSection(),
        nat=stateless,
        own=_arrivals(of),
        samples=samples,
        defaults=defaults,
        kinds={name: parameter.kind for name, parameter in of.parameters.items()},
        directory=spec.file.parent,
        links=known,
    )


@contextlib.contextmanager
def _scratch_cgroups(of: ClassSpec, samples: Sequence[Values]) -> Iterator[Sequence[Values]]:
    """The samples with cgroups that are there while the block lasts: a rule that names none is refused."""
    if of.cgroup is None:
        yield samples
        return
    paths = [f"netslot-cast-{os.getpid()}-{threading.get_ident()}-{number}" for number in range(len(samples))]
    try:
        for path in paths:
            cgroupfs.create(path, ())
        yield [{**values, "cgroup": path} for values, path in zip(samples, paths, strict=True)]
    finally:
        for path in paths:
            cgroupfs.remove(path, ())


def _known_links(sample: SlotPlan) -> dict[str, int]:
    """The indexes of a fresh slot's links, by name: netslot chose them."""
    return {sample.uplink_if: UPLINK} | ({sample.guest_if: GUEST} if sample.guest_if is not None else {})


def _spread(spec: HostSpec, of: ClassSpec) -> list[int]:
    """Slot numbers whose values show how rules depend on the slot: the first, the last possible, some between."""
    if of.residents is not None:
        numbers = list(of.residents)
        return [numbers[at] for at in sorted({0, min(1, len(numbers) - 1), len(numbers) // 3, len(numbers) - 1})]
    last = spec.addresses.capacity()
    return sorted({1, min(2, last), last // 3 or 1, last})


def _rules(of: ClassSpec, samples: Sequence[Values], defaults: Parameters) -> list[Die]:
    """The dies of the slot's rule files, and of the rules that its NAT and rates bring with them.

    All nf_tables rules of a slot are one die's, which takes every other table in the namespace for drift.
    """
    text, backend = _own_nft_text(of, samples[0]), of.rules.backend if of.rules else None
    finish = nat.correct_checksums if of.nat.kind == "nftables" else None
    own = NftProgram(text, "[rates], [nat] and [routes]", finish) if text else None
    dies: list[Die] = []
    if of.rules is not None and backend == "nftables" and of.rules.nft is not None:
        dies.append(_nftables(of, NftProgram(of.rules.nft.text + text, of.rules.nft.name, finish), samples, defaults))
    elif own is not None and backend != "iptables-nft":
        dies.append(_nftables(of, own, samples, defaults))
    if of.rules is not None and backend != "nftables":
        dies.append(_iptables(of, own, samples, defaults))
    return dies


def _arrivals(of: ClassSpec) -> Sequence[tunnels.Arrival]:
    """What comes to the slot itself, where a NAT gives all else to the guest."""
    return tunnels.arrivals(of.routes.tunnels) if of.routes is not None and of.nat.kind != "rules" else ()


def _own_nft_text(of: ClassSpec, values: Values) -> str:
    counted = of.rates is not None and (of.rates.connections, of.rates.new_connections) != (None, None)
    text = ""
    if of.nat.kind == "nftables":
        own = _arrivals(of)  # what goes by a tunnel is for rules to translate, which takes connection tracking
        text = nat.nft_text(ipv6="guest_address6" in values, tracked=counted or bool(own), own=own)
    inner = "guest_if" in values
    if of.routes is not None:
        text += tunnels.nft_text(of.routes.tunnels, inner=inner)
    return text + (rates.nft_text(of.rates, inner=inner) if of.rates is not None else "")


def _nftables(of: ClassSpec, program: NftProgram, samples: Sequence[Values], defaults: Parameters) -> Die:
    lists = of.lists if of.rules is not None and of.rules.backend == "nftables" else {}
    die = nftables.cast(
        program.text,
        samples=_with_numbers(of, samples),
        lists=lists,
        optional=crosschecks.lists_of_policies(of),
        defaults=defaults,
        scalars=_scalars(of),
        file=program.file,
        finish=program.finish,
    )
    return die if of.rates is None else rates.WithNumbers(die, of.rates)


def _with_numbers(of: ClassSpec, samples: Sequence[Values]) -> Sequence[Values]:
    return samples if of.rates is None else [{**values, **rates.numbers(of.rates, values)} for values in samples]


def _scalars(of: ClassSpec) -> list[str]:
    own = [name for name, parameter in of.parameters.items() if not parameter.is_list]
    return own if of.rates is None else own + rates.bindable(of.rates)


def _iptables(of: ClassSpec, own: NftProgram | None, samples: Sequence[Values], defaults: Parameters) -> Die:
    """``own`` are netslot's own nf_tables rules: beside those of iptables-nft they are in one die with them."""
    assert of.rules is not None
    rules = of.rules
    texts = (rules.ipv4.text if rules.ipv4 else "", rules.ipv6.text if rules.ipv6 else None)
    files = (rules.ipv4.name if rules.ipv4 else "", rules.ipv6.name if rules.ipv6 else "")
    if rules.backend == "iptables-legacy":
        scalars = [name for name, parameter in of.parameters.items() if not parameter.is_list]
        return iptables.cast(
            *texts,
            samples=samples,
            lists=of.lists,
            defaults=defaults,
            scalars=scalars,
            file=files[0],
            file6=files[1],
        )
    die = nftables.cast_iptables(
        *texts,
        samples=_with_numbers(of, samples),
        lists=of.lists,
        defaults=defaults,
        scalars=_scalars(of),
        file=files[0],
        file6=files[1],
        beside=own,
    )
    return die if of.rates is None or own is None else rates.WithNumbers(die, of.rates)


def _learn(sample: SlotPlan) -> Expectation:
    """Build one slot beside a scratch root namespace, without its policies, and look at it."""
    with netns.Worker() as scratch:
        return scratch.run(_learn_here, sample)


def _learn_here(sample: SlotPlan) -> Expectation:
    with netns.fresh():
        root_fd = netns.open_own()
    try:
        with netns.Worker(root_fd) as beside:
            return beside.run(_build_and_read, sample)
    finally:
        os.close(root_fd)


def _build_and_read(sample: SlotPlan) -> Expectation:
    workshop = Workshop()
    try:  # without any address the kernel takes no gateway for one: it has no local table yet (fib_check_nh_v4_gw())
        workshop.root.execute([rt.set_link(LOOPBACK, up=True)])
        with workshop.unseen(sample, Template((), ())) as (slot_fd, _):
            read = partial(_read_both, sample, slot_fd, workshop)
            before, now = None, read()
            while sample.ipv6 and before != now:  # IPv6 adds its local routes a moment after the address
                time.sleep(_SETTLE_SECONDS)
                before, now = now, read()
        return Expectation(sample, *now)
    finally:
        workshop.close()


def _read_both(sample: SlotPlan, slot_fd: int, workshop: Workshop) -> tuple[links.State, links.State]:
    with netns.entered(slot_fd), Socket() as slot:
        inside = links.read(sample, slot)
    return inside, links.read_root(workshop.root)[sample.root_if]
