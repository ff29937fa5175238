"""A custom model: mini's UNet fine-tuned to another drawing style, as people fine-tune Stable Diffusion.

An adapter trained on mini is to work on it untouched (arXiv:2308.06721, section 4.3.2).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageChops, ImageFilter, ImageOps

from imprompt.models.hub import MINI
from imprompt.recipes.mini_models import Denoising, Latents, Pool
from imprompt.recipes.trainer import Plan, fit

PICTURES = 16_000


def ink(image: Image.Image) -> Image.Image:
    """Pale washes of colour under dark outlines, on paper."""
    large = image.resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC)
    edges = ImageOps.autocontrast(large.convert("L").filter(ImageFilter.GaussianBlur(2)).filter(ImageFilter.FIND_EDGES), cutoff=2)
    lines = edges.point(lambda v: 255 if v < 60 else 30).filter(ImageFilter.GaussianBlur(1.5)).convert("RGB")
    paper = Image.new("RGB", image.size, (250, 244, 228))
    pale = Image.blend(image.filter(ImageFilter.MedianFilter(3)), paper, 0.35)
    return ImageChops.multiply(pale, lines.resize(image.size, Image.Resampling.BOX))


def mosaic(image: Image.Image) -> Image.Image:
    """Tiles of one colour each, with dark joints."""
    tile = 4
    small = image.resize((image.width // tile, image.height // tile), Image.Resampling.BOX)
    array = np.asarray(ImageOps.posterize(small, 4).resize(image.size, Image.Resampling.NEAREST)).copy()
    array[::tile] = array[::tile] * 0.7
    array[:, ::tile] = array[:, ::tile] * 0.7
    return Image.fromarray(array)


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {"ink": ink, "mosaic": mosaic}


class StyledPool(Pool):
    """The training pictures of mini, in a style."""

    def __init__(self, folder: Path, count: int, style: str):
        super().__init__(folder, count)
        self.path = folder / f"{style}-{count}.npy"
        self._style = STYLES[style]

    def picture(self, i: int) -> Image.Image:
        return self._style(super().picture(i))


def make_style(style: str, folder: Path, report: Callable[[str, int, int, float], None], budget: float = 1.0) -> Path:
    """Fine-tune in `folder` (resumable) and save the model as `folder/model`, in the form of any Stable Diffusion."""
    pipe = StableDiffusionPipeline.from_pretrained(MINI, safety_checker=None, requires_safety_checker=False)
    pool = StyledPool(folder, max(256, round(PICTURES * min(1.0, budget))), style)
    pool.draw(lambda done, total, _: report("drawing", done, total, 0.0))
    latents = Latents(folder, pool)
    latents.encode(pipe.vae, lambda done, total, _: report("latents", done, total, 0.0))
    plan = Plan(style, max(2, round(700 * budget)), 48, 3e-4, warmup=20, ema=0.99, muon=1.5e-3)
    unet = UNet2DConditionModel.from_pretrained(MINI, subfolder="unet")
    module = Denoising(unet, pipe.text_encoder, pipe.tokenizer, latents, plan.batch)
    fit(plan, module, module.loss, folder, lambda done, total, loss: report(style, done, total, loss))
    unet.set_default_attn_processor()
    pipe.unet = unet
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder / "model")
    return folder / "model"
