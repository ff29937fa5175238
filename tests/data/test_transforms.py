"""Transforms: sizes, crops, flips, masks and references, all of which follow from the seed."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imprompt.data.records import Record
from imprompt.data.transforms import CropParams, TransformConfig, collate, load_example, sample_reference_order, select_bucket
from imprompt.errors import ImageError

SIZES = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
MULTIPLES = st.sampled_from([8, 16, 32, 64])
property_test = settings(max_examples=200, deadline=None, derandomize=True)


def make_gradient(width, height):
    """Red increases to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], 2).astype(np.uint8))


def preprocess(images):
    """Pixel values 0 … 255 of 16 × 16 images."""
    return torch.stack([torch.from_numpy(np.array(i.resize((16, 16)))).permute(2, 0, 1).float() for i in images])


def load(record, seed=0, **options):
    return load_example(record, seed, TransformConfig(**{"resolution": 32, "size_multiple": 8, **options}), preprocess)


def test_the_shorter_side_is_resized_and_the_center_cropped():
    example = load(Record("a", make_gradient(128, 64)))
    assert example.pixel_values.shape == (3, 32, 32) and example.pixel_values.dtype == torch.uint8
    assert example.time_ids == (64, 128, 0, 16, 32, 32)  # original height, width; crop top, left; target height, width
    red = example.pixel_values[0].float()
    assert abs(red.mean() - 127.5) < 2 and red[:, 0].mean() == pytest.approx(64, abs=4) and red[:, -1].mean() == pytest.approx(191, abs=4)


def test_small_images_are_enlarged_or_refused():
    assert load(Record("a", make_gradient(9, 11))).pixel_values.shape == (3, 32, 32)
    with pytest.raises(ImageError, match="shorter side of at least 20"):
        load(Record("a", make_gradient(9, 11)), min_image_size=20)


def test_random_crop_and_flip_follow_from_the_seed():
    record = Record("a", make_gradient(128, 64))
    crops = {load(record, seed, center_crop=False).time_ids[3] for seed in range(20)}
    assert len(crops) > 5 and all(0 <= left <= 32 for left in crops)
    flips = {bool(load(record, seed, random_flip=True).pixel_values[0, 0, 0] > 127) for seed in range(20)}
    assert flips == {True, False}
    a, b = (load(record, 7, center_crop=False, random_flip=True, reference_augmentation=1.0) for _ in range(2))
    assert torch.equal(a.pixel_values, b.pixel_values) and torch.equal(a.reference_pixel_values, b.reference_pixel_values)


def test_the_target_is_its_own_reference_with_the_same_crop():
    record = Record("a", make_gradient(128, 64))
    example = load(record, 3, center_crop=False, num_references=2)
    assert example.reference_pixel_values.shape == (2, 3, 16, 16)
    target = preprocess([Image.fromarray(example.pixel_values.permute(1, 2, 0).numpy())])[0]
    assert torch.equal(example.reference_pixel_values[0], target) and torch.equal(example.reference_pixel_values[1], target)
    independent = load(record, 3, independent_reference_crop=True).reference_pixel_values[0]
    assert not torch.equal(independent, target)


def test_references_are_sampled_and_repeated():
    shades = [Image.new("RGB", (20, 20), (v, 0, 0)) for v in (10, 20, 30)]
    record = Record("a", make_gradient(40, 40), references=tuple(shades))
    sampled = {int(load(record, seed).reference_pixel_values[0, 0, 0, 0]) for seed in range(20)}
    assert sampled == {10, 20, 30}
    five = load(record, num_references=5).reference_pixel_values[:, 0, 0, 0].tolist()
    assert len(five) == 5 and set(five[:3]) == {10, 20, 30}


def test_augmentation_changes_only_the_reference():
    record = Record("a", make_gradient(64, 64))
    plain, augmented = load(record, 1), load(record, 1, reference_augmentation=1.0)
    assert torch.equal(plain.pixel_values, augmented.pixel_values)
    assert (plain.reference_pixel_values - augmented.reference_pixel_values).abs().mean() > 3


def test_the_mask_is_cropped_like_the_image():
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (64, 0, 128, 64))  # the right half
    example = load(Record("a", make_gradient(128, 64), mask=mask))
    assert example.mask.shape == (32, 32)
    assert example.mask[:, :15].max() == 0 and example.mask[:, 17:].min() == 255


@pytest.mark.parametrize("size", [(100, 100), (300, 100), (100, 300), (1000, 10), (640, 480)])
def test_buckets_keep_the_area_and_approximate_the_aspect_ratio(size):
    width, height = select_bucket(size, 64, 8)
    assert width % 8 == height % 8 == 0 and 0.7 < width * height / 64**2 < 1.3
    if max(size) / min(size) < 4:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.2)
    assert load(Record("a", make_gradient(*size)), resolution=64, aspect_ratio_bucketing=True).pixel_values.shape == (3, height, width)


@pytest.mark.filterwarnings("ignore::imprompt.errors.Notice")
def test_a_mask_that_is_black_everywhere_makes_a_record_unusable():
    with pytest.raises(ImageError, match="the mask of a is black everywhere"):
        load(Record("a", make_gradient(40, 40), mask=Image.new("L", (40, 40), 0)))


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (3, 20_000)])
def test_a_narrow_strip_is_cropped_without_being_enlarged_as_a_whole(size):
    example = load(Record("a", Image.new("RGB", size, (255, 0, 0))), resolution=512)
    assert example.pixel_values.shape == (3, 512, 512) and (example.pixel_values[0] == 255).all()
    assert math.prod(CropParams.sample(size, TransformConfig(512), random.Random(0)).resized) > 2**25


def test_cropping_before_and_after_resizing_give_the_same_pixels(monkeypatch):
    image = make_gradient(200, 90)
    after = load(Record("a", image), random_flip=True).pixel_values
    monkeypatch.setattr("imprompt.data.transforms._MAX_RESIZED_PIXELS", 0)
    before = load(Record("a", image), random_flip=True).pixel_values
    assert (after.int() - before.int()).abs().max() <= 6


def test_collating_fills_missing_masks():
    half = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 40, 0)).resize((40, 40), Image.Resampling.NEAREST)
    with_mask = load(Record("a", make_gradient(40, 40), "one", mask=half))
    without = load(Record("b", make_gradient(40, 40), "two"))
    batch = collate([with_mask, without])
    assert batch.pixel_values.shape == (2, 3, 32, 32) and batch.captions == ["one", "two"] and batch.time_ids.shape == (2, 6)
    assert batch.mask[0].float().mean() == pytest.approx(127.5, abs=8) and batch.mask[1].min() == 255
    assert collate([without]).mask is None


@property_test
@given(size=SIZES, multiple=MULTIPLES, side=st.sampled_from([256, 512, 768, 1024]))
def test_every_image_has_a_bucket_of_nearly_the_same_area(size, multiple, side):
    width, height = select_bucket(size, side, multiple)
    assert width % multiple == height % multiple == 0 and side // 2 - multiple < width <= 2 * side
    assert abs(width * height - side**2) <= width * multiple / 2  # the height is rounded to a multiple
    if side / 2 <= side * math.sqrt(size[0] / size[1]) <= 2 * side and multiple <= side // 16:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.2)


@property_test
@given(size=SIZES, multiple=MULTIPLES, seed=st.integers(0, 2**32), options=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_every_crop_lies_inside_the_resized_image(size, multiple, seed, options):
    center_crop, random_flip, aspect_ratio_bucketing = options
    config = TransformConfig(
        256, center_crop=center_crop, random_flip=random_flip, aspect_ratio_bucketing=aspect_ratio_bucketing, size_multiple=multiple
    )
    crop = CropParams.sample(size, config, random.Random(seed))
    assert (crop.width, crop.height) == (select_bucket(size, 256, multiple) if aspect_ratio_bucketing else (256, 256))
    for start, length, resized in ((crop.left, crop.width, crop.resized[0]), (crop.top, crop.height, crop.resized[1])):
        assert 0 <= start <= resized - length
    assert crop.width == crop.resized[0] or crop.height == crop.resized[1]  # only one axis is cropped
    scales = crop.resized[0] / size[0], crop.resized[1] / size[1]
    assert abs(scales[0] - scales[1]) <= 0.5 / size[0] + 0.5 / size[1] + 1e-9  # up to rounding
    if center_crop:
        assert (crop.left, crop.top) == ((crop.resized[0] - crop.width) // 2, (crop.resized[1] - crop.height) // 2)
    assert crop == CropParams.sample(size, config, random.Random(seed)) and (random_flip or not crop.flip)


@settings(property_test, max_examples=50)
@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), seed=st.integers(0, 2**32), bucketing=st.booleans())
def test_time_ids_are_the_original_size_the_crop_and_the_target_size(size, seed, bucketing):
    example = load(Record("a", Image.new("RGB", size)), seed, center_crop=False, aspect_ratio_bucketing=bucketing)
    config = TransformConfig(32, center_crop=False, aspect_ratio_bucketing=bucketing, size_multiple=8)
    crop = CropParams.sample(size, config, random.Random(seed))
    assert example.time_ids == (size[1], size[0], crop.top, crop.left, *example.pixel_values.shape[1:])
    assert torch.equal(collate([example]).time_ids, torch.tensor([example.time_ids]))


@property_test
@given(available=st.integers(0, 20), num_references=st.integers(1, 12), min_distinct=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_references_are_distinct_as_far_as_they_are_available(available, num_references, min_distinct, seed):
    count, order = sample_reference_order(available, num_references, min_distinct, random.Random(seed))
    assert sorted(order) == list(range(available))
    assert min(min_distinct, num_references, available) <= count <= min(num_references, available)
