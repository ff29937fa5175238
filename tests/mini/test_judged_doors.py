"""Mini judged through the doors of `generate`: a few prompts and steps; the figures of a full run are in docs/results/doors."""

import json

import numpy as np
import pytest
from PIL import Image

from imprompt.cli import main
from imprompt.mini import world
from imprompt.mini.judge import Judge, cases
from imprompt.recipes.benchmark import shares

QUICK = ["--prompts", "3", "--steps", "5", "--scheduler", "dpm++", "--json"]


@pytest.fixture
def judged(tmp_path, capsys):
    def run(task, *more):
        assert main(["mini", "judge", *QUICK, "--task", task, "--out", str(tmp_path), *more]) == 0
        with Image.open(tmp_path / f"{task}.png") as sheet:
            assert min(sheet.size) > 200
        return json.loads(capsys.readouterr().out)["results"]

    return run


def test_the_judge_finds_silhouettes():
    shown = cases(20)
    found = Judge().silhouettes([c.photo for c in shown])
    truth = np.stack([np.asarray(world.silhouette(c.subject, c.scene)) > 127 for c in shown])
    assert ((found & truth).sum((1, 2)) > 0.85 * (found | truth).sum((1, 2))).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["edges", "silhouette"])
def test_structure_says_the_shape(judged, kind):
    found = judged(kind)[kind]
    assert found["IoU, with image"] > found["IoU, image without structure"]


def test_outside_the_mask_nothing_changes(judged):
    assert judged("inpaint")["inpaint"]["outside changed by"] == 0


def test_the_strength_leads_from_the_beginning_to_the_image(judged):
    found = judged("img2img")["img2img"]
    assert found["CLIP-I to the beginning, strength 0.4"] > found["CLIP-I to the beginning, strength 1.0"]
    assert found["CLIP-I to the image, strength 0.4"] < found["CLIP-I to the image, strength 1.0"]


def test_two_references_in_two_regions(judged):
    assert {"kind", "all", "kind, without edges"} <= set(judged("regions")["regions"])


def test_image_and_text_over_the_scale(judged):
    found = judged("image-text", "--scale", "0.2", "--scale", "1")
    assert found["image-text λ 0.2"]["CLIP-I"] < found["image-text λ 1.0"]["CLIP-I"]
    assert shares({0.5: dict.fromkeys(found["image-text"], 0.5)}, 10).startswith(b"\x89PNG")
