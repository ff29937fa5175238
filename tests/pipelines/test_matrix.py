"""Every base model × every task × one adapter or two with masks: the image prompt has an effect, λ = 0 has none, and detaching restores."""

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
from imprompt.dit.attach import attach
from imprompt.generation.controls import Control, apply_t2i_adapters
from imprompt.models.base_pipelines import to_task_pipeline
from imprompt.models.image_prompt import ImagePrompt

BASES = {"SD 1.5": sd15_pipeline, "SD 2.1": sd21_pipeline, "SDXL": sdxl_pipeline}
SIDE = 32


def random_image(seed):
    noise = torch.randint(256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def random_controlnet(pipe, seed):
    """With random weights: those of a new one are zero and have no effect."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))  # the small VAE halves each side once
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.05)
    return net.eval()


def random_t2i_adapter(pipe):
    torch.manual_seed(9)
    channels = list(pipe.unet.config.block_out_channels)
    if len(channels) == 3:  # SDXL's has one level more, and halves each side once
        return T2IAdapter(3, [*channels, channels[-1]], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl").eval()
    return T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter").eval()


def text2img(pipe):
    return pipe, {"width": SIDE, "height": SIDE}


def img2img(pipe):
    return to_task_pipeline(pipe, image_to_image=True), {"image": random_image(1), "strength": 0.9}


def inpaint(pipe):
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return to_task_pipeline(pipe, inpainting=True), {
        "image": random_image(1),
        "mask_image": mask,
        "strength": 1.0,
        "width": SIDE,
        "height": SIDE,
    }


def inpainting_unet(pipe):
    """The UNet of an inpainting model takes latents, mask and masked image: nine channels."""
    conv_in = nn.Conv2d(9, pipe.unet.conv_in.out_channels, 3, padding=1)
    conv_in.weight.data[:, :4] = pipe.unet.conv_in.weight
    pipe.unet.conv_in = conv_in
    pipe.unet.register_to_config(in_channels=9)
    task_pipe, arguments = inpaint(pipe)
    assert task_pipe.unet.config.in_channels == 9
    return task_pipe, arguments


def control(pipe):
    return to_task_pipeline(pipe, controlnets=[random_controlnet(pipe, 1)]), {"image": random_image(1), "width": SIDE, "height": SIDE}


def two_controls(pipe):
    nets = [random_controlnet(pipe, seed) for seed in (1, 2)]
    arguments = {"image": [random_image(1), random_image(2)], "controlnet_conditioning_scale": [1.0, 0.5], "width": SIDE, "height": SIDE}
    return to_task_pipeline(pipe, controlnets=nets), arguments


def t2i_adapter(pipe):
    pipeline_class = StableDiffusionXLAdapterPipeline if isinstance(pipe, StableDiffusionXLPipeline) else StableDiffusionAdapterPipeline
    components = dict(pipe.components)
    if pipeline_class is StableDiffusionAdapterPipeline:
        components = {k: v for k, v in components.items() if k != "image_encoder"} | {"requires_safety_checker": False}
    task_pipe = pipeline_class(**components, adapter=random_t2i_adapter(pipe))
    task_pipe.set_progress_bar_config(disable=True)
    return task_pipe, {"image": random_image(1), "width": SIDE, "height": SIDE}


def pag(pipe):
    task_pipe = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers=["mid"])
    task_pipe.set_progress_bar_config(disable=True)
    return task_pipe, {"width": SIDE, "height": SIDE, "pag_scale": 2.0}


TASKS = [text2img, img2img, inpaint, inpainting_unet, control, two_controls, t2i_adapter, pag]


def random_prompts(pipe, adapters, scale):
    torch.manual_seed(0)
    features, uncond = torch.randn(1, 2, 1, POOLED), torch.zeros(1, 1, 1, POOLED)
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 1
    if adapters == "one":
        return [ImagePrompt(random_adapter(pipe.unet, "base"), features, uncond, scale)]
    masks = (left, 1 - left)
    return [ImagePrompt(random_adapter(pipe.unet, "base", seed), features + seed, uncond, scale, mask) for seed, mask in enumerate(masks)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapters", ["one", "two with masks"])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
@pytest.mark.parametrize("base", list(BASES))
def test_an_image_prompt_works_with_every_base_and_task(base, task, adapters):
    pipe = BASES[base]()
    task_pipe, arguments = task(pipe)
    keys = set(task_pipe.unet.state_dict())

    def sample_latents():
        generator = torch.Generator().manual_seed(0)
        return task_pipe(
            "a red fish", num_inference_steps=2, guidance_scale=4.0, generator=generator, output_type="latent", **arguments
        ).images

    without_prompt = sample_latents()
    with attach(task_pipe, *random_prompts(task_pipe, adapters, 0.8)):
        with_prompt = sample_latents()
    assert ((with_prompt - without_prompt).norm() / without_prompt.norm()).item() > 1e-3
    with attach(task_pipe, *random_prompts(task_pipe, adapters, 0.0)):
        assert torch.equal(sample_latents(), without_prompt)
    assert torch.equal(sample_latents(), without_prompt) and set(task_pipe.unet.state_dict()) == keys


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", list(BASES))
def test_t2i_adapters_give_the_latents_of_diffusers(base):
    pipe = BASES[base]()
    task_pipe, _ = t2i_adapter(pipe)

    def sample_latents(pipe, **arguments):
        generator, size = torch.Generator().manual_seed(0), {"width": SIDE, "height": SIDE}
        return pipe("a red fish", num_inference_steps=2, generator=generator, output_type="latent", **size, **arguments).images

    expected = sample_latents(task_pipe, image=random_image(1), adapter_conditioning_scale=0.7)
    with apply_t2i_adapters(pipe.unet, [Control(task_pipe.adapter, random_image(1).resize((SIDE, SIDE)), 0.7)]):
        torch.testing.assert_close(sample_latents(pipe), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sample_latents(pipe), expected, atol=1e-2)
