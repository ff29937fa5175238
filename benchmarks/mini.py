"""Bench a: four pictures after a reference on the embedded model, beside plain diffusers drawing four without one."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console

from benchmarks.timing import Times, interleave
from imprompt.config import Generate
from imprompt.generation import generate as generating
from imprompt.models import base_pipelines as pipelines
from imprompt.models import hub

GOAL = 0.6
PROMPT = "a red fish"


def measure(steps: int, count: int, rounds: int) -> Times:
    """Seconds per sheet. Loading models is outside for both; encoding the reference and attaching are inside ours.

    Plain diffusers is at its defaults: float32, its own attention processors, the model's own scheduler.
    """
    without = {"safety_checker": None, "requires_safety_checker": False}
    plain = StableDiffusionPipeline.from_pretrained(hub.MINI, torch_dtype=torch.float32, **without)
    plain.set_progress_bar_config(disable=True)
    reference: Any = Image.linear_gradient("L").convert("RGB")  # a picture in the place of its path
    choice = Generate(image=(reference,), prompt=PROMPT, count=count, steps=steps)

    def theirs() -> Any:
        return plain(
            [PROMPT] * count,
            num_inference_steps=steps,
            guidance_scale=pipelines.MINI_GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        ).images

    return interleave({"plain": theirs, "ours": lambda: generating.draw(choice)}, rounds)


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks mini", description=__doc__)
    parser.add_argument("--small", action="store_true", help="one picture in three steps")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args(words)
    console = Console(highlight=False, soft_wrap=True)
    needed = ("model_index.json", hub.EMBEDDED["mini"], "image_encoder")
    if not all((hub.MINI / name).exists() for name in needed):
        console.print("mini: the embedded model is not there yet; build it with: imprompt mini make")
        return
    steps, count = (3, 1) if chosen.small else (30, 4)
    times = measure(steps, count, chosen.rounds)
    console.print(
        f"mini: {count} pictures × {steps} steps: plain diffusers {times.median('plain'):.2f} s, "
        f"ours with a reference {times.median('ours'):.2f} s; ours/plain {times.ratio('ours')}, goal ≤ {GOAL}"
    )
