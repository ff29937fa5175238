"""The claims of the IP-Adapter paper, evaluated on our rows, and its table next to ours.

IP-Adapter: Ye, Zhang, Liu, Han, Yang, 2023, arXiv:2308.06721.
"""

from pathlib import Path

from imprompt.config import IP_ADAPTER_PAPER_METHODS, UNET_METHODS, ReproduceConfig
from imprompt.evaluation.report import TableCells, format_interval, plot_scale_sweep
from imprompt.studies.base import CLIP_I, CLIP_T, DIVERSITY, GUIDANCE_SCALE, SCHEDULER, RowId, load_results
from imprompt.studies.claims import (
    Claim,
    Rows,
    evaluate_claims,
    format_difference,
    metric_value,
    paired_difference,
    to_json,
    withhold_verdicts,
)
from imprompt.studies.ip_adapter import (
    ADAPTER_ID,
    BASELINE_IDS,
    CUSTOM_MODEL_IDS,
    CUSTOM_MODEL_STYLE,
    SWEEP_IDS,
    TEXT_SWEEP_ID,
    IPAdapterStudy,
)
from imprompt.studies.report import ReportBuilder, load_strips

# Method → its name in the paper's table 1, trainable parameters, CLIP-T and CLIP-I (COCO 2017, CLIP ViT-L/14).
PAPER_TABLE: dict[str, tuple[str, str, float | None, float | None]] = {
    "open-unclip": ("Open unCLIP", "893 M", 0.608, 0.858),
    "kandinsky": ("Kandinsky 2.1", "1229 M", 0.599, 0.855),
    "versatile": ("Versatile Diffusion", "860 M", 0.587, 0.830),
    "image-variations": ("SD Image Variations", "860 M", 0.548, 0.760),
    "sd-unclip": ("SD unCLIP", "870 M", 0.584, 0.810),
    "blip-diffusion": ("BLIP-Diffusion", "images only", None, None),
    "uni-controlnet": ("Uni-ControlNet (global)", "47 M", 0.506, 0.736),
    "t2i-style": ("T2I-Adapter (style)", "39 M", 0.485, 0.648),
    "shuffle": ("ControlNet Shuffle", "361 M", 0.421, 0.616),
    "reference-only": ("ControlNet Reference-only", "images only", None, None),
    "seecoder": ("SeeCoder", "images only", None, None),
    "simple": ("simple adapter", "images only", None, None),
    "simple-plus": ("simple adapter, fine-grained", "–", None, None),
    "ip-adapter": ("IP-Adapter", "22 M", 0.588, 0.828),
    "ip-adapter-plus": ("IP-Adapter, fine-grained", "images only", None, None),
}
FULL_FINETUNING_METHODS = tuple(name for name in UNET_METHODS if name != "shuffle")
OTHER_ADAPTERS = tuple(m for m in IP_ADAPTER_PAPER_METHODS if m not in FULL_FINETUNING_METHODS and not m.startswith("ip-adapter"))
PLUS_ID = RowId("ip-adapter-plus")

CITATION = (
    "H. Ye, J. Zhang, S. Liu, X. Han, W. Yang, IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models, 2023, "
    "arXiv:2308.06721."
)
SINGLE_SEED_NOTE = (
    "Intervals are over prompts. Every row was trained once, so they do not include the variation between seeds. Minutes are those of "
    "one process with one thread, next to another one: they show what the run cost on that machine, not which method is faster."
)


def ip_adapter_claims(rows: Rows) -> list[Claim]:
    """The claims of the paper on these rows."""
    return evaluate_claims(rows, {
        "a": (
            "the adapter is within 3 % of the best fully fine-tuned row's CLIP-I, at less than 5 % of its trainable parameters",
            near_full_finetuning,
        ),
        "b": ("the adapter beats every other adapter row on CLIP-I and on CLIP-T", beats_other_adapters),
        "c": ("decoupled cross-attention beats the simple adapter on CLIP-I", decoupled_beats_simple),
        "d": ("fine-grained features beat global ones on CLIP-I, and are less diverse", fine_grained_beats_global),
        "e": ("λ trades CLIP-I against CLIP-T monotonically, and λ = 0 is the base model", scale_trades_image_for_text),
        "f": ("reuse on a custom model costs less than 5 % of CLIP-I", works_on_custom_model),
    })  # fmt: skip


def near_full_finetuning(rows: Rows) -> tuple[bool, str]:
    """Claim a."""
    best = max((RowId(method) for method in FULL_FINETUNING_METHODS), key=lambda row_id: metric_value(rows, row_id, CLIP_I))
    adapter, finetuned = metric_value(rows, ADAPTER_ID, CLIP_I), metric_value(rows, best, CLIP_I)
    share = (rows[ADAPTER_ID].score.trainable_params or 0) / (rows[best].score.trainable_params or 1)
    evidence = f"{adapter:.3f} against {finetuned:.3f} of {best} ({adapter / finetuned - 1:+.1%}), {share:.1%} of its parameters"
    return adapter >= 0.97 * finetuned and share < 0.05, evidence


def beats_other_adapters(rows: Rows) -> tuple[bool, str]:
    """Claim b."""
    not_beaten, evidence = [], []
    for name in (CLIP_I, CLIP_T):
        gaps = {method: paired_difference(rows, ADAPTER_ID, RowId(method), name) for method in OTHER_ADAPTERS}
        nearest = min(gaps, key=lambda method: gaps[method].value)
        not_beaten += [f"{method} on {name}" for method, gap in gaps.items() if gap.low <= 0]
        evidence.append(f"{name}: {format_difference(gaps[nearest])} to {nearest}, the nearest")
    return not not_beaten, "; ".join(evidence) + (f"; not beaten: {', '.join(not_beaten)}" if not_beaten else "")


def decoupled_beats_simple(rows: Rows) -> tuple[bool, str]:
    """Claim c."""
    simple = RowId("simple")
    gap = paired_difference(rows, ADAPTER_ID, simple, CLIP_I)
    adapter, other = (metric_value(rows, row_id, CLIP_I) for row_id in (ADAPTER_ID, simple))
    return gap.low > 0, f"{adapter:.3f} against {other:.3f}, {format_difference(gap)}"


def fine_grained_beats_global(rows: Rows) -> tuple[bool, str]:
    """Claim d."""
    similarity, diversity = (paired_difference(rows, PLUS_ID, ADAPTER_ID, name) for name in (CLIP_I, DIVERSITY))
    evidence = f"{CLIP_I} {format_difference(similarity)}, diversity {format_difference(diversity)}"
    return similarity.low > 0 and diversity.high < 0, evidence


def scale_trades_image_for_text(rows: Rows) -> tuple[bool, str]:
    """Claim e."""
    points = [rows[row_id] for row_id in SWEEP_IDS]
    text_only, scale_0 = rows[TEXT_SWEEP_ID].per_prompt["CLIP embeddings"], points[0].per_prompt["CLIP embeddings"]
    deviation = max(abs(a - b) for a, b in zip(text_only, scale_0, strict=True))
    trends = {name: [point.score.metrics[name].value for point in points] for name in (CLIP_I, CLIP_T)}
    rises = all(a < b for a, b in zip(trends[CLIP_I], trends[CLIP_I][1:], strict=False))
    falls = all(a > b for a, b in zip(trends[CLIP_T], trends[CLIP_T][1:], strict=False))
    scales = " ".join(f"{point.score.scale:g}" for point in points)
    evidence = "; ".join(f"{name} " + " ".join(f"{v:.3f}" for v in values) for name, values in trends.items())
    evidence += f"; CLIP embeddings at λ = 0 differ from those of text only by {deviation:g}, stored to five digits"
    return rises and falls and deviation == 0, f"λ {scales}: {evidence}"


def works_on_custom_model(rows: Rows) -> tuple[bool, str]:
    """Claim f."""
    text_on_custom, adapter_on_custom = (metric_value(rows, row_id, CLIP_I) for row_id in CUSTOM_MODEL_IDS)
    text, adapter = (metric_value(rows, row_id, CLIP_I) for row_id in (RowId("text"), ADAPTER_ID))
    evidence = f"{adapter:.3f} on mini, {adapter_on_custom:.3f} on the custom model ({adapter_on_custom / adapter - 1:+.1%}); "
    evidence += f"text only {text:.3f} and {text_on_custom:.3f} ({text_on_custom / text - 1:+.1%})"
    return adapter_on_custom > 0.95 * adapter, evidence


# ----------------------------------------------------------------------------------------------------------- the report


def write_report(config: ReproduceConfig) -> tuple[Path, list[Claim]]:
    """Write README.md, index.html, results.json, table.csv and images into OUT/report."""
    study = IPAdapterStudy(config.with_options(method=()))
    rows = load_results(study.out, study.row_ids())
    method_ids = [*map(RowId, PAPER_TABLE), *CUSTOM_MODEL_IDS]
    table = [row_id for row_id in (*BASELINE_IDS, *method_ids) if row_id in rows]
    claims, scores = withhold_verdicts(ip_adapter_claims(rows), config.budget), [rows[row_id].score for row_id in table]
    points = [rows[row_id].score for row_id in SWEEP_IDS if row_id in rows]
    report = ReportBuilder(
        config, f"IP-Adapter (Ye et al., 2023, arXiv:2308.06721): the paper's comparison on mini, budget {config.budget}"
    )
    report.add_paragraph(CITATION)
    report.add_paragraph(describe_budget(study))
    report.add_claims(claims, SINGLE_SEED_NOTE)
    report.add_section("Comparison with the paper")
    report.add_table(comparison_table(rows))
    report.add_scores(scores, by_subject=False)
    report.add_images(load_strips(study.out, {str(row_id): row_id for row_id in table}))
    if points:
        notes = "Text: the caption of another prompt; CLIP-T: with that text."
        report.add_plot("Sweep over the scale λ", "curve.png", plot_scale_sweep(points), "λ against CLIP-I and CLIP-T", notes)
    report.add_protocol({row_id: row for row_id, row in rows.items() if row_id in method_ids})
    return report.write(scores + points, to_json(claims, rows)), claims


def describe_budget(study: IPAdapterStudy) -> str:
    """The budget in words."""
    b, config = study.budget, study.train_config(ADAPTER_ID)
    assert config is not None
    optimization = config.with_defaults().optimization
    return (
        f"Every trained row: {b.max_train_steps:,} steps × {b.train_batch_size} of the same {b.num_train_images:,} images, the same seed "
        f"and options ({optimization.optimizer}, learning rate {optimization.learning_rate:g}, {optimization.lr_scheduler}). "
        f"Every generated row: {b.num_prompts:,} held-out prompts × {b.num_images_per_prompt} images, {SCHEDULER} "
        f"{b.num_inference_steps} steps, guidance scale {GUIDANCE_SCALE:g}, empty text prompt (row text only: the caption). Rows of real "
        f"images: one image for each prompt. Sweep: {min(b.num_sweep_prompts, b.num_prompts):,} prompts × 1 image, the caption of another "
        f"prompt as text. Custom model: mini's UNet fine-tuned to another style ({CUSTOM_MODEL_STYLE}, {b.custom_model_share:g} of that "
        "style's usual steps)."
    )


def comparison_table(rows: Rows) -> TableCells:
    """The paper's table next to ours."""
    lines = [[
        "method", "paper: trainable params", "paper: CLIP-T", "paper: CLIP-I", "ours: trainable params", f"ours: {CLIP_T}",
        f"ours: {CLIP_I}", "minutes of training", "minutes of generation",
    ]]  # fmt: skip
    for method, (title, parameters, clip_t, clip_i) in PAPER_TABLE.items():
        if not (row := rows.get(RowId(method))):
            continue
        published = ["–" if value is None else f"{value:.3f}" for value in (clip_t, clip_i)]
        ours = [format_interval(row.score.metrics[name]) for name in (CLIP_T, CLIP_I)]
        minutes = [f"{row.minutes[stage]:.0f}" for stage in ("training", "generation")]
        lines.append([title, parameters, *published, f"{(row.score.trainable_params or 0) / 1e6:.2f} M", *ours, *minutes])
    return lines
