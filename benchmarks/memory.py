"""Bench e: does memory stay flat? 100 000 records in shards go through `imprompt encode` and `imprompt train`.

Among the shards are an empty one, one that is missing and one with corrupt members: they are survived and reported.
Resident memory is sampled while the verbs run; what counts is its growth after the first fifth.
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

from benchmarks import full_size
from imprompt.mini import world

PER_SHARD, DISTINCT, SIDE = 1000, 500, 64
GOAL = 0.02


class Course(NamedTuple):
    """Resident memory of a process over its time."""

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
        """Median of the last fifth (the last moments, when things are put away, left out) to the warm one."""
        return _median(self.samples[4 * len(self.samples) // 5 : -max(1, len(self.samples) // 50)]) / self.warm - 1


def _median(values: Sequence[int]) -> float:
    return float(sorted(values)[len(values) // 2])


def write_shards(folder: Path, records: int) -> str:
    """Shards in img2dataset's form; the name with braces under which they are found, one more than there are."""
    pictures = []
    for i, subject in zip(range(DISTINCT), world.subjects(), strict=False):
        buffer = io.BytesIO()
        where = world.scene(i)
        world.draw(subject, where).save(buffer, "jpeg", quality=90)
        pictures.append((buffer.getvalue(), world.full_caption(subject, where)))
    count = -(-records // PER_SHARD)
    for shard in range(count):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard * PER_SHARD, min(records, (shard + 1) * PER_SHARD)):
                picture, caption = pictures[i % DISTINCT]
                if shard == 1 and i % 100 == 0:
                    picture = picture[:200]
                about = json.dumps({"caption": caption, "key": f"{i:08}", "width": SIDE, "height": SIDE})
                for suffix, content in (("jpg", picture), ("txt", f"{caption}, number {i}".encode()), ("json", about.encode())):
                    member = tarfile.TarInfo(f"{i:08}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    with tarfile.open(folder / f"{count:05}.tar", "w"):
        pass
    return f"{folder}/{{00000..{count + 1:05}}}.tar"


def watched(words: Sequence[str]) -> Course:
    """Run `imprompt` and look at its memory twice a second."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, "-m", "imprompt", *words]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        samples = list(_resident(process))
        out.seek(0)
        return Course(samples, out.read(), process.returncode, time.perf_counter() - began)


def _resident(process: "subprocess.Popen[str]") -> Iterator[int]:
    seen = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            yield seen.memory_info().rss
        except psutil.Error:
            break
        time.sleep(0.5)
    process.wait()


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--small", action="store_true", help="4 000 records: says whether it runs, not whether memory is flat")
    parser.add_argument("--records", type=int)
    chosen = parser.parse_args(words)
    records = chosen.records or (4_000 if chosen.small else 100_000)
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        (folder / "base").mkdir()
        shards = write_shards(folder / "shards", records)
        full_size.build(folder / "base", small=True, dtype=torch.float32)
        common = ["--base", str(folder / "base"), "--encoder", str(folder / "base" / full_size.ENCODER), "--size", str(SIDE)]
        batch = 32
        training = ["train", *common, "--batch", str(batch), "--steps", str(records // batch), "--validation", "0", "--no-preflight"]
        training += ["--save-every", "1000"]
        report(console, "encode", watched(["encode", shards, str(folder / "cache"), *common, "--batch", str(batch)]), records)
        report(console, "train", watched([*training, "--data", shards, "--out", str(folder / "run")]), records)
        cached = [*training, "--data", shards, "--cache", str(folder / "cache"), "--out", str(folder / "cached")]
        report(console, "train --cache", watched(cached), records)
        lost = [(p.parent.name, line) for p in folder.glob("*/unreadable-0.tsv") for line in p.read_text("utf-8").splitlines()]
        console.print(
            f"memory: {len(lost)} records and shards named as lost, such as {lost[0]}, {lost[-1]}" if lost else "memory: nothing lost?"
        )


def report(console: Console, name: str, course: Course, records: int) -> None:
    """One line, or what went wrong."""
    if course.code:
        console.print(f"memory: {name} failed with {course.code}\n{course.output}", markup=False)
        return
    verdict = "goal met" if course.growth < GOAL else "goal missed"
    console.print(
        f"memory: {name}: {records / course.seconds:.0f} records/s, warm {course.warm / 2**20:.0f} MiB, grows {course.growth:+.1%} "
        f"in the rest of {course.seconds:.0f} s ({verdict}: < {GOAL:.0%})"
    )
