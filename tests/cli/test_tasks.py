"""The tasks of `generate`: image-to-image, inpainting, structure control, LoRA, several image prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image

from imprompt.cli import main
from imprompt.models.base_pipelines import load_pipeline
from imprompt.models.hub import MINI_PATH

CAT, FISH, LEFT = (str(Path(__file__).parents[2] / "examples" / f"{name}.png") for name in ("cat", "fish", "left"))
QUICK = ["--steps", "3", "--num-images", "1", "--json", "--dtype", "float32"]


@pytest.fixture
def generate_pixels(tmp_path, capsys):
    """Run the command and open the image that it generated."""

    def run(*arguments, size=(64, 64)):
        assert main(["generate", "--output-dir", str(tmp_path / "out"), *QUICK, *map(str, arguments)]) == 0
        image = Image.open(json.loads(capsys.readouterr().out)["images"][0]).convert("RGB")
        assert image.size == size
        return np.asarray(image).astype(int)

    return run


@pytest.fixture
def read_error(capsys):
    def run(*arguments):
        assert main(["generate", *QUICK, *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("imprompt: ") and error.count("\n") == 1, error
        return error

    return run


def mean_difference(a, b):
    return abs(a - b).mean()


def test_strength_decides_how_much_of_the_initial_image_stays(generate_pixels):
    fish = np.asarray(Image.open(FISH).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    near, far = generate_pixels("--init-image", FISH, "--strength", ".34"), generate_pixels("--init-image", FISH, "--strength", "1")
    assert mean_difference(near, fish) < mean_difference(far, fish)
    assert (
        mean_difference(
            generate_pixels("--init-image", FISH, "--strength", ".67", "--image", CAT),
            generate_pixels("--init-image", FISH, "--strength", ".67"),
        )
        > 1
    )


def test_the_aspect_ratio_of_the_initial_image_is_kept(generate_pixels, tmp_path):
    Image.open(FISH).convert("RGB").resize((300, 150)).save(tmp_path / "wide.png")
    generate_pixels("--init-image", tmp_path / "wide.png", size=(88, 48))
    generate_pixels("--init-image", tmp_path / "wide.png", "--resolution", "64x32", size=(64, 32))


def test_outside_the_mask_nothing_changes(generate_pixels):
    before = np.asarray(Image.open(FISH).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    mask = np.asarray(Image.open(LEFT).convert("L").resize((64, 64), Image.Resampling.BILINEAR))
    after = generate_pixels("--inpaint-image", FISH, "--mask-image", LEFT, "--image", CAT)
    assert (after[mask == 0] == before[mask == 0]).all() and abs(after[mask == 255] - before[mask == 255]).mean() > 5


@pytest.mark.filterwarnings("ignore")
def test_structure_by_controlnets_and_t2i_adapters_together(generate_pixels, tmp_path):
    unet = load_pipeline("mini").unet
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96))
    for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.05)
    net.save_pretrained(tmp_path / "net")
    kind = "full_adapter_xl"
    T2IAdapter(1, [96, 128, 192, 192], num_res_blocks=1, downscale_factor=8, adapter_type=kind).save_pretrained(tmp_path / "t2i")
    plain = generate_pixels("--image", CAT)
    results = [plain]
    for arguments in (["net", ":0.5"], ["t2i", ""]):
        results.append(generate_pixels("--image", CAT, "--control", f"{tmp_path / arguments[0]}={FISH}{arguments[1]}"))
    both = ["--control", f"{tmp_path / 'net'}={FISH}", "--control", f"{tmp_path / 't2i'}={LEFT}:0.7"]
    results += [generate_pixels("--image", CAT, *both), generate_pixels("--image", CAT, *both, "--init-image", FISH, "--strength", ".67")]
    results.append(generate_pixels("--image", CAT, *both, "--inpaint-image", FISH, "--mask-image", LEFT))
    results.append(generate_pixels("--image", CAT, *both, "--control", f"{tmp_path / 'net'}={LEFT}:0.3"))
    assert all(mean_difference(a, b) > 0.1 for i, a in enumerate(results) for b in results[:i])
    assert (generate_pixels("--image", CAT) == plain).all()  # the pipeline is restored
    assert (generate_pixels("--image", CAT, "--control", f"{tmp_path / 't2i'}={FISH}:0") == plain).all()


def test_lora_of_the_base(generate_pixels, tmp_path, read_error):
    from imprompt.methods.dreambooth import LoRAUNet

    pipe = load_pipeline("mini")
    torch.manual_seed(0)
    low = LoRAUNet(pipe.unet, 2)
    tensors = {key: torch.randn_like(value) * 0.1 for key, value in low.state_dict().items()}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "style.safetensors")
    plain = generate_pixels("--image", CAT)
    style = tmp_path / "style.safetensors"
    full, half = generate_pixels("--image", CAT, "--lora", style), generate_pixels("--image", CAT, "--lora", f"{style}:0.5")
    assert mean_difference(full, plain) > 0.5 and mean_difference(half, full) > 0.1 and mean_difference(half, plain) > 0.1
    assert (generate_pixels("--image", CAT) == plain).all() and (generate_pixels("--image", CAT, "--lora", f"{style}:0") == plain).all()
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    assert "cannot be loaded" in read_error("--lora", tmp_path / "bad.safetensors")


def test_several_image_prompts_each_with_its_own_mask(generate_pixels, tmp_path):
    one = generate_pixels("--image", CAT, "--image-mask", LEFT)
    two = generate_pixels(
        "--image",
        CAT,
        "--image-mask",
        LEFT,
        "--image-prompt",
        f"image={FISH},scale=0.5,adapter=mini-plus,start_at=0.1,end_at=0.9,scale_per_block=up_blocks",
    )
    assert mean_difference(one, two) > 0.5
    assert mean_difference(generate_pixels("--image", CAT), generate_pixels("--image", CAT, "--negative-image", FISH)) > 0.5
    assert (
        mean_difference(generate_pixels("--image", CAT), generate_pixels("--image", CAT, "--scale-per-block", "up_blocks=1,mid_block=0.2"))
        > 0.5
    )
    generate_pixels("--image", CAT, "--image", FISH, "--resize-mode", "tile")


def test_an_image_prompt_is_saved_and_loaded(generate_pixels, tmp_path, read_error):
    saved = tmp_path / "cat.safetensors"
    first = generate_pixels("--image", CAT, "--image", FISH, "--image-weights", "2,1", "--save-embeds", saved)
    assert (generate_pixels("--image", saved) == first).all()
    assert mean_difference(generate_pixels("--image", saved, "--scale", "0.3"), first) > 0.5
    assert "made with another adapter" in read_error("--image", saved, "--adapter", "mini-plus")
    assert "contains no image prompt" in read_error("--image", MINI_PATH / "adapter.safetensors")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--init-image", CAT, "--inpaint-image", CAT, "--mask-image", LEFT], "init_image and inpaint_image: expected one of them"),
        (["--inpaint-image", CAT], "mask_image: inpaint_image needs it"),
        (["--mask-image", LEFT], "inpaint_image: mask_image needs it"),
        (["--strength", ".5"], "strength: has an effect with an image to start from only"),
        (["--init-image", CAT, "--strength", "1.5"], "strength: expected 0 … 1"),
        (["--init-image", CAT, "--strength", ".1"], "of 3 steps is less than one; expected at least 0.33"),
        (["--init-image", "none.png"], "init_image: no file at none.png"),
        (["--control", "edges"], "control: expected KIND=IMAGE"),
        (["--control", f"depth={CAT}"], "control: mini has edges and silhouette"),
        (["--control", f"no/such/folder={CAT}"], "control: no ControlNet or T2I-Adapter at no/such/folder"),
        (["--image", CAT, "--scale-per-block", "middle"], "scale names blocks that this model does not have: middle"),
        (["--image", CAT, "--scale-per-block", "up_blocks=much"], "scale_per_block: expected BLOCK=λ"),
        (["--image", CAT, "--start-at", ".8", "--end-at", ".2"], "start_at: expected at most end_at"),
        (["--image", CAT, "--image-prompt", "scale=1"], "image_prompt: expected at least one image=PATH"),
        (["--image", CAT, "--image-prompt", f"image={FISH},color=red"], "image_prompt: expected image=…"),
        (["--image", CAT, "--image-prompt", f"image={FISH},scale=much"], "image_prompt: scale: expected a number"),
        (["--image", CAT, "--face-embeds", CAT], "face_embeds: a base adapter takes images"),
        (["--image", CAT, "--save-embeds", "cat.png"], "an image prompt is saved to a .safetensors file"),
        (["--model", "no.safetensors"], "there is no such file"),
        (["--model", CAT.replace("png", "ckpt")], "there is no such file"),
    ],
)
def test_conflicting_options_get_one_sentence(arguments, expected, read_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in read_error(*arguments)
