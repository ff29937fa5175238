"""Throughput of an evaluation: generation in batches next to one image at a time; memory while 20 000 images are scored."""

import argparse
import tempfile
import time
from collections.abc import Sequence

import psutil
import torch
from rich.console import Console

from benchmarks.timing import interleave
from imprompt.config import EvaluateConfig
from imprompt.evaluation.report import score_row
from imprompt.evaluation.runner import Evaluation, built_in_row
from imprompt.evaluation.samples import SamplingParams, load_eval_set
from imprompt.evaluation.systems import SystemLoader

MIN_SPEEDUP, MAX_GROWTH = 1.5, 0.02  # goals


def measure_batching(console: Console, num_images: int, rounds: int, num_inference_steps: int) -> None:
    """The same images in one batch and one at a time."""
    config = EvaluateConfig.from_options(num_inference_steps=num_inference_steps, num_prompts=num_images).with_defaults()
    system, eval_set = SystemLoader.from_config(config).load_system("mini"), load_eval_set(config.dataset)
    samples = [eval_set[i] for i in range(num_images)]
    params = SamplingParams(num_inference_steps, 3.0, (64, 64))

    def generate_batch() -> None:
        system.generate(samples, [""] * num_images, range(num_images), params)

    def generate_one_by_one() -> None:
        for seed, sample in enumerate(samples):
            system.generate([sample], [""], [seed], params)

    times = interleave({"batch": generate_batch, "one by one": generate_one_by_one}, rounds, time.process_time)
    speedup = times.ratio("one by one")
    verdict = "goal met" if speedup.median >= MIN_SPEEDUP else "goal missed"
    console.print(f"evaluation_throughput: one at a time / batches of {num_images}: {speedup} ({verdict}: ≥ {MIN_SPEEDUP})")


def measure_memory(console: Console, num_images: int) -> None:
    """Memory of this process while features of images are extracted and scored; the images are real, so nothing is generated."""
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        config = EvaluateConfig.from_options(num_prompts=num_images, num_images_per_prompt=1, output_dir=folder)
        evaluation, row = Evaluation(config.with_defaults()), built_in_row("copy", num_images)
        start, memory = time.monotonic(), []
        for chunk in range(evaluation.num_chunks(row)):
            evaluation.run_chunk(row, chunk)
            memory.append(process.memory_info().rss)
        seconds, warm = time.monotonic() - start, memory[len(memory) // 5]
        growth = memory[-1] / warm - 1
        verdict = "goal met" if growth < MAX_GROWTH else "goal missed"
        console.print(
            f"evaluation_throughput: features of {num_images:,} images, {num_images / seconds:.0f}/s: {warm / 2**20:.0f} MiB after a "
            f"fifth, {growth:+.1%} at the end ({verdict}: < {MAX_GROWTH:.0%})"
        )
        start = time.monotonic()
        score_row(evaluation, row)
        seconds, resident = time.monotonic() - start, process.memory_info().rss / 2**20
        console.print(f"evaluation_throughput: metrics with intervals took {seconds:.0f} s, {resident:.0f} MiB")


def main(arguments: Sequence[str] = ()) -> None:
    """Measure both, or the one that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluation_throughput", description=__doc__)
    parser.add_argument("--small", action="store_true", help="shows only that it runs")
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("batching", "memory"))
    args = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)
    if args.only != "memory":
        measure_batching(console, 4 if args.small else 64, 1 if args.small else args.rounds, 2 if args.small else 10)
    if args.only != "batching":
        measure_memory(console, 200 if args.small else args.num_images)
