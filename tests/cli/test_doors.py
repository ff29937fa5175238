"""The doors of `generate` beside references and text: begin with a picture, draw into one, structure, LoRA, several prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image

from imprompt.cli import main
from imprompt.models.base_pipelines import load_base
from imprompt.models.hub import MINI

CAT, FISH, LEFT = (str(Path(__file__).parents[2] / "examples" / f"{name}.png") for name in ("cat", "fish", "left"))
QUICK = ["--steps", "3", "--count", "1", "--json", "--dtype", "float32"]


@pytest.fixture
def drawn(tmp_path, capsys):
    """Run the command and open what it drew."""

    def run(*words, size=(64, 64)):
        assert main(["generate", "--out", str(tmp_path / "out"), *QUICK, *map(str, words)]) == 0
        found = Image.open(json.loads(capsys.readouterr().out)["pictures"][0]).convert("RGB")
        assert found.size == size
        return np.asarray(found).astype(int)

    return run


@pytest.fixture
def said(capsys):
    def run(*words):
        assert main(["generate", *QUICK, *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("imprompt: ") and error.count("\n") == 1, error
        return error

    return run


def apart(a, b):
    return abs(a - b).mean()


def test_a_picture_to_begin_with(drawn):
    fish = np.asarray(Image.open(FISH).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    near, far = drawn("--init", FISH, "--strength", ".34"), drawn("--init", FISH, "--strength", "1")
    assert apart(near, fish) < apart(far, fish)
    assert apart(drawn("--init", FISH, "--strength", ".67", "--image", CAT), drawn("--init", FISH, "--strength", ".67")) > 1


def test_the_first_pictures_proportions_are_kept(drawn, tmp_path):
    Image.open(FISH).convert("RGB").resize((300, 150)).save(tmp_path / "wide.png")
    drawn("--init", tmp_path / "wide.png", size=(88, 48))
    drawn("--init", tmp_path / "wide.png", "--size", "64x32", size=(64, 32))


def test_outside_the_mask_nothing_changes(drawn):
    before = np.asarray(Image.open(FISH).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    mask = np.asarray(Image.open(LEFT).convert("L").resize((64, 64), Image.Resampling.BILINEAR))
    after = drawn("--inpaint", FISH, "--mask", LEFT, "--image", CAT)
    assert (after[mask == 0] == before[mask == 0]).all() and abs(after[mask == 255] - before[mask == 255]).mean() > 5


@pytest.mark.filterwarnings("ignore")
def test_structure_by_controlnets_and_t2i_adapters_together(drawn, tmp_path):
    unet = load_base("mini").unet
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96))
    for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.05)
    net.save_pretrained(tmp_path / "net")
    kind = "full_adapter_xl"
    T2IAdapter(1, [96, 128, 192, 192], num_res_blocks=1, downscale_factor=8, adapter_type=kind).save_pretrained(tmp_path / "t2i")
    plain = drawn("--image", CAT)
    seen = [plain]
    for words in (["net", ":0.5"], ["t2i", ""]):
        seen.append(drawn("--image", CAT, "--control", f"{tmp_path / words[0]}={FISH}{words[1]}"))
    both = ["--control", f"{tmp_path / 'net'}={FISH}", "--control", f"{tmp_path / 't2i'}={LEFT}:0.7"]
    seen += [drawn("--image", CAT, *both), drawn("--image", CAT, *both, "--init", FISH, "--strength", ".67")]
    seen.append(drawn("--image", CAT, *both, "--inpaint", FISH, "--mask", LEFT))
    seen.append(drawn("--image", CAT, *both, "--control", f"{tmp_path / 'net'}={LEFT}:0.3"))
    assert all(apart(a, b) > 0.1 for i, a in enumerate(seen) for b in seen[:i])
    assert (drawn("--image", CAT) == plain).all()  # nothing is left behind
    assert (drawn("--image", CAT, "--control", f"{tmp_path / 't2i'}={FISH}:0") == plain).all()


def test_lora_of_the_base(drawn, tmp_path, said):
    from imprompt.methods.dreambooth import LowRank

    pipe = load_base("mini")
    torch.manual_seed(0)
    low = LowRank(pipe.unet, 2)
    tensors = {key: torch.randn_like(value) * 0.1 for key, value in low.state_dict().items()}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "style.safetensors")
    plain = drawn("--image", CAT)
    style = tmp_path / "style.safetensors"
    full, half = drawn("--image", CAT, "--lora", style), drawn("--image", CAT, "--lora", f"{style}:0.5")
    assert apart(full, plain) > 0.5 and apart(half, full) > 0.1 and apart(half, plain) > 0.1
    assert (drawn("--image", CAT) == plain).all() and (drawn("--image", CAT, "--lora", f"{style}:0") == plain).all()
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    assert "cannot be loaded" in said("--lora", tmp_path / "bad.safetensors")


def test_several_prompts_each_with_its_own_place(drawn, tmp_path):
    one = drawn("--image", CAT, "--region", LEFT)
    two = drawn("--image", CAT, "--region", LEFT, "--also", f"image={FISH},scale=0.5,adapter=mini-plus,start=0.1,end=0.9,blocks=up_blocks")
    assert apart(one, two) > 0.5
    assert apart(drawn("--image", CAT), drawn("--image", CAT, "--negative-image", FISH)) > 0.5
    assert apart(drawn("--image", CAT), drawn("--image", CAT, "--blocks", "up_blocks=1,mid_block=0.2")) > 0.5
    drawn("--image", CAT, "--image", FISH, "--fit", "tile")


def test_an_image_prompt_is_kept_and_taken_again(drawn, tmp_path, said):
    kept = tmp_path / "cat.safetensors"
    first = drawn("--image", CAT, "--image", FISH, "--weights", "2,1", "--save-prompt", kept)
    assert (drawn("--image", kept) == first).all()
    assert apart(drawn("--image", kept, "--scale", "0.3"), first) > 0.5
    assert "made with another adapter" in said("--image", kept, "--adapter", "mini-plus")
    assert "holds no image prompt" in said("--image", MINI / "adapter.safetensors")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--init", CAT, "--inpaint", CAT, "--mask", LEFT], "init and inpaint: expected one of them"),
        (["--inpaint", CAT], "mask: inpaint needs it"),
        (["--mask", LEFT], "inpaint: mask needs it"),
        (["--strength", ".5"], "strength: says how far to go from a picture"),
        (["--init", CAT, "--strength", "1.5"], "strength: expected 0 … 1"),
        (["--init", CAT, "--strength", ".1"], "of 3 steps is less than one; expected at least 0.33"),
        (["--init", "none.png"], "no picture at none.png"),
        (["--control", "edges"], "control: expected KIND=IMAGE"),
        (["--control", f"depth={CAT}"], "control: mini reads edges and silhouette"),
        (["--control", f"no/such/folder={CAT}"], "control: no ControlNet or T2I-Adapter at no/such/folder"),
        (["--image", CAT, "--blocks", "middle"], "scale names blocks that this model does not have: middle"),
        (["--image", CAT, "--blocks", "up_blocks=much"], "blocks: expected BLOCK=λ"),
        (["--image", CAT, "--start", ".8", "--end", ".2"], "start: expected at most end"),
        (["--image", CAT, "--also", "scale=1"], "also: expected at least one image=PATH"),
        (["--image", CAT, "--also", f"image={FISH},colour=red"], "also: expected image=…"),
        (["--image", CAT, "--also", f"image={FISH},scale=much"], "also: scale: expected a number"),
        (["--image", CAT, "--face", "who.npy"], "faces: a global adapter hears pictures"),
        (["--image", CAT, "--save-prompt", "cat.png"], "an image prompt is kept in a .safetensors file"),
        (["--base", "no.safetensors"], "there is no such file"),
        (["--base", CAT.replace("png", "ckpt")], "there is no such file"),
    ],
)
def test_what_does_not_go_together_gets_one_sentence(words, expected, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in said(*words)
