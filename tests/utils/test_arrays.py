"""Arrays of numpy and torch are images, whatever their axes, data type and usual range."""

import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.errors import ImageError
from imprompt.utils.images import list_images, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS, PIXELS[None], PIXELS.transpose(2, 0, 1), PIXELS / 255, (PIXELS / 255).astype(np.float16), PIXELS.astype(np.float32),
        PIXELS / 127.5 - 1, PIXELS.astype(np.int64), PIXELS.astype(np.uint16) * 257, CHW, CHW[None], CHW / 255, CHW / 127.5 - 1,
        (CHW / 255).requires_grad_(), torch.from_numpy(PIXELS),
        np.dstack([PIXELS, np.full((6, 9), 255, np.uint8)]),
    ],
)  # fmt: skip
def test_arrays_are_images(array):
    opened = np.asarray(open_image(array)).astype(int)
    assert opened.shape == PIXELS.shape and np.abs(opened - PIXELS).max() <= 1


def test_gray_and_transparent_arrays():
    assert np.array_equal(open_image(PIXELS[..., 0]), np.repeat(PIXELS[..., :1], 3, 2))
    assert open_image(np.zeros((4, 4, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(np.ones((4, 4), bool)).getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.asarray(open_image((CHW / 255).bfloat16())).astype(int) - PIXELS).max() <= 2


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 6, 9, 3), np.uint8), "give several images as a list"),
        (np.zeros(5), "shape"), (np.zeros((6, 9, 7)), "shape"),
        (np.zeros((0, 9, 3)), "shape"), (torch.randn(3, 64, 64) * 2, "expected 0 … 1, -1 … 1 or 0 … 255"),
        (np.full((4, 4), np.nan), "values"),
        (np.full((4, 4), 1 + 1j), "complex128"), (np.array([["a", "b"]]), "an array of <U1"), (np.full((4, 4), 300.0), "values from 300"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused_in_one_sentence(array, words):
    with pytest.raises(ImageError, match=words):
        open_image(array)


def test_a_batch_is_several_images():
    assert len(list_images(np.zeros((2, 6, 9, 3)))) == len(list_images(torch.zeros(2, 3, 6, 9))) == len(list_images([PIXELS, CHW])) == 2
    assert list_images("a.png") == ["a.png"] and len(list_images(Image.new("L", (2, 2)))) == 1
