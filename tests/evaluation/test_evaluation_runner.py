"""An evaluation: interrupted or divided among processes it gives the same table; mistakes are reported before any work."""

import csv
import json
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

import imprompt
from imprompt.config import MULTI_REFERENCE_METHODS, EvaluateConfig, TrainConfig
from imprompt.config.evaluation import EvaluationDataConfig, MetricsConfig
from imprompt.data.records import Record
from imprompt.errors import ImageError, UserError
from imprompt.evaluation import metrics, report, systems, workers
from imprompt.evaluation.features import FeatureExtractors
from imprompt.evaluation.runner import EVALUATION_SCALES, EvalRow, Evaluation, run_evaluation
from imprompt.evaluation.samples import RecordEvalSet, SamplingParams, load_eval_set
from imprompt.evaluation.scoring import METRICS, NEGATIVE_NOTE, _mean_scores, metric_label, metric_of
from imprompt.evaluation.store import RowStore
from imprompt.evaluation.systems import SystemLoader, parse_label
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.models.clip_score import CLIPScorer
from imprompt.models.image_prompt import ImagePrompt
from imprompt.training import train_adapter

SMALL = EvaluateConfig.from_options(
    num_prompts=6,
    num_images_per_prompt=2,
    num_inference_steps=2,
    batch_size=4,
    bootstrap_samples=20,
    scale_sweep=2,
    adapter=("mini",),
    baseline=("reference-only",),
)
TARGET, ANOTHER, TEXT = "target (upper bound)", "another real image", "text only"


@pytest.fixture(autouse=True, scope="module")
def distributions_of_few_images():
    """Distances of distributions from two images on, which would be withheld."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imprompt.evaluation.scoring.MIN_IMAGES_FOR_DISTRIBUTIONS", 2)
        yield


def configure(folder, **options):
    return SMALL.with_options(output_dir=str(folder), **options)


def run_and_report(folder, **options):
    """Scores by row, and table.csv."""
    config = configure(folder, **options)
    list(run_evaluation(config))
    evaluation = Evaluation(config.with_defaults())
    scores = list(report.score_rows(evaluation))
    report.write_evaluation_report(evaluation, scores)
    return {score.name: score for score in scores}, (folder / "table.csv").read_text()


def without_seconds(table):
    return [{k: v for k, v in row.items() if k != "seconds per image"} for row in csv.DictReader(table.splitlines())]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Folder, scores by row, and table.csv of the evaluation SMALL."""
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, *run_and_report(folder)


def test_every_row_is_there_and_the_target_row_contains_the_targets(evaluation):
    _, scores, _ = evaluation
    assert list(scores)[:5] == [TARGET, ANOTHER, TEXT, "mini", "reference-only"]
    assert scores[TARGET].metrics["CLIP-I (mini)"].value == pytest.approx(1)
    assert scores[TARGET].metrics["self-sim. distance"].value == pytest.approx(0)
    assert scores["mini"].metrics["CLIP-I (mini)"].value > scores["reference-only"].metrics["CLIP-I (mini)"].value
    assert scores["mini"].num_images == 12 and scores[ANOTHER].num_images == 6
    assert scores["mini"].trainable_params == sum(p.numel() for p in imprompt.load("mini").adapter.parameters())
    assert set(scores["mini"].metrics) == {
        "CLIP-I (mini)", "CLIP-T (mini)", "feature cosine", "self-sim. distance", "diversity", "FD (mini)", "KD (mini) × 1000",
        "CMMD (mini)", "IS (mini)",
    }  # fmt: skip


def test_metrics_are_those_of_the_stored_images(evaluation):
    """Computed from the files: CLIP-I, CLIP-T, diversity and FD in other ways, CMMD and IS by functions that test_metrics.py covers."""
    folder, scores, _ = evaluation
    scorer, eval_set = CLIPScorer.load("mini"), load_eval_set(EvaluationDataConfig(num_prompts=6))

    def load_images(name):
        return [Image.open(path).convert("RGB") for path in sorted((RowStore(folder, name).folder / "images").iterdir())]

    for name in ("mini", TEXT):
        image_embeds = scorer.embed_images(load_images(name)).double()
        text_embeds = scorer.embed_prompts(eval_set.prompts).double().repeat_interleave(2, 0)
        clip_t = float((image_embeds * text_embeds).sum(1).mean())
        assert scores[name].metrics["CLIP-T (mini)"].value == pytest.approx(clip_t, abs=1e-5)
        distances = 1 - (image_embeds[0::2] * image_embeds[1::2]).sum(1)
        assert scores[name].metrics["diversity"].value == pytest.approx(float(distances.mean()), abs=1e-5)
    assert scores[TEXT].metrics["CLIP-T (mini)"].value > scores["reference-only"].metrics["CLIP-T (mini)"].value
    extractors = FeatureExtractors(MetricsConfig(clip_model="mini", feature_extractor="mini"))
    targets, images = (extractors.extract_features(load_images(name)) for name in (TARGET, "mini"))
    values = {label: interval.value for label, interval in scores["mini"].metrics.items()}
    cosines = (images["clip_embeds"].double() * targets["clip_embeds"].double().repeat_interleave(2, 0)).sum(1)
    assert values["CLIP-I (mini)"] == pytest.approx(float(cosines.mean()), rel=1e-4)
    cmmd = metrics.clip_mmd(targets["clip_embeds"], images["clip_embeds"])
    assert values["CMMD (mini)"] == pytest.approx(cmmd, rel=1e-4, abs=1e-6)
    assert values["IS (mini)"] == pytest.approx(metrics.inception_score(images["class_probs"].log(), splits=1), rel=1e-4)
    real, generated = (features["features"].double().numpy() for features in (targets, images))
    a, b = (x - x.mean(0) for x in (real, generated))  # Tr (Σ Σ')^½ is the nuclear norm of a · bᵀ / √(n − 1) √(m − 1)
    root_trace = np.linalg.norm(a @ b.T, "nuc") / ((len(real) - 1) * (len(generated) - 1)) ** 0.5
    frechet = ((real.mean(0) - generated.mean(0)) ** 2).sum() + np.trace(np.cov(real.T) + np.cov(generated.T)) - 2 * root_trace
    assert values["FD (mini)"] == pytest.approx(frechet, rel=1e-4)


def test_the_scale_sweep_begins_with_the_base_model(evaluation):
    folder, scores, _ = evaluation
    points = [score for score in scores.values() if score.sweep_of]
    assert [p.scale for p in points] == list(EVALUATION_SCALES)
    assert points[-1].metrics["CLIP-I (mini)"].value > points[0].metrics["CLIP-I (mini)"].value
    evaluation = Evaluation(configure(folder).with_defaults())
    base_row = EvalRow("base", "text", "other", 1, 2)
    evaluation.run_chunk(base_row, 0)
    scale_0 = next(row for row in evaluation.rows if row.name == points[0].name)
    assert torch.equal(evaluation.load_features(scale_0)["clip_embeds"], evaluation.load_features(base_row)["clip_embeds"])


def test_after_an_interruption_the_table_is_the_same(evaluation, tmp_path):
    progress = run_evaluation(configure(tmp_path))
    for _ in range(5):
        next(progress)
    progress.close()
    chunk = next(iter(RowStore(tmp_path, TEXT).folder.glob("chunk-*")))
    written = chunk.stat().st_mtime_ns
    _, table = run_and_report(tmp_path)
    assert chunk.stat().st_mtime_ns == written, "a stored chunk is not generated again"
    assert without_seconds(table) == without_seconds(evaluation[2])


def test_two_processes_give_the_same_table(evaluation, tmp_path, forked_workers):
    _, table = run_and_report(tmp_path, num_processes=2)
    assert without_seconds(table) == without_seconds(evaluation[2])


def test_every_image_is_stored_with_its_seed(evaluation):
    folder, *_ = evaluation
    names = sorted(path.name for path in (folder / "rows" / "mini" / "images").iterdir())
    assert names[:3] == ["00000-0-0.png", "00000-1-1.png", "00001-0-2.png"] and len(names) == 12
    system = SystemLoader.from_config(SMALL.with_defaults()).load_system("mini")
    sample = load_eval_set(EvaluationDataConfig(num_prompts=6))[1]
    (image,) = system.generate([sample], [""], [2], SamplingParams(2, 3.0, (64, 64)))
    stored = Image.open(folder / "rows" / "mini" / "images" / names[2])
    difference = torch.tensor(list(image.tobytes())).float() - torch.tensor(list(stored.convert("RGB").tobytes())).float()
    assert difference.abs().mean() < 2  # bfloat16, another batch


@pytest.mark.parametrize("adapter", ["mini", "mini-plus", "mini-subject"])
def test_in_any_batch_keys_and_values_are_those_of_generate(adapter, monkeypatch):
    """To the bit: where the UNet rounds to bfloat16, a different last digit becomes a difference of 11 of 255 in the image."""
    config = SMALL.with_options(min_images_per_subject=5, num_references=3, num_prompts=12).with_defaults()
    eval_set, batches = load_eval_set(config.dataset), []
    samples = [eval_set[i] for i in range(12)]
    system = SystemLoader.from_config(config).load_system(adapter)

    def record_key_values(method, pipe, image_features, uncond_features, scale):
        batches.append(ImagePrompt(method.adapter, image_features, uncond_features, scale).key_values()[1])
        return nullcontext()

    monkeypatch.setattr(IPAdapter, "apply_to", record_key_values)
    monkeypatch.setattr(systems, "sample_images", lambda *_: [])
    system.generate(samples, [""] * 12, range(12), SamplingParams(2, 3.0, (64, 64)))
    uses_all_references = system.method.name in MULTI_REFERENCE_METHODS
    for i, sample in enumerate(samples):
        single = imprompt.load(adapter)(sample.references if uses_all_references else sample.references[0]).key_values()[1]
        assert all(torch.equal(x[0], y[i]) for n, pair in single.items() for x, y in zip(pair, batches[0][n], strict=True))


def test_the_report_opens_offline(evaluation):
    folder, *_ = evaluation
    page = (folder / "index.html").read_text("utf-8")
    assert "data:image/png" in page and "://" not in page and "reference-only" in page
    table = json.loads((folder / "table.json").read_text())
    assert table["rows"][3]["name"] == "mini" and table["rows"][3]["metrics"]["CLIP-I (mini)"]["low"] < 1
    assert (folder / "table.md").read_text().startswith("| |")
    assert "interval over prompts. CLIP-I (mini): ↑ cosine similarity to the reference image; " in page


def test_negative_distances_of_paired_sets_are_explained(evaluation):
    folder, scores, _ = evaluation
    assert scores[TARGET].metrics["KD (mini) × 1000"].high < 0
    row = next(line for line in (folder / "table.md").read_text().splitlines() if line.startswith(f"| {TARGET}"))
    assert " † |" in row and NEGATIVE_NOTE in (folder / "table.md").read_text() and NEGATIVE_NOTE in (folder / "index.html").read_text()
    without_set_metrics = [score for score in scores.values() if score.sweep_of]
    assert "†" not in report.metric_legend(without_set_metrics, by_subject=False)


def test_labels_name_the_model(tmp_path):
    def labels(clip_model, feature_extractor):
        config = MetricsConfig(clip_model=clip_model, feature_extractor=feature_extractor)
        return [metric_label(name, config) for name in ("CLIP-I", "CLIP-T", "FD", "KD × 1000", "CMMD", "IS")]

    vit_l = "openai/clip-vit-large-patch14"
    assert labels("mini", "mini") == ["CLIP-I (mini)", "CLIP-T (mini)", "FD (mini)", "KD (mini) × 1000", "CMMD (mini)", "IS (mini)"]
    assert labels(vit_l, "inception") == ["CLIP-I", "CLIP-T", "FID", "KID × 1000", f"CMMD ({vit_l})", "IS"]
    assert labels(f"{vit_l}-336", "clip")[:5:2] == [f"CLIP-I ({vit_l}-336)", f"FD (CLIP {vit_l}-336)", "CMMD"]
    assert labels("a/b", str(tmp_path))[2:4] == [f"FD ({tmp_path.name})", f"KD ({tmp_path.name}) × 1000"]
    for config in (("mini", "mini"), (vit_l, "inception"), ("mini", "clip")):
        assert [metric_of(label) for label in labels(*config)] == ["CLIP-I", "CLIP-T", "FD", "KD × 1000", "CMMD", "IS"]
    assert all(
        metric_label(name, MetricsConfig(clip_model="mini", feature_extractor="mini")).startswith(name.split(" ×")[0]) for name in METRICS
    )


def test_mistakes_are_reported_before_any_work_and_leave_no_trace(tmp_path):
    for options in (
        {"clip_model": "./typo"},
        {"num_inference_steps": 5000},
        {"adapter": ("mini", "./nowhere.safetensors")},
        {"baseline": ("./no-pipeline",)},
    ):
        with pytest.raises(UserError):
            next(run_evaluation(configure(tmp_path, **options)))
        assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.json"))
    assert next(run_evaluation(configure(tmp_path))).done == 1


def test_other_data_with_the_same_names_are_rejected(tmp_path):
    for parent, color in (("a", "red"), ("b", "blue")):
        (tmp_path / parent / "images").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64 + i, 64), color).save(tmp_path / parent / "images" / f"{i}.png")
    config = configure(tmp_path / "out", scale_sweep=0, baseline=())
    next(run_evaluation(config.with_options(data=str(tmp_path / "a" / "images"))))
    with pytest.raises(UserError, match=r"was begun with (data|captions and images) = "):
        next(run_evaluation(config.with_options(data=str(tmp_path / "b" / "images"))))


def test_a_process_that_dies_is_reported_in_one_sentence(tmp_path, monkeypatch, forked_workers):
    monkeypatch.setattr(workers, "start_worker", os._exit)  # gets arguments that it cannot use, which ends the process too
    with pytest.raises(UserError, match="a process was killed from outside"):
        list(run_evaluation(configure(tmp_path, num_processes=2)))


def test_another_real_image_is_never_the_reference():
    records = [Record(str(i), Image.new("RGB", (8, 8), (i, 0, 0)), subject="x") for i in range(3)]
    with_references = [Record("a", records[0].target, references=(records[1].target,), subject="x")]
    with_references.append(Record("b", records[1].target, references=(records[0].target,), subject="x"))
    for eval_set in (RecordEvalSet(records), RecordEvalSet(with_references)):
        assert eval_set.has_other_images
        assert all(eval_set.another_image(i).tobytes() != eval_set[i].target.tobytes() for i in range(len(eval_set)))
    with pytest.raises(ImageError, match="no other image"):
        RecordEvalSet(records[:1]).another_image(0)


def test_other_settings_in_the_same_folder_are_rejected(evaluation):
    with pytest.raises(UserError, match=r"inference steps = 2, and now it is 3"):
        next(run_evaluation(configure(evaluation[0], num_inference_steps=3)))


def test_a_folder_of_another_format_is_rejected(tmp_path):
    (tmp_path / "protocol.json").write_text(json.dumps({"base": "mini"}))
    with pytest.raises(UserError, match=r"holds an evaluation in format 1, and this version .* format 3; choose another --output-dir"):
        next(run_evaluation(configure(tmp_path)))


def test_a_trained_method_is_a_row(tmp_path):
    config = TrainConfig.from_options(
        method="uni-controlnet",
        max_train_steps=1,
        train_batch_size=2,
        num_validation_images=0,
        sanity_check=False,
        output_dir=str(tmp_path / "run"),
    )
    list(train_adapter(config))
    adapter = str(tmp_path / "run" / "adapter.safetensors")
    _, table = run_and_report(tmp_path / "out", num_prompts=2, scale_sweep=0, adapter=(adapter,), baseline=())
    assert [row["row"] for row in csv.DictReader(table.splitlines())][-1] == "run"


def test_own_data_with_subjects_and_a_damaged_image(tmp_path):
    for i in range(4):
        folder = tmp_path / "data" / f"subject {i // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 64), (60 * i, 100, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    damaged = tmp_path / "data" / "subject 1" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    scores, _ = run_and_report(tmp_path / "out", data=str(tmp_path / "data"), num_prompts=None, scale_sweep=0, baseline=())
    assert list(scores) == [TARGET, ANOTHER, TEXT, "mini"]
    assert (scores["mini"].num_prompts, scores["mini"].num_skipped, scores["mini"].num_images) == (3, 1, 6)


def test_labels_of_rows():
    assert parse_label("runs/mine/adapter.safetensors") == ("mine", "runs/mine/adapter.safetensors")
    assert parse_label("x=a/b.safetensors") == ("x", "a/b.safetensors")
    assert parse_label("h94/thing") == ("thing", "h94/thing")
    assert parse_label("text") == (TEXT, "text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": ("seecoder",)}, "seecoder is a method; train it first"),
        ({"adapter": ("mini", "mini=mini-plus")}, "two rows are called 'mini'"),
        ({"adapter": ("nowhere.safetensors",)}, "no adapter at nowhere.safetensors"),
        ({"baseline": ("no/such/thing",)}, "no/such/thing"),
        ({"data": "nowhere"}, "no data at nowhere"),
        ({"resolution": 65}, "multiples of"),
        ({"feature_extractor": "nowhere/at-all"}, "no image model at nowhere/at-all"),
        ({"feature_extractor": "inception"}, "Inception needs torch-fidelity"),
        ({"lpips": True}, "LPIPS needs a torchvision"),
        ({"clip_model": "nowhere/at-all"}, "no CLIP model at nowhere/at-all"),
    ],
)
def test_mistakes_are_reported(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        list(run_evaluation(configure(tmp_path, num_prompts=2, **options)))


def test_there_is_no_clip_t_without_a_caption(tmp_path):
    for n in range(5):
        Image.new("RGB", (32, 32), (40 * n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "0.txt").write_bytes(b"\xe9\xff\x01")
    data = EvaluationDataConfig(data=str(tmp_path))
    samples = load_eval_set(data)
    assert len(samples) == 4 and samples.description.startswith(
        "data: 0 of 4 records have a caption; CLIP-T is not computed for the others; 1 cannot be read (0.txt is not text in UTF-8"
    )
    scores = {"CLIP-T": torch.full((4,), torch.nan), "CLIP-I": torch.ones(4)}
    assert set(_mean_scores(scores, torch.arange(4), 10)) == {"CLIP-I"}
    scores["CLIP-T"] = torch.tensor([0.2, torch.nan, 0.4, 0.3])
    assert _mean_scores(scores, torch.arange(4), 10)["CLIP-T"].value == pytest.approx(0.3)
