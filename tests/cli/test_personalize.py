"""Several images of a subject in, a contact sheet out; fine-tuned checkpoints are kept and used again."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imprompt import cli
from imprompt.config import TRAINING_FREE_AGGREGATIONS
from imprompt.data.readers import MiniWorld

QUICK = ["--steps", "2", "--num-images", "1", "--json"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mein Hündchen")
    records = MiniWorld(5, held_out=True, images_per_subject=5)
    for i in range(5):
        records[i].target.resize((80, 96)).save(folder / f"Foto {i}.jpg")
    (folder / "kaputt.png").write_bytes(b"no")
    return folder


def open_closed(path) -> Image.Image:
    """An image in memory, with its file closed."""
    with Image.open(path) as image:
        image.load()
        return image


def run_command(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, (json.loads(out) if code == 0 else err)


@pytest.mark.parametrize("method", [*TRAINING_FREE_AGGREGATIONS, "attention"])
def test_references_become_a_contact_sheet(images, tmp_path, capsys, method):
    code, result = run_command(capsys, "personalize", images, "--method", method, "--output-dir", tmp_path, *QUICK)
    assert code == 0 and open_closed(result["sheet"]).width > 500
    settings = json.loads(open_closed(result["images"][0]).info["imprompt"])
    assert settings["method"] == method and settings["seed"] == 0 and len(result["images"]) == 1


def test_a_star_in_a_prompt_stands_for_the_subject(images, tmp_path, capsys):
    arguments = ["--prompt", "a * on a beach", "--prompt", "a * at night", "--class-noun", "cat", "--method", "average"]
    code, result = run_command(capsys, "personalize", images, "--output-dir", tmp_path, *arguments, *QUICK)
    assert code == 0
    assert [json.loads(open_closed(p).info["imprompt"])["prompt"] for p in result["images"]] == ["a cat on a beach", "a cat at night"]


@pytest.mark.parametrize("method", ["dreambooth", "dreambooth-lora", "inversion"])
def test_the_fine_tuned_checkpoint_is_kept_and_used_again(images, tmp_path, capsys, method):
    arguments = [
        "personalize",
        images,
        "--method",
        method,
        "--class-noun",
        "cat",
        "--finetune-steps",
        "1",
        "--num-class-images",
        "1",
        "--output-dir",
        tmp_path,
        *QUICK,
    ]
    code, first = run_command(capsys, *arguments)
    assert code == 0
    file = Path(first["checkpoint"])
    before = file.stat().st_mtime_ns
    pixels = open_closed(first["images"][0]).tobytes()
    code, again = run_command(capsys, *arguments)
    assert code == 0 and file.stat().st_mtime_ns == before and again["finetune_seconds"] < first["finetune_seconds"]
    assert open_closed(again["images"][0]).tobytes() == pixels
    code, result = run_command(
        capsys, "generate", "--adapter", file, "--prompt", "a photo of a cat", "--output-dir", tmp_path / "g", *QUICK
    )
    assert code == 0 and open_closed(result["images"][0]).tobytes() == pixels
    code, error = run_command(capsys, "generate", "--adapter", file, "--prompt", "a dog", "--output-dir", tmp_path / "g", *QUICK)
    assert code == 2 and "expected the word 'cat', or *" in error
    code, error = run_command(
        capsys, "generate", "--adapter", file, "--image", images / "Foto 1.jpg", "--output-dir", tmp_path / "g", *QUICK
    )
    assert code == 2 and "which is conditioned on no image; remove --image" in error
    code, _ = run_command(capsys, *arguments, "--finetune-steps", "2")
    assert code == 0 and file.stat().st_mtime_ns != before  # other options: fine-tuned again


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "data: expected a folder of images"),
        (["nowhere"], "no data at nowhere"),
        (["{images}", "--method", "magic"], "method: expected one of concat, average"),
        (["{images}", "--method", "dreambooth"], "class_noun: dreambooth needs to know what the subject is"),
        (["{images}", "--method", "self-attention"], "has trained weights: name an adapter"),
        (["{images}", "--method", "attention", "--model", "elsewhere"], "has trained weights: name an adapter"),
        (["{images}", "--num-images", "0"], "num_images: expected at least 1"),
        (["{broken}"], "none of the 1 images in"),
        (["{images}", "--finetune-steps", "-1"], "finetune_steps: expected at least 1"),
        (["{images}", "--method", "self-attention", "--adapter", "mini"], "aggregates by concat"),
        (["{images}", "--method", "average", "--finetune-steps", "9"], "finetune_steps: has no effect with average"),
        (["{images}", "--method", "inversion", "--class-noun", "cat", "--adapter", "mini"], "adapter: has no effect with inversion"),
        (["{images}", "--method", "inversion", "--class-noun", "cat", "--prompt", "on a beach"], "expected the word 'cat', or *"),
        (["{images}", "--method", "average", "--prompt", "a * at night"], "class_noun: * in a prompt stands for the subject"),
        (["{images}", "--method", "average", "--output-dir", "{images}"], "output_dir: expected another folder"),
        (["{images}", "--method", "inversion", "--class-noun", "cat", "--scale", "0.5"], "scale: has no effect with Textual Inversion"),
        (
            ["{images}", "--method", "dreambooth", "--class-noun", "cat", "--resize-mode", "pad"],
            "resize_mode: has no effect with dreambooth",
        ),
        (
            ["{images}", "--method", "dreambooth", "--class-noun", "cat", "--resolution", "66"],
            "resolution: the model generates multiples of",
        ),
    ],
)
def test_mistakes_get_one_sentence(images, tmp_path, capsys, arguments, expected):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no")
    filled = [w.format(images=images, broken=tmp_path / "broken") for w in arguments]
    code, err = run_command(capsys, "personalize", "--output-dir", tmp_path / "out", *filled)
    assert code == 2 and expected in err and "Traceback" not in err
    assert not list(tmp_path.rglob("adapter*"))  # nothing was trained before


def test_generated_images_are_not_taken_for_references(images, capsys):
    arguments = ["personalize", images, "--method", "average", *QUICK]
    widths = {
        open_closed(run_command(capsys, *arguments, "--output-dir", images / name)[1]["sheet"]).width
        for name in ("first", "first", "second")
    }
    assert len(widths) == 1


def test_images_of_several_subjects_are_reported(images, tmp_path, capsys):
    for name in ("Ana", "Zoë"):
        (tmp_path / "people" / name).mkdir(parents=True)
        open_closed(images / "Foto 1.jpg").save(tmp_path / "people" / name / "a.png")
    arguments = [
        "personalize",
        tmp_path / "people",
        "--method",
        "average",
        "--output-dir",
        tmp_path / "out",
        "--steps",
        "2",
        "--num-images",
        "1",
    ]
    assert cli.main(list(map(str, arguments))) == 0
    assert "images of 2 subjects are taken for one (Ana, Zoë)" in "".join(capsys.readouterr())


def test_an_interrupted_run_of_another_subject_changes_nothing(images, tmp_path, monkeypatch, capsys):
    arguments = [
        "personalize",
        images,
        "--method",
        "inversion",
        "--class-noun",
        "cat",
        "--finetune-steps",
        "2",
        "--output-dir",
        tmp_path,
        *QUICK,
    ]
    code, first = run_command(capsys, *arguments)
    assert code == 0
    pixels = open_closed(first["images"][0]).tobytes()
    from imprompt import training

    real = training.train_adapter

    def interrupt(config):
        yield next(real(config))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_adapter", interrupt)
    assert run_command(capsys, *arguments, "--class-noun", "fish")[0] == 130
    monkeypatch.undo()
    code, again = run_command(capsys, *arguments)
    assert code == 0 and open_closed(again["images"][0]).tobytes() == pixels
    assert json.loads((tmp_path / "inversion" / "finetuned.json").read_text())["class_noun"] == "cat"
