"""`imprompt generate`: a good command writes images; a bad one gets one sentence and exit code 2, and nothing is written."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from conftest import CROSS, VISION, random_adapter, sd15_pipeline, sd15_unet, sdxl_unet
from imprompt.cli import main
from imprompt.config import Scheduler
from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import ImageProjection
from imprompt.models import checkpoints
from imprompt.unet.attn_processors import infer_adapter_shape

SCHEDULERS = get_args(Scheduler)


class Bomb:
    """Opening this pickle would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def truncate(path: Path, part: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A folder with a small base model, adapters and references, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    sd15_pipeline().save_pretrained(folder / "base")
    unet = sd15_unet()
    checkpoints.save(random_adapter(unet, "base"), folder / "adapter.safetensors", {"base": "a small one"})
    checkpoints.save(random_adapter(unet, "plus"), folder / "plus.bin")
    checkpoints.save(random_adapter(sdxl_unet(), "base"), folder / "sdxl.safetensors")
    checkpoints.save(random_adapter(sd15_unet(2 * CROSS), "base"), folder / "other-text.safetensors")
    layers, cross = infer_adapter_shape(unet)
    checkpoints.save(Adapter(ImageProjection(99, cross), layers, cross), folder / "wide.safetensors")
    truncate(copy(folder / "adapter.safetensors", folder / "cut.safetensors"))
    truncate(copy(folder / "plus.bin", folder / "cut.bin"))
    torch.save({"image_proj": Bomb(folder / "marker")}, folder / "hostile.bin")
    (folder / "plain.bin").write_bytes(pickle.dumps(Bomb(folder / "marker")))
    whole = {key: value.contiguous() for key, value in unet.state_dict().items()}
    safetensors.torch.save_file(whole, folder / "model.safetensors")

    (folder / "empty").mkdir()
    (folder / "folder").mkdir()
    (folder / "folder" / "config.json").write_text("{}")
    DDPMPipeline(UNet2DModel(8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
                 DDIMScheduler()).save_pretrained(folder / "no-text")  # fmt: skip
    for part in ("unet", "vae", "text_encoder", "image_encoder"):
        copy(folder / "base", folder / f"cut-{part}")
        truncate(next((folder / f"cut-{part}" / part).glob("*.safetensors")))
    gaps = next(copy(folder / "base" / "image_encoder", folder / "gaps").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(gaps)
    tensors.pop("visual_projection.weight")
    safetensors.torch.save_file(tensors, gaps, {"format": "pt"})
    copy(folder / "base", folder / "no-index")
    (folder / "no-index" / "model_index.json").write_text("{ no JSON")
    copy(folder / "base", folder / "odd-class")
    (folder / "odd-class" / "model_index.json").write_text(json.dumps({"_class_name": "NovelPipeline", "unet": ["diffusers", "UNet"]}))
    copy(folder / "base", folder / "no-unet")
    shutil.rmtree(folder / "no-unet" / "unet")

    reference = Image.merge("RGB", [Image.effect_noise((40, 40), 50 + 20 * i) for i in range(3)])
    reference.save(folder / "ref.png")
    reference.save(folder / "cut.png")
    truncate(folder / "cut.png")
    spoilt = bytearray((folder / "ref.png").read_bytes())
    spoilt[200:240] = bytes(40)
    (folder / "corrupt.png").write_bytes(spoilt)
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    huge = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    nothing = b"IDAT" + zlib.compress(b"")
    huge += struct.pack(">I", len(nothing) - 4) + nothing + struct.pack(">I", zlib.crc32(nothing))
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + huge)
    (folder / "text.png").write_text("not an image")
    (folder / "file").write_text("in the way")
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def command(files: Path, folder: Path, **changes: object) -> list[str]:
    """A good command with these options changed: None leaves one out, `@name` is one of the files."""
    options = {"image": "@ref.png", "model": "@base", "adapter": "@adapter.safetensors", "image_encoder": "@base/image_encoder"}
    options |= {"num_inference_steps": 2, "num_images": 1, "device": "cpu", "output_dir": folder} | changes
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return ["generate", *(str(files / word[1:]) if word.startswith("@") else word for pair in words for word in pair)]


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
    "missing reference": (dict(image="@none.png"), "no image at"),
    "reference is a folder without images": (dict(image="@folder"), "no image in the folder"),
    "reference is a pattern without images": (dict(image="@none*.png"), "no image matches"),
    "corrupt reference": (dict(image="@corrupt.png"), "corrupt.png is damaged"),
    "truncated reference": (dict(image="@cut.png"), "cut.png is damaged"),
    "enormous reference": (dict(image="@huge.png"), "at most 100 million pixels"),
    "reference is a text": (dict(image="@text.png"), "text.png is not an image"),
    "reference has an endless name": (dict(image="x" * 5000), "no image at"),
    # adapters
    "missing adapter": (dict(adapter="@none.safetensors"), "no adapter at"),
    "missing adapter, relative": (dict(adapter="none.safetensors"), "no adapter at"),
    "adapter on the hub, offline": (dict(adapter="someone/nothing/none.safetensors"), "neither in the local cache"),
    "adapter is a folder": (dict(adapter="@folder"), "is a folder"),
    "adapter has an endless name": (dict(adapter="x" * 5000), "no adapter at"),
    "truncated adapter": (dict(adapter="@cut.safetensors"), "cut.safetensors is damaged"),
    "truncated pickle": (dict(adapter="@cut.bin"), "cut.bin is damaged"),
    "hostile adapter": (dict(adapter="@hostile.bin"), "could run code"),
    "hostile plain pickle": (dict(adapter="@plain.bin"), "could run code"),
    "adapter is a whole model": (dict(adapter="@model.safetensors"), "pass a whole model with --model"),
    "adapter of a larger base": (dict(adapter="@sdxl.safetensors"), "the adapter does not fit this model"),
    "adapter of another text width": (dict(adapter="@other-text.safetensors"), "the adapter does not fit this model"),
    "adapter of another encoder": (dict(adapter="@wide.safetensors"), "the image encoder does not fit the adapter"),
    "no adapter for this base": (dict(adapter=None), "name one with --adapter"),
    "adapter without a reference": (dict(image=None), "give --image"),
    # encoders
    "missing encoder": (dict(image_encoder="@none"), "no CLIP image encoder at"),
    "encoder is no model": (dict(image_encoder="@empty"), "no CLIP image encoder at"),
    "encoder is another model": (dict(image_encoder="@base/text_encoder"), "no CLIP image encoder at"),
    "truncated encoder": (dict(image_encoder="@cut-image_encoder/image_encoder"), "no CLIP image encoder at"),
    "encoder with a gap": (dict(image_encoder="@gaps"), "1 of its tensors are missing"),
    "encoder cannot be inferred": (dict(image_encoder=None), "--image-encoder"),
    # bases
    "missing base": (dict(model="@none"), "no base model at"),
    "missing base, relative": (dict(model="none"), "no base model at"),
    "base on the hub, offline": (dict(model="someone/nothing"), "no base model at"),
    "base without a name": (dict(model=""), "no base model at"),
    "base is an empty folder": (dict(model="@empty"), "no base model at"),
    "base is a folder but no model": (dict(model="@folder"), "no base model at"),
    "base is a file": (dict(model="@model.safetensors"), "does not contain a whole model"),
    "base is another file": (dict(model="@ref.png"), "no base model at"),
    "base generates without text": (dict(model="@no-text"), "expected a Stable Diffusion"),
    "base with a damaged index": (dict(model="@no-index"), "no base model at"),
    "base of an unknown class": (dict(model="@odd-class"), "no base model at"),
    "base without its UNet": (dict(model="@no-unet"), "no base model at"),
    "base with a truncated UNet": (dict(model="@cut-unet"), "no base model at"),
    "base with a truncated VAE": (dict(model="@cut-vae"), "no base model at"),
    "base with a truncated text encoder": (dict(model="@cut-text_encoder"), "no base model at"),
    # values
    "unknown scheduler": (dict(scheduler="magic"), "scheduler: expected one of ddim"),
    "unknown fit": (dict(resize_mode="stretch"), "resize_mode: expected one of crop"),
    "unknown dtype": (dict(dtype="int8"), "dtype: expected one of auto"),
    "unknown device": (dict(device="abacus"), "device 'abacus'"),
    "device that is not folder": (dict(device="cuda:99"), "device 'cuda:99'"),
    "device without computation": (dict(device="meta"), "device 'meta'"),
    "no steps": (dict(num_inference_steps=0), "num_inference_steps: expected at least 1, received 0"),
    "more steps than the schedule has": (dict(num_inference_steps=1001), "num_inference_steps: expected at most 998 with ddim"),
    "no images": (dict(num_images=0), "num_images: expected at least 1"),
    "negative seed": (dict(seed=-1), "seed: expected at least 0"),
    "seed beyond the generator": (dict(seed=2**64), "seed: expected"),
    "scale is no number": (dict(scale="nan"), "scale: expected a finite number"),
    "guidance without end": (dict(guidance_scale="inf"), "guidance_scale: expected a finite number"),
    "size between pixels": (dict(resolution=63), "resolution: the model generates multiples of 8"),
    "size too small": (dict(resolution=4), "resolution: the model generates multiples of 8"),
    "size below the deepest level": (dict(resolution=8), "resolution: the model generates at least 16"),
    "size is half a word": (dict(resolution="12xabc"), "resolution: expected a side in pixels"),
    "size is three": (dict(resolution="16x16x16"), "resolution: expected a side in pixels"),
    "size is a footnote": (dict(resolution="²"), "resolution: expected a side in pixels"),
    "size 0": (dict(resolution=0), "resolution: expected a side in pixels"),
    "height between pixels": (dict(resolution="32x63"), "nearest is 32x64"),
    # places
    "out below a file": (dict(output_dir="@file/images"), "cannot write to"),
    "out is a file": (dict(output_dir="@file"), "cannot write to"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_command_gets_one_sentence(what, files, out, capsys):
    changes, expected = BAD[what]
    assert expected in refusal(command(files, out, **changes), out, capsys)
    assert not (files / "marker").exists()
    assert (files / "file").read_text() == "in the way"


def test_the_proposed_resolution_can_be_generated(files, out, capsys):
    for size in (4, 63, "4x100", "5x9"):
        proposed = refusal(command(files, out, resolution=size), out, capsys).split("nearest is ")[1]
        assert main(command(files, out / "generated", resolution=proposed, num_inference_steps=1)) == 0
        shutil.rmtree(out / "generated")


BAD_TOML = {
    "unknown option": ("stpes = 3", "unknown option 'stpes'; expected one of image, scale"),
    "table": ("[generate]\nstpes = 3", "unknown option 'stpes'"),
    "malformed": ("num_inference_steps = = 3", "is not a readable TOML file"),
    "cut off": ('prompt = "a fish', "is not a readable TOML file"),
    "fraction of a step": ("num_inference_steps = 2.5", "num_inference_steps: expected int, received 2.5"),
    "word for a number": ('scale = "high"', "scale: expected float, received 'high'"),
    "truth for a number": ("num_images = true", "num_images: expected int, received True"),
    "list for a word": ('prompt = ["a", "b"]', "prompt: expected str"),
    "list for a size": ("resolution = [64, 64]", "resolution: expected str"),
    "number for an image": ("image = 3", "expected an image"),
    "truth among images": ("image = [true]", "expected an image"),
    "lists of images": ('image = [["a.png"]]', "expected an image"),
    "unknown scheduler": ('scheduler = "magic"', "scheduler: expected one of"),
    "scale is no number": ("scale = nan", "scale: expected a finite number"),
    "a zero in the name": ('output_dir = "a\\u0000b"', "cannot write to"),
    "an image path with a zero in the name": ('image = "a\\u0000b"', "no image at"),
}


@pytest.mark.parametrize("what", BAD_TOML)
def test_a_bad_configuration_gets_one_sentence(what, files, out, tmp_path, capsys):
    text, expected = BAD_TOML[what]
    path = tmp_path / "options.toml"
    path.write_text(text)
    field = text.split(" ")[0]
    arguments = command(
        files, out, **{name: None for name in ("image", "num_inference_steps", "num_images", "output_dir") if name == field}
    )
    assert expected in refusal([*arguments, "--config", str(path)], out, capsys)


def test_configurations_that_cannot_be_read(files, out, tmp_path, capsys):
    assert "no configuration at" in refusal(["generate", "--config", str(tmp_path / "none.toml")], out, capsys)
    assert "not a readable TOML file" in refusal(["generate", "--config", str(tmp_path)], out, capsys)
    assert "ref.png holds no options" in refusal(["generate", "--config", str(files / "ref.png")], out, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "--steps", "many"], "num_inference_steps"),
        (["generate", "--color", "red"], "--color"),
        (["generate", "--prompt"], "--prompt"),
        (["sketch"], "sketch"),
        (["inspect"], "file"),
        (["convert", "a.bin"], "target"),
    ],
)
def test_unknown_commands_and_options(arguments, expected, out, capsys):
    text = refusal(arguments, out, capsys)
    assert expected in text and ("--help" in text or "expected" in text)


@pytest.mark.parametrize(
    "name", ["none.safetensors", "cut.safetensors", "cut.bin", "hostile.bin", "plain.bin", "model.safetensors", "ref.png"]
)
def test_inspect_and_convert_refuse_what_is_no_adapter(name, files, out, capsys):
    refusal(["inspect", str(files / name)], out, capsys)
    refusal(["convert", str(files / name), str(out / "a.safetensors")], out, capsys)
    assert not (files / "marker").exists()


def test_convert_to_where_nothing_can_be_written(files, out, capsys):
    source = str(files / "adapter.safetensors")
    assert "cannot write" in refusal(["convert", source, str(files / "file" / "a.bin")], out, capsys)
    assert "cannot write" in refusal(["convert", source, str(out / "a.onnx")], out, capsys)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(image="@none.png"), "no image at"),
        (dict(adapter="@sdxl.safetensors"), "does not fit this model"),
        (dict(adapter="@wide.safetensors"), "does not fit the adapter"),
    ],
)
def test_as_a_process_too(changes, expected, files, out):
    words = [sys.executable, "-m", "imprompt", *command(files, out, **changes)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert expected in one_sentence(done.returncode, done.stdout, done.stderr, out)


# --------------------------------------------------------------------------------------------------------- good commands


def run_generate(arguments: list[str], capsys) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_good_command_writes_images_contact_sheet_and_settings(files, out, capsys):
    result = run_generate(command(files, out, num_images=3, seed=7, prompt="a red fish, größer", resolution="32x48"), capsys)
    assert sorted(p.name for p in out.iterdir()) == ["000007.png", "000008.png", "000009.png", "sheet.png"]
    assert result["images"] == [str(out / f"00000{n}.png") for n in (7, 8, 9)] and result["sheet"] == str(out / "sheet.png")
    assert result["seed"] == 7 and result["seconds"] > 0
    for seed, path in zip((7, 8, 9), result["images"], strict=True):
        with Image.open(path) as image:
            assert image.size == (32, 48) and image.mode == "RGB"
            settings = json.loads(image.info["imprompt"])
        assert (settings["seed"], settings["num_images"], settings["num_inference_steps"], settings["prompt"]) == (
            seed,
            1,
            2,
            "a red fish, größer",
        )
        assert settings["image"] == [str(files / "ref.png")] and settings["adapter"] == str(files / "adapter.safetensors")
    assert len({pixels(path).tobytes() for path in result["images"]}) == 3
    assert pixels(out / "sheet.png").shape == (192 + 12, 4 * 198 + 6 + 14, 3)


def test_without_json_the_path_of_the_sheet_is_printed(files, out, capsys):
    assert main(command(files, out)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("seed 0, 1 images in ") and printed[1] == str(out / "sheet.png")


def test_the_settings_of_an_image_repeat_it(files, out, tmp_path, capsys):
    """Same seed, same bytes, also after other schedulers; with --config IMAGE from any folder, in the batch that it was generated in."""
    first = run_generate(command(files, out / "1", num_images=2, seed=3, prompt="a red fish"), capsys)["images"]
    for scheduler in SCHEDULERS[1:]:
        run_generate(command(files, out / scheduler, scheduler=scheduler), capsys)
    again = run_generate(command(files, out / "2", num_images=2, seed=3, prompt="a red fish"), capsys)["images"]
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(pixels(one), pixels(other))
    third = run_generate(["generate", "--config", first[1], "--output-dir", str(out / "3")], capsys)["images"]
    assert [Path(path).name for path in third] == ["000003.png", "000004.png"]
    for one, other in zip(first, third, strict=True):
        assert np.array_equal(pixels(one), pixels(other))
    flags = ["--seed", "4", "--num-images", "1", "--metadata", "no-paths", "--output-dir", str(out / "4")]
    alone = run_generate(["generate", "--config", first[1], *flags], capsys)["images"]
    assert np.abs(pixels(alone[0]).astype(int) - pixels(first[1])).max() <= 2
    with Image.open(alone[0]) as image:
        text = image.info["imprompt"]
    assert str(files) not in text and {"ref.png", "adapter.safetensors"} <= {*json.loads(text)["image"], json.loads(text)["adapter"]}
    nothing = run_generate(["generate", "--config", first[1], *flags, "--metadata", "none"], capsys)["images"]
    with Image.open(nothing[0]) as image:
        assert "imprompt" not in image.info


def test_reference_adapter_and_scale_matter(files, out, capsys):
    def first(name, **changes):
        return pixels(run_generate(command(files, out / name, **changes), capsys)["images"][0]).astype(int)

    one = first("one")
    assert np.abs(one - first("plus", adapter="@plus.bin")).max() > 2
    assert np.abs(one - first("faint", scale=0.3)).max() > 2
    alone = first("alone", image=None, adapter=None, image_encoder=None)
    assert np.array_equal(alone, first("silent", scale=0)) and np.abs(one - alone).max() > 2


def test_flags_override_the_configuration_file(files, out, tmp_path, capsys):
    path = tmp_path / "options.toml"
    path.write_text(
        f'image = ["{files}/ref.png"]\nmodel = "{files}/base"\nadapter = "{files}/adapter.safetensors"\n'
        f'image_encoder = "{files}/base/image_encoder"\noutput_dir = "{out}"\nnum_inference_steps = 1\nnum_images = 3\nscale = 1\n'
        "resolution = 32\n"
    )
    assert len(run_generate(["generate", "--config", str(path)], capsys)["images"]) == 3
    result = run_generate(
        ["generate", "--config", str(path), "--num-images", "1", "--seed", "40", "--output-dir", str(out / "flags")], capsys
    )
    assert result["images"] == [str(out / "flags" / "000040.png")]
    assert pixels(result["images"][0]).shape == (32, 32, 3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_scheduler_generates(scheduler, steps, files, out, capsys):
    run_generate(command(files, out, scheduler=scheduler, num_inference_steps=steps), capsys)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_reports_its_largest_number_of_steps(scheduler, files, out, capsys):
    assert "num_inference_steps: expected at most" in refusal(
        command(files, out, scheduler=scheduler, num_inference_steps=1001), out, capsys
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_generates(dtype, files, out, capsys):
    run_generate(command(files, out, dtype=dtype), capsys)


def test_messages_about_references_are_printed_verbatim(files, out, capsys):
    """File names with square brackets are not markup."""
    wide = files / "wide [bold].png"
    with Image.open(files / "ref.png") as image:
        image.resize((90, 40)).save(wide)
    assert main(command(files, out, image=wide)) == 0
    assert "wide [bold].png: the center square is used, 56% is cropped" in capsys.readouterr().err


def test_images_of_an_earlier_call_are_kept(files, out, capsys):
    """Also a folder and a link that have the name of an image; the printed paths are those of the new images."""
    first = run_generate(command(files, out, num_images=2), capsys)
    (out / "000002.png").mkdir()
    (out / "000003.png").symlink_to(files / "ref.png")
    content = {path: path.read_bytes() for path in (*out.glob("*.png"), files / "ref.png") if path.is_file()}
    second = run_generate(command(files, out, num_images=4, prompt="another"), capsys)
    names = ["000000-2.png", "000001-2.png", "000002-2.png", "000003-2.png", "sheet-2.png"]
    assert [Path(path).name for path in (*second["images"], second["sheet"])] == names
    assert all(path.read_bytes() == before for path, before in content.items())
    assert len(list(out.iterdir())) == len(first["images"]) + 1 + 2 + len(names)


def test_the_base_is_left_as_it_was_after_an_error(files, out, capsys):
    """A misfit between two good runs: nothing stays attached."""
    first = run_generate(command(files, out / "1"), capsys)["images"][0]
    refusal(command(files, out / "2", adapter="@sdxl.safetensors"), out / "2", capsys)
    assert np.array_equal(pixels(first), pixels(run_generate(command(files, out / "3"), capsys)["images"][0]))


def test_patch_features_of_another_width_are_refused(files, out, tmp_path, capsys):
    """The resampler reads patch features, not the pooled embedding: each has its own width."""
    tensors, _ = checkpoints.read_adapter_file(files / "plus.bin")
    tensors["image_proj.proj_in.weight"] = tensors["image_proj.proj_in.weight"][:, : VISION // 2]
    checkpoints.write_tensors(tensors, tmp_path / "narrow.safetensors")
    text = refusal(command(files, out, adapter=tmp_path / "narrow.safetensors"), out, capsys)
    assert f"received features of dimension {VISION}" in text
