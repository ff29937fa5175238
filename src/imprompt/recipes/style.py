"""A custom model: mini's UNet fine-tuned to another drawing style, as people fine-tune Stable Diffusion.

An adapter trained on mini should work on it unchanged (IP-Adapter, Ye et al., 2023, arXiv:2308.06721, section 4.3.2).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageChops, ImageFilter, ImageOps

from imprompt.models.hub import MINI_PATH
from imprompt.recipes.mini_models import ImagePool, LatentPool, UNetTraining, scale_count
from imprompt.recipes.trainer import TrainPlan, train_module

NUM_STYLE_IMAGES = 16_000


def render_ink(image: Image.Image) -> Image.Image:
    """Pale washes of color under dark outlines, on paper."""
    large = image.resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC)
    edges = ImageOps.autocontrast(large.convert("L").filter(ImageFilter.GaussianBlur(2)).filter(ImageFilter.FIND_EDGES), cutoff=2)
    lines = edges.point(lambda v: 255 if v < 60 else 30).filter(ImageFilter.GaussianBlur(1.5)).convert("RGB")
    paper = Image.new("RGB", image.size, (250, 244, 228))
    pale = Image.blend(image.filter(ImageFilter.MedianFilter(3)), paper, 0.35)
    return ImageChops.multiply(pale, lines.resize(image.size, Image.Resampling.BOX))


def render_mosaic(image: Image.Image) -> Image.Image:
    """Tiles of one color each, with dark joints."""
    tile = 4
    small = image.resize((image.width // tile, image.height // tile), Image.Resampling.BOX)
    array = np.asarray(ImageOps.posterize(small, 4).resize(image.size, Image.Resampling.NEAREST)).copy()
    array[::tile] = array[::tile] * 0.7
    array[:, ::tile] = array[:, ::tile] * 0.7
    return Image.fromarray(array)


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {"ink": render_ink, "mosaic": render_mosaic}


class StyledImagePool(ImagePool):
    """The training images of mini, in a style."""

    def __init__(self, folder: Path, count: int, style: str):
        super().__init__(folder, count)
        self.path = folder / f"{style}-{count}.npy"
        self._style = STYLES[style]

    def render_image(self, i: int) -> Image.Image:
        return self._style(super().render_image(i))


def train_style(style: str, folder: Path, on_progress: Callable[[str, int, int, float], None], budget: float = 1.0) -> Path:
    """Fine-tune in `folder` (resumable) and save the model as `folder/model`, as a diffusers folder."""
    pipe = StableDiffusionPipeline.from_pretrained(MINI_PATH, safety_checker=None, requires_safety_checker=False)
    pool = StyledImagePool(folder, scale_count(NUM_STYLE_IMAGES, budget), style)
    pool.render_all(lambda done, total, _: on_progress("rendering", done, total, 0.0))
    latents = LatentPool(folder, pool)
    latents.encode_all(pipe.vae, lambda done, total, _: on_progress("latents", done, total, 0.0))
    plan = TrainPlan(style, max(2, round(700 * budget)), 48, 3e-4, warmup_steps=20, ema_decay=0.99, muon_lr=1.5e-3)
    unet = UNet2DConditionModel.from_pretrained(MINI_PATH, subfolder="unet")
    module = UNetTraining(unet, pipe.text_encoder, pipe.tokenizer, latents, plan.batch_size)
    train_module(plan, module, module.compute_loss, folder, lambda done, total, loss: on_progress(style, done, total, loss))
    unet.set_default_attn_processor()
    pipe.unet = unet
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder / "model")
    return folder / "model"
