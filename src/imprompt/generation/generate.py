"""The workflow of `imprompt generate`: references and text in, pictures out."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from PIL import Image

from imprompt.config import PERSONAL, Generate, block_scales
from imprompt.core.conditioning import BLOCKS
from imprompt.errors import UserError
from imprompt.generation.controls import adapted
from imprompt.generation.tasks import Scene, set_up, with_lora
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.inversion import Inversion
from imprompt.methods.loading import load_method, method_of
from imprompt.models import hub
from imprompt.models.base_pipelines import guidance_of, load_base, pick_device, pick_dtype, scheduled
from imprompt.models.image_prompt import ImagePrompt, Prompter, as_mask, load
from imprompt.unet.injection import attach
from imprompt.utils.memory import enough_memory

_BATCH_PIXELS = 4 * 512 * 512  # drawn at once

Progress = Callable[[int, int], None]  # steps done, steps in all


class Drawn(NamedTuple):
    """One picture and the seed that repeats it."""

    image: Image.Image
    seed: int


def draw(choice: Generate, progress: Progress = lambda done, total: None) -> list[Drawn]:
    """Draw the pictures that `choice` describes. The same seed on the same machine gives the same picture."""
    learned = _learned(choice)
    if not (choice.image or choice.face) and choice.adapter and not learned:
        raise UserError("an adapter without a reference does nothing; give --image")
    if choice.image and learned:
        raise UserError(f"{choice.adapter} is a {learned} that has learned its subject; leave --image out")
    if learned == "inversion" and choice.scale != 1:
        raise UserError(f"scale: {choice.adapter} holds words, which are said or not; leave --scale out")
    if learned and choice.encoder:
        raise UserError(f"encoder: {choice.adapter} looks at no picture; leave --encoder out")
    prompts = [one for one in (choice, *choice.further()) if one.image or one.face]
    if not all(one.adapter or choice.base == "mini" for one in prompts):
        raise UserError(f"which adapter fits {choice.base} is not known; name one with --adapter")
    base, scene, device = staged(choice)
    seeds = list(range(choice.seed, choice.seed + choice.count))
    at_once = max(1, min(choice.count, _BATCH_PIXELS // (scene.size[0] * scene.size[1])))
    batches = [seeds[i : i + at_once] for i in range(0, len(seeds), at_once)]
    steps = max(1, int(choice.steps * scene.share))
    total, images = len(batches) * steps, list[Image.Image]()

    def step(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        progress(min(done + index + 1, total), total)
        return kwargs

    with ExitStack() as stack:
        stack.enter_context(enough_memory("draw smaller pictures (--size), or in another --dtype (bfloat16)"))
        stack.enter_context(with_lora(base, choice.lora))
        stack.enter_context(scheduled(scene.pipe, choice.scheduler, choice.steps))
        stack.enter_context(adapted(base.unet, scene.adapters, scene.size))
        if prompts:
            made = [_prompt(one, device) for one in prompts]
            if choice.save_prompt and (choice.image or choice.face):
                made[0].save(choice.save_prompt)
            stack.enter_context(attach(scene.pipe, *made))
        text = choice.prompt
        if learned and choice.adapter:
            method = load_method(choice.adapter, base, choice.base)
            nothing = method.null()[None].to(base.unet.device)
            stack.enter_context(method.attached(scene.pipe, nothing, nothing, choice.scale))
            text = method.said(text) if isinstance(method, (DreamBooth, Inversion)) else text
        for number, batch in enumerate(batches):
            done = number * steps
            images += scene.pipe(
                [text] * len(batch),
                negative_prompt=[choice.negative] * len(batch),
                num_inference_steps=choice.steps,
                guidance_scale=choice.guidance if choice.guidance is not None else guidance_of(choice.base),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch],
                callback_on_step_end=step,
                **scene.given(len(batch)),
            ).images
    return [Drawn(scene.finish(image), seed) for image, seed in zip(images, seeds, strict=True)]


def staged(choice: Generate) -> tuple[Any, Scene, str]:
    """The base, the scene in it, and the device. Raises UserError for whatever cannot be drawn."""
    device = pick_device(choice.device)
    dtype = pick_dtype(choice.dtype, device, choice.base == "mini")
    base = load_base(choice.base, device, dtype, choice.base_config)
    return base, set_up(choice, base, device, dtype), device


def _learned(choice: Generate) -> str:
    """The method by which an adapter's file has learned one subject; empty where it hears any picture."""
    if choice.adapter is None or choice.adapter in hub.EMBEDDED or not os.path.isfile(choice.adapter):
        return ""
    name = method_of(choice.adapter)
    return name if name in PERSONAL else ""


def _prompt(choice: Generate, device: str) -> ImagePrompt:
    """One image prompt, from pictures or from a file that one was kept in."""
    adapter = choice.adapter or "mini"
    prompter = _prompter(adapter, choice.encoder, device, os.path.getmtime(adapter) if os.path.isfile(adapter) else 0.0)
    blocks = {BLOCKS.get(name, name): value for name, value in block_scales(choice.blocks).items()}
    scale = {name: choice.scale * value for name, value in blocks.items()} if blocks else choice.scale
    if len(choice.image) == 1 and isinstance(choice.image[0], str) and choice.image[0].endswith(".safetensors"):
        kept = prompter.read(choice.image[0])
        mask = as_mask(choice.region) if choice.region else kept.mask
        return replace(kept, scale=scale, start=choice.start, end=choice.end, mask=mask)
    combine = None if choice.combine == "auto" else choice.combine
    return prompter(
        list(choice.image), scale=scale, mask=choice.region, start=choice.start, end=choice.end, fit=choice.fit, weights=choice.numbers(),
        combine=combine, negative=choice.negative_image, faces=choice.face,
    )  # fmt: skip


@lru_cache(maxsize=2)
def _prompter(adapter: str, encoder: str | None, device: str, changed: float) -> Prompter:
    """The last ones are kept in memory, as the base is; a file that changed is read again."""
    return load(adapter, encoder=encoder).to(device)
