"""What the benches on the second study share: its work folder, asked for in the same words, a bar, and identity by subject."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import Progress as Bars
from torch import Tensor

from imprompt.config import Reproduce
from imprompt.evaluation.metrics import cosines
from imprompt.evaluation.runner import Row, Studio
from imprompt.evaluation.scoring import Seen
from imprompt.studies.base import Progress
from imprompt.studies.personalization import by_subject


def asked(bench: str, about: str | None, words: Sequence[str]) -> Reproduce:
    """The study in whose work folder a bench goes on."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {bench}", description=about)
    parser.add_argument("--small", action="store_true", help="the study's smoke budget: says whether it runs")
    parser.add_argument("--out", help="work folder of the study (default: runs/personalisation)")
    chosen = parser.parse_args(words)
    out = chosen.out or ("runs/controls-small" if chosen.small else "runs/personalisation")
    return Reproduce(paper="personalisation", budget="smoke" if chosen.small else "full", out=out, processes=1)


@contextmanager
def shown(bench: str) -> Iterator[Callable[[Progress], None]]:
    """A bar that a study can tell what it does."""
    with Bars(transient=True) as bars:
        bar = bars.add_task(bench)
        yield lambda at: bars.update(bar, description=f"{at.row}: {at.stage}", completed=at.done, total=at.total)


def identity(studio: Studio, row: Row, centroids: Tensor) -> Tensor:
    """How like its subject a row draws each: (subjects,). centroids: (subjects, width)."""
    seen = Seen(studio.out, row.name, studio.chunks(row))
    drawn, group = seen.column("identity"), seen.column("group")
    assert drawn is not None and group is not None
    return by_subject(cosines(drawn, centroids[group]).tolist(), group.tolist())
