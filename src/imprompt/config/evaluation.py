"""Configuration of `evaluate` and `reproduce`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from imprompt.config.common import (
    MAX_BATCH_SIZE,
    MAX_DENOISING_STEPS,
    MAX_IMAGES,
    MAX_REFERENCES,
    MAX_SCALE,
    MAX_SIDE,
    MAX_STEPS,
    UNSET,
    DType,
    Options,
    PipelineConfig,
    Scheduler,
    option,
    part,
)
from imprompt.config.methods import IP_ADAPTER_PAPER_METHODS, PER_SUBJECT_METHODS, PERSONALIZATION_PAPER_ROWS
from imprompt.errors import UserError


@dataclass(frozen=True)
class EvaluationDataConfig(Options):
    """Test data."""

    data: str = option("mini", "images with captions: mini's test set, COCO, or any training data", path=True)
    default_caption: str = option("", "prompt of images without a caption (default: a photo of a CLASS_NOUN)")
    num_prompts: int | None = option(UNSET, "number of prompts (default: 1000 of mini, 5000 of other data)", ge=1, le=MAX_IMAGES)
    min_images_per_subject: int | None = option(
        UNSET,
        "generate by subject, of the subjects with at least so many images (default: each image is its own reference)",
        ge=2,
        le=MAX_IMAGES,
    )
    num_references: int = option(1, "reference images of each subject", ge=1, le=MAX_REFERENCES)
    targets_per_subject: int = option(1, "other images of each subject that are generated", ge=1, le=MAX_IMAGES)
    subject_split: str | None = option(UNSET, "subjects.json of a training run: only its test subjects", metavar="FILE", path=True)
    class_noun: str = option("", "what the subjects are in prompts: person (default: mini's own classes)")

    def check(self) -> None:
        by_subject = (self.num_references, self.targets_per_subject, self.subject_split) != (1, 1, None)
        if by_subject and not self.min_images_per_subject:
            raise UserError(
                "num_references, targets_per_subject and subject_split: need data by subject; say how many images a subject has "
                "at least, such as --min-images-per-subject 10"
            )


@dataclass(frozen=True)
class EvaluationFinetuningConfig(Options):
    """Per-subject methods."""

    finetune_steps: int | None = option(
        UNSET, "optimizer steps of methods that fine-tune on each subject (default: their own)", ge=1, le=MAX_STEPS
    )
    num_class_images: int | None = option(
        UNSET, "class images for their prior preservation (default: their own number)", ge=0, le=MAX_IMAGES
    )


@dataclass(frozen=True)
class EvaluationSamplingConfig(Options):
    """Sampling."""

    num_images_per_prompt: int = option(4, "images for each prompt", ge=1, le=10_000)
    prompt_mode: Literal["none", "caption"] = option("none", "text prompt that goes with the image prompt")
    scale: float = option(1.0, "λ, the scale of the image prompt", ge=-MAX_SCALE, le=MAX_SCALE)
    scale_sweep: int = option(0, "prompts for a sweep over λ, with the caption of another image as text; 0 for none", ge=0, le=MAX_IMAGES)
    num_inference_steps: int = option(50, "denoising steps", ge=1, le=MAX_DENOISING_STEPS, alias=("--steps",))
    guidance_scale: float = option(UNSET, "classifier-free guidance scale (default: 3 on mini, 7.5 elsewhere)", ge=0, le=MAX_SCALE)
    scheduler: Scheduler = option("ddim", "noise scheduler")
    resolution: int | None = option(UNSET, "side in pixels (default: the model's native resolution)", ge=1, le=MAX_SIDE)
    batch_size: int = option(UNSET, "images sampled at a time (default: 64 on mini, 8 elsewhere)", ge=1, le=MAX_BATCH_SIZE)
    dtype: DType = option("auto", "data type of the pipeline")
    seed: int = option(0, "seed of the first image; the next ones count up", ge=0, le=2**62)

    def check(self) -> None:
        if self.scale_sweep == 1:
            raise UserError("scale_sweep: expected 0, or at least 2 prompts (a confidence interval needs two); received 1")


@dataclass(frozen=True)
class MetricsConfig(Options):
    """Metrics."""

    clip_model: str = option(UNSET, "CLIP model for CLIP-I, CLIP-T and CMMD: mini, a folder or hub id (default: ViT-L/14, or mini's)")
    feature_extractor: str = option(
        UNSET,
        "features for Fréchet and kernel distance: mini, clip, inception, or a folder or hub id such as DINO's (default: clip, or mini)",
    )
    identity_encoder: str = option(
        UNSET, "encoder of subject identity: mini, insightface, facenet or none (default: mini's for subjects of mini)"
    )
    lpips: bool = option(False, "also LPIPS to the reference (extra: pip install 'imprompt[inception]')")
    bootstrap_samples: int = option(200, "bootstrap samples for the confidence intervals", ge=2, le=100_000)


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """Measure image prompts: generate from test images, compute metrics, compare."""

    adapter: tuple[str, ...] = option((), "adapter to measure: a file, mini or mini-plus; NAME=FILE names its row", metavar="FILE")
    baseline: tuple[str, ...] = option(
        (), "what to compare with: another adapter, a checkpoint of any method, reference-only, or a diffusers pipeline", metavar="WHAT"
    )
    image_encoder: str | None = option(UNSET, "image encoder of the adapters: a folder or hub id (default: each one's own)", path=True)
    dataset: EvaluationDataConfig = part(EvaluationDataConfig)
    sampling: EvaluationSamplingConfig = part(EvaluationSamplingConfig)
    metrics: MetricsConfig = part(MetricsConfig)
    finetuning: EvaluationFinetuningConfig = part(EvaluationFinetuningConfig)
    pipeline: PipelineConfig = part(PipelineConfig)
    num_processes: int = option(1, "processes on this machine", ge=1, le=1024)
    output_dir: str = option("evaluation", "folder of the evaluation; one begun there is continued", alias=("-o",), path=True)

    def find_unused(self) -> Iterator[str]:
        fine_tuned = any(source.partition("=")[2] in PER_SUBJECT_METHODS or source in PER_SUBJECT_METHODS for source in self.baseline)
        for name in () if fine_tuned else self.given("finetune_steps", "num_class_images"):
            yield f"{name}: no row is fine-tuned on a subject; expected --baseline {', '.join(PER_SUBJECT_METHODS)}"
        if not self.dataset.min_images_per_subject and self.given("identity_encoder"):
            yield "identity_encoder: has an effect with data by subject only; give --min-images-per-subject"

    def with_defaults(self) -> "EvaluateConfig":
        """A copy in which every option that depends on others is filled in, unless it was given."""
        mini = self.pipeline.is_mini
        by_mini_subject = re.match("mini(:|$)", self.dataset.data) and self.dataset.min_images_per_subject
        filled = self.fill_unset({
            "guidance_scale": 3.0 if mini else 7.5,
            "batch_size": 64 if mini else 8,
            "clip_model": "mini" if mini else "openai/clip-vit-large-patch14",
            "feature_extractor": "mini" if mini else "clip",
            "identity_encoder": "mini" if by_mini_subject else "none",
        })  # fmt: skip
        return filled if self.adapter or self.baseline or not mini else filled.with_options(adapter=("mini",))


@dataclass(frozen=True)
class ReproduceConfig(Options):
    """Reproduce a paper's comparison on the embedded model: train what is missing, measure all, evaluate the paper's claims."""

    paper: Literal["ip-adapter", "personalization"] = option("ip-adapter", "which paper", positional=True)
    budget: Literal["full", "smoke"] = option("full", "full: hours on two cores; smoke: a minute or two, shows only that it runs")
    method: tuple[str, ...] = option((), "only this row; repeat it for several (the report shows what there is)", metavar="METHOD")
    num_processes: int = option(2, "processes on this machine; each trains and measures a row of its own", ge=1, le=1024)
    device: str = option("auto", "auto, cpu, cuda, mps …")
    output_dir: str = option("runs/reproduce", "folder; one begun there is continued", alias=("-o",), path=True)

    def check(self) -> None:
        rows = IP_ADAPTER_PAPER_METHODS if self.paper == "ip-adapter" else PERSONALIZATION_PAPER_ROWS
        for name in self.method:
            if name not in rows:
                raise UserError(f"method: expected one of {', '.join(rows)}; received {name!r}")
