"""Text from files is printed in one line, without effect on the terminal."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imprompt.cli.generate import print_json
from imprompt.utils.text import escape


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"), ("a\nb\r", r"a\nb\r"), ("\x9b2J", r"\x9b2J"), ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800", r"\ud800"), ("a\u2028b", r"a\u2028b"), ("größe 猫 λ", "größe 猫 λ"), (3, "3"),
    ],
)  # fmt: skip
def test_characters_that_a_terminal_obeys_are_escaped(text, printed):
    assert escape(text) == printed


@given(st.text(st.characters()))
def test_the_result_is_one_printable_line(text):
    assert escape(text).isprintable() and (escape(text) == text or not text.isprintable())


def test_json_for_programs_contains_no_control_characters(capsys):
    print_json(base="\x9b2J\x7f\u202e größe")
    printed = capsys.readouterr().out.removesuffix("\n")
    assert printed.isprintable() and json.loads(printed) == {"base": "\x9b2J\x7f\u202e größe"}
