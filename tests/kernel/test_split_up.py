"""What ``netslot split`` writes is brought up with ``netslot up``, and no packet fares otherwise than before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import moved_lab as lab
from moved_lab import Host, Question
from netslot.kernel import netns
from synthetic_host import SyntheticTenant, make_host

NETSLOT = str(Path(sys.executable).with_name("netslot"))
TENANTS = 9


class Moved:
    """A host to be moved: its rules, and the directory that ``split`` writes."""

    def __init__(self, directory: Path, style: str, attachment: str, variant: str) -> None:
        self.directory, self.attachment, self.variant = directory, attachment, variant
        rules = make_host(TENANTS, style=style)
        self.tenants: list[SyntheticTenant] = rules.tenants
        self.rules = {4: rules.text, 6: lab.in_ipv6(rules.text)}
        self.out = directory / "moved"
        self.spec = self.out / "netslot.toml"
        self.dumps = [directory / "host.rules", directory / "host.rules6"]

    def netslot(self, *arguments: str, root: str = "", status: int = 0) -> str:
        where = ["--state-dir", str(self.directory / "state"), *(["--root-netns", root] if root else [])]
        done = subprocess.run([NETSLOT, *where, *arguments], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == status, f"{arguments}: {done.returncode} {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def split(self, host: Host) -> None:
        """Split what the host's own iptables-save says, and prove it."""
        for path, tool in zip(self.dumps, ("iptables", "ip6tables"), strict=True):
            path.write_text(host.root.sh(f"{tool}-{self.variant}-save"))
        names = [str(path) for path in self.dumps]
        known = [word for family in (4, 6) for word in ("--host-address", lab.mapped(lab.UPLINK, family))]
        people = [
            {
                "name": one.name,
                "interfaces": [one.interface],
                "addresses": [lab.mapped(one.address, family) for family in (4, 6)],
            }
            for one in self.tenants
        ]
        (self.directory / "people.json").write_text(json.dumps(people))
        known += ["--tenants", str(self.directory / "people.json")]
        self.netslot("split", *names, "--out", str(self.out), "--attachment", self.attachment, *known)
        said = self.netslot("prove", *names, str(self.out), *known)
        assert said.startswith("the same for every packet"), said

    def load_root(self, host: Host) -> None:
        for file, tool in (("root.rules", "iptables"), ("root.rules6", "ip6tables")):
            lab.load(host.root, tool, (self.out / file).read_text(), self.variant)
        for file in ("publish.nft", "publish.nft6"):
            host.root.sh(f"nft -f {self.out / file}")

    def json(self, host: Host, *arguments: str) -> Any:
        return json.loads(self.netslot("--json", *arguments, root=host.root.name))

    @contextmanager
    def up(self, host: Host) -> Iterator[None]:
        self.load_root(host)
        self.netslot("up", str(self.spec), root=host.root.name)
        try:
            yield
        finally:
            self.netslot("down", "--force", root=host.root.name)


def _own(path: Path, prefix: str) -> None:
    """Tests that run beside each other need slots of different names; and no tenant waits for another here."""
    text = path.read_text().replace('prefix = "slot"', f'prefix = "{prefix}"')
    path.write_text(text + '\n[limits]\nhold_down = "0s"\n')


@pytest.mark.parametrize(
    ("style", "attachment", "variant"),
    [("mixed", "tap", "legacy"), ("chains", "process", "nft"), ("flat", "veth", "legacy")],
)
def test_packets_fare_as_before(style: str, attachment: str, variant: str, tmp_path: Path) -> None:
    move = Moved(tmp_path, style, attachment, variant)
    asked = lab.questions(move.tenants)
    with lab.before(move.tenants, move.rules, variant) as host:
        wanted = lab.ask(host, asked)
        move.split(host)
    assert f'backend = "iptables-{variant}"' in move.spec.read_text()
    _own(move.spec, f"u{os.getpid() % 10000}{attachment[0]}")
    kinds = Counter(answer.split()[0] for answer in wanted.values())
    assert min(kinds["from"], kinds["silent"]) > 60, kinds
    assert kinds["refused"] >= TENANTS, kinds
    with lab.bare() as host:
        said = move.netslot("up", str(move.spec), root=host.root.name, status=3)
        assert "root holds other rules than the spec says" in said
        said = move.netslot("check", str(move.spec), root=host.root.name, status=4)
        assert "1 errors" in said, said
        assert f"iptables-{variant}-restore <" in said
        assert not [name for name in netns.names() if name.startswith(f"u{os.getpid() % 10000}")]
        with move.up(host):
            assert "0 errors" in move.netslot("check", str(move.spec), root=host.root.name)
            fields = {one.name: move.json(host, "acquire", "--owner", one.name) for one in move.tenants}
            with lab.moved_in(move.tenants, fields) as host.guests:
                found = lab.ask(host, asked)
            assert _different(move, wanted, found) == {}
            report = move.json(host, "verify")
            assert report["drift"] == [], report
        root = host.root.sh(f"iptables-{variant}-save; ip6tables-{variant}-save")
        assert "netslot-from" in root, "down took rules away that are not netslot's"


def _different(
    move: Moved, wanted: dict[Question, str], found: dict[Question, str]
) -> dict[Question, tuple[str, str]]:
    """Between tenants a denial is a denial, whether it is answered or silent."""
    addresses = {lab.mapped(one.address, family) for one in move.tenants for family in (4, 6)}

    def plain(question: Question, answer: str) -> str:
        return "silent" if answer == "refused" and question.address in addresses else answer

    return {
        question: (answer, found[question])
        for question, answer in wanted.items()
        if plain(question, answer) != plain(question, found[question])
    }
