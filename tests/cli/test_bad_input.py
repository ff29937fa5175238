"""Through the front door: a good command draws, a bad one gets one sentence and exit code 2, and nothing is written."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from conftest import CROSS, VISION, random_adapter, sd15_pipeline, sd15_unet, sdxl_unet
from imprompt.cli import main
from imprompt.config import SCHEDULERS
from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import LinearProjector
from imprompt.models import checkpoints
from imprompt.unet.injection import adapter_shape


class Bomb:
    """Opening this pickle would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def cut(path: Path, part: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a small base, adapters and references, good and bad."""
    here = tmp_path_factory.mktemp("place")
    sd15_pipeline().save_pretrained(here / "base")
    unet = sd15_unet()
    checkpoints.save(random_adapter(unet, "global"), here / "adapter.safetensors", {"base": "a small one"})
    checkpoints.save(random_adapter(unet, "resampler"), here / "plus.bin")
    checkpoints.save(random_adapter(sdxl_unet(), "global"), here / "sdxl.safetensors")
    checkpoints.save(random_adapter(sd15_unet(2 * CROSS), "global"), here / "other-text.safetensors")
    layers, cross = adapter_shape(unet)
    checkpoints.save(Adapter(LinearProjector(99, cross), layers, cross), here / "wide.safetensors")
    cut(copied(here / "adapter.safetensors", here / "cut.safetensors"))
    cut(copied(here / "plus.bin", here / "cut.bin"))
    torch.save({"image_proj": Bomb(here / "marker")}, here / "hostile.bin")
    (here / "plain.bin").write_bytes(pickle.dumps(Bomb(here / "marker")))
    whole = {key: value.contiguous() for key, value in unet.state_dict().items()}
    safetensors.torch.save_file(whole, here / "model.safetensors")

    (here / "empty").mkdir()
    (here / "folder").mkdir()
    (here / "folder" / "config.json").write_text("{}")
    DDPMPipeline(UNet2DModel(8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
                 DDIMScheduler()).save_pretrained(here / "no-text")  # fmt: skip
    for part in ("unet", "vae", "text_encoder", "image_encoder"):
        copied(here / "base", here / f"cut-{part}")
        cut(next((here / f"cut-{part}" / part).glob("*.safetensors")))
    gaps = next(copied(here / "base" / "image_encoder", here / "gaps").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(gaps)
    tensors.pop("visual_projection.weight")
    safetensors.torch.save_file(tensors, gaps, {"format": "pt"})
    copied(here / "base", here / "no-index")
    (here / "no-index" / "model_index.json").write_text("{ no JSON")
    copied(here / "base", here / "odd-class")
    (here / "odd-class" / "model_index.json").write_text(json.dumps({"_class_name": "NovelPipeline", "unet": ["diffusers", "UNet"]}))
    copied(here / "base", here / "no-unet")
    shutil.rmtree(here / "no-unet" / "unet")

    reference = Image.merge("RGB", [Image.effect_noise((40, 40), 50 + 20 * i) for i in range(3)])
    reference.save(here / "ref.png")
    reference.save(here / "cut.png")
    cut(here / "cut.png")
    spoilt = bytearray((here / "ref.png").read_bytes())
    spoilt[200:240] = bytes(40)
    (here / "corrupt.png").write_bytes(spoilt)
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    huge = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    nothing = b"IDAT" + zlib.compress(b"")
    huge += struct.pack(">I", len(nothing) - 4) + nothing + struct.pack(">I", zlib.crc32(nothing))
    (here / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + huge)
    (here / "text.png").write_text("a picture, if you believe it")
    (here / "file").write_text("in the way")
    return here


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def command(place: Path, folder: Path, **changes: object) -> list[str]:
    """A good command with these fields changed: None leaves one out, `@name` is a file of the place."""
    fields = {"image": "@ref.png", "base": "@base", "adapter": "@adapter.safetensors", "encoder": "@base/image_encoder"}
    fields |= {"steps": 2, "count": 1, "device": "cpu", "out": folder} | changes
    words = [(f"--{name}", str(value)) for name, value in fields.items() if value is not None]
    return ["generate", *(str(place / word[1:]) if word.startswith("@") else word for pair in words for word in pair)]


def refusal(arguments: list[str], out: Path, capsys) -> str:
    """The one sentence that a bad command gets."""
    capsys.readouterr()
    code = main(arguments)
    printed = capsys.readouterr()
    return one_sentence(code, printed.out, printed.err, out)


def one_sentence(code: int, stdout: str, stderr: str, out: Path) -> str:
    assert code == 2, stderr
    assert stdout == ""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("imprompt: "), stderr
    assert "Traceback" not in stderr
    assert not out.is_dir() or not list(out.iterdir())
    return lines[0]


# --------------------------------------------------------------------------------------------------------- bad commands

BAD = {
    # references
    "missing reference": (dict(image="@none.png"), "no picture at"),
    "reference is a folder": (dict(image="@folder"), "no picture at"),
    "corrupt reference": (dict(image="@corrupt.png"), "corrupt.png is damaged"),
    "truncated reference": (dict(image="@cut.png"), "cut.png is damaged"),
    "enormous reference": (dict(image="@huge.png"), "at most 100 million pixels"),
    "reference is a text": (dict(image="@text.png"), "text.png is not a picture"),
    "reference has an endless name": (dict(image="x" * 5000), "no picture at"),
    # adapters
    "missing adapter": (dict(adapter="@none.safetensors"), "no adapter at"),
    "missing adapter, relative": (dict(adapter="none.safetensors"), "no adapter at"),
    "adapter on the hub, offline": (dict(adapter="nobody/nothing/none.safetensors"), "neither in the local cache"),
    "adapter is a folder": (dict(adapter="@folder"), "is a folder"),
    "adapter has an endless name": (dict(adapter="x" * 5000), "no adapter at"),
    "truncated adapter": (dict(adapter="@cut.safetensors"), "cut.safetensors is damaged"),
    "truncated pickle": (dict(adapter="@cut.bin"), "cut.bin is damaged"),
    "hostile adapter": (dict(adapter="@hostile.bin"), "could run code"),
    "hostile plain pickle": (dict(adapter="@plain.bin"), "could run code"),
    "adapter is a whole model": (dict(adapter="@model.safetensors"), "goes to --base"),
    "adapter of a larger base": (dict(adapter="@sdxl.safetensors"), "the adapter does not fit this model"),
    "adapter of another text width": (dict(adapter="@other-text.safetensors"), "the adapter does not fit this model"),
    "adapter of another encoder": (dict(adapter="@wide.safetensors"), "the image encoder does not fit the adapter"),
    "no adapter for this base": (dict(adapter=None), "name one with --adapter"),
    "adapter without a reference": (dict(image=None), "give --image"),
    # encoders
    "missing encoder": (dict(encoder="@none"), "no CLIP image encoder at"),
    "encoder is no model": (dict(encoder="@empty"), "no CLIP image encoder at"),
    "encoder is another model": (dict(encoder="@base/text_encoder"), "no CLIP image encoder at"),
    "truncated encoder": (dict(encoder="@cut-image_encoder/image_encoder"), "no CLIP image encoder at"),
    "encoder with a gap": (dict(encoder="@gaps"), "1 of its tensors are missing"),
    "encoder cannot be told": (dict(encoder=None), "--encoder"),
    # bases
    "missing base": (dict(base="@none"), "no base model at"),
    "missing base, relative": (dict(base="none"), "no base model at"),
    "base on the hub, offline": (dict(base="nobody/nothing"), "no base model at"),
    "base without a name": (dict(base=""), "no base model at"),
    "base is an empty folder": (dict(base="@empty"), "no base model at"),
    "base is a folder but no model": (dict(base="@folder"), "no base model at"),
    "base is a file": (dict(base="@model.safetensors"), "holds no whole model"),
    "base is another file": (dict(base="@ref.png"), "no base model at"),
    "base draws without text": (dict(base="@no-text"), "expected a Stable Diffusion"),
    "base with a damaged index": (dict(base="@no-index"), "no base model at"),
    "base of an unknown class": (dict(base="@odd-class"), "no base model at"),
    "base without its UNet": (dict(base="@no-unet"), "no base model at"),
    "base with a truncated UNet": (dict(base="@cut-unet"), "no base model at"),
    "base with a truncated VAE": (dict(base="@cut-vae"), "no base model at"),
    "base with a truncated text encoder": (dict(base="@cut-text_encoder"), "no base model at"),
    # choices
    "unknown scheduler": (dict(scheduler="magic"), "scheduler: expected one of ddim"),
    "unknown fit": (dict(fit="stretch"), "fit: expected one of crop"),
    "unknown dtype": (dict(dtype="int8"), "dtype: expected one of auto"),
    "unknown device": (dict(device="abacus"), "device 'abacus'"),
    "device that is not here": (dict(device="cuda:99"), "device 'cuda:99'"),
    "device without computation": (dict(device="meta"), "device 'meta'"),
    "no steps": (dict(steps=0), "steps: expected at least 1"),
    "more steps than the schedule has": (dict(steps=1001), "steps: expected at most 998 with ddim"),
    "no pictures": (dict(count=0), "count: expected at least 1"),
    "negative seed": (dict(seed=-1), "seed: expected at least 0"),
    "seed beyond the generator": (dict(seed=2**64), "seed: expected"),
    "scale is no number": (dict(scale="nan"), "scale: expected a finite number"),
    "guidance without end": (dict(guidance="inf"), "guidance: expected a finite number"),
    "size between pixels": (dict(size=63), "size: the model draws multiples of 8"),
    "size too small": (dict(size=4), "size: the model draws multiples of 8"),
    "size below the deepest level": (dict(size=8), "size: the model draws at least 16"),
    "size is half a word": (dict(size="12xabc"), "size: expected a side in pixels"),
    "size is three": (dict(size="16x16x16"), "size: expected a side in pixels"),
    "size is a footnote": (dict(size="²"), "size: expected a side in pixels"),
    "size 0": (dict(size=0), "size: expected a side in pixels"),
    "height between pixels": (dict(size="32x63"), "nearest is 32x64"),
    # places
    "out below a file": (dict(out="@file/pictures"), "cannot write to"),
    "out is a file": (dict(out="@file"), "cannot write to"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_command_gets_one_sentence(what, place, out, capsys):
    changes, expected = BAD[what]
    assert expected in refusal(command(place, out, **changes), out, capsys)
    assert not (place / "marker").exists()
    assert (place / "file").read_text() == "in the way"


def test_the_size_that_is_proposed_can_be_drawn(place, out, capsys):
    for size in (4, 63, "4x100", "5x9"):
        proposed = refusal(command(place, out, size=size), out, capsys).split("nearest is ")[1]
        assert main(command(place, out / "drawn", size=proposed, steps=1)) == 0
        shutil.rmtree(out / "drawn")


BAD_TOML = {
    "unknown field": ("stpes = 3", "unknown field 'stpes'; expected one of image, prompt"),
    "table": ("[generate]\nsteps = 3", "unknown field 'generate'"),
    "malformed": ("steps = = 3", "is not a readable TOML file"),
    "cut off": ('prompt = "a fish', "is not a readable TOML file"),
    "fraction of a step": ("steps = 2.5", "steps: expected int, received 2.5"),
    "word for a number": ('scale = "high"', "scale: expected float, received 'high'"),
    "truth for a number": ("count = true", "count: expected int, received True"),
    "list for a word": ('prompt = ["a", "b"]', "prompt: expected str"),
    "list for a size": ("size = [64, 64]", "size: expected str"),
    "number for a picture": ("image = 3", "expected a picture"),
    "truth among pictures": ("image = [true]", "expected a picture"),
    "lists of pictures": ('image = [["a.png"]]', "expected a picture"),
    "unknown scheduler": ('scheduler = "magic"', "scheduler: expected one of"),
    "scale is no number": ("scale = nan", "scale: expected a finite number"),
    "a zero in the name": ('out = "a\\u0000b"', "cannot write to"),
    "a picture with a zero in the name": ('image = "a\\u0000b"', "no picture at"),
}


@pytest.mark.parametrize("what", BAD_TOML)
def test_a_bad_configuration_gets_one_sentence(what, place, out, tmp_path, capsys):
    text, expected = BAD_TOML[what]
    path = tmp_path / "choice.toml"
    path.write_text(text)
    field = text.split(" ")[0]
    arguments = command(place, out, **{name: None for name in ("image", "steps", "count", "out") if name == field})
    assert expected in refusal([*arguments, "--config", str(path)], out, capsys)


def test_configurations_that_cannot_be_read(place, out, tmp_path, capsys):
    assert "no configuration at" in refusal(["generate", "--config", str(tmp_path / "none.toml")], out, capsys)
    assert "not a readable TOML file" in refusal(["generate", "--config", str(tmp_path)], out, capsys)
    assert "not a readable TOML file" in refusal(["generate", "--config", str(place / "ref.png")], out, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "--steps", "many"], "--steps"),
        (["generate", "--colour", "red"], "--colour"),
        (["generate", "--prompt"], "--prompt"),
        (["draw"], "draw"),
        (["inspect"], "file"),
        (["convert", "a.bin"], "target"),
    ],
)
def test_words_that_the_command_line_does_not_know(arguments, expected, out, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr()
    text = one_sentence(caught.value.code, printed.out, printed.err, out)
    assert expected in text and "--help" in text


@pytest.mark.parametrize(
    "name", ["none.safetensors", "cut.safetensors", "cut.bin", "hostile.bin", "plain.bin", "model.safetensors", "ref.png"]
)
def test_inspect_and_convert_refuse_what_is_no_adapter(name, place, out, capsys):
    refusal(["inspect", str(place / name)], out, capsys)
    refusal(["convert", str(place / name), str(out / "a.safetensors")], out, capsys)
    assert not (place / "marker").exists()


def test_convert_to_where_nothing_can_be_written(place, out, capsys):
    source = str(place / "adapter.safetensors")
    assert "cannot write" in refusal(["convert", source, str(place / "file" / "a.bin")], out, capsys)
    assert "cannot write" in refusal(["convert", source, str(out / "a.onnx")], out, capsys)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(image="@none.png"), "no picture at"),
        (dict(adapter="@sdxl.safetensors"), "does not fit this model"),
        (dict(adapter="@wide.safetensors"), "does not fit the adapter"),
    ],
)
def test_as_a_process_too(changes, expected, place, out):
    words = [sys.executable, "-m", "imprompt", *command(place, out, **changes)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert expected in one_sentence(done.returncode, done.stdout, done.stderr, out)


# --------------------------------------------------------------------------------------------------------- good commands


def drawn(arguments: list[str], capsys) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_good_command_writes_pictures_sheet_and_settings(place, out, capsys):
    result = drawn(command(place, out, count=3, seed=7, prompt="a red fish, größer", size="32x48"), capsys)
    assert sorted(p.name for p in out.iterdir()) == ["000007.png", "000008.png", "000009.png", "sheet.png"]
    assert result["pictures"] == [str(out / f"00000{n}.png") for n in (7, 8, 9)] and result["sheet"] == str(out / "sheet.png")
    assert result["seed"] == 7 and result["seconds"] > 0
    for seed, path in zip((7, 8, 9), result["pictures"], strict=True):
        with Image.open(path) as image:
            assert image.size == (32, 48) and image.mode == "RGB"
            settings = json.loads(image.info["imprompt"])
        assert (settings["seed"], settings["count"], settings["steps"], settings["prompt"]) == (seed, 1, 2, "a red fish, größer")
        assert settings["image"] == [str(place / "ref.png")] and settings["adapter"] == str(place / "adapter.safetensors")
    assert len({pixels(path).tobytes() for path in result["pictures"]}) == 3
    assert pixels(out / "sheet.png").shape == (192 + 12, 4 * 198 + 6 + 14, 3)


def test_without_json_it_says_where_the_sheet_is(place, out, capsys):
    assert main(command(place, out)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("seed 0, 1 pictures in ") and printed[1] == str(out / "sheet.png")


def test_the_settings_of_a_picture_draw_it_again(place, out, tmp_path, capsys):
    """Same seed, same bytes, also after other schedulers. Alone instead of in a batch, sums may round otherwise."""
    first = drawn(command(place, out / "1", count=2, seed=3, prompt="a red fish"), capsys)["pictures"]
    for scheduler in SCHEDULERS[1:]:
        drawn(command(place, out / scheduler, scheduler=scheduler), capsys)
    again = drawn(command(place, out / "2", count=2, seed=3, prompt="a red fish"), capsys)["pictures"]
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(pixels(one), pixels(other))
    with Image.open(first[1]) as image:
        settings = json.loads(image.info["imprompt"])
    path = tmp_path / "again.toml"
    path.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items() if v is not None and k not in ("version", "out")))
    third = drawn(["generate", "--config", str(path), "--out", str(out / "3")], capsys)["pictures"]
    assert [Path(path).name for path in third] == ["000004.png"]
    assert np.abs(pixels(third[0]).astype(int) - pixels(first[1])).max() <= 2


def test_reference_adapter_and_scale_matter(place, out, capsys):
    def first(name, **changes):
        return pixels(drawn(command(place, out / name, **changes), capsys)["pictures"][0]).astype(int)

    one = first("one")
    assert np.abs(one - first("plus", adapter="@plus.bin")).max() > 2
    assert np.abs(one - first("faint", scale=0.3)).max() > 2
    alone = first("alone", image=None, adapter=None, encoder=None)
    assert np.array_equal(alone, first("silent", scale=0)) and np.abs(one - alone).max() > 2


def test_configuration_files_speak_and_flags_overrule(place, out, tmp_path, capsys):
    path = tmp_path / "choice.toml"
    path.write_text(
        f'image = ["{place}/ref.png"]\nbase = "{place}/base"\nadapter = "{place}/adapter.safetensors"\n'
        f'encoder = "{place}/base/image_encoder"\nout = "{out}"\nsteps = 1\ncount = 3\nscale = 1\nsize = 32\n'
    )
    assert len(drawn(["generate", "--config", str(path)], capsys)["pictures"]) == 3
    result = drawn(["generate", "--config", str(path), "--count", "1", "--seed", "40", "--out", str(out / "flags")], capsys)
    assert result["pictures"] == [str(out / "flags" / "000040.png")]
    assert pixels(result["pictures"][0]).shape == (32, 32, 3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_scheduler_draws(scheduler, steps, place, out, capsys):
    drawn(command(place, out, scheduler=scheduler, steps=steps), capsys)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_says_how_many_steps_it_has(scheduler, place, out, capsys):
    assert "steps: expected at most" in refusal(command(place, out, scheduler=scheduler, steps=1001), out, capsys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_draws(dtype, place, out, capsys):
    drawn(command(place, out, dtype=dtype), capsys)


def test_notes_about_references_are_printed_as_they_are(place, out, capsys):
    """File names with square brackets are not markup."""
    wide = place / "wide [bold].png"
    with Image.open(place / "ref.png") as image:
        image.resize((90, 40)).save(wide)
    assert main(command(place, out, image=wide)) == 0
    assert "wide [bold].png: the centre square is used, 56% is cut" in capsys.readouterr().err


def test_a_folder_in_the_place_of_a_picture(place, out, capsys):
    (out / "000000.png").mkdir(parents=True)
    assert main(command(place, out)) == 2
    assert capsys.readouterr().err.startswith("imprompt: cannot write")
    assert [p.name for p in out.iterdir()] == ["000000.png"]


def test_the_base_is_left_as_it_was_after_an_error(place, out, capsys):
    """A misfit between two good runs: nothing stays attached."""
    first = drawn(command(place, out / "1"), capsys)["pictures"][0]
    refusal(command(place, out / "2", adapter="@sdxl.safetensors"), out / "2", capsys)
    assert np.array_equal(pixels(first), pixels(drawn(command(place, out / "3"), capsys)["pictures"][0]))


def test_an_encoder_grid_of_another_width_is_refused(place, out, tmp_path, capsys):
    """The resampler reads the grid, not the pooled embedding: each has its own width."""
    tensors, _ = checkpoints.read(place / "plus.bin")
    tensors["image_proj.proj_in.weight"] = tensors["image_proj.proj_in.weight"][:, : VISION // 2]
    checkpoints.write(tensors, tmp_path / "narrow.safetensors")
    text = refusal(command(place, out, adapter=tmp_path / "narrow.safetensors"), out, capsys)
    assert f"received features of width {VISION}" in text
