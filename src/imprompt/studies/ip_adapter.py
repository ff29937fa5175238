"""The comparison of IP-Adapter (Ye, Zhang, Liu, Han, Yang, 2023, arXiv:2308.06721, table 1) on the embedded model.

Rows: baselines, every method at one training budget, the sweep over the scale λ, and the adapter on a custom base model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import ClassVar

from imprompt.config import IP_ADAPTER_PAPER_METHODS, REFERENCE_METHODS, UNET_METHODS, TrainConfig
from imprompt.evaluation.runner import EVALUATION_SCALES, EvalRow, Evaluation
from imprompt.evaluation.scoring import RowFeatures
from imprompt.recipes.style import train_style
from imprompt.studies.base import Budget, Job, RowId, Study, StudyProgress, to_rounded_list
from imprompt.utils.files import ensure_writable_folder

CUSTOM_MODEL_STYLE = "ink"
BASELINE_IDS = (RowId("copy"), RowId("real"), RowId("text"))
ADAPTER_ID = RowId("ip-adapter")
SWEEP_IDS = tuple(RowId("ip-adapter", scale=scale, sweep=True) for scale in EVALUATION_SCALES)
TEXT_SWEEP_ID = RowId("text", sweep=True)  # the base model on the sweep's prompts
CUSTOM_MODEL_IDS = (RowId("text", custom_model=True), RowId("ip-adapter", custom_model=True))


@dataclass(frozen=True, kw_only=True)
class IPAdapterBudget(Budget):
    """The budget of this study."""

    num_sweep_prompts: int
    custom_model_share: float  # of the usual training of a custom model


class IPAdapterStudy(Study):
    """The rows of the IP-Adapter paper and the jobs that finish them."""

    budget: IPAdapterBudget
    budgets: ClassVar[Mapping[str, IPAdapterBudget]] = {
        "full": IPAdapterBudget(
            max_train_steps=500, train_batch_size=48, num_train_images=24_000, num_images_per_prompt=4, num_inference_steps=5,
            num_prompts=1_000, num_sweep_prompts=200, custom_model_share=0.6,
        ),
        "smoke": IPAdapterBudget(
            max_train_steps=1, train_batch_size=4, num_train_images=16, num_images_per_prompt=2, num_inference_steps=2,
            num_prompts=4, num_sweep_prompts=2, custom_model_share=0.001,
        ),
    }  # fmt: skip

    def row_ids(self) -> list[RowId]:
        """The baselines, the requested methods (UNet fine-tuning takes longest and comes first), the sweep and the custom model."""
        requested = self.config.method
        methods = [name for name in IP_ADAPTER_PAPER_METHODS if not requested or name in requested]
        methods.sort(key=lambda name: name not in UNET_METHODS)
        further = [] if requested and "ip-adapter" not in requested else [*SWEEP_IDS, TEXT_SWEEP_ID, *CUSTOM_MODEL_IDS]
        return [*BASELINE_IDS, *map(RowId, methods), *further]

    @property
    def train_data(self) -> str:
        """Images of mini, each its own reference."""
        return f"mini:{self.budget.num_train_images}"

    def preparation_jobs(self, missing: Sequence[RowId]) -> list[Job]:
        """Feature caches, and the custom model."""
        jobs = super().preparation_jobs(missing)
        if any(row_id.custom_model for row_id in missing) and not (self.custom_model_path / "model_index.json").is_file():
            jobs.append(methodcaller("make_custom_model"))
        return jobs

    def make_custom_model(self) -> str:
        """Fine-tune mini to another style."""
        train_style(
            CUSTOM_MODEL_STYLE,
            ensure_writable_folder(self.custom_model_path.parent),
            lambda part, done, total, _: self.on_progress(StudyProgress(CUSTOM_MODEL_STYLE, part, done, total)),
            self.budget.custom_model_share,
        )
        return CUSTOM_MODEL_STYLE

    @property
    def custom_model_path(self) -> Path:
        """The folder of the custom model."""
        return self.out / CUSTOM_MODEL_STYLE / "model"

    def base_model(self, row_id: RowId) -> str:
        """The custom model for its rows, otherwise mini."""
        return str(self.custom_model_path) if row_id.custom_model else "mini"

    def method_row(self, row_id: RowId) -> EvalRow:
        """With an empty prompt; in the sweep with the caption of another sample."""
        b, method = self.budget, row_id.method
        source = f"{method}={self.checkpoint_path(row_id)}" if method in REFERENCE_METHODS else method
        if not row_id.sweep:
            return EvalRow(str(row_id), source, "none", b.num_images_per_prompt, b.num_prompts)
        scale, label = 1.0 if row_id.scale is None else row_id.scale, str(RowId(method))
        return EvalRow(str(row_id), source, "other", 1, min(b.num_sweep_prompts, b.num_prompts), scale, label)

    def train_config(self, row_id: RowId) -> TrainConfig | None:
        """The same budget and data for every method, with the options that `imprompt train` has for mini."""
        method, b = row_id.method, self.budget
        if method not in REFERENCE_METHODS:
            return None
        return TrainConfig.from_options(
            method=method, data=self.train_data, num_validation_images=min(8, b.num_prompts // 2),
            sanity_check=self.config.budget == "full", lr_warmup_steps=min(100, b.max_train_steps // 2), **self.train_options(row_id),
        )  # fmt: skip

    def per_prompt_scores(self, features: RowFeatures, row: EvalRow, evaluation: Evaluation) -> dict[str, list[float]]:
        """Also the CLIP embeddings at λ = 0 and of text only, which claim e compares."""
        scores = super().per_prompt_scores(features, row, evaluation)
        if row.sweep_of and (row.source == "text" or row.scale == 0):
            scores["CLIP embeddings"] = to_rounded_list(features["clip_embeds"].flatten(), digits=5)
        return scores
