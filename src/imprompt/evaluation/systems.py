"""The systems of a comparison, from what a user names: an adapter, a checkpoint, a diffusers pipeline, or a built-in row."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, Self

import torch
from PIL import Image

from imprompt.config import METHODS, MULTI_REFERENCE_METHODS, PER_SUBJECT_METHODS, TRAINING_FREE_AGGREGATIONS, TrainConfig
from imprompt.config.common import PipelineConfig
from imprompt.config.evaluation import EvaluateConfig, EvaluationFinetuningConfig, EvaluationSamplingConfig
from imprompt.errors import ImageError, UserError
from imprompt.evaluation.external import is_external, load_external
from imprompt.evaluation.samples import EvalSample, SamplingParams
from imprompt.methods import Method, build_method
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.inversion import TextualInversion
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.methods.loading import load_method
from imprompt.models import hub
from imprompt.models.base_pipelines import load_pipeline, resolve_dtype, sample_images, set_device, use_scheduler
from imprompt.models.face_encoders import FaceEncoder
from imprompt.models.tensor_files import ADAPTER_SUFFIXES
from imprompt.utils.protocols import UNetPipeline

BUILT_IN_ROWS = {  # source of a row → its label
    "copy": "target (upper bound)",
    "real": "another real image",
    "reference": "one reference, returned",
    "text": "text only",
}
COPY_BASELINE = "copy"  # the row whose images are the target images themselves
NOT_GENERATED = (COPY_BASELINE, "real", "reference")  # these rows contain real images


class System(Protocol):
    """One row of a comparison: generates images from reference images and prompts."""

    @property
    def name(self) -> str:
        """The label of its row."""
        ...

    @property
    def trainable_params(self) -> int | None:
        """Number of parameters that were trained for image prompts; None where it is unknown."""
        ...

    def generate(
        self, samples: Sequence[EvalSample], prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams
    ) -> list[Image.Image]:
        """One image for each sample, with its prompt and seed. An image does not depend on the others of the call."""
        ...


@dataclass(frozen=True)
class TextOnlyBaseline:
    """The base model without an image prompt."""

    pipe: UNetPipeline = field(repr=False)
    scheduler: str
    name: str = BUILT_IN_ROWS["text"]
    trainable_params: int | None = 0

    def generate(
        self, samples: Sequence[EvalSample], prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams
    ) -> list[Image.Image]:
        """One image for each sample, from its prompt and seed alone."""
        with use_scheduler(self.pipe, self.scheduler, params.num_inference_steps):
            return _sample(self.pipe, prompts, seeds, params)


@dataclass(frozen=True)
class MethodSystem:
    """A trained method of this package on a base model."""

    pipe: UNetPipeline = field(repr=False)
    method: Method = field(repr=False)
    scheduler: str
    name: str
    trainable_params: int | None
    format_prompt: Callable[[str], str] = field(default=str, repr=False)  # inserts the subject into a prompt

    def check_before_run(self, identity_encoder: str) -> None:
        """Raise UserError where its image encoder is not installed, or where the identity metric uses the same one."""
        encoder = self.method.encoder
        if not isinstance(encoder, FaceEncoder):
            return
        if identity_encoder == "insightface":
            raise UserError(
                f"identity_encoder: {self.name} is conditioned on InsightFace embeddings, so InsightFace cannot measure its identity; "
                "expected another encoder: --identity-encoder facenet, or none"
            )
        encoder.has_face([Image.new("RGB", (64, 64))])

    def keep_usable_references(self, sample: EvalSample) -> EvalSample:
        """The sample with the references that the encoder can use, repeated from the first. Raises ImageError where there is none.

        In an evaluation a reference in which no face is detected is skipped, as one that cannot be opened is.
        """
        encoder = self.method.encoder
        if not isinstance(encoder, FaceEncoder):
            return sample
        usable = [image for image, has_face in zip(sample.references, encoder.has_face(sample.references), strict=True) if has_face]
        if not usable:
            raise ImageError(f"no face was detected in the {len(sample.references)} reference(s) of {sample.key}")
        return sample._replace(references=tuple(usable[n % len(usable)] for n in range(len(sample.references))))

    @torch.no_grad()
    def generate(
        self, samples: Sequence[EvalSample], prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams
    ) -> list[Image.Image]:
        """One image for each sample, with the references that the method can use."""
        method, device = self.method, self.pipe.unet.device
        num_references = len(samples[0].references) if method.name in MULTI_REFERENCE_METHODS else 1
        references = [sample.references[:num_references] for sample in samples]  # encoded one by one, as `generate` does
        features = torch.stack([method.encoder.encode_images(images, patches=method.uses_patch_features) for images in references])
        with (
            method.apply_to(self.pipe, features.to(device), method.uncond_features()[None].to(device), params.scale),
            use_scheduler(self.pipe, self.scheduler, params.num_inference_steps),
        ):
            return _sample(self.pipe, [self.format_prompt(prompt) for prompt in prompts], seeds, params)


def _sample(pipe: UNetPipeline, prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams) -> list[Image.Image]:
    width, height = params.size
    return sample_images(pipe, prompts, params.num_inference_steps, seeds, (height, width), params.guidance_scale)


class PerSubjectSystem:
    """A method that is fine-tuned on the references of each subject before it generates: DreamBooth, Textual Inversion.

    The weights are discarded once the subject's images are generated. `finetune_seconds` is the time spent on fine-tuning so far.
    """

    def __init__(self, method: str, name: str, loader: "SystemLoader"):
        self.method, self.name, self.loader = method, name, loader
        self.finetune_seconds = 0.0
        self.trainable_params: int | None = sum(p.numel() for p in build_method(method, loader.pipe).module.parameters())

    def generate(
        self, samples: Sequence[EvalSample], prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams
    ) -> list[Image.Image]:
        """One image for each sample, subject by subject."""
        images: dict[int, Image.Image] = {}
        for subject in dict.fromkeys(sample.subject for sample in samples):
            indices = [n for n, sample in enumerate(samples) if sample.subject == subject]
            with TemporaryDirectory() as folder:
                system = self.finetune(samples[indices[0]], Path(folder))
                generated = system.generate(
                    [samples[n] for n in indices], [prompts[n] for n in indices], [seeds[n] for n in indices], params
                )
            images |= dict(zip(indices, generated, strict=True))
        return [images[n] for n in range(len(samples))]

    def finetune(self, sample: EvalSample, folder: Path) -> MethodSystem:
        """The method after fine-tuning on a sample's references. The seed of the training depends on the subject's name."""
        from imprompt.training import train_adapter

        loader = self.loader
        (folder / "references").mkdir()
        for n, image in enumerate(sample.references):
            image.save(folder / "references" / f"{n:03}.png")
        subject_seed = zlib.crc32(sample.subject.encode("utf-8", "surrogateescape")) % 10_000
        config = TrainConfig.from_options(
            data=str(folder / "references"), model=loader.pipeline.model, method=self.method, class_noun=sample.class_noun,
            output_dir=str(folder / "run"), seed=loader.sampling.seed + subject_seed, device=loader.pipeline.device,
            dataloader_num_workers=1, max_train_steps=loader.finetuning.finetune_steps,
            num_class_images=loader.finetuning.num_class_images, class_data_dir=loader.class_data_dir,
        )  # fmt: skip
        start = time.perf_counter()
        for _ in train_adapter(config):
            pass
        self.finetune_seconds += time.perf_counter() - start
        return loader.load_checkpoint(str(folder / "run" / "adapter.safetensors"), self.name)


@dataclass(frozen=True)
class SystemLoader:
    """Loads systems onto the base model of an evaluation."""

    pipeline: PipelineConfig
    sampling: EvaluationSamplingConfig
    finetuning: EvaluationFinetuningConfig
    image_encoder: str | None  # for all adapters; None for the default of each
    class_data_dir: str  # class images for prior preservation, shared by all subjects

    @classmethod
    def from_config(cls, config: EvaluateConfig) -> Self:
        """The loader of an evaluation, with the parts of its configuration that concern systems."""
        return cls(config.pipeline, config.sampling, config.finetuning, config.image_encoder, str(Path(config.output_dir) / "class"))

    @cached_property
    def device(self) -> str:
        """The device of this process."""
        return set_device(self.pipeline.device)

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the base model."""
        return resolve_dtype(self.sampling.dtype, torch.device(self.device).type, is_mini=self.pipeline.is_mini)

    @cached_property
    def pipe(self) -> UNetPipeline:
        """The base model, loaded once and shared by all systems."""
        return load_pipeline(self.pipeline.model, self.device, self.dtype, self.pipeline.model_config)

    def load_system(self, source: str) -> System:
        """The system that a source names. Raises UserError for a source that names none.

        `source` may begin with a label, NAME=SOURCE, and that of an adapter may end in an aggregation: SOURCE@average.
        """
        name, source = parse_label(source)
        source, aggregation = split_aggregation(source)
        if source == "text":
            return TextOnlyBaseline(self.pipe, self.sampling.scheduler, name)
        if source in PER_SUBJECT_METHODS:
            return PerSubjectSystem(source, name, self)
        if source not in METHODS and source not in hub.BUNDLED_ADAPTERS and not Path(source).is_file() and is_external(source):
            return load_external(source, self.device, self.dtype)
        system = self.load_checkpoint(source, name)
        if aggregation:
            if not isinstance(system.method, IPAdapter):
                raise UserError(f"{source} is no IP-Adapter; expected one before @{aggregation}")
            system.method.set_aggregator(aggregation)
        return system

    def load_checkpoint(self, source: str, name: str) -> MethodSystem:
        """A method with its weights."""
        method = load_method(source, self.pipe, self.pipeline.model, self.image_encoder)
        num_params = sum(p.numel() for p in method.module.parameters())
        format_prompt = method.format_prompt if isinstance(method, (DreamBooth, TextualInversion)) else str
        return MethodSystem(self.pipe, method, self.sampling.scheduler, name, num_params, format_prompt)


def parse_label(source: str) -> tuple[str, str]:
    """(label, source) of NAME=SOURCE; without a name, a label made from the source."""
    name, equals, rest = source.partition("=")
    if equals and name and "/" not in name and not Path(source).exists():
        return name, rest
    file, aggregation = split_aggregation(source)
    path = Path(file)
    if path.suffix in ADAPTER_SUFFIXES:
        label = (path.parent.name or path.stem) if path.stem in ("adapter", "best") else path.stem
        return label + (f"@{aggregation}" if aggregation else ""), source
    return BUILT_IN_ROWS.get(source) or source.rsplit("/", 1)[-1] or source, source


def split_aggregation(source: str) -> tuple[str, str]:
    """(adapter, aggregation) of ADAPTER@AGGREGATION; the aggregation is empty where the adapter's own is used."""
    adapter, _, aggregation = source.rpartition("@")
    return (adapter, aggregation) if aggregation in TRAINING_FREE_AGGREGATIONS else (source, "")


def check_source(source: str) -> None:
    """Raise UserError for a method that was not trained yet; other sources are checked when they are loaded."""
    source, _ = split_aggregation(parse_label(source)[1])
    if source in METHODS and source not in ("reference-only", *PER_SUBJECT_METHODS) and not Path(source).is_file():
        raise UserError(f"{source} is a method; train it first (imprompt train --method {source}), then name its adapter.safetensors")
