"""The real tool: legacy iptables-restore, run in the namespace of the calling thread, and what it left in the kernel.

A child process starts in the namespace of the thread that starts it, so a scratch namespace is all it needs.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from netslot.errors import HostError, KernelError, SpecError
from netslot.kernel import xtables
from netslot.kernel.xtables import Family
from netslot.policy import iptables_image
from netslot.policy.iptables_image import Image
from netslot.spec.render import render, variables_in

_TIMEOUT = 120  # seconds; a restore takes milliseconds, so this one hangs


@dataclass(frozen=True)
class Source:
    """A rule file in iptables-save form, with variables. ``file`` is named in errors.

    ``ports`` are the list parameters of published ports: a line that says ``${NAME.proto}``, ``${NAME.outer}`` or
    ``${NAME.inner}`` stands once for each of NAME's ports.
    """

    family: Family
    file: str
    text: str
    ports: tuple[str, ...] = ()

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def port_lines(self) -> dict[int, str]:
        """The list parameter of each line that stands for published ports, by the line's index."""
        found = {}
        for index, line in enumerate(self.lines):
            lists = {name.split(".")[0] for name in variables_in(line) if "." in name} & set(self.ports)
            if not lists or line.lstrip().startswith("#"):
                continue
            if len(lists) > 1:
                raise SpecError("one line can stand for one list of ports only", file=self.file, line=index + 1)
            if not re.match(r"\s*(\[\d+:\d+\]\s*)?(-A|--append)\s", line):
                raise SpecError(
                    "a line that stands for published ports begins with -A", file=self.file, line=index + 1
                )
            found[index] = lists.pop()
        return found

    @cached_property
    def fixed(self) -> str:
        """The text with lines for published ports, and comments, left blank."""
        return "\n".join(
            "" if index in self.port_lines or line.lstrip().startswith("#") else line
            for index, line in enumerate(self.lines)
        )

    @cached_property
    def tables(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(re.findall(r"^\s*\*(\w+)", self.fixed, re.MULTILINE)))

    def items(self, ports: Mapping[str, Sequence[str]]) -> dict[int, list[dict[str, str]]]:
        """The variables of the published ports that each line stands for, by the line's index."""
        return {
            index: [port_values(parameter, item) for item in ports.get(parameter, ())]
            for index, parameter in self.port_lines.items()
        }

    def render(
        self, values: Mapping[str, str], items: Mapping[int, Sequence[Mapping[str, str]]] | None = None
    ) -> str:
        """The text for one slot, with ``items[index]`` the published ports that line ``index`` stands for."""
        text = render(self.fixed, values, file=self.file)
        if not items:
            return text
        done = text.split("\n")
        for index, ports in items.items():
            # Ports of a line share its number, so that the tool's line numbers stay the file's for all before it.
            done[index] = "\n".join(render(self.lines[index], {**values, **port}, file=self.file) for port in ports)
        return "\n".join(done)


def port_values(parameter: str, item: str) -> dict[str, str]:
    """The variables of one published port, ``tcp:8080:80``. SpecError when it is not of that form."""
    proto, _, rest = item.partition(":")
    outer, _, inner = rest.partition(":")
    if not proto.isalpha() or not all(
        part.isascii() and part.isdigit() and 0 < int(part) < 65_536 for part in (outer, inner)
    ):
        raise SpecError(
            f"not a published port: {item!r}", key=parameter, hint="write proto:outer:inner, such as tcp:8080:80"
        )
    return {f"{parameter}.proto": proto, f"{parameter}.outer": outer, f"{parameter}.inner": inner}


def load(source: Source, text: str) -> None:
    """Run the tool on ``text`` in the calling thread's namespace.

    SpecError, with the user's file and line, when the tool or the kernel refuses; HostError when there is no tool.
    """
    command = f"{source.family.tool}-legacy-restore"
    with tempfile.NamedTemporaryFile(prefix="netslot-xtables-") as lock:
        # A lock of our own: nobody else writes this namespace, and the host's tools may hold theirs for seconds.
        environment = {**os.environ, "XTABLES_LOCKFILE": lock.name, "LC_ALL": "C"}
        try:
            done = subprocess.run(
                [command], input=text, text=True, capture_output=True, env=environment, timeout=_TIMEOUT, check=False
            )
        except FileNotFoundError as error:
            raise HostError(f"{command} is not installed", hint="apt-get install iptables") from error
    if done.returncode:
        raise _refusal(source, done.stderr)


def _refusal(source: Source, stderr: str) -> SpecError:
    number = re.search(r"line:? (\d+)", stderr)
    line = int(number[1]) if number else None
    first = next((part for part in stderr.splitlines() if part.strip()), "the tool failed without a word")
    message = re.sub(r"^\S*restore(?: v\S+ \(legacy\))?: ", "", first)
    if re.fullmatch(r"line:? \d+ failed.*", message):
        message = "the kernel refused the table that ends here"
    hint = None
    if "Set " in message and "exist" in message:
        hint = "declare the set as a parameter of type cidrs; NAME holds its IPv4 part and NAME6 its IPv6 part"
    return SpecError(message, file=source.file, line=line, hint=hint)


def read_back(source: Source) -> dict[str, Image]:
    """The tables that ``source`` names, as the kernel holds them now."""
    with xtables.open_socket(source.family) as sock:
        return {table: read_image(sock, source.family, table) for table in source.tables}


def read_image(sock: socket.socket, family: Family, table: str) -> Image:
    """One table of the socket's namespace, in numbered entries."""
    return iptables_image.take_apart(family, table, *xtables.read_table(sock, family, table))


def empty_tables() -> dict[tuple[str, str], Image]:
    """Every table that this kernel has, as a new namespace has it, by (tool, table).

    To be called in a scratch namespace: asking for a table brings it to life.
    """
    found = {}
    for family in xtables.FAMILIES:
        with contextlib.suppress(KernelError), xtables.open_socket(family) as sock:
            for table in xtables.TABLES:
                with contextlib.suppress(KernelError):  # ENOENT: a kernel without this table
                    found[family.tool, table] = read_image(sock, family, table)
    return found
