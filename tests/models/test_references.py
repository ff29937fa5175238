"""Several references through the public API and the command line: weights, aggregation, and errors."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import imprompt
from imprompt.cli import main
from imprompt.config import TRAINING_FREE_AGGREGATIONS
from imprompt.core.aggregation import AGGREGATORS
from imprompt.core.attention import multi_head_attention
from imprompt.data.readers import MiniWorld
from imprompt.models.base_pipelines import load_pipeline

A, B = "examples/cat.png", "examples/fish.png"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("mini")


def sample_latents(pipe, prompt):
    with imprompt.attach(pipe, prompt):
        return pipe([""], num_inference_steps=3, generator=[torch.Generator().manual_seed(0)], output_type="latent").images


@pytest.mark.parametrize("adapter", ["mini", "mini-plus"])
@pytest.mark.parametrize("aggregation", [None, "average", "max", "average-tokens", "max-tokens", "joint"])
def test_a_weight_of_two_is_the_reference_given_twice(pipe, adapter, aggregation):
    if (adapter, aggregation) == ("mini", "joint"):
        pytest.skip("no resampler")
    ip = imprompt.load(adapter)
    weighted, twice = ip([A, B], reference_weights=[2, 1], aggregation=aggregation), ip([A, A, B], aggregation=aggregation)
    torch.testing.assert_close(sample_latents(pipe, weighted), sample_latents(pipe, twice), rtol=1e-3, atol=1e-4)
    without_second = ip([A, B], reference_weights=[1, 0], aggregation=aggregation)
    torch.testing.assert_close(sample_latents(pipe, without_second), sample_latents(pipe, ip(A)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("aggregation", [None, *TRAINING_FREE_AGGREGATIONS])
def test_the_order_of_references_does_not_matter_and_the_aggregation_does(pipe, aggregation):
    ip = imprompt.load("mini-plus" if aggregation == "joint" else "mini")
    latents, reversed_latents = (sample_latents(pipe, ip(images, aggregation=aggregation)) for images in ([A, B], [B, A]))
    torch.testing.assert_close(latents, reversed_latents, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents, sample_latents(pipe, ip(A)), atol=1e-2)
    if aggregation not in (None, "concat"):
        assert not torch.allclose(latents, sample_latents(pipe, ip([A, B])), atol=1e-2)


@pytest.fixture(scope="module")
def subject_images():
    records = MiniWorld(64, held_out=True, images_per_subject=64)
    return [records[i].target for i in range(64)]


ADAPTERS_AND_AGGREGATIONS = (
    [("mini", name) for name in TRAINING_FREE_AGGREGATIONS if name != "joint"]
    + [("mini-plus", name) for name in TRAINING_FREE_AGGREGATIONS]
    + [("mini-subject", None)]
)


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 9, 64])
@pytest.mark.parametrize(("adapter", "aggregation"), ADAPTERS_AND_AGGREGATIONS)
def test_attention_to_the_references_is_the_same_in_any_order_to_1e_5(subject_images, adapter, aggregation, count):
    prompt = imprompt.load(adapter)(subject_images[:count], aggregation=aggregation)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    shuffled = replace(prompt, image_features=prompt.image_features[:, order])
    for (n, key_values), shuffled_key_values in zip(prompt.key_values()[1].items(), shuffled.key_values()[1].values(), strict=True):
        query = torch.randn(1, 16, key_values.key.shape[2], generator=torch.Generator().manual_seed(n))
        output, shuffled_output = (multi_head_attention(query, *pair, num_heads=4) for pair in (key_values, shuffled_key_values))
        assert (output - shuffled_output).abs().max() <= 1e-5, f"layer {n}"


@pytest.mark.parametrize("trained_aggregation", ["attention", "self-attention"])
def test_concatenation_does_not_depend_on_the_trained_aggregator(trained_aggregation):
    plain, trained = imprompt.load("mini"), imprompt.load("mini")
    torch.manual_seed(0)
    trained.adapter.aggregator = AGGREGATORS[trained_aggregation](128, 128).requires_grad_(False)
    for expected, received in zip(plain([A, B]).key_values(), trained([A, B], aggregation="concat").key_values(), strict=True):
        for n, pair in expected.items():
            torch.testing.assert_close(received[n].key, pair.key)


def test_references_of_weight_zero_are_left_out_before_nine_are_selected():
    ip = imprompt.load("mini")
    torch.manual_seed(0)
    ip.adapter.aggregator = AGGREGATORS["self-attention"](128, 128).requires_grad_(False)
    images = [Image.new("RGB", (64, 64), (20 * i, 80, 200)) for i in range(11)]
    weighted, last_nine = ip(images, reference_weights=[0, 0, *[1] * 9]).key_values()[1], ip(images[2:]).key_values()[1]
    for n, pair in last_nine.items():
        torch.testing.assert_close(weighted[n].key, pair.key)


def test_sixty_four_references(pipe):
    ip = imprompt.load("mini")
    images = [Image.new("RGB", (64, 64), (4 * i % 256, 80, 200)) for i in range(64)]
    for aggregation in (None, "average"):
        assert sample_latents(pipe, ip(images, aggregation=aggregation)).isfinite().all()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--image-weights", "1", "weights: expected one for each of the 2 references, received 1"),
        ("--image-weights", "0,0", "weights: expected numbers of at least 0, and one above it"),
        ("--image-weights", "-1,2", "weights: expected numbers of at least 0"),
        ("--image-weights", "nan,2", "weights: expected numbers of at least 0"),
        ("--image-weights", "a,b", "weights: expected numbers separated by commas"),
        ("--aggregation", "joint", "aggregation: joint passes the patches of all references to a resampler"),
        ("--aggregation", "wild", "aggregation: expected one of auto, concat"),
    ],
)
def test_wrong_weights_and_aggregations_are_refused(tmp_path, capsys, option, value, message):
    arguments = ["generate", "--image", A, "--image", B, "--steps", "2", "--output-dir", str(tmp_path / "out"), f"{option}={value}"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
