"""Image prompts in every supported transformer: they change what they should, exactly, and nothing remains of them."""

import pytest
import torch
from small_transformers import BUILDERS, build_adapter, build_prompt, build_transformer, call_transformer

from imprompt.dit.injection import AttachedToTransformer
from imprompt.dit.sites import find_sites

HOSTS = list(BUILDERS)
FAMILIES_OF = {
    **{name: ["transformer"] for name in HOSTS},
    "flux": ["xlabs-flux", "instantx-flux", "transformer"],
    "chroma": ["xlabs-flux", "instantx-flux", "transformer"],
    "sd3": ["instantx-sd3", "transformer"],
    "sd35-medium": ["instantx-sd3", "transformer"],
}
PAIRS = [(host, family) for host, families in FAMILIES_OF.items() for family in families]
LAYOUT = ("uncond", "cond")


@pytest.mark.parametrize(("host", "family"), PAIRS)
def test_scale_0_is_the_base_to_the_bit_and_detach_restores(host, family):
    transformer = build_transformer(host)
    processors = dict(transformer.attn_processors)
    base = call_transformer(transformer, host)
    prompt = build_prompt(build_adapter(family, transformer))
    with AttachedToTransformer(transformer, [prompt.with_scale(0)], LAYOUT) as attached:
        assert torch.equal(call_transformer(transformer, host), base)
        attached.prompts = [prompt]
        assert (call_transformer(transformer, host) - base).abs().amax(tuple(range(1, base.ndim))).min() > 1e-3
    assert torch.equal(call_transformer(transformer, host), base)
    assert all(transformer.attn_processors[name] is processor for name, processor in processors.items())


@pytest.mark.parametrize(("host", "family"), PAIRS)
def test_each_row_has_the_prompt_of_its_group(host, family):
    """A conditional and an unconditional row in one batch are what they are in batches of their own."""
    transformer = build_transformer(host)
    prompt = build_prompt(build_adapter(family, transformer), references=2)
    results = {}
    for layout in (LAYOUT, ("cond",), ("uncond",)):
        with AttachedToTransformer(transformer, [prompt], layout):
            results[layout] = call_transformer(transformer, host)
    torch.testing.assert_close(results[LAYOUT][0], results["uncond",][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[LAYOUT][1], results["cond",][1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results["uncond",], results["cond",], atol=1e-3)


@pytest.mark.parametrize(("host", "family"), PAIRS)
def test_a_mask_of_zeros_is_the_base_and_of_ones_is_no_mask(host, family):
    transformer = build_transformer(host)
    prompt = build_prompt(build_adapter(family, transformer))
    base = call_transformer(transformer, host)
    with AttachedToTransformer(transformer, [prompt], ("cond",)) as attached:
        unmasked = call_transformer(transformer, host)
        for value, expected in ((0.0, base), (1.0, unmasked)):
            attached.prompts = [build_prompt(prompt.adapter, mask=torch.full((48, 80), value))]
            torch.testing.assert_close(call_transformer(transformer, host), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_two_prompts_add_up_in_the_attention(host):
    transformer = build_transformer(host)
    adapter = build_adapter("transformer", transformer)
    first, second, outputs = build_prompt(adapter, 3), build_prompt(adapter, 4), []
    site = find_sites(transformer)[0]
    site.attention.register_forward_hook(lambda module, args, out: outputs.append(out if isinstance(out, torch.Tensor) else out[0]))
    call_transformer(transformer, host)
    with AttachedToTransformer(transformer, [], ("cond",)) as attached:
        for prompts in ([first], [second], [first, second]):
            attached.prompts = prompts
            call_transformer(transformer, host)
    base, one, other, both = outputs
    torch.testing.assert_close(both - base, (one - base) + (other - base), atol=1e-5, rtol=1e-4)
    assert (both - one).abs().max() > 1e-3
