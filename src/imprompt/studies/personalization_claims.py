"""The claims of the personalization paper and our own, evaluated on our rows, and the paper's table next to ours.

К. М. Казистова, И. Д. Степанов, А. В. Филатов (K. M. Kazistova, I. D. Stepanov, A. V. Filatov), «Создание персонализированных
генераций изображений», MIPT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path

import torch

from imprompt.config import PER_SUBJECT_METHODS, ReproduceConfig
from imprompt.evaluation.report import TableCells, score_cells, score_to_json
from imprompt.evaluation.systems import BUILT_IN_ROWS
from imprompt.studies.base import (
    CLIP_I,
    CLIP_T,
    DIVERSITY,
    FD,
    GUIDANCE_SCALE,
    ID_SIMILARITY,
    IS,
    RANK1_ACCURACY,
    SCHEDULER,
    RowId,
    RowResult,
    load_results,
)
from imprompt.studies.claims import (
    Claim,
    Rows,
    evaluate_claims,
    format_difference,
    independent_mean,
    mean_per_subject,
    metric_value,
    paired_difference,
    to_json,
    withhold_verdicts,
)
from imprompt.studies.personalization import (
    IMAGES_PER_TRAIN_SUBJECT,
    NUM_REFERENCES,
    SINGLE_REFERENCE_METHODS,
    TRAINED_AGGREGATIONS,
    UNTRAINED_ROWS,
    PersonalizationBudget,
    PersonalizationStudy,
    load_timings,
    main_row,
)
from imprompt.studies.report import ReportBuilder, load_strips
from imprompt.utils.plots import Curve, plot_panels
from imprompt.utils.statistics import Interval

# Method → its name in the paper's table, IS and FID (LFW, people with at least ten images).
PAPER_TABLE: dict[str, tuple[str, float | None, float | None]] = {
    "base": ("IP-Adapter, one image", 15.37, 8.92),
    "dreambooth": ("DreamBooth", 17.64, 9.61),
    "max": ("IP-Adapter + max pooling", 14.12, 10.10),
    "average": ("IP-Adapter + average pooling", 13.56, 11.82),
    "self-attention": ("IP-Adapter + self-attention", 18.72, 7.56),
    "concat": ("concatenation", None, None),
    "plus": ("fine-grained, one image", None, None),
    "average-tokens": ("fine-grained, average of tokens", None, None),
    "max-tokens": ("fine-grained, max of tokens", None, None),
    "average-plus": ("fine-grained, average of embeddings", None, None),
    "max-plus": ("fine-grained, max of embeddings", None, None),
    "attention-tokens": ("fine-grained, our attention over tokens", None, None),
    "dreambooth-lora": ("DreamBooth with LoRA", None, None),
    "inversion": ("Textual Inversion", None, None),
}


def table_row(method: str) -> RowId:
    """A method's row in the table: of a trained aggregation the mean over its seeds."""
    return replace(main_row(method), seed=None)


BASE, PLUS, DREAMBOOTH, MAX, AVERAGE = (table_row(method) for method in ("base", "plus", "dreambooth", "max", "average"))
SELF_ATTENTION, ATTENTION_TOKENS = table_row("self-attention"), table_row("attention-tokens")
AVERAGE_PLUS, MAX_PLUS = RowId("average-plus"), RowId("max-plus")
BEST = RowId("average-tokens")  # of ours, selected on 80 subjects that are not among the test's (docs/log.md)
PAPER_ROWS = (BASE, DREAMBOOTH, MAX, AVERAGE, SELF_ATTENTION)
TABLE_ROWS = (*map(RowId, BUILT_IN_ROWS), *map(table_row, PAPER_TABLE))
CITATION = (
    "К. М. Казистова, И. Д. Степанов, А. В. Филатов (K. M. Kazistova, I. D. Stepanov, A. V. Filatov), «Создание персонализированных "
    "генераций изображений», MIPT."
)
PER_PROMPT_METRICS = (CLIP_I, CLIP_T, DIVERSITY, ID_SIMILARITY, RANK1_ACCURACY)

SEEDS_NOTE = (
    "Intervals are over subjects. The numbers of trained rows are means over the seeds; where a metric compares whole sets of images, "
    "its interval covers those of all seeds; the other intervals do not include the variation between seeds, so differences are given "
    "seed by seed too. Per-subject methods were fine-tuned on each subject with a seed of its own, so their intervals include that "
    "variation. Selected beforehand: the options of those methods on four of these subjects (DreamBooth's were shortened afterwards, from "
    "80 steps to 60), the learning rate of attention over tokens on 40 of them, our best aggregation on 80 others, where joint resampling "
    "of all patches, which has no row, was as good. The row of targets shows the images that were to be generated, the row of other real "
    "images each time the subject's other one (as sets they are the same), the row of a returned reference one of the nine, which is among "
    "those that identity is measured by. These three have half as many images as the other rows, so their FD, KD, CMMD and IS are not "
    "comparable."
)
TIMING_NOTE = (
    "Time per new subject: from its images to keys and values in the UNet, one method after the other while nothing else of the study is "
    "at work; of per-subject methods the fine-tuning, with other rows at work next to it."
)


# ------------------------------------------------------------------------------------------------------- rows and claims


def average_seeds(rows: Rows, num_seeds: int) -> dict[RowId, RowResult]:
    """The rows of the table: the seeds of a trained aggregation become one row, once all of them are finished."""
    table = {row_id: row for row_id, row in rows.items() if row_id in TABLE_ROWS}
    for method in TRAINED_AGGREGATIONS:
        for references in (None, 1):
            by_seed = [rows.get(RowId(method, seed, references)) for seed in range(num_seeds)]
            finished = [row for row in by_seed if row is not None]
            if len(finished) == num_seeds:
                row_id = RowId(method, references=references)
                table[row_id] = mean_over_seeds(row_id, finished)
    return table


def mean_over_seeds(row_id: RowId, rows: Sequence[RowResult]) -> RowResult:
    """The mean of several seeds."""
    first = rows[0]
    columns = set.intersection(*(set(row.per_prompt) for row in rows))
    per_prompt = {c: torch.tensor([row.per_prompt[c] for row in rows], dtype=torch.float64).mean(0).tolist() for c in columns}
    intervals: dict[str, Interval] = {}
    for name in first.score.metrics:
        values = [row.score.metrics[name] for row in rows if name in row.score.metrics]
        if name in PER_PROMPT_METRICS and name in per_prompt:
            intervals[name] = independent_mean(mean_per_subject(per_prompt[name], per_prompt["subject"]))
        else:
            mean = sum(v.value for v in values) / len(values)
            intervals[name] = Interval(mean, min(v.low for v in values), max(v.high for v in values))
    minutes = {stage: sum(row.minutes[stage] for row in rows) / len(rows) for stage in first.minutes}
    return RowResult(replace(first.score, name=str(row_id), metrics=intervals), minutes, per_prompt, first.protocol)


def personalization_claims(rows: Rows) -> list[Claim]:
    """The paper's claims, a … e, and ours, f … i, on the rows of the table and of the sweep."""
    return evaluate_claims(rows, {
        "a": ("self-attention has the lowest Fréchet distance of the paper's five rows", lambda r: best_of_paper_rows(r, FD, -1)),
        "b": ("self-attention has the highest Inception Score of the five", lambda r: best_of_paper_rows(r, IS, 1)),
        "c": ("self-attention has the highest ID similarity of the five", lambda r: beats_all(r, SELF_ATTENTION, PAPER_ROWS[:-1])),
        "d": ("pooling without training has a higher Fréchet distance than one image", pooling_raises_frechet_distance),
        "e": ("more references help self-attention: its ID similarity with nine is above that with one", more_references_help),
        "f": (
            f"nine references through our best aggregation, {BEST}, beat one, and average and max pooling, in ID similarity",
            lambda r: beats_all(r, BEST, (BASE, AVERAGE, MAX)),
        ),
        "g": (
            "the references and the aggregation do it, not the finer adapter: through the same, nine beat one, and average and max pooling",
            lambda r: beats_all(r, BEST, (PLUS, AVERAGE_PLUS, MAX_PLUS)),
        ),
        "h": (
            "training our attention over tokens raises ID similarity above that of their average",
            lambda r: beats_all(r, ATTENTION_TOKENS, (BEST,)),
        ),
        "i": (
            "nine references through our trained attention beat one, and average and max pooling, in ID similarity",
            lambda r: beats_all(r, ATTENTION_TOKENS, (BASE, AVERAGE, MAX)),
        ),
    })  # fmt: skip


def significantly_better(first: Interval, second: Interval, sign: int) -> bool:
    """Whether two values of whole sets differ by more than both intervals allow. sign: 1 where higher is better, −1 where lower is."""
    return sign * (first.value - second.value) > hypot(first.half_width, second.half_width)


def best_of_paper_rows(rows: Rows, name: str, sign: int) -> tuple[bool, str]:
    """Claims a and b: whether self-attention is the best of the paper's rows in a metric of whole sets."""
    values = {row_id: rows[row_id].score.metrics[name] for row_id in PAPER_ROWS}
    best = values.pop(SELF_ATTENTION)
    others = "; ".join(f"{row_id} {value.value:.2f}" for row_id, value in values.items())
    not_beaten = [str(row_id) for row_id, value in values.items() if not significantly_better(best, value, sign)]
    return not not_beaten, f"{name} {best.value:.2f}; {others}" + (f"; not beaten: {'; '.join(not_beaten)}" if not_beaten else "")


def beats_all(rows: Rows, row_id: RowId, others: Sequence[RowId]) -> tuple[bool, str]:
    """Whether the whole interval of a row's difference in ID similarity to each of the others is above zero."""
    gaps = {other: paired_difference(rows, row_id, other, ID_SIMILARITY) for other in others}
    evidence = "; ".join(f"to {other} {format_difference(gap)}{format_seeds(rows, row_id, other)}" for other, gap in gaps.items())
    return all(gap.low > 0 for gap in gaps.values()), f"ID similarity {metric_value(rows, row_id, ID_SIMILARITY):.3f}; {evidence}"


def format_seeds(rows: Rows, row_id: RowId, other: RowId) -> str:
    """The same difference for each seed of a trained aggregation; empty for other rows."""
    seeds = sorted({r.seed for r in rows if r.method == row_id.method and r.seed is not None})
    pairs = [(replace(row_id, seed=seed), replace(other, seed=seed) if other.method == row_id.method else other) for seed in seeds]
    gaps = [paired_difference(rows, *pair, ID_SIMILARITY).value for pair in pairs if pair[0] in rows and pair[1] in rows]
    return f", seed by seed {' '.join(f'{gap:+.3f}' for gap in gaps)}" if gaps else ""


def pooling_raises_frechet_distance(rows: Rows) -> tuple[bool, str]:
    """Claim d."""
    single = rows[BASE].score.metrics[FD]
    pooled = {row_id: rows[row_id].score.metrics[FD] for row_id in (MAX, AVERAGE)}
    evidence = ", ".join(f"{row_id} {value.value:.2f}" for row_id, value in pooled.items())
    worse = all(significantly_better(single, value, -1) for value in pooled.values())
    return worse, f"{FD} {single.value:.2f} with one image; {evidence}"


def more_references_help(rows: Rows) -> tuple[bool, str]:
    """Claim e."""
    single = replace(SELF_ATTENTION, references=1)
    gap = paired_difference(rows, SELF_ATTENTION, single, ID_SIMILARITY)
    with_one, with_nine = (metric_value(rows, row_id, ID_SIMILARITY) for row_id in (single, SELF_ATTENTION))
    evidence = f"ID similarity {with_one:.3f} with one, {with_nine:.3f} with nine; {format_difference(gap)}"
    evidence += format_seeds(rows, SELF_ATTENTION, single)
    sweep = {row_id.references: row for row_id, row in rows.items() if row_id.sweep and row_id.method == "self-attention"}
    if sweep:
        values = " ".join(f"{row.score.metrics[ID_SIMILARITY].value:.3f}" for row in sweep.values())
        evidence += f"; the sweep, of one seed, with {' '.join(map(str, sweep))}: {values}"
    return gap.low > 0, evidence


# ----------------------------------------------------------------------------------------------------------- the report


def write_report(config: ReproduceConfig) -> tuple[Path, list[Claim]]:
    """Write README.md, index.html, results.json, table.csv and images into OUT/report."""
    study = PersonalizationStudy(config.with_options(method=()))
    rows = load_results(study.out, study.row_ids())
    table, seconds = average_seeds(rows, study.budget.num_seeds), load_timings(study.out)
    claims, main_ids = (
        withhold_verdicts(personalization_claims(rows | table), config.budget),
        [row_id for row_id in TABLE_ROWS if row_id in table],
    )
    scores = [table[row_id].score for row_id in main_ids]
    by_seed = [rows[row_id].score for method in TRAINED_AGGREGATIONS for row_id in study.seed_rows(method) if row_id in rows]
    report = ReportBuilder(
        config, f"Personalization (Kazistova, Stepanov, Filatov, MIPT): the paper's comparison on mini, budget {config.budget}"
    )
    report.add_paragraph(CITATION)
    report.add_paragraph(describe_budget(study.budget))
    report.add_claims(claims, SEEDS_NOTE)
    report.add_section("Comparison with the paper")
    report.add_table(comparison_table(table, seconds))
    report.add_paragraph(TIMING_NOTE)
    report.add_scores(scores, by_subject=True)
    if by_seed:
        report.add_section("Each seed")
        report.add_table(score_cells(by_seed))
    report.add_images(load_strips(study.out, {str(row_id): saved_row(row_id) for row_id in main_ids}))
    if panels := curves_by_reference_count(rows, study):
        plot = plot_panels(panels, "references", study.budget.reference_counts)
        alt = "metrics against the number of references"
        report.add_plot("Sweep over the number of references", "references.png", plot, alt, describe_sweep(study.budget))
    report.add_protocol(rows)
    others = [row.score for row_id, row in rows.items() if row_id not in main_ids]
    timed = {
        str(row_id): score_to_json(row.score) | {"time per new subject (s)": seconds_per_subject(row_id, row, seconds)}
        for row_id, row in table.items()
    }
    return report.write(scores + others, to_json(claims, rows) | {"table": timed}), claims


def saved_row(row_id: RowId) -> RowId:
    """The row whose images stand for a row of the table: of a trained aggregation that of the first seed."""
    return replace(row_id, seed=0) if row_id.method in TRAINED_AGGREGATIONS else row_id


def curves_by_reference_count(rows: Rows, study: PersonalizationStudy) -> dict[str, dict[str, Curve]]:
    """What to plot over the number of references: metric → method → points."""
    panels: dict[str, dict[str, Curve]] = {}
    for name in (ID_SIMILARITY, FD, CLIP_T):
        curves: dict[str, Curve] = {}
        for method, row_ids in study.sweep_rows().items():
            finished = [row_id for row_id in row_ids if row_id in rows and name in rows[row_id].score.metrics]
            if points := [(float(row_id.references or 0), rows[row_id].score.metrics[name]) for row_id in finished]:
                curves[method] = points
        if curves:
            panels[name] = curves
    return panels


def comparison_table(table: Rows, seconds: Mapping[str, float]) -> TableCells:
    """The paper's table next to ours, with what a new subject costs."""
    lines = [[
        "method", "paper: IS ↑", "paper: FID ↓", f"ours: {IS} ↑", f"ours: {FD} ↓", f"ours: {ID_SIMILARITY} ↑",
        f"ours: {RANK1_ACCURACY} ↑", "trainable params", "time per new subject (s)",
    ]]  # fmt: skip
    for method, (title, published_is, published_fid) in PAPER_TABLE.items():
        row_id = table_row(method)
        if row_id not in table:
            continue
        row, intervals = table[row_id], table[row_id].score.metrics
        published = ["–" if value is None else f"{value:.2f}" for value in (published_is, published_fid)]
        digits = {IS: 2, FD: 2, ID_SIMILARITY: 3, RANK1_ACCURACY: 3}
        ours = [f"{intervals[name].value:.{count}f}" if name in intervals else "–" for name, count in digits.items()]
        cost = seconds_per_subject(row_id, row, seconds)
        lines.append([
            title, *published, *ours, f"{(row.score.trainable_params or 0) / 1e6:.2f} M", "–" if cost is None else f"{cost:.2g}",
        ])  # fmt: skip
    return lines


def seconds_per_subject(row_id: RowId, row: RowResult, seconds: Mapping[str, float]) -> float | None:
    """The time before images of a new subject can be generated: `seconds` by method, or the fine-tuning of a per-subject method."""
    if row_id.method in PER_SUBJECT_METHODS:
        return 60 * row.minutes.get("finetuning", 0.0) / max(1, len(set(row.per_prompt["subject"])))
    return seconds.get(row_id.method) if row_id == table_row(row_id.method) else None


def describe_budget(b: PersonalizationBudget) -> str:
    """The budget in words."""
    pooled = ", ".join(method for method in UNTRAINED_ROWS if method not in SINGLE_REFERENCE_METHODS)
    return (
        f"Trained rows: leave-one-out training of the embedded adapters, {b.max_train_steps:,} steps × {b.train_batch_size} of "
        f"{b.num_train_images:,} images ({IMAGES_PER_TRAIN_SUBJECT} of each subject: one target, the others references), {b.num_seeds} "
        f"seeds. Every row: {b.num_subjects} held-out subjects × {b.targets_per_subject} target images × {b.num_images_per_prompt}, "
        f"conditioned on {NUM_REFERENCES} references (1 ref: on one), prompt with class noun and background, λ = 1, {SCHEDULER} "
        f"{b.num_inference_steps} steps, guidance scale {GUIDANCE_SCALE:g}. Without training: {pooled}."
    )


def describe_sweep(b: PersonalizationBudget) -> str:
    """What the points of the sweep were measured on."""
    return (
        f"{b.num_sweep_subjects} subjects × {b.targets_per_subject} target images × 1 image; of trained aggregations the first seed. FD "
        "compares these few images with the target images of all subjects, so it is higher than in the table and only comparable along "
        "the curve."
    )
