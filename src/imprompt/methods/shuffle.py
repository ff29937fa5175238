"""ControlNet Shuffle (Zhang et al., 2023, arXiv:2302.05543; version 1.1): the control image is the randomly warped reference image.

The ControlNet is diffusers' own; its residuals are averaged over height and width before they are added, so that they carry what the
image looks like, but not where. Only the ControlNet, a copy of the UNet's encoder, is trained.
"""

from typing import cast

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from imprompt.methods.base import Conditioning, ConditioningMethod, ConditioningModule, UNetForward, get_dtype, is_null, unflatten_pixels
from imprompt.models.image_encoders import FeatureEncoder
from imprompt.utils.protocols import UNetPipeline

FIELD_SIZE = 4  # side of the random field that the warp is interpolated from


class Shuffle(ConditioningModule):
    """Rows without an image get no residuals. `vae_scale_factor`: pixels per latent, per side."""

    def __init__(self, unet: UNet2DConditionModel, vae_scale_factor: int):
        super().__init__()
        num_halvings = (vae_scale_factor - 1).bit_length()
        channels = (16, 32, 96, 256)[: num_halvings + 1]
        self.controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels).float()
        self.controlnet.register_to_config(global_pool_conditions=True)
        if unet.is_gradient_checkpointing:
            self.controlnet.enable_gradient_checkpointing()
        self.vae_scale_factor = vae_scale_factor

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The control image, (batch, 3, side, side) in 0 … 1, and the scale of its residuals."""
        pixels = unflatten_pixels(image_features).to(get_dtype(self))
        control_image = content_shuffle(pixels, random=self.training) / 2 + 0.5
        return {"control_image": control_image, "scale": (~is_null(image_features)).to(pixels.dtype)}

    def scale_conditioning(self, uncond: Conditioning, cond: Conditioning, scale: float) -> Conditioning:
        """λ times the residuals."""
        return {"control_image": cond["control_image"], "scale": scale * cond["scale"]}

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the ControlNet, and the UNet with its residuals."""
        dtype = get_dtype(self)
        control_image = F.interpolate(
            cond["control_image"].to(dtype), [self.vae_scale_factor * n for n in latents.shape[2:]], mode="bilinear"
        )
        added = {name: unet_kwargs[name] for name in ("added_cond_kwargs",) if name in unet_kwargs}
        down, mid = self.controlnet(latents.to(dtype), timesteps, prompt_embeds.to(dtype), control_image, return_dict=False, **added)
        scale = cond["scale"].to(latents)[:, None, None, None]
        unet_kwargs = {
            "down_block_additional_residuals": [scale * residual.to(latents) for residual in down],
            "mid_block_additional_residual": scale * mid.to(latents),
            **unet_kwargs,
        }  # residuals are (batch, channels, 1, 1) and broadcast when the UNet adds them
        return cast(Tensor, unet(latents, timesteps, prompt_embeds, **unet_kwargs).sample)


def content_shuffle(pixels: Tensor, *, random: bool) -> Tensor:
    """Warp by a random field: with `random` a new one for each image, otherwise always the same. (batch, 3, side, side)"""
    if random:
        return warp_by_field(pixels, torch.rand(len(pixels), 2, FIELD_SIZE, FIELD_SIZE, device=pixels.device))
    field = torch.rand(1, 2, FIELD_SIZE, FIELD_SIZE, generator=torch.Generator().manual_seed(0))
    return warp_by_field(pixels, field.to(pixels.device).expand(len(pixels), -1, -1, -1))


def warp_by_field(pixels: Tensor, field: Tensor) -> Tensor:
    """Sample every pixel at the position given by a smooth field.

    pixels: (batch, 3, height, width); field: (batch, 2, FIELD_SIZE, FIELD_SIZE) in 0 … 1, interpolated to the size of the image.
    """
    smooth = F.interpolate(field, pixels.shape[2:], mode="bicubic", align_corners=True)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    positions = ((smooth - low) / (high - low) * 2 - 1).permute(0, 2, 3, 1).to(pixels.dtype)
    return F.grid_sample(pixels, positions, mode="bilinear", padding_mode="border", align_corners=False)


def build_shuffle(pipe: UNetPipeline, encoder: FeatureEncoder) -> ConditioningMethod:
    """Build ControlNet Shuffle with untrained weights."""
    return ConditioningMethod("shuffle", pipe.unet, encoder, Shuffle(pipe.unet, pipe.vae_scale_factor))
