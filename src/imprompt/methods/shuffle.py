"""ControlNet Shuffle (arXiv:2302.05543, and version 1.1): the picture, warped at random, is the hint of a ControlNet.

The ControlNet is diffusers' own; its residuals are averaged over height and width before they are added, so that it
tells what the picture is like and not where. Only the copy of the UNet's encoder is trained.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor

from imprompt.methods.base import Given, Rewriting, absent, dtype_of

COARSE = 4  # the warp's random field has this many points a side


class Shuffle(Rewriting):
    """Rows without a picture get no residuals."""

    def __init__(self, unet: Any, factor: int):
        super().__init__()
        halvings = (factor - 1).bit_length()
        widths = (16, 32, 96, 256)[: halvings + 1]
        self.controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths).float()
        self.controlnet.register_to_config(global_pool_conditions=True)
        if unet.is_gradient_checkpointing:
            self.controlnet.enable_gradient_checkpointing()
        self.factor = factor

    def given(self, image: Tensor) -> Given:
        side = round(image.shape[2] ** 0.5)
        pictures = image[:, 0].transpose(1, 2).unflatten(2, (side, side)).to(dtype_of(self))
        return {"hint": warped(pictures, self.training) / 2 + 0.5, "weight": (~absent(image)).to(pictures.dtype)}

    def weighed(self, nothing: Given, heard: Given, scale: float) -> Given:
        return {"hint": heard["hint"], "weight": scale * heard["weight"]}

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        dtype = dtype_of(self)
        hint = F.interpolate(given["hint"].to(dtype), [self.factor * n for n in x.shape[2:]], mode="bilinear")
        added = {"added_cond_kwargs": extra["added_cond_kwargs"]} if "added_cond_kwargs" in extra else {}
        down, mid = self.controlnet(x.to(dtype), time, text.to(dtype), hint, return_dict=False, **added)
        weight = given["weight"].to(x)[:, None, None, None]
        residuals = [weight * r.to(x) for r in down]  # one number for a channel each; adding them spreads them
        extra = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": weight * mid.to(x), **extra}
        return cast(Tensor, unet(x, time, text, **extra).sample)


def warped(pictures: Tensor, anew: bool) -> Tensor:
    """Content shuffle by a random field: with `anew` one for each picture, otherwise always the same. (batch, 3, side, side)"""
    if anew:
        return moved(pictures, torch.rand(len(pictures), 2, COARSE, COARSE, device=pictures.device))
    points = torch.rand(1, 2, COARSE, COARSE, generator=torch.Generator().manual_seed(0))
    return moved(pictures, points.to(pictures.device).expand(len(pictures), -1, -1, -1))


def moved(pictures: Tensor, points: Tensor) -> Tensor:
    """Every pixel comes from a place that a smooth field names. (batch, 3, height, width); points: (batch, 2, COARSE, COARSE), 0 … 1."""
    smooth = F.interpolate(points, pictures.shape[2:], mode="bicubic", align_corners=True)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    grid = ((smooth - low) / (high - low) * 2 - 1).permute(0, 2, 3, 1).to(pictures.dtype)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
