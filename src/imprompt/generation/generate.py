"""The workflow of `imprompt generate`: references and text in, images out."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from imprompt.config import PER_SUBJECT_METHODS, GenerateConfig, ImagePromptConfig, PipelineConfig, SamplingConfig
from imprompt.core.conditioning import BLOCK_PRESETS
from imprompt.dit.attach import attach
from imprompt.errors import UserError, notify
from imprompt.generation.controls import apply_t2i_adapters
from imprompt.generation.inputs import (
    check_files,
    expand_references,
    report_closed_windows,
    report_cut_text,
    report_ineffective_options,
    report_unknown_words,
    report_without_guidance,
)
from imprompt.generation.lora import use_lora
from imprompt.generation.tasks import GenerationTask, prepare_task
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.inversion import TextualInversion
from imprompt.methods.loading import load_method, read_method_name
from imprompt.models import hub
from imprompt.models.base_pipelines import default_guidance_scale, load_pipeline, resolve_device, resolve_dtype, use_scheduler
from imprompt.models.image_prompt import ImagePrompt, ImagePromptEncoder, load, load_mask
from imprompt.utils.images import differs_in_shape
from imprompt.utils.memory import explain_oom

_MAX_BATCH_PIXELS = 4 * 512 * 512

ProgressCallback = Callable[[int, int], None]  # denoising steps done, and in all


class GeneratedImage(NamedTuple):
    """One image, its seed, and the batch that repeats it exactly: sums round differently in a batch of another size."""

    image: Image.Image
    seed: int
    batch: tuple[int, int]  # seed of its first image, and the number of its images


@dataclass(frozen=True)
class SubjectMethod:
    """A checkpoint that was fine-tuned on one subject: what the base model is conditioned on instead of references."""

    source: str
    name: str
    scale: float


@dataclass
class LoadedModels:
    """What stays in memory between two calls of `generate`: one base pipeline, and the latest image prompt encoders."""

    _pipelines: dict[Any, Any]
    _encoders: dict[Any, ImagePromptEncoder]

    @classmethod
    def empty(cls) -> "LoadedModels":
        return cls({}, {})

    def pipeline(self, config: PipelineConfig, dtype: str) -> Any:
        """The base pipeline of this configuration; another one that was loaded before is dropped first."""
        device = resolve_device(config.device)
        key = (config.model, config.model_config, device, resolve_dtype(dtype, device, is_mini=config.is_mini))
        if key not in self._pipelines:
            self._pipelines.clear()
            self._pipelines[key] = load_pipeline(config.model, device, key[3], config.model_config)
        return self._pipelines[key]

    def image_prompt_encoder(self, adapter: str, image_encoder: str | None, device: torch.device) -> ImagePromptEncoder:
        """Adapter and image encoder; a file that changed is read again."""
        modified = os.path.getmtime(adapter) if os.path.isfile(adapter) else 0.0
        key = (adapter, image_encoder, device, modified)
        if key not in self._encoders:
            while len(self._encoders) >= 2:
                del self._encoders[next(iter(self._encoders))]
            self._encoders[key] = load(adapter, image_encoder=image_encoder).to(device)
        return self._encoders[key]


def generate_images(
    config: GenerateConfig, models: LoadedModels | None = None, on_progress: ProgressCallback = lambda done, total: None
) -> list[GeneratedImage]:
    """Generate the images that the configuration describes. The same seed on the same machine gives the same image.

    `models` keeps what is loaded for the next call. Raises UserError for anything that cannot be used.
    """
    subject = find_subject_method(config.reference)
    specs = [expand_references(spec) for spec in config.parse_image_prompts()]
    check_references(config.reference, specs, subject, config.pipeline)
    check_files(config, specs)
    models = models or LoadedModels.empty()
    with explain_oom("generate smaller images (--resolution), or in another --dtype (bfloat16)"):
        base = models.pipeline(config.pipeline, config.sampling.dtype)
        task = prepare_task(config.task, base, config.sampling.parse_resolution(), model=config.pipeline.model)
        prompts = [encode_image_prompt(spec, models, base) for spec in specs]
        _report_stretched_masks(prompts, task.size)
        if config.save_embeds and config.reference.has_reference:
            prompts[0].save(config.save_embeds)
        sampler = Sampler(base, task, config.sampling, config.pipeline.model, config.task.lora)
        if any(spec.negative_image for spec in specs):
            report_without_guidance(["negative_image"], sampler.guidance_scale, base)
        return sampler.sample(config.prompt, config.negative_prompt, prompts, subject, on_progress)


@dataclass(frozen=True)
class Sampler:
    """Samples batches of images from a prepared task."""

    base: Any
    task: GenerationTask
    config: SamplingConfig
    model: str
    lora: Sequence[str] = ()

    def sample(
        self,
        prompt: str,
        negative_prompt: str,
        image_prompts: Sequence[ImagePrompt] = (),
        subject: SubjectMethod | None = None,
        on_progress: ProgressCallback = lambda done, total: None,
    ) -> list[GeneratedImage]:
        """One image for each seed. The pipeline is left as it was."""
        images: list[Image.Image] = []
        if negative_prompt:
            report_without_guidance(["negative_prompt"], self.guidance_scale, self.base)
        with ExitStack() as stack:
            stack.enter_context(use_lora(self.base, self.lora))
            stack.enter_context(use_scheduler(self.task.pipe, self.config.scheduler, self.config.num_inference_steps))
            stack.enter_context(apply_t2i_adapters(self.base.unet, self.task.t2i_adapters))
            if image_prompts:
                report_closed_windows(image_prompts, self.task.pipe.scheduler, self.config.num_inference_steps, self.task.step_fraction)
                stack.enter_context(attach(self.task.pipe, *image_prompts))
            token = ""
            if subject:
                prompt, token = stack.enter_context(apply_subject_method(subject, self.base, self.task.pipe, self.model, prompt))
            self._report_prompts(prompt, negative_prompt, token)
            for number, batch in enumerate(self.batches):
                images += self._sample_batch(prompt, negative_prompt, batch, self._step_callback(number, on_progress))
        seeds = [(seed, (batch[0], len(batch))) for batch in self.batches for seed in batch]
        return [GeneratedImage(self.task.postprocess(image), *of_image) for image, of_image in zip(images, seeds, strict=True)]

    def _report_prompts(self, prompt: str, negative_prompt: str, subject_token: str) -> None:
        """Report what of the prompts is cut, and what mini does not know."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            report_cut_text(name, text, self.base)
            if self.model == "mini":
                report_unknown_words(name, text, subject_token)

    @property
    def guidance_scale(self) -> float:
        """The classifier-free guidance scale: what was given, or what suits the model."""
        given = self.config.guidance_scale
        return default_guidance_scale(self.model) if given is None else given

    @property
    def seeds(self) -> Sequence[int]:
        """One for each image."""
        return range(self.config.seed, self.config.seed + self.config.num_images)

    @property
    def batches(self) -> list[Sequence[int]]:
        """The seeds of each batch, which is as large as memory allows."""
        size = max(1, min(len(self.seeds), _MAX_BATCH_PIXELS // (self.task.size[0] * self.task.size[1])))
        return [self.seeds[i : i + size] for i in range(0, len(self.seeds), size)]

    def _sample_batch(self, prompt: str, negative_prompt: str, seeds: Sequence[int], on_step: Callable[..., Any]) -> list[Image.Image]:
        return self.task.pipe(
            [prompt] * len(seeds),
            negative_prompt=[negative_prompt] * len(seeds),
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=on_step,
            **self.task.pipeline_kwargs(len(seeds)),
        ).images

    def _step_callback(self, batch: int, on_progress: ProgressCallback) -> Callable[..., Any]:
        steps = max(1, int(self.config.num_inference_steps * self.task.step_fraction))

        def on_step(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            total = len(self.batches) * steps
            on_progress(min(batch * steps + index + 1, total), total)
            return kwargs

        return on_step


def check_references(
    main: ImagePromptConfig, specs: Sequence[ImagePromptConfig], subject: SubjectMethod | None, pipeline: PipelineConfig
) -> None:
    """Raise UserError where adapter, references and base model do not go together."""
    if not main.has_reference and main.adapter and not subject:
        raise UserError("adapter: has no effect without a reference; give --image")
    if subject and main.image:
        raise UserError(f"image: {main.adapter} is a {subject.name} checkpoint, which is conditioned on no image; remove --image")
    if subject and subject.name == "inversion" and main.scale != 1:
        raise UserError(f"scale: has no effect with {main.adapter}, a Textual Inversion checkpoint; remove --scale")
    if subject and main.image_encoder:
        raise UserError(f"image_encoder: {main.adapter} is conditioned on no image; remove --image-encoder")
    if subject:
        for name in main.given(*main.to_options()):
            if name not in ("adapter", "scale"):
                notify(f"{name}: has no effect with {main.adapter}, a {subject.name} checkpoint, which is conditioned on no image")
    if not all(spec.adapter or pipeline.is_mini for spec in specs):
        raise UserError(f"adapter: {pipeline.model} has no default adapter; name one with --adapter")


def find_subject_method(config: ImagePromptConfig) -> SubjectMethod | None:
    """The per-subject method that the adapter's file holds; None where it is conditioned on reference images."""
    source = config.adapter
    if source is None or source in hub.BUNDLED_ADAPTERS or not os.path.isfile(source):
        return None
    name = read_method_name(source)
    return SubjectMethod(source, name, config.scale) if name in PER_SUBJECT_METHODS else None


@contextmanager
def apply_subject_method(subject: SubjectMethod, base: Any, pipe: Any, model: str, prompt: str) -> Iterator[tuple[str, str]]:
    """Within the context the pipeline generates the subject of a fine-tuned checkpoint; yields the prompt with its token, and the token."""
    method = load_method(subject.source, base, model)
    uncond = method.uncond_features()[None].to(base.unet.device)
    with method.apply_to(pipe, uncond, uncond, subject.scale):
        token = str(method.metadata.get("token", "sks"))
        yield (method.format_prompt(prompt) if isinstance(method, (DreamBooth, TextualInversion)) else prompt), token


def encode_image_prompt(config: ImagePromptConfig, models: LoadedModels, base: Any) -> ImagePrompt:
    """One image prompt, from references or from a file of saved embeddings."""
    encoder = models.image_prompt_encoder(config.adapter or "mini", config.image_encoder, base.unet.device)
    blocks = {BLOCK_PRESETS.get(name, name): value for name, value in config.parse_block_scales().items()}
    scale = {name: config.scale * value for name, value in blocks.items()} if blocks else config.scale
    saved = saved_embeds_file(config)
    report_ineffective_options(config, is_saved=saved is not None)
    if saved:
        prompt = encoder.load_prompt(saved)
        mask = prompt.mask if config.image_mask is None else load_mask(config.image_mask)
        return replace(prompt, scale=scale, start_at=config.start_at, end_at=config.end_at, mask=mask)
    return encoder(
        list(config.image), scale=scale, mask=config.image_mask, start_at=config.start_at, end_at=config.end_at,
        resize_mode=config.resize_mode, reference_weights=config.parse_weights(),
        aggregation=None if config.aggregation == "auto" else config.aggregation,
        negative_image=config.negative_image, face_embeds=config.face_embeds,
    )  # fmt: skip


def _report_stretched_masks(prompts: Sequence[ImagePrompt], size: tuple[int, int]) -> None:
    for mask in (prompt.mask for prompt in prompts if prompt.mask is not None):
        height, width = mask.shape
        if differs_in_shape((width, height), size):
            notify(f"image_mask is {width} × {height}, the output {size[0]} × {size[1]}: it is stretched to the output")


def saved_embeds_file(config: ImagePromptConfig) -> str | None:
    """The file of saved embeddings that stands in the place of reference images."""
    only = config.image[0] if len(config.image) == 1 else None
    return str(only) if isinstance(only, (str, Path)) and str(only).endswith(".safetensors") else None
