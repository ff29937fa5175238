"""The public adapter families against diffusers' own loaders, and against the formulas of the families that diffusers does not load."""

import pytest
import torch
from small_transformers import build_adapter, build_prompt, build_transformer, call_transformer, transformer_inputs

from imprompt.dit.injection import AttachedToTransformer
from imprompt.dit.sites import find_sites


def split_state(adapter):
    """The nested state that diffusers' loaders take."""
    state = adapter.state_dict()
    return {
        name: {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name + ".")}
        for name in ("image_proj", "ip_adapter")
    }


@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_xlabs_flux_equals_diffusers(scale):
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
def test_instantx_sd3_equals_diffusers(scale):
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


def add_by_formula(transformer, adapter, tokens, scale):
    """Image prompts of InstantX's Flux adapter as forward hooks: attention to RMS-normalized K' and plain V', before the output projection.

    The query is the output of the transformer's own normalization, before rotary embedding; in single blocks, that of text positions too.
    """
    queries = {}

    def attend(attention, n):
        query = queries[n]  # (rows, positions, heads, channels)
        key, value = (tokens @ getattr(adapter.ip_adapter[str(n)], name).weight.T for name in ("to_k_ip", "to_v_ip"))
        key, value = (x.unflatten(-1, (attention.heads, -1)) for x in (key, value))
        key = key / (key.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        scores = torch.einsum("bqhc,bkhc->bhqk", query, key.expand(len(query), -1, -1, -1)) / query.shape[-1] ** 0.5
        out = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), value.expand(len(query), -1, -1, -1))
        return scale * out.flatten(2)

    for site in find_sites(transformer):
        n, attention = site.index, site.attention
        attention.norm_q.register_forward_hook(lambda module, args, out, n=n: queries.__setitem__(n, out))
        if site.side == "joint":
            attention.to_out[0].register_forward_pre_hook(lambda module, args, a=attention, n=n: (args[0] + attend(a, n),))
        else:
            attention.register_forward_hook(lambda module, args, out, a=attention, n=n: out + attend(a, n))


def test_instantx_flux_equals_its_formula_in_float64():
    transformer, other = build_transformer("flux").double(), build_transformer("flux").double()
    adapter = build_adapter("instantx-flux", transformer).double()
    prompt = build_prompt(adapter, scale=0.7)
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in transformer_inputs("flux").items()}
    with AttachedToTransformer(transformer, [prompt], ("cond",)):
        ours = call_transformer(transformer, "flux", **doubles)
    features = prompt.image_features[0].double()
    mlp, norm = adapter.image_proj.proj, adapter.image_proj.norm
    hidden = torch.nn.functional.gelu(features @ mlp[0].weight.T + mlp[0].bias)
    tokens = (hidden @ mlp[2].weight.T + mlp[2].bias).reshape(1, 4, -1)
    centered = tokens - tokens.mean(-1, keepdim=True)
    tokens = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    add_by_formula(other, adapter, tokens, 0.7)
    theirs = call_transformer(other, "flux", **doubles)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_tokens_of_the_per_step_resampler_equal_its_formula_in_float64():
    module = build_adapter("instantx-sd3", build_transformer("sd3")).double().image_proj
    x = torch.randn(1, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def linear(layer, value):
        return value @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    def layer_norm(layer, value):
        centered = value - value.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    silu, t = (lambda value: value / (1 + (-value).exp())), 437.0
    angles = t * torch.exp(-torch.arange(160, dtype=torch.float64) / 160 * torch.tensor(10_000.0, dtype=torch.float64).log())
    time = linear(
        module.time_embedding["linear_2"], silu(linear(module.time_embedding["linear_1"], torch.cat([angles.cos(), angles.sin()])[None]))
    )
    patches, latents = linear(module.proj_in, x) + time[:, None], module.latents
    for attention, mlp, modulation in module.layers:
        shift, scale, shift_mlp, scale_mlp = linear(modulation[1], silu(time))[:, None].chunk(4, -1)
        queries = layer_norm(attention.norm2, latents) * (1 + scale) + shift
        context = torch.cat([layer_norm(attention.norm1, patches), queries], 1)
        key, value = linear(attention.to_kv, context).chunk(2, -1)
        scores = (linear(attention.to_q, queries) @ key.mT / 8).softmax(-1)  # one head of 64 channels
        latents = latents + linear(attention.to_out, scores @ value)
        normalized = layer_norm(mlp[0], latents) * (1 + scale_mlp) + shift_mlp
        latents = latents + linear(mlp[3], torch.nn.functional.gelu(linear(mlp[1], normalized)))
    expected = layer_norm(module.norm_out, linear(module.proj_out, latents))
    torch.testing.assert_close(module(x, module.embed_timestep(t)), expected, atol=1e-5, rtol=1e-5)
