"""Masks and control images of another shape than the output: what happens to them is reported."""

import numpy as np
import pytest
from PIL import Image

import imprompt
from imprompt.errors import Notice
from imprompt.generation.tasks import fit_mask

IMAGE = Image.linear_gradient("L").convert("RGB").resize((96, 48))
QUICK = {"num_inference_steps": 1, "num_images": 1}


def top_third(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width, height // 3))
    return mask


def test_a_mask_of_another_shape_is_stretched_to_its_image():
    with pytest.warns(Notice, match="is 48 × 48, the image 96 × 48: it is stretched"):
        stretched = fit_mask(top_third(48, 48), IMAGE)
    assert np.array_equal(np.asarray(stretched) > 127, np.asarray(top_third(96, 48)) > 127)
    assert fit_mask(top_third(48, 24), IMAGE).size == (48, 24)


def test_the_output_has_the_aspect_ratio_of_a_control_image():
    edges = Image.new("RGBA", (128, 64), (0, 0, 0, 0))
    edges.paste((255, 255, 255, 255), (30, 10, 34, 50))
    with pytest.warns(Notice, match="control edges: the image is 128 × 64"):
        wide, square = (imprompt.generate(IMAGE, control=[("edges", edges, 0.8)], resolution=size, **QUICK)[0] for size in (None, 64))
    assert wide.width > 1.5 * wide.height and square.size == (64, 64)


def test_arrays_and_tensors_are_references_and_masks():
    import torch

    pixels, half = np.asarray(IMAGE.resize((64, 64))), np.arange(64)[None].repeat(64, 0) < 32
    options = {"inpaint_image": IMAGE.resize((64, 64)), **QUICK}
    expected = imprompt.generate(IMAGE.resize((64, 64)), mask_image=Image.fromarray(half), **options)[0]
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    assert np.array_equal(imprompt.generate(tensor, mask_image=half, **options)[0], expected)
    assert np.array_equal(imprompt.generate([pixels], mask_image=torch.from_numpy(half), **options)[0], expected)
