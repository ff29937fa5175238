"""The evaluation: every row is generated from the same samples with the same seeds, and measured by the same feature extractors.

The work is divided into chunks of prompts that do not depend on the number of processes, nor on what was finished before an
interruption; neither do the images and the table.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from imprompt.config import PER_SUBJECT_METHODS, EvaluateConfig
from imprompt.config.training import is_mini_data
from imprompt.data.loader import READ_ERRORS
from imprompt.errors import ImageError, UserError, summarize_error
from imprompt.evaluation import metrics
from imprompt.evaluation.features import FeatureExtractors
from imprompt.evaluation.identity import IdentityEncoder, IdentityGallery, load_identity_encoder, load_or_build_gallery
from imprompt.evaluation.samples import EvalSample, SamplingParams, SubjectEvalSet, load_eval_set
from imprompt.evaluation.scoring import RowFeatures
from imprompt.evaluation.store import ImageId, RowStore, check_or_write_protocol, folder_name
from imprompt.evaluation.systems import (
    BUILT_IN_ROWS,
    NOT_GENERATED,
    MethodSystem,
    PerSubjectSystem,
    System,
    SystemLoader,
    check_source,
    parse_label,
    split_aggregation,
)
from imprompt.evaluation.workers import process_pool
from imprompt.methods.prompt_templates import insert_subject_token
from imprompt.models import hub
from imprompt.models.base_pipelines import check_size, native_resolution, use_scheduler
from imprompt.utils.files import check_or_write_manifest, ensure_writable_folder

EVALUATION_SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class EvalRow:
    """One row of the table."""

    name: str  # its label
    source: str
    prompt_mode: str  # none, caption, or other: the caption of another sample
    num_samples: int  # images for each prompt
    num_prompts: int
    scale: float = 1.0
    sweep_of: str = ""  # the row whose scale sweep this is a point of
    num_references: int = 0  # references of a subject that are used; 0 for all


class EvaluationProgress(NamedTuple):
    """Progress of an evaluation."""

    row: str
    done: int  # chunks
    total: int
    images_per_second: float


def built_in_row(source: str, num_prompts: int, num_samples: int = 1) -> EvalRow:
    """A row of BUILT_IN_ROWS."""
    prompt_mode = "none" if source in NOT_GENERATED else "caption"
    return EvalRow(BUILT_IN_ROWS[source], source, prompt_mode, num_samples, num_prompts)


def scale_sweep_rows(source: str, num_prompts: int) -> list[EvalRow]:
    """The points of an adapter's scale sweep, with the caption of another sample as prompt."""
    name = parse_label(source)[0]
    return [EvalRow(f"{name} λ {scale}", source, "other", 1, num_prompts, scale, name) for scale in EVALUATION_SCALES]


class Evaluation:
    """What one process needs to evaluate rows: samples, feature extractors, and the system of the current row."""

    def __init__(self, config: EvaluateConfig):
        self.dataset, self.sampling, self.metrics = config.dataset, config.sampling, config.metrics
        self.sources, self.swept_sources = (*config.adapter, *config.baseline), config.adapter if config.sampling.scale_sweep else ()
        self.loader, self.output_dir = SystemLoader.from_config(config), Path(config.output_dir)
        self.eval_set = load_eval_set(config.dataset)
        self._current: tuple[str, System] | None = None

    @cached_property
    def rows(self) -> list[EvalRow]:
        """The rows of the table, from top to bottom, and the points of the scale sweeps. Raises UserError for equal names."""
        num_prompts, num_samples = len(self.eval_set), self.sampling.num_images_per_prompt
        built_in = ["copy", *["real"] * self.eval_set.has_other_images, *["reference"] * self.by_subject]
        rows = [built_in_row(source, num_prompts) for source in built_in]
        rows.append(built_in_row("text", num_prompts, num_samples))
        for source in dict.fromkeys(self.sources):
            if source not in BUILT_IN_ROWS:
                name = parse_label(source)[0]
                rows.append(EvalRow(name, source, self.sampling.prompt_mode, num_samples, num_prompts, self.sampling.scale))
        folders = [folder_name(row.name) for row in rows]
        if duplicates := [row.name for row, folder in zip(rows, folders, strict=True) if folders.count(folder) > 1]:
            raise UserError(f"two rows are called {duplicates[0]!r}; name them: --adapter NAME=FILE")
        for source in dict.fromkeys(self.swept_sources):
            rows += scale_sweep_rows(source, min(self.sampling.scale_sweep, num_prompts))
        return rows

    @property
    def by_subject(self) -> bool:
        """Whether samples have several images of a subject, one of which is the target."""
        return self.dataset.min_images_per_subject is not None

    @cached_property
    def extractors(self) -> FeatureExtractors:
        """The feature extractors of the metrics."""
        return FeatureExtractors(self.metrics, self.loader.device)

    @cached_property
    def identity_encoder(self) -> IdentityEncoder | None:
        """The encoder of the identity metrics; None where there are none."""
        source = self.metrics.identity_encoder
        return load_identity_encoder(source, self.loader.device) if source not in (None, "none") and self.eval_set.subjects else None

    @cached_property
    def gallery(self) -> IdentityGallery | None:
        """The embedded subjects, stored with the evaluation; None without identity metrics."""
        if self.identity_encoder is None:
            return None
        assert isinstance(self.eval_set, SubjectEvalSet)
        return load_or_build_gallery(self.output_dir / "gallery.safetensors", self.identity_encoder, self.eval_set)

    @cached_property
    def resolution(self) -> int:
        """The side of the images in pixels."""
        side = self.sampling.resolution or native_resolution(self.loader.pipe)
        check_size(self.loader.pipe, side, side)
        return side

    def load_system(self, source: str) -> System:
        """The system of a row. The last one stays in memory."""
        if self._current is None or self._current[0] != source:
            self._current = None
            self._current = source, self.loader.load_system(source)
        return self._current[1]

    def row_store(self, row: EvalRow) -> RowStore:
        """The files of a row."""
        return RowStore(self.output_dir, row.name)

    def load_features(self, row: EvalRow) -> RowFeatures:
        """The features of a row that is finished."""
        return RowFeatures(self.row_store(row), self.num_chunks(row))

    def check_before_run(self, rows: Sequence[EvalRow]) -> None:
        """Load every model once, so that what does not fit is reported before any work. Raises UserError."""
        blank = Image.new("RGB", (self.resolution, self.resolution))
        self.extractors.extract_features([blank])
        _ = self.gallery
        sources = dict.fromkeys(row.source for row in rows if row.source not in NOT_GENERATED)
        for source in sources:
            system = self.load_system(source)
            if isinstance(system, MethodSystem):
                system.check_before_run((self.metrics.identity_encoder or "none") if self.eval_set.subjects else "none")
        if sources:
            with use_scheduler(self.loader.pipe, self.sampling.scheduler, self.sampling.num_inference_steps):
                pass  # the scheduler has so many steps

    def write_manifests(self, rows: Sequence[EvalRow]) -> None:
        """Record what the evaluation and its rows are. Raises UserError where the folder holds something else."""
        check_or_write_protocol(self.output_dir, self.protocol)
        for row in rows:
            path = self.row_store(row).folder / "row.json"
            check_or_write_manifest(path, row_manifest(row), f"row {row.name} in {self.output_dir}")

    def num_chunks(self, row: EvalRow) -> int:
        """Number of chunks that a row is divided into."""
        return -(-row.num_prompts // self.prompts_per_chunk(row))

    def prompts_per_chunk(self, row: EvalRow) -> int:
        """Number of prompts in a chunk. Those of one subject share a chunk where every subject has as many targets."""
        targets, batch_size = self.dataset.targets_per_subject, self.sampling.batch_size
        assert batch_size is not None
        return max(1, batch_size // row.num_samples // targets) * targets

    def run_chunk(self, row: EvalRow, chunk: int) -> int:
        """Generate the images of a chunk, extract their features and store both. Returns the number of images."""
        if row.source not in NOT_GENERATED:
            self.load_system(row.source)  # not part of the time below
        samples, skipped = self._load_samples(row, chunk)
        if not samples:
            self.row_store(row).write_chunk(chunk, {}, skipped)
            return 0
        image_ids = [self._image_id(prompt, sample) for prompt in samples for sample in range(row.num_samples)]
        start, finetuned_before = time.perf_counter(), self._finetune_seconds()
        images = self._real_images(row, samples) if row.source in NOT_GENERATED else self._generate(row, samples, image_ids)
        finetune_seconds = self._finetune_seconds() - finetuned_before
        generation_seconds = time.perf_counter() - start - finetune_seconds
        tensors = self._extract(row, samples, images, image_ids)
        tensors |= {"generation_seconds": torch.tensor([generation_seconds]), "finetune_seconds": torch.tensor([finetune_seconds])}
        self.row_store(row).save_images(images, image_ids)
        self.row_store(row).write_chunk(chunk, tensors, skipped)
        return len(images)

    def _load_samples(self, row: EvalRow, chunk: int) -> tuple[dict[int, EvalSample], dict[str, str]]:
        """The samples of a chunk, by index, with the references that the row uses; and the reasons why others are skipped."""
        samples, skipped, size = dict[int, EvalSample](), dict[str, str](), self.prompts_per_chunk(row)
        for i in range(chunk * size, min(row.num_prompts, (chunk + 1) * size)):
            try:
                sample = self.eval_set[i]
                if row.source == "real":
                    sample = sample._replace(references=(self.eval_set.another_image(i),))
            except READ_ERRORS as error:
                skipped[str(i)] = summarize_error(error)
                continue
            try:
                samples[i] = self._select_references(row, sample)
            except ImageError as error:
                skipped[str(i)] = summarize_error(error)
        return samples, skipped

    def _select_references(self, row: EvalRow, sample: EvalSample) -> EvalSample:
        """The sample with the references that the row uses. Raises ImageError where it can use none."""
        sample = sample._replace(references=sample.references[: row.num_references or None])
        system = None if row.source in NOT_GENERATED else self.load_system(row.source)
        return system.keep_usable_references(sample) if isinstance(system, MethodSystem) else sample

    def _image_id(self, prompt: int, sample: int) -> ImageId:
        return ImageId(prompt, sample, self.sampling.seed + prompt * self.sampling.num_images_per_prompt + sample)

    def _finetune_seconds(self) -> float:
        """The time that the current system has spent on fine-tuning."""
        system = self._current[1] if self._current else None
        return system.finetune_seconds if isinstance(system, PerSubjectSystem) else 0.0

    def _real_images(self, row: EvalRow, samples: dict[int, EvalSample]) -> list[Image.Image]:
        """The images of a row that is not generated: targets, or references, another one for each target of a subject."""
        index = {i: i % self.dataset.targets_per_subject % len(sample.references) for i, sample in samples.items()}
        images = [sample.target if row.source == "copy" else sample.references[index[i]] for i, sample in samples.items()]
        return [image.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS) for image in images]

    def _generate(self, row: EvalRow, samples: dict[int, EvalSample], image_ids: Sequence[ImageId]) -> list[Image.Image]:
        steps, guidance_scale = self.sampling.num_inference_steps, self.sampling.guidance_scale or 0.0
        params = SamplingParams(steps, guidance_scale, (self.resolution, self.resolution), row.scale)
        prompts, seeds = [self._prompt(row, image_id.prompt) for image_id in image_ids], [image_id.seed for image_id in image_ids]
        return self.load_system(row.source).generate([samples[image_id.prompt] for image_id in image_ids], prompts, seeds, params)

    def _prompt(self, row: EvalRow, i: int) -> str:
        """The text prompt of sample i in this row."""
        prompts = self.eval_set.prompts
        match row.prompt_mode:
            case "none":
                return ""
            case "caption":
                return prompts[i]
        others = (prompts[(i + n) % len(prompts)] for n in range(1, len(prompts)))
        return next((other for other in others if other != prompts[i]), prompts[i])

    def _extract(
        self, row: EvalRow, samples: dict[int, EvalSample], images: list[Image.Image], image_ids: Sequence[ImageId]
    ) -> dict[str, Tensor]:
        """Features of generated images, their scores, and which prompt, seed and group each belongs to."""
        features = self.extractors.extract_features(images)
        targets = self.extractors.extract_features([sample.target for sample in samples.values()])
        targets = {name: value.repeat_interleave(row.num_samples, 0) for name, value in targets.items()}
        compared_prompts = [self._prompt(row, i) if row.prompt_mode == "other" else self.eval_set.prompts[i] for i, _, _ in image_ids]
        text_embeds = self.extractors.encode_text(compared_prompts)
        has_prompt = torch.tensor([bool(prompt.strip()) for prompt in compared_prompts])
        scores = {
            "CLIP-I": metrics.cosine_similarity(features["clip_embeds"], targets["clip_embeds"]),
            "CLIP-T": metrics.cosine_similarity(features["clip_embeds"], text_embeds).where(has_prompt, torch.nan),
            "feature cosine": metrics.cosine_similarity(features["features"], targets["features"]),
        }
        if "patches" in features:
            scores["self-sim. distance"] = metrics.self_similarity_distance(features.pop("patches"), targets.pop("patches"))
        if self.extractors.lpips:
            scores["LPIPS"] = self.extractors.lpips(images, [samples[i].target for i, _, _ in image_ids])
        if self.identity_encoder is not None:
            features["id_embeds"], features["has_id_embed"] = self.identity_encoder.embed(images)
        index = {"prompt_index": [i for i, _, _ in image_ids], "seed": [seed for _, _, seed in image_ids]}
        index["group"] = [self.eval_set.group_index(i) for i, _, _ in image_ids]
        tensors = {name: torch.tensor(values) for name, values in index.items()}
        return {f"score.{name}": value for name, value in scores.items()} | features | tensors

    @property
    def protocol(self) -> dict[str, object]:
        """Everything that all rows have in common and that changes metrics: printed with every table."""
        dataset, sampling, pipeline = self.dataset, self.sampling, self.loader.pipeline
        return {
            "model": pipeline.model, "model files": model_fingerprint(pipeline.model),
            "data": dataset.data if is_mini_data(dataset.data) else str(Path(dataset.data).absolute()),
            "prompts": len(self.eval_set), "captions and images": self.eval_set.fingerprint,
            "images per prompt": sampling.num_images_per_prompt, "references": "square, center crop", "first seed": sampling.seed,
            "seed": "first seed + prompt × images per prompt + sample", "resolution": self.resolution, "scheduler": sampling.scheduler,
            "inference steps": sampling.num_inference_steps, "guidance scale": sampling.guidance_scale,
            "prompt mode": sampling.prompt_mode, "scale": sampling.scale, "batch size": sampling.batch_size,
            "dtype": str(self.loader.dtype).removeprefix("torch."), "device": torch.device(self.loader.device).type,
            "image encoder": self.loader.image_encoder or "each adapter's own", "CLIP model": self.metrics.clip_model,
            "feature extractor": self.metrics.feature_extractor, "LPIPS": self.metrics.lpips, "CLIP-T": "cosine, not clamped, × 1",
            **(self._subject_protocol() if self.by_subject else {}),
            **{name: version(name) for name in ("imprompt", "torch", "diffusers", "transformers", "torchmetrics")},
        }  # fmt: skip

    def _subject_protocol(self) -> dict[str, object]:
        """The part of the protocol that concerns data by subject."""
        dataset, finetuning = self.dataset, self.loader.finetuning
        num_class_images = finetuning.num_class_images
        return {
            "subjects": len(self.eval_set.subjects), "references per subject": dataset.num_references,
            "targets per subject": dataset.targets_per_subject, "subject split": dataset.subject_split or "none",
            "class noun": dataset.class_noun or "none", "identity encoder": self.metrics.identity_encoder,
            "fine-tuning steps": finetuning.finetune_steps or "each method's own",
            "class images": "each method's own" if num_class_images is None else num_class_images,
        }  # fmt: skip


def run_evaluation(config: EvaluateConfig) -> Iterator[EvaluationProgress]:
    """Generate and measure every chunk that is missing. Raises UserError for unusable settings, before any work."""
    config = config.with_defaults()
    ensure_writable_folder(config.output_dir)
    _check_sources((*config.adapter, *config.baseline), by_subject=config.dataset.min_images_per_subject is not None)
    evaluation = Evaluation(config)
    _check_sample_counts(evaluation)
    _check_per_subject_prompts(evaluation)
    rows = evaluation.rows
    evaluation.check_before_run(rows)
    evaluation.write_manifests(rows)
    chunks = [(row, chunk) for row in rows for chunk in range(evaluation.num_chunks(row))]
    missing = [(row, chunk) for row, chunk in chunks if not evaluation.row_store(row).has_chunk(chunk)]
    done, num_images, start = len(chunks) - len(missing), 0, time.monotonic()
    for row_name, count in _run_chunks(config, evaluation, missing):
        done, num_images = done + 1, num_images + count
        yield EvaluationProgress(row_name, done, len(chunks), num_images / (time.monotonic() - start))


def _check_sources(sources: Sequence[str], *, by_subject: bool) -> None:
    """Raise UserError for sources that cannot be rows of this evaluation."""
    for source in sources:
        check_source(source)
        if source == "reference" and not by_subject:
            raise UserError(
                "the row 'reference' exists only with --min-images-per-subject; without it, each target is its own reference, "
                "and the row 'copy' is the same"
            )
        if parse_label(source)[1] in PER_SUBJECT_METHODS and not by_subject:
            raise UserError(
                f"{source} is fine-tuned on several images of a subject: say how many each has at least, --min-images-per-subject 10"
            )


def _check_sample_counts(evaluation: Evaluation) -> None:
    """Raise UserError where there are too few samples for confidence intervals."""
    if len(evaluation.eval_set) < 2:
        raise UserError(f"expected at least 2 prompts (a confidence interval needs two), received {len(evaluation.eval_set)}")
    if evaluation.by_subject and len(evaluation.eval_set.subjects) < 2:
        raise UserError("expected at least 2 subjects (a confidence interval and identification need two), received 1")


def _check_per_subject_prompts(evaluation: Evaluation) -> None:
    """Raise UserError, before any fine-tuning, where a prompt does not name the subject that a per-subject method generates."""
    per_subject = [source for source in evaluation.sources if parse_label(source)[1] in PER_SUBJECT_METHODS]
    if not per_subject or not isinstance(evaluation.eval_set, SubjectEvalSet):
        return
    if evaluation.sampling.prompt_mode == "none":
        raise UserError(f"{per_subject[0]} needs a prompt that names the subject: add --prompt-mode caption")
    if not evaluation.dataset.class_noun and not is_mini_data(evaluation.dataset.data):
        raise UserError(f"class_noun: {per_subject[0]} needs to know what the subjects are, such as person; received nothing")
    for i, prompt in enumerate(evaluation.eval_set.prompts):
        insert_subject_token(prompt, evaluation.eval_set.class_noun(i), "sks")


def _run_chunks(config: EvaluateConfig, evaluation: Evaluation, chunks: list[tuple[EvalRow, int]]) -> Iterator[tuple[str, int]]:
    """Run chunks here, or in several processes with workers of their own; yields the row's name and the number of images."""
    if config.num_processes == 1 or len(chunks) < 2:
        for row, chunk in chunks:
            yield row.name, evaluation.run_chunk(row, chunk)
        return
    with process_pool(min(config.num_processes, len(chunks)), Evaluation, config) as processes:
        pending = {processes.submit(Evaluation.run_chunk, row, chunk): row.name for row, chunk in chunks}
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()


def model_fingerprint(model: str) -> str:
    """A checksum of the names and sizes of a local folder's files; "by name" for other models."""
    files = sorted(p for p in Path(model).rglob("*") if p.is_file()) if Path(model).is_dir() else []
    return f"{zlib.crc32(' '.join(f'{p.name} {p.stat().st_size}' for p in files).encode()):08x}" if files else "by name"


def row_manifest(row: EvalRow) -> dict[str, object]:
    """What identifies a row; a file is identified by its checksum."""
    source, aggregation = split_aggregation(parse_label(row.source)[1])
    path = hub.resolve_adapter(source)[0] if source in hub.BUNDLED_ADAPTERS else Path(source)
    manifest: dict[str, object] = {"source": path.name, "checksum": zlib.crc32(path.read_bytes())} if path.is_file() else {"source": source}
    manifest |= {"aggregation": aggregation} if aggregation else {}
    manifest |= {"prompt mode": row.prompt_mode, "images per prompt": row.num_samples, "prompts": row.num_prompts, "scale": row.scale}
    return manifest | ({"references": row.num_references} if row.num_references else {})
