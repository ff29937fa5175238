"""Commands killed at random moments, repeated, and compared with uninterrupted ones: python tests/fuzz/kill.py --train 30 --encode 10 …

Every command runs in a process that is forked from one with everything imported, so that the kills are spread over its work and
not over its imports; half of them come in its last quarter, where files are written. After every kill each file with a final name
must be readable. Prints a table, and exits with 1 where anything differs.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file

DEVICE = ("--device", "cpu")
CAT = str(Path(__file__).parents[2] / "examples" / "cat.png")
VARYING = ("generation_seconds", "finetune_seconds")  # tensors that no two runs share


class Command(NamedTuple):
    """A command that writes to a folder, and how its results are read."""

    arguments: Callable[[Path], list[str]]
    read_result: Callable[[Path], object]


def read_tensors(paths: list[Path]) -> dict[str, list[object]]:
    return {
        path.name: [(name, t.dtype, t.tolist()) for name, t in sorted(load_file(path).items()) if name not in VARYING]
        for path in sorted(paths)
    }


def read_pixels(paths: list[Path]) -> list[tuple[str, bytes]]:
    return [(path.name, Image.open(path).convert("RGB").tobytes()) for path in sorted(paths)]


def read_last_images(folder: Path) -> list[bytes]:
    """The pixels of the images of the last call: those with the highest number of each seed."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("0*.png"), key=lambda path: int(path.stem.partition("-")[2] or 1)):
        newest[path.stem.split("-")[0]] = path
    return [pixels for _, pixels in read_pixels(list(newest.values()))]


COMMANDS = {
    "train": Command(
        lambda out: ["train", "--data", "mini:32", "--max-train-steps", "30", "--train-batch-size", "2", "--checkpointing-steps", "2",
                     "--num-validation-images", "2", "--validation-steps", "15", "--validation-num-inference-steps", "2",
                     "--no-sanity-check", *DEVICE, "--output-dir", str(out)],
        lambda out: read_tensors([out / "adapter.safetensors", out / "best.safetensors"]),
    ),
    "encode": Command(
        lambda out: ["encode", "mini:2000", str(out), "--batch-size", "16", *DEVICE],
        lambda out: read_tensors(list(out.glob("0*.safetensors"))),
    ),
    "evaluate": Command(
        lambda out: ["evaluate", "--num-prompts", "8", "--num-images-per-prompt", "2", "--num-inference-steps", "2", "--batch-size", "4",
                     "--adapter", "mini", *DEVICE, "--output-dir", str(out)],
        lambda out: (read_tensors(list(out.glob("rows/mini/*.safetensors"))), read_pixels(list(out.glob("rows/*/images/*.png")))),
    ),
    "generate": Command(
        lambda out: ["generate", "--image", CAT, "--num-images", "4", "--num-inference-steps", "2", *DEVICE, "--output-dir", str(out)],
        read_last_images,
    ),
    "convert": Command(
        lambda out: ["convert", "mini-plus", str(out / "converted.safetensors")],
        lambda out: read_tensors([out / "converted.safetensors"]),
    ),
}  # fmt: skip


def run(arguments: list[str]) -> None:
    """In a process of its own: the command, without output."""
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        from imprompt.cli import main

        code = main(arguments)
    sys.exit(code)


def check_files(folder: Path) -> None:
    """Raise an error where a file with a final name cannot be read. Hidden files have none."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text("utf-8"))


class Result(NamedTuple):
    """What happened to one command."""

    kills: int
    runs: int  # that were completed and compared
    different: int
    left: int  # hidden files and folders after a completed run


def kill_command(command: Command, kills: int, folder: Path, rng: random.Random, context: multiprocessing.context.BaseContext) -> Result:
    """Kill a command so often, in runs that are each completed at last, and compare every one."""

    def start(out: Path) -> multiprocessing.process.BaseProcess:
        out.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=run, args=(command.arguments(out),))  # type: ignore[attr-defined]
        process.start()
        return process

    def complete(out: Path) -> float:
        begin, process = time.monotonic(), start(out)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"{command.arguments(out)} ended with {process.exitcode}")
        return time.monotonic() - begin

    complete(folder / "complete")
    shutil.rmtree(folder / "complete")
    seconds = complete(folder / "complete")
    expected = command.read_result(folder / "complete")
    done = runs = different = left = 0
    while done < kills:
        out = folder / f"run-{runs}"
        for _ in range(rng.randint(1, 6)):
            process = start(out)
            process.join(seconds * (rng.uniform(0.75, 1) if rng.random() < 0.5 else rng.uniform(0, 1)))
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            done += process.exitcode == -signal.SIGKILL
            check_files(out)
            if done == kills or process.exitcode == 0:
                break
        complete(out)
        check_files(out)
        runs += 1
        different += command.read_result(out) != expected
        left += sum(path.name.startswith((".imprompt-", ".step-")) for path in out.rglob(".*"))
        shutil.rmtree(out)
    return Result(done, runs, different, left)


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; 1 where anything differed or was left behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in COMMANDS:
        parser.add_argument(f"--{name}", type=int, default=0, metavar="KILLS")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imprompt.training", "imprompt.evaluation.runner", "imprompt.generation.generate", "imprompt.cli"])
    rng, failed = random.Random(options["seed"]), False
    print(f"{'command':10}{'kills':>7}{'runs':>6}{'different':>11}{'left behind':>13}{'seconds':>9}")
    for name, command in COMMANDS.items():
        if not options[name]:
            continue
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = kill_command(command, options[name], Path(folder), rng, context)
        print(f"{name:10}{result.kills:7}{result.runs:6}{result.different:11}{result.left:13}{time.monotonic() - begin:9.0f}", flush=True)
        failed = failed or bool(result.different or result.left)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
