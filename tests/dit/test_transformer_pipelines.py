"""Every supported pipeline with a transformer: the prompt changes the image, λ = 0 equals the base to the bit, detaching restores."""

import inspect
import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from small_transformers import TEXT_DIM, build_adapter, build_flux, build_prompt, build_sd3, build_transformer
from torch import nn

import imprompt
from imprompt.core.conditioning import ramp_scale
from imprompt.dit.sites import find_sites

SIDE = 16  # of the latents; the VAE has their size


def build_vae(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,), latent_channels=channels, norm_num_groups=4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    ).eval()  # fmt: skip


def build_qwen_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(1)
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()  # fmt: skip


def image(seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


MASK = Image.new("L", (SIDE, SIDE), 255)
IMAGE = {"image": image()}
INPAINT = {"image": image(), "mask_image": MASK}
TRANSFORMER_OF: dict[str, str] = {
    "Flux": "flux",
    "Chroma": "chroma",
    "StableDiffusion3": "sd3",
    "QwenImage": "qwen-image",
    "PixArt": "pixart",
}

# Pipeline → the arguments that are particular to it.
PIPELINES: dict[str, dict[str, Any]] = {
    "FluxPipeline": {}, "FluxImg2ImgPipeline": IMAGE, "FluxInpaintPipeline": INPAINT, "FluxFillPipeline": INPAINT,
    "FluxControlPipeline": {"control_image": image(1)}, "FluxControlImg2ImgPipeline": IMAGE | {"control_image": image(1)},
    "FluxControlInpaintPipeline": INPAINT | {"control_image": image(1)},
    "FluxKontextPipeline": IMAGE | {"max_area": SIDE**2, "_auto_resize": False},
    "FluxKontextInpaintPipeline": INPAINT | {"max_area": SIDE**2, "_auto_resize": False},
    "ChromaPipeline": {}, "ChromaImg2ImgPipeline": IMAGE, "ChromaInpaintPipeline": INPAINT,
    "StableDiffusion3Pipeline": {}, "StableDiffusion3Img2ImgPipeline": IMAGE, "StableDiffusion3InpaintPipeline": INPAINT,
    "QwenImagePipeline": {}, "QwenImageImg2ImgPipeline": IMAGE, "QwenImageInpaintPipeline": INPAINT,
    "PixArtSigmaPipeline": {},
}  # fmt: skip


def host_of(name: str) -> str:
    return next(host for prefix, host in TRANSFORMER_OF.items() if name.startswith(prefix))


def build_pipeline(name: str) -> Any:
    cls, host = getattr(diffusers, name), host_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "Fill" in name:
            transformer: nn.Module = randomize(build_flux(in_channels=16 + 16 + 4, out_channels=16))
        elif name == "StableDiffusion3InpaintPipeline":  # takes 16 channels, or 33
            transformer = randomize(build_sd3(in_channels=16, out_channels=16))
        elif "Control" in name and host == "flux":
            transformer = randomize(build_flux(in_channels=32, out_channels=16))
        else:
            transformer = build_transformer(host)
        if host == "chroma":  # released configurations have this entry, which ChromaInpaintPipeline reads
            transformer.register_to_config(guidance_embeds=False)
        parts = {
            "transformer": transformer,
            "vae": build_qwen_vae() if host == "qwen-image" else build_vae(16 if name == "StableDiffusion3InpaintPipeline" else 4),
        }
        parts["scheduler"] = DPMSolverMultistepScheduler() if host == "pixart" else FlowMatchEulerDiscreteScheduler(shift=3.0)
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        signature = cls.__init__.__code__.co_varnames
        pipe = cls(**parts, **{part: None for part in names if part in signature})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomize(model: nn.Module) -> nn.Module:
    for parameter in model.requires_grad_(False).eval().parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def call_arguments(name: str, batch: int = 1) -> dict[str, Any]:
    g, host = torch.Generator().manual_seed(5), host_of(name)
    embeds, negative = torch.randn(batch, 5, TEXT_DIM, generator=g), torch.randn(batch, 5, TEXT_DIM, generator=g)
    pooled, negative_pooled = torch.randn(batch, 16, generator=g), torch.randn(batch, 16, generator=g)
    arguments: dict[str, Any] = {"prompt_embeds": embeds, "num_inference_steps": 2, "height": SIDE, "width": SIDE, "output_type": "latent"}
    has_guidance = "negative_prompt_embeds" in inspect.signature(getattr(diffusers, name).__call__).parameters
    if has_guidance:
        arguments["negative_prompt_embeds"] = negative
    if host in ("flux", "sd3"):
        arguments["pooled_prompt_embeds"] = pooled
        if has_guidance:
            arguments["negative_pooled_prompt_embeds"] = negative_pooled
    mask = torch.ones(batch, 5, dtype=torch.bool)
    if host == "flux" and has_guidance:
        arguments["true_cfg_scale"] = 3.0
    if host == "qwen-image":
        arguments |= {"true_cfg_scale": 3.0, "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    if host in ("chroma", "pixart"):
        arguments |= {"prompt_attention_mask": mask.float(), "negative_prompt_attention_mask": mask.float()}
    if host == "pixart":
        arguments |= {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
    return arguments | PIPELINES[name]


def run(pipe: Any, name: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own
        return pipe(**call_arguments(name), generator=torch.Generator().manual_seed(9)).images


@pytest.mark.parametrize("name", PIPELINES)
def test_image_prompts_work(name):
    pipe = build_pipeline(name)
    adapter = build_adapter("transformer", pipe.transformer)
    names = [site.name for site in find_sites(pipe.transformer)]
    left, right = torch.zeros(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2], right[:, SIDE // 2 :] = 1, 1
    one = [build_prompt(adapter)]
    masked = [build_prompt(adapter, 3, mask=left), build_prompt(adapter, 4, mask=right)]
    ramp = [build_prompt(adapter, scale=ramp_scale(0.3, 0.9, names))]
    base = run(pipe, name)
    results = []
    for prompts in (one, masked, ramp):
        with imprompt.attach(pipe, *prompts) as attached:
            results.append(run(pipe, name))
            attached.prompts = [prompt.with_scale(0) for prompt in prompts]
            assert torch.equal(run(pipe, name), base)
    for result in results:
        assert result.isfinite().all() and (result - base).abs().max() > 1e-3
    assert not torch.allclose(results[0], results[2], atol=1e-4)
    assert torch.equal(run(pipe, name), base)


@pytest.mark.parametrize("name", [name for name in PIPELINES if "negative_prompt_embeds" in call_arguments(name)])
def test_guidance_has_the_unconditional_embedding_in_its_other_half(name):
    """With the features of no image in both places, image prompts change the image otherwise than with those of an image."""
    pipe = build_pipeline(name)
    adapter = build_adapter("transformer", pipe.transformer)
    prompt = build_prompt(adapter)
    layouts = []
    with imprompt.attach(pipe, prompt) as attached:
        original = attached._read_batch

        def record(*args):
            batch = original(*args)
            layouts.append(batch.cfg_layout)
            return batch

        attached._read_batch = record
        run(pipe, name)
    expected = {("uncond", "cond")} if attached._host.batches_guidance else {("cond",), ("uncond",)}
    assert set(layouts) == expected
