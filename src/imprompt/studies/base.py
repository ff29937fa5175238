"""Base of the studies. A study reproduces a paper's comparison on the embedded model: every row is trained, generated and scored.

OUT/cache-FEATURES/      cached features of the training images
OUT/train/ROW/           a run of `imprompt train`
OUT/evaluation…/         generated images and their features
OUT/finished/ROW.json    a finished row: all that the report needs; a study can be continued from these files alone
OUT/report/              table, claims, images
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image

from imprompt.config import METHODS, PER_SUBJECT_METHODS, EncodeConfig, EvaluateConfig, ReproduceConfig, TrainConfig
from imprompt.data.feature_cache import is_complete
from imprompt.errors import UserError, summarize_error
from imprompt.evaluation.metrics import pairwise_diversity
from imprompt.evaluation.report import check_numbers, image_strip, parse_score, score_row
from imprompt.evaluation.runner import EvalRow, Evaluation, built_in_row
from imprompt.evaluation.scoring import RowFeatures, RowScore
from imprompt.evaluation.systems import BUILT_IN_ROWS, NOT_GENERATED
from imprompt.models.base_pipelines import resolve_dtype, set_device
from imprompt.training import encode_dataset, log_steps, train_adapter
from imprompt.utils.files import atomic_path, ensure_writable_folder, read_json_object, write_file

SCHEDULER = "dpm++"  # on mini five to eight of its steps are as good as 25 of DDIM (docs/log.md)
GUIDANCE_SCALE = 3.0
CLIP_I, CLIP_T, FD, IS = "CLIP-I (mini)", "CLIP-T (mini)", "FD (mini)", "IS (mini)"  # labels of metrics
DIVERSITY, ID_SIMILARITY, RANK1_ACCURACY = "diversity", "ID similarity", "rank-1 ID acc."


@dataclass(frozen=True)
class RowId:
    """What identifies a row of a study. As text it is the row's label in tables and its key in files."""

    method: str  # a method, an aggregation, or a key of BUILT_IN_ROWS
    seed: int | None = None  # training seed, in a study that trains with several
    references: int | None = None  # reference images per subject, where not the study's usual number
    scale: float | None = None  # λ, where the row is a point of a sweep over it
    custom_model: bool = False  # on the custom base model instead of mini
    sweep: bool = False  # a point of a sweep: fewer prompts, one image each

    def __str__(self) -> str:
        parts = [BUILT_IN_ROWS.get(self.method, self.method)]
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        if self.references is not None:
            parts.append(f"{self.references} ref{'s' if self.references > 1 else ''}")
        if self.scale is not None:
            parts.append(f"λ {self.scale:g}")
        if self.custom_model:
            parts.append("custom model")
        return ", ".join(parts) + (" (sweep)" if self.sweep else "")

    @property
    def needs_other_row(self) -> bool:
        """Whether the row needs what another job finishes first: the weights of another row, or the custom model."""
        return self.sweep or self.custom_model or None not in (self.seed, self.references)

    @property
    def slug(self) -> str:
        """The label as the name of files and folders."""
        return re.sub(r"[^a-z0-9.]+", "-", str(self).replace("λ", "scale")).strip("-")


class StudyProgress(NamedTuple):
    """Progress of one row's stage; with an empty `row`, of the jobs of the whole study."""

    row: str
    stage: str
    done: int
    total: int


class RowResult(NamedTuple):
    """A finished row: everything that the report needs of it."""

    score: RowScore
    minutes: dict[str, float]  # of training, generation and per-subject fine-tuning
    per_prompt: dict[str, list[float]]  # metric → its mean over the images of each prompt
    protocol: dict[str, Any]


Job = methodcaller  # of a method of Study that returns what it did; picklable


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every trained row gets, and what all rows are measured on; each study adds its own numbers."""

    max_train_steps: int
    train_batch_size: int
    num_train_images: int  # distinct images of mini's training set
    num_prompts: int
    num_images_per_prompt: int
    num_inference_steps: int  # of SCHEDULER


class Study(ABC):
    """The rows of one paper's comparison and the jobs that finish them. Every paper has a subclass."""

    budgets: ClassVar[Mapping[str, Budget]]

    def __init__(self, config: ReproduceConfig, on_progress: Callable[[StudyProgress], None] = lambda progress: None):
        self.config, self.out, self.on_progress = config, Path(config.output_dir), on_progress
        self.budget = self.budgets[config.budget]
        self._evaluations: dict[str, Evaluation] = {}

    @property
    @abstractmethod
    def train_data(self) -> str:
        """The data of every training."""

    @abstractmethod
    def row_ids(self) -> list[RowId]:
        """Every row that the configuration asks for."""

    @abstractmethod
    def method_row(self, row_id: RowId) -> EvalRow:
        """How a row that is not a baseline is generated."""

    @abstractmethod
    def train_config(self, row_id: RowId) -> TrainConfig | None:
        """The training that the row needs, or None."""

    def evaluate_options(self) -> dict[str, Any]:
        """Options of `EvaluateConfig` that this study adds to the shared ones."""
        return {}

    def preparation_jobs(self, missing: Sequence[RowId]) -> list[Job]:
        """The jobs that come before all rows: the feature caches that are needed and not complete."""
        by_features = {METHODS[method].features: method for method in sorted(map(self.cached_method, self.untrained_ids(missing)))}
        return [methodcaller("precompute", method) for features, method in by_features.items() if not is_complete(self.cache_dir(features))]

    def final_jobs(self, missing: Sequence[RowId]) -> list[Job]:
        """The jobs that come after all rows."""
        return []

    def cached_method(self, row_id: RowId) -> str:
        """The method whose features the training of a row reads."""
        return row_id.method

    def base_model(self, row_id: RowId) -> str:
        """The base model on which the row is generated."""
        return "mini"

    def build_manifest(self) -> dict[str, Any]:
        """What identifies the study in its folder: it may not change between two runs there."""
        return {"paper": self.config.paper, "budget": self.config.budget, "scheduler": SCHEDULER, **asdict(self.budget)}

    def plan_stages(self, missing: Sequence[RowId]) -> list[list[Job]]:
        """The jobs for these rows: those of one list may run at the same time, one list after the other."""

        def priority(row_id: RowId) -> int:  # the longest first
            return 0 if row_id.method in PER_SUBJECT_METHODS else 1 if self.train_config(row_id) else 2

        targets = [row_id for row_id in missing if row_id.method == "copy"]
        dependent = [row_id for row_id in missing if row_id.needs_other_row]
        independent = sorted((row_id for row_id in missing if row_id not in (*targets, *dependent)), key=priority)
        shared = sorted(self.untrained_ids(missing).difference(missing), key=str)  # of finished rows without weights
        return [
            [*self.preparation_jobs(missing), *run_jobs(targets)],
            [*(methodcaller("train_row", row_id) for row_id in shared), *run_jobs(independent)],
            run_jobs(dependent),
            self.final_jobs(missing),
        ]

    def eval_row(self, row_id: RowId) -> EvalRow:
        """How the row is generated."""
        if row_id.method not in BUILT_IN_ROWS or row_id.sweep:
            return self.method_row(row_id)
        num_samples = 1 if row_id.method in NOT_GENERATED else self.budget.num_images_per_prompt
        return built_in_row(row_id.method, self.budget.num_prompts, num_samples)

    # Jobs

    def precompute(self, method: str) -> str:
        """Encode training images for all methods that read the same features as this one."""
        features = METHODS[method].features
        config = EncodeConfig.from_options(
            data=self.train_data, output_dir=str(self.cache_dir(features)), method=method, batch_size=128, device=self.config.device
        )
        for progress in encode_dataset(config):
            self.on_progress(StudyProgress(features, "encoding", progress.chunks, progress.total))
        return features

    def train_row(self, row_id: RowId) -> str:
        """Train the weights that several rows share, once."""
        if config := self.train_config(row_id):
            self._train(config)
        return str(row_id)

    def run_row(self, row_id: RowId) -> str:
        """Train what the row needs, generate it, score it, and save the result."""
        path = result_path(self.out, row_id)
        if path.is_file():
            return str(row_id)
        config = self.train_config(row_id)
        minutes = {"training": self._train(config) if config else 0.0}
        row, evaluation = self.eval_row(row_id), self.load_evaluation(self.base_model(row_id))
        if row.source != "copy":
            self.generate_row(evaluation, self.eval_row(RowId("copy")))
        minutes["generation"] = self.generate_row(evaluation, row)
        score = score_row(evaluation, row)
        features = evaluation.load_features(row)
        finetuning = features.column("finetune_seconds")
        if finetuning is not None and finetuning.any():
            minutes["finetuning"] = float(finetuning.sum()) / 60
        result = RowResult(score, minutes, self.per_prompt_scores(features, row, evaluation), dict(evaluation.protocol))
        if not row.sweep_of:
            with atomic_path(path.with_suffix(".png")) as partial:
                self.build_strip(evaluation, row).save(partial)
        write_file(path, json.dumps(result._asdict() | {"score": asdict(score)}))
        return str(row_id)

    # Parts of jobs

    def cache_dir(self, features: str) -> Path:
        """The feature cache of the training images."""
        return self.out / f"cache-{features}"

    def checkpoint_path(self, row_id: RowId) -> Path:
        """The weights that the row is generated with; rows of one method and seed share them."""
        return self.out / "train" / RowId(row_id.method, row_id.seed).slug / "adapter.safetensors"

    def untrained_ids(self, row_ids: Iterable[RowId]) -> set[RowId]:
        """The trainings that these rows need and that are not finished, each as the row of its method and seed."""
        needed = {RowId(row_id.method, row_id.seed) for row_id in row_ids if self.train_config(row_id)}
        return {row_id for row_id in needed if not (self.checkpoint_path(row_id).parent / "trained.json").is_file()}

    def train_options(self, row_id: RowId) -> dict[str, Any]:
        """Options of `TrainConfig` that every training of the study shares."""
        steps = self.budget.max_train_steps
        return {
            "max_train_steps": steps, "train_batch_size": self.budget.train_batch_size, "validation_steps": steps,
            "checkpointing_steps": max(1, steps // 6), "checkpoints_total_limit": 1, "device": self.config.device,
            "validation_num_inference_steps": min(20, self.budget.num_inference_steps),
            "output_dir": str(self.checkpoint_path(row_id).parent),
            "feature_cache": str(self.cache_dir(METHODS[self.cached_method(row_id)].features)),
        }  # fmt: skip

    def load_evaluation(self, base_model: str) -> Evaluation:
        """The evaluation of the rows on a base model."""
        if base_model not in self._evaluations:
            folder = self.out / ("evaluation" if base_model == "mini" else f"evaluation-{Path(base_model).parent.name}")
            shared = {
                "model": base_model, "data": "mini", "clip_model": "mini", "feature_extractor": "mini", "batch_size": 64,
                "num_prompts": self.budget.num_prompts,
                "num_images_per_prompt": self.budget.num_images_per_prompt, "num_inference_steps": self.budget.num_inference_steps,
                "scheduler": SCHEDULER, "guidance_scale": GUIDANCE_SCALE, "output_dir": str(ensure_writable_folder(folder)),
                "device": self.config.device, "dtype": self.dtype_name(),
            }  # fmt: skip
            config = EvaluateConfig.from_options(**shared, **self.evaluate_options())
            self._evaluations[base_model] = Evaluation(config.with_defaults())
        return self._evaluations[base_model]

    def build_strip(self, evaluation: Evaluation, row: EvalRow) -> Image.Image:
        """Images of a row side by side."""
        return image_strip(evaluation.output_dir, row.name)

    def per_prompt_scores(self, features: RowFeatures, row: EvalRow, evaluation: Evaluation) -> dict[str, list[float]]:
        """Metrics prompt by prompt, by which rows are compared."""
        columns = {CLIP_I: features["score.CLIP-I"], CLIP_T: features["score.CLIP-T"]}
        scores = {label: to_rounded_list(values.unflatten(0, (-1, row.num_samples)).mean(1)) for label, values in columns.items()}
        if row.num_samples > 1:
            scores[DIVERSITY] = to_rounded_list(pairwise_diversity(features["clip_embeds"].unflatten(0, (-1, row.num_samples))))
        return scores

    def dtype_name(self) -> str:
        """The data type of all base models."""
        return str(resolve_dtype("auto", torch.device(set_device(self.config.device)).type, is_mini=True)).removeprefix("torch.")

    def generate_row(self, evaluation: Evaluation, row: EvalRow) -> float:
        """Generate the chunks of a row that are missing and extract their features. Returns the minutes that all chunks took."""
        evaluation.write_manifests([row])
        num_chunks = evaluation.num_chunks(row)
        for chunk in range(num_chunks):
            if not evaluation.row_store(row).has_chunk(chunk):
                evaluation.run_chunk(row, chunk)
            self.on_progress(StudyProgress(row.name, "generation", chunk + 1, num_chunks))
        return evaluation.load_features(row).generation_seconds / 60

    def _train(self, config: TrainConfig) -> float:
        """Train unless it is done. Returns the minutes that it took."""
        config = config.with_defaults()
        folder = Path(config.output_dir)
        done_path, options = folder / "trained.json", json.loads(json.dumps(config.to_options()))
        if done_path.is_file():
            remedy = "delete it and run the same command again"
            done = read_json_object(done_path, remedy)
            if done.get("options") != options:
                raise UserError(f"{folder} was trained with other options; delete it, or choose another --output-dir")
            return float(read_numbers(done, done_path, remedy, ["minutes"])["minutes"])
        step = None
        for step in log_steps(config, train_adapter(config)):
            self.on_progress(StudyProgress(folder.name, "training", step.index, step.max_train_steps))
        rate = step.images_per_second if step else 0.0  # of the steps alone, since the run was begun or continued
        num_images = config.optimization.max_train_steps * config.optimization.train_batch_size
        minutes = num_images / rate / 60 if rate else 0.0
        write_file(done_path, json.dumps({"minutes": minutes, "options": options}))
        return minutes


def to_rounded_list(values: torch.Tensor, digits: int = 6) -> list[float]:
    """Values for JSON."""
    return [round(value, digits) for value in values.tolist()]


def result_path(out: Path, row_id: RowId) -> Path:
    """The file of a finished row; its images have the same name with the suffix .png."""
    return out / "finished" / f"{row_id.slug}.json"


def load_result(out: Path, row_id: RowId) -> RowResult | None:
    """A finished row, or None."""
    path = result_path(out, row_id)
    if not path.is_file():
        return None
    remedy = "delete it and run the same command again; its images are kept"
    fields = read_json_object(path, remedy)
    try:
        result = RowResult(**fields)
        score = parse_score({**result.score, "name": str(row_id)}, path)  # type: ignore[dict-item]
        check_numbers([*result.minutes.values(), *(value for values in result.per_prompt.values() for value in values)])
        if not isinstance(result.protocol, dict):
            raise TypeError("expected a protocol")
    except (TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({summarize_error(error)}); {remedy}") from error
    return result._replace(score=score)


def read_numbers(content: Mapping[str, Any], path: Path, remedy: str, names: Iterable[str]) -> Mapping[str, float]:
    """The numbers of these names from a JSON object. Raises UserError where the file at `path` has something else."""
    try:
        check_numbers(content.get(name) for name in names)
    except (TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({summarize_error(error)}); {remedy}") from error
    return content


def load_results(out: Path, row_ids: Iterable[RowId]) -> dict[RowId, RowResult]:
    """Those of the rows that are finished."""
    results = {row_id: load_result(out, row_id) for row_id in row_ids}
    return {row_id: result for row_id, result in results.items() if result}


def run_jobs(row_ids: Iterable[RowId]) -> list[Job]:
    """Jobs that finish rows."""
    return [methodcaller("run_row", row_id) for row_id in row_ids]
