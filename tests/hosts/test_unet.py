"""Attaching changes what is drawn, and nothing else."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from conftest import CROSS, POOLED, VISION, random_adapter, sd15_unet, sdxl_unet
from imprompt.core.conditioning import STYLE
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.injection import Link, adapter_shape, attach, cross_attention_layers


def prompt(unet, kind="global", references=1, prompts=1, seed=5, **more):
    torch.manual_seed(seed + 100)
    shape = (1, POOLED) if kind == "global" else (17, VISION)
    return ImagePrompt(random_adapter(unet, kind, seed), torch.randn(prompts, references, *shape), torch.zeros(1, 1, *shape), **more)


def latents(pipe, text="a red fish", **more):
    settings = dict(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent") | more
    return pipe(text, **settings).images


def test_layers_are_numbered_as_in_the_public_files():
    sd15 = {layer.number: layer.name for layer in cross_attention_layers(sd15_unet())}
    assert list(sd15) == list(range(1, 32, 2))
    assert sd15[1].startswith("down_blocks.0.") and sd15[13].startswith("up_blocks.1.") and sd15[31].startswith("mid_block.")
    sdxl = {layer.number: layer.name for layer in cross_attention_layers(sdxl_unet())}
    assert list(sdxl) == list(range(1, 140, 2))
    style = [n for n, name in sdxl.items() if name.startswith(next(iter(STYLE)))]
    layout = [n for n, name in sdxl.items() if name.startswith("down_blocks.2.attentions.1")]
    assert (style[0], style[-1]) == (69, 87) and (layout[0], layout[-1]) == (29, 47)
    assert sdxl[121].startswith("mid_block.")


@pytest.mark.parametrize("height, width", [(13, 27), (65, 97)])
def test_a_mask_has_a_weight_for_every_position_of_every_layer(height, width):
    """At odd sizes too, such as 520 × 776 pixels: the layer would refuse any other number."""
    unet = sd15_unet()
    seen, masks = {}, {}
    with attach(unet, prompt(unet, mask=torch.rand(8 * height, 8 * width)), groups=(1,)) as link:
        original = link._layer_branches

        def noted(layer, *more):
            branches = original(layer, *more)
            masks[layer.name] = branches[0].mask.shape[1]
            return branches

        link._layer_branches = noted
        for layer in cross_attention_layers(unet):
            layer.attention.register_forward_pre_hook(lambda _, args, name=layer.name: seen.__setitem__(name, args[0].shape[1]))
        with torch.no_grad():
            unet(torch.randn(1, 4, height, width), 10, torch.randn(1, 5, CROSS))
    assert seen == masks


@pytest.mark.parametrize("kind", ["global", "resampler", "full-face"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_prompt_changes_the_picture_and_detach_restores_it(sd15, kind, guidance):
    keys = list(sd15.unet.state_dict())
    processors = dict(sd15.unet.attn_processors)
    base = latents(sd15, guidance_scale=guidance)
    with attach(sd15, prompt(sd15.unet, kind, references=2)):
        drawn = latents(sd15, guidance_scale=guidance)
        assert list(sd15.unet.state_dict()) == keys
    assert not torch.allclose(drawn, base, atol=1e-3)
    assert torch.equal(latents(sd15, guidance_scale=guidance), base)
    assert list(sd15.unet.state_dict()) == keys
    assert dict(sd15.unet.attn_processors) == processors


@pytest.mark.parametrize("classic", [False, True])
def test_scale_zero_is_the_base_to_the_bit(sd15, classic):
    if classic:
        sd15.unet.set_attn_processor(AttnProcessor())
    base = latents(sd15)
    with attach(sd15, prompt(sd15.unet, scale=0.0), prompt(sd15.unet, "resampler", scale=0.0)):
        assert torch.equal(latents(sd15), base)


def test_sdxl_scale_zero_is_the_base_to_the_bit(sdxl):
    base = latents(sdxl)
    with attach(sdxl, prompt(sdxl.unet, scale=0.0)) as link:
        assert torch.equal(latents(sdxl), base)
        link.prompts = [prompt(sdxl.unet, scale=STYLE)]
        assert not torch.allclose(latents(sdxl), base, atol=1e-3)
    assert torch.equal(latents(sdxl), base)


def test_prompts_can_be_changed_while_attached(sd15):
    one, other = prompt(sd15.unet, seed=5), prompt(sd15.unet, seed=6)
    with attach(sd15, one):
        first = latents(sd15)
    with attach(sd15, other) as link:
        assert not torch.allclose(latents(sd15), first, atol=1e-3)
        link.prompts = [one]
        assert torch.equal(latents(sd15), first)


def test_per_layer_scale_is_heard_only_there(sd15):
    with attach(sd15, prompt(sd15.unet, scale={"mid_block": 1.0})):
        mid = latents(sd15)
    with attach(sd15, prompt(sd15.unet, scale={"": 1.0})):
        everywhere = latents(sd15)
    with attach(sd15, prompt(sd15.unet)):
        assert torch.equal(latents(sd15), everywhere)
    assert not torch.allclose(mid, everywhere, atol=1e-3)


def test_windows_cover_the_schedule_without_overlap(sd15):
    """The first and the second half of the steps together are the whole."""
    seen = []
    with attach(sd15, prompt(sd15.unet, end=0.5), prompt(sd15.unet, start=0.5)) as link:
        original = link._gates
        link._gates = lambda t: seen.append([float(g) for g in original(t)]) or original(t)
        halves = latents(sd15)
    assert seen == [[1, 0], [1, 0], [0, 1], [0, 1]]
    with attach(sd15, prompt(sd15.unet)):
        assert torch.allclose(halves, latents(sd15), atol=1e-5)


def test_masks_split_the_picture(sd15):
    """Two complementary masks with the same prompt are the prompt without a mask, at an odd size too."""
    size = dict(height=24, width=56)
    left = torch.zeros(24, 56)
    left[:, :28] = 1
    with attach(sd15, prompt(sd15.unet)):
        whole = latents(sd15, **size)
    with attach(sd15, prompt(sd15.unet, mask=left), prompt(sd15.unet, mask=1 - left)):
        assert torch.allclose(latents(sd15, **size), whole, atol=1e-4)
    with attach(sd15, prompt(sd15.unet, mask=left)):
        assert not torch.allclose(latents(sd15, **size), whole, atol=1e-3)


def test_a_batch_of_prompts_with_different_references_equals_the_loop(sd15):
    many = prompt(sd15.unet, prompts=2)
    texts = ["a red fish", "a blue cat"]

    def draw(texts, which):
        mine = ImagePrompt(many.adapter, many.features[which], many.null)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))[which]
        with attach(sd15, mine):
            return sd15(texts, num_inference_steps=3, latents=noise, output_type="latent").images

    together = draw(texts, slice(0, 2))
    alone = torch.cat([draw(texts[i : i + 1], slice(i, i + 1)) for i in range(2)])
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()  # random latents reach 15: rounding is relative


def test_several_pictures_per_prompt(sd15):
    with attach(sd15, prompt(sd15.unet, prompts=2)):
        out = sd15(["a fish", "a cat"], num_images_per_prompt=2, num_inference_steps=2, output_type="latent").images
    assert len(out) == 4


def test_text_is_computed_once_per_generation_and_anew_for_the_next(sd15):
    counted = []
    layer = cross_attention_layers(sd15.unet)[0].attention
    handle = layer.to_k.register_forward_hook(lambda *_: counted.append(1))
    embeds = sd15.encode_prompt("a fish", "cpu", 1, False)[0]
    with attach(sd15, prompt(sd15.unet)):
        first = latents(sd15, text=None, prompt_embeds=embeds, guidance_scale=1.0)
        assert len(counted) == 1
        with torch.no_grad():
            layer.to_k.weight *= 2  # the same states, another layer: the next generation must notice
        second = latents(sd15, text=None, prompt_embeds=embeds, guidance_scale=1.0)
        assert len(counted) == 2
    handle.remove()
    assert not torch.allclose(first, second, atol=1e-4)


def test_bare_unet_takes_its_groups_explicitly():
    unet = sd15_unet()
    with pytest.raises(ValueError, match="groups"):
        attach(unet, prompt(unet))
    x, states = torch.randn(2, 4, 16, 16), torch.randn(2, 5, CROSS)
    with torch.no_grad():
        base = unet(x, 10, states).sample
        with attach(unet, prompt(unet), groups=(0, 1)):
            both = unet(x, 10, states).sample
        with attach(unet, prompt(unet), groups=(1,)):
            all_rows = unet(x, 10, states).sample
    assert torch.allclose(both[1], all_rows[1], atol=1e-5)
    assert not torch.allclose(both[0], all_rows[0], atol=1e-3)
    assert not torch.allclose(both[1], base[1], atol=1e-3)


def test_replaced_processors_are_noticed(sd15):
    with attach(sd15, prompt(sd15.unet)):
        sd15.unet.set_attn_processor(AttnProcessor())
        with pytest.raises(RuntimeError, match="attach last"):
            latents(sd15)
    assert all(type(p) is AttnProcessor for p in sd15.unet.attn_processors.values())


def test_attaching_twice_is_refused(sd15):
    with attach(sd15, prompt(sd15.unet)), pytest.raises(RuntimeError, match="already"):
        attach(sd15, prompt(sd15.unet))


def test_slicing_before_attach_is_refused(sd15):
    sd15.enable_attention_slicing()
    with pytest.raises(RuntimeError, match="set_default_attn_processor"):
        attach(sd15, prompt(sd15.unet))


def test_misfits_are_refused_with_what_was_expected(sd15):
    with pytest.raises(ValueError, match="70 cross-attention layers"):
        attach(sd15, prompt(sdxl_unet()))
    with pytest.raises(ValueError, match=r"blocks that this model does not have: up_block\.1"):
        attach(sd15, prompt(sd15.unet, scale={"up_block.1": 1.0}))
    with pytest.raises(TypeError, match="UNet2DConditionModel"):
        Link(torch.nn.Linear(1, 1), [])


def test_initialises_from_the_layers_own_weights():
    from imprompt.unet.injection import initialise

    unet = sd15_unet()
    adapter = random_adapter(unet, "global")
    initialise(adapter, unet)
    for layer in cross_attention_layers(unet):
        assert torch.equal(adapter.ip_adapter[str(layer.number)].to_v_ip.weight, layer.attention.to_v.weight)
    assert adapter.layers == adapter_shape(unet)[0]
