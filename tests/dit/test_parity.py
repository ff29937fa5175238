"""The public adapter families against diffusers' own loaders, and against the formulas of the families that diffusers does not load."""

import pytest
import torch

from imprompt.dit.injection import AttachedToTransformer
from tests.dit.conftest import build_adapter, build_prompt, build_transformer


def split_state(adapter):
    """The nested state that diffusers' loaders take."""
    state = adapter.state_dict()
    return {
        name: {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name + ".")}
        for name in ("image_proj", "ip_adapter")
    }


@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_xlabs_flux_equals_diffusers(scale, call_transformer):
    transformer, other = build_transformer("flux"), build_transformer("flux")
    adapter = build_adapter("xlabs-flux", transformer)
    prompt = build_prompt(adapter, scale=scale)
    with AttachedToTransformer(transformer, [prompt], ("cond",)):
        ours = call_transformer(transformer, "flux")
    other._load_ip_adapter_weights([split_state(adapter)], low_cpu_mem_usage=False)
    for processor in other.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    embeds = prompt.image_features.expand(2, -1, -1, -1)[:, :, 0]
    theirs = call_transformer(other, "flux", joint_attention_kwargs={"ip_adapter_image_embeds": [embeds]})
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_instantx_sd3_equals_diffusers(scale, call_transformer):
    transformer, other = build_transformer("sd3"), build_transformer("sd3")
    adapter = build_adapter("instantx-sd3", transformer)
    prompt = build_prompt(adapter, scale=scale, patches=7)
    with AttachedToTransformer(transformer, [prompt], ("uncond", "cond")):
        ours = call_transformer(transformer, "sd3")
    other._load_ip_adapter_weights(split_state(adapter), low_cpu_mem_usage=False)
    for processor in other.attn_processors.values():
        processor.scale = scale
    embeds = torch.cat([prompt.uncond_features[0], prompt.image_features[0]])
    theirs = call_transformer(other, "sd3", joint_attention_kwargs={"ip_adapter_image_embeds": embeds})
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
