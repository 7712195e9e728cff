from __future__ import annotations

from typing import Any

import pytest

from netslot.errors import UsageError
from netslot.spec.document import ParameterKind
from netslot.spec.parameters import check


@pytest.mark.parametrize(
    ("kind", "given", "bound"),
    [
        ("cidrs", ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1"], ("10.0.0.0/8", "2001:db8::/32", "192.0.2.1")),
        ("cidrs", "10.0.0.0/8,192.0.2.0/24", ("10.0.0.0/8", "192.0.2.0/24")),
        ("cidrs", ["0.0.0.0/0", "::/0"], ("0.0.0.0/0", "::/0")),
        ("cidrs", "", ()),
        ("ports", ["tcp:8080:80", "udp:8080:80"], ("tcp:8080:80", "udp:8080:80")),
        ("rate", "20M", "20000000"),
        ("rate", "64Ki", "65536"),
        ("rate", 5, "5"),
        ("address", "2001:DB8::0", "2001:db8::"),
        ("mark", "0x10", "0x10"),
        ("mark", 16, "0x10"),
        ("int", "7", "7"),
        ("text", "blue-7", "blue-7"),
    ],
)
def test_good_values_are_bound(kind: ParameterKind, given: Any, bound: Any) -> None:
    assert check("x", kind, given, 0, 10) == bound


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("cidrs", ["10.0.0.1/8"]),
        ("cidrs", ["10.0.0.0/33"]),
        ("cidrs", ["10.0.0.0/"]),
        ("cidrs", ["10.0.0.0/-1"]),
        ("cidrs", ["10.0.0.0/ 8"]),
        ("cidrs", ["10.0.0.0/8; accept"]),
        ("cidrs", ["2001:db8::/129"]),
        ("cidrs", [3]),
        ("cidrs", {"a": 1}),
        ("ports", ["tcp:0:80"]),
        ("ports", ["tcp:80:65536"]),
        ("ports", ["icmp:1:1"]),
        ("ports", ["tcp:80:80", "tcp:80:81"]),
        ("rate", "20MB"),
        ("rate", "-1"),
        ("rate", True),
        ("address", "10.0.0.1/8"),
        ("mark", 1 << 32),
        ("mark", -1),
        ("int", 11),
        ("int", "x"),
        ("text", ""),
        ("text", "a b"),
        ("text", "a\nb"),
        ("text", 'a"b'),
        ("text", "a;b"),
        ("text", "${address}"),
    ],
)
def test_what_could_mean_something_else_in_a_rule_is_refused(kind: ParameterKind, given: Any) -> None:
    with pytest.raises(UsageError, match="parameter x"):
        check("x", kind, given, 0, 10)


def test_a_network_with_host_bits_is_told_the_network() -> None:
    with pytest.raises(UsageError) as caught:
        check("allow", "cidrs", ["10.1.2.3/8"])
    assert caught.value.hint == "the network that holds it is 10.0.0.0/8"
