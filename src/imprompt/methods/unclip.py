"""Open unCLIP (Karlo, after Ramesh et al., 2022, arXiv:2204.06125) and SD unCLIP (Stability AI, 2023). The UNet is trained."""

import math
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from imprompt.methods.base import (
    Conditioning,
    ConditioningMethod,
    FineTunedUNet,
    UNetForward,
    get_dtype,
    get_pooled_embedding,
    is_null,
)
from imprompt.models.image_encoders import ImageEncoder
from imprompt.utils.protocols import UNetPipeline

NUM_NOISE_LEVELS = 1000  # of the noise that is added to the image embedding


class OpenUnCLIP(FineTunedUNet):
    """Linear(z) + Linear(pooled text) joins the time embedding; Linear(z), as 4 tokens, precedes the projected prompt.

    The unconditional image embedding is learned. The prompt is pooled by its last token, the end of the text.
    """

    TOKENS = 4

    def __init__(self, unet: UNet2DConditionModel, image_embed_dim: int):
        dim = unet.config.cross_attention_dim
        super().__init__(unet, class_embed_type="simple_projection", projection_class_embeddings_input_dim=image_embed_dim + dim)
        self.null_embedding = nn.Parameter(torch.randn(image_embed_dim) / image_embed_dim**0.5)
        self.token_proj = nn.Linear(image_embed_dim, self.TOKENS * dim)
        self.text_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        with torch.no_grad():
            self.text_proj.weight.copy_(torch.eye(dim))
            self.text_proj.bias.zero_()

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The pooled embedding z, or the learned one where there is no image."""
        z = get_pooled_embedding(image_features).to(get_dtype(self))
        return {"z": torch.where(is_null(image_features)[:, None], self.null_embedding, z)}

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the fine-tuned UNet with z in the context and in the time embedding."""
        z, text = cond["z"], prompt_embeds.to(get_dtype(self))
        states = torch.cat([self.token_proj(z).unflatten(1, (self.TOKENS, -1)), self.norm(self.text_proj(text))], dim=1)
        return self.predict_with_finetuned_unet(latents, timesteps, states, class_labels=torch.cat([z, text[:, -1]], dim=1))


class SDUnCLIP(FineTunedUNet):
    """z, standardized by the data's statistics, receives noise of a level ℓ; [z ; sinusoid(ℓ)] → MLP joins the time embedding.

    The prompt stays in the cross-attention. ℓ is random in training and 0 at generation. Zeros stand for no image and its level.
    """

    def __init__(self, unet: UNet2DConditionModel, image_embed_dim: int):
        super().__init__(unet, class_embed_type="projection", projection_class_embeddings_input_dim=2 * image_embed_dim)
        self.register_buffer("running_stats", torch.zeros(3, image_embed_dim))  # of the training embeddings: count, Σ z, Σ z²

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The class labels: the embedding, with noise in training, and the level of its noise."""
        z, has_image = get_pooled_embedding(image_features).to(get_dtype(self)), ~is_null(image_features)
        if self.training:
            self._update_running_stats(z[has_image].detach())
        mean, std = self.compute_mean_std()
        level, noisy = torch.zeros(len(z), device=z.device), (z - mean) / std
        if self.training:
            level = torch.randint(NUM_NOISE_LEVELS, (len(z),), device=z.device).float()
            angle = (level / NUM_NOISE_LEVELS * math.pi / 2)[:, None]  # ᾱ = cos²
            noisy = angle.cos() * noisy + angle.sin() * torch.randn_like(noisy)
        labels = torch.cat([noisy * std + mean, _embed_noise_level(level, z.shape[1]).to(z)], dim=1)
        return {"labels": labels * has_image[:, None]}

    def _update_running_stats(self, z: Tensor) -> None:
        sums = torch.stack([z.new_full(z.shape[1:], len(z)), z.sum(0), z.square().sum(0)])
        cast(Tensor, self.running_stats).add_(sums)

    def compute_mean_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training embeddings so far, (features,) each; 0 and 1 before the first."""
        count, total, squares = cast(Tensor, self.running_stats)
        mean = total / count.clamp(min=1)
        variance = torch.where(count > 1, squares / count.clamp(min=1) - mean.square(), torch.ones_like(mean))
        return mean, variance.clamp(min=1e-6).sqrt()

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the fine-tuned UNet with the class labels."""
        return self.predict_with_finetuned_unet(latents, timesteps, prompt_embeds, class_labels=cond["labels"])


def _embed_noise_level(level: Tensor, dim: int) -> Tensor:
    """The sinusoidal embedding of a noise level, as of a timestep: (batch,) → (batch, dim)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=level.device) / (dim // 2))
    angles = level[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def build_open_unclip(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """Open unCLIP, untrained."""
    return ConditioningMethod("open-unclip", pipe.unet, encoder, OpenUnCLIP(pipe.unet, encoder.embed_dim(patches=False)))


def build_sd_unclip(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """SD unCLIP, untrained."""
    return ConditioningMethod("sd-unclip", pipe.unet, encoder, SDUnCLIP(pipe.unet, encoder.embed_dim(patches=False)))
