"""What a generation is given: files are checked before anything is loaded, and what has no effect is reported in one line."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from imprompt.config import GenerateConfig, ImagePromptConfig
from imprompt.errors import ImageError, UserError, notify
from imprompt.mini.world import build_vocabulary
from imprompt.models import hub
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.progress import read_denoising_progress
from imprompt.utils.image_paths import expand_images

MAX_LISTED_WORDS = 8
_LOCAL_PREFIXES = (".", "/", "~")


def expand_references(config: ImagePromptConfig) -> ImagePromptConfig:
    """The image prompt with the files of every folder and pattern among its references. Raises UserError."""
    expanded = replace(config, image=tuple(expand_images(config.image)))
    weights = expanded.parse_weights()
    if weights is not None and len(weights) != len(expanded.image):
        raise UserError(f"image_weights: expected one for each of the {len(expanded.image)} references, received {len(weights)}")
    return expanded


def check_files(config: GenerateConfig, prompts: Sequence[ImagePromptConfig]) -> None:
    """Raise UserError for a file that is named and does not exist: before anything is loaded, which takes its time."""
    task = config.task
    images = {name: getattr(task, name) for name in ("init_image", "inpaint_image", "mask_image")}
    images |= {f"control: {kind}": path for kind, path, _ in task.parse_controls()}
    for prompt in prompts:
        images |= {name: getattr(prompt, name) for name in ("image_mask", "negative_image", "face_embeds")}
        _check_files(images)
        _check_folder("image_encoder", prompt.image_encoder)
        if prompt.adapter:
            hub.locate_adapter(prompt.adapter)
    _check_files(images)
    for source, _ in task.parse_loras():
        _check_folder("lora", source)
    _check_folder("model", config.pipeline.model)


def _check_files(images: dict[str, Any]) -> None:
    for name, path in images.items():
        if isinstance(path, (str, os.PathLike)) and not os.path.isfile(path):
            raise ImageError(f"{name}: no file at {path}")


def _check_folder(name: str, source: str | None) -> None:
    """Only what cannot be a hub id: those are two names."""
    if source and source.startswith(_LOCAL_PREFIXES) and not os.path.exists(source):
        what = "base model" if name == "model" else "CLIP image encoder" if name == "image_encoder" else "file or folder"
        raise UserError(f"{name}: no {what} at {source}: there is no such file or folder")


# Inputs without an effect


def report_cut_text(name: str, prompt: str, pipe: Any) -> None:
    """Report the part of a prompt beyond the last token that a text encoder reads."""
    for tokenizer in filter(None, (getattr(pipe, attribute, None) for attribute in ("tokenizer", "tokenizer_2"))):
        if cut := find_cut_text(prompt, tokenizer):
            notify(f"{name}: the text encoder reads {tokenizer.model_max_length - 2} tokens, so this is cut: {cut!r}")
            return


def find_cut_text(prompt: str, tokenizer: Any) -> str:
    """What of a prompt lies beyond the tokens that the text encoder reads; empty where all of it is read."""
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    cut = tokens[tokenizer.model_max_length - 1 : -1]  # the end token stands in the last place
    return str(tokenizer.decode(cut, skip_special_tokens=True)).replace("</w>", " ").strip() if cut else ""


def report_unknown_words(name: str, prompt: str, subject_token: str = "") -> None:
    """Report the words of a prompt that mini does not know; `subject_token` is known to a checkpoint that was fine-tuned on a subject."""
    if unknown := find_unknown_words(prompt.replace(subject_token, " ") if subject_token else prompt):
        listed = ", ".join(unknown[:MAX_LISTED_WORDS]) + (" …" if len(unknown) > MAX_LISTED_WORDS else "")
        notify(f"{name}: mini has a small vocabulary, and these words mean nothing to it: {listed}")


def find_unknown_words(prompt: str) -> list[str]:
    """The words that are not in the captions of mini's world, each once."""
    known = set(build_vocabulary())
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", prompt.lower())
    return list(dict.fromkeys(word for word in words if word not in known and not known.issuperset(word.split("-"))))


def report_without_guidance(names: Sequence[str], guidance_scale: float, pipe: Any) -> None:
    """Report negative prompts and images where there is no classifier-free guidance, which would lead away from them."""
    is_distilled = getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None  # diffusers then uses no guidance
    if guidance_scale > 1 and not is_distilled:
        return
    reason = "this model has none" if is_distilled else f"expected a guidance_scale above 1, received {guidance_scale:g}"
    for name in names:
        notify(f"{name}: has no effect without classifier-free guidance; {reason}")


def report_closed_windows(prompts: Sequence[ImagePrompt], scheduler: Any, num_inference_steps: int, step_fraction: float) -> None:
    """Report image prompts in whose conditioning window lies no denoising step. Sets the scheduler's timesteps."""
    windows = dict.fromkeys((prompt.start_at, prompt.end_at) for prompt in prompts)
    if not set(windows) - {(0.0, 1.0)}:
        return
    scheduler.set_timesteps(num_inference_steps)
    skipped = num_inference_steps - min(int(num_inference_steps * step_fraction), num_inference_steps)  # as image-to-image counts
    timesteps = scheduler.timesteps[skipped * getattr(scheduler, "order", 1) :]
    progress = [float(read_denoising_progress(scheduler, timestep)) for timestep in timesteps]
    for start, end in windows:
        if not any(start <= at < end for at in progress):
            notify(f"image prompt: no denoising step lies in its window {start:g} … {end:g}, so it has no effect; "
                   "take more steps, or a wider window")  # fmt: skip


def report_ineffective_options(config: ImagePromptConfig, *, is_saved: bool) -> None:
    """Report options of an image prompt without an effect on saved embeddings, or on a single reference."""
    if is_saved:
        for name in config.given("image_weights", "aggregation", "negative_image", "face_embeds", "resize_mode", "image_encoder"):
            notify(f"{name}: has no effect on saved embeddings, which were made with theirs")
    elif len(config.image) == 1 and config.resize_mode != "tile":
        for name in config.given("image_weights", "aggregation"):
            notify(f"{name}: has no effect on a single reference image")
