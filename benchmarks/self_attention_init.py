"""Why the self-attention aggregator of the personalization paper stays behind on mini: three variants next to the study's rows.

The paper: Kazistova, Stepanov, Filatov, «Создание персонализированных генераций изображений», MIPT. `from the average` is the paper's own
module, budget and data, and differs only in its initial weights: values are the embeddings themselves and keys are zero, so that it begins
as their average. `longer` differs only in the number of steps. `attention over embeddings` is another module, ours, which begins as the
average too. All continue in the work folder of `imprompt reproduce personalization` with its feature caches, test subjects and rows; what
is finished is kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.personalization_study import parse_study_config, study_progress_bar
from imprompt.config import TrainConfig
from imprompt.core.aggregation import AGGREGATORS, SelfAttention
from imprompt.evaluation.runner import EvalRow
from imprompt.methods.loading import load_for_finetuning
from imprompt.models.checkpoints import save
from imprompt.studies.base import CLIP_T, FD, ID_SIMILARITY, IS, RANK1_ACCURACY, RowId, load_results
from imprompt.studies.claims import Rows, format_difference, paired_difference
from imprompt.studies.personalization import NUM_REFERENCES, PersonalizationStudy
from imprompt.studies.personalization_claims import AVERAGE, BASE
from imprompt.utils.files import ensure_writable_folder

SELF_ATTENTION = RowId("self-attention", 0)  # the first seed
ATTENTION, LONGER, FROM_AVERAGE = (
    RowId(method, 0) for method in ("attention over embeddings", "self-attention longer", "self-attention from the average")
)
VARIANTS = (ATTENTION, LONGER, FROM_AVERAGE)
STUDY_ROWS = (SELF_ATTENTION, AVERAGE, BASE)  # to compare with
LONGER_FACTOR = 4  # times as many steps
METRICS = (ID_SIMILARITY, RANK1_ACCURACY, FD, IS, CLIP_T)


class InitializationStudy(PersonalizationStudy):
    """Three more rows, trained like the first seed of self-attention except for what the module's docstring lists."""

    def train_config(self, row_id: RowId) -> TrainConfig | None:
        """That of the first seed, changed in the way that the row is about."""
        if row_id not in VARIANTS:
            return super().train_config(row_id)
        config = super().train_config(SELF_ATTENTION)
        assert config is not None
        config = config.with_options(output_dir=str(self.checkpoint_path(row_id).parent))
        if row_id == LONGER:
            steps = LONGER_FACTOR * self.budget.max_train_steps
            return config.with_options(max_train_steps=steps, validation_steps=steps)
        if row_id == FROM_AVERAGE:
            adapter = str(self.init_from_average(config))
            return config.with_options(adapter=adapter, aggregation="auto", min_distinct_references=NUM_REFERENCES)
        return config.with_options(
            aggregation="attention", min_distinct_references=NUM_REFERENCES
        )  # self-attention is trained with nine too

    def cached_method(self, row_id: RowId) -> str:
        """All fine-tune the same adapter."""
        return super().cached_method(SELF_ATTENTION)

    def init_from_average(self, config: TrainConfig) -> Path:
        """Save the adapter that the study fine-tunes with a self-attention that computes the average: V = x, K = 0."""
        path = ensure_writable_folder(self.out / "self-attention-init") / "from-the-average.safetensors"
        assert config.adapter is not None
        adapter, spec = load_for_finetuning(config.adapter)
        torch.manual_seed(config.runtime.seed)
        aggregator = AGGREGATORS["self-attention"](spec.image_embed_dim, spec.cross_attention_dim)
        assert isinstance(aggregator, SelfAttention)
        with torch.no_grad():
            aggregator.to_v.weight.copy_(torch.eye(spec.image_embed_dim))
            aggregator.to_k.weight.zero_()
        adapter.aggregator = aggregator
        save(adapter, path, {**spec.metadata, "aggregator": "self-attention"})
        return path

    def method_row(self, row_id: RowId) -> EvalRow:
        """Generated like the first seed."""
        if row_id not in VARIANTS:
            return super().method_row(row_id)
        return replace(super().method_row(SELF_ATTENTION), name=str(row_id), source=f"{row_id.slug}={self.checkpoint_path(row_id)}")


def main(arguments: Sequence[str] = ()) -> None:
    """Finish the rows and print their table."""
    config = parse_study_config("self_attention_init", __doc__, arguments)
    with study_progress_bar("self_attention_init") as on_progress:
        study = InitializationStudy(config, on_progress)
        for job in study.preparation_jobs([SELF_ATTENTION, *VARIANTS]):
            job(study)
        for row_id in (*STUDY_ROWS, *VARIANTS):
            study.run_row(row_id)
    rows = load_results(study.out, (*STUDY_ROWS, *VARIANTS))
    Console(highlight=False, soft_wrap=True, width=190).print(results_table(rows, study.budget.num_subjects))


def results_table(rows: Rows, num_subjects: int) -> Table:
    """Metrics of each row, and the difference in ID similarity to the first seed of self-attention."""
    table = Table(title=f"{num_subjects} subjects, {NUM_REFERENCES} references", box=box.SIMPLE)
    for heading in ("", "minutes", *METRICS, f"{ID_SIMILARITY} − {SELF_ATTENTION}"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row_id, row in rows.items():
        gap = "" if row_id == SELF_ATTENTION else format_difference(paired_difference(rows, row_id, SELF_ATTENTION, ID_SIMILARITY))
        values = (f"{row.score.metrics[name].value:.3f}" if name in row.score.metrics else "–" for name in METRICS)
        table.add_row(str(row_id), f"{row.minutes['training']:.0f}", *values, gap)
    return table
