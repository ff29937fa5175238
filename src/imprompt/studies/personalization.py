"""The comparison of personalization methods by Kazistova, Stepanov and Filatov on the embedded model.

К. М. Казистова, И. Д. Степанов, А. В. Филатов (K. M. Kazistova, I. D. Stepanov, A. V. Filatov), «Создание персонализированных
генераций изображений», MIPT: images of the same subject, conditioned on several of its images, by every method that can.

Every row generates images of the same held-out subjects; the prompt contains class noun and background, and the reference images show what
the subject looks like. Trained rows fine-tune the embedded adapters by leave-one-out training, at one budget, with three seeds each.
Per-subject methods are fine-tuned on each subject with a seed of its own.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from PIL import Image

from imprompt.config import MINI_SUBJECT_OPTIONS, PER_SUBJECT_METHODS, TrainConfig
from imprompt.evaluation.metrics import cosine_similarity, rank1_identification
from imprompt.evaluation.report import image_strip
from imprompt.evaluation.runner import EvalRow, Evaluation
from imprompt.evaluation.scoring import RowFeatures
from imprompt.evaluation.systems import BUILT_IN_ROWS, MethodSystem, System
from imprompt.studies.base import ID_SIMILARITY, RANK1_ACCURACY, Budget, Job, RowId, Study, StudyProgress, read_numbers, to_rounded_list
from imprompt.utils.files import read_json_object, write_file

BASE_ADAPTER, PLUS_ADAPTER = "mini", "mini-plus"  # the embedded adapters: of the pooled embedding, of patch features
NUM_REFERENCES = 9
IMAGES_PER_TRAIN_SUBJECT = 10  # the paper's: one target, nine references
GALLERY_SIZE = 16  # images of a test subject that can be references
UNTRAINED_ROWS = {  # method → adapter and aggregation that it generates with
    "base": BASE_ADAPTER,
    "plus": PLUS_ADAPTER,
    "concat": f"{BASE_ADAPTER}@concat",
    "average": f"{BASE_ADAPTER}@average",
    "max": f"{BASE_ADAPTER}@max",
    "average-tokens": f"{PLUS_ADAPTER}@average-tokens",
    "max-tokens": f"{PLUS_ADAPTER}@max-tokens",
    "average-plus": f"{PLUS_ADAPTER}@average",
    "max-plus": f"{PLUS_ADAPTER}@max",
}
SINGLE_REFERENCE_METHODS = ("base", "plus")
SWEPT_METHODS = ("concat", "average", "max", "average-tokens")  # untrained methods of the sweep over the number of references
TRAINED_AGGREGATIONS = {"self-attention": BASE_ADAPTER, "attention-tokens": PLUS_ADAPTER}  # with the adapter that each fine-tunes
TIMINGS_FILE = Path("finished") / "seconds.json"  # method → seconds for a new subject


@dataclass(frozen=True, kw_only=True)
class PersonalizationBudget(Budget):
    """The budget of this study."""

    num_seeds: int
    targets_per_subject: int
    reference_counts: tuple[int, ...]  # of the sweep
    num_sweep_subjects: int
    finetune_steps: int | None = None  # of per-subject methods; None for their own
    num_class_images: int | None = None  # of their prior preservation; None for their own number

    @property
    def num_subjects(self) -> int:
        """Test subjects."""
        return self.num_prompts // self.targets_per_subject


class PersonalizationStudy(Study):
    """The rows of the personalization paper and the jobs that finish them."""

    budget: PersonalizationBudget
    budgets: ClassVar[Mapping[str, PersonalizationBudget]] = {
        "full": PersonalizationBudget(
            max_train_steps=300, train_batch_size=32, num_train_images=12_000, num_images_per_prompt=2, num_inference_steps=8,
            num_prompts=200, num_seeds=3, targets_per_subject=2, reference_counts=(1, 2, 3, 5, 9, 16), num_sweep_subjects=50,
        ),
        "smoke": PersonalizationBudget(
            max_train_steps=1, train_batch_size=4, num_train_images=40, num_images_per_prompt=2, num_inference_steps=2,
            num_prompts=6, num_seeds=2, targets_per_subject=2, reference_counts=(1, 9), num_sweep_subjects=2,
            finetune_steps=1, num_class_images=1,
        ),
    }  # fmt: skip

    def row_ids(self) -> list[RowId]:
        """The baselines, the requested methods, every seed of the trained ones with nine references and with one, and the sweep."""

        def requested(method: str) -> bool:
            return not self.config.method or method in self.config.method

        untrained = [main_row(method) for method in UNTRAINED_ROWS if requested(method)]
        trained = [row_id for method in TRAINED_AGGREGATIONS if requested(method) for row_id in self.seed_rows(method)]
        trained = [variant for row_id in trained for variant in (row_id, replace(row_id, references=1))]
        per_subject = [RowId(method) for method in PER_SUBJECT_METHODS if requested(method)]
        sweep = [row_id for row_ids in self.sweep_rows().values() for row_id in row_ids] if requested("reference-sweep") else []
        return [*map(RowId, BUILT_IN_ROWS), *untrained, *trained, *per_subject, *sweep]

    def seed_rows(self, method: str) -> list[RowId]:
        """The rows of a trained aggregation: one for each seed."""
        return [RowId(method, seed) for seed in range(self.budget.num_seeds)]

    def sweep_rows(self) -> dict[str, list[RowId]]:
        """The rows of the sweep over the number of references, by method; of trained aggregations with the first seed."""
        rows = [*map(RowId, SWEPT_METHODS), *(RowId(method, 0) for method in TRAINED_AGGREGATIONS)]
        return {r.method: [replace(r, references=count, sweep=True) for count in self.budget.reference_counts] for r in rows}

    @property
    def train_data(self) -> str:
        """Images of mini by subject."""
        return f"mini:{self.budget.num_train_images}x{IMAGES_PER_TRAIN_SUBJECT}"

    def final_jobs(self, missing: Sequence[RowId]) -> list[Job]:
        """The timing, while nothing else is at work."""
        return [methodcaller("time_encoding")] if self.methods_to_time(missing) else []

    def cached_method(self, row_id: RowId) -> str:
        """The method of the adapter that is fine-tuned."""
        return "ip-adapter" if TRAINED_AGGREGATIONS[row_id.method] == BASE_ADAPTER else "ip-adapter-plus"

    def method_row(self, row_id: RowId) -> EvalRow:
        """With the caption of the target, and the row's number of references."""
        b, method, source = self.budget, row_id.method, row_id.method
        if method not in PER_SUBJECT_METHODS:
            source = f"{row_id.slug}={self.checkpoint_path(row_id) if method in TRAINED_AGGREGATIONS else UNTRAINED_ROWS[method]}"
        num_samples, num_prompts = b.num_images_per_prompt, b.num_prompts
        if row_id.sweep:
            num_samples, num_prompts = 1, b.num_sweep_subjects * b.targets_per_subject
        return EvalRow(str(row_id), source, "caption", num_samples, num_prompts, num_references=row_id.references or NUM_REFERENCES)

    def train_config(self, row_id: RowId) -> TrainConfig | None:
        """Leave-one-out training of an embedded adapter with an aggregation."""
        if row_id.method not in TRAINED_AGGREGATIONS:
            return None
        return TrainConfig.from_options(
            adapter=TRAINED_AGGREGATIONS[row_id.method], aggregation=row_id.method, seed=row_id.seed,
            min_images_per_subject=IMAGES_PER_TRAIN_SUBJECT, num_references=NUM_REFERENCES, sanity_check=False,
            num_validation_images=min(8, self.budget.num_subjects), lr_warmup_steps=min(50, self.budget.max_train_steps // 2),
            **self.train_options(row_id), **MINI_SUBJECT_OPTIONS,
        )  # fmt: skip

    def evaluate_options(self) -> dict[str, Any]:
        """Data by subject, identity metrics and fine-tuning."""
        b = self.budget
        return {
            "targets_per_subject": b.targets_per_subject, "min_images_per_subject": GALLERY_SIZE + b.targets_per_subject,
            "num_references": GALLERY_SIZE, "prompt_mode": "caption", "identity_encoder": "mini",
            "finetune_steps": b.finetune_steps, "num_class_images": b.num_class_images,
        }  # fmt: skip

    def per_prompt_scores(self, features: RowFeatures, row: EvalRow, evaluation: Evaluation) -> dict[str, list[float]]:
        """Also ID similarity, rank-1 identification, and the number of each prompt's subject."""
        scores = super().per_prompt_scores(features, row, evaluation)
        assert evaluation.gallery is not None
        embeddings, subjects, centroids = features["id_embeds"], features["group"], evaluation.gallery.centroids
        similarity = cosine_similarity(embeddings, centroids[subjects])
        is_rank1 = rank1_identification(embeddings, subjects, centroids).double()
        for name, values in ((ID_SIMILARITY, similarity), (RANK1_ACCURACY, is_rank1)):
            scores[name] = to_rounded_list(values.unflatten(0, (-1, row.num_samples)).mean(1))
        scores["subject"] = subjects[:: row.num_samples].tolist()
        return scores

    def time_encoding(self) -> str:
        """Time, method by method, how long a new subject takes that needs no fine-tuning; run while nothing else is at work."""
        evaluation, seconds, methods = self.load_evaluation("mini"), load_timings(self.out), self.methods_to_time([])
        for number, method in enumerate(methods, 1):
            row = self.eval_row(main_row(method))
            seconds[method] = time_until_attached(
                evaluation.load_system(row.source), evaluation.eval_set[0].references[: row.num_references]
            )
            self.on_progress(StudyProgress(method, "timing", number, len(methods)))
        write_file(self.out / TIMINGS_FILE, json.dumps(seconds, indent=1))
        return "time per new subject"

    def methods_to_time(self, missing: Sequence[RowId]) -> list[str]:
        """The methods that are not timed yet and whose weights are there, or will be because their row is missing."""
        timed, row_ids = load_timings(self.out), set(self.row_ids())
        candidates = {method: main_row(method) for method in (*UNTRAINED_ROWS, *TRAINED_AGGREGATIONS) if method not in timed}
        return [
            method
            for method, row_id in candidates.items()
            if row_id in row_ids and (method in UNTRAINED_ROWS or row_id in missing or self.checkpoint_path(row_id).is_file())
        ]

    def build_strip(self, evaluation: Evaluation, row: EvalRow) -> Image.Image:
        """One image of each of the first subjects."""
        return image_strip(evaluation.output_dir, row.name, range(0, row.num_prompts, self.budget.targets_per_subject))


@torch.no_grad()
def time_until_attached(system: System, references: Sequence[Image.Image]) -> float:
    """Seconds from the images of a new subject to keys and values in the UNet: the median of seven runs after a first one."""
    assert isinstance(system, MethodSystem)
    method, times = system.method, []
    device = system.pipe.unet.device
    uncond = method.uncond_features()[None].to(device)
    for _ in range(8):
        start = time.perf_counter()
        features = method.encoder.encode_images(references, patches=method.uses_patch_features)[None].to(device)
        with method.apply_to(system.pipe, features, uncond):
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return median(times[1:])


def load_timings(out: Path) -> dict[str, float]:
    """Method → seconds for a new subject, of the methods that were timed."""
    path, remedy = out / TIMINGS_FILE, "delete it and run the same command again"
    timings = read_json_object(path, remedy) if path.is_file() else {}
    return dict(read_numbers(timings, path, remedy, timings))


def main_row(method: str) -> RowId:
    """The row of a method at its usual number of references; of a trained aggregation that of the first seed."""
    if method in SINGLE_REFERENCE_METHODS:
        return RowId(method, references=1)
    return RowId(method, 0) if method in TRAINED_AGGREGATIONS else RowId(method)
