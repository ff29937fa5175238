"""`imprompt mini evaluate` on a few samples and steps; the scores of a full run are in docs/results."""

import json

import pytest
from PIL import Image

from imprompt.cli import main
from imprompt.recipes.benchmark import plot_accuracy_vs_scale

QUICK = ["--num-prompts", "3", "--steps", "5", "--scheduler", "dpm++", "--json"]


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run a task; return the results of all its rows and check its contact sheet."""

    def run(task, *options):
        assert main(["mini", "evaluate", *QUICK, "--task", task, "--output-dir", str(tmp_path), *options]) == 0
        with Image.open(tmp_path / f"{task}.png") as sheet:
            assert min(sheet.size) > 200
        return json.loads(capsys.readouterr().out)["results"]

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["edges", "silhouette"])
def test_structure_control_determines_the_shape(evaluate, task):
    scores = evaluate(task)[task]
    assert scores["IoU, control and image"] > scores["IoU, image only"]


def test_inpainting_changes_nothing_outside_the_mask(evaluate):
    assert evaluate("inpaint")["inpaint"]["max change outside the mask"] == 0


def test_increasing_strength_leads_from_the_initial_image_to_the_reference(evaluate):
    scores = evaluate("img2img")["img2img"]
    assert scores["CLIP-I (mini) to the initial image, strength 0.4"] > scores["CLIP-I (mini) to the initial image, strength 1.0"]
    assert scores["CLIP-I (mini) to the reference, strength 0.4"] < scores["CLIP-I (mini) to the reference, strength 1.0"]


def test_two_references_in_two_regions(evaluate):
    assert {"category", "all", "category, without edges"} <= set(evaluate("regions")["regions"])


def test_image_and_text_over_the_scale(evaluate):
    rows = evaluate("image-text", "--scale", "0.2", "--scale", "1")
    assert rows["image-text λ 0.2"]["CLIP-I (mini)"] < rows["image-text λ 1.0"]["CLIP-I (mini)"]
    assert plot_accuracy_vs_scale({0.5: dict.fromkeys(rows["image-text"], 0.5)}, 10).startswith(b"\x89PNG")
