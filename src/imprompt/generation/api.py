"""Doors for Python that take plain values."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from imprompt.config import Generate, build
from imprompt.utils.images import Picture


def generate(image: Picture | Sequence[Picture] = (), **choices: Any) -> list[Image.Image]:
    """Draw pictures after a reference picture, or after several of one subject.

    `image` is a path or a PIL image, or a list of them. The further keywords are the fields of `config.Generate`, the
    same as the flags of `imprompt generate`: prompt, scale, adapter, base, steps, guidance, seed, count, size …
    Nothing is written. Raises `imprompt.UserError` for anything that cannot be used.
    """
    from imprompt.generation.generate import draw

    images = (image,) if not isinstance(image, (list, tuple)) else tuple(image)
    return [drawn.image for drawn in draw(build(Generate, {**choices, "image": images}))]
