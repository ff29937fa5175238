"""Nine references beside one through the same adapter, where both follow the text as well.

At λ = 1 one photograph through the fine-grained adapter is as near to its subject as nine, but brings its own place along: the
text is heard less. So λ is lowered for the one until it hears the text as the nine do. In the work folder of `imprompt
reproduce personalisation`; run again, what is drawn stays.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from imprompt.config import Reproduce
from imprompt.evaluate.metrics import cosines, mean_interval
from imprompt.evaluate.score import Seen
from imprompt.evaluate.second_paper import SecondPaper, by_subject
from imprompt.evaluate.shelf import Shelf
from imprompt.evaluate.suite import Row, Studio, Task
from imprompt.evaluate.verdicts import difference

ONE, NINE = "one-plus", "average-tokens"
SCALES = (0.8, 0.65, 0.5)


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks equal", description=__doc__)
    parser.add_argument("--small", action="store_true", help="the study's smoke budget: says whether it runs")
    parser.add_argument("--out", type=Path, default=None, help="work folder of the study (default: runs/personalisation)")
    chosen = parser.parse_args(words)
    out = chosen.out or Path("runs/controls-small" if chosen.small else "runs/personalisation")
    study = SecondPaper(Reproduce(paper="personalisation", budget="smoke" if chosen.small else "full", out=str(out), processes=1))
    studio = study.studio("mini")
    one, nine = study.row(ONE)[0], study.row(NINE)[0]
    rows = [nine, one, *(replace(one, name=f"{ONE} λ {scale:g}", scale=scale) for scale in SCALES)]
    with Progress(transient=True) as bars:
        bar = bars.add_task("chunks", total=sum(studio.chunks(row) for row in rows))
        for row in rows:
            for number in range(studio.chunks(row)):
                if not Shelf(studio.out, row.name).has(number):
                    studio.work(Task(row, number))
                bars.advance(bar)
    found = {row.name: figures(studio, row) for row in rows}
    made = Table(title=f"{study.budget.subjects} subjects", box=box.SIMPLE)
    columns = list(found[NINE])
    for column in ("", *columns, *(f"{NINE} − it: {column}" for column in columns)):
        made.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, mine in found.items():
        gaps = [mean_interval(found[NINE][c] - mine[c], torch.arange(len(mine[c]))) for c in columns]
        made.add_row(name, *(f"{mine[c].mean():.3f}" for c in columns), *(difference(gap) if name != NINE else "" for gap in gaps))
    Console(highlight=False, soft_wrap=True, width=160).print(made)


def figures(studio: Studio, row: Row) -> dict[str, Tensor]:
    """A row's identity and CLIP-T, one value for each subject."""
    seen = Seen(studio.out, row.name, studio.chunks(row))
    drawn, group, texts = (seen.column(name) for name in ("identity", "group", "score.CLIP-T"))
    assert drawn is not None and group is not None and texts is not None and studio.gallery is not None
    alike = cosines(drawn, studio.gallery.centroids[group])
    return {name: by_subject(values.tolist(), group.tolist()) for name, values in (("identity", alike), ("CLIP-T", texts))}
