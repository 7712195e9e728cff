from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netslot.errors import SpecError
from netslot.spec.render import render, variables_in


def test_values_take_the_place_of_variables() -> None:
    text = "-A FORWARD -i ${guest_if} -s ${address}/32\n"
    assert (
        render(text, {"guest_if": "tap0", "address": "10.0.0.3"}, file="x") == "-A FORWARD -i tap0 -s 10.0.0.3/32\n"
    )


def test_nft_variables_and_escapes_pass_through() -> None:
    text = "define x = 1\nip saddr $x $${address} ${address}"
    assert render(text, {"address": "1.2.3.4"}, file="x") == "define x = 1\nip saddr $x ${address} 1.2.3.4"
    assert variables_in(text) == {"address"}


def test_a_value_is_not_rendered_again() -> None:
    assert render("${a}", {"a": "${b}", "b": "no"}, file="x") == "${b}"


def test_an_unknown_name_tells_file_line_and_the_nearest() -> None:
    with pytest.raises(SpecError) as caught:
        render("one\ntwo ${adress}\n", {"address": "1.2.3.4"}, file="slot.rules")
    assert (caught.value.file, caught.value.line, caught.value.key) == ("slot.rules", 2, "adress")
    assert caught.value.hint == "did you mean ${address}?"


@pytest.mark.parametrize("text", ["${", "x ${address", "${address\n}"])
def test_an_unclosed_variable_is_an_error(text: str) -> None:
    with pytest.raises(SpecError, match="without its closing"):
        render(text, {"address": "1"}, file="x")


@given(st.text(alphabet="ab$\n }{"))
def test_text_without_variables_stays(text: str) -> None:
    if "${" not in text:
        assert render(text, {}, file="x") == text
