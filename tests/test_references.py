"""Several references through the public doors: weights, ways to combine, and what is wrong with them."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import imprompt
from imprompt.cli import main
from imprompt.config import COMBINE
from imprompt.core.aggregation import AGGREGATORS
from imprompt.core.attention import attend
from imprompt.data.readers import Mini
from imprompt.models.base_pipelines import load_base

A, B = "examples/cat.png", "examples/fish.png"


@pytest.fixture(scope="module")
def pipe():
    return load_base("mini")


def drawn(pipe, prompt):
    with imprompt.attach(pipe, prompt):
        return pipe([""], num_inference_steps=3, generator=[torch.Generator().manual_seed(0)], output_type="latent").images


@pytest.mark.parametrize("adapter", ["mini", "mini-plus"])
@pytest.mark.parametrize("combine", [None, "average", "max", "average-tokens", "max-tokens", "joint"])
def test_a_weight_of_two_draws_what_the_picture_given_twice_draws(pipe, adapter, combine):
    if (adapter, combine) == ("mini", "joint"):
        pytest.skip("no resampler")
    ip = imprompt.load(adapter)
    weighed, twice = ip([A, B], weights=[2, 1], combine=combine), ip([A, A, B], combine=combine)
    torch.testing.assert_close(drawn(pipe, weighed), drawn(pipe, twice), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(drawn(pipe, ip([A, B], weights=[1, 0], combine=combine)), drawn(pipe, ip(A)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("combine", [None, *COMBINE])
def test_the_order_does_not_matter_and_ways_differ(pipe, combine):
    ip = imprompt.load("mini-plus" if combine == "joint" else "mini")
    one, other = (drawn(pipe, ip(pictures, combine=combine)) for pictures in ([A, B], [B, A]))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, drawn(pipe, ip(A)), atol=1e-2)
    if combine not in (None, "concat"):
        assert not torch.allclose(one, drawn(pipe, ip([A, B])), atol=1e-2)


@pytest.fixture(scope="module")
def many():
    records = Mini(64, held_out=True, photos=64)
    return [records[i].target for i in range(64)]


WAYS = [("mini", way) for way in COMBINE if way != "joint"] + [("mini-plus", way) for way in COMBINE] + [("mini-subject", None)]


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 9, 64])
@pytest.mark.parametrize(("adapter", "combine"), WAYS)
def test_a_layer_hears_the_same_in_any_order_to_1e_5(many, adapter, combine, count):
    prompt = imprompt.load(adapter)(many[:count], combine=combine)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    other = replace(prompt, features=prompt.features[:, order])
    for (n, pair), mixed in zip(prompt.key_values()[1].items(), other.key_values()[1].values(), strict=True):
        query = torch.randn(1, 16, pair.key.shape[2], generator=torch.Generator().manual_seed(n))
        heard, again = (attend(query, *those, heads=4) for those in (pair, mixed))
        assert (heard - again).abs().max() <= 1e-5, f"layer {n}"


@pytest.mark.parametrize("own", ["attention", "self-attention"])
def test_side_by_side_is_that_whatever_the_adapter_was_trained_for(own):
    plain, trained = imprompt.load("mini"), imprompt.load("mini")
    torch.manual_seed(0)
    trained.adapter.aggregator = AGGREGATORS[own](128, 128).requires_grad_(False)
    for one, other in zip(plain([A, B]).key_values(), trained([A, B], combine="concat").key_values(), strict=True):
        for n, pair in one.items():
            torch.testing.assert_close(other[n].key, pair.key)


def test_a_reference_without_weight_is_left_out_before_nine_are_chosen():
    ip = imprompt.load("mini")
    torch.manual_seed(0)
    ip.adapter.aggregator = AGGREGATORS["self-attention"](128, 128).requires_grad_(False)
    pictures = [Image.new("RGB", (64, 64), (20 * i, 80, 200)) for i in range(11)]
    weighed, left_out = ip(pictures, weights=[0, 0, *[1] * 9]).key_values()[1], ip(pictures[2:]).key_values()[1]
    for n, pair in left_out.items():
        torch.testing.assert_close(weighed[n].key, pair.key)


def test_sixty_four_references(pipe):
    ip = imprompt.load("mini")
    pictures = [Image.new("RGB", (64, 64), (4 * i % 256, 80, 200)) for i in range(64)]
    for combine in (None, "average"):
        assert drawn(pipe, ip(pictures, combine=combine)).isfinite().all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "1"], "weights: expected one for each of the 2 references, received 1"),
        (["--weights", "0,0"], "weights: expected numbers of at least 0, and one above it"),
        (["--weights", "-1,2"], "weights: expected numbers of at least 0"),
        (["--weights", "nan,2"], "weights: expected numbers of at least 0"),
        (["--weights", "a,b"], "weights: expected numbers with commas between them"),
        (["--combine", "joint"], "combine: joint lays the references' patches before a resampler"),
        (["--combine", "wild"], "combine: expected one of auto, concat"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, words, said):
    words = [f"{words[0]}={words[1]}"]
    assert main(["generate", "--image", A, "--image", B, "--steps", "2", "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
