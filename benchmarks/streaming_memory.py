"""Whether memory stays flat while 100 000 records in shards go through `imprompt encode` and `imprompt train`.

One of the shards is empty, one is missing and one has corrupt members: these are skipped and reported. Resident memory is sampled while the
commands run; the result is its growth after the first fifth.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console

from benchmarks import full_size_generation
from imprompt.mini import world

RECORDS_PER_SHARD, NUM_DISTINCT_IMAGES, RESOLUTION = 1000, 500, 64
MAX_GROWTH = 0.02  # goal


class MemoryTrace(NamedTuple):
    """Resident memory of a process over time, its output and its exit code."""

    samples: list[int]  # bytes, evenly spaced in time
    output: str
    code: int
    seconds: float

    @property
    def warm(self) -> float:
        """Median of the second fifth, in bytes."""
        return _median(self.samples[len(self.samples) // 5 : 2 * len(self.samples) // 5])

    @property
    def growth(self) -> float:
        """Growth from `warm` to the median of the last fifth; the last moments, when the process cleans up, are left out."""
        return _median(self.samples[4 * len(self.samples) // 5 : -max(1, len(self.samples) // 50)]) / self.warm - 1


def _median(values: Sequence[int]) -> float:
    return float(sorted(values)[len(values) // 2])


def write_shards(folder: Path, num_records: int) -> str:
    """Write shards in img2dataset's format. Returns the brace pattern that names them, with one more than there are."""
    images = []
    for i, subject in zip(range(NUM_DISTINCT_IMAGES), world.iterate_subjects(), strict=False):
        buffer = io.BytesIO()
        scene = world.make_scene(i)
        world.render(subject, scene).save(buffer, "jpeg", quality=90)
        images.append((buffer.getvalue(), world.format_full_caption(subject, scene)))
    num_shards = -(-num_records // RECORDS_PER_SHARD)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard * RECORDS_PER_SHARD, min(num_records, (shard + 1) * RECORDS_PER_SHARD)):
                image, caption = images[i % NUM_DISTINCT_IMAGES]
                if shard == 1 and i % 100 == 0:
                    image = image[:200]
                metadata = json.dumps({"caption": caption, "key": f"{i:08}", "width": RESOLUTION, "height": RESOLUTION})
                for suffix, content in (("jpg", image), ("txt", f"{caption}, number {i}".encode()), ("json", metadata.encode())):
                    member = tarfile.TarInfo(f"{i:08}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    with tarfile.open(folder / f"{num_shards:05}.tar", "w"):
        pass
    return f"{folder}/{{00000..{num_shards + 1:05}}}.tar"


def trace_memory(arguments: Sequence[str]) -> MemoryTrace:
    """Run `imprompt` and sample its memory twice a second."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, "-m", "imprompt", *arguments]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        samples = list(_sample_resident_memory(process))
        out.seek(0)
        return MemoryTrace(samples, out.read(), process.returncode, time.perf_counter() - start)


def _sample_resident_memory(process: "subprocess.Popen[str]") -> Iterator[int]:
    monitor = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            yield monitor.memory_info().rss
        except psutil.Error:
            break
        time.sleep(0.5)
    process.wait()


def main(arguments: Sequence[str] = ()) -> None:
    """Encode, train without and with the feature cache, and print the growth of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks streaming_memory", description=__doc__)
    parser.add_argument("--small", action="store_true", help="4 000 records: shows that it runs, not whether memory is flat")
    parser.add_argument("--num-records", type=int)
    args = parser.parse_args(arguments)
    num_records, batch_size = args.num_records or (4_000 if args.small else 100_000), 32
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        (folder / "model").mkdir()
        shards, cache = write_shards(folder / "shards", num_records), str(folder / "cache")
        full_size_generation.write_models(folder / "model", small=True, dtype=torch.float32)
        model = ["--model", str(folder / "model"), "--image-encoder", str(folder / "model" / full_size_generation.IMAGE_ENCODER)]
        model += ["--resolution", str(RESOLUTION)]
        train = ["train", *model, "--data", shards, "--num-validation-images", "0", "--no-sanity-check", "--checkpointing-steps", "1000"]
        train += ["--train-batch-size", str(batch_size), "--max-train-steps", str(num_records // batch_size), "--output-dir"]
        commands = {
            "encode": ["encode", shards, cache, *model, "--batch-size", str(batch_size)],
            "train": [*train, str(folder / "run")],
            "train --feature-cache": [*train, str(folder / "cached"), "--feature-cache", cache],
        }
        for command, words in commands.items():
            print_trace(console, command, trace_memory(words), num_records)
        skipped = [(path.parent.name, line) for path in folder.glob("*/unreadable-0.tsv") for line in path.read_text("utf-8").splitlines()]
        examples = f", such as {skipped[0]}, {skipped[-1]}" if skipped else ""
        console.print(f"streaming_memory: {len(skipped)} records and shards reported as unreadable{examples}")


def print_trace(console: Console, command: str, trace: MemoryTrace, num_records: int) -> None:
    """One line, or what went wrong."""
    if trace.code:
        console.print(f"streaming_memory: {command} failed with {trace.code}\n{trace.output}", markup=False)
        return
    verdict = "goal met" if trace.growth < MAX_GROWTH else "goal missed"
    console.print(
        f"streaming_memory: {command}: {num_records / trace.seconds:.0f} records/s, warm {trace.warm / 2**20:.0f} MiB, grows "
        f"{trace.growth:+.1%} in the rest of {trace.seconds:.0f} s ({verdict}: < {MAX_GROWTH:.0%})"
    )
