"""Image prompts as values: batches, saving and loading, and arguments that are refused."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from imprompt.errors import ImageError, UserError
from imprompt.models.image_prompt import load

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
        [CAT, FISH], scale={"up_blocks": 0.5}, mask=Image.new("L", (8, 4), 255), start_at=0.25, end_at=0.75, reference_weights=[2, 1],
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
        ip(CAT, mask=torch.ones(1, 4, 4))
