"""Every base × every task × one adapter or two with masks: the prompt matters, λ = 0 is the base, and nothing is left behind."""

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from PIL import Image
from torch import nn

from conftest import POOLED, random_adapter, sd15_pipeline, sd21_pipeline, sdxl_pipeline
from imprompt.generation.controls import Control, adapted
from imprompt.models.base_pipelines import for_task
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.injection import attach

BASES = {"SD 1.5": sd15_pipeline, "SD 2.1": sd21_pipeline, "SDXL": sdxl_pipeline}
SIDE = 32


def picture(seed):
    noise = torch.randint(256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def controlnet(pipe, seed):
    """Random weights that matter: a fresh one adds nothing."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))  # the small VAE halves a side once
    for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.05)
    return net.eval()


def t2i(pipe):
    torch.manual_seed(9)
    channels = list(pipe.unet.config.block_out_channels)
    if len(channels) == 3:  # SDXL's has one more, and halves a side once
        return T2IAdapter(3, [*channels, channels[-1]], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl").eval()
    return T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter").eval()


def text2img(pipe):
    return pipe, {"width": SIDE, "height": SIDE}


def img2img(pipe):
    return for_task(pipe, True, False, []), {"image": picture(1), "strength": 0.9}


def inpaint(pipe):
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return for_task(pipe, False, True, []), {"image": picture(1), "mask_image": mask, "strength": 1.0, "width": SIDE, "height": SIDE}


def inpainting_unet(pipe):
    """One made for it reads the mask and the picture beside the latents: nine channels."""
    wider = nn.Conv2d(9, pipe.unet.conv_in.out_channels, 3, padding=1)
    wider.weight.data[:, :4] = pipe.unet.conv_in.weight
    pipe.unet.conv_in = wider
    pipe.unet.register_to_config(in_channels=9)
    made, more = inpaint(pipe)
    assert made.unet.config.in_channels == 9
    return made, more


def control(pipe):
    return for_task(pipe, False, False, [controlnet(pipe, 1)]), {"image": picture(1), "width": SIDE, "height": SIDE}


def two_controls(pipe):
    nets = [controlnet(pipe, seed) for seed in (1, 2)]
    more = {"image": [picture(1), picture(2)], "controlnet_conditioning_scale": [1.0, 0.5], "width": SIDE, "height": SIDE}
    return for_task(pipe, False, False, nets), more


def t2i_adapter(pipe):
    kind = StableDiffusionXLAdapterPipeline if isinstance(pipe, StableDiffusionXLPipeline) else StableDiffusionAdapterPipeline
    parts = dict(pipe.components)
    if kind is StableDiffusionAdapterPipeline:
        parts = {k: v for k, v in parts.items() if k != "image_encoder"} | {"requires_safety_checker": False}
    made = kind(**parts, adapter=t2i(pipe))
    made.set_progress_bar_config(disable=True)
    return made, {"image": picture(1), "width": SIDE, "height": SIDE}


def pag(pipe):
    made = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers=["mid"])
    made.set_progress_bar_config(disable=True)
    return made, {"width": SIDE, "height": SIDE, "pag_scale": 2.0}


TASKS = [text2img, img2img, inpaint, inpainting_unet, control, two_controls, t2i_adapter, pag]


def prompts(pipe, kind, scale):
    torch.manual_seed(0)
    features, null = torch.randn(1, 2, 1, POOLED), torch.zeros(1, 1, 1, POOLED)
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 1
    if kind == "one":
        return [ImagePrompt(random_adapter(pipe.unet, "global"), features, null, scale)]
    masks = (left, 1 - left)
    return [ImagePrompt(random_adapter(pipe.unet, "global", seed), features + seed, null, scale, mask) for seed, mask in enumerate(masks)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapters", ["one", "two with masks"])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
@pytest.mark.parametrize("base", list(BASES))
def test_an_image_prompt_goes_with_everything(base, task, adapters):
    pipe = BASES[base]()
    made, more = task(pipe)
    keys = set(made.unet.state_dict())

    def drawn():
        generator = torch.Generator().manual_seed(0)
        return made("a red fish", num_inference_steps=2, guidance_scale=4.0, generator=generator, output_type="latent", **more).images

    plain = drawn()
    with attach(made, *prompts(made, adapters, 0.8)):
        heard = drawn()
    assert ((heard - plain).norm() / plain.norm()).item() > 1e-3
    with attach(made, *prompts(made, adapters, 0.0)):
        assert torch.equal(drawn(), plain)
    assert torch.equal(drawn(), plain) and set(made.unet.state_dict()) == keys


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", list(BASES))
def test_our_t2i_adapters_draw_what_diffusers_draws(base):
    pipe = BASES[base]()
    made, _ = t2i_adapter(pipe)

    def drawn(pipe, **more):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red fish", num_inference_steps=2, generator=generator, output_type="latent", width=SIDE, height=SIDE, **more).images

    expected = drawn(made, image=picture(1), adapter_conditioning_scale=0.7)
    with adapted(pipe.unet, [Control(made.adapter, picture(1), 0.7)], (SIDE, SIDE)):
        torch.testing.assert_close(drawn(pipe), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn(pipe), expected, atol=1e-2)
