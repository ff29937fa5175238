"""A base as people share them: one file in the layout of the original Stable Diffusion."""

import re

import pytest
import torch
from safetensors.torch import save_file

from conftest import sd15_pipeline
from imprompt.config import Generate
from imprompt.errors import UserError
from imprompt.generation.generate import draw
from imprompt.models.base_pipelines import load_base

_RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.", "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
_FRAME = {
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
    """diffusers' name of a tensor of the UNet → the original one."""
    for mine, theirs in _FRAME.items():
        key = key.replace(mine, theirs) if key.startswith(mine) else key
    if found := re.match(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.*)", key):
        block, part, n, rest = int(found[1]), found[2], int(found[3]), found[4]
        at = (layers + 1) * block + n + 1
        key = (
            f"input_blocks.{at + layers}.0.op.{rest[5:]}"
            if part == "downsamplers"
            else f"input_blocks.{at}.{part == 'attentions':d}.{rest}"
        )
    elif found := re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", key):
        block, part, n, rest = int(found[1]), found[2], int(found[3]), found[4]
        at = (layers + 1) * block + n
        place = 1 if block == 0 else 2  # behind the attention, where there is one
        key = (
            f"output_blocks.{at + layers}.{place}.{rest}" if part == "upsamplers" else f"output_blocks.{at}.{part == 'attentions':d}.{rest}"
        )
    if re.match(r"(input_blocks\.\d+\.0|output_blocks\.\d+\.0|middle_block\.[02])\.", key):
        for mine, theirs in _RESNET.items():
            key = key.replace(mine, theirs)
    return f"model.diffusion_model.{key}"


def vae_key(key, levels):
    for mine, theirs in _VAE.items():
        key = re.sub(mine, theirs, key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    return f"first_stage_model.{key}"


def in_one_file(pipe, path):
    layers, levels = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    tensors = {unet_key(key, layers): value for key, value in pipe.unet.state_dict().items()}
    for key, value in pipe.vae.state_dict().items():
        square = re.search(r"mid_block\.attentions\.0\.to_.*weight", key)
        tensors[vae_key(key, levels)] = value[:, :, None, None] if square else value
    tensors |= {f"cond_stage_model.transformer.{prefixed(key)}": value for key, value in pipe.text_encoder.state_dict().items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def prefixed(key):
    return key if key.startswith("text_model.") else f"text_model.{key}"


@pytest.fixture
def bases(tmp_path):
    pipe = sd15_pipeline()
    pipe.save_pretrained(tmp_path / "folder")
    in_one_file(pipe, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_a_single_file_is_the_folder(bases):
    """Every tensor comes where it belongs, and the picture is the same."""
    folder = load_base(str(bases / "folder"))
    theirs = {name: dict(getattr(folder, name).state_dict()) for name in ("unet", "vae", "text_encoder")}
    how = {"prompt": "a red fish", "steps": 2, "count": 1, "size": "32", "dtype": "float32", "device": "cpu", "guidance": 4.0}
    expected = draw(Generate(base=str(bases / "folder"), **how))[0].image
    single = load_base(str(bases / "model.safetensors"), config=str(bases / "folder"))
    for name, tensors in theirs.items():
        mine = getattr(single, name).state_dict()
        assert set(mine) == set(tensors) and all(torch.equal(mine[key], tensors[key]) for key in tensors)
    drawn = draw(Generate(base=str(bases / "model.safetensors"), base_config=str(bases / "folder"), **how))[0].image
    assert drawn.tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore")
def test_without_a_folder_of_its_family_it_is_said_offline(bases, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--base-config"):
        load_base(str(bases / "model.safetensors"))
