"""An evaluation as tables and as one page that opens offline."""

import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from imprompt.config import Evaluate
from imprompt.evaluation.metrics import Interval
from imprompt.evaluation.runner import Row, Studio, rows_of
from imprompt.evaluation.scoring import COLUMNS, Score, Seen, scored
from imprompt.evaluation.store import Shelf
from imprompt.evaluation.systems import REAL
from imprompt.utils.files import atomic_path, write_file
from imprompt.utils.html import inline, table, write_page
from imprompt.utils.images import sheet

SHOWN = 8  # prompts of which pictures are shown
Cells = Sequence[Sequence[str]]  # a table, line by line; the first is its head


def scores(choice: Evaluate) -> Iterable[Score]:
    """The figures of every row of a finished evaluation, one after the other."""
    choice = choice.settled()
    studio, out = Studio(choice), Path(choice.out)
    for row in rows_of(choice, studio.cases):
        yield score_row(studio, row, out)


def score_row(studio: Studio, row: Row, out: Path) -> Score:
    """The figures of one row. They are kept beside its chunks, and read back where nothing can have changed."""
    kept = Shelf(out, row.name).score
    choice = studio.choice
    if kept.is_file():
        found = json.loads(kept.read_text("utf-8"))
        if found.pop("resamples") == choice.resamples:
            return Score(**{**found, "figures": {name: Interval(*value) for name, value in found["figures"].items()}})
    copy = next(r for r in rows_of(choice, studio.cases) if r.source == "copy")
    seen, real = Seen(out, row.name, studio.chunks(row)), Seen(out, copy.name, studio.chunks(copy))
    prompts, lost = seen.column("prompt"), seen.lost
    count = 0 if prompts is None else len(prompts)
    figures = {}
    if count:
        figures = scored(seen, real, choice.resamples, row.samples, not row.curve, studio.gallery, bool(choice.subjects))
    trainable = None if row.source in REAL else studio.contender(row.source).trainable
    score = Score(row.name, count, count // row.samples, len(lost), trainable, seen.seconds / max(count, 1), row.scale, row.curve, figures)
    write_file(kept, json.dumps(asdict(score) | {"resamples": choice.resamples}))
    return score


def write(choice: Evaluate, found: Sequence[Score], protocol: dict[str, Any]) -> Path:
    """table.md, table.csv, table.json and index.html; the page's path."""
    out = Path(choice.out)
    rows = [score for score in found if not score.curve]
    write_file(out / "table.md", markdown(rows) + "\n" + "\n".join(f"- {name}: {value}" for name, value in protocol.items()) + "\n")
    write_file(out / "table.csv", as_csv(found))
    write_file(out / "table.json", json.dumps({"protocol": protocol, "rows": [as_dict(s) for s in found]}, indent=1, ensure_ascii=False))
    points = [score for score in found if score.curve]
    body = as_html(cells(rows)) + f"<p><small>{html.escape(legend(rows, bool(choice.subjects)))}</small></p>"
    strips = {score.name: strip(out, score.name) for score in rows}
    with atomic_path(out / "sheet.png") as partial:
        below(strips).save(partial)
    body += f"<h2>Pictures</h2><p>One column for each prompt.</p>{html_strips(strips)}"
    if points:
        curve = curves(points)
        write_file(out / "curve.png", curve)
        body += f"<h2>The weight of the image, λ</h2><p>Text: another prompt's caption. CLIP-T: with that text.</p>{inline(curve)}"
    body += f"<h2>Protocol</h2>{table(protocol)}"
    write_page(out / "index.html", "Evaluation", body, f"Image prompts on {choice.base}")
    return out / "index.html"


def as_dict(score: Score) -> dict[str, Any]:
    """For JSON: each figure with its interval."""
    return asdict(score) | {"figures": {name: dict(value._asdict()) for name, value in score.figures.items()}}


def columns_of(rows: Sequence[Score]) -> list[str]:
    return [name for name in COLUMNS if any(name in score.figures for score in rows)]


def cell(value: Interval | None) -> str:
    """A figure and half the width of its interval."""
    if value is None:
        return "–"
    half = (value.high - value.low) / 2
    digits = 3 if abs(value.value) < 10 else 1
    return f"{value.value:.{digits}f} ± {half:.{digits}f}"


def millions(score: Score) -> str:
    return "–" if score.trainable is None else f"{score.trainable / 1e6:.2f} M" if score.trainable else "0"


def counted(score: Score) -> str:
    """How many pictures there are, and how many prompts were left out."""
    return f"{score.pictures:,}" + (f" ({score.lost} prompts left out)" if score.lost else "")


def cells(rows: Sequence[Score]) -> Cells:
    """Every figure with half of its 95 % interval."""
    names = columns_of(rows)
    lines = [["", "trainable", *names, "pictures"]]
    for score in rows:
        lines.append([score.name, millions(score), *(cell(score.figures.get(name)) for name in names), counted(score)])
    return lines


def as_markdown(lines: Cells) -> str:
    """A table of Markdown."""
    head, *rows = ("| " + " | ".join(line).lstrip() + " |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows]) + "\n"


def as_html(lines: Cells) -> str:
    """A table of HTML, each interval below its figure."""
    (head, *rows), found = lines, []
    for first, *rest in rows:
        figures = "".join("<td>" + html.escape(text).replace(" ± ", "<br><small>± ") for text in rest)
        found.append(f"<tr><th>{html.escape(first)}{figures}")
    return f"<table class=figures><tr>{''.join(f'<th>{html.escape(text)}' for text in head)}{''.join(found)}</table>"


def markdown(rows: Sequence[Score]) -> str:
    """The figures of these rows as Markdown."""
    return as_markdown(cells(rows))


def as_csv(rows: Sequence[Score]) -> str:
    """Every figure with both ends of its interval."""
    names = columns_of(rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["row", "trainable", "pictures", "prompts", "lost", "scale", "seconds"] + [f"{n}{e}" for n in names for e in ("", " low", " high")]
    )
    for s in rows:
        figures = ["" if x is None else f"{x:.6f}" for n in names for x in s.figures.get(n, (None, None, None))]
        writer.writerow([s.name, s.trainable, s.pictures, s.prompts, s.lost, s.scale, f"{s.seconds:.4f}", *figures])
    return buffer.getvalue()


def html_strips(strips: Mapping[str, Image.Image]) -> str:
    """Every row's pictures beside its name."""
    return "<table class=figures>" + "".join(f"<tr><th>{html.escape(n)}<td>{inline(strip, n)}" for n, strip in strips.items()) + "</table>"


def legend(rows: Sequence[Score], by_subject: bool = False) -> str:
    """What the columns of these rows mean, as plain text: what intervals are over, and what pictures are compared with."""
    over, target = ("subjects", "photograph to be drawn") if by_subject else ("prompts", "reference")
    meanings = "; ".join(f"{name}: {COLUMNS[name].format(target=target)}" for name in columns_of(rows))
    return f"± half of the 95 % interval over {over}. {meanings}."


def strip(out: Path, name: str, prompts: Sequence[int] = range(SHOWN)) -> Image.Image:
    """The first pictures of a row, one for each of these prompts, side by side."""
    blank = Image.new("RGB", (64, 64), "white")
    return sheet([], [picture or blank for picture in Shelf(out, name).pictures(prompts[:SHOWN])], columns=SHOWN, cell=96)


def below(strips: Mapping[str, Image.Image]) -> Image.Image:
    """Strips one below the other, each after its name."""
    font = ImageFont.load_default(15)
    margin = 24 + max(round(font.getlength(name)) for name in strips)
    whole = Image.new("RGB", (margin + max(s.width for s in strips.values()), sum(s.height for s in strips.values())), "white")
    pen, top = ImageDraw.Draw(whole), 0
    for name, picture in strips.items():
        pen.text((12, top + picture.height // 2), name, "#222", font, anchor="lm")
        whole.paste(picture, (margin, top))
        top += picture.height
    return whole


Line = list[tuple[float, Interval]]


def curves(points: Sequence[Score]) -> bytes:
    """λ against CLIP-I and CLIP-T, one line for each adapter."""
    names = dict.fromkeys(p.curve for p in points)
    panels = {column: {c: [(p.scale, p.figures[column]) for p in points if p.curve == c] for c in names} for column in ("CLIP-I", "CLIP-T")}
    return plotted(panels, "λ")


def plotted(panels: Mapping[str, Mapping[str, Line]], across: str, ticks: Sequence[float] = ()) -> bytes:
    """Panels side by side: title → line → points with their intervals. As a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    alike = len({tuple(lines) for lines in panels.values()}) == 1
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        width = max((x for line in lines.values() for x, _ in line), default=0.0)
        for place, (name, line) in enumerate(lines.items()):
            values = [value for _, value in line]
            ends = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
            aside = (place - (len(lines) - 1) / 2) * 0.008 * width  # so that no interval hides another
            axis.errorbar(
                [x + aside for x, _ in line],
                [v.value for v in values],
                ends,
                marker="o",
                markersize=3,
                linewidth=1.2,
                elinewidth=0.7,
                label=name,
            )
        axis.set(title=title, xlabel=across)
        if ticks:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.grid(alpha=0.25)
        if not alike:
            axis.legend(frameon=False, fontsize="small")
    if alike:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
