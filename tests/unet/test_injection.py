"""Attached image prompts change what is generated, and nothing else."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from conftest import CROSS, POOLED, VISION, random_adapter, sd15_unet, sdxl_unet
from imprompt.core.conditioning import STYLE
from imprompt.dit.attach import attach
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.attn_processors import find_cross_attention_layers, infer_adapter_shape, init_from_unet
from imprompt.unet.injection import AttachedImagePrompts


def random_prompt(unet, adapter_type="base", references=1, prompts=1, seed=5, **options):
    torch.manual_seed(seed + 100)
    shape = (1, POOLED) if adapter_type == "base" else (17, VISION)
    adapter = random_adapter(unet, adapter_type, seed)
    return ImagePrompt(adapter, torch.randn(prompts, references, *shape), torch.zeros(1, 1, *shape), **options)


def sample_latents(pipe, prompt="a red fish", **options):
    options = dict(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent") | options
    return pipe(prompt, **options).images


def test_layers_are_numbered_as_in_the_public_files():
    sd15 = {layer.index: layer.name for layer in find_cross_attention_layers(sd15_unet())}
    assert list(sd15) == list(range(1, 32, 2))
    assert sd15[1].startswith("down_blocks.0.") and sd15[13].startswith("up_blocks.1.") and sd15[31].startswith("mid_block.")
    sdxl = {layer.index: layer.name for layer in find_cross_attention_layers(sdxl_unet())}
    assert list(sdxl) == list(range(1, 140, 2))
    style = [n for n, name in sdxl.items() if name.startswith(next(iter(STYLE)))]
    layout = [n for n, name in sdxl.items() if name.startswith("down_blocks.2.attentions.1")]
    assert (style[0], style[-1]) == (69, 87) and (layout[0], layout[-1]) == (29, 47)
    assert sdxl[121].startswith("mid_block.")


@pytest.mark.parametrize("height, width", [(13, 27), (65, 97)])
def test_a_mask_has_a_weight_for_every_position_of_every_layer(height, width):
    """At odd sizes too, such as 520 × 776 pixels: the layer would refuse any other number."""
    unet = sd15_unet()
    positions, masks = {}, {}
    with attach(unet, random_prompt(unet, mask=torch.rand(8 * height, 8 * width)), cfg_layout=("cond",)) as attached:
        original = attached._layer_branches

        def recorded(layer, *args):
            branches = original(layer, *args)
            masks[layer.name] = branches[0].mask.shape[1]
            return branches

        attached._layer_branches = recorded
        for layer in find_cross_attention_layers(unet):
            layer.attention.register_forward_pre_hook(lambda _, args, name=layer.name: positions.__setitem__(name, args[0].shape[1]))
        with torch.no_grad():
            unet(torch.randn(1, 4, height, width), 10, torch.randn(1, 5, CROSS))
    assert positions == masks


@pytest.mark.parametrize("adapter_type", ["base", "plus", "full-face"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_prompt_changes_the_image_and_detach_restores_the_unet(sd15, adapter_type, guidance):
    keys = list(sd15.unet.state_dict())
    processors = dict(sd15.unet.attn_processors)
    base = sample_latents(sd15, guidance_scale=guidance)
    with attach(sd15, random_prompt(sd15.unet, adapter_type, references=2)):
        conditioned = sample_latents(sd15, guidance_scale=guidance)
        assert list(sd15.unet.state_dict()) == keys
    assert not torch.allclose(conditioned, base, atol=1e-3)
    assert torch.equal(sample_latents(sd15, guidance_scale=guidance), base)
    assert list(sd15.unet.state_dict()) == keys
    assert dict(sd15.unet.attn_processors) == processors


@pytest.mark.parametrize("plain_processor", [False, True])
def test_scale_zero_is_the_base_to_the_bit(sd15, plain_processor):
    if plain_processor:
        sd15.unet.set_attn_processor(AttnProcessor())
    base = sample_latents(sd15)
    with attach(sd15, random_prompt(sd15.unet, scale=0.0), random_prompt(sd15.unet, "plus", scale=0.0)):
        assert torch.equal(sample_latents(sd15), base)


def test_sdxl_scale_zero_is_the_base_to_the_bit(sdxl):
    base = sample_latents(sdxl)
    with attach(sdxl, random_prompt(sdxl.unet, scale=0.0)) as attached:
        assert torch.equal(sample_latents(sdxl), base)
        attached.prompts = [random_prompt(sdxl.unet, scale=STYLE)]
        assert not torch.allclose(sample_latents(sdxl), base, atol=1e-3)
    assert torch.equal(sample_latents(sdxl), base)


def test_prompts_can_be_changed_while_attached(sd15):
    one, other = random_prompt(sd15.unet, seed=5), random_prompt(sd15.unet, seed=6)
    with attach(sd15, one):
        first = sample_latents(sd15)
    with attach(sd15, other) as attached:
        assert not torch.allclose(sample_latents(sd15), first, atol=1e-3)
        attached.prompts = [one]
        assert torch.equal(sample_latents(sd15), first)


def test_a_scale_per_block_applies_only_there(sd15):
    with attach(sd15, random_prompt(sd15.unet, scale={"mid_block": 1.0})):
        mid = sample_latents(sd15)
    with attach(sd15, random_prompt(sd15.unet, scale={"": 1.0})):
        everywhere = sample_latents(sd15)
    with attach(sd15, random_prompt(sd15.unet)):
        assert torch.equal(sample_latents(sd15), everywhere)
    assert not torch.allclose(mid, everywhere, atol=1e-3)


def test_windows_cover_the_schedule_without_overlap(sd15):
    """The first and the second half of the steps together are the whole."""
    gates = []
    with attach(sd15, random_prompt(sd15.unet, end_at=0.5), random_prompt(sd15.unet, start_at=0.5)) as attached:
        original = attached._window_gates
        attached._window_gates = lambda *call: gates.append([float(g) for g in original(*call)]) or original(*call)
        halves = sample_latents(sd15)
    assert gates == [[1, 0], [1, 0], [0, 1], [0, 1]]
    with attach(sd15, random_prompt(sd15.unet)):
        assert torch.allclose(halves, sample_latents(sd15), atol=1e-5)


def test_masks_split_the_image(sd15):
    """Two complementary masks with the same prompt are the prompt without a mask, at an odd size too."""
    size = dict(height=24, width=56)
    left = torch.zeros(24, 56)
    left[:, :28] = 1
    with attach(sd15, random_prompt(sd15.unet)):
        whole = sample_latents(sd15, **size)
    with attach(sd15, random_prompt(sd15.unet, mask=left), random_prompt(sd15.unet, mask=1 - left)):
        assert torch.allclose(sample_latents(sd15, **size), whole, atol=1e-4)
    with attach(sd15, random_prompt(sd15.unet, mask=left)):
        assert not torch.allclose(sample_latents(sd15, **size), whole, atol=1e-3)


def test_a_batch_of_prompts_with_different_references_equals_the_loop(sd15):
    batched = random_prompt(sd15.unet, prompts=2)
    texts = ["a red fish", "a blue cat"]

    def sample(texts, rows):
        prompt = ImagePrompt(batched.adapter, batched.image_features[rows], batched.uncond_features)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))[rows]
        with attach(sd15, prompt):
            return sd15(texts, num_inference_steps=3, latents=noise, output_type="latent").images

    together = sample(texts, slice(0, 2))
    single = torch.cat([sample(texts[i : i + 1], slice(i, i + 1)) for i in range(2)])
    assert (together - single).abs().max() <= 1e-5 * single.abs().max()  # random latents reach 15: rounding is relative


def test_several_images_per_prompt(sd15):
    with attach(sd15, random_prompt(sd15.unet, prompts=2)):
        out = sd15(["a fish", "a cat"], num_images_per_prompt=2, num_inference_steps=2, output_type="latent").images
    assert len(out) == 4


def test_text_is_computed_once_per_generation_and_again_for_the_next(sd15):
    calls = []
    layer = find_cross_attention_layers(sd15.unet)[0].attention
    handle = layer.to_k.register_forward_hook(lambda *_: calls.append(1))
    embeds = sd15.encode_prompt("a fish", "cpu", 1, False)[0]
    with attach(sd15, random_prompt(sd15.unet)):
        first = sample_latents(sd15, prompt=None, prompt_embeds=embeds, guidance_scale=1.0)
        assert len(calls) == 1
        with torch.no_grad():
            layer.to_k.weight *= 2  # the same states, another layer: the next generation must notice
        second = sample_latents(sd15, prompt=None, prompt_embeds=embeds, guidance_scale=1.0)
        assert len(calls) == 2
    handle.remove()
    assert not torch.allclose(first, second, atol=1e-4)


def test_a_bare_unet_needs_an_explicit_layout():
    unet = sd15_unet()
    with pytest.raises(ValueError, match="cfg_layout"):
        attach(unet, random_prompt(unet))
    x, states = torch.randn(2, 4, 16, 16), torch.randn(2, 5, CROSS)
    with torch.no_grad():
        base = unet(x, 10, states).sample
        with attach(unet, random_prompt(unet), cfg_layout=("uncond", "cond")):
            guided = unet(x, 10, states).sample
        with attach(unet, random_prompt(unet), cfg_layout=("cond",)):
            conditional = unet(x, 10, states).sample
    assert torch.allclose(guided[1], conditional[1], atol=1e-5)
    assert not torch.allclose(guided[0], conditional[0], atol=1e-3)
    assert not torch.allclose(guided[1], base[1], atol=1e-3)


def test_processors_that_are_set_later_are_noticed(sd15):
    """The default ones receive the image prompt as well; to others it cannot be added."""
    prompt = random_prompt(sd15.unet)
    sd15.unet.set_attn_processor(AttnProcessor())
    with attach(sd15, prompt):
        expected = sample_latents(sd15)
    sd15.unet.set_default_attn_processor()
    with attach(sd15, prompt):
        sd15.unet.set_attn_processor(AttnProcessor())
        assert torch.equal(sample_latents(sd15), expected)
    assert all(type(p) is AttnProcessor for p in sd15.unet.attn_processors.values())
    sd15.unet.set_default_attn_processor()
    with attach(sd15, prompt):
        sd15.enable_attention_slicing()
        with pytest.raises(RuntimeError, match="attach last"):
            sample_latents(sd15)


def test_attaching_twice_is_refused(sd15):
    with attach(sd15, random_prompt(sd15.unet)), pytest.raises(RuntimeError, match="already"):
        attach(sd15, random_prompt(sd15.unet))


def test_slicing_before_attach_is_refused(sd15):
    sd15.enable_attention_slicing()
    with pytest.raises(RuntimeError, match="set_default_attn_processor"):
        attach(sd15, random_prompt(sd15.unet))


def test_adapters_and_scales_of_other_models_are_refused(sd15):
    with pytest.raises(ValueError, match="70 cross-attention layers"):
        attach(sd15, random_prompt(sdxl_unet()))
    with pytest.raises(ValueError, match=r"blocks that this model does not have: up_block\.1"):
        attach(sd15, random_prompt(sd15.unet, scale={"up_block.1": 1.0}))
    with pytest.raises(TypeError, match="UNet2DConditionModel"):
        AttachedImagePrompts(torch.nn.Linear(1, 1), [])


def test_keys_and_values_are_initialized_from_the_unet():
    unet = sd15_unet()
    adapter = random_adapter(unet, "base")
    init_from_unet(adapter, unet)
    for layer in find_cross_attention_layers(unet):
        assert torch.equal(adapter.ip_adapter[str(layer.index)].to_v_ip.weight, layer.attention.to_v.weight)
    assert adapter.hidden_dims == infer_adapter_shape(unet)[0]
