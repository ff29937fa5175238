"""Files of the transformer families: recognized by their tensors, loaded, and written so that they are read again."""

import pytest
import torch
from small_transformers import build_adapter, build_transformer

from imprompt.core.adapter import FAMILIES, Adapter
from imprompt.core.image_projection import ImageProjection, MLPImageProjection, TimeResampler
from imprompt.errors import CheckpointError
from imprompt.models import checkpoints
from imprompt.models.tensor_files import read_tensors

HOST_OF = {"xlabs-flux": "flux", "instantx-flux": "flux", "instantx-sd3": "sd3", "transformer": "qwen-image"}


def full_size_adapter(family: str) -> Adapter:
    """An adapter of a release's size, without values."""
    with torch.device("meta"):
        match family:
            case "xlabs-flux v1" | "xlabs-flux v2":
                tokens = 4 if family.endswith("1") else 16
                return Adapter(ImageProjection(768, 4096, tokens), dict.fromkeys(range(19), 3072), 4096, family=FAMILIES["xlabs-flux"])
            case "instantx-flux":
                projection = MLPImageProjection(1152, 4096, 128)
                return Adapter(projection, dict.fromkeys(range(57), 3072), 4096, family=FAMILIES[family], head_dim=128)
    with torch.device("meta"):
        return Adapter(TimeResampler(1152, 2432), dict.fromkeys(range(38), 2432), 2432, family=FAMILIES[family], head_dim=64)


@pytest.mark.parametrize(
    ("family", "millions"), [("xlabs-flux v1", 490.9), ("xlabs-flux v2", 528.7), ("instantx-flux", 2645.6), ("instantx-sd3", 797.9)]
)
def test_releases_have_so_many_parameters(family, millions):
    adapter = full_size_adapter(family)
    assert round(adapter.num_parameters() / 1e6, 1) == millions
    spec = checkpoints.detect_spec(adapter.state_dict())
    assert spec.family == family.split()[0] and spec.num_tokens == {490.9: 4, 528.7: 16, 2645.6: 128, 797.9: 64}[millions]
    assert spec.base_model == ("SD3.5 Large" if family == "instantx-sd3" else "FLUX.1-dev")
    assert spec.image_encoder.startswith("CLIP ViT-L/14" if family.startswith("xlabs") else "SigLIP so400m")


@pytest.mark.parametrize("family", HOST_OF)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_survives_reading_and_writing(family, suffix, tmp_path):
    adapter = build_adapter(family, build_transformer(HOST_OF[family]))
    if family == "instantx-flux":
        adapter.head_dim = 128
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    checkpoints.save(adapter, first)
    loaded, spec = checkpoints.load_adapter(first)
    assert spec.family == loaded.family.name == family
    checkpoints.convert_adapter(first, second)
    tensors, again = read_tensors(first)[0], read_tensors(second)[0]
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in adapter.state_dict().items())


def test_xlabs_files_have_the_names_of_the_release(tmp_path):
    checkpoints.save(build_adapter("xlabs-flux", build_transformer("flux")), tmp_path / "a.safetensors")
    names = set(read_tensors(tmp_path / "a.safetensors")[0])
    assert names == {
        *(f"ip_adapter_proj_model.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")),
        *(
            f"double_blocks.{n}.processor.ip_adapter_double_stream_{side}_proj.{kind}"
            for n in range(2) for side in "kv" for kind in ("weight", "bias")
        ),
    }  # fmt: skip


def test_the_names_of_diffusers_are_read(tmp_path):
    """guiyrt/InstantX-SD3.5-Large-IP-Adapter-diffusers."""
    adapter = build_adapter("instantx-sd3", build_transformer("sd3"))
    theirs = {
        "0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_kv": "attn.to_kv", "0.to_out": "attn.to_out.0",
        "1.0": "adaln_norm",
        "1.1": "ff.net.0.proj", "1.3": "ff.net.2", "2.1": "adaln_proj",
    }  # fmt: skip
    tensors = {}
    for key, value in adapter.state_dict().items():
        for ours, name in theirs.items():
            prefix = key.split(".layers.")[0] + ".layers."
            if ".layers." in key and key.removeprefix(prefix)[2:].startswith(ours + "."):
                key = f"{prefix}{key.removeprefix(prefix)[:2]}{name}{key.removeprefix(prefix)[2 + len(ours) :]}"
                break
        tensors[key] = value
    assert "image_proj.layers.0.attn.to_q.weight" in tensors
    checkpoints.write_tensors(tensors, tmp_path / "a.safetensors")
    loaded, spec = checkpoints.load_adapter(tmp_path / "a.safetensors")
    assert spec.family == "instantx-sd3"
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in adapter.state_dict().items())


def test_an_adapter_without_the_channels_of_a_head_is_refused(tmp_path):
    adapter = build_adapter("transformer", build_transformer("sd3"))
    checkpoints.write_tensors(adapter.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no metadata that says how many channels a head has"):
        checkpoints.load_adapter(tmp_path / "a.safetensors")
