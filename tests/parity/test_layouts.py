"""Our files have, key by key, the layout of the public files, and pass the rules of other readers."""

from types import SimpleNamespace

import pytest
import torch
from benchmarks.random_models import SD15, SDXL
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from conftest import random_adapter, sd15_unet
from imprompt.core.adapter import Adapter
from imprompt.core.aggregation import TokenAttentionPooling
from imprompt.core.image_projection import FullImageProjection
from imprompt.methods import build_method
from imprompt.models import checkpoints, hub
from imprompt.unet.attn_processors import find_cross_attention_layers
from released_adapters import RELEASED_ADAPTERS

H = SimpleNamespace(embed_dim=lambda *, patches: 1280 if patches else 1024)
G = SimpleNamespace(embed_dim=lambda *, patches: 1664 if patches else 1280)


@pytest.mark.parametrize(
    ("row", "base", "encoder", "method"),
    [
        ("sd15", SD15, H, "ip-adapter"),
        ("sd15_vit-G", SD15, G, "ip-adapter"),
        ("sdxl", SDXL, G, "ip-adapter"),
        ("sdxl_vit-h", SDXL, H, "ip-adapter"),
        ("plus_sd15", SD15, H, "ip-adapter-plus"),
        ("plus_sdxl_vit-h", SDXL, H, "ip-adapter-plus"),
    ],
)
def test_what_is_trained_on_a_real_base_has_the_public_keys_and_shapes(row, base, encoder, method):
    """Models of full size on the meta device: every key of the table, in its shape, and no other."""
    with torch.device("meta"):
        trained = build_method(method, SimpleNamespace(unet=UNet2DConditionModel(**base)), encoder)
    assert {key: tuple(value.shape) for key, value in trained.module.state_dict().items()} == RELEASED_ADAPTERS[row].shapes


def test_the_layers_of_a_real_base_have_the_public_numbers():
    with torch.device("meta"):
        layers = {layer.index: layer.attention.inner_dim for layer in find_cross_attention_layers(UNet2DConditionModel(**SDXL))}
        full = Adapter(FullImageProjection(1280, 768), {1: 320}, 768)
    expected = RELEASED_ADAPTERS["sdxl"].shapes
    assert {f"ip_adapter.{n}.to_k_ip.weight": (hidden, 2048) for n, hidden in layers.items()}.items() <= expected.items()
    released = {key for key in RELEASED_ADAPTERS["full-face_sd15"].shapes if key.startswith("image_proj.")}
    assert {key for key in full.state_dict() if key.startswith("image_proj.")} == released


def detect_like_invoke(tensors):
    """InvokeAI: two prefixes, and any other key is refused."""
    if unknown := [key for key in tensors if not key.startswith(("image_proj.", "ip_adapter."))]:
        raise RuntimeError(unknown[0])
    return "proj.weight" if "image_proj.proj.weight" in tensors else "proj_in.weight" if "image_proj.proj_in.weight" in tensors else None


def detect_like_comfy(tensors):
    """ComfyUI_IPAdapter_plus: other prefixes are ignored; the type follows from single keys, the base model from a width."""
    proj = {key.removeprefix("image_proj.") for key in tensors if key.startswith("image_proj.")}
    weights = {key.removeprefix("ip_adapter.") for key in tensors if key.startswith("ip_adapter.")}
    layers = sorted({int(key.split(".")[0]) for key in weights})
    assert layers == [2 * n + 1 for n in range(len(layers))] and weights == {f"{n}.to_{x}_ip.weight" for n in layers for x in "kv"}
    return "full" if "proj.3.weight" in proj else "plus" if "latents" in proj else "base"


@pytest.mark.parametrize("adapter_type, comfy_type", [("base", "base"), ("plus", "plus"), ("full-face", "full")])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_other_readers_detect_the_adapter_type(adapter_type, comfy_type, suffix, tmp_path):
    path = tmp_path / f"adapter{suffix}"
    checkpoints.save(random_adapter(sd15_unet(), adapter_type), path, {"base": "SD 1.5"}, torch.float16)
    if suffix == ".bin":
        nested = torch.load(path, weights_only=True)
        tensors = {f"{group}.{key}": value for group in ("image_proj", "ip_adapter") for key, value in nested[group].items()}
    else:
        tensors = load_file(path)
    assert detect_like_comfy(tensors) == comfy_type
    assert detect_like_invoke(tensors) == {"base": "proj.weight", "plus": "proj_in.weight", "full-face": None}[adapter_type]


def test_a_trained_aggregator_is_ignored_or_can_be_left_out(tmp_path):
    adapter = random_adapter(sd15_unet(), "plus")
    adapter.aggregator = TokenAttentionPooling(adapter.cross_attention_dim)
    checkpoints.save(adapter, tmp_path / "ours.safetensors", {"aggregator": "attention-tokens", "base": "SD 1.5"})
    assert detect_like_comfy(load_file(tmp_path / "ours.safetensors")) == "plus"
    with pytest.raises(RuntimeError, match="aggregator"):
        detect_like_invoke(load_file(tmp_path / "ours.safetensors"))
    spec = checkpoints.convert_adapter(tmp_path / "ours.safetensors", tmp_path / "plain.safetensors", without_aggregator=True)
    assert detect_like_invoke(load_file(tmp_path / "plain.safetensors")) == "proj_in.weight"
    assert spec.aggregator == "concat" and spec.metadata["base"] == "SD 1.5"


@pytest.mark.parametrize("name", ["mini", "mini-plus"])
def test_the_bundled_adapters_are_public_files(name):
    assert detect_like_invoke(load_file(hub.MINI_PATH / hub.BUNDLED_ADAPTERS[name]))
