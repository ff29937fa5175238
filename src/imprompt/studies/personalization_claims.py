"""The second paper's claims, each judged on our rows, and ours beside them; its table next to ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path

import torch

from imprompt.config import PERSONAL, Reproduce
from imprompt.evaluation.metrics import Interval, mean_interval
from imprompt.evaluation.report import Cells, Line, as_dict, cells, legend, plotted
from imprompt.evaluation.systems import SHOWN as UNTAUGHT
from imprompt.studies.base import SAMPLER, Finished, finished, strips_of
from imprompt.studies.claims import Claim, Rows, difference, judged, plain, protocols, value_of
from imprompt.studies.personalization import ALONE, BUDGETS, NINE, PHOTOS, PLAIN, TRAINED, Budget, SecondPaper, by_subject, row_of, timed
from imprompt.studies.report import Document

# Our row → the paper's name, its IS and FID (LFW, people with at least ten photographs).
PAPER: dict[str, tuple[str, float | None, float | None]] = {
    "one": ("IP-Adapter, one image", 15.37, 8.92),
    "dreambooth": ("DreamBooth", 17.64, 9.61),
    "max": ("IP-Adapter + max pooling", 14.12, 10.10),
    "average": ("IP-Adapter + average pooling", 13.56, 11.82),
    "self-attention": ("IP-Adapter + self-attention", 18.72, 7.56),
    "concat": ("concatenation", None, None),
    "one-plus": ("fine-grained, one image", None, None),
    "average-tokens": ("fine-grained, average of tokens", None, None),
    "max-tokens": ("fine-grained, max of tokens", None, None),
    "average-plus": ("fine-grained, average of embeddings", None, None),
    "max-plus": ("fine-grained, max of embeddings", None, None),
    "attention-tokens": ("fine-grained, our attention over tokens", None, None),
    "dreambooth-lora": ("DreamBooth with LoRA", None, None),
    "inversion": ("Textual Inversion", None, None),
}
FIVE = ("one", "dreambooth", "max", "average", "self-attention")
BEST = "average-tokens"  # of ours, on 80 subjects that are not among the test's (docs/log.md)
SHOWN = (*UNTAUGHT, *PAPER)
EACH = ("CLIP-I", "CLIP-T", "diversity", "identity", "recognised")  # kept prompt by prompt

SEEDS = (
    "Intervals are over subjects. Of the trained rows each figure is the mean over the seeds; where a figure compares whole sets of "
    "pictures, its interval covers those of all seeds; the others leave the chance of another seed out, so differences are told "
    "seed by seed too. Methods that learn a subject learned each with a seed of its own, so their intervals hold that chance. "
    "Chosen beforehand: the settings of those methods on four of these subjects (DreamBooth's were shortened afterwards, from 80 "
    "steps to 60), the learning rate of attention over tokens on 40 of them, our best way on 80 others, where joint reading of all "
    "patches, which has no row, was as good. Row copy shows the photographs that were to be drawn, row real each time the subject's "
    "other one (as sets they are the same), row reference gives back one of the nine, which is among those that identity is "
    "measured by. They have half as many pictures as the other rows, so their FID, KID, CMMD and IS are not beside the others'."
)
CLOCK = (
    "Seconds for a new subject: from its photographs to keys and values in the UNet, one way after the other while nothing else of the "
    "study is at work; of methods that learn, the learning, with other rows at work beside it."
)


# -------------------------------------------------------------------------------------------------------- rows and claims


def gathered(rows: Rows, seeds: int) -> dict[str, Finished]:
    """The rows of the table: the seeds of a trained way become one row, once all of them are there."""
    found = {name: row for name, row in rows.items() if name in SHOWN}
    for kind in TRAINED:
        for more in ("", f" {ALONE}"):
            of_kind = [rows.get(f"{kind} seed {seed}{more}") for seed in range(seeds)]
            there = [row for row in of_kind if row is not None]
            if len(there) == seeds:
                found[kind + more] = merged(kind + more, there)
    return found


def merged(name: str, rows: Sequence[Finished]) -> Finished:
    """The mean of several seeds."""
    first = rows[0]
    columns = set.intersection(*(set(row.each) for row in rows))
    each = {c: torch.tensor([row.each[c] for row in rows], dtype=torch.float64).mean(0).tolist() for c in columns}
    figures: dict[str, Interval] = {}
    for column in first.score.figures:
        values = [row.score.figures[column] for row in rows if column in row.score.figures]
        if column in EACH and column in each:
            figures[column] = over_subjects(by_subject(each[column], each["subject"]))
        else:
            mean = sum(v.value for v in values) / len(values)
            figures[column] = Interval(mean, min(v.low for v in values), max(v.high for v in values))
    minutes = {key: sum(row.minutes[key] for row in rows) / len(rows) for key in first.minutes}
    return Finished(replace(first.score, name=name, figures=figures), minutes, each, first.protocol)


def over_subjects(values: torch.Tensor) -> Interval:
    """The mean of one value for each subject."""
    return mean_interval(values, torch.arange(len(values)))


def better(rows: Rows, one: str, other: str, column: str = "identity") -> Interval:
    """Mean difference of two rows over the same subjects."""
    a, b = rows[one].each, rows[other].each
    count = min(len(a[column]), len(b[column]))  # of a curve there are fewer prompts
    gap = [x - y for x, y in zip(a[column][:count], b[column][:count], strict=True)]
    return over_subjects(by_subject(gap, a["subject"][:count]))


def claims(rows: Rows) -> list[Claim]:
    """The paper's, a … e, and ours, f … i, on the rows of the table and of the curves."""
    texts: dict[str, tuple[str, Callable[[Rows], tuple[bool, str]]]] = {
        "a": ("self-attention has the lowest FID of the paper's five", lambda r: best_of_five(r, "FID", -1)),
        "b": ("self-attention has the highest Inception Score of the five", lambda r: best_of_five(r, "IS", 1)),
        "c": ("self-attention has the highest identity of the five", lambda r: ahead(r, "self-attention", FIVE[:-1])),
        "d": ("pooling without training has a worse FID than one image", pooling_costs),
        "e": ("more references help self-attention: identity after nine is above that after one", more_help),
        "f": (
            f"nine references through our best, {BEST}, beat one, and average and max pooling, in identity",
            lambda r: ahead(r, BEST, ("one", "average", "max")),
        ),
        "g": (
            "the references and the way do it, not the finer adapter: through the same, nine beat one, and average and max pooling",
            lambda r: ahead(r, BEST, ("one-plus", "average-plus", "max-plus")),
        ),
        "h": (
            "training our attention over tokens raises identity above that of their average",
            lambda r: ahead(r, "attention-tokens", ("average-tokens",)),
        ),
        "i": (
            "nine references through our trained attention beat one, and average and max pooling, in identity",
            lambda r: ahead(r, "attention-tokens", ("one", "average", "max")),
        ),
    }
    return judged(rows, texts)


def apart(better: Interval, worse: Interval, sign: int) -> bool:
    """Whether two figures of whole sets differ by more than both intervals allow."""
    halves = [(v.high - v.low) / 2 for v in (better, worse)]
    return sign * (better.value - worse.value) > hypot(*halves)


def best_of_five(rows: Rows, column: str, sign: int) -> tuple[bool, str]:
    figures = {name: rows[name].score.figures[column] for name in FIVE}
    mine = figures.pop("self-attention")
    told = ", ".join(f"{name} {value.value:.2f}" for name, value in figures.items())
    close = [name for name, value in figures.items() if not apart(mine, value, sign)]
    return not close, f"{column} {mine.value:.2f}; {told}" + (f"; not apart from, or behind: {', '.join(close)}" if close else "")


def ahead(rows: Rows, name: str, others: Sequence[str]) -> tuple[bool, str]:
    """Whether a row's identity is surely above each of the others'."""
    gaps = {other: better(rows, name, other) for other in others}
    told = "; ".join(f"to {other} {difference(gap)}{seed_by_seed(rows, name, other)}" for other, gap in gaps.items())
    return all(gap.low > 0 for gap in gaps.values()), f"identity {value_of(rows, name, 'identity'):.3f}; {told}"


def seed_by_seed(rows: Rows, name: str, other: str) -> str:
    """The same difference once for each seed of a way that is trained; nothing of others."""
    pairs = [(seed, other.replace(name, seed)) for seed in (f"{name} seed {n}" for n in range(len(rows)))]
    gaps = [better(rows, *pair).value for pair in pairs if pair[0] in rows and pair[1] in rows]
    return f", seed by seed {' '.join(f'{gap:+.3f}' for gap in gaps)}" if gaps else ""


def pooling_costs(rows: Rows) -> tuple[bool, str]:
    one, others = rows["one"].score.figures["FID"], {name: rows[name].score.figures["FID"] for name in ("max", "average")}
    told = ", ".join(f"{name} {value.value:.2f}" for name, value in others.items())
    return all(apart(one, value, -1) for value in others.values()), f"FID {one.value:.2f} after one image; {told}"


def more_help(rows: Rows) -> tuple[bool, str]:
    one, nine = f"self-attention {ALONE}", "self-attention"
    gap = better(rows, nine, one)
    told = f"identity {value_of(rows, one, 'identity'):.3f} after one, {value_of(rows, nine, 'identity'):.3f} after nine; {difference(gap)}"
    told += seed_by_seed(rows, nine, one)
    curve = {name.split()[-1]: row for name, row in rows.items() if name.startswith("self-attention seed 0 after ")}
    if curve:
        course = " ".join(f"{row.score.figures['identity'].value:.3f}" for row in curve.values())
        told += f"; the curve, of one seed, after {' '.join(curve)}: {course}"
    return gap.low > 0, told


# ----------------------------------------------------------------------------------------------------------- the report


def report(choice: Reproduce) -> tuple[Path, list[Claim]]:
    """Write README.md, index.html, results.json, table.csv and pictures into OUT/report."""
    study = SecondPaper(replace(choice, method=()))
    out, budget = Path(choice.out), BUDGETS[choice.budget]
    rows = {name: row for name in study.names() if (row := finished(out, name))}
    table = gathered(rows, budget.seeds)
    verdicts, seconds = claims(rows | table), timed(out)
    shown = [name for name in SHOWN if name in table]
    scores = [replace(table[name].score, name=name) for name in shown]
    by_seed = [rows[name].score for kind in TRAINED for name in study.seeds(kind) if name in rows]
    told = Document(out / "report", f"The same subject again: the second paper's comparison on mini, budget {choice.budget}")
    told.command(f"imprompt reproduce {choice.paper} --budget {choice.budget}")
    told.text(_budget(choice))
    told.section("Claims")
    told.claims(verdicts)
    told.text(SEEDS)
    told.section("The paper's table, and ours")
    told.table(beside(table, seconds))
    told.text(CLOCK)
    told.section("All figures")
    told.table(cells(scores))
    told.text(legend(scores, by_subject=True))
    if by_seed:
        told.section("Seed by seed")
        told.table(cells(by_seed))
    told.section("Pictures")
    told.strips(strips_of(out, {name: row_of(name) for name in shown}))
    if lines := course(rows, study):
        told.section("The number of references")
        told.picture("references.png", plotted(lines, "references", budget.counts), "figures against the number of references")
        told.text(_curves(budget))
    told.section("Protocol")
    told.facts(protocols(rows))
    others = [replace(row.score, name=name) for name, row in rows.items() if name not in shown]
    own = {name: as_dict(row.score) | {"seconds for a new subject": seconds_of(name, row, seconds)} for name, row in table.items()}
    return told.write(scores + others, plain(verdicts, rows) | {"table": own}), verdicts


def course(rows: Rows, study: SecondPaper) -> dict[str, dict[str, Line]]:
    """What to plot over the number of references."""
    found: dict[str, dict[str, Line]] = {}
    for title in ("identity", "FID", "CLIP-T"):
        lines = {}
        for way, names in study.curves().items():
            there = [(float(name.rpartition(" ")[2]), rows[name].score.figures.get(title)) for name in names if name in rows]
            line = [(count, value) for count, value in there if value is not None]
            if line:
                lines[way.partition(" seed ")[0]] = line
        if lines:
            found[title] = lines
    return found


def beside(table: Rows, seconds: Mapping[str, float]) -> Cells:
    """The paper's figures next to ours, with what a new subject costs."""
    lines = [
        ["method", "paper: IS ↑", "FID ↓", "ours: IS ↑", "FID ↓", "identity ↑", "recognised ↑", "trainable", "seconds for a new subject"]
    ]
    for name, (title, their_is, their_fid) in PAPER.items():
        if name not in table:
            continue
        row, figures = table[name], table[name].score.figures
        theirs = ["–" if v is None else f"{v:.2f}" for v in (their_is, their_fid)]
        digits = {"IS": 2, "FID": 2, "identity": 3, "recognised": 3}
        mine = [f"{figures[column].value:.{count}f}" if column in figures else "–" for column, count in digits.items()]
        cost = seconds_of(name, row, seconds)
        lines.append([title, *theirs, *mine, f"{(row.score.trainable or 0) / 1e6:.2f} M", "–" if cost is None else f"{cost:.2g}"])
    return lines


def seconds_of(name: str, row: Finished, seconds: Mapping[str, float]) -> float | None:
    """Before a new subject can be drawn: from its photographs to keys and values (`seconds`, by way), or learned from them."""
    if name in PERSONAL:
        return 60 * row.minutes.get("learning", 0.0) / max(1, len(set(row.each["subject"])))
    return seconds.get(name)


def _budget(choice: Reproduce) -> str:
    b = BUDGETS[choice.budget]
    return (
        f"trained rows: from the embedded adapters, {b.steps:,} steps × {b.batch} of {b.pictures:,} photographs ({PHOTOS} of each subject, "
        f"one drawn after the others), {b.seeds} seeds; every row: {b.subjects} held-out subjects × {b.targets} photographs to be drawn × "
        f"{b.samples}, after {NINE} references (one: after one), text says kind and place, λ = 1, {SAMPLER} {b.drawing} steps, guidance 3. "
        f"Without training: {', '.join(name for name, (_, references) in PLAIN.items() if references > 1)}"
    )


def _curves(b: Budget) -> str:
    """What the points of the curves were measured on."""
    return (
        f"{b.curve} subjects × {b.targets} photographs × 1 picture; of the trained ways the first seed. FID compares so few pictures with "
        "the photographs of all subjects, so it is higher than in the table, and only to be read along the curve."
    )
