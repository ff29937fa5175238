"""The workflow of `imprompt generate`: references and text in, pictures out."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from PIL import Image

from imprompt import hub
from imprompt.config import PERSONAL, Generate
from imprompt.errors import UserError
from imprompt.hosts.unet import attach
from imprompt.memory import enough_memory
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.inversion import Inversion
from imprompt.methods.loading import load_method, method_of
from imprompt.pipelines import check_size, guidance_of, load_base, own_size, pick_device, pick_dtype, scheduled
from imprompt.prompter import ImagePrompt, Prompter, load

_BATCH_PIXELS = 4 * 512 * 512  # drawn at once

Progress = Callable[[int, int], None]  # steps done, steps in all


class Drawn(NamedTuple):
    """One picture and the seed that repeats it."""

    image: Image.Image
    seed: int


def draw(choice: Generate, progress: Progress = lambda done, total: None) -> list[Drawn]:
    """Draw the pictures that `choice` describes. The same seed on the same machine gives the same picture."""
    learned = _learned(choice)
    if not choice.image and choice.adapter and not learned:
        raise UserError("an adapter without a reference does nothing; give --image")
    if choice.image and learned:
        raise UserError(f"{choice.adapter} is a {learned} that has learned its subject; leave --image out")
    device = pick_device(choice.device)
    mini = choice.base == "mini"
    if choice.image and not choice.adapter and not mini:
        raise UserError(f"which adapter fits {choice.base} is not known; name one with --adapter")
    pipe = load_base(choice.base, device, pick_dtype(choice.dtype, device, mini))
    width, height = choice.pixels() or (own_size(pipe), own_size(pipe))
    check_size(pipe, width, height)
    seeds = list(range(choice.seed, choice.seed + choice.count))
    at_once = max(1, min(choice.count, _BATCH_PIXELS // (width * height)))
    batches = [seeds[i : i + at_once] for i in range(0, len(seeds), at_once)]
    total, images = len(batches) * choice.steps, []

    def step(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        progress(min(done + index + 1, total), total)
        return kwargs

    with ExitStack() as stack:
        stack.enter_context(enough_memory("draw smaller pictures (--size), or in another --dtype (bfloat16)"))
        stack.enter_context(scheduled(pipe, choice.scheduler, choice.steps))
        if choice.image:
            adapter = choice.adapter or "mini"
            prompter = _prompter(adapter, choice.encoder, device, os.path.getmtime(adapter) if os.path.isfile(adapter) else 0.0)
            stack.enter_context(attach(pipe, _prompt(prompter, choice)))
        text = choice.prompt
        if learned and choice.adapter:
            method = load_method(choice.adapter, pipe, choice.base)
            nothing = method.null()[None].to(pipe.unet.device)
            stack.enter_context(method.attached(pipe, nothing, nothing, choice.scale))
            text = method.said(text) if isinstance(method, (DreamBooth, Inversion)) else text
        for number, batch in enumerate(batches):
            done = number * choice.steps
            images += pipe(
                [text] * len(batch),
                negative_prompt=[choice.negative] * len(batch),
                num_inference_steps=choice.steps,
                guidance_scale=choice.guidance if choice.guidance is not None else guidance_of(choice.base),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch],
                width=width,
                height=height,
                callback_on_step_end=step,
            ).images
    return [Drawn(image, seed) for image, seed in zip(images, seeds, strict=True)]


def _learned(choice: Generate) -> str:
    """The method by which an adapter's file has learned one subject; empty where it hears any picture."""
    if choice.adapter is None or choice.adapter in hub.EMBEDDED or not os.path.isfile(choice.adapter):
        return ""
    name = method_of(choice.adapter)
    return name if name in PERSONAL else ""


def _prompt(prompter: Prompter, choice: Generate) -> ImagePrompt:
    combine = None if choice.combine == "auto" else choice.combine
    return prompter(list(choice.image), scale=choice.scale, fit=choice.fit, weights=choice.numbers(), combine=combine)


@lru_cache(maxsize=2)
def _prompter(adapter: str, encoder: str | None, device: str, changed: float) -> Prompter:
    """The last ones are kept in memory, as the base is; a file that changed is read again."""
    return load(adapter, encoder=encoder).to(device)
