"""Instance and class images of DreamBooth, and the subject in a prompt."""

from collections import Counter

import pytest

from imprompt.data.dreambooth import DreamBoothDataset
from imprompt.data.records import MapRecords
from imprompt.errors import UserError
from imprompt.methods.prompt_templates import format_class_prompt, format_instance_prompt, insert_subject_token


def test_instance_and_class_images_alternate_and_all_occur_equally_often():
    dataset = DreamBoothDataset(["a", "b", "c"], "a sks cat", ["k", "l", "m", "n"], "a cat", prior_loss_weight=0.5)
    assert isinstance(dataset, MapRecords) and len(dataset) == 24
    records = [dataset[i] for i in range(len(dataset))]
    assert {(r.caption, r.loss_weight) for r in records[::2]} == {("a sks cat", 1.0)}
    assert {(r.caption, r.loss_weight) for r in records[1::2]} == {("a cat", 0.5)}
    assert Counter(r.target for r in records[::2]) == {name: 4 for name in "abc"}
    assert Counter(r.target for r in records[1::2]) == {name: 3 for name in "klmn"}


def test_without_class_images_there_are_only_instance_images():
    dataset = DreamBoothDataset(["a", "b"], "a <subject>")
    assert [dataset[i].target for i in range(len(dataset))] == ["a", "b"]
    with pytest.raises(IndexError):
        dataset[2]


def test_no_instance_images_are_an_error():
    with pytest.raises(UserError, match="at least one image"):
        DreamBoothDataset([], "a sks cat")


@pytest.mark.parametrize(
    "prompt, replace_noun, expected",
    [
        ("a cat on a beach", False, "a sks cat on a beach"),
        ("A Cat, at night", False, "A sks cat, at night"),
        ("a cathedral and a cat", False, "a cathedral and a sks cat"),
        ("a cat and a cat", False, "a sks cat and a cat"),
        ("a painting of *", False, "a painting of sks cat"),
        ("a cat on a beach", True, "a sks on a beach"),
        ("a * and a cat", True, "a sks and a cat"),
    ],
)
def test_the_subject_is_inserted_into_the_prompt(prompt, replace_noun, expected):
    assert insert_subject_token(prompt, "cat", "sks", replace_noun=replace_noun) == expected


@pytest.mark.parametrize("prompt, noun", [("a dog on a beach", "cat"), ("", "cat"), ("a cat", "")])
def test_a_prompt_without_the_class_noun_is_an_error(prompt, noun):
    with pytest.raises(UserError, match="in place of the subject"):
        insert_subject_token(prompt, noun, "sks")


def test_training_prompts():
    assert format_class_prompt("cat") == "a photo of a cat" and format_class_prompt("owl") == "a photo of an owl"
    assert format_instance_prompt("sks", "cat") == "a photo of a sks cat"
    assert format_instance_prompt("<subject>") == "a photo of a <subject>"
