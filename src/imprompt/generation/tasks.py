"""What is drawn besides the image prompts: a picture to begin with or to draw into, structure, LoRA."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from imprompt.config import Generate, weighed
from imprompt.errors import UserError, brief
from imprompt.generation.controls import Control, condition, load_control
from imprompt.models.base_pipelines import check_size, for_task, grain, own_size
from imprompt.utils.images import open_image


@dataclass(frozen=True)
class Scene:
    """A pipeline for the task, and what it is given at each call."""

    pipe: Any
    size: tuple[int, int]  # width and height in pixels
    share: float  # of the steps that are taken
    adapters: Sequence[Control]  # those that a pipeline does not run
    given: Callable[[int], dict[str, Any]]  # for so many pictures
    finish: Callable[[Image.Image], Image.Image]


def set_up(choice: Generate, base: Any, device: str, dtype: torch.dtype) -> Scene:
    """Open and check everything that the choice names, and find the pipeline for it. Raises UserError."""
    source = choice.init or choice.inpaint
    begun = open_image(source) if source else None
    size = choice.pixels() or (like(begun, base) if begun else (own_size(base),) * 2)
    check_size(base, *size)
    first = base.unet.config.in_channels
    if first == 9 and not choice.inpaint:
        raise UserError(f"{choice.base} is a model for drawing into pictures; give --inpaint IMAGE and --mask IMAGE")
    if first not in (4, 9):
        raise UserError(f"{choice.base} reads {first} channels; expected a text-to-image model (4) or one for inpainting (9)")
    loaded: dict[str, Any] = {}
    controls = []
    for kind, path, weight in choice.controls():
        if kind not in loaded:
            loaded[kind] = load_control(kind, choice.base, device, dtype)
        controls.append(Control(loaded[kind], open_image(path), weight))
    run = [control for control in controls if control.by_pipeline]
    pipe = for_task(base, bool(choice.init), bool(choice.inpaint), [control.model for control in run])
    picture = ImageOps.fit(begun, size, Image.Resampling.LANCZOS) if begun else None
    mask = ImageOps.fit(open_image(choice.mask).convert("L"), size, Image.Resampling.BILINEAR) if choice.mask else None
    conditions = [condition(control, size) for control in run]

    def given(count: int) -> dict[str, Any]:
        told: dict[str, Any] = {"width": size[0], "height": size[1]}
        if picture:
            told |= {"image": [picture] * count, "strength": choice.strong()}
        if mask:
            told["mask_image"] = [mask] * count
        if run:
            told["control_image" if picture else "image"] = conditions if len(run) > 1 else conditions[0]
            told["controlnet_conditioning_scale"] = [c.weight for c in run] if len(run) > 1 else run[0].weight
        if picture and not mask and not run:
            del told["width"], told["height"]  # the picture has them
        return told

    def finish(drawn: Image.Image) -> Image.Image:
        """Outside the mask the picture stays as it was, to the bit."""
        return Image.composite(drawn, picture, mask) if picture and mask else drawn

    return Scene(pipe, size, choice.strong() if picture else 1.0, [c for c in controls if not c.by_pipeline], given, finish)


def like(picture: Image.Image, base: Any) -> tuple[int, int]:
    """The size to draw a picture at: its proportions, the model's own area."""
    step, least = grain(base)
    shrink = own_size(base) / math.sqrt(picture.width * picture.height)
    width, height = (max(least, round(n * shrink / step) * step) for n in picture.size)
    return width, height


@contextmanager
def with_lora(pipe: Any, words: Sequence[str]) -> Iterator[None]:
    """Within the context the base has these LoRA, each with its scale. Raises UserError where one cannot be read, or does not fit."""
    if not words:
        yield
        return
    names, scales = [], []
    try:
        for number, (source, scale) in enumerate(map(weighed, words)):
            try:
                file = Path(source)
                named = {"weight_name": file.name} if file.is_file() else {}
                pipe.load_lora_weights(file.parent if named else source, adapter_name=f"lora{number}", **named)
            except Exception as error:  # for missing, damaged and other files the libraries raise nearly anything
                remedy = (
                    "install peft with: pip install 'imprompt[lora]'" if "peft" in str(error).lower() else "expected a LoRA of this base"
                )
                raise UserError(f"lora: {source} cannot be loaded ({brief(error)}); {remedy}") from error
            names.append(f"lora{number}")
            scales.append(scale)
        pipe.set_adapters(names, scales)
        yield
    finally:
        if names:
            pipe.unload_lora_weights()
