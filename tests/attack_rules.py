"""The rules of a namespace as text, taken apart and put back by the tools that wrote them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator

import lab

Edit = tuple[str, str]
"""A regular expression, and what stands for it then. A rule that becomes empty goes."""


NAT = "netslot_nat"
"""The tables of netslot's stateless NAT, in words that nft can write but not read; so they stay where they are."""
_TABLE = re.compile(r"^table .*?^\}$\n?", re.DOTALL | re.MULTILINE)


class Ruleset:
    """The rules that one namespace had when this was made, but for the NAT's, in the language of ``backend``."""

    def __init__(self, backend: str, net: lab.Place) -> None:
        self._net = net
        self._native = backend == "nftables"
        variant = backend.removeprefix("iptables-")
        self._tools = ("nft",) if self._native else (f"iptables-{variant}", f"ip6tables-{variant}")
        self._whole = {tool: self._save(tool) for tool in self._tools}
        self._loaded = dict(self._whole)

    def _run(self, command: list[str], text: str | None = None) -> str:
        where = ["nsenter", f"--net={self._net.path}"]
        done = subprocess.run([*where, *command], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{text}"
        return done.stdout

    def _save(self, tool: str) -> str:
        text = self._run(["nft", "-s", "list", "ruleset"] if tool == "nft" else [f"{tool}-save"])
        if tool == "nft":
            return "".join(table for table in _TABLE.findall(text) if f" {NAT} " not in table.splitlines()[0])
        return "\n".join(line for line in text.splitlines() if not line.startswith("#")) + "\n"

    def _load(self, tool: str, text: str) -> None:
        if self._loaded[tool] == text:
            return
        if tool == "nft":
            names = [" ".join(table.split()[:3]) for table in _TABLE.findall(self._whole[tool])]
            self._run(["nft", "-f", "-"], "".join(f"{name}\ndelete {name}\n" for name in names) + text)
        else:
            self._run([f"{tool}-restore"], text)
        self._loaded[tool] = text

    def edit(self, edits: Iterable[Edit]) -> None:
        """Load the rules as they were, but for ``edits``, each of which must have something to change."""
        texts = {tool: text.splitlines() for tool, text in self._whole.items()}
        for pattern, instead in edits:
            known = re.compile(pattern)
            found = 0
            for tool, lines in texts.items():
                places = [at for at, (context, line) in enumerate(_in_context(lines)) if known.search(context + line)]
                found += len(places)
                for at in places:
                    lines[at] = known.sub(instead, lines[at]) if instead else ""
                texts[tool] = lines
            assert found, f"{self._net.name} has no rule like {pattern!r}"
        for tool, lines in texts.items():
            self._load(tool, "\n".join(line for line in lines if line) + "\n")

    def bare(self, *, nat: bool = True) -> None:
        """Load nothing but what translates addresses, or without ``nat`` nothing at all; everything is accepted."""
        for tool, text in self._whole.items():
            lines = text.splitlines()
            self._load(tool, "\n".join(_bare_nft(lines, nat) if tool == "nft" else _bare_iptables(lines, nat)) + "\n")

    def mended(self) -> None:
        """Somebody else has put the rules back as they were."""
        self._loaded = dict(self._whole)

    def whole(self) -> None:
        """Load the rules as they were."""
        for tool, text in self._whole.items():
            self._load(tool, text)


def _in_context(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each line with the chain of nft that it stands in, which its own text does not say, before it."""
    chain = ""
    for line in lines:
        if line.startswith("\tchain "):
            chain = f"{line.split()[1]}: "
        yield chain, line


def _bare_iptables(lines: list[str], nat: bool) -> Iterator[str]:
    table = ""
    for line in lines:
        if line.startswith("*"):
            table = line
        if nat and table == "*nat":
            yield line
        elif line.startswith(":"):
            yield line.replace(" DROP ", " ACCEPT ")
        elif not line.startswith("-"):
            yield line


def _bare_nft(lines: list[str], nat: bool) -> Iterator[str]:
    """Tables stay, with their chains of type nat."""
    if not nat:
        return
    for table in _TABLE.findall("\n".join(lines)):
        chains = re.findall(r"^\tchain .*?^\t\}$", table, flags=re.DOTALL | re.MULTILINE)
        yield table.splitlines()[0]
        yield from (chain for chain in chains if "type nat" in chain)
        yield "}"
