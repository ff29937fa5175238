"""LoRA of other kinds are refused in one sentence, and tensors that do not fit are reported; the pipeline stays as it was."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from conftest import sd15_pipeline
from imprompt.errors import Notice, UserError
from imprompt.generation.lora import use_lora
from imprompt.methods.dreambooth import LoRAUNet

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


@pytest.fixture(scope="module")
def pipe():
    return sd15_pipeline()


@pytest.fixture(scope="module")
def lora(pipe):
    torch.manual_seed(3)
    return {key: torch.randn_like(value) for key, value in LoRAUNet(pipe.unet, 2).state_dict().items()}


def to_kohya(lora):
    tensors = {}
    for key, value in lora.items():
        layer, matrix, _ = key.removeprefix("unet.").rsplit(".", 2)
        name = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{name}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight": value, f"{name}.alpha": torch.tensor(1.0)}
    return tensors


def foreign_layer(down, up):
    return {down: torch.ones(2, 4), up: torch.ones(4, 2)}


def apply_lora(pipe, tensors, folder):
    """Load it and unload it; the pipeline must be as before."""
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    save_file(tensors, folder / "lora.safetensors")
    try:
        with use_lora(pipe, [str(folder / "lora.safetensors")]):
            assert len(pipe.unet.state_dict()) > len(before)
    finally:
        after = pipe.unet.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


UNFIT = {
    "peft": (lambda t: {key.replace("unet.", "base_model.model."): value for key, value in t.items()}, "changes no layer"),
    "flux": (lambda t: foreign_layer("transformer.blocks.0.to_q.lora_A.weight", "transformer.blocks.0.to_q.lora_B.weight"), "no layer"),
    "flux of kohya": (lambda t: foreign_layer("lora_unet_single_0.lora_down.weight", "lora_unet_single_0.lora_up.weight"), "cannot be"),
    "empty": (lambda t: {}, "no tensors"),
    "an adapter": (lambda t: {"image_proj.proj.weight": torch.ones(2, 2)}, "changes no layer"),
    "loha": (lambda t: {"lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}, "cannot be loaded"),
    "of another base": (lambda t: {key: torch.zeros([n + 1 for n in value.shape]) for key, value in t.items()}, "cannot be loaded"),
    "half": (lambda t: {key: value for key, value in t.items() if "lora_A" in key}, "cannot be loaded"),
    "NaN": (lambda t: {key: value * float("nan") for key, value in t.items()}, "contains NaN or infinity"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_lora_of_another_kind_is_refused_in_one_sentence(kind, pipe, lora, tmp_path, capfd):
    make, message = UNFIT[kind]
    with pytest.raises(UserError, match=message) as error:
        apply_lora(pipe, make(lora), tmp_path)
    assert "lora:" in str(error.value) and "\n" not in str(error.value)
    assert "size mismatch" not in capfd.readouterr().err  # diffusers logs a line for every tensor


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_tensors_that_fit_no_layer_are_reported(form, pipe, lora, tmp_path):
    if form == "kohya":
        tensors = to_kohya(lora)
        extra = foreign_layer("lora_unet_foo_bar.lora_down.weight", "lora_unet_foo_bar.lora_up.weight")
    else:
        tensors, extra = lora, foreign_layer("unet.foo.to_q.lora_A.weight", "unet.foo.to_q.lora_B.weight")
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always", Notice)
        apply_lora(pipe, tensors, tmp_path)
        assert not [notice for notice in notices if notice.category is Notice]
    with pytest.warns(Notice, match=r"2 of \d+ tensors fit no layer of this base model and are left out, such as unet\.foo"):
        apply_lora(pipe, tensors | extra, tmp_path)
