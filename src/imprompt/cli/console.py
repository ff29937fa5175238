"""Standard output and standard error: characters that a console has, progress, notices, tables, JSON."""

import codecs
import json
import logging
import os
import select
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from imprompt.errors import Notice, UserError
from imprompt.utils.text import escape

LINE_SECONDS = 30.0  # between two lines of progress where standard error is no terminal
_PLAIN = {
    "λ": "lambda", "…": "...", "–": "-", "−": "-", "×": "x", "·": "*", "→": "->", "≤": "<=", "≥": ">=", "±": "+-", "γ": "gamma", "†": "+",
    "’": "'", "“": '"', "”": '"', "↑": "^", "↓": "v", "é": "e", "²": "^2", "⁶": "^6", "³": "^3", "•": "*",
}  # fmt: skip


def replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: characters that the console does not have are spelled with those that it has, or escaped."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c, "") or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


def prepare_streams() -> None:
    """Print to a console that is not UTF-8 whatever it can show, instead of failing."""
    codecs.register_error("imprompt", replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and getattr(stream, "errors", "") != "imprompt":
            stream.reconfigure(errors="imprompt")


@contextmanager
def output_errors_explained() -> Iterator[None]:
    """A reader that closes standard output early is no error; a full disk is one sentence. Flushes what was printed."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):  # with which rich ends a process
            raise
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            _discard_output()
            return
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        name = error.filename or "cannot write to standard output or a file"
        raise UserError(f"{name}: {error.strerror or error}; check the path, its permissions and the free space") from error


def _has_no_reader() -> bool:
    """Whether it is standard output that is closed at the other end, and no other pipe."""
    poll = getattr(select, "poll", None)
    if poll is None:  # Windows
        return True
    watcher = poll()
    try:
        watcher.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watcher.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def _discard_output() -> None:
    """Send the rest of standard output nowhere, so that the interpreter does not fail at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_table(rows: Iterable[Iterable[object]], header: Iterable[str] = (), title: str | None = None) -> None:
    """A table of plain text: as wide as it needs to be where standard output is no terminal."""
    header = list(header)
    table = Table(*header, show_header=bool(header), box=None, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(escape(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
        console.width = max(1, console.measure(table).maximum)
    console.print(table)


def print_location(path: Path, folder: Path | str) -> None:
    """Where the result is, and how much its folder holds."""
    sizes = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file() and not file.is_symlink()]
    print(escape(f"{folder}: {format_bytes(sum(sizes))} in {len(sizes)} files"))
    print(escape(path))


def print_json(**result: object) -> None:
    """The result of a command, for a program. Characters that a terminal would obey are escaped as JSON does."""
    text = json.dumps(result, ensure_ascii=False)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print("".join(c if c.isprintable() and _encodes(c, encoding) else json.dumps(c)[1:-1].replace("\x7f", r"\u007f") for c in text))


def _encodes(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


class ProgressDisplay:
    """Progress on standard error: a bar with rate and remaining time on a terminal, elsewhere a line every LINE_SECONDS."""

    def __init__(self, bar: Progress, name: str):
        self._bar, self._task, self._name = bar, bar.add_task(name, total=None, note=""), name
        self._start, self._done, self._note = time.monotonic(), 0, ""
        self._total: int | None = None
        self._first = 0  # what was done when this process began to work on the phase

    def advance(self, done: int, total: int | None, note: str = "") -> None:
        """So much of the phase is done, out of `total` where that is known."""
        if self._total is None and total is not None:
            self._start, self._first = time.monotonic(), max(0, done - 1)
        self._done, self._total, self._note = done, total, note
        self._bar.update(self._task, completed=done, total=total, note=note)

    def rename(self, name: str) -> None:
        """Begin the next phase, with a rate and a remaining time of its own; no effect within a phase."""
        if name != self._name:
            self._bar.reset(self._task, description=name, total=None, note="")
            self._name, self._start, self._done, self._total, self._note, self._first = name, time.monotonic(), 0, None, "", 0

    def log(self, text: str) -> None:
        """Print a message above the bar."""
        self._bar.console.print(escape(text), highlight=False, markup=False, soft_wrap=True)

    def describe(self) -> str:
        """The phase in one line: what is done, the rate, and the remaining time."""
        seconds = time.monotonic() - self._start
        if self._total is None:
            return f"{self._name}: {seconds:.0f} s" + (f", {self._done} done" if self._done else "")
        text = f"{self._name}: {self._done} of {self._total}"
        rate = (self._done - self._first) / max(seconds, 1e-9)
        if rate > 0:
            text += f", {rate:.3g}/s, {format_duration((self._total - self._done) / rate)} left"
        return text + (f" · {self._note}" if self._note else "")


@contextmanager
def progress_bar(name: str, *, show: bool = True) -> Iterator[ProgressDisplay]:
    """A bar that disappears when the work is done; where standard error is no terminal, a line every LINE_SECONDS."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[note]}")]
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
    with bar:
        display = ProgressDisplay(bar, name)
        with _print_lines(display, show=show and not console.is_terminal):
            yield display


@contextmanager
def _print_lines(display: ProgressDisplay, *, show: bool) -> Iterator[None]:
    """A thread prints the lines: while something large is loaded, nothing else reports."""
    done = Event()

    def print_until_done() -> None:
        while not done.wait(LINE_SECONDS):
            display.log(f"imprompt: {display.describe()}")

    if show:
        Thread(target=print_until_done, daemon=True, name="imprompt-progress").start()
    try:
        yield
    finally:
        done.set()


def format_duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def format_bytes(count: float) -> str:
    """A size on disk in MiB or GiB."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


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
