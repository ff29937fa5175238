"""Configuration of `train`, `encode` and `data validate`, and what training uses where nothing was given."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from imprompt.config.common import (
    MAX_BATCH_SIZE,
    MAX_DENOISING_STEPS,
    MAX_IMAGES,
    MAX_REFERENCES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MAX_WORKERS,
    UNSET,
    DType,
    Options,
    PipelineConfig,
    option,
    part,
)
from imprompt.config.methods import AGGREGATIONS, METHODS, MULTI_REFERENCE_METHODS, PER_SUBJECT_METHODS, REFERENCE_METHODS
from imprompt.errors import UserError

# The settings of IP-Adapter (Ye et al., 2023, arXiv:2308.06721, section 4.1.2), and what suits the embedded model.
_PAPER_DEFAULTS: dict[str, Any] = {
    "max_train_steps": 20_000, "train_batch_size": 8, "learning_rate": 1e-4, "optimizer": "adamw", "lr_scheduler": "constant",
    "lr_warmup_steps": 0, "ema_decay": 0.0, "timestep_sampling": "uniform", "text_drop_prob": 0.05,
}  # fmt: skip
_MINI_DEFAULTS: dict[str, Any] = {
    "max_train_steps": 2_500, "train_batch_size": 48, "learning_rate": 3e-3, "optimizer": "muon", "lr_scheduler": "cosine",
    "lr_warmup_steps": 100, "ema_decay": 0.998, "timestep_sampling": "logit-normal",
    "text_drop_prob": 0.3,  # every caption of this world names the class: the image has to carry it alone more often
}  # fmt: skip
_MINI_ADAM_DEFAULTS: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3}  # where Muon is not available
MINI_SUBJECT_OPTIONS: dict[str, Any] = {"learning_rate": 1e-3, "text_drop_prob": 0.1}  # leave-one-out: captions do not describe the look
_COMMON_DEFAULTS: dict[str, Any] = {
    "image_drop_prob": 0.05, "both_drop_prob": 0.05, "num_validation_images": 16, "checkpointing_steps": 500, "checkpoints_total_limit": 2,
    "sanity_check": True,
}  # fmt: skip
# For the images of one subject: nothing is dropped, held out, or tried before.
_PER_SUBJECT_DEFAULTS: dict[str, Any] = {
    "optimizer": "adamw", "text_drop_prob": 0.0, "image_drop_prob": 0.0, "both_drop_prob": 0.0, "num_validation_images": 0,
    "sanity_check": False, "lr_scheduler": "constant", "lr_warmup_steps": 0, "ema_decay": 0.0, "checkpointing_steps": 200,
    "checkpoints_total_limit": 1,
}  # fmt: skip
_METHOD_DEFAULTS: dict[tuple[str, bool], dict[str, Any]] = {  # by method, and whether on mini (docs/log.md)
    ("dreambooth", True): {
        "max_train_steps": 60, "train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler": "cosine", "num_class_images": 16,
        "instance_token": "sks",
    },
    ("dreambooth-lora", True): {
        "max_train_steps": 60, "train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler": "cosine", "num_class_images": 16,
        "instance_token": "sks",
    },
    ("inversion", True): {
        "max_train_steps": 100, "train_batch_size": 4, "learning_rate": 5e-2, "num_class_images": 0, "instance_token": "<subject>",
    },
    ("dreambooth", False): {
        "max_train_steps": 800, "train_batch_size": 2, "learning_rate": 5e-6, "num_class_images": 200, "instance_token": "sks",
    },
    ("dreambooth-lora", False): {
        "max_train_steps": 500, "train_batch_size": 2, "learning_rate": 1e-4, "num_class_images": 200, "instance_token": "sks",
    },
    ("inversion", False): {
        "max_train_steps": 3_000, "train_batch_size": 4, "learning_rate": 5e-4, "num_class_images": 0, "instance_token": "<subject>",
    },
}  # fmt: skip

_DATA_HELP = "training data: mini, a folder, COCO, a list (.jsonl, .csv, .parquet), or .tar shards"


@dataclass(frozen=True)
class DataConfig(Options):
    """Data."""

    data: str = option("mini", _DATA_HELP, path=True)
    resolution: int | None = option(
        UNSET, "side of the training images in pixels (default: the base model's native resolution)", ge=1, le=MAX_SIDE
    )
    center_crop: bool = option(True, "crop the center instead of a random part")
    random_flip: bool = option(False, "flip half of the images horizontally")
    aspect_ratio_bucketing: bool = option(False, "train on several aspect ratios instead of squares")
    default_caption: str = option("", "caption of images that have none")
    num_references: int = option(
        UNSET, "reference images of each sample (default: 1; 9 with --min-images-per-subject)", ge=1, le=MAX_REFERENCES
    )
    reference_augmentation: float = option(0.0, "strength of the augmentation of references", ge=0, le=1)
    independent_reference_crop: bool = option(False, "crop references independently of the target")
    min_image_size: int = option(0, "images with a shorter side than this many pixels are skipped", ge=0, le=MAX_IMAGES)
    max_unreadable_fraction: float = option(0.1, "fraction of unreadable records that ends the run", ge=0, le=1)
    dataloader_num_workers: int = option(2, "threads that read and prepare images", ge=1, le=MAX_WORKERS)


@dataclass(frozen=True)
class SubjectConfig(Options):
    """References by subject."""

    min_images_per_subject: int | None = option(
        UNSET,
        "leave-one-out training: condition each image on other images of its subject; only subjects with at least so many images "
        "(default: each image is its own reference)",
        ge=2,
        le=MAX_IMAGES,
    )
    min_distinct_references: int = option(
        UNSET,
        "minimum number of distinct references per sample (default: 1 by subject, otherwise and for self-attention all)",
        ge=1,
        le=MAX_REFERENCES,
    )
    aggregation: str = option("auto", f"several references: {', '.join(AGGREGATIONS)} (default: the adapter's own, else concat)")
    test_fraction: float = option(
        UNSET, "fraction of the subjects held out for testing (default: a third; none of mini, which has a test split)", ge=0, lt=1
    )

    def check(self) -> None:
        if self.aggregation not in ("auto", *AGGREGATIONS):
            raise UserError(f"aggregation: expected one of auto, {', '.join(AGGREGATIONS)}; received {self.aggregation!r}")


@dataclass(frozen=True)
class FinetuningConfig(Options):
    """Per-subject methods."""

    class_noun: str = option("", f"what the subject is, for {', '.join(PER_SUBJECT_METHODS)}: cat, person")
    instance_token: str = option(UNSET, "identifier of the subject in prompts (default: sks, <subject> for Textual Inversion)")
    num_class_images: int = option(
        UNSET,
        "class images for prior preservation (DreamBooth), generated by the base model (default: 200, 16 on mini)",
        ge=0,
        le=MAX_IMAGES,
    )
    prior_loss_weight: float = option(1.0, "weight of the prior preservation loss", ge=0, le=1e6)
    class_data_dir: str | None = option(
        UNSET, "folder of the class images, for several runs (default: class/ in the run's folder)", path=True
    )


@dataclass(frozen=True)
class OptimizationConfig(Options):
    """Optimization."""

    max_train_steps: int = option(UNSET, "optimizer steps (default: 2500 on mini, 20000 elsewhere)", ge=1, le=MAX_STEPS, alias=("--steps",))
    train_batch_size: int = option(
        UNSET, "images per step and process (default: 48 on mini, 8 elsewhere)", ge=1, le=MAX_BATCH_SIZE, alias=("--batch-size",)
    )
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", ge=1, le=MAX_BATCH_SIZE)
    learning_rate: float = option(UNSET, "learning rate (default: 3e-3 on mini, 1e-4 elsewhere)", gt=0, le=100, alias=("--lr",))
    lr_scheduler: Literal["constant", "cosine", "linear"] = option(UNSET, "learning rate schedule (default: cosine on mini, else constant)")
    lr_warmup_steps: int = option(UNSET, "steps until the full learning rate (default: 100 on mini, else 0)", ge=0, le=MAX_STEPS)
    optimizer: Literal["adamw", "muon", "adamw8bit"] = option(UNSET, "optimizer (default: muon on mini, else adamw)")
    weight_decay: float = option(0.01, "weight decay of AdamW", ge=0, le=1e4)
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this; 0 for none", ge=0, le=1e9)
    ema_decay: float = option(UNSET, "decay of the weights' moving average, which is what is saved; 0 for none", ge=0, lt=1)


@dataclass(frozen=True)
class LossConfig(Options):
    """Loss."""

    text_drop_prob: float = option(UNSET, "probability that the text is dropped (default: 0.3 on mini, else 0.05)", ge=0, le=1)
    image_drop_prob: float = option(UNSET, "probability that the image is dropped (default: 0.05)", ge=0, le=1)
    both_drop_prob: float = option(UNSET, "probability that both are dropped (default: 0.05)", ge=0, le=1)
    timestep_sampling: Literal["uniform", "logit-normal"] = option(UNSET, "distribution of timesteps (default: logit-normal on mini)")
    snr_gamma: float = option(0.0, "γ of the min-SNR loss weight, usually 5; 0 for none", ge=0, le=1e6)
    noise_offset: float = option(0.0, "strength of the noise offset, usually 0.1; 0 for none", ge=0, le=10)

    def check(self) -> None:
        probabilities = [p or 0.0 for p in (self.text_drop_prob, self.image_drop_prob, self.both_drop_prob)]
        if sum(probabilities) > 1:
            received = " + ".join(f"{p:g}" for p in probabilities)
            raise UserError(f"text_drop_prob, image_drop_prob and both_drop_prob: expected at most 1 together, received {received}")


@dataclass(frozen=True)
class CheckpointConfig(Options):
    """Checkpoints."""

    checkpointing_steps: int = option(UNSET, "steps between two checkpoints (default: 500)", ge=1, le=MAX_STEPS)
    checkpoints_total_limit: int = option(UNSET, "checkpoints that are kept, the best aside (default: 2)", ge=1, le=MAX_STEPS)
    resume_from_checkpoint: Literal["latest", "never"] = option("latest", "latest continues the run in the folder; never starts anew")


@dataclass(frozen=True)
class ValidationConfig(Options):
    """Validation."""

    num_validation_images: int = option(UNSET, "validation images; 0 for none (default: 16)", ge=0, le=MAX_IMAGES)
    validation_steps: int = option(500, "steps between two validations", ge=1, le=MAX_STEPS)
    validation_num_inference_steps: int = option(20, "denoising steps of the validation images", ge=1, le=MAX_DENOISING_STEPS)
    clip_model: str | None = option(UNSET, "CLIP model for CLIP-I and CLIP-T: mini, a folder or hub id (default: mini's on mini)")


@dataclass(frozen=True)
class RuntimeConfig(Options):
    """Runtime."""

    mixed_precision: DType = option("auto", "data type of the frozen parts and of the computation")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    num_processes: int = option(1, "processes on this machine", ge=1, le=1024)
    deepspeed: bool = option(False, "DeepSpeed ZeRO-2: optimizer states and gradients are sharded among the processes")
    report_to: Literal["", "tensorboard", "wandb"] = option("", "tensorboard or wandb, in addition to the run's own page")
    sanity_check: bool = option(UNSET, "overfit one batch first and report what is wrong (default: yes)")
    seed: int = option(0, "seed of everything random", ge=0, le=MAX_SEED)


@dataclass(frozen=True)
class TrainConfig(Options):
    """Train an adapter."""

    method: str = option("ip-adapter", f"one of {', '.join(REFERENCE_METHODS)}; for a single subject {', '.join(PER_SUBJECT_METHODS)}")
    adapter: str | None = option(UNSET, "fine-tune this adapter instead of starting anew: a file, mini …", path=True)
    image_encoder: str | None = option(
        UNSET, "image encoder: a folder or hub id (default: the base model's or the adapter's own)", path=True
    )
    dataset: DataConfig = part(DataConfig)
    feature_cache: str | None = option(
        UNSET, "feature cache to train from; the data is encoded into it first where it is incomplete", path=True
    )
    subjects: SubjectConfig = part(SubjectConfig)
    finetuning: FinetuningConfig = part(FinetuningConfig)
    optimization: OptimizationConfig = part(OptimizationConfig)
    loss: LossConfig = part(LossConfig)
    validation: ValidationConfig = part(ValidationConfig)
    checkpointing: CheckpointConfig = part(CheckpointConfig)
    pipeline: PipelineConfig = part(PipelineConfig)
    runtime: RuntimeConfig = part(RuntimeConfig)
    output_dir: str = option("run", "folder of the run", alias=("-o",), path=True)

    def check(self) -> None:
        _check_method(self.method, (*REFERENCE_METHODS, *PER_SUBJECT_METHODS))
        references, by_subject = self.dataset.num_references, self.subjects.min_images_per_subject
        if (references or 1) > 1 and self.method not in MULTI_REFERENCE_METHODS:
            accepted = ", ".join(MULTI_REFERENCE_METHODS)
            raise UserError(f"num_references: {self.method} is conditioned on one; expected 1, or one of {accepted} as the method")
        if self.per_subject:
            self._check_per_subject()
        aggregation = self.subjects.aggregation
        if aggregation != "auto" and not METHODS[self.method].adapter_type:
            raise UserError(f"aggregation: {self.method} has its own; expected a method of the ip-adapter family")
        if (self.subjects.min_distinct_references or 1) > (references or (9 if by_subject else 1)):
            distinct = self.subjects.min_distinct_references
            raise UserError(f"min_distinct_references: expected at most num_references, received {distinct}")
        if aggregation == "self-attention" and (references or 9) != 9:
            raise UserError(f"num_references: self-attention aggregation needs exactly 9 references; received {references}")
        if self.runtime.deepspeed and self.optimization.ema_decay:
            raise UserError("ema_decay: not available under DeepSpeed, which holds the exact weights itself; remove it")

    def _check_per_subject(self) -> None:
        if not self.finetuning.class_noun:
            raise UserError(f"class_noun: {self.method} needs to know what the subject is, such as cat or person; received nothing")
        if self.feature_cache or self.adapter or self.subjects.min_images_per_subject:
            raise UserError(
                f"{self.method} is fine-tuned on the images of one subject; remove feature_cache, adapter and min_images_per_subject"
            )

    def find_unused(self) -> Iterator[str]:
        if not self.per_subject:
            names = self.given("class_noun", "instance_token", "num_class_images", "prior_loss_weight", "class_data_dir")
            yield from (f"{name}: has an effect with {', '.join(PER_SUBJECT_METHODS)} only, not with {self.method}" for name in names)
        elif self.method == "inversion":
            names = self.given("num_class_images", "prior_loss_weight", "class_data_dir")
            yield from (f"{name}: has no effect with Textual Inversion, which has no prior preservation" for name in names)
        if self.per_subject:
            names = self.given("image_encoder", "image_drop_prob", "both_drop_prob", "reference_augmentation", "independent_reference_crop")
            yield from (f"{name}: has no effect with {self.method}, which is conditioned on no image" for name in names)
        if not self.subjects.min_images_per_subject and self.given("test_fraction"):
            yield "test_fraction: has an effect with data by subject only; give --min-images-per-subject"
        if self.validation.num_validation_images == 0:
            names = self.given("validation_steps", "validation_num_inference_steps", "clip_model")
            yield from (f"{name}: has no effect with --num-validation-images 0" for name in names)

    @property
    def per_subject(self) -> bool:
        """Whether the method is fine-tuned on a single subject."""
        return self.method in PER_SUBJECT_METHODS

    def with_defaults(self) -> "TrainConfig":
        """A copy in which every option that depends on others is filled in; an option that was given is never overridden."""
        mini = self.pipeline.is_mini
        defaults = _COMMON_DEFAULTS | (_MINI_DEFAULTS if mini else _PAPER_DEFAULTS)
        if self.per_subject:
            defaults |= _PER_SUBJECT_DEFAULTS | _METHOD_DEFAULTS[self.method, mini]
        if self.runtime.deepspeed:
            defaults |= {"ema_decay": 0.0} | (_MINI_ADAM_DEFAULTS if mini else {})
        elif mini and ((self.optimization.optimizer or "").startswith("adamw") or self.runtime.mixed_precision == "float16"):
            defaults |= _MINI_ADAM_DEFAULTS
        by_subject = self.subjects.min_images_per_subject
        references = self.dataset.num_references or (9 if by_subject else 1)
        varying = bool(by_subject) and self.subjects.aggregation != "self-attention"
        return self.fill_unset(defaults | {
            "num_references": references,
            "min_distinct_references": 1 if varying else references,
            "test_fraction": 0.0 if is_mini_data(self.dataset.data) else 1 / 3,
        })  # fmt: skip

    def encode_config(self) -> "EncodeConfig":
        """What fills the feature cache of this run; by subject, samples are put together from single references."""
        shared = self.dataset.to_options() | self.pipeline.to_options()
        shared |= {name: getattr(self, name) for name in ("method", "image_encoder")}
        shared |= {name: getattr(self.runtime, name) for name in ("mixed_precision", "num_processes", "seed")}
        if self.subjects.min_images_per_subject:
            shared["num_references"] = 1
        return EncodeConfig.from_options(**shared, output_dir=self.feature_cache or "cache")


@dataclass(frozen=True)
class EncodeDataConfig(DataConfig):
    """Data."""

    data: str = option("mini", _DATA_HELP, positional=True, path=True)


@dataclass(frozen=True)
class EncodeConfig(Options):
    """Encode data into a feature cache for training."""

    dataset: EncodeDataConfig = part(EncodeDataConfig)
    output_dir: str = option("cache", "folder of the cache; one begun there is continued", positional=True, path=True)
    method: str = option("ip-adapter", f"what it is for, one of {', '.join(REFERENCE_METHODS)}: the features that it reads are stored")
    image_encoder: str | None = option(
        UNSET, "image encoder: a folder or hub id (default: the base model's own, or the releases')", path=True
    )
    batch_size: int = option(UNSET, "images encoded at a time (default: 64 on mini, 8 elsewhere)", ge=1, le=MAX_BATCH_SIZE)
    pipeline: PipelineConfig = part(PipelineConfig)
    mixed_precision: DType = option("auto", "data type that the encoders compute in")
    num_processes: int = option(1, "processes on this machine", ge=1, le=1024)
    seed: int = option(0, "seed of crops, flips and augmentation", ge=0, le=MAX_SEED)

    def check(self) -> None:
        _check_method(self.method, REFERENCE_METHODS)

    def with_defaults(self) -> "EncodeConfig":
        """A copy in which every option that depends on others is filled in."""
        return self.fill_unset({"batch_size": 64 if self.pipeline.is_mini else 8, "num_references": 1})


@dataclass(frozen=True)
class ValidateDataConfig(Options):
    """Analyze training data and report what is wrong with it."""

    data: str = option("mini", _DATA_HELP, positional=True, path=True)
    output_dir: str = option("data-report", "folder of the report", alias=("-o",), path=True)
    min_image_size: int = option(512, "images with a shorter side than this many pixels are reported as too small", ge=0, le=MAX_IMAGES)
    dataloader_num_workers: int = option(2, "threads that read images", ge=1, le=MAX_WORKERS)


def is_mini_data(data: str) -> bool:
    """Whether the data is the embedded world: mini, mini:1000, mini:1000x10."""
    return bool(re.match("mini(:|$)", data))


def _check_method(method: str, accepted: tuple[str, ...]) -> None:
    if method not in accepted:
        raise UserError(f"method: expected one of {', '.join(accepted)}; received {method!r}")
