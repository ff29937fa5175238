"""A run's diary: every figure as a JSON line, curves, sheets, and one page that opens offline."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from imprompt.config import Train
from imprompt.training.loop import Step
from imprompt.utils.files import atomic_path, write_file
from imprompt.utils.html import inline, table, write_page

EVERY = 2.0  # seconds between two lines
SHEETS = 6  # on the page


def recorded(choice: Train, steps: Iterable[Step]) -> Iterator[Step]:
    """The same steps; on the way their figures are written to the run's folder."""
    diary = Diary(Path(choice.out), choice)
    for step in steps:
        diary.note(step)
        yield step


class Diary:
    """`log.jsonl`, `curves.png`, `samples/step-N.png` and `index.html` in a run's folder."""

    def __init__(self, folder: Path, choice: Train):
        self.folder, self.choice = folder, choice
        self.path = folder / "log.jsonl"
        self._losses: list[float] = []
        self._written = 0.0
        self._begun = False

    def note(self, step: Step) -> None:
        """Take down a step: its mean loss since the last line, and what an examination found."""
        if not self._begun:
            self._forget(step.index)
            self._begun = True
        self._losses.append(step.loss)
        now = time.monotonic()
        if not (step.findings or step.index == step.steps or now - self._written > EVERY):
            return
        line = {"step": step.index, "loss": sum(self._losses) / len(self._losses), "lr": step.lr, "norm": step.norm}
        line |= {"images_per_second": round(step.images_per_second, 2), "skipped": step.skipped, "unreadable": step.unreadable}
        line |= step.findings.figures if step.findings else {}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._losses, self._written = [], now
        if step.findings:
            with atomic_path(self.folder / "samples" / f"step-{step.index:07}.png") as partial:
                step.findings.sheet.save(partial)
            self.page()

    def _forget(self, first: int) -> None:
        """Of a run that is continued, drop the lines behind the state it goes on from."""
        lines = [line for line in self.lines() if line["step"] < first]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def lines(self) -> list[dict[str, Any]]:
        """What was taken down so far; a line that a kill cut off is left out."""
        found = []
        for line in self.path.read_text("utf-8").splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def page(self) -> None:
        """Draw the curves and write the page."""
        lines = self.lines()
        curves = draw_curves(lines)
        write_file(self.folder / "curves.png", curves)
        sheets = sorted((self.folder / "samples").glob("step-*.png"))[-SHEETS:]
        last = next((line for line in reversed(lines) if "validation" in line), lines[-1])
        pictures = "".join(f"<h2>Step {int(p.stem.removeprefix('step-'))}</h2>{inline(p.read_bytes())}" for p in reversed(sheets))
        write_page(
            self.folder / "index.html",
            self.folder.name,
            f"{inline(curves)}<h2>Last examination</h2>{table(last)}"
            f"<p>Above: references. Below: drawn after them alone, empty text, λ = 1.</p>{pictures}"
            f"<details><summary>Settings</summary>{table(asdict(self.choice))}</details>",
            heading=f"{self.choice.method} on {self.choice.base}",
        )


_PANELS = (
    ("loss", ("loss", "validation")),
    ("what the reference tells", ("gap to no reference", "gap to a wrong reference")),
    ("likeness", ("CLIP-I", "CLIP-I (its own encoder)", "CLIP-T")),
)


def draw_curves(lines: list[dict[str, Any]]) -> bytes:
    """A PNG of the figures over the steps, three panels."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(14, 4), layout="constrained")
    for axis, (title, names) in zip(axes, _PANELS, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 40 else None, markersize=3, linewidth=1.2, label=name)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
