"""Evaluation by subject: which images are references and which are targets, identity metrics, and folders with unusual contents."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from imprompt import cli
from imprompt.config import EvaluateConfig
from imprompt.config.evaluation import EvaluationDataConfig
from imprompt.data.readers import MiniWorld, open_data
from imprompt.data.subjects import SubjectDataset
from imprompt.errors import ImageError, UserError
from imprompt.evaluation import report
from imprompt.evaluation.identity import IdentityGallery, build_gallery, load_or_build_gallery
from imprompt.evaluation.runner import Evaluation, run_evaluation
from imprompt.evaluation.samples import SamplingParams, SubjectEvalSet, load_eval_set
from imprompt.evaluation.systems import SystemLoader, parse_label
from imprompt.mini import world

SMALL = EvaluateConfig.from_options(
    min_images_per_subject=7, num_references=5, targets_per_subject=2, num_prompts=6, num_images_per_prompt=2, num_inference_steps=2,
    batch_size=8, bootstrap_samples=20, prompt_mode="caption", finetune_steps=1, num_class_images=1,
).with_defaults()  # fmt: skip
TARGET, REFERENCE, TEXT = "target (upper bound)", "one reference, returned", "text only"


def open_people(folder, subjects=None, **options):
    return SubjectEvalSet(SubjectDataset(open_data(str(folder)), 3, subjects), EvaluationDataConfig(min_images_per_subject=3, **options))


@pytest.fixture
def people(tmp_path):
    """Laid out as LFW, Name/Name_0001.jpg: with a single image, damaged files, spaces and non-ASCII names, other files."""
    images = MiniWorld(12, images_per_subject=4)
    for n, (name, count) in enumerate((("Ana_Guevara", 4), ("Zoë Ünal", 4), ("Only One", 1), ("李娜", 3))):
        folder = tmp_path / "lfw" / name
        folder.mkdir(parents=True)
        for i in range(count):
            images[(4 * n + i) % 12].target.resize((90, 80)).save(folder / f"{name}_{i + 1:04}.jpg", quality=95)
    (tmp_path / "lfw" / "李娜" / "李娜_0002.jpg").write_bytes(b"no image")
    (tmp_path / "lfw" / "Ana_Guevara" / "notes.txt").write_text("no image either")
    return tmp_path / "lfw"


def test_targets_are_never_references(people):
    eval_set = open_people(people, num_references=3, class_noun="person")
    assert len(eval_set) == 3 and list(eval_set.subjects) == ["Ana_Guevara", "Zoë Ünal", "李娜"]
    for i in range(len(eval_set)):
        try:
            sample = eval_set[i]
        except ImageError:
            continue
        assert sample.prompt == "a photo of a person" and sample.class_noun == "person" and len(sample.references) == 3
        assert sample.target.size[0] == sample.target.size[1]
        assert all(reference.tobytes() != sample.target.tobytes() for reference in sample.references)
    assert [eval_set.group_index(i) for i in range(3)] == [0, 1, 2]


def test_too_few_references_are_repeated_and_damaged_ones_skipped(people):
    eval_set = open_people(people, {"李娜"}, num_references=4, default_caption="someone")
    gallery = eval_set.gallery_images(0, 9)
    assert 1 <= len(gallery) <= 2
    if len(gallery) == 1:  # the damaged image is among the references
        assert len({reference.tobytes() for reference in eval_set[0].references}) == 1
    assert eval_set.prompts == ["someone"]
    for path in (people / "李娜").iterdir():
        path.write_bytes(b"no")
    with pytest.raises(ImageError, match="no image of 李娜 can be opened"):
        eval_set.gallery_images(0, 1)


def test_minis_subjects_are_held_out_and_their_prompts_do_not_describe_them():
    eval_set = load_eval_set(SMALL.dataset)
    assert len(eval_set) == 6 and len(eval_set.subjects) == 3
    for i in range(6):
        sample = eval_set[i]
        subject = world.make_subject(int(sample.subject))
        assert world.is_held_out_combination(subject) and sample.class_noun == subject.category and subject.category in sample.prompt
        assert not set(sample.prompt.split()) & {*world.COLORS, *world.PATTERNS[1:]} and len(sample.references) == 5
    first, second = eval_set[0], eval_set[1]
    assert first.references[0].tobytes() == second.references[0].tobytes() and first.target.tobytes() != second.target.tobytes()


def test_only_the_test_subjects_of_a_training_run(people, tmp_path):
    (tmp_path / "subjects.json").write_text(json.dumps({"test": ["Zoë Ünal", "Ana_Guevara"]}))
    dataset = EvaluationDataConfig(
        data=str(people), min_images_per_subject=3, subject_split=str(tmp_path / "subjects.json"), class_noun="person"
    )
    assert list(load_eval_set(dataset).subjects) == ["Ana_Guevara", "Zoë Ünal"]
    (tmp_path / "subjects.json").write_text("[]")
    with pytest.raises(UserError, match=r"subject_split: expected the subjects.json of a training"):
        load_eval_set(dataset)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Worker, scores by row, and configuration of a finished evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    adapters, baselines = ("one=mini", "mini@average", "mini@max"), ("dreambooth-lora", "inversion")
    config = SMALL.with_options(output_dir=str(folder), adapter=adapters, baseline=baselines)
    list(run_evaluation(config))
    evaluation = Evaluation(config)
    scores = list(report.score_rows(evaluation))
    report.write_evaluation_report(evaluation, scores)
    return evaluation, {score.name: score for score in scores}, config


def test_every_row_has_identity_metrics(evaluation):
    evaluation, scores, _ = evaluation
    rows = [TARGET, "another real image", REFERENCE, TEXT, "one", "mini@average", "mini@max", "dreambooth-lora", "inversion"]
    assert list(scores) == rows
    assert all({"ID similarity", "rank-1 ID acc."} <= set(score.metrics) for score in scores.values())
    assert scores[TARGET].metrics["rank-1 ID acc."].value == 1 and scores[TARGET].metrics["ID similarity"].value > 0.9
    assert scores[TEXT].metrics["ID similarity"].value < scores["mini@average"].metrics["ID similarity"].value
    assert scores["one"].num_images == 12
    table = list(csv.DictReader((evaluation.output_dir / "table.csv").read_text().splitlines()))
    columns = {"ID similarity", "rank-1 ID acc. low", "detection failures"}
    assert columns & set(table[0]) == {"ID similarity", "rank-1 ID acc. low"}


def test_the_returned_reference_is_one_of_the_references(evaluation):
    evaluation, scores, _ = evaluation
    row = next(row for row in evaluation.rows if row.name == REFERENCE)
    paths = sorted((evaluation.row_store(row).folder / "images").iterdir())
    for i, path in enumerate(paths):
        reference = evaluation.eval_set[i].references[i % SMALL.dataset.targets_per_subject]
        assert Image.open(path).convert("RGB").tobytes() == reference.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    values = scores[REFERENCE].metrics
    assert len(paths) == 6 and values["ID similarity"].value > 0.9
    assert values["CLIP-I (mini)"].value < scores[TARGET].metrics["CLIP-I (mini)"].value


def test_with_one_target_another_real_image_is_no_reference():
    eval_set = load_eval_set(SMALL.with_options(min_images_per_subject=8, targets_per_subject=1).dataset)
    sample = eval_set[0]
    assert eval_set.another_image(0).tobytes() not in {image.tobytes() for image in (*sample.references, sample.target)}


def test_fine_tuning_time_is_not_generation_time(evaluation):
    evaluation, scores, _ = evaluation
    for name, is_finetuned in (("dreambooth-lora", True), ("mini@max", False)):
        row = next(row for row in evaluation.rows if row.name == name)
        assert bool(evaluation.load_features(row)["finetune_seconds"].sum() > 0) == is_finetuned
    assert scores["inversion"].trainable_params == 4 * 128
    names = [path.name for path in (evaluation.output_dir / "class").iterdir()]
    class_nouns = {name.rsplit("-", 2)[0] for name in names}
    assert len(names) == SMALL.finetuning.num_class_images * len(class_nouns)  # shared by all subjects of a class


def test_a_second_run_fine_tunes_nothing_again(evaluation):
    evaluation, _, config = evaluation
    before = {path: path.stat().st_mtime_ns for path in evaluation.output_dir.rglob("chunk-*")}
    list(run_evaluation(config))
    assert before == {path: path.stat().st_mtime_ns for path in evaluation.output_dir.rglob("chunk-*")}


def test_all_references_are_used():
    sample, params = load_eval_set(SMALL.dataset)[0], SamplingParams(2, 3.0, (64, 64))
    loader = SystemLoader.from_config(SMALL)

    def generate(source, references):
        (image,) = loader.load_system(source).generate([sample._replace(references=references)], [sample.prompt], [0], params)
        return image.tobytes()

    first = sample.references[:1]
    assert generate("mini", sample.references) != generate("mini", first) and generate("mini@average", first) == generate("mini", first)
    assert generate("mini@average", sample.references) != generate("mini@max", sample.references)
    orders = (generate("mini@average", sample.references), generate("mini@average", sample.references[::-1]))
    assert max(abs(a - b) for a, b in zip(*orders, strict=True)) <= 2


def test_the_gallery_is_built_again_for_other_subjects(tmp_path):
    path = tmp_path / "gallery.safetensors"
    workers = [Evaluation(SMALL.with_options(output_dir=str(tmp_path), num_prompts=count)) for count in (4, 6)]
    small, large = (load_or_build_gallery(path, evaluation.identity_encoder, evaluation.eval_set) for evaluation in workers)
    assert (len(small.centroids), len(large.centroids)) == (2, 3)
    before = path.stat().st_mtime_ns
    load_or_build_gallery(path, workers[1].identity_encoder, workers[1].eval_set)
    assert path.stat().st_mtime_ns == before


def test_another_real_image_is_in_no_gallery():
    eval_set = load_eval_set(SMALL.dataset)
    gallery = [image.tobytes() for image in eval_set.gallery_images(0, 99)]
    others = [eval_set.another_image(i).tobytes() for i in (0, 1)]
    assert others == [eval_set[1].target.tobytes(), eval_set[0].target.tobytes()] and not set(others) & set(gallery)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": ("inversion",), "prompt_mode": "none"}, "needs a prompt that names the subject: add --prompt-mode caption"),
        ({"num_prompts": 2}, "expected at least 2 subjects"),
    ],
)
def test_what_cannot_be_measured_is_reported_before_any_fine_tuning(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        next(run_evaluation(SMALL.with_options(output_dir=str(tmp_path), **options)))


def test_labels_of_rows_with_an_aggregation():
    assert parse_label("mini@average") == ("mini@average", "mini@average")
    assert parse_label("a/b/adapter.safetensors@max") == ("b@max", "a/b/adapter.safetensors@max")
    assert parse_label("x=mini@max") == ("x", "mini@max")


class BrightnessEncoder:
    """An identity encoder that detects nothing in dark images."""

    name = "brightness"

    def embed(self, images):
        embeddings = torch.tensor([[float(sum(image.resize((1, 1)).getpixel((0, 0)))), 1.0] for image in images])
        detected = embeddings[:, 0] > 30
        return torch.nn.functional.normalize(embeddings, dim=1) * detected[:, None], detected


class BlindEncoder(BrightnessEncoder):
    """An identity encoder that detects nothing in any image."""

    def embed(self, images):
        return torch.zeros(len(images), 2), torch.zeros(len(images), dtype=torch.bool)


def test_a_subject_without_a_detected_identity_has_no_centroid(tmp_path):
    for name, brightness in (("bright", 200), ("dark", 0), ("other", 90)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (32, 32), (brightness + i, brightness, brightness)).save(tmp_path / name / f"{i}.png")
    eval_set = open_people(tmp_path, num_references=2)
    gallery = build_gallery(BrightnessEncoder(), eval_set)
    assert gallery.has_embedding.tolist() == [True, False, True] and not gallery.centroids[1].any()
    assert isinstance(gallery, IdentityGallery) and torch.allclose(gallery.centroids[[0, 2]].norm(dim=1), torch.ones(2))
    with pytest.raises(UserError, match="no identity was detected in any image"):
        build_gallery(BlindEncoder(), eval_set)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_images_per_subject": 1}, "min_images_per_subject: expected at least 2"),
        ({"min_images_per_subject": None}, "say how many images a subject has at least, such as --min-images-per-subject 10"),
        ({"identity_encoder": "magic"}, "identity_encoder: expected one of"),
        ({"identity_encoder": "insightface"}, "insightface is not installed"),
        (
            {"baseline": ("dreambooth",), "min_images_per_subject": None, "num_references": 1, "targets_per_subject": 1},
            "is fine-tuned on several images of a subject",
        ),
        ({"baseline": ("reference-only@max",)}, r"reference-only@max|no IP-Adapter"),
    ],
)
def test_mistakes_are_reported(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        list(run_evaluation(SMALL.with_options(output_dir=str(tmp_path), **options)))
    assert not list(tmp_path.rglob("*.png"))


def test_from_a_folder_of_people_to_the_report(people, tmp_path):
    command = f"""evaluate --output-dir {tmp_path / "out"} --json --min-images-per-subject 3 --num-references 2 --class-noun cat
        --identity-encoder mini --num-images-per-prompt 2 --steps 2 --num-prompts 9 --prompt-mode caption --adapter mini@average"""
    assert cli.main([*command.split(), "--data", str(people)]) == 0
    rows = {row["row"]: row for row in csv.DictReader(Path(tmp_path / "out" / "table.csv").read_text().splitlines())}
    row = rows["mini@average"]
    assert int(row["prompts"]) + int(row["skipped"]) == 3 and row["ID similarity"]
    assert "mini@average" in (tmp_path / "out" / "index.html").read_text("utf-8")
