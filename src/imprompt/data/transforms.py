"""From a record to a training example: images opened, resized, cropped and flipped; references augmented."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from imprompt.data.records import Record
from imprompt.errors import ImageError
from imprompt.utils.images import ImageInput, open_image, open_mask, resize_to_square

_MAX_RESIZED_PIXELS = 2**25  # of a whole image before it is cropped

Preprocess = Callable[[Sequence[Image.Image]], Tensor]  # images → pixel values of an image encoder


@dataclass(frozen=True)
class TransformConfig:
    """How images are brought to the resolution of the model, and which references they get."""

    resolution: int = 512  # side of a square in pixels; with buckets, of the square of the same area
    center_crop: bool = True
    random_flip: bool = False
    aspect_ratio_bucketing: bool = False  # several shapes of about the same area, one per batch
    size_multiple: int = 64  # the sides of buckets are multiples of this
    independent_reference_crop: bool = False  # references are cropped independently of the target
    reference_augmentation: float = 0.0  # strength, 0 … 1
    num_references: int = 1
    min_distinct_references: int = 1  # at least so many references are different images; the others repeat them
    min_image_size: int = 0  # images with a shorter side in pixels are refused
    default_caption: str = ""  # caption of images that have none


class Example(NamedTuple):
    """What a training step needs of one record."""

    pixel_values: Tensor  # (3, height, width), uint8
    reference_pixel_values: Tensor  # (references, 3, side, side), preprocessed for the image encoder
    caption: str
    mask: Tensor | None  # (height, width), uint8, white where the loss counts
    time_ids: tuple[int, int, int, int, int, int]  # SDXL: original height and width, crop top and left, target height and width
    seed: int
    key: str
    subject: str | None = None
    loss_weight: float = 1.0
    caption_source: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Examples of one batch have the same shape, (3, height, width)."""
        return tuple(self.pixel_values.shape)


def load_example(record: Record, seed: int, config: TransformConfig, preprocess: Preprocess) -> Example:
    """Open and transform a record; everything random follows from `seed`. Raises ImageError for an unusable image."""
    rng = random.Random(seed)
    original = open_image(record.target)
    if min(original.size) < config.min_image_size:
        size = f"{original.width} × {original.height}"
        raise ImageError(f"{record.key} is {size} pixels; expected a shorter side of at least {config.min_image_size}")
    crop = CropParams.sample(original.size, config, rng)
    target = crop.apply(original)
    if record.references:
        references = _open_references(record.references, config, rng)
    else:
        references = [original if config.independent_reference_crop else target] * config.num_references
    strength = config.reference_augmentation
    squares = [resize_to_square(augment_image(image, strength, rng) if strength else image) for image in references]
    mask = None
    if record.mask is not None:
        mask = torch.from_numpy(np.array(crop.apply(_open_loss_mask(record, original.size))))
    pixel_values = torch.from_numpy(np.array(target)).permute(2, 0, 1).contiguous()
    time_ids = (original.height, original.width, crop.top, crop.left, crop.height, crop.width)
    caption = record.caption or config.default_caption
    return Example(
        pixel_values, preprocess(squares), caption, mask, time_ids, seed, record.key, record.subject, record.loss_weight,
        record.caption_source,
    )  # fmt: skip


def _open_loss_mask(record: Record, size: tuple[int, int]) -> Image.Image:
    """The mask of a record, L, stretched to its image. Raises ImageError where it is black everywhere: the loss would count nowhere."""
    assert record.mask is not None
    mask = open_mask(record.mask, "a mask")
    if not mask.getbbox():
        raise ImageError(f"the mask of {record.key} is black everywhere; expected white where the loss counts")
    return mask.resize(size, Image.Resampling.NEAREST)


def _open_references(references: Sequence[ImageInput], config: TransformConfig, rng: random.Random) -> list[Image.Image]:
    """References in random order, repeated where there are too few. Damaged ones are skipped as long as another can be opened."""
    images: list[Image.Image] = []
    failure: ImageError | None = None
    count, order = sample_reference_order(len(references), config.num_references, config.min_distinct_references, rng)
    for i in order:
        try:
            images.append(open_image(references[i]))
        except ImageError as error:
            failure = error
        if len(images) == count:
            break
    if not images and failure:
        raise failure
    return images + [rng.choice(images) for _ in range(config.num_references - len(images))]


def sample_reference_order(available: int, num_references: int, min_distinct: int, rng: random.Random) -> tuple[int, list[int]]:
    """How many distinct references to use, at least `min_distinct` where so many are available, and all indices in random order."""
    count = rng.randint(min(min_distinct, num_references), num_references) if min_distinct < num_references else num_references
    return min(count, available), rng.sample(range(available), available)


class CropParams(NamedTuple):
    """A resize, a crop and a horizontal flip that apply to an image and to its mask. All sizes in pixels."""

    resized: tuple[int, int]  # width, height
    left: int
    top: int
    width: int
    height: int
    flip: bool

    @classmethod
    def sample(cls, size: tuple[int, int], config: TransformConfig, rng: random.Random) -> "CropParams":
        """The parameters for an image of this size (width, height)."""
        width = height = config.resolution
        if config.aspect_ratio_bucketing:
            width, height = select_bucket(size, config.resolution, config.size_multiple)
        ratio = max(width / size[0], height / size[1])
        resized = (max(width, round(size[0] * ratio)), max(height, round(size[1] * ratio)))
        slack = (resized[0] - width, resized[1] - height)
        left, top = (n // 2 if config.center_crop else rng.randint(0, n) for n in slack)
        return cls(resized, left, top, width, height, config.random_flip and rng.random() < 0.5)

    def apply(self, image: Image.Image) -> Image.Image:
        """The resized, cropped and flipped image."""
        method = Image.Resampling.LANCZOS if self.resized[0] < image.width else Image.Resampling.BICUBIC
        if image.mode == "L":  # masks: no ringing
            method = Image.Resampling.BOX
        crop = self._resize(image, method)
        return ImageOps.mirror(crop) if self.flip else crop

    def _resize(self, image: Image.Image, method: Image.Resampling) -> Image.Image:
        """The resized and cropped image. Of one that would become too large, such as a narrow strip, the crop alone is resized."""
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        if math.prod(self.resized) > _MAX_RESIZED_PIXELS:
            x, y = image.width / self.resized[0], image.height / self.resized[1]
            return image.resize((self.width, self.height), method, (box[0] * x, box[1] * y, box[2] * x, box[3] * y))
        return (image if image.size == self.resized else image.resize(self.resized, method)).crop(box)


def select_bucket(size: tuple[int, int], side: int, multiple: int) -> tuple[int, int]:
    """The bucket (width, height) with the nearest aspect ratio; buckets have about side² pixels and sides that are multiples."""
    log_ratio = math.log(size[0] / size[1])
    return min(_list_buckets(side, multiple), key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - log_ratio))


def _list_buckets(side: int, multiple: int) -> list[tuple[int, int]]:
    widths = range(max(multiple, side // 2 // multiple * multiple), 2 * side + 1, multiple)
    return [(width, max(multiple, round(side * side / width / multiple) * multiple)) for width in widths]


def augment_image(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """A reference with random crop, flip, rotation and color jitter of this strength in 0 … 1, against memorization of its pixels."""
    scale = 1 - 0.35 * strength * rng.random()
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.rotate(10 * strength * rng.uniform(-1, 1), Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(1 + 0.3 * strength * rng.uniform(-1, 1))
    return image


class Batch(NamedTuple):
    """Examples of one shape, stacked."""

    pixel_values: Tensor  # (batch, 3, height, width), uint8
    reference_pixel_values: Tensor  # (batch, references, 3, side, side)
    captions: list[str]
    mask: Tensor | None  # (batch, 1, height, width), uint8
    time_ids: Tensor  # (batch, 6)
    seeds: list[int]
    loss_weights: Tensor  # (batch,)


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples. Where only some have a mask, the mask of the others is white everywhere."""
    masks = None
    if any(e.mask is not None for e in examples):
        white = torch.full(examples[0].shape[1:], 255, dtype=torch.uint8)
        masks = torch.stack([white if e.mask is None else e.mask for e in examples])[:, None]
    return Batch(
        torch.stack([e.pixel_values for e in examples]),
        torch.stack([e.reference_pixel_values for e in examples]),
        [e.caption for e in examples],
        masks,
        torch.tensor([e.time_ids for e in examples]),
        [e.seed for e in examples],
        torch.tensor([e.loss_weight for e in examples]),
    )
