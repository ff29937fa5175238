"""A base model in a single file, in the layout of the original Stable Diffusion."""

import re

import pytest
import torch
from safetensors.torch import save_file

from conftest import sd15_pipeline
from imprompt.config import GenerateConfig
from imprompt.errors import UserError
from imprompt.generation.generate import generate_images
from imprompt.models.base_pipelines import load_pipeline

_RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.", "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
_TOP_LEVEL = {
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.", "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.", "conv_out.": "out.2.", "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.", "mid_block.resnets.1.": "middle_block.2.",
}  # fmt: skip
_VAE = {
    r"encoder\.down_blocks\.(\d)\.resnets\.(\d)": r"encoder.down.\1.block.\2",
    r"encoder\.down_blocks\.(\d)\.downsamplers\.0": r"encoder.down.\1.downsample",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"mid_block\.attentions\.0\.to_": "mid.attn_1.",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}


def unet_key(key, layers):
    """The name of a UNet tensor in diffusers → in the original layout."""
    for name, original in _TOP_LEVEL.items():
        key = key.replace(name, original) if key.startswith(name) else key
    if match := re.match(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.*)", key):
        block, part, n, rest = int(match[1]), match[2], int(match[3]), match[4]
        index = (layers + 1) * block + n + 1
        key = (
            f"input_blocks.{index + layers}.0.op.{rest[5:]}"
            if part == "downsamplers"
            else f"input_blocks.{index}.{part == 'attentions':d}.{rest}"
        )
    elif match := re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", key):
        block, part, n, rest = int(match[1]), match[2], int(match[3]), match[4]
        index = (layers + 1) * block + n
        position = 1 if block == 0 else 2  # after the attention, where there is one
        key = (
            f"output_blocks.{index + layers}.{position}.{rest}"
            if part == "upsamplers"
            else f"output_blocks.{index}.{part == 'attentions':d}.{rest}"
        )
    if re.match(r"(input_blocks\.\d+\.0|output_blocks\.\d+\.0|middle_block\.[02])\.", key):
        for name, original in _RESNET.items():
            key = key.replace(name, original)
    return f"model.diffusion_model.{key}"


def vae_key(key, levels):
    for pattern, original in _VAE.items():
        key = re.sub(pattern, original, key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    return f"first_stage_model.{key}"


def save_single_file(pipe, path):
    layers, levels = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    tensors = {unet_key(key, layers): value for key, value in pipe.unet.state_dict().items()}
    for key, value in pipe.vae.state_dict().items():
        is_linear = re.search(r"mid_block\.attentions\.0\.to_.*weight", key)
        tensors[vae_key(key, levels)] = value[:, :, None, None] if is_linear else value
    tensors |= {f"cond_stage_model.transformer.{text_encoder_key(key)}": value for key, value in pipe.text_encoder.state_dict().items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def text_encoder_key(key):
    return key if key.startswith("text_model.") else f"text_model.{key}"


@pytest.fixture
def base_models(tmp_path):
    pipe = sd15_pipeline()
    pipe.save_pretrained(tmp_path / "folder")
    save_single_file(pipe, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_a_single_file_is_equal_to_the_folder(base_models):
    """Every tensor gets its place, and the generated image is the same."""
    folder = load_pipeline(str(base_models / "folder"))
    expected = {name: dict(getattr(folder, name).state_dict()) for name in ("unet", "vae", "text_encoder")}
    options = {"prompt": "a red fish", "num_inference_steps": 2, "num_images": 1, "resolution": "32", "guidance_scale": 4.0}
    options |= {"dtype": "float32", "device": "cpu", "model_config": str(base_models / "folder")}
    (from_folder,) = generate_images(GenerateConfig.from_options(model=str(base_models / "folder"), **options))
    single = load_pipeline(str(base_models / "model.safetensors"), model_config=str(base_models / "folder"))
    for name, tensors in expected.items():
        received = getattr(single, name).state_dict()
        assert set(received) == set(tensors) and all(torch.equal(received[key], tensors[key]) for key in tensors)
    (from_file,) = generate_images(GenerateConfig.from_options(model=str(base_models / "model.safetensors"), **options))
    assert from_file.image.tobytes() == from_folder.image.tobytes()


@pytest.mark.filterwarnings("ignore")
def test_offline_a_single_file_needs_a_folder_of_its_family(base_models, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--model-config"):
        load_pipeline(str(base_models / "model.safetensors"))
