"""The world of mini is a function of seeds, and every parameter of an image is known."""

import random
from dataclasses import replace

import numpy as np
import pytest

from imprompt.mini import world
from imprompt.mini.tokenizer import MAX_LENGTH, build_tokenizer, tokenize_prompts

ATTRIBUTE_VALUES = {"category": world.CATEGORIES, "color": world.COLORS, "pattern": world.PATTERNS}


def render(subject, scene):
    """The pixels of an image as signed integers."""
    return np.asarray(world.render(subject, scene)).astype(int)


def render_seed(seed):
    return render(world.make_subject(seed), world.make_scene(seed))


def test_the_same_seed_gives_the_same_image():
    assert world.make_subject(7) == world.make_subject(7) and world.make_scene(7) == world.make_scene(7)
    assert (render_seed(7) == render_seed(7)).all()
    assert (render_seed(7) != render_seed(8)).any()
    assert render_seed(7).shape == (world.SIZE, world.SIZE, 3)


def test_all_attribute_values_are_about_equally_frequent():
    subjects = [world.make_subject(i) for i in range(3000)]
    for attribute, values in ATTRIBUTE_VALUES.items():
        counts = [sum(getattr(subject, attribute) == value for subject in subjects) for value in values]
        assert min(counts) > 0.8 * 3000 / len(values)


def test_thousands_of_subjects_look_different():
    names = ("category", "color_rgb", "pattern", "second_color_rgb", "outline", "face", "accessory")
    appearances = {tuple(getattr(subject, name) for name in names) for subject in map(world.make_subject, range(3000))}
    assert len(appearances) == 3000


def test_held_out_combinations_are_never_trained_on():
    def list_subjects(held_out, count=2000):
        subjects = world.iterate_subjects(held_out=held_out)
        return [next(subjects) for _ in range(count)]

    training, test = list_subjects(held_out=False), list_subjects(held_out=True)
    combinations, test_combinations = ({(s.category, s.color, s.pattern) for s in subjects} for subjects in (training, test))
    assert not combinations & test_combinations
    assert not {subject.seed for subject in training} & {subject.seed for subject in test}
    for attribute, values in ATTRIBUTE_VALUES.items():
        assert {getattr(subject, attribute) for subject in training} == set(values)


def test_the_main_color_covers_more_than_the_second():
    """Otherwise it would be ambiguous which of the two names the subject."""
    for pattern in world.PATTERNS[1:]:
        subject = replace(
            world.make_subject(0),
            category="heart",
            pattern=pattern,
            color_rgb=(255, 0, 0),
            second_color_rgb=(0, 0, 255),
            face=False,
            accessory="none",
        )
        image = render(subject, replace(world.make_scene(0), tint=(1.0, 1.0, 1.0), cover="none", x=32, y=32))
        main, second = ((np.abs(image - color).sum(-1) < 90).sum() for color in (subject.color_rgb, subject.second_color_rgb))
        assert main > 1.1 * second > 0


def test_the_silhouette_is_where_the_subject_changes_the_image():
    for seed in range(20):
        subject, scene = replace(world.make_subject(seed), outline=False), world.make_scene(seed)
        inverted = replace(
            subject, color_rgb=tuple(255 - c for c in subject.color_rgb), second_color_rgb=tuple(255 - c for c in subject.second_color_rgb)
        )
        changed = (render(subject, scene) != render(inverted, scene)).any(-1)
        inside = np.asarray(world.render_silhouette(subject, scene)) > 0
        assert not (changed & ~inside).any()
        assert changed.sum() > 0.25 * inside.sum()


def test_edges_lie_on_the_border_of_the_silhouette():
    subject, scene = world.make_subject(3), world.make_scene(3)
    edges, inside = np.asarray(world.render_edges(subject, scene)), np.asarray(world.render_silhouette(subject, scene))
    assert set(np.unique(edges)) == {0, 255}
    assert 0 < (edges > 0).sum() < (inside > 0).sum()


def test_scene_captions_do_not_describe_the_appearance():
    rng = random.Random(0)
    appearance = {*world.PALETTE, *world.PATTERNS, *world.ACCESSORIES, "stripes", "dots", "checks"} - set(world.BACKGROUNDS)
    for i in range(300):
        subject, scene = world.make_subject(i), world.make_scene(i)
        assert not appearance & set(world.sample_scene_caption(subject, scene, rng).split())
        assert subject.category in world.sample_caption(subject, scene, rng)


def test_every_word_is_one_token_and_every_caption_fits():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in world.build_vocabulary())
    rng = random.Random(0)
    for i in range(500):
        words = world.sample_caption(world.make_subject(i), world.make_scene(i), rng, keep=1.0).split()
        assert len(tokenizer(" ".join(words)).input_ids) == len(words) + 2 <= MAX_LENGTH


def test_other_text_is_tokenized_as_bytes():
    tokenizer = build_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer("a zebra, in Zürich 42!", add_special_tokens=False).input_ids
    assert tokenize_prompts(tokenizer, ["a red fish " * 40, ""]).shape == (2, MAX_LENGTH)


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_every_category_can_be_rendered_with_everything_on_it(category):
    subject = replace(world.make_subject(1), category=category, outline=True, face=True, accessory="hat", pattern="checked")
    for background in world.BACKGROUNDS:
        for cover in ("none", "low", "post"):
            world.render(subject, replace(world.make_scene(1), background=background, cover=cover))
