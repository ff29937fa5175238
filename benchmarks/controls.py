"""Why the second paper's self-attention stays behind on mini: three more ways, beside those of `imprompt reproduce personalisation`.

`self-attention from the average` is the paper's own module, budget and data, and differs in its first weights alone: values
are the embeddings themselves and keys are zero, so that it begins as the average. `self-attention longer` differs in the
number of steps alone. `attention over embeddings` is another module, ours, which begins as the average too. All go on from the work
folder of the study: its caches, its test subjects, its rows. Run again, what is finished stays.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.study import asked, shown
from imprompt.config import READS, Train
from imprompt.core.aggregation import AGGREGATORS, SelfAttention
from imprompt.data.feature_cache import complete
from imprompt.evaluation.runner import Row
from imprompt.methods.loading import to_train
from imprompt.models.checkpoints import save
from imprompt.studies.base import Finished, finished
from imprompt.studies.claims import Rows, difference
from imprompt.studies.personalization import NINE, PHOTOS, SecondPaper
from imprompt.studies.personalization_claims import better
from imprompt.utils.files import writable_folder

OURS, LONGER = "attention over embeddings seed 0", "self-attention longer seed 0"
BEGUN, FIRST = "self-attention from the average seed 0", "self-attention seed 0"
MORE = (OURS, LONGER, BEGUN)
BESIDE = (FIRST, "average", "one")  # rows of the study, to compare with
COLUMNS = ("identity", "recognised", "FID", "IS", "CLIP-T")


class Controls(SecondPaper):
    """Three rows more, trained as the first seed of self-attention is, but for what the module's docstring says."""

    times = 4  # as many steps, of the longer one

    def training(self, name: str) -> Train | None:
        if name not in MORE:
            return super().training(name)
        plain = super().training(FIRST)
        assert plain is not None
        plain = replace(plain, out=str(self.weights(name).parent))
        if name == OURS:
            return replace(plain, combine="attention", fewest=NINE)  # self-attention hears nine at every step too
        if name == BEGUN:
            return replace(plain, adapter=str(self.begun(plain)), combine="auto", fewest=NINE)
        return replace(plain, steps=self.times * plain.steps, validate_every=self.times * plain.steps)

    def begun(self, plain: Train) -> Path:
        """The adapter that the study begins with, and a self-attention that says the average: V = x, and no key."""
        path = writable_folder(self.out / "controls") / "from-the-average.safetensors"
        assert plain.adapter is not None
        adapter, spec = to_train(plain.adapter)
        torch.manual_seed(plain.seed)
        together = AGGREGATORS[plain.combine](spec.features, spec.cross)
        assert isinstance(together, SelfAttention)
        with torch.no_grad():
            together.to_v.weight.copy_(torch.eye(spec.features))
            together.to_k.weight.zero_()
        adapter.aggregator = together
        save(adapter, path, spec.metadata | {"aggregator": plain.combine})
        return path

    def row(self, name: str) -> tuple[Row, str]:
        if name not in MORE:
            return super().row(name)
        plain, base = super().row(FIRST)
        return replace(plain, name=name, source=f"{name}={self.weights(name)}"), base


def main(words: Sequence[str] = ()) -> None:
    choice = asked("controls", __doc__, words)
    with shown("controls") as tell:
        study = Controls(choice, tell)
        if not complete(study.cache(READS["ip-adapter"])):
            study.fill(f"mini:{study.budget.pictures}x{PHOTOS}", "ip-adapter")
        for name in (*BESIDE, *MORE):
            study.finish(name)
    rows: Rows = {name: row for name in (*BESIDE, *MORE) if (row := finished(study.out, name))}
    Console(highlight=False, soft_wrap=True, width=140).print(table(rows, study.budget.subjects))


def table(rows: Rows, subjects: int) -> Table:
    """Figures of each row, and what its identity is to that of the first seed of self-attention."""
    made = Table(title=f"{subjects} subjects, {NINE} references", box=box.SIMPLE)
    for column in ("", "minutes", *COLUMNS, f"identity − {FIRST}"):
        made.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in rows.items():
        gap = "" if name == FIRST else difference(better(rows, name, FIRST))
        made.add_row(name, f"{row.minutes['training']:.0f}", *(_cell(row, column) for column in COLUMNS), gap)
    return made


def _cell(row: Finished, column: str) -> str:
    value = row.score.figures.get(column)
    return "–" if value is None else f"{value.value:.3f}"
