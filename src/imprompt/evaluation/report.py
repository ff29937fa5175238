"""The report of an evaluation: tables, and one page that opens offline."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from imprompt.errors import UserError, summarize_error
from imprompt.evaluation.runner import EvalRow, Evaluation
from imprompt.evaluation.scoring import (
    METRICS,
    MIN_IMAGES_FOR_DISTRIBUTIONS,
    NEGATIVE_MARK,
    NEGATIVE_NOTE,
    RowScore,
    compute_metrics,
    metric_of,
)
from imprompt.evaluation.store import RowStore
from imprompt.evaluation.systems import COPY_BASELINE, NOT_GENERATED
from imprompt.utils.files import atomic_path, write_file
from imprompt.utils.html import render_html, write_page
from imprompt.utils.images import make_contact_sheet
from imprompt.utils.plots import plot_panels
from imprompt.utils.statistics import Interval

MAX_PREVIEW_PROMPTS = 8  # in an image strip
TableCells = Sequence[Sequence[str]]  # a table, line by line; the first is its header

_BODY = """\
{{ results_table(results) }}
<p><small>{{ legend }}</small></p>
<h2>Images</h2>
<p>One column for each prompt.</p>
{{ image_table(strips) }}
{% if curve %}
<h2>Image prompt scale λ</h2>
<p>Prompt: the caption of another image. CLIP-T: similarity to that prompt.</p>
{{ inline_image(curve) }}
{% endif %}
<h2>Protocol</h2>
{{ key_value_table(protocol) }}
"""


def score_rows(evaluation: Evaluation) -> Iterable[RowScore]:
    """The metrics of every row of a finished evaluation, one after the other."""
    return (score_row(evaluation, row) for row in evaluation.rows)


def score_row(evaluation: Evaluation, row: EvalRow) -> RowScore:
    """The metrics of a finished row. They are stored with its images and features, and read back while nothing has changed."""
    path, num_bootstrap_samples = evaluation.row_store(row).score_path, evaluation.metrics.bootstrap_samples
    if path.is_file():
        stored = json.loads(path.read_text("utf-8"))
        if stored.pop("bootstrap_samples") == num_bootstrap_samples:
            return RowScore(**stored | {"metrics": {name: Interval(*bounds) for name, bounds in stored["metrics"].items()}})
    score = _compute_score(evaluation, row)
    write_file(path, json.dumps(asdict(score) | {"bootstrap_samples": num_bootstrap_samples}))
    return score


def parse_score(fields: Mapping[str, Any], path: Path) -> RowScore:
    """The metrics of a row as they were stored. Raises UserError where the file holds something else."""
    try:
        score = RowScore(**{**fields, "metrics": {str(name): Interval(*ends) for name, ends in fields["metrics"].items()}})
        numbers = [*(value for interval in score.metrics.values() for value in interval), score.num_images, score.num_prompts]
        numbers += [score.num_skipped, score.trainable_params or 0, score.seconds_per_image, score.scale]
        check_numbers(numbers)
        if not all(isinstance(text, str) for text in (score.name, score.sweep_of)) or any(
            metric_of(m) not in METRICS for m in score.metrics
        ):
            raise TypeError("expected the names of metrics")
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({summarize_error(error)}); delete it and run the same command again") from error
    return score


def check_numbers(values: Iterable[object]) -> None:
    """Raise TypeError or OverflowError where a value that was read is no number, or too large a one."""
    for value in values:
        if type(value) not in (int, float):
            raise TypeError(f"expected a number, received {type(value).__name__}")
        float(value)  # type: ignore[arg-type]


def _compute_score(evaluation: Evaluation, row: EvalRow) -> RowScore:
    features, targets = (
        evaluation.load_features(row),
        evaluation.load_features(next(r for r in evaluation.rows if r.source == COPY_BASELINE)),
    )
    num_images = len(column) if (column := features.column("prompt_index")) is not None else 0
    return RowScore(
        row.name,
        num_images,
        num_images // row.num_samples,
        num_skipped=len(features.skipped),
        trainable_params=None if row.source in NOT_GENERATED else evaluation.load_system(row.source).trainable_params,
        seconds_per_image=features.generation_seconds / max(num_images, 1),
        scale=row.scale,
        sweep_of=row.sweep_of,
        metrics=compute_metrics(
            features, targets, evaluation.metrics, num_samples=row.num_samples, distribution_metrics=not row.sweep_of,
            gallery=evaluation.gallery, by_subject=evaluation.by_subject,
        ) if num_images else {},
    )  # fmt: skip


def write_evaluation_report(evaluation: Evaluation, scores: Sequence[RowScore]) -> Path:
    """Write table.md, table.csv, table.json, images and index.html. Returns the path of the page."""
    out, protocol = evaluation.output_dir, evaluation.protocol
    rows, points = [score for score in scores if not score.sweep_of], [score for score in scores if score.sweep_of]
    legend = metric_legend(rows, by_subject=evaluation.by_subject)
    facts = "\n".join(f"- {name}: {value}" for name, value in protocol.items())
    write_file(out / "table.md", f"{scores_to_markdown(rows)}\n{legend}\n\n{facts}\n")
    write_file(out / "table.csv", scores_to_csv(scores))
    table = {"protocol": protocol, "rows": [score_to_json(score) for score in scores]}
    write_file(out / "table.json", json.dumps(table, indent=1, ensure_ascii=False))
    strips = {score.name: image_strip(out, score.name) for score in rows}
    with atomic_path(out / "sheet.png") as partial:
        stack_strips(strips).save(partial)
    curve = plot_scale_sweep(points) if points else None
    if curve:
        write_file(out / "curve.png", curve)
    body = render_html(_BODY, results=score_cells(rows), legend=legend, strips=strips, curve=curve, protocol=protocol)
    write_page(out / "index.html", "Evaluation", body, f"Image prompts on {evaluation.loader.pipeline.model}")
    return out / "index.html"


def score_to_json(score: RowScore) -> dict[str, object]:
    """A row for JSON, every metric with its interval."""
    return asdict(score) | {"metrics": {label: interval._asdict() for label, interval in score.metrics.items()}}


def metric_columns(scores: Sequence[RowScore]) -> list[str]:
    """The labels of all metrics of these rows, in the order of METRICS; "CLIP-I (mini)" is a label of the metric "CLIP-I"."""
    labels = dict.fromkeys(label for score in scores for label in score.metrics)
    return sorted(labels, key=lambda label: list(METRICS).index(metric_of(label)))


def format_interval(interval: Interval | None) -> str:
    """A value and half the width of its interval."""
    if interval is None:
        return "–"
    digits = 3 if abs(interval.value) < 10 else 1
    return f"{interval.value:.{digits}f} ± {interval.half_width:.{digits}f}"


def format_millions(num_params: int | None) -> str:
    """A number of parameters in millions."""
    return "–" if num_params is None else f"{num_params / 1e6:.2f} M" if num_params else "0"


def format_image_count(score: RowScore) -> str:
    """The number of images, and of the prompts that were skipped."""
    return f"{score.num_images:,}" + (f" ({score.num_skipped} prompts skipped)" if score.num_skipped else "")


def score_cells(scores: Sequence[RowScore]) -> TableCells:
    """A table of every metric with half of its 95 % interval."""
    labels = metric_columns(scores)
    lines = [["", "trainable params", *labels, "images"]]
    for score in scores:
        values = [format_interval(score.metrics.get(label)) + NEGATIVE_MARK * _is_negative_distance(score, label) for label in labels]
        lines.append([score.name, format_millions(score.trainable_params), *values, format_image_count(score)])
    return lines


def _is_negative_distance(score: RowScore, label: str) -> bool:
    """Whether the unbiased estimate of a squared kernel distance (KID, KD, CMMD) is below zero by more than its interval."""
    return metric_of(label) in ("KD × 1000", "CMMD") and label in score.metrics and score.metrics[label].high < 0


def table_to_markdown(lines: TableCells) -> str:
    """A table in Markdown."""
    head, *rows = ("| " + " | ".join(line).lstrip() + " |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows]) + "\n"


def scores_to_markdown(scores: Sequence[RowScore]) -> str:
    """The metrics of these rows in Markdown."""
    return table_to_markdown(score_cells(scores))


def scores_to_csv(scores: Sequence[RowScore]) -> str:
    """Every metric with both bounds of its interval."""
    labels = metric_columns(scores)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ["row", "trainable params", "images", "prompts", "skipped", "scale", "seconds per image"]
    writer.writerow(head + [f"{label}{bound}" for label in labels for bound in ("", " low", " high")])
    for s in scores:
        values = [value for label in labels for value in s.metrics.get(label, (None, None, None))]
        counts = (s.trainable_params, s.num_images, s.num_prompts, s.num_skipped, s.scale, f"{s.seconds_per_image:.4f}")
        writer.writerow([_quote_formula(s.name), *counts, *("" if value is None else f"{value:.6f}" for value in values)])
    return buffer.getvalue()


def _quote_formula(text: str) -> str:
    """A text that spreadsheets do not take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def metric_legend(scores: Sequence[RowScore], *, by_subject: bool) -> str:
    """What the columns of these rows mean, as plain text: what intervals are over, and what images are compared with."""
    unit, target = ("subject", "target image") if by_subject else ("prompt", "reference image")
    labels = metric_columns(scores)
    meanings = "; ".join(f"{label}: {METRICS[metric_of(label)].format(target=target)}" for label in labels)
    note = f" {NEGATIVE_NOTE}" if any(_is_negative_distance(score, label) for score in scores for label in labels) else ""
    return f"± half of the 95 % interval over {unit}s. {meanings}.{note}{explain_withheld(scores)}"


def explain_withheld(scores: Sequence[RowScore]) -> str:
    """Why some rows have no Fréchet and kernel distances, or nothing where all of them do."""
    withheld = [score for score in scores if score.metrics and not any(metric_of(label) == "FD" for label in score.metrics)]
    if not withheld:
        return ""
    fewest = min(score.num_images for score in withheld)
    return (
        f" Fréchet and kernel distances, CMMD and IS need at least {MIN_IMAGES_FOR_DISTRIBUTIONS} images and as many targets, and are "
        f"withheld of {', '.join(score.name for score in withheld)} ({fewest} images): take more prompts."
    )


def image_strip(output_dir: Path, row_name: str, prompts: Sequence[int] = range(MAX_PREVIEW_PROMPTS)) -> Image.Image:
    """The first images of a row side by side, one for each of these prompts."""
    blank = Image.new("RGB", (64, 64), "white")
    images = [image or blank for image in RowStore(output_dir, row_name).load_images(prompts[:MAX_PREVIEW_PROMPTS])]
    return make_contact_sheet([], images, columns=MAX_PREVIEW_PROMPTS, cell_size=96)


def stack_strips(strips: Mapping[str, Image.Image]) -> Image.Image:
    """Image strips below each other, with their names to the left."""
    font = ImageFont.load_default(15)
    margin = 24 + max(round(font.getlength(name)) for name in strips)
    sheet = Image.new("RGB", (margin + max(s.width for s in strips.values()), sum(s.height for s in strips.values())), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, strip in strips.items():
        draw.text((12, top + strip.height // 2), name, "#222", font, anchor="lm")
        sheet.paste(strip, (margin, top))
        top += strip.height
    return sheet


def plot_scale_sweep(points: Sequence[RowScore]) -> bytes:
    """CLIP-I and CLIP-T over λ, one curve for each adapter, as a PNG."""
    names = dict.fromkeys(point.sweep_of for point in points)
    labels = [label for label in metric_columns(points) if metric_of(label) in ("CLIP-I", "CLIP-T")]
    panels = {
        label: {name: [(p.scale, p.metrics[label]) for p in points if p.sweep_of == name and label in p.metrics] for name in names}
        for label in labels
    }
    return plot_panels(panels, "λ")
