"""Whether identity flatters what hears more references: the study's rows against photographs that no row has heard.

In `imprompt reproduce personalisation` a subject's identity is the mean of the photographs from which references are taken: a
row that hears nine of them has heard more of its judge than a row that hears one. Here the same pictures are compared with as
many photographs of other scenes. Rows whose pictures are not in the work folder any more are left out.
"""

from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.study import asked, identity
from imprompt.evaluation.identity import load_identity
from imprompt.evaluation.metrics import centroid, mean_interval
from imprompt.evaluation.store import Shelf
from imprompt.mini import world
from imprompt.studies.claims import difference
from imprompt.studies.personalization import GALLERY, NINE, PLAIN, SecondPaper
from imprompt.studies.personalization_claims import BEST

OTHERS = 50_000_000  # scenes that no photograph of the study has
ROWS = (*PLAIN, *(f"attention-tokens seed {n}" for n in range(3)), "dreambooth-lora", "inversion")


def main(words: Sequence[str] = ()) -> None:
    study = SecondPaper(asked("gallery", __doc__, words))
    studio = study.studio("mini")
    assert studio.gallery is not None
    seeds = [int(name) for name in studio.cases.subjects][: study.budget.subjects]
    fresh = others(seeds)
    own, anew = dict[str, Tensor](), dict[str, Tensor]()
    for name in ROWS:
        row, _ = study.row(name)
        if all(Shelf(studio.out, row.name).has(number) for number in range(studio.chunks(row))):
            own[name], anew[name] = (identity(studio, row, centroids) for centroids in (studio.gallery.centroids, fresh))
    made = Table(title=f"identity, {len(seeds)} subjects, {NINE} references", box=box.SIMPLE)
    for column in ("", "study's gallery", "other photographs", f"{BEST} − it, study's", f"{BEST} − it, others"):
        made.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name in own:
        gaps = [difference(mean_interval(kept[BEST] - kept[name], torch.arange(len(seeds)))) for kept in (own, anew)]
        made.add_row(name, f"{own[name].mean():.3f}", f"{anew[name].mean():.3f}", *(gaps if name != BEST else ("", "")))
    Console(highlight=False, soft_wrap=True, width=140).print(made)


@torch.no_grad()
def others(seeds: Sequence[int]) -> Tensor:
    """Each subject as GALLERY photographs of other scenes show it: (subjects, width)."""
    judge, found = load_identity("mini"), []
    for number, seed in enumerate(seeds):
        subject = world.subject(seed)
        scenes = [world.scene(OTHERS + number * GALLERY + k) for k in range(GALLERY)]
        found.append(centroid(*judge.embed([world.draw(subject, scene) for scene in scenes])))
    return torch.stack(found).float()
