"""Mistakes of a first training run: one sentence, exit code 2, the next step, nothing lost."""

import json
import resource
import sys

import pytest
import torch
from PIL import Image

from imprompt.cli import main
from imprompt.mini import world
from imprompt.models.hub import MINI_PATH

QUICK = [
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--num-validation-images",
    "0",
    "--no-sanity-check",
    "--mixed-precision",
    "float32",
    "--dataloader-num-workers",
    "1",
]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, subject in zip(range(6), world.iterate_subjects(), strict=False):
        world.render(subject, world.make_scene(i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a thing")
    return folder


def run_command(capsys, *arguments, code=2):
    assert main([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    if code:
        errors = [line for line in captured.err.splitlines() if line.startswith("imprompt: ") and not line.startswith("imprompt: note: ")]
        assert len(errors) == 1 and captured.err.endswith(errors[0] + "\n") and "Traceback" not in captured.err, captured.err
    return captured.err if code else captured.out + captured.err


def test_a_wrong_column_is_named(images, tmp_path, capsys):
    (images / "list.csv").write_text("columnA,columnB\n0.png,a star\n")
    error = run_command(capsys, "train", "--data", images / "list.csv", "--output-dir", tmp_path / "run", *QUICK)
    assert "has no image column: expected target or image or image_file" in error and "received columnA, columnB" in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"target": "0.png"\n', "is not JSON"),
        ("[1, 2]\n", 'expected an object such as {"target"'),
        ("\n\n", "holds no records"),
    ],
)
def test_a_malformed_list_is_named(images, tmp_path, capsys, text, expected):
    (images / "list.jsonl").write_text(text)
    assert expected in run_command(capsys, "train", "--data", images / "list.jsonl", "--output-dir", tmp_path / "run", *QUICK)


def test_missing_files_end_the_run(images, tmp_path, capsys):
    (images / "list.jsonl").write_text("".join(json.dumps({"target": f"elsewhere/{i}.png"}) + "\n" for i in range(200)))
    error = run_command(capsys, "train", "--data", images / "list.jsonl", "--output-dir", tmp_path / "run", *QUICK)
    assert "records could not be read, more than the 10% allowed" in error and "imprompt data validate" in error


def test_a_folder_without_images_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no images in" in run_command(capsys, "train", "--data", tmp_path / "empty", "--output-dir", tmp_path / "run", *QUICK)


def test_missing_captions_are_reported(images, tmp_path, capsys):
    for text in images.glob("*.txt"):
        text.unlink()
    quick = [q for q in QUICK if q != "--no-sanity-check"]
    assert "no captions" in run_command(capsys, "train", "--data", images, "--output-dir", tmp_path / "run", *quick, code=0)


@pytest.mark.parametrize("encoder", ["text_encoder", "vae", "nowhere"])
def test_a_wrong_encoder_is_named(images, tmp_path, capsys, encoder):
    error = run_command(capsys, "train", "--data", images, "--image-encoder", MINI_PATH / encoder, "--output-dir", tmp_path / "run", *QUICK)
    assert "no CLIP image encoder at" in error and "--image-encoder" in error


def test_an_adapter_that_does_not_fit_is_named(images, tmp_path, capsys):
    from imprompt.core.adapter import Adapter
    from imprompt.core.image_projection import ImageProjection
    from imprompt.models import checkpoints

    checkpoints.save(Adapter(ImageProjection(1024, 768), {1: 320, 3: 320}, 768), tmp_path / "other.safetensors", {}, torch.float32)
    error = run_command(
        capsys, "train", "--data", images, "--adapter", tmp_path / "other.safetensors", "--output-dir", tmp_path / "run", *QUICK
    )
    assert "1024" in error


def test_out_of_memory_names_the_way_out(images, tmp_path, capsys, monkeypatch):
    def exhaust_memory(*arguments):
        torch.empty(2**50)

    monkeypatch.setattr(
        sys.modules["imprompt.training.loop"] if "imprompt.training.loop" in sys.modules else _loop(), "compute_loss", exhaust_memory
    )
    error = run_command(capsys, "train", "--data", images, "--output-dir", tmp_path / "run", *QUICK)
    assert "out of memory" in error and "--train-batch-size" in error and "--gradient-checkpointing" in error


def _loop():
    import imprompt.training.loop  # noqa: F401

    return sys.modules["imprompt.training.loop"]


def test_an_image_too_large_for_memory_names_the_way_out(capsys, tmp_path):
    error = run_command(
        capsys, "generate", "--prompt", "a star", "--resolution", "40000", "--steps", "1", "--num-images", "1", "--output-dir", tmp_path
    )
    assert "out of memory" in error and "--resolution" in error


def test_a_full_disk_loses_nothing(images, tmp_path, capsys):
    """Files may not grow beyond 300 kB from the third step on: the checkpoint of step 2 stays whole, and the run can be resumed."""
    run = ["train", "--data", images, "--output-dir", tmp_path / "run", *QUICK, "--checkpointing-steps", "2"]
    run_command(capsys, *run, code=0)
    before = {p.name: p.stat().st_size for p in (tmp_path / "run" / "state" / "step-2").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        error = run_command(capsys, *run, "--steps", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free some space" in error
    assert {p.name: p.stat().st_size for p in (tmp_path / "run" / "state" / "step-2").iterdir()} == before
    assert [p.name for p in (tmp_path / "run" / "state").glob("step-*")] == ["step-2"]
    run_command(capsys, *run, "--steps", "4", code=0)
    assert (tmp_path / "run" / "state" / "step-4").is_dir()


def test_a_folder_that_cannot_be_written_is_named_before_any_work(images, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write to" in run_command(capsys, "train", "--data", images, "--output-dir", tmp_path / "file" / "run", *QUICK)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "dreambooth2"], "method: expected one of"),
        (["--text-drop-prob", "1.5"], "text_drop_prob: expected 0 … 1"),
        (["--resolution", "65"], "multiples of 8"),
        (["--batch-size", "many"], "train_batch_size: expected int, received 'many'"),
        (["--optimizer", "sgd"], "optimizer: expected one of"),
        (["--deepspeed", "--ema-decay", "0.9"], "not available under DeepSpeed"),
    ],
)
def test_invalid_options_are_named(images, tmp_path, capsys, arguments, expected):
    assert expected in run_command(capsys, "train", "--data", images, "--output-dir", tmp_path / "run", *QUICK, *arguments)


def test_a_mask_of_another_size_and_several_references_are_read(images, tmp_path, capsys):
    Image.linear_gradient("L").save(images / "mask.jpg")
    rows = [{"target": f"{i}.png", "mask": "mask.jpg", "references": ["0.png", "1.png"]} for i in range(6)]
    (images / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_command(capsys, "train", "--data", images / "list.jsonl", "--output-dir", tmp_path / "run", *QUICK, "--num-references", "3", code=0)
