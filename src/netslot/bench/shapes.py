"""Arrangements of a root namespace: load one, switch it on and off, add one tenant to it and take it away."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from netslot.bench import rivals
from netslot.bench.tenants import ROOT_NAT, RULES_PER_TENANT, Tenant, iptables_table
from netslot.bench.yard import host_spec
from netslot.errors import HostError, NetslotError
from netslot.host import root_text
from netslot.host.root_text import nft_preset
from netslot.kernel import netlink, xtables
from netslot.kernel import nf_tables as nf
from netslot.kernel.nf_attrs import CHAIN, RULE, SET
from netslot.policy import nft_template
from netslot.policy.nft_cast import in_scratch

LEGACY = ("iptables-legacy-restore", "--noflush")
IPTABLES_NFT = ("iptables-nft-restore", "--noflush")
NFT = ("nft", "-f", "-")

_IP_FAMILY, _INET_FAMILY = 2, 1
_TABLE_NAME, _TABLE_FLAGS, _DORMANT = 1, 2, 1


LEGACY_TABLES = ("filter", "nat")


@dataclass(frozen=True, slots=True)
class LegacyTable:
    """A table of iptables-legacy as the kernel takes it."""

    name: str
    info: xtables.Info
    blob: bytearray

    def put(self) -> None:
        """Put the table in force in the calling thread's namespace."""
        with xtables.open_socket(xtables.IPV4) as sock:
            present = xtables.get_info(sock, xtables.IPV4, self.name).entries
            xtables.replace(sock, xtables.IPV4, self.name, self.info, self.blob, present)


@dataclass(frozen=True, slots=True)
class Shape:
    """One arrangement of the root namespace for ``tenants`` tenants; ``tables`` are its nf_tables ones.

    ``more`` and ``less`` are what the tool is fed to add the tenant behind the last one, and to remove it.
    """

    name: str
    tool: tuple[str, ...]
    text: str
    tables: tuple[str, ...]
    tenants: int
    root_rules: int
    more: str = ""
    less: str = ""
    note: str | None = None
    family: int = _IP_FAMILY

    @property
    def legacy(self) -> bool:
        return self.tool == LEGACY

    def load(self) -> float:
        """Feed the whole text to the tool; the seconds it took.

        Best before there are links: iptables asks getaddrinfo(3) about every UDP port of a rule, and that dumps
        all addresses of all links first (minutes for 120,000 rules at 4,000 links).
        """
        return run_tool(self.tool, self.text)

    def load_legacy(self) -> tuple[list[LegacyTable], float]:
        """The tables that :meth:`load` makes in a scratch namespace, and the seconds it took."""

        def act() -> tuple[list[LegacyTable], float]:
            took = self.load()
            with xtables.open_socket(xtables.IPV4) as sock:
                return [
                    LegacyTable(name, *xtables.read_table(sock, xtables.IPV4, name)) for name in LEGACY_TABLES
                ], took

        return in_scratch(act)

    def switch(self, on: bool) -> None:
        """Have packets meet the nf_tables of this shape, or not (table flag ``dormant``)."""
        flags = 0 if on else _DORMANT
        batch = nf.Batch(
            [
                nf.Command(
                    nf.NEWTABLE,
                    self.family,
                    0,
                    netlink.attr_str(_TABLE_NAME, table) + netlink.attr_be32(_TABLE_FLAGS, flags),
                    f"switch table {table} {'on' if on else 'off'}",
                )
                for table in self.tables
            ]
        )
        with nf.Socket() as sock:
            sock.commit(batch)

    def add_tenant_us(self, times: int) -> list[float]:
        """How long the tool takes to add one tenant's rules, ``times`` times; the tenant is removed again."""
        taken = []
        for _ in range(times):
            taken.append(run_tool(self.tool, self.more) * 1e6)
            run_tool(self.tool, self.less)
        return taken


def run_tool(command: Sequence[str], text: str) -> float:
    """Feed ``text`` to a tool in the calling thread's namespace; the seconds from its start to its end."""
    start = time.perf_counter()
    try:
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError as error:
        hint = "apt-get install iptables nftables iproute2"
        raise HostError(f"{command[0]} is not installed", hint=hint) from error
    took = time.perf_counter() - start
    if done.returncode:
        raise NetslotError(f"{' '.join(command)}: {done.stderr.strip()[:400] or f'exit status {done.returncode}'}")
    return took


def no_rules() -> Shape:
    return Shape("none", NFT, "", (), 0, 0)


def nat_only() -> Shape:
    """What all other shapes have in common: one masquerade rule in root, one source NAT in the slot."""
    return Shape("nat-only", NFT, rivals.NAT_ONLY, ("natonly",), 0, 1)


def static_root() -> Shape:
    """The root namespace of slots: what ``netslot up`` puts there."""
    text = nft_preset(host_spec(1))
    rules = [line for line in text.splitlines() if line.startswith("\t\t") and not line.startswith("\t\ttype ")]
    return Shape("static", NFT, text, (root_text.table(host_spec(1)),), 0, len(rules), family=_INET_FAMILY)


def _filter(lines: Sequence[str], chains: Sequence[str] = ()) -> str:
    return "\n".join(["*filter", *chains, *lines, "COMMIT\n"])


def flat(count: int, tool: tuple[str, ...], name: str) -> Shape:
    more = rivals.flat_tenant(Tenant(count + 1))
    return Shape(
        name,
        tool,
        rivals.flat(_tenants(count)),
        () if tool == LEGACY else ("filter", "nat"),
        count,
        count * RULES_PER_TENANT + 2,
        _filter(more),
        _filter([line.replace("-A ", "-D ", 1) for line in more]),
    )


def chains(count: int) -> Shape:
    one = Tenant(count + 1)
    chain = f"t{one.number}"
    return Shape(
        "root-iptables-legacy-chains",
        LEGACY,
        rivals.chains(_tenants(count)),
        (),
        count,
        count * (RULES_PER_TENANT + 1) + 2,
        _filter(rivals.chains_tenant(one), [f":{chain} - [0:0]"]),
        _filter([f"-D FORWARD -i {one.interface} -j {chain}", f"-F {chain}", f"-X {chain}"]),
    )


def tables(count: int) -> Shape:
    """A table per tenant; :func:`load_tables` finds out how many the kernel takes."""
    one = Tenant(count + 1)
    return Shape(
        "root-nft-table-per-tenant",
        NFT,
        rivals.tables(_tenants(count)),
        ("shared", *(f"t{one.number}" for one in _tenants(count))),
        count,
        count * (RULES_PER_TENANT + 1) + 1,
        rivals.tables_tenant(one),
        f"delete table ip t{one.number}\n",
    )


def load_tables(count: int) -> Shape:
    """Load a table for as many of ``count`` tenants as the kernel takes, less the one that is added later.

    Other base chains on the hook count too, so the limit is found by trying the last few one by one.
    """
    first = min(count, rivals.BASE_CHAINS - 16)
    shape = tables(first)
    shape.load()
    loaded = first
    while loaded < count:
        try:
            run_tool(NFT, rivals.tables_tenant(Tenant(loaded + 1)))
        except NetslotError:
            run_tool(NFT, f"delete table ip t{loaded}\n")
            note = f"the kernel refuses table {loaded + 1}: {rivals.BASE_CHAINS} base chains on a hook are its limit"
            return replace(tables(loaded - 1), note=note)
        loaded += 1
    return tables(loaded)


def sets(count: int) -> Shape:
    one = Tenant(count + 1)
    more = rivals.sets_tenant(one)
    return Shape(
        "root-nft-sets",
        NFT,
        rivals.sets(_tenants(count)),
        ("sets",),
        count,
        8,
        more,
        more.replace("add element", "delete element"),
        f"{count * (RULES_PER_TENANT - 2)} set elements",
    )


def verdict_map(count: int) -> Shape:
    one = Tenant(count + 1)
    return Shape(
        "root-nft-verdict-map",
        NFT,
        rivals.verdict_map(_tenants(count)),
        ("verdicts",),
        count,
        count * RULES_PER_TENANT + 3,
        rivals.verdict_map_tenant(one),
        f'delete element ip verdicts tenants {{ "{one.interface}" }}\n'
        f"flush chain ip verdicts t{one.number}\ndelete chain ip verdicts t{one.number}\n",
    )


def verdict_map_netlink_us(shape: Shape, times: int) -> list[float]:
    """As :meth:`Shape.add_tenant_us` of the verdict map, with the netlink code that stamps slots as the driver.

    The messages are those that the real tool's rules make in the kernel, read back from a scratch namespace.
    """
    one = Tenant(shape.tenants + 1)

    def model() -> nft_template.Ruleset:
        run_tool(NFT, rivals.verdict_map([one]))
        with nf.Socket() as sock:
            return nft_template.snapshot(sock)

    own = list(_only_tenant(in_scratch(model), f"t{one.number}"))
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        with nf.Socket() as sock:
            sock.commit(nf.Batch(own))
        taken.append((time.perf_counter() - start) * 1e6)
        run_tool(NFT, shape.less)
    return taken


def _only_tenant(ruleset: nft_template.Ruleset, chain: str) -> Iterator[nf.Command]:
    for item in ruleset.items[CHAIN]:
        if item.name == chain:
            yield nft_template.new(item)
    for item in ruleset.items[RULE]:
        if item.name == chain:
            yield nft_template.new(item)
    for item in ruleset.items[SET]:
        if item.name == "tenants":
            yield from nft_template.new_elements(item, item.elements)


def make(name: str, count: int) -> Shape:
    """The shape of this name for ``count`` tenants; see :data:`netslot.bench.skew.SHAPES`."""
    if name == "nat-only":
        return nat_only()
    if name == "root-iptables-legacy-flat":
        return flat(count, LEGACY, name)
    if name == "root-iptables-nft-flat":
        return flat(count, IPTABLES_NFT, name)
    return {"root-iptables-legacy-chains": chains, "root-nft-sets": sets, "root-nft-verdict-map": verdict_map}[name](
        count
    )


def _tenants(count: int) -> list[Tenant]:
    return [Tenant(number) for number in range(1, count + 1)]


def legacy_refusal() -> str | None:
    """Why iptables-legacy does not work here (newer kernels leave its tables out); None when it does."""
    try:
        in_scratch(lambda: run_tool(LEGACY, iptables_table((), ()) + ROOT_NAT))
    except NetslotError as error:
        return error.message
    return None
