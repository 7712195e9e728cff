"""The tools that make nf_tables rulesets from what people write, and the texts that they read."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from netslot.errors import HostError, SpecError
from netslot.kernel import netlink
from netslot.policy import cidr_sets
from netslot.policy.base import Parameters, Values
from netslot.policy.cidr_sets import CidrSet
from netslot.policy.iptables_places import atoms
from netslot.policy.iptables_tool import Source, port_values
from netslot.spec.render import render, variables_in

_TIMEOUT_S = 120
"""A load takes milliseconds: a tool that takes longer hangs."""


class Program(Protocol):
    """Rules in a tool's own language, and the tool that loads them."""

    def variables(self) -> frozenset[str]:
        """The names of the variables that the text uses."""

    def words(self) -> list[str]:
        """The words of the text, and their parts, that use variables and are not a variable alone."""

    def devices(self, values: Values) -> list[str]:
        """The interfaces that must exist before the rules can be loaded."""

    def prepare(self) -> None:
        """Make what the rules refer to and the tool does not make, in the calling thread's fresh namespace."""

    def load(self, values: Values, content: Parameters) -> None:
        """Run the tool in the calling thread's namespace, which has no rules. SpecError when it refuses.

        ``content`` is what is published by lines that stand for ports.
        """


@dataclass(frozen=True, slots=True)
class NftProgram:
    """Text for ``nft -f``; ``finish`` does to the loaded rules what the text cannot say."""

    text: str
    file: str
    finish: Callable[[], None] | None = None

    def variables(self) -> frozenset[str]:
        return variables_in(self.text)

    def words(self) -> list[str]:
        return _composed(self.text)

    def devices(self, values: Values) -> list[str]:
        return nft_devices(render(self.text, values, file=self.file))

    def prepare(self) -> None:
        """Everything that the text refers to is in the text."""

    def load(self, values: Values, content: Parameters) -> None:
        run_tool(["nft", "-f", "-"], render(self.text, values, file=self.file), self.file, _NFT_PLACE)
        if self.finish is not None:
            self.finish()


def _composed(text: str) -> list[str]:
    return [atom for atom in atoms(text) if not re.fullmatch(r"\$\{[^}]*\}", atom)]


_NFT_PLACE = re.compile(r"^\S*?:(\d+):[\d-]+: Error: (.*)$", re.MULTILINE)
_DEVICE = re.compile(r'\b(?:device|iif|oif)\s+(?:[!=]=\s*)?"?([\w.@:-]+)"?')
_LINK_NAME = re.compile(r"[\w@:-][\w.@:-]{0,14}")
_DEVICES = re.compile(r"\bdevices\s*=\s*\{([^}]*)\}")
_DEFINE = re.compile(r"^\s*define\s+([\w.-]+)\s*=\s*(.*)$", re.MULTILINE)


def nft_devices(text: str) -> list[str]:
    """The interface names in ``device``, ``devices =``, ``iif`` and ``oif`` clauses, in order of appearance."""
    for name, value in _DEFINE.findall(text):
        text = re.sub(rf"\${re.escape(name)}\b", value.replace("\\", r"\\"), text)
    found = _DEVICE.findall(text)
    for group in _DEVICES.findall(text):
        found += [word.strip().strip('"') for word in group.split(",")]
    return [name for name in dict.fromkeys(found) if name != "lo" and _LINK_NAME.fullmatch(name)]


@dataclass(frozen=True, slots=True)
class IptablesProgram:
    """Rule files in iptables-save form for the nft variants of the restore commands, with the IP sets they match."""

    sources: Sequence[Source]
    sets: tuple[CidrSet, ...]
    beside: NftProgram | None = None
    """Tables beside those of iptables-nft, which lets what is not its own alone."""

    def variables(self) -> frozenset[str]:
        own = (variables_in(source.fixed) for source in self.sources)
        return frozenset().union(*own, self.beside.variables() if self.beside is not None else ())

    def words(self) -> list[str]:
        own = [word for source in self.sources for word in _composed(source.fixed)]
        return own + (self.beside.words() if self.beside is not None else [])

    def devices(self, values: Values) -> list[str]:
        return self.beside.devices(values) if self.beside is not None else []

    def prepare(self) -> None:
        if self.sets:
            with netlink.Socket(netlink.NETLINK_NETFILTER) as link:
                cidr_sets.create(link, self.sets, {})

    def load(self, values: Values, content: Parameters) -> None:
        for source in self.sources:
            items = {
                index: [port_values(parameter, entry) for entry in content.get(parameter, ())]
                for index, parameter in source.port_lines.items()
            }
            self.restore(source, values, items)
        if self.beside is not None:
            self.beside.load(values, content)

    def restore(self, source: Source, values: Values, items: Mapping[int, Sequence[Mapping[str, str]]]) -> None:
        """Run one restore command; ``items`` are the ports that each line which stands for some stands for."""
        command = f"{source.family.tool}-nft-restore"
        run_tool([command], source.render(values, items), source.file, _RESTORE_PLACE)


_RESTORE_PLACE = re.compile(r"[Ll]ine:? (\d+)")


def run_tool(command: Sequence[str], text: str, file: str, place: re.Pattern[str]) -> None:
    """Feed ``text`` to a tool. SpecError at the line that it names when it refuses, HostError when it is missing."""
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=False, timeout=_TIMEOUT_S)
    except FileNotFoundError as error:
        raise HostError(f"{command[0]} is not installed", hint="apt-get install nftables iptables") from error
    if done.returncode == 0:
        return
    # The restore commands put their name and version before the reason, on a line of its own or not.
    message = re.sub(r"^\S+ v[\d.]+ \(\w+\):\s*", "", done.stderr.decode(errors="replace").strip())
    found = place.search(message)
    if found:
        line, reason = int(found[1]), (found[2] if found.re.groups > 1 else message.splitlines()[0])
    else:
        line, reason = None, message.splitlines()[0] if message else f"exit status {done.returncode}"
    hint = f"{command[0]} refuses this line"
    if reason.startswith("cgroupv2 path"):
        hint = "nft puts the cgroup's number of today into the rule: use -m cgroup --path, with a backend of iptables"
    raise SpecError(f"{command[0]}: {reason}", file=file, line=line, hint=hint)
