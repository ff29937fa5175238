"""What the command line shows while it works."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Shown:
    """A progress bar on standard error: rate and time left, and lines above it."""

    def __init__(self, bar: Progress, name: str):
        self._bar, self._task, self._name = bar, bar.add_task(name, total=None, note=""), name

    def advance(self, done: int, total: int | None, note: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, note=note)

    def rename(self, name: str) -> None:
        """Begin the next piece of work, with a rate and a time of its own; within one, nothing."""
        if name != self._name:
            self._bar.reset(self._task, description=name, total=None)
            self._name = name

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(name: str, show: bool = True) -> Iterator[Shown]:
    """A bar that is gone when the work is done; none where standard error is no terminal."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[note]}")]
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
    with bar:
        yield Shown(bar, name)


def quiet_libraries(loading: bool = True) -> None:
    """Keep the libraries' advice to developers off the user's screen, and with `loading` their progress bars for files.

    Call before they are imported. Where something may have to be downloaded, the bars are wanted.
    """
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it speaks on standard output
    if loading:
        from imprompt.models.base_pipelines import hide_progress

        hide_progress()
