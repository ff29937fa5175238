"""Mini judged through the doors of `generate`: a few prompts and steps; the figures of a full run are in docs/results/doors."""

import json

import pytest
from PIL import Image

from imprompt.cli import main
from imprompt.recipes.benchmark import plot_accuracy_vs_scale

QUICK = ["--num-prompts", "3", "--steps", "5", "--scheduler", "dpm++", "--json"]


@pytest.fixture
def judged(tmp_path, capsys):
    def run(task, *more):
        assert main(["mini", "judge", *QUICK, "--task", task, "--output-dir", str(tmp_path), *more]) == 0
        with Image.open(tmp_path / f"{task}.png") as sheet:
            assert min(sheet.size) > 200
        return json.loads(capsys.readouterr().out)["results"]

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["edges", "silhouette"])
def test_structure_says_the_shape(judged, kind):
    found = judged(kind)[kind]
    assert found["IoU, control and image"] > found["IoU, image only"]


def test_outside_the_mask_nothing_changes(judged):
    assert judged("inpaint")["inpaint"]["max change outside the mask"] == 0


def test_the_strength_leads_from_the_beginning_to_the_image(judged):
    found = judged("img2img")["img2img"]
    assert found["CLIP-I (mini) to the initial image, strength 0.4"] > found["CLIP-I (mini) to the initial image, strength 1.0"]
    assert found["CLIP-I (mini) to the reference, strength 0.4"] < found["CLIP-I (mini) to the reference, strength 1.0"]


def test_two_references_in_two_regions(judged):
    assert {"category", "all", "category, without edges"} <= set(judged("regions")["regions"])


def test_image_and_text_over_the_scale(judged):
    found = judged("image-text", "--scale", "0.2", "--scale", "1")
    assert found["image-text λ 0.2"]["CLIP-I (mini)"] < found["image-text λ 1.0"]["CLIP-I (mini)"]
    assert plot_accuracy_vs_scale({0.5: dict.fromkeys(found["image-text"], 0.5)}, 10).startswith(b"\x89PNG")
