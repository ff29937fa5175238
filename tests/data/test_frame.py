"""Framing: sizes, crops, flips, masks and references, all from the seed."""

import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.data.records import Record
from imprompt.data.transforms import Framing, bucket, example, stack
from imprompt.errors import ImageError


def gradient(width, height):
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], 2).astype(np.uint8))


def plain(images):
    return torch.stack([torch.from_numpy(np.array(i.resize((16, 16)))).permute(2, 0, 1).float() for i in images])


def frame(record, seed=0, **choices):
    return example(record, seed, Framing(**{"size": 32, "multiple": 8, **choices}), plain)


def test_shortest_side_and_centre_crop():
    found = frame(Record("a", gradient(128, 64)))
    assert found.pixels.shape == (3, 32, 32) and found.pixels.dtype == torch.uint8
    assert found.sizes == (64, 128, 0, 16)  # original height, width; top, left of the crop
    red = found.pixels[0].float()
    assert abs(red.mean() - 127.5) < 2 and red[:, 0].mean() == pytest.approx(64, abs=4) and red[:, -1].mean() == pytest.approx(191, abs=4)


def test_small_pictures_are_enlarged_or_refused():
    assert frame(Record("a", gradient(9, 11))).pixels.shape == (3, 32, 32)
    with pytest.raises(ImageError, match="shorter side of at least 20"):
        frame(Record("a", gradient(9, 11)), least=20)


def test_random_crop_and_flip_follow_the_seed():
    record = Record("a", gradient(128, 64))
    crops = {frame(record, seed, crop="random").sizes[3] for seed in range(20)}
    assert len(crops) > 5 and all(0 <= left <= 32 for left in crops)
    flips = {bool(frame(record, seed, flip=True).pixels[0, 0, 0] > 127) for seed in range(20)}
    assert flips == {True, False}
    a, b = (frame(record, 7, crop="random", flip=True, augment=1.0) for _ in range(2))
    assert torch.equal(a.pixels, b.pixels) and torch.equal(a.references, b.references)


def test_the_target_is_its_own_reference_with_the_same_crop():
    record = Record("a", gradient(128, 64))
    found = frame(record, 3, crop="random", references=2)
    assert found.references.shape == (2, 3, 16, 16)
    small = plain([Image.fromarray(found.pixels.permute(1, 2, 0).numpy())])[0]
    assert torch.equal(found.references[0], small) and torch.equal(found.references[1], small)
    whole = frame(record, 3, own_crop=True).references[0]
    assert not torch.equal(whole, small)


def test_references_of_its_own_are_drawn_and_repeated():
    shades = [Image.new("RGB", (20, 20), (v, 0, 0)) for v in (10, 20, 30)]
    record = Record("a", gradient(40, 40), references=tuple(shades))
    drawn = {int(frame(record, seed).references[0, 0, 0, 0]) for seed in range(20)}
    assert drawn == {10, 20, 30}
    five = frame(record, references=5).references[:, 0, 0, 0].tolist()
    assert len(five) == 5 and set(five[:3]) == {10, 20, 30}


def test_augmentation_changes_the_reference_only():
    record = Record("a", gradient(64, 64))
    as_is, altered = frame(record, 1), frame(record, 1, augment=1.0)
    assert torch.equal(as_is.pixels, altered.pixels)
    assert (as_is.references - altered.references).abs().mean() > 3


def test_the_mask_is_cut_as_the_picture_is():
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (64, 0, 128, 64))  # the right half
    found = frame(Record("a", gradient(128, 64), mask=mask))
    assert found.mask.shape == (32, 32)
    assert found.mask[:, :15].max() == 0 and found.mask[:, 17:].min() == 255


@pytest.mark.parametrize("size", [(100, 100), (300, 100), (100, 300), (1000, 10), (640, 480)])
def test_buckets_keep_area_and_come_near_the_aspect(size):
    width, height = bucket(size, 64, 8)
    assert width % 8 == height % 8 == 0 and 0.7 < width * height / 64**2 < 1.3
    if max(size) / min(size) < 4:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.2)
    assert frame(Record("a", gradient(*size)), size=64, buckets=True).pixels.shape == (3, height, width)


def test_stacking_fills_missing_masks():
    with_mask = frame(Record("a", gradient(40, 40), "one", mask=Image.new("L", (40, 40), 0)))
    without = frame(Record("b", gradient(40, 40), "two"))
    batch = stack([with_mask, without])
    assert batch.pixels.shape == (2, 3, 32, 32) and batch.texts == ["one", "two"] and batch.sizes.shape == (2, 6)
    assert batch.mask[0].max() == 0 and batch.mask[1].min() == 255
    assert stack([without]).mask is None
