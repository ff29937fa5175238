"""The first paper's claims, each judged on our rows: holds, or does not hold. And its table, beside ours."""

from collections.abc import Callable, Sequence
from pathlib import Path

from imprompt.config import COPIES, GENERAL, Reproduce
from imprompt.evaluation.report import Cells, cell, cells, curves, legend
from imprompt.studies.base import SAMPLER, finished, strips_of, study_of
from imprompt.studies.claims import Claim, Rows, better, difference, judged, plain, protocols, value_of
from imprompt.studies.ip_adapter import BUDGETS, CUSTOM, CUSTOM_NAMES, STYLE, curve_names, training
from imprompt.studies.report import Document

# Our row → the paper's name, its trainable parameters, CLIP-T and CLIP-I (COCO 2017, CLIP ViT-L/14).
PAPER: dict[str, tuple[str, str, float | None, float | None]] = {
    "open-unclip": ("Open unCLIP", "893 M", 0.608, 0.858),
    "kandinsky": ("Kandinsky 2.1", "1229 M", 0.599, 0.855),
    "versatile": ("Versatile Diffusion", "860 M", 0.587, 0.830),
    "image-variations": ("SD Image Variations", "860 M", 0.548, 0.760),
    "sd-unclip": ("SD unCLIP", "870 M", 0.584, 0.810),
    "blip-diffusion": ("BLIP-Diffusion", "by eye", None, None),
    "uni-controlnet": ("Uni-ControlNet (global)", "47 M", 0.506, 0.736),
    "t2i-style": ("T2I-Adapter (style)", "39 M", 0.485, 0.648),
    "shuffle": ("ControlNet Shuffle", "361 M", 0.421, 0.616),
    "reference-only": ("ControlNet Reference-only", "by eye", None, None),
    "seecoder": ("SeeCoder", "by eye", None, None),
    "simple": ("simple adapter", "by eye", None, None),
    "simple-plus": ("simple adapter, fine-grained", "–", None, None),
    "ip-adapter": ("IP-Adapter", "22 M", 0.588, 0.828),
    "ip-adapter-plus": ("IP-Adapter, fine-grained", "by eye", None, None),
}
FULL = tuple(name for name in COPIES if name != "shuffle")
ADAPTERS = tuple(name for name in GENERAL if name not in FULL and not name.startswith("ip-adapter"))

ONE_SEED = (
    "Intervals are over prompts. Every row was trained once, so the chance of another seed is not in them. Minutes are those of one "
    "process of one thread beside another, on what machine there was: they tell what the run cost, not which method is faster."
)


def claims(rows: Rows) -> list[Claim]:
    """All of the paper's claims on these rows."""
    texts: dict[str, tuple[str, Callable[[Rows], tuple[bool, str]]]] = {
        "a": (
            "the adapter is within 3 % of the best fully fine-tuned row's CLIP-I, at less than 5 % of its trainable parameters",
            cheap_and_good,
        ),
        "b": ("the adapter beats every other adapter row on CLIP-I and on CLIP-T", best_adapter),
        "c": ("decoupled cross-attention beats the simple adapter on CLIP-I", decoupled),
        "d": ("fine-grained features beat global ones on CLIP-I, and are less diverse", fine_grained),
        "e": ("λ trades CLIP-I against CLIP-T monotonically, and λ = 0 is the base model", trade),
        "f": ("reuse on a custom model costs less than 5 % of CLIP-I", reuse),
    }
    return judged(rows, texts)


def cheap_and_good(rows: Rows) -> tuple[bool, str]:
    best = max(FULL, key=lambda name: value_of(rows, name, "CLIP-I"))
    mine, theirs = value_of(rows, "ip-adapter", "CLIP-I"), value_of(rows, best, "CLIP-I")
    share = (rows["ip-adapter"].score.trainable or 0) / (rows[best].score.trainable or 1)
    return (
        mine >= 0.97 * theirs and share < 0.05,
        f"{mine:.3f} against {theirs:.3f} of {best} ({mine / theirs - 1:+.1%}), {share:.1%} of its parameters",
    )


def best_adapter(rows: Rows) -> tuple[bool, str]:
    lost, told = [], []
    for column in ("CLIP-I", "CLIP-T"):
        gaps = {name: better(rows, "ip-adapter", name, column) for name in ADAPTERS}
        nearest = min(gaps, key=lambda name: gaps[name].value)
        lost += [f"{name} on {column}" for name, gap in gaps.items() if gap.low <= 0]
        told.append(f"{column}: {difference(gaps[nearest])} to {nearest}, the nearest")
    return not lost, "; ".join(told) + (f"; not beaten: {', '.join(lost)}" if lost else "")


def decoupled(rows: Rows) -> tuple[bool, str]:
    gap = better(rows, "ip-adapter", "simple", "CLIP-I")
    return gap.low > 0, f"{value_of(rows, 'ip-adapter', 'CLIP-I'):.3f} against {value_of(rows, 'simple', 'CLIP-I'):.3f}, {difference(gap)}"


def fine_grained(rows: Rows) -> tuple[bool, str]:
    likeness, variety = (better(rows, "ip-adapter-plus", "ip-adapter", column) for column in ("CLIP-I", "diversity"))
    return likeness.low > 0 and variety.high < 0, f"CLIP-I {difference(likeness)}, diversity {difference(variety)}"


def trade(rows: Rows) -> tuple[bool, str]:
    points = [rows[name] for name in curve_names() if not name.endswith("base")]
    base, off = rows["ip-adapter λ base"].each["seen"], points[0].each["seen"]
    same = max(abs(a - b) for a, b in zip(base, off, strict=True))
    courses = {column: [point.score.figures[column].value for point in points] for column in ("CLIP-I", "CLIP-T")}
    rises = all(a < b for a, b in zip(courses["CLIP-I"], courses["CLIP-I"][1:], strict=False))
    falls = all(a > b for a, b in zip(courses["CLIP-T"], courses["CLIP-T"][1:], strict=False))
    told = "; ".join(f"{column} " + " ".join(f"{v:.3f}" for v in values) for column, values in courses.items())
    scales = " ".join(f"{point.score.scale:g}" for point in points)
    told += f"; λ = 0 differs from the base by {same:g} in what the judge sees, told to five digits"
    return rises and falls and same == 0, f"λ {scales}: {told}"


def reuse(rows: Rows) -> tuple[bool, str]:
    mine, there = value_of(rows, "ip-adapter", "CLIP-I"), value_of(rows, f"ip-adapter {CUSTOM}", "CLIP-I")
    plain, styled = value_of(rows, "text", "CLIP-I"), value_of(rows, f"text {CUSTOM}", "CLIP-I")
    figures = f"{mine:.3f} on mini, {there:.3f} on the custom model ({there / mine - 1:+.1%}); "
    figures += f"text alone {plain:.3f} and {styled:.3f} ({styled / plain - 1:+.1%})"
    return there > 0.95 * mine, figures


# ----------------------------------------------------------------------------------------------------------- the report


def report(choice: Reproduce) -> tuple[Path, list[Claim]]:
    """Write README.md, index.html, results.json, table.csv and pictures into OUT/report."""
    out = Path(choice.out)
    everything = Reproduce(paper=choice.paper, budget=choice.budget)
    rows = {name: row for name in study_of(everything).names() if (row := finished(out, name))}
    table = [name for name in ("copy", "real", "text", *PAPER, *CUSTOM_NAMES) if name in rows]
    verdicts, scores = claims(rows), [rows[name].score for name in table]
    points = [rows[name].score for name in curve_names() if name in rows and not name.endswith("base")]
    told = Document(out / "report", f"IP-Adapter's comparison on mini, budget {choice.budget}")
    told.command(f"imprompt reproduce {choice.paper} --budget {choice.budget}")
    told.text(_budget(choice))
    told.section("The paper's claims")
    told.claims(verdicts)
    told.text(ONE_SEED)
    told.section("The paper's table, and ours")
    told.table(beside(rows, table))
    told.section("All figures")
    told.table(cells(scores))
    told.text(legend(scores))
    told.section("Pictures")
    told.strips(strips_of(out, {name: name for name in table}))
    if points:
        told.section("The weight of the image, λ")
        told.picture("curve.png", curves(points), "λ against CLIP-I and CLIP-T")
        told.text("Text: another prompt's caption; CLIP-T: with that text.")
    told.section("Protocol")
    told.facts(protocols({name: row for name, row in rows.items() if name in (*PAPER, *CUSTOM_NAMES)}))
    return told.write(scores + points, plain(verdicts, rows)), verdicts


def _budget(choice: Reproduce) -> str:
    b, usual = BUDGETS[choice.budget], training(choice, "ip-adapter", Path(choice.out)).settled()
    return (
        f"every trained row: {b.steps:,} steps × {b.batch} pictures of the same {b.pictures:,}, the same seed and settings "
        f"({usual.optimizer}, learning rate {usual.lr:g}, {usual.schedule}); "
        f"every drawn row: {b.prompts:,} held-out prompts × {b.samples}, {SAMPLER} {b.drawing} steps, guidance 3, "
        "empty text (row text: the caption); copy and real: one picture for each prompt; "
        f"the curve: {min(b.curve, b.prompts):,} prompts × 1, another prompt's caption; "
        f"the custom model: mini's UNet trained on in another style ({STYLE}, {b.style:g} of that style's usual steps)"
    )


def beside(rows: Rows, names: Sequence[str]) -> Cells:
    """The paper's figures next to ours."""
    head = "method, paper: trainable, CLIP-T, CLIP-I, ours: trainable, CLIP-T, CLIP-I, minutes of training, of drawing"
    lines = [head.split(", ")]
    for name in names:
        if name not in PAPER:
            continue
        title, size, text, image = PAPER[name]
        row = rows[name]
        theirs = ["–" if v is None else f"{v:.3f}" for v in (text, image)]
        ours = [cell(row.score.figures[column]) for column in ("CLIP-T", "CLIP-I")]
        minutes = [f"{row.minutes[part]:.0f}" for part in ("training", "drawing")]
        lines.append([title, size, *theirs, f"{(row.score.trainable or 0) / 1e6:.2f} M", *ours, *minutes])
    return lines
