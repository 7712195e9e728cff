"""What a host has and lacks for a spec: capabilities, kernel features, tools, limits, conflicts.

Nothing on the host is changed: features are tried in scratch namespaces, all else is read.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from netslot.host import conflicts, limits, lint
from netslot.host.finding import Finding, Level
from netslot.kernel import netns, probe
from netslot.kernel.probe import Answer
from netslot.policy import rates, tunnels
from netslot.spec.load import parse
from netslot.spec.model import ClassSpec, HostSpec

_MODULES = {
    "veth": "modprobe veth",
    "tap": "modprobe tun",
    "iptables-legacy": "modprobe ip_tables iptable_filter",
    "ip6tables-legacy": "modprobe ip6_tables ip6table_filter",
    "nf_tables": "modprobe nf_tables",
    "ipset": "modprobe ip_set ip_set_hash_net",
    "connection tracking": "modprobe nf_conntrack nf_conntrack_netlink",
    "tc clsact": "modprobe sch_ingress cls_bpf",
    "tc tbf": "modprobe sch_tbf",
    "cgroup v2": "mount -t cgroup2 none /sys/fs/cgroup",
    "bpf": 'a kernel with CONFIG_BPF_SYSCALL=y, or nat.kind = "nftables"',
    "network namespaces": "a kernel with CONFIG_NET_NS=y",
}
_PACKAGES = {
    "nft": "nftables",
    "ip": "iproute2",
    "iptables-legacy-restore": "iptables",
    "ip6tables-legacy-restore": "iptables",
    "iptables-nft-restore": "iptables",
    "ip6tables-nft-restore": "iptables",
}
"""Debian's names."""


def assumed_spec(slots: int, root_fd: int | None = None) -> HostSpec:
    """A spec for a host that has none yet: microVMs, nftables, the uplink that the default route goes through."""
    uplink = conflicts.assumed_uplink() if root_fd is None else netns.run_in(root_fd, conflicts.assumed_uplink)
    text = f'slots = {slots}\nuplink = "{uplink}"\n[addresses]\npool = "10.201.0.0/16"\n'
    return parse(text, Path("netslot.toml"))


def check(spec: HostSpec, root_fd: int | None = None) -> list[Finding]:
    """Everything that can be said about this host and ``spec``; errors first.

    ``root_fd`` is the namespace that is to be root, by default the caller's. A host on which netslot already runs is
    told nothing about its own slots.
    """
    found = [*_capabilities(), *_features(spec), *_tools(spec), *limits.check(spec), *_rules(spec)]
    found += conflicts.check(spec) if root_fd is None else netns.run_in(root_fd, conflicts.check, spec)
    order: list[Level] = ["error", "warning", "info"]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _rules(spec: HostSpec) -> Iterator[Finding]:
    """Rules that stand in the wrong place."""
    for problem in lint.lint(spec):
        yield Finding("error" if problem.fatal else "warning", str(problem), "it cannot work there", problem.hint)


def _capabilities() -> Iterator[Finding]:
    has = probe.capabilities()
    for name in probe.CAPABILITIES:
        if name not in has and name != "CAP_BPF":  # CAP_SYS_ADMIN stands in for it
            why = "namespaces, links and rules cannot be made without it"
            yield Finding("error", f"{name} is missing", why, "run netslot as root, or: unshare -rnm netslot ...")
    if not probe.in_initial_user_namespace():
        why = "the machine's own limits cannot be changed, and capabilities end at this namespace's borders"
        yield Finding("info", "running in a user namespace", why)


def needed(spec: HostSpec) -> dict[str, str]:
    """Features that ``spec`` needs, each with the reason in the spec's own words."""
    reasons = {"network namespaces": "every slot is one", "veth": "every slot's link to root"}
    reasons |= _of_backend(spec.root.backend, "root.backend", spec.root.rules.ipv6 is not None)
    if spec.root.masquerade:
        reasons["connection tracking"] = "root.masquerade"
    for each in spec.classes.values():
        reasons |= _of_class(each)
    return reasons


def _of_class(each: ClassSpec) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if each.attachment.kind == "tap":
        reasons["tap"] = "attachment.kind = tap"
    if each.rules is not None:
        reasons |= _of_backend(each.rules.backend, "rules.backend", each.rules.ipv6 is not None)
        if each.rules.backend != "nftables" and "cidrs" in each.lists.values():
            reasons["ipset"] = "parameters of type cidrs with iptables"
    if each.nat.kind == "nftables":
        reasons["nf_tables"] = "nat.kind = nftables"
    if each.routes is not None and tunnels.nft_text(each.routes.tunnels, inner=False):
        reasons["nf_tables"] = "a tunnel of kind vxlan or geneve"
    if each.nat.kind == "bpf" or each.bpf is not None:
        reasons |= dict.fromkeys(("bpf", "tc clsact"), "[bpf] or nat.kind = bpf")
    if each.rates is not None:
        reasons["tc tbf"] = "[rates]"
        if rates.nft_text(each.rates, inner=each.attachment.kind != "process"):
            reasons["nf_tables"] = "packets or connections in [rates]"
    if (cgroup := each.cgroup) is not None:
        reasons["cgroup v2"] = "[cgroup]"
        limits_by_controller = {
            "cpu": (cgroup.cpu, cgroup.cpu_weight),
            "memory": (cgroup.memory, cgroup.memory_high),
            "pids": (cgroup.pids,),
            "io": tuple(cgroup.io),
        }
        for controller, values in limits_by_controller.items():
            if any(value is not None for value in values):
                reasons[f"cgroup {controller}"] = f"limits of {controller} in [cgroup]"
    return reasons


def _of_backend(backend: str, key: str, ipv6: bool) -> dict[str, str]:
    if backend != "iptables-legacy":
        return {"nf_tables": f"{key} = {backend}"}
    names = ("iptables-legacy", "ip6tables-legacy") if ipv6 else ("iptables-legacy",)
    return dict.fromkeys(names, f"{key} = {backend}")


def _features(spec: HostSpec) -> Iterator[Finding]:
    reasons = needed(spec)
    for name, probed in probe.features().items():
        reason = reasons.get(name)
        if probed.answer is Answer.YES:
            yield Finding("info", f"kernel: {name}: yes", f"needed for {reason}" if reason else "not needed here")
        elif reason is None:
            yield Finding("info", f"kernel: {name}: {probed.answer.value}", f"not needed here ({probed.detail})")
        elif probed.answer is Answer.NO:
            fix = _MODULES.get(name, "a kernel that has it")
            yield Finding("error", f"the kernel lacks {name}", f"needed for {reason}; {probed.detail}", fix)
        else:
            why = f"needed for {reason}; trying it failed: {probed.detail}"
            yield Finding("warning", f"kernel: {name}: cannot be known", why, "run netslot check as root")


def _tools(spec: HostSpec) -> Iterator[Finding]:
    wanted = {"nft": "", "ip": "", **dict.fromkeys(_PACKAGES, "")}
    for each in (spec.root.rules, *(each.rules for each in spec.classes.values())):
        if each is None:
            continue
        if each.backend == "nftables":
            wanted["nft"] = "to load rule files once"
        else:
            for family in ("iptables", "ip6tables"):
                wanted[f"{family}-{each.backend.removeprefix('iptables-')}-restore"] = "to load rule files once"
    for tool, reason in wanted.items():
        path = shutil.which(tool)
        if path is not None:
            yield Finding("info", f"tool: {_version(tool)}", path)
        elif reason:
            yield Finding(
                "error", f"{tool} is not installed", f"needed {reason}", f"apt-get install {_PACKAGES[tool]}"
            )
        else:
            yield Finding("info", f"tool: {tool}: not installed", "not needed here")


def _version(tool: str) -> str:
    argument = "-V" if tool == "ip" else "--version"
    done = subprocess.run([tool, argument], capture_output=True, text=True, check=False)
    first = (done.stdout or done.stderr).partition("\n")[0].strip()
    return first if first.startswith(tool) else f"{tool}: {first or 'version unknown'}"
