"""Bench g: 64 references beside one, for every way of bringing them together, on the embedded model."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image
from rich.console import Console

from benchmarks.timing import interleave
from imprompt.core.aggregation import AGGREGATORS, Aggregator
from imprompt.data.readers import Mini
from imprompt.models import hub
from imprompt.models.base_pipelines import drawing, load_base, pick_dtype
from imprompt.models.image_prompt import ImagePrompt, Prompter, load
from imprompt.unet.injection import attach

GOAL, MANY = 1.1, 64


def prompt(prompter: Prompter, pictures: Sequence[Image.Image], together: Aggregator) -> ImagePrompt:
    """The image prompt of these pictures, encoded here."""
    features, null = prompter.encode(pictures)
    return ImagePrompt(prompter.adapter, features[None], null[None], aggregator=together)


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks references", description=__doc__)
    parser.add_argument("--small", action="store_true", help="one picture in three steps")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args(words)
    console = Console(highlight=False, soft_wrap=True)
    count, steps = (1, 3) if chosen.small else (4, 30)
    pipe = load_base("mini", "cpu", pick_dtype("auto", "cpu", True))
    world = Mini(MANY, held_out=True, photos=MANY, look=False)
    pictures: Any = [world[i].target for i in range(MANY)]
    for name in ("concat", "average", "max", "self-attention", "attention", "joint", "average-tokens", "attention-tokens"):
        fine = name in ("joint", "average-tokens", "attention-tokens")
        trained = fine and name == "attention-tokens" and (hub.MINI / hub.EMBEDDED["mini-subject"]).is_file()
        prompter = load("mini-subject" if trained else "mini-plus" if fine else "mini")
        together = prompter.adapter.aggregator if trained else AGGREGATORS[name](prompter.spec.features, prompter.spec.cross)

        def draw(number: int, p: Prompter = prompter, a: Aggregator = together) -> Any:
            with attach(pipe, prompt(p, pictures[:number], a)):
                return drawing(pipe, ["a cat"] * count, steps, range(count), (64, 64), 3.0)

        times = interleave({"one": lambda d=draw: d(1), "many": lambda d=draw: d(MANY)}, chosen.rounds, time.process_time)
        began = time.process_time()
        prompter.encode(pictures)
        encoding = time.process_time() - began
        ratio = times.ratio("many")
        verdict = "goal met" if ratio.median <= GOAL else "goal missed"
        console.print(
            f"references: {name}: {MANY} beside one, {count} pictures × {steps} steps: {ratio} ({verdict}: ≤ {GOAL}); "
            f"looking at {MANY} pictures {encoding:.2f} s of {times.median('many'):.2f} s"
        )
