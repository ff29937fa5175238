"""Training an adapter: the objective, the loop, what is kept, what is shown."""

from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator

from imprompt.config import Train
from imprompt.training.loop import Step, accelerate, loop
from imprompt.training.precompute import Progress, cached
from imprompt.training.precompute import encode as encode
from imprompt.training.run_log import recorded as recorded
from imprompt.training.sanity_check import Report, preflight
from imprompt.training.setup import Setting, build, states
from imprompt.utils.memory import enough_memory

SMALLER = "take a smaller --batch with more --accumulate, or --checkpointing, or train from a --cache"


def train(choice: Train) -> Iterator[Step]:
    """Train as `choice` says; every step is handed out. The adapter is in `choice.out` when the generator ends.

    A run found in that folder is continued (`resume`). Raises UserError for what the user can mend.
    """
    steps, _ = begin(choice)
    yield from steps


def begin(choice: Train, told: Callable[[Progress], None] | None = None) -> tuple[Iterator[Step], Report | None]:
    """Everything up to the first step, and what the preflight of a new run found. `told` hears of the cache being filled."""
    choice = choice.settled()
    with enough_memory(SMALLER):
        accelerator = accelerate(choice)
        for progress in cached(choice, accelerator.process_index, accelerator.num_processes):
            if told:
                told(progress)
        accelerator.wait_for_everyone()
        setting = build(choice, accelerator.device, accelerator.process_index, accelerator.num_processes)
        fresh = choice.resume == "never" or not states(Path(choice.out))
        report = _tried(choice, setting) if choice.preflight and fresh else None
    return _run(choice, accelerator, setting), report


def _run(choice: Train, accelerator: Accelerator, setting: Setting) -> Iterator[Step]:
    try:
        with enough_memory(SMALLER):
            yield from loop(choice, accelerator, setting)
    finally:
        setting.method.release()


def _tried(choice: Train, setting: Setting) -> Report:
    try:
        return preflight(choice, setting)
    finally:
        setting.method.release()
