"""Records of one subject beside pictures of its class, and the subject's place in a prompt."""

from collections import Counter

import pytest

from imprompt.data.dreambooth import Personal, class_text, named, subject_text
from imprompt.data.records import Counted
from imprompt.errors import UserError


def test_with_a_prior_photographs_and_class_pictures_take_turns_and_all_come_up_equally_often():
    records = Personal(["a", "b", "c"], "a sks cat", ["k", "l", "m", "n"], "a cat", weight=0.5)
    assert isinstance(records, Counted) and len(records) == 24
    found = [records[i] for i in range(len(records))]
    assert {(r.text, r.loss_weight) for r in found[::2]} == {("a sks cat", 1.0)}
    assert {(r.text, r.loss_weight) for r in found[1::2]} == {("a cat", 0.5)}
    assert Counter(r.target for r in found[::2]) == {name: 4 for name in "abc"}
    assert Counter(r.target for r in found[1::2]) == {name: 3 for name in "klmn"}


def test_without_a_prior_the_photographs_are_all():
    records = Personal(["a", "b"], "a <subject>")
    assert [records[i].target for i in range(len(records))] == ["a", "b"]
    with pytest.raises(IndexError):
        records[2]


def test_no_photographs_are_an_error():
    with pytest.raises(UserError, match="at least one photograph"):
        Personal([], "a sks cat")


@pytest.mark.parametrize(
    "prompt, alone, expected",
    [
        ("a cat on a beach", False, "a sks cat on a beach"),
        ("A Cat, at night", False, "A sks cat, at night"),
        ("a cathedral and a cat", False, "a cathedral and a sks cat"),
        ("a cat beside a cat", False, "a sks cat beside a cat"),
        ("a painting of *", False, "a painting of sks cat"),
        ("a cat on a beach", True, "a sks on a beach"),
        ("a * beside a cat", True, "a sks beside a cat"),
    ],
)
def test_the_subject_is_named_in_the_prompt(prompt, alone, expected):
    assert named(prompt, "cat", "sks", alone) == expected


@pytest.mark.parametrize("prompt, noun", [("a dog on a beach", "cat"), ("", "cat"), ("a cat", "")])
def test_a_prompt_without_the_subject_is_an_error(prompt, noun):
    with pytest.raises(UserError, match="where the subject should stand"):
        named(prompt, noun, "sks")


def test_texts_for_training():
    assert class_text("cat") == "a photo of a cat" and class_text("owl") == "a photo of an owl"
    assert subject_text("sks", "cat") == "a photo of a sks cat" and subject_text("<subject>") == "a photo of a <subject>"
