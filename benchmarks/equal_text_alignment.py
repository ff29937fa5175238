"""Nine references next to one through the same adapter, at the same text alignment.

At λ = 1 one image through the fine-grained adapter is as similar to its subject as nine, but it also copies its background: CLIP-T is
lower. So λ of the single reference is lowered until its CLIP-T is that of the nine. Continues in the work folder of `imprompt reproduce
personalization`; images that were generated before are kept.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.personalization_study import id_similarity_by_subject, parse_study_config, study_progress_bar
from imprompt.evaluation.runner import EvalRow, Evaluation
from imprompt.studies.base import CLIP_T, ID_SIMILARITY, RowId
from imprompt.studies.claims import format_difference, mean_per_subject
from imprompt.studies.personalization import PersonalizationStudy
from imprompt.studies.personalization_claims import BEST, PLUS
from imprompt.utils.statistics import mean_interval

SCALES = (0.8, 0.65, 0.5)


def main(arguments: Sequence[str] = ()) -> None:
    """Generate the single reference at several λ, and compare each with the nine."""
    config = parse_study_config("equal_text_alignment", __doc__, arguments)
    scaled_ids = {replace(PLUS, scale=scale): scale for scale in SCALES}
    with study_progress_bar("equal_text_alignment") as on_progress:
        study = PersonalizationStudy(config, on_progress)
        evaluation = study.load_evaluation("mini")
        rows = {row_id: study.eval_row(row_id) for row_id in (BEST, PLUS)}
        rows |= {row_id: replace(rows[PLUS], name=str(row_id), scale=scale) for row_id, scale in scaled_ids.items()}
        for row in rows.values():
            study.generate_row(evaluation, row)
    scores = {row_id: scores_by_subject(evaluation, row) for row_id, row in rows.items()}
    Console(highlight=False, soft_wrap=True, width=160).print(comparison_table(scores, study.budget.num_subjects))


def comparison_table(scores: dict[RowId, dict[str, Tensor]], num_subjects: int) -> Table:
    """The mean of each row's metrics, and the difference of nine references to it."""
    table, metrics = Table(title=f"{num_subjects} subjects", box=box.SIMPLE), list(scores[BEST])
    for heading in ("", *metrics, *(f"{BEST} − it: {name}" for name in metrics)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row_id, values in scores.items():
        gaps = [mean_interval(scores[BEST][name] - values[name], torch.arange(num_subjects)) for name in metrics]
        differences = (format_difference(gap) if row_id != BEST else "" for gap in gaps)
        table.add_row(str(row_id), *(f"{values[name].mean():.3f}" for name in metrics), *differences)
    return table


def scores_by_subject(evaluation: Evaluation, row: EvalRow) -> dict[str, Tensor]:
    """A row's ID similarity and CLIP-T, one value for each subject."""
    features = evaluation.load_features(row)
    assert evaluation.gallery is not None
    return {
        ID_SIMILARITY: id_similarity_by_subject(evaluation, row, evaluation.gallery.centroids),
        CLIP_T: mean_per_subject(features["score.CLIP-T"].tolist(), features["group"].tolist()),
    }
