"""The log of a run: every value as a JSON line, curves, sample grids, and one page that opens offline."""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from imprompt.config import TrainConfig
from imprompt.training.loop import TrainStep
from imprompt.utils.files import atomic_path, disk_errors_explained, write_file
from imprompt.utils.html import render_html, write_page
from imprompt.utils.plots import plot_panels

LOG_INTERVAL_SECONDS = 2.0
MAX_PLOTTED = 1e100
MAX_SAMPLE_GRIDS = 6  # on the page


def log_steps(config: TrainConfig, steps: Iterable[TrainStep]) -> Iterator[TrainStep]:
    """Pass on the steps of a training, and write their values to its folder on the way."""
    log = RunLog(Path(config.output_dir), f"{config.method} on {config.pipeline.model}", config.to_options())
    for step in steps:
        log.record(step)
        yield step


class RunLog:
    """`log.jsonl`, `curves.png`, `samples/step-N.png` and `index.html` in a run's folder; the page shows a title and the options."""

    def __init__(self, folder: Path, title: str, options: Mapping[str, Any]):
        self.folder, self.title, self.options = folder, title, options
        self.path = folder / "log.jsonl"
        self._losses: list[float] = []
        self._last_write = 0.0
        self._is_started = False

    def record(self, step: TrainStep) -> None:
        """Log a step: every few seconds a line with the mean loss since the last one, and every validation."""
        if not self._is_started:
            self._truncate(step.index)
            self._is_started = True
        self._losses.append(step.loss)
        now = time.monotonic()
        if not (step.validation or step.index == step.max_train_steps or now - self._last_write > LOG_INTERVAL_SECONDS):
            return
        line = {"step": step.index, "loss": sum(self._losses) / len(self._losses), "lr": step.lr, "grad_norm": step.grad_norm}
        line |= {"images_per_second": round(step.images_per_second, 2)}
        line |= {"nonfinite_steps": step.nonfinite_steps, "unreadable": step.unreadable}
        line |= step.validation.metrics if step.validation else {}
        with disk_errors_explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._losses, self._last_write = [], now
        if step.validation:
            with atomic_path(self.folder / "samples" / f"step-{step.index:07}.png") as partial:
                step.validation.sample_grid.save(partial)
            self.write_page()

    def _truncate(self, first_step: int) -> None:
        """Of a run that is resumed, drop the lines from after the checkpoint."""
        lines = [line for line in self.read_lines() if line["step"] < first_step]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def read_lines(self) -> list[dict[str, Any]]:
        """The lines logged so far, without one that was cut off when the process was killed, or is no line of a log."""
        lines = []
        for text in self.path.read_bytes().splitlines() if self.path.exists() else ():
            with suppress(ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
                line = json.loads(text)
                lines.append({"step": int(line["step"])} | {name: value for name, value in line.items() if abs(value) < MAX_PLOTTED})
        return lines

    def write_page(self) -> None:
        """Plot the curves and write the page."""
        lines = self.read_lines()
        curves = plot_curves(lines)
        write_file(self.folder / "curves.png", curves)
        paths = (self.folder / "samples").glob("step-*.png")
        grids = sorted(path for path in paths if re.fullmatch(r"step-\d{7,18}", path.stem))[-MAX_SAMPLE_GRIDS:]
        last = next((line for line in reversed(lines) if "val/loss" in line), lines[-1] if lines else {})
        images = {int(path.stem.removeprefix("step-")): path.read_bytes() for path in reversed(grids)}
        body = render_html(_BODY, curves=curves, last=last, images=images, options=self.options)
        write_page(self.folder / "index.html", self.folder.name, body, heading=self.title)


_BODY = """\
{{ inline_image(curves) }}
<h2>Last validation</h2>
{{ key_value_table(last) }}
<p>Top: reference images. Bottom: generated from them alone, with an empty prompt and λ = 1.</p>
{% for step, image in images.items() %}
<h2>Step {{ step }}</h2>
{{ inline_image(image) }}
{% endfor %}
<details><summary>Options</summary>{{ key_value_table(options) }}</details>
"""
_PANELS = {  # title → beginnings of the names of the values
    "loss": ("loss", "val/loss"),
    "validation loss minus that with the reference": ("val/uncond_gap", "val/shuffled_reference_gap"),
    "CLIP similarity": ("CLIP-I", "CLIP-T"),
}


def plot_curves(lines: list[dict[str, Any]]) -> bytes:
    """A PNG of the logged values over the steps, in three panels."""
    names = dict.fromkeys(name for line in lines for name in line)
    panels = {}
    for title, prefixes in _PANELS.items():
        plotted = [name for name in names if name.startswith(prefixes)]
        panels[title] = {name: [(line["step"], line[name]) for line in lines if name in line] for name in plotted}
    return plot_panels(panels, "step")
