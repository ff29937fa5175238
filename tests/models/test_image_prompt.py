"""Image prompts as values: batches, saving and loading, and arguments that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from imprompt.errors import ImageError, UserError
from imprompt.models.image_prompt import load
from imprompt.models.tensor_files import read_tensors

CAT, FISH = "examples/cat.png", "examples/fish.png"


@pytest.fixture(scope="module")
def ip():
    return load("mini")


def test_a_batch_has_the_references_of_each_prompt(ip):
    batch = ip.encode_batch([[CAT, FISH], [FISH, CAT]], scale=0.5)
    assert batch.scale == 0.5 and batch.image_features.shape[:2] == (2, 2)
    torch.testing.assert_close(batch.image_features[1:], ip([FISH, CAT]).image_features)
    for n, pair in batch.key_values()[1].items():
        torch.testing.assert_close(pair.key[:1], ip([CAT, FISH]).key_values()[1][n].key)


def test_a_batch_needs_as_many_references_for_every_prompt(ip):
    with pytest.raises(UserError, match="every prompt must have the same number of references, received 1, 2"):
        ip.encode_batch([CAT, [CAT, FISH]])


def test_a_saved_prompt_is_loaded_without_its_images(ip, tmp_path):
    prompt = ip(
        [CAT, FISH], scale={"up_blocks": 0.5}, mask=torch.eye(4, 8), start_at=0.25, end_at=0.75, reference_weights=[2, 1],
        aggregation="average", negative_image=FISH,
    )  # fmt: skip
    prompt.save(tmp_path / "prompt.safetensors")
    loaded = ip.load_prompt(tmp_path / "prompt.safetensors")
    assert (loaded.scale, loaded.start_at, loaded.end_at) == ({"up_blocks": 0.5}, 0.25, 0.75)
    assert loaded.aggregator.name == "average"
    for name in ("image_features", "uncond_features", "mask", "reference_weights"):
        assert torch.equal(getattr(loaded, name), getattr(prompt, name)), name
    with pytest.raises(UserError, match="another adapter"):
        load("mini-plus").load_prompt(tmp_path / "prompt.safetensors")


def nan(shape):
    return torch.full(shape, float("nan"))


ALTERED_TENSORS = {
    "features of no dimension": {"image_features": torch.zeros(())},
    "no features": {"image_features": torch.zeros(0)},
    "features of three dimensions": {"image_features": torch.ones(1, 2, 128)},
    "no references": {"image_features": torch.zeros(1, 0, 1, 128)},
    "wider features": {"image_features": torch.ones(1, 2, 1, 129), "uncond_features": torch.ones(1, 1, 1, 129)},
    "many patches": {"image_features": torch.ones(1, 2, 5, 128), "uncond_features": torch.ones(1, 1, 5, 128)},
    "features of integers": {"image_features": torch.ones(1, 2, 1, 128, dtype=torch.int8)},
    "NaN": {"image_features": nan((1, 2, 1, 128))},
    "no unconditional features": {"uncond_features": torch.zeros(0)},
    "transposed unconditional features": {"uncond_features": torch.ones(128, 1, 1, 1)},
    "infinity": {"uncond_features": torch.full((1, 1, 1, 128), float("inf"))},
    "more weights": {"reference_weights": torch.ones(3)},
    "negative weights": {"reference_weights": torch.tensor([1.0, -1.0])},
    "weights of zero": {"reference_weights": torch.zeros(2)},
    "NaN as weight": {"reference_weights": torch.tensor([1.0, float("nan")])},
    "bytes as weights": {"reference_weights": torch.ones(2, dtype=torch.uint8)},
    "no mask": {"mask": torch.zeros(0)},
    "a mask of four dimensions": {"mask": torch.ones(1, 1, 4, 4)},
    "a mask beyond 1": {"mask": torch.full((4, 4), 255.0)},
    "NaN in the mask": {"mask": nan((4, 4))},
}
ALTERED_SETTINGS = {
    **{f"scale {value!r:.9}": {"scale": value} for value in ("x", None, True, [[[1]]], {"a": "b"}, {"a": [1]}, float("nan"), 10**400)},
    **{f"start {value!r:.9}": {"start_at": value} for value in ("mini", None, [], -1, float("nan"), 2, 10**400)},
    **{f"end {value!r:.9}": {"end_at": value} for value in ("x", {}, 7, float("-inf"))},
    **{f"aggregation {value!r}": {"aggregation": value} for value in ("magic", ["average"], {"a": 1}, 3, "attention")},
    **{f"adapter {value!r:.9}": {"adapter": value} for value in (None, [], {}, ["x"] * 4, [10**400] * 4, [float("nan")] * 4)},
}


@pytest.fixture(scope="module")
def saved_prompt(ip, tmp_path_factory):
    """The tensors and the settings of a saved prompt with everything in it."""
    path = tmp_path_factory.mktemp("saved") / "prompt.safetensors"
    ip([CAT, FISH], mask=torch.eye(4, 8), reference_weights=[2, 1]).save(path)
    return read_tensors(path)


def write_saved_prompt(path, saved_prompt, tensors=(), settings=()):
    written_tensors, metadata = saved_prompt
    text = json.dumps({"prompt": metadata["prompt"] | dict(settings)})
    save_file(written_tensors | dict(tensors), path, {"imprompt": text})


def test_a_saved_prompt_that_is_only_written_again_is_loaded(ip, saved_prompt, tmp_path):
    write_saved_prompt(tmp_path / "prompt.safetensors", saved_prompt)
    ip.load_prompt(tmp_path / "prompt.safetensors").key_values()


@pytest.mark.parametrize("change", ALTERED_TENSORS)
def test_a_saved_prompt_with_other_tensors_is_refused(change, ip, saved_prompt, tmp_path):
    write_saved_prompt(tmp_path / "prompt.safetensors", saved_prompt, tensors=ALTERED_TENSORS[change])
    with pytest.raises(UserError, match=r"^prompt\.safetensors is no image prompt as .*; encode the images again$"):
        ip.load_prompt(tmp_path / "prompt.safetensors")


@pytest.mark.parametrize("change", ALTERED_SETTINGS)
def test_a_saved_prompt_with_other_settings_is_refused(change, ip, saved_prompt, tmp_path):
    write_saved_prompt(tmp_path / "prompt.safetensors", saved_prompt, settings=ALTERED_SETTINGS[change])
    with pytest.raises(UserError, match=r"^prompt\.safetensors "):
        ip.load_prompt(tmp_path / "prompt.safetensors")


def test_arguments_that_do_not_fit_are_refused(ip):
    prompt = ip(CAT)
    assert prompt.with_scale(0.3).scale == 0.3 and prompt.scale == 1.0
    with pytest.raises(UserError, match="expected 0 ≤ start_at ≤ end_at ≤ 1"):
        replace(prompt, start_at=0.5, end_at=0.2)
    with pytest.raises(ImageError, match="needs at least one image"):
        ip([])
    with pytest.raises(UserError, match="expected an adapter of the FaceID family"):
        ip(CAT, face_embeds=torch.zeros(512))
    with pytest.raises(UserError, match=r"expected a mask of shape \(height, width\)"):
        ip(CAT, mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(UserError, match="expected a mask of numbers in 0 … 1"):
        ip(CAT, mask=torch.full((4, 4), 255.0))


def test_keys_and_values_that_are_not_finite_are_refused(ip):
    """Finite weights may be too large, above all for float16: the image would be black."""
    prompt = ip(CAT)
    too_large = replace(prompt, image_features=prompt.image_features * 1e30)
    with pytest.raises(UserError, match=r"keys and values of the image prompt are not finite.*float32"):
        too_large.key_values()


@pytest.mark.parametrize("aggregation", [None, "average"])
def test_features_in_float8_are_converted(ip, aggregation):
    prompt = ip([CAT, FISH], aggregation=aggregation)
    small = replace(prompt, image_features=prompt.image_features.to(torch.float8_e4m3fn))
    for pair, expected in zip(small.key_values()[1].values(), prompt.key_values()[1].values(), strict=True):
        torch.testing.assert_close(pair.key, expected.key, atol=0.2, rtol=0.2)
