"""Nine references beside one through the same adapter, where both follow the text as well.

At λ = 1 one photograph through the fine-grained adapter is as near to its subject as nine, but brings its own place along: the
text is heard less. So λ is lowered for the one until it hears the text as the nine do. In the work folder of `imprompt
reproduce personalisation`; run again, what is drawn stays.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.study import asked, identity, shown
from imprompt.evaluation.metrics import mean_interval
from imprompt.evaluation.runner import Row, Studio
from imprompt.evaluation.scoring import Seen
from imprompt.studies.claims import difference
from imprompt.studies.personalization import SecondPaper, by_subject
from imprompt.studies.personalization_claims import BEST

ONE = "one-plus"
SCALES = (0.8, 0.65, 0.5)


def main(words: Sequence[str] = ()) -> None:
    with shown("equal") as tell:
        study = SecondPaper(asked("equal", __doc__, words), tell)
        studio = study.studio("mini")
        one, nine = study.row(ONE)[0], study.row(BEST)[0]
        rows = [nine, one, *(replace(one, name=f"{ONE} λ {scale:g}", scale=scale) for scale in SCALES)]
        for row in rows:
            study.draw(studio, row)
    found = {row.name: figures(studio, row) for row in rows}
    made = Table(title=f"{study.budget.subjects} subjects", box=box.SIMPLE)
    columns = list(found[BEST])
    for column in ("", *columns, *(f"{BEST} − it: {column}" for column in columns)):
        made.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, mine in found.items():
        gaps = [mean_interval(found[BEST][c] - mine[c], torch.arange(len(mine[c]))) for c in columns]
        made.add_row(name, *(f"{mine[c].mean():.3f}" for c in columns), *(difference(gap) if name != BEST else "" for gap in gaps))
    Console(highlight=False, soft_wrap=True, width=160).print(made)


def figures(studio: Studio, row: Row) -> dict[str, Tensor]:
    """A row's identity and CLIP-T, one value for each subject."""
    seen = Seen(studio.out, row.name, studio.chunks(row))
    group, texts = seen.column("group"), seen.column("score.CLIP-T")
    assert group is not None and texts is not None and studio.gallery is not None
    return {"identity": identity(studio, row, studio.gallery.centroids), "CLIP-T": by_subject(texts.tolist(), group.tolist())}
