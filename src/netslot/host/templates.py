"""From a class of the spec to what its slots are made from: dies cast once, and what a fresh slot looks like."""

from __future__ import annotations

import os
from collections.abc import Sequence

from netslot.host import links
from netslot.host.plan import SlotPlan
from netslot.host.slots import Template, Workshop
from netslot.kernel import netns
from netslot.kernel.netlink import Socket
from netslot.policy import bpf, cgroup, iptables, nat, nftables, rates, routes
from netslot.policy.base import Die, Parameters, Values
from netslot.spec.model import ClassSpec, HostSpec
from netslot.spec.policies import BpfSection


def cast(spec: HostSpec, of: ClassSpec, host_id: str) -> Template:
    """Compile everything that the slots of class ``of`` share. Runs the real tools, in scratch namespaces.

    SpecError when a rule file is refused, HostError when a tool or kernel feature is missing.
    """
    sample = SlotPlan(spec, of, 1, host_id)
    samples = [spec.values(number, of.name) for number in _spread(spec)]
    first, defaults = samples[0], sample.defaults
    before: list[Die] = []
    if of.rules is not None:
        before.append(_rules(of, samples, defaults))
    if of.nat.kind == "nftables":
        before.append(nat.cast(samples))
    after: list[Die] = []
    if of.cgroup is not None:
        after.append(cgroup.cast(of.cgroup, values=first))
    if of.bpf is not None or of.nat.kind == "bpf":
        section = of.bpf or BpfSection()
        stateless = of.nat.kind == "bpf"
        after.append(bpf.cast(section, nat=stateless, values=first, defaults=defaults, directory=spec.file.parent))
    if of.routes is not None:
        after.append(routes.cast(of.routes, values=first, defaults=defaults))
    if of.rates is not None:
        after.append(rates.cast(of.rates, values=first))
    return Template(before, after, _learn(sample))


def _spread(spec: HostSpec) -> list[int]:
    """Slot numbers whose values show how rules depend on the slot: the first, the last possible, some between."""
    last = spec.addresses.capacity()
    return sorted({1, min(2, last), last // 3 or 1, last})


def _rules(of: ClassSpec, samples: Sequence[Values], defaults: Parameters) -> Die:
    assert of.rules is not None
    scalars = [name for name, parameter in of.parameters.items() if not parameter.is_list]
    lists, rules = of.lists, of.rules
    if rules.backend == "nftables":
        assert rules.nft is not None
        return nftables.cast(
            rules.nft.text, samples=samples, lists=lists, defaults=defaults, scalars=scalars, file=rules.nft.name
        )
    compile_rules = iptables.cast if rules.backend == "iptables-legacy" else nftables.cast_iptables
    return compile_rules(
        rules.ipv4.text if rules.ipv4 else "",
        rules.ipv6.text if rules.ipv6 else None,
        samples=samples,
        lists=lists,
        defaults=defaults,
        scalars=scalars,
        file=rules.ipv4.name if rules.ipv4 else "",
        file6=rules.ipv6.name if rules.ipv6 else "",
    )


def _learn(sample: SlotPlan) -> links.Expectation:
    """Build one slot beside a scratch root namespace, without its policies, and look at it."""
    with netns.Worker() as scratch:
        return scratch.run(_learn_here, sample)


def _learn_here(sample: SlotPlan) -> links.Expectation:
    with netns.fresh():
        root_fd = netns.open_own()
    try:
        with netns.Worker(root_fd) as beside:
            return beside.run(_build_and_read, sample)
    finally:
        os.close(root_fd)


def _build_and_read(sample: SlotPlan) -> links.Expectation:
    workshop = Workshop()
    try:
        with workshop.unseen(sample, Template((), ())) as slot_fd:
            with netns.entered(slot_fd), Socket() as slot:
                inside = links.read(slot)
            root = links.read_root(workshop.root)[sample.root_if]
        return links.Expectation(sample, inside, root)
    finally:
        workshop.close()
