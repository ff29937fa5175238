"""A mask of any make means what its maker meant, or is refused in one sentence."""

import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.errors import ImageError, Notice
from imprompt.models.image_prompt import load_mask
from imprompt.utils.images import open_mask

LEFT = np.zeros((32, 32), bool)
LEFT[:, :16] = True


def paint(inside, outside, mode: str | None = None) -> Image.Image:
    inside, outside = np.atleast_1d(inside), np.atleast_1d(outside)
    pixels = np.where(LEFT[..., None], inside, outside).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, mode)


def make_label_map() -> Image.Image:
    image = Image.fromarray(LEFT.astype(np.uint8), "L").convert("P")
    image.putdata((LEFT * 1).ravel().tolist())
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    return image


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


def photo_with_hole() -> Image.Image:
    image = photo()
    image.putalpha(Image.fromarray(np.where(LEFT, 0, 255).astype(np.uint8)))
    return image


SILENT = {
    "black and white": paint(255, 0),
    "bits": paint(255, 0).convert("1"),
    "0 and 1": paint(1, 0),
    "16 bits": Image.fromarray((LEFT * 65_535).astype(np.uint16)),
    "8 in 16 bits": Image.fromarray((LEFT * 255).astype(np.uint16)),
    "0 and 1 in 16 bits": Image.fromarray(LEFT.astype(np.uint16)),
    "0 and 1 in 32 bits": Image.fromarray(LEFT.astype(np.int32)),
    "floats": Image.fromarray(LEFT.astype(np.float32)),
    "floats to 255": Image.fromarray((LEFT * 255).astype(np.float32)),
    "white on transparent": paint((255, 255, 255, 255), (0, 0, 0, 0)),
    "white on transparent white": paint((255, 255, 255, 255), (255, 255, 255, 0)),
    "red on transparent": paint((255, 0, 0, 255), (0, 0, 0, 0)),
    "gray with alpha": paint((255, 255), (0, 0)),
    "opaque with alpha": paint((255, 255, 255, 255), (0, 0, 0, 255)),
    "black and white, partly transparent": Image.merge("RGBA", [*[paint(255, 0)] * 3, Image.new("L", (32, 32), 255).rotate(9)]),
    "an array of bool": LEFT,
    "an array of 0 and 1": LEFT.astype(np.int64),
    "an array of floats": LEFT.astype(np.float64),
    "a tensor with a channel": torch.from_numpy(LEFT)[None],
    "a tensor in bfloat16": torch.from_numpy(LEFT).to(torch.bfloat16),
}
REPORTED = {
    "red": (paint((255, 0, 0), (0, 0, 0)), "colored"),
    "label map of one label": (make_label_map(), "colored"),
    "one small label": (paint(3, 0), "holds values up to 3"),
    "black on transparent": (paint((0, 0, 0, 255), (0, 0, 0, 0)), "black on transparent"),
    "a hole in an image": (photo_with_hole(), "where that is transparent"),
}


@pytest.mark.parametrize("name", SILENT)
def test_masks_are_understood(name):
    mask = np.asarray(open_mask(SILENT[name], "m"))[3:-3, 3:-3]
    assert np.array_equal(mask, LEFT[3:-3, 3:-3] * 255)


@pytest.mark.parametrize("name", REPORTED)
def test_how_an_unusual_mask_is_understood_is_reported(name):
    image, words = REPORTED[name]
    with pytest.warns(Notice, match=words):
        assert np.array_equal(open_mask(image, "m"), LEFT * 255)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32) % 6),
        Image.fromarray((np.arange(1024).reshape(32, 32) % 91).astype(np.uint8)[::2, ::2] // 3),
        Image.fromarray(np.where(LEFT, 255, np.arange(1024).reshape(32, 32) % 21).astype(np.uint8)),
        Image.fromarray((np.arange(1024).reshape(32, 32) % 6).astype(np.uint16)),
        paint((255, 0, 0), (0, 0, 255)),
        paint((255, 0, 0), (255, 255, 255)),
        photo(),
    ],
    ids=["labels", "many labels", "labels and 255", "labels of 16 bits", "red and blue", "red on white", "image"],
)
def test_labels_and_several_colors_are_refused(image):
    with pytest.raises(ImageError, match="expected a mask, white where it applies") as error:
        open_mask(image, "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("value", "words"), [(0, "applies nowhere"), (255, "applies everywhere")])
def test_uniform_masks_are_reported(value, words, tmp_path):
    with pytest.warns(Notice, match=words):
        open_mask(Image.new("L", (9, 9), value), "m")
    Image.new("L", (40, 40), min(value, 250)).save(tmp_path / "a.jpg")
    if value == 0:
        with pytest.warns(Notice, match="applies nowhere"):
            open_mask(tmp_path / "a.jpg", "a.jpg")


def test_soft_masks_keep_their_values():
    gradient = Image.linear_gradient("L")
    assert np.array_equal(open_mask(gradient, "m"), gradient)
    with pytest.warns(Notice, match="by 50% there"):
        assert open_mask(paint(128, 0), "m").getextrema() == (0, 128)
    soft = torch.rand(5, 7)
    assert torch.equal(load_mask(soft), soft) and torch.equal(load_mask(soft[None]), soft)


def test_a_jpeg_mask_is_no_label_map(tmp_path):
    paint(255, 0).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=40)
    mask = np.asarray(open_mask(tmp_path / "a.jpg", "m"))
    assert mask[:, :24].min() > 235 and mask[:, 40:].max() < 20


def test_masks_are_upright_and_ignore_color_profiles(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    paint(255, 0).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_mask(tmp_path / "a.png", "m"), LEFT[:, ::-1] * 255)
