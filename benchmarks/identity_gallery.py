"""Whether ID similarity favors rows with more references: the study's rows against images that no row was conditioned on.

In `imprompt reproduce personalization` a subject's identity is the mean of the images from which references are taken: a row that is
conditioned on nine of them has seen more of what it is measured by than a row that is conditioned on one. Here the same generated images
are compared with as many images of other scenes. Rows whose images are no longer in the work folder are left out.
"""

from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.personalization_study import id_similarity_by_subject, parse_study_config
from imprompt.evaluation.identity import load_identity_encoder
from imprompt.evaluation.metrics import identity_centroid
from imprompt.mini import world
from imprompt.studies.base import RowId
from imprompt.studies.claims import format_difference
from imprompt.studies.personalization import GALLERY_SIZE, NUM_REFERENCES, UNTRAINED_ROWS, PersonalizationStudy, main_row
from imprompt.studies.personalization_claims import BEST
from imprompt.utils.statistics import mean_interval

FIRST_OTHER_SCENE = 50_000_000  # seed of scenes that no image of the study has
ROW_IDS = (
    *map(main_row, UNTRAINED_ROWS),
    *(RowId("attention-tokens", seed) for seed in range(3)),
    RowId("dreambooth-lora"),
    RowId("inversion"),
)


def main(arguments: Sequence[str] = ()) -> None:
    """Compare every row with both galleries."""
    study = PersonalizationStudy(parse_study_config("identity_gallery", __doc__, arguments))
    evaluation = study.load_evaluation("mini")
    assert evaluation.gallery is not None
    seeds = [int(name) for name in evaluation.eval_set.subjects][: study.budget.num_subjects]
    other_centroids = embed_other_scenes(seeds)
    with_study, with_others = dict[RowId, Tensor](), dict[RowId, Tensor]()
    for row_id in ROW_IDS:
        row = study.eval_row(row_id)
        if all(evaluation.row_store(row).has_chunk(chunk) for chunk in range(evaluation.num_chunks(row))):
            with_study[row_id] = id_similarity_by_subject(evaluation, row, evaluation.gallery.centroids)
            with_others[row_id] = id_similarity_by_subject(evaluation, row, other_centroids)
    table = Table(title=f"ID similarity, {len(seeds)} subjects, {NUM_REFERENCES} references", box=box.SIMPLE)
    for heading in ("", "study's gallery", "other images", f"{BEST} − it, study's", f"{BEST} − it, others"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row_id in with_study:
        values = (with_study, with_others)
        gaps = [format_difference(mean_interval(v[BEST] - v[row_id], torch.arange(len(seeds)))) for v in values]
        table.add_row(str(row_id), *(f"{v[row_id].mean():.3f}" for v in values), *(gaps if row_id != BEST else ("", "")))
    Console(highlight=False, soft_wrap=True, width=140).print(table)


@torch.no_grad()
def embed_other_scenes(seeds: Sequence[int]) -> Tensor:
    """The identity of each subject by GALLERY_SIZE images of other scenes, (subjects, width)."""
    encoder, centroids = load_identity_encoder("mini"), []
    for number, seed in enumerate(seeds):
        subject = world.make_subject(seed)
        scenes = [world.make_scene(FIRST_OTHER_SCENE + number * GALLERY_SIZE + k) for k in range(GALLERY_SIZE)]
        centroids.append(identity_centroid(*encoder.embed([world.render(subject, scene) for scene in scenes])))
    return torch.stack(centroids).float()
