"""From a record to an example: pictures opened, brought to size, cropped, flipped; references augmented."""

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
from imprompt.utils.images import Picture, fit, open_image

Pixels = Callable[[Sequence[Image.Image]], Tensor]  # an image encoder's own preparation


@dataclass(frozen=True)
class Framing:
    """How pictures are brought to the model's size."""

    size: int = 512  # of the shorter side; with buckets the side of a square of the same area
    crop: str = "centre"  # or random
    flip: bool = False
    buckets: bool = False  # several shapes of about the same area; a batch has one
    multiple: int = 64  # the sides of buckets are multiples of this
    own_crop: bool = False  # references are cropped on their own, not as the target is
    augment: float = 0.0  # strength of the references' augmentation, 0 … 1
    references: int = 1
    fewest: int = 1  # of the references that are different ones; the others repeat them
    least: int = 0  # pictures with a shorter side than this are too small
    caption: str = ""  # of pictures that have none


class Example(NamedTuple):
    """What a training step needs of one record."""

    pixels: Tensor  # (3, height, width), uint8
    references: Tensor  # (references, 3, side, side), as the image encoder takes them
    text: str
    mask: Tensor | None  # (height, width), uint8: white where the loss counts
    sizes: tuple[int, int, int, int]  # original height and width, top and left of the crop: SDXL is told these
    seed: int
    key: str
    subject: str | None = None
    counts: float = 1.0  # how much its loss counts

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape)

    @property
    def side(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[1], self.pixels.shape[2]


def example(record: Record, seed: int, framing: Framing, prepare: Pixels) -> Example:
    """Open and frame a record. All chance follows from `seed`. Raises ImageError for a picture that cannot be used."""
    rng = random.Random(seed)
    whole = open_image(record.target)
    if min(whole.size) < framing.least:
        raise ImageError(f"{record.key} is {whole.width} × {whole.height} pixels; expected a shorter side of at least {framing.least}")
    cut = Cut.choose(whole.size, framing, rng)
    target = cut.apply(whole)
    if record.references:
        references = _opened(record.references, framing, rng)
    else:
        references = [whole if framing.own_crop else target] * framing.references
    squares = [fit(augmented(r, framing.augment, rng) if framing.augment else r) for r in references]
    mask = None
    if record.mask is not None:
        mask = torch.from_numpy(np.array(cut.apply(open_image(record.mask).convert("L").resize(whole.size, Image.Resampling.NEAREST))))
    pixels = torch.from_numpy(np.array(target)).permute(2, 0, 1).contiguous()
    sizes = (whole.height, whole.width, cut.top, cut.left)
    text = record.text or framing.caption
    return Example(pixels, prepare(squares), text, mask, sizes, seed, record.key, record.subject, record.loss_weight)


def _opened(references: Sequence[Picture], framing: Framing, rng: random.Random) -> list[Image.Image]:
    """References in random order, repeated where there are too few. One that is damaged is left out where there are others."""
    found: list[Image.Image] = []
    damaged: ImageError | None = None
    count, order = spread(len(references), framing.references, framing.fewest, rng)
    for i in order:
        try:
            found.append(open_image(references[i]))
        except ImageError as error:
            damaged = error
        if len(found) == count:
            break
    if not found and damaged:
        raise damaged
    return found + [rng.choice(found) for _ in range(framing.references - len(found))]


def spread(there: int, references: int, fewest: int, rng: random.Random) -> tuple[int, list[int]]:
    """How many different ones to take, at least `fewest`, and all that are there in the order in which to take them."""
    count = rng.randint(min(fewest, references), references) if fewest < references else references
    return min(count, there), rng.sample(range(there), there)


class Cut(NamedTuple):
    """A resize, a crop and a flip: the same for a picture and for its mask."""

    scaled: tuple[int, int]  # width, height
    left: int
    top: int
    width: int
    height: int
    mirrored: bool

    @classmethod
    def choose(cls, size: tuple[int, int], framing: Framing, rng: random.Random) -> "Cut":
        width, height = bucket(size, framing.size, framing.multiple) if framing.buckets else (framing.size, framing.size)
        ratio = max(width / size[0], height / size[1])
        scaled = (max(width, round(size[0] * ratio)), max(height, round(size[1] * ratio)))
        free = (scaled[0] - width, scaled[1] - height)
        left, top = (rng.randint(0, n) for n in free) if framing.crop == "random" else (n // 2 for n in free)
        return cls(scaled, left, top, width, height, framing.flip and rng.random() < 0.5)

    def apply(self, image: Image.Image) -> Image.Image:
        method = Image.Resampling.LANCZOS if self.scaled[0] < image.width else Image.Resampling.BICUBIC
        if image.mode == "L":  # a mask: no ringing
            method = Image.Resampling.BOX
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        cut = image if image.size == self.scaled else image.resize(self.scaled, method)
        cut = cut.crop(box)
        return ImageOps.mirror(cut) if self.mirrored else cut


def bucket(size: tuple[int, int], side: int, multiple: int) -> tuple[int, int]:
    """Of the shapes with about side² pixels and sides in multiples, the one whose aspect is nearest: (width, height)."""
    aspect = math.log(size[0] / size[1])
    return min(_buckets(side, multiple), key=lambda wh: abs(math.log(wh[0] / wh[1]) - aspect))


def _buckets(side: int, multiple: int) -> list[tuple[int, int]]:
    most = side * side
    widths = range(max(multiple, side // 2 // multiple * multiple), 2 * side + 1, multiple)
    return [(w, max(multiple, round(most / w / multiple) * multiple)) for w in widths]


def augmented(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """A reference seen a little differently, so that the adapter learns the subject and not the pixels."""
    keep = 1 - 0.35 * strength * rng.random()
    width, height = round(image.width * keep), round(image.height * keep)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.rotate(10 * strength * rng.uniform(-1, 1), Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(1 + 0.3 * strength * rng.uniform(-1, 1))
    return image


class Batch(NamedTuple):
    """Examples of one shape, stacked."""

    pixels: Tensor  # (batch, 3, height, width), uint8
    references: Tensor  # (batch, references, 3, side, side)
    texts: list[str]
    mask: Tensor | None  # (batch, 1, height, width), uint8
    sizes: Tensor  # (batch, 6): original height and width, top, left, height, width
    seeds: list[int]
    counts: Tensor  # (batch,): how much each one's loss counts


def stack(examples: Sequence[Example]) -> Batch:
    """One batch. A missing mask counts everywhere."""
    masks = None
    if any(e.mask is not None for e in examples):
        full = torch.full(examples[0].shape[1:], 255, dtype=torch.uint8)
        masks = torch.stack([full if e.mask is None else e.mask for e in examples])[:, None]
    return Batch(
        torch.stack([e.pixels for e in examples]),
        torch.stack([e.references for e in examples]),
        [e.text for e in examples],
        masks,
        torch.tensor([(*e.sizes, *e.shape[1:]) for e in examples]),
        [e.seed for e in examples],
        torch.tensor([e.counts for e in examples]),
    )
