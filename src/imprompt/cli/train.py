"""`imprompt train`."""

import argparse
import json
import os
import time
from pathlib import Path

from imprompt.cli import chosen_fields
from imprompt.cli.console import progress_bar, quiet_libraries
from imprompt.cli.launch import launch, watch_launcher
from imprompt.config import Encode, Train

NAMED = 10  # records left out that are named on the screen


def run(arguments: argparse.Namespace) -> None:
    """Train, show the rate and the figures, and say where the adapter is."""
    choice = chosen_fields(arguments, Train).settled()
    if (choice.processes > 1 or choice.deepspeed) and "LOCAL_RANK" not in os.environ:
        raise SystemExit(launch(choice.processes))
    watch_launcher()
    main = os.environ.get("RANK", "0") == "0"
    quiet_libraries()
    with progress_bar("preparing", show=main and not arguments.json) as progress:
        from imprompt.training import Progress, begin, recorded

        def told(at: Progress) -> None:
            progress.rename("encoding")
            progress.advance(at.chunks, at.total, f"{at.records} records")

        loop, report = begin(choice, told)
        if main and report:
            for note in report.notes:
                progress.say(f"note: {note}")
            progress.say(
                f"{report.trainable / 1e6:.1f} M trainable parameters; one batch: loss {report.before:.4f} → {report.after:.4f}; "
                f"about {_time(report.seconds_per_step * choice.steps * choice.accumulate)} for {choice.steps} steps, "
                f"{report.peak_bytes / 2**30:.1f} GiB at the peak"
            )
        progress.rename("training")
        last = None
        for step in recorded(choice, loop) if main else loop:
            progress.advance(step.index, step.steps, f"loss {step.loss:.4f} · {step.images_per_second:.1f} images/s")
            if step.findings:
                progress.say(f"step {step.index}: " + ", ".join(f"{k} {v:.4f}" for k, v in step.findings.figures.items()))
            last = step
    _part()
    if not main:
        return
    folder = Path(choice.out)
    result = {
        "adapter": str(folder / "adapter.safetensors"),
        "page": str(folder / "index.html"),
        "step": last.index if last else choice.steps,
    }
    if arguments.json:
        print(json.dumps(result | (last.findings.figures if last and last.findings else {})))
        return
    print(folder / "adapter.safetensors")
    if (folder / "index.html").exists():
        print(folder / "index.html")


def encode(arguments: argparse.Namespace) -> None:
    """Fill a feature cache, and say what is in it."""
    choice = chosen_fields(arguments, Encode).settled()
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if choice.processes > 1 and "LOCAL_RANK" not in os.environ:
        if code := launch(choice.processes):
            raise SystemExit(code)
    else:
        watch_launcher()
        _encode(choice, rank, ranks, show=not arguments.json)
        if ranks > 1:
            return
    from imprompt.data.feature_cache import contents

    found = contents(Path(choice.out))
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{choice.out}: {found['records']:,} records in {found['chunks']:,} chunks, {found['bytes'] / 2**20:,.0f} MiB")
    for key, why in list(found["lost"].items())[:NAMED]:
        print(f"left out: {key}: {why}")
    if len(found["lost"]) > NAMED:
        print(f"… and {len(found['lost']) - NAMED} more: {choice.out}/unreadable-*.tsv")


def _encode(choice: Encode, rank: int, ranks: int, show: bool) -> None:
    quiet_libraries()
    with progress_bar("encoding", show=show and rank == 0) as progress:
        from imprompt import training
        from imprompt.utils.memory import enough_memory

        began = time.monotonic()
        with enough_memory("take a smaller --batch"):
            for at in training.encode(choice, rank, ranks):
                progress.advance(at.chunks, at.total, f"{at.records} records · {at.records / (time.monotonic() - began):.1f}/s")


def _part() -> None:
    """Leave the other processes in good order: one that just ends may take another down with it."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
