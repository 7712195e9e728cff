from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netslot.errors import SpecError
from netslot.spec.load import load, parse
from netslot.spec.model import HostSpec

GOOD = 'slots = 4\nuplink = "eth0"\n[addresses]\npool = "10.201.0.0/16"\n'


def spec(text: str, path: Path = Path("netslot.toml")) -> HostSpec:
    return parse(text, path)


def error_of(text: str, path: Path = Path("netslot.toml")) -> SpecError:
    with pytest.raises(SpecError) as caught:
        spec(text, path)
    return caught.value


def test_the_least_spec_is_four_lines() -> None:
    host = spec(GOOD)
    assert (host.slots, host.prefix, host.uplink, host.hold_down) == (4, "slot", "eth0", 2.0)
    assert list(host.classes) == ["default"]
    assert host.classes["default"].guest_interface == "tap0"


def test_the_number_of_slots_can_be_given_by_the_caller() -> None:
    assert parse(GOOD, Path("netslot.toml"), slots=7).slots == 7
    with pytest.raises(SpecError, match="pairs"):
        parse(GOOD, Path("netslot.toml"), slots=70_000)
    with pytest.raises(SpecError, match="each class says"):
        parse(GOOD[10:] + "[class.a]\nslots = 1\n", Path("netslot.toml"), slots=7)


@pytest.mark.parametrize(
    ("text", "line", "key", "message"),
    [
        (GOOD.replace("uplink", "upline"), 2, "upline", "no such key"),
        (GOOD.replace("slots = 4", "slots = '4'"), 1, "slots", "expected a whole number, got '4'"),
        (GOOD.replace("slots = 4\n", ""), None, None, "'slots' is missing"),
        (GOOD.replace("slots = 4", "slots = -1"), 1, "slots", ">= 0"),
        (GOOD.replace(".0/16", ".1/16"), 4, "addresses.pool", "host bits"),
        (GOOD.replace("/16", "/30"), 4, "addresses.pool", "pairs"),
        (GOOD + 'gateway = "10.0.0.1"\n', 5, "addresses.gateway", "not in the guest's network"),
        (GOOD + 'gateway = "172.16.0.2"\n', 5, "addresses.gateway", "guest's own"),
        (GOOD + 'guest = "10.201.3.2/30"\ngateway = "10.201.3.1"\n', 5, "addresses.guest", "overlaps"),
        (GOOD + 'dns = ["one"]\n', 5, "addresses.dns", "expected addresses"),
        (GOOD + '[attachment]\nkind = "tab"\n', 6, "attachment.kind", "not one of tap, veth, process"),
        (GOOD + '[attachment]\ninterface = "up0"\n', 6, "attachment.interface", "taken"),
        (GOOD + '[attachment]\nguest_mac = "01:00:00:00:00:01"\n', 6, "attachment.guest_mac", "multicast"),
        (GOOD + '[rules]\nbackend = "nftables"\nipv4 = "x"\n', 7, "rules.ipv4", "takes no ipv4"),
        (GOOD + '[rules]\nnft = "absent.nft"\n', 6, "rules.nft", "no such file"),
        (GOOD + '[parameters.speed]\ntype = "rate"\n', 5, "parameters.speed", "needs a default"),
        (GOOD + '[parameters.mtu]\ntype = "rate"\ndefault = 1\n', 5, "parameters.mtu", "variable's name"),
        (GOOD + '[parameters.x]\ntype = "cidrs"\ndefault = ["a"]\n', 7, "parameters.x.default", "no network"),
        (
            GOOD + '[[bpf.programs]]\nobject = "x.o"\nprogram = "p"\nhook = "egress"\n',
            6,
            "bpf.programs.0.object",
            "no such",
        ),
        (GOOD + '[routes]\nroutes = [{to = "default", via = "${gatewax}"}]\n', 6, None, "no variable ${gatewax}"),
        (GOOD + "[class.a]\nslots = 1\n", 1, "slots", "each class says"),
        (GOOD[10:] + "[class.Big]\nslots = 1\n", 4, "class.Big", "named by"),
        (
            GOOD[10:] + "[class.a]\nslots = 1\n[class.a.attachment]\nmut = 1\n",
            7,
            "class.a.attachment.mut",
            "no such key",
        ),
        ('prefix = "veth"\n' + GOOD, 1, "prefix", "other programs"),
        ('prefix = "s1"\n' + GOOD, 1, "prefix", "digit"),
        ("slots = = 4\n", 1, None, "no valid TOML"),
    ],
)
def test_an_error_tells_line_key_and_what_was_expected(
    text: str, line: int | None, key: str | None, message: str
) -> None:
    error = error_of(text)
    assert error.file == "netslot.toml"
    assert error.line == line
    assert key is None or error.key == key
    assert message in str(error)


def test_a_misspelt_key_is_told_the_nearest() -> None:
    assert error_of(GOOD.replace("pool", "pol")).hint == "did you mean 'pool'?"
    assert error_of(GOOD + '[attachment]\nkind = "veht"\n').hint == "did you mean 'veth'?"


def test_all_problems_are_told_at_once() -> None:
    error = error_of('slots = "4"\nupline = "eth0"\n[addresses]\npool = 3\n[attachment]\nmtu = 1\n')
    assert [line.split(":")[1] for line in str(error).splitlines()] == ["1", "2", "4", "6"]


def test_a_spec_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        load(tmp_path / "netslot.toml")
    (tmp_path / "netslot.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="not UTF-8"):
        load(tmp_path / "netslot.toml")


def test_a_missing_rule_file_is_told_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "slot.nft").write_text("")
    assert error_of(GOOD + '[rules]\nnft = "slots.nft"\n', tmp_path / "n.toml").hint == "did you mean slot.nft?"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / "netslot.toml"


def test_rule_files_are_read_with_the_spec(tmp_path: Path) -> None:
    path = write(tmp_path, "slot.rules", "*filter\n-A INPUT -s ${address} -j DROP\nCOMMIT\n")
    rules = spec(GOOD + '[rules]\nbackend = "iptables-nft"\nipv4 = "slot.rules"\n', path).classes["default"].rules
    assert rules is not None
    assert rules.backend == "iptables-nft"
    assert rules.ipv4 is not None
    assert rules.ipv4.text.startswith("*filter")
    assert rules.files == (rules.ipv4,)


@pytest.mark.parametrize(
    ("section", "content", "message", "hint"),
    [
        ("rules", "\nx ${adress}", "no variable ${adress}", "did you mean ${address}?"),
        ("rules", "\nx ${address6}", "${address6} has no value here", "only with `addresses.pool6`"),
        ("root", "\nx ${address}", "${address} is one slot's own", "the same for all slots"),
    ],
)
def test_variables_in_rule_files_are_checked(
    tmp_path: Path, section: str, content: str, message: str, hint: str
) -> None:
    path = write(tmp_path, "r.nft", content)
    error = error_of(f'{GOOD}[{section}]\nnft = "r.nft"\n', path)
    assert (error.file, error.line) == (str(tmp_path / "r.nft"), 2)
    assert message in str(error)
    assert error.hint is not None
    assert hint in error.hint


def test_fields_of_published_ports_are_variables_of_iptables_files(tmp_path: Path) -> None:
    path = write(tmp_path, "slot.rules", "-p ${publish.proto} --dport ${publish.outer} ${publish.inner}")
    text = GOOD + '[rules]\nbackend = "iptables-legacy"\nipv4 = "slot.rules"\n[parameters.publish]\ntype = "ports"\n'
    assert spec(text, path).classes["default"].lists == {"publish": "ports"}
    assert "publish.inner" in str(error_of(text.replace("ports", "cidrs"), path))


def test_a_class_stands_on_the_host_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "slot.nft", "table ip a {}")
    text = (
        GOOD[10:] + '[attachment]\nkind = "veth"\nmtu = 1400\n[rules]\nnft = "slot.nft"\n'
        '[cgroup]\nmemory = "1G"\npids = 100\n[parameters.speed]\ntype = "rate"\ndefault = "1M"\n'
        "[class.small]\nslots = 3\n"
        "[class.big]\nslots = 1\n[class.big.cgroup]\nmemory = '4G'\n[class.big.attachment]\nmtu = 9000\n"
        "[class.big.rules]\n[class.big.parameters.allow]\ntype = 'cidrs'\n"
    )
    small, big = spec(text, path).classes.values()
    assert (small.slots, small.attachment.mtu, small.attachment.kind) == (3, 1400, "veth")
    assert (big.slots, big.attachment.mtu, big.attachment.kind) == (1, 9000, "veth")
    assert small.cgroup is not None
    assert big.cgroup is not None
    assert (small.cgroup.memory, big.cgroup.memory, big.cgroup.pids) == ("1G", "4G", 100)
    assert small.rules is not None
    assert big.rules is None
    assert list(big.parameters) == ["speed", "allow"]
    assert small.guest_interface == "inner0"


def test_a_problem_in_an_inherited_section_is_placed_where_it_is_written() -> None:
    error = error_of(GOOD[10:] + '[rules]\nnft = "absent"\n[class.a]\nslots = 1\n[class.b]\nslots = 1\n')
    assert (error.line, error.key) == (5, "rules.nft")
    assert "\n" not in str(error)


def test_local_ipv6_is_masqueraded_and_global_is_not() -> None:
    assert spec(GOOD + 'pool6 = "fd5c::/48"\n').root.masquerade6
    assert not spec(GOOD + 'pool6 = "2001:db8::/48"\n').root.masquerade6
    assert not spec(GOOD + 'pool6 = "fd5c::/48"\n[root]\nmasquerade = false\n').root.masquerade6


KEYS = [
    "slots",
    "prefix",
    "attachment",
    "rules",
    "root",
    "parameters",
    "nat",
    "bpf",
    "cgroup",
    "routes",
    "rates",
    "limits",
    "class",
    "addresses.guest",
    "addresses.pool6",
    "addresses.guest6",
    "addresses.gateway",
    "addresses.dns",
    "attachment.kind",
    "attachment.mtu",
    "class.a",
    "class.a.slots",
    "class.a.rules",
    "class.a.cgroup.memory",
    "parameters.x",
    "parameters.x.type",
    "parameters.x.default",
    "bpf.programs",
    "bpf.filter",
    "routes.routes",
    "routes.tunnels",
    "rates.egress",
    "limits.hold_down",
    "rules.backend",
    "rules.nft",
    "root.nft",
    "cgroup.io",
]
VALUES = [
    "3",
    '"x"',
    "true",
    "[]",
    '["a"]',
    "{a=1}",
    "{}",
    "-1",
    "1.5",
    "1979-05-27",
    '"${address}"',
    "[{a=1}]",
    '""',
]


@given(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=6))
def test_whatever_is_written_is_either_a_spec_or_an_error_with_a_line(keys: dict[str, str]) -> None:
    text = 'uplink = "eth0"\naddresses.pool = "10.0.0.0/16"\n' + "".join(f"{k} = {v}\n" for k, v in keys.items())
    try:
        spec(text)
    except SpecError as error:
        assert error.line is not None or "missing" in str(error)
