"""Four images from a reference image on the embedded model, next to plain diffusers generating four without one."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console

from benchmarks.timing import Times, interleave
from imprompt.config import GenerateConfig
from imprompt.generation.generate import LoadedModels, generate_images
from imprompt.models import base_pipelines as pipelines
from imprompt.models import hub

MAX_RATIO = 0.6  # goal
PROMPT = "a red fish"


def measure_sheet(num_inference_steps: int, num_images: int, rounds: int) -> Times:
    """Processor seconds of one thread for all images; loading models is not counted, encoding the reference and attaching are.

    Plain diffusers is at its defaults: float32, its own attention processors, the model's own scheduler.
    """
    no_safety_checker = {"safety_checker": None, "requires_safety_checker": False}
    plain = StableDiffusionPipeline.from_pretrained(hub.MINI_PATH, torch_dtype=torch.float32, **no_safety_checker)
    plain.set_progress_bar_config(disable=True)
    reference: Any = Image.linear_gradient("L").convert("RGB")
    config = GenerateConfig.from_options(image=(reference,), prompt=PROMPT, num_images=num_images, num_inference_steps=num_inference_steps)
    models = LoadedModels.empty()

    def generate_plain() -> Any:
        return plain(
            [PROMPT] * num_images,
            num_inference_steps=num_inference_steps,
            guidance_scale=pipelines.MINI_GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(seed) for seed in range(num_images)],
        ).images

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # on a busy machine two threads wait for each other, up to 25 times as long
        return interleave({"plain": generate_plain, "ours": lambda: generate_images(config, models)}, rounds, time.process_time)
    finally:
        torch.set_num_threads(num_threads)


def main(arguments: Sequence[str] = ()) -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mini_generation", description=__doc__)
    parser.add_argument("--small", action="store_true", help="one image in three steps")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    needed = ("model_index.json", hub.BUNDLED_ADAPTERS["mini"], "image_encoder")
    if not all((hub.MINI_PATH / name).exists() for name in needed):
        console.print("mini_generation: the embedded model is not there yet; build it with: imprompt mini build")
        return
    steps, num_images = (3, 1) if args.small else (30, 4)
    times = measure_sheet(steps, num_images, args.rounds)
    console.print(
        f"mini_generation: {num_images} images × {steps} steps, one thread: plain diffusers {times.median('plain'):.2f} s, "
        f"ours with a reference {times.median('ours'):.2f} s; ours/plain {times.ratio('ours')}, goal ≤ {MAX_RATIO}"
    )
