"""Progress and messages on standard error."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from imprompt.errors import Notice
from imprompt.utils.text import escape


class ProgressDisplay:
    """A progress bar on standard error with rate and remaining time, and messages above it."""

    def __init__(self, bar: Progress, name: str):
        self._bar, self._task, self._name = bar, bar.add_task(name, total=None, note=""), name

    def advance(self, done: int, total: int | None, note: str = "") -> None:
        """So much of the phase is done, out of `total` where that is known."""
        self._bar.update(self._task, completed=done, total=total, note=note)

    def rename(self, name: str) -> None:
        """Begin the next phase, with a rate and a remaining time of its own; no effect within a phase."""
        if name != self._name:
            self._bar.reset(self._task, description=name, total=None)
            self._name = name

    def log(self, text: str) -> None:
        """Print a message above the bar."""
        self._bar.console.print(escape(text), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(name: str, *, show: bool = True) -> Iterator[ProgressDisplay]:
    """A bar that disappears when the work is done; none where standard error is no terminal."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[note]}")]
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
    with bar:
        yield ProgressDisplay(bar, name)


def silence_third_party_logs(*, loading: bool = True) -> None:
    """Hide what libraries log for developers, and with `loading` their progress bars for files.

    To be called before they are imported. Where something may have to be downloaded, the bars are useful.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it logs to standard output
    if loading:
        from imprompt.models.base_pipelines import hide_loading_progress

        hide_loading_progress()


@contextmanager
def print_notices() -> Iterator[None]:
    """Within the context every notice is printed once, as one line on standard error; the warnings of libraries are not."""
    printed = set[str]()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = escape(" ".join(str(message).split()))
        if text not in printed:
            printed.add(text)
            print(f"imprompt: note: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs what is wrong with a file, which our own sentence says
        warnings.simplefilter("always", Notice)
        warnings.showwarning = show
        yield
