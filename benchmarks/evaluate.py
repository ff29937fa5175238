"""Bench f: an evaluation. Batched drawing beside one picture at a time; memory while 20 000 pictures are scored."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from rich.console import Console

from benchmarks.timing import interleave
from imprompt.config import Evaluate
from imprompt.evaluation.report import score_row
from imprompt.evaluation.runner import Row, Studio, Task
from imprompt.evaluation.samples import open_cases
from imprompt.evaluation.system import How
from imprompt.evaluation.systems import load_contender

GOAL, FLAT = 1.5, 0.02


def batched(console: Console, pictures: int, rounds: int, steps: int) -> None:
    """The same pictures, 64 at a time and one at a time."""
    choice = Evaluate(steps=steps).settled()
    contender, prompts = load_contender("mini", choice), open_cases(replace(choice, limit=pictures))
    cases = [prompts[i] for i in range(pictures)]
    how = How(steps, 3.0, (64, 64))

    def at_once() -> None:
        contender.draw(cases, [""] * pictures, range(pictures), how)

    def one_by_one() -> None:
        for seed, case in enumerate(cases):
            contender.draw([case], [""], [seed], how)

    found = interleave({"at once": at_once, "one by one": one_by_one}, rounds, time.process_time).ratio("one by one")
    verdict = "goal met" if found.median >= GOAL else "goal missed"
    console.print(f"evaluate: one at a time / batches of {pictures}: {found} ({verdict}: ≥ {GOAL})")


def flat(console: Console, pictures: int) -> None:
    """Memory of this process while pictures are looked at and scored; they are photographs, so that nothing is drawn."""
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as name:
        studio = Studio(replace(Evaluate(limit=pictures, samples=1), out=name).settled())
        row, began, samples = Row("copy", "copy", "none", 1, pictures), time.monotonic(), []
        for number in range(studio.chunks(row)):
            studio.work(Task(row, number))
            samples.append(process.memory_info().rss)
        seconds = time.monotonic() - began
        warm = samples[len(samples) // 5]
        grown = samples[-1] / warm - 1
        verdict = "goal met" if grown < FLAT else "goal missed"
        console.print(
            f"evaluate: {pictures:,} pictures looked at, {pictures / seconds:.0f}/s: {warm / 2**20:.0f} MiB after a fifth, "
            f"{grown:+.1%} at the end ({verdict}: < {FLAT:.0%})"
        )
        began = time.monotonic()
        score_row(studio, row, Path(name))
        console.print(
            f"evaluate: their figures with intervals took {time.monotonic() - began:.0f} s, {process.memory_info().rss / 2**20:.0f} MiB"
        )


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluate", description=__doc__)
    parser.add_argument("--small", action="store_true", help="says whether it runs")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("batched", "flat"))
    chosen = parser.parse_args(words)
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)
    if chosen.only != "flat":
        batched(console, 4 if chosen.small else 64, 1 if chosen.small else chosen.rounds, 2 if chosen.small else 10)
    if chosen.only != "batched":
        flat(console, 200 if chosen.small else chosen.pictures)
