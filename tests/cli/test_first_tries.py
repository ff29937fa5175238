"""What goes wrong at the first try of a training: one sentence, exit code 2, the next move, nothing lost."""

import json
import resource
import sys

import pytest
import torch
from PIL import Image

from imprompt.cli import main
from imprompt.mini import world
from imprompt.models.hub import MINI

QUICK = ["--steps", "2", "--batch", "2", "--validation", "0", "--no-preflight", "--precision", "float32", "--workers", "1"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, subject in zip(range(6), world.subjects(), strict=False):
        world.draw(subject, world.scene(i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a thing")
    return folder


def said(capsys, *arguments, code=2):
    assert main([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    if code:
        assert captured.err.startswith("imprompt: ") and captured.err.count("\n") == 1 and "Traceback" not in captured.err, captured.err
    return captured.err if code else captured.out + captured.err


def test_a_wrong_column_is_named(photos, tmp_path, capsys):
    (photos / "list.csv").write_text("picture,words\n0.png,a star\n")
    error = said(capsys, "train", "--data", photos / "list.csv", "--out", tmp_path / "run", *QUICK)
    assert "has no column for the picture: expected target (or image, image_file" in error and "received picture, words" in error


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"target": "0.png"\n', "is not JSON"),
        ("[1, 2]\n", 'expected an object such as {"target"'),
        ("\n\n", "holds no records"),
    ],
)
def test_a_list_that_is_none_is_named(photos, tmp_path, capsys, text, why):
    (photos / "list.jsonl").write_text(text)
    assert why in said(capsys, "train", "--data", photos / "list.jsonl", "--out", tmp_path / "run", *QUICK)


def test_paths_that_lead_nowhere_end_the_run(photos, tmp_path, capsys):
    (photos / "list.jsonl").write_text("".join(json.dumps({"target": f"elsewhere/{i}.png"}) + "\n" for i in range(200)))
    error = said(capsys, "train", "--data", photos / "list.jsonl", "--out", tmp_path / "run", *QUICK)
    assert "records could not be read, more than the 10% allowed" in error and "imprompt data validate" in error


def test_a_folder_without_pictures_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no pictures in" in said(capsys, "train", "--data", tmp_path / "empty", "--out", tmp_path / "run", *QUICK)


def test_no_captions_is_said_and_no_obstacle(photos, tmp_path, capsys):
    for text in photos.glob("*.txt"):
        text.unlink()
    quick = [q for q in QUICK if q != "--no-preflight"]
    assert "no captions" in said(capsys, "train", "--data", photos, "--out", tmp_path / "run", *quick, code=0)


@pytest.mark.parametrize("encoder", ["text_encoder", "vae", "nowhere"])
def test_a_wrong_encoder_is_named(photos, tmp_path, capsys, encoder):
    error = said(capsys, "train", "--data", photos, "--encoder", MINI / encoder, "--out", tmp_path / "run", *QUICK)
    assert "no CLIP image encoder at" in error and "--encoder" in error


def test_an_adapter_that_does_not_fit_is_named(photos, tmp_path, capsys):
    from imprompt.core.adapter import Adapter
    from imprompt.core.image_projection import LinearProjector
    from imprompt.models import checkpoints

    checkpoints.save(Adapter(LinearProjector(1024, 768), {1: 320, 3: 320}, 768), tmp_path / "other.safetensors", {}, torch.float32)
    error = said(capsys, "train", "--data", photos, "--adapter", tmp_path / "other.safetensors", "--out", tmp_path / "run", *QUICK)
    assert "1024" in error


def test_out_of_memory_names_the_way_out(photos, tmp_path, capsys, monkeypatch):
    def greedy(*arguments):
        torch.empty(2**50)

    monkeypatch.setattr(sys.modules["imprompt.training.loop"] if "imprompt.training.loop" in sys.modules else _loop(), "losses", greedy)
    error = said(capsys, "train", "--data", photos, "--out", tmp_path / "run", *QUICK)
    assert "out of memory" in error and "--batch" in error and "--checkpointing" in error


def _loop():
    import imprompt.training.loop  # noqa: F401

    return sys.modules["imprompt.training.loop"]


def test_a_picture_too_large_to_draw_names_the_way_out(capsys, tmp_path):
    error = said(capsys, "generate", "--prompt", "a star", "--size", "40000", "--steps", "1", "--count", "1", "--out", tmp_path)
    assert "out of memory" in error and "--size" in error


def test_a_full_disk_loses_nothing(photos, tmp_path, capsys):
    """Files may not grow beyond 300 kB from the third step on: the state of step 2 stays whole, and the run can go on."""
    run = ["train", "--data", photos, "--out", tmp_path / "run", *QUICK, "--save-every", "2"]
    said(capsys, *run, code=0)
    before = {p.name: p.stat().st_size for p in (tmp_path / "run" / "state" / "step-2").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        error = said(capsys, *run, "--steps", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "make room" in error
    assert {p.name: p.stat().st_size for p in (tmp_path / "run" / "state" / "step-2").iterdir()} == before
    assert [p.name for p in (tmp_path / "run" / "state").glob("step-*")] == ["step-2"]
    said(capsys, *run, "--steps", "4", code=0)
    assert (tmp_path / "run" / "state" / "step-4").is_dir()


def test_a_folder_that_cannot_be_written_is_named_before_any_work(photos, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write to" in said(capsys, "train", "--data", photos, "--out", tmp_path / "file" / "run", *QUICK)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--method", "dreambooth2"], "method: expected one of"),
        (["--drop-text", "1.5"], "drop_text: expected 0 … 1"),
        (["--size", "65"], "multiples of 8"),
        (["--batch", "many"], "invalid int value"),
        (["--optimizer", "sgd"], "optimizer: expected one of"),
        (["--deepspeed", "--ema", "0.9"], "not to be had under DeepSpeed"),
    ],
)
def test_settings_that_make_no_sense_are_named(photos, tmp_path, capsys, arguments, why):
    try:
        error = said(capsys, "train", "--data", photos, "--out", tmp_path / "run", *QUICK, *arguments)
    except SystemExit as end:
        assert end.code == 2
        error = capsys.readouterr().err
    assert why in error


def test_a_mask_of_another_kind_and_huge_references_are_read_or_named(photos, tmp_path, capsys):
    Image.new("RGB", (10, 10)).save(photos / "mask.jpg")
    rows = [{"target": f"{i}.png", "mask": "mask.jpg", "references": ["0.png", "1.png"]} for i in range(6)]
    (photos / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said(capsys, "train", "--data", photos / "list.jsonl", "--out", tmp_path / "run", *QUICK, "--references", "3", code=0)
