"""Every example is stamped, not handed to a tool per slot, and the tools cannot tell the difference."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lab import Net, nets
from netslot.policy.base import Die
from netslot.policy.iptables import cast as cast_legacy
from netslot.policy.nftables import cast, cast_iptables
from netslot.spec.load import load
from netslot.spec.model import ClassSpec, HostSpec, Rules
from tools import put

EXAMPLES = Path(__file__).parents[2] / "examples"
SPECS = sorted(EXAMPLES.glob("*/*.toml"))


def die_of(spec: HostSpec, of: ClassSpec, rules: Rules) -> Die:
    samples = [spec.values(number, of.name) for number in (1, 2, 999, spec.addresses.capacity())]
    defaults = {name: p.default for name, p in of.parameters.items() if isinstance(p.default, tuple)}
    scalars = [name for name, p in of.parameters.items() if not p.is_list]
    if rules.nft is not None:
        return cast(rules.nft.text, samples=samples, lists=of.lists, defaults=defaults, scalars=scalars)
    four, six = rules.ipv4.text if rules.ipv4 else "", rules.ipv6.text if rules.ipv6 else None
    tool = cast_legacy if rules.backend == "iptables-legacy" else cast_iptables
    return tool(four, six, samples=samples, lists=of.lists, defaults=defaults, scalars=scalars)


def saved(net: Net, backend: str) -> list[str]:
    """What the tools print, without the dates."""
    if backend == "nftables":
        return net.sh("nft -s list ruleset").splitlines()
    variant = backend.removeprefix("iptables-")
    text = net.sh(f"iptables-{variant}-save; ip6tables-{variant}-save")
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("path", SPECS, ids=["/".join(path.parts[-2:]) for path in SPECS])
def test_a_stamp_is_what_the_tool_would_have_loaded(path: Path) -> None:
    spec = load(path)
    of = spec.classes["default"]
    assert of.rules is not None
    die = die_of(spec, of, of.rules)
    assert die.fallback is None
    for slot in (1, 17, random.randint(3, 4000), spec.addresses.capacity()):
        with nets("stamped", "loaded") as (stamped, loaded):
            values = spec.values(slot)
            stamped.run(die.stamp, values)
            put(loaded, of.rules, values)
            expected = saved(loaded, of.rules.backend)
            defaults = [p.default for p in of.parameters.values() if isinstance(p.default, tuple) and p.default]
            if not defaults:  # the tool alone knows nothing of parameters
                assert saved(stamped, of.rules.backend) == expected
            assert len(expected) > 20
            assert stamped.run(die.read, values, {n: p.default for n, p in of.parameters.items() if p.is_list}) == []
