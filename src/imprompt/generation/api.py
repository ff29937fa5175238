"""`imprompt.generate`: images from plain values, with what is loaded kept for the next call."""

from collections.abc import Sequence
from threading import Lock
from typing import Any

from PIL import Image

from imprompt.config import GenerateConfig
from imprompt.config.common import keyword_signature
from imprompt.utils.images import ImageInput, list_images

_models: Any = None
_lock = Lock()  # pipelines are changed and restored while they sample: one call at a time


def generate(image: ImageInput | Sequence[ImageInput] = (), **options: Any) -> list[Image.Image]:
    """Generate images from a reference image, or from several of one subject.

    `image` is a path, a folder, a pattern such as `cats/*.png`, bytes, a PIL image, an array or a tensor, or a list of them. Masks and
    images to start from may be any single one of these; a control is a string or a tuple of kind, image and scale. The keywords are the
    options of `imprompt generate`; an option left at None takes a value that suits the model. Nothing is written. The base model stays in
    memory for the next call. Raises `imprompt.UserError` for anything that cannot be used.
    """
    from imprompt.generation.generate import LoadedModels, generate_images

    global _models
    config = GenerateConfig.from_options(**options, image=tuple(list_images(image)))
    config.report_unused()
    with _lock:
        _models = _models or LoadedModels.empty()
        return [generated.image for generated in generate_images(config, _models)]


generate.__signature__ = keyword_signature(generate, GenerateConfig, "image")  # type: ignore[attr-defined]
