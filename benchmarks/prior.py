"""What DreamBooth's prior preservation keeps: the subject's likeness, and how varied the class still is, with it and without.

Every subject is learned from nine photographs, three times by each method: with pictures of the class in every second place of
a batch, without them, and without them in half as many steps, which is as many pictures of the subject as with them. Then the
learned model draws the subject where its test photographs show it, and, told only the class, pictures of that class.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from imprompt.config import Evaluate, Train
from imprompt.data.dreambooth import class_text
from imprompt.evaluation.gallery import looked_at
from imprompt.evaluation.identity import load_identity
from imprompt.evaluation.metrics import cosines, diversity, mean_interval
from imprompt.evaluation.samples import SubjectCases, open_cases
from imprompt.evaluation.system import Case, Contender, How
from imprompt.evaluation.systems import Learner, Text, load_contender
from imprompt.mini.judge import Judge
from imprompt.utils.images import sheet

METHODS = ("dreambooth", "dreambooth-lora")
PHOTOGRAPHS, TARGETS, SAMPLES = 9, 2, 8
OTHER = 1000  # the first seed of the class: the pictures that are kept were drawn with those from 0 on


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks prior", description=__doc__)
    parser.add_argument("--small", action="store_true", help="two subjects in two steps: says whether it runs")
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/prior"), help="folder of the class pictures and the sheet")
    chosen = parser.parse_args(words)
    learning, count = (2, 2) if chosen.small else (0, chosen.subjects)
    choice = Evaluate(
        data="mini", subjects=16 + TARGETS, references=PHOTOGRAPHS, targets=TARGETS, limit=TARGETS * count, learning=learning,
        scheduler="dpm++", steps=2 if chosen.small else 8, out=str(chosen.out),
    ).settled()  # fmt: skip
    cases, identity, judge = open_cases(choice), load_identity("mini"), Judge()
    assert isinstance(cases, SubjectCases)
    centroids = looked_at(identity, cases).centroids
    rows: list[tuple[str, Contender]] = []
    for method in METHODS:
        half = (learning or Train(method=method, noun="thing", data="one").settled().steps) // 2
        for name, steps, prior in (
            ("without prior", learning, 0),
            ("in half the steps", half, 0),
            ("with prior", learning, 2 if chosen.small else -1),
        ):
            rows.append((f"{method}, {name}", load_contender(method, replace(choice, learning=steps, prior=prior))))
    rows.append(("base", load_contender("text", choice)))
    how = How(choice.steps, choice.guidance or 0.0, (64, 64))
    figures: dict[str, dict[str, list[float]]] = {name: {} for name, _ in rows}
    shown: list[Image.Image] = []
    with Progress(transient=True) as progress:
        bar = progress.add_task("subjects × rows", total=count * len(rows))
        for name, row in rows:
            for number in range(count):
                mine = [cases[number * TARGETS + i] for i in range(TARGETS)]
                subject, of_class = _drawn(row, mine, how)
                seen = judge.image_embeddings(of_class)
                whom = centroids[number : number + 1]
                for column, value in (
                    ("identity", cosines(identity.embed(subject)[0], whom.expand(len(subject), -1)).mean()),
                    ("class: diversity", diversity(seen[None])[0]),
                    ("class: identity", cosines(identity.embed(of_class)[0], whom.expand(len(of_class), -1)).mean()),
                ):
                    figures[name].setdefault(column, []).append(float(value))
                if number == 0:
                    shown += [mine[0].references[0], *subject[:1], *of_class[:6]]
                progress.advance(bar)
    console = Console(highlight=False, soft_wrap=True, width=120)
    table = Table(title=f"{count} subjects, {PHOTOGRAPHS} photographs each", box=box.SIMPLE)
    columns = list(figures["base"])
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, found in figures.items():
        values = [mean_interval(torch.tensor(found[c], dtype=torch.float64), torch.arange(count)) for c in columns]
        table.add_row(name, *(f"{v.value:.3f} ± {(v.high - v.low) / 2:.3f}" for v in values))
    console.print(table)
    chosen.out.mkdir(parents=True, exist_ok=True)
    sheet([], shown, columns=8, cell=128).save(chosen.out / "sheet.png")
    console.print(f"rows of {chosen.out / 'sheet.png'}: {', '.join(figures)}; a photograph, the subject, six of the class")


def _drawn(row: Contender, cases: Sequence[Case], how: How) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of the subject, one for each case; and SAMPLES of its class, told nothing of the subject."""
    texts, of_class = [case.text for case in cases], [class_text(cases[0].noun)] * SAMPLES
    with TemporaryDirectory() as folder:
        model: Any = row.learned(cases[0], Path(folder)) if isinstance(row, Learner) else row
        subject = model.draw(cases, texts, range(len(cases)), how)
        plain = model if isinstance(model, Text) else replace(model, say=str)
        return subject, plain.draw([cases[0]] * SAMPLES, of_class, range(OTHER, OTHER + SAMPLES), how)
