"""The world follows from seeds, and every parameter of a picture is known."""

import random
from dataclasses import replace

import numpy as np
import pytest

from imprompt.mini import world
from imprompt.mini.tokenizer import LENGTH, make_tokenizer, tokenise


def picture(seed):
    return np.asarray(world.draw(world.subject(seed), world.scene(seed))).astype(int)


def test_same_seed_same_picture():
    assert world.subject(7) == world.subject(7) and world.scene(7) == world.scene(7)
    assert (picture(7) == picture(7)).all()
    assert (picture(7) != picture(8)).any()
    assert picture(7).shape == (world.SIZE, world.SIZE, 3)


def test_every_value_is_drawn_and_balanced():
    subjects = [world.subject(i) for i in range(3000)]
    for name, values in (("kind", world.KINDS), ("colour", world.COLOURS), ("pattern", world.PATTERNS)):
        counts = [sum(getattr(s, name) == v for s in subjects) for v in values]
        assert min(counts) > 0.8 * 3000 / len(values)


def test_thousands_of_subjects_look_different():
    looks = {(s.kind, s.main, s.pattern, s.second, s.outline, s.face, s.accessory) for s in map(world.subject, range(3000))}
    assert len(looks) == 3000


def test_held_out_combinations_are_never_trained_on():
    def first(held_out, count=2000):
        draws = world.subjects(held_out)
        return [next(draws) for _ in range(count)]

    trained, held_out = first(False), first(True)
    combination = lambda s: (s.kind, s.colour, s.pattern)  # noqa: E731
    assert not {combination(s) for s in trained} & {combination(s) for s in held_out}
    assert not {s.seed for s in trained} & {s.seed for s in held_out}
    for name, values in (("kind", world.KINDS), ("colour", world.COLOURS), ("pattern", world.PATTERNS)):
        assert {getattr(s, name) for s in trained} == set(values)


def test_the_main_colour_covers_more_than_the_second():
    """Otherwise nobody could say which one names the subject."""
    for pattern in world.PATTERNS[1:]:
        s = replace(world.subject(0), kind="heart", pattern=pattern, main=(255, 0, 0), second=(0, 0, 255), face=False, accessory="none")
        where = replace(world.scene(0), tint=(1.0, 1.0, 1.0), cover="none", x=32, y=32)
        image = np.asarray(world.draw(s, where)).astype(int)
        main, second = ((np.abs(image - colour).sum(-1) < 90).sum() for colour in (s.main, s.second))
        assert main > 1.1 * second > 0


def test_silhouette_is_where_the_subject_changes_the_picture():
    for seed in range(20):
        s, where = replace(world.subject(seed), outline=False), world.scene(seed)
        other = replace(s, main=tuple(255 - c for c in s.main), second=tuple(255 - c for c in s.second))
        changed = (np.asarray(world.draw(s, where)) != np.asarray(world.draw(other, where))).any(-1)
        inside = np.asarray(world.silhouette(s, where)) > 0
        assert not (changed & ~inside).any()
        assert changed.sum() > 0.25 * inside.sum()


def test_edges_lie_on_the_silhouettes_border():
    s, where = world.subject(3), world.scene(3)
    edges, inside = np.asarray(world.edges(s, where)), np.asarray(world.silhouette(s, where))
    assert set(np.unique(edges)) == {0, 255}
    assert 0 < (edges > 0).sum() < (inside > 0).sum()


def test_photographic_captions_tell_nothing_of_the_look():
    rng = random.Random(0)
    look = {*world.PALETTE, *world.PATTERNS, *world.ACCESSORIES, "stripes", "dots", "checks"} - set(world.BACKGROUNDS)
    for i in range(300):
        s, where = world.subject(i), world.scene(i)
        assert not look & set(world.photo_caption(s, where, rng).split())
        assert s.kind in world.caption(s, where, rng)


def test_every_word_is_one_token_and_every_caption_fits():
    tokenizer = make_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in world.vocabulary())
    rng = random.Random(0)
    for i in range(500):
        words = world.caption(world.subject(i), world.scene(i), rng, keep=1.0).split()
        assert len(tokenizer(" ".join(words)).input_ids) == len(words) + 2 <= LENGTH


def test_other_text_falls_apart_into_known_bytes():
    tokenizer = make_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer("a zebra, in Zürich 42!", add_special_tokens=False).input_ids
    assert tokenise(tokenizer, ["a red fish " * 40, ""]).shape == (2, LENGTH)


@pytest.mark.parametrize("kind", world.KINDS)
def test_every_kind_can_be_drawn_with_everything_on_it(kind):
    s = replace(world.subject(1), kind=kind, outline=True, face=True, accessory="hat", pattern="checked")
    for background in world.BACKGROUNDS:
        for cover in ("none", "low", "post"):
            world.draw(s, replace(world.scene(1), background=background, cover=cover))
