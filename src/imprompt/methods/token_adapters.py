"""Adapters that append image tokens to the text tokens, in the frozen cross-attention. They differ in how the tokens are computed.

The simple adapter of IP-Adapter's ablation (Ye et al., 2023, arXiv:2308.06721, section 4.4.1); the global branch of Uni-ControlNet (Zhao et
al., 2023, arXiv:2305.16322); the style branch of T2I-Adapter (Mou et al., 2023, arXiv:2302.08453).
"""

from typing import cast

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from imprompt.core.image_projection import Projector
from imprompt.methods.base import Conditioning, ConditioningMethod, ConditioningModule, UNetForward, get_dtype, is_null
from imprompt.methods.ip_adapter import build_projector
from imprompt.models.image_encoders import ImageEncoder
from imprompt.utils.protocols import UNetPipeline


class TokenAdapter(ConditioningModule):
    """The UNet attends to image tokens behind the text tokens. The scale λ multiplies the tokens."""

    def scale_conditioning(self, uncond: Conditioning, cond: Conditioning, scale: float) -> Conditioning:
        """λ times the tokens."""
        return cond | {"tokens": scale * cond["tokens"]}

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the UNet with the image tokens behind the text tokens."""
        tokens = torch.cat([prompt_embeds, cond["tokens"].to(prompt_embeds)], dim=1)
        return cast(Tensor, unet(latents, timesteps, tokens, **unet_kwargs).sample)


class SimpleAdapter(TokenAdapter):
    """The image projection of an IP-Adapter, whose tokens lie in the space of the text tokens."""

    def __init__(self, image_proj: Projector):
        super().__init__()
        self.image_proj = image_proj

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The image tokens of all reference images, concatenated."""
        batch, references = image_features.shape[:2]
        tokens: Tensor = self.image_proj(image_features.flatten(0, 1).to(get_dtype(self)))
        return {"tokens": tokens.reshape(batch, references * tokens.shape[1], -1)}


class UniControlNetGlobal(TokenAdapter):
    """z → LayerNorm → gated feed-forward → LayerNorm → gated feed-forward → 4 tokens × scale."""

    TOKENS = 4

    def __init__(self, image_embed_dim: int, cross_attention_dim: int):
        super().__init__()
        out_dim = self.TOKENS * cross_attention_dim
        hidden_dim = (image_embed_dim + out_dim) // 2
        self.norm1, self.ff1 = nn.LayerNorm(image_embed_dim), FeedForward(image_embed_dim, hidden_dim, mult=2, activation_fn="geglu")
        self.norm2, self.ff2 = nn.LayerNorm(hidden_dim), FeedForward(hidden_dim, out_dim, mult=2, activation_fn="geglu")

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """Four tokens for each reference image."""
        batch, references = image_features.shape[:2]
        z = image_features[:, :, 0].to(get_dtype(self))
        return {"tokens": self.ff2(self.norm2(self.ff1(self.norm1(z)))).reshape(batch, references * self.TOKENS, -1)}


class T2IStyle(TokenAdapter):
    """Patches and 8 learned tokens → 3 transformer layers → the 8 tokens. For no image, the last 8 of the text's own tokens."""

    TOKENS = 8

    def __init__(self, image_embed_dim: int, cross_attention_dim: int):
        super().__init__()
        dim = image_embed_dim
        self.style = nn.Parameter(torch.randn(1, self.TOKENS, dim) / dim**0.5)
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        layer = nn.TransformerEncoderLayer(dim, max(1, dim // 64), 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.proj = nn.Linear(dim, cross_attention_dim, bias=False)

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """Eight tokens for all reference images together, and which rows have no image."""
        patches = image_features.flatten(1, 2).to(get_dtype(self))
        hidden = torch.cat([patches, self.style.expand(len(patches), -1, -1)], dim=1)
        tokens = self.proj(self.norm_out(self.layers(self.norm_in(hidden))[:, -self.TOKENS :]))
        return {"tokens": tokens, "is_null": is_null(image_features).float()}

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the UNet with the image tokens behind the text tokens."""
        text_tail, tokens = prompt_embeds[:, -self.TOKENS :], cond["tokens"].to(prompt_embeds)
        tokens = torch.where(cond["is_null"][:, None, None] > 0, text_tail, tokens)
        return super().call_unet(unet, latents, timesteps, prompt_embeds, {"tokens": tokens}, **unet_kwargs)


def build_simple(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """The simple adapter with the image projection of the base IP-Adapter, untrained."""
    module = SimpleAdapter(build_projector(encoder, pipe.unet.config.cross_attention_dim, "base"))
    return ConditioningMethod("simple", pipe.unet, encoder, module)


def build_simple_plus(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """The simple adapter with the resampler of IP-Adapter Plus, untrained."""
    module = SimpleAdapter(build_projector(encoder, pipe.unet.config.cross_attention_dim, "plus"))
    return ConditioningMethod("simple-plus", pipe.unet, encoder, module, patches=True)


def build_uni_controlnet(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """The global branch of Uni-ControlNet, untrained."""
    module = UniControlNetGlobal(encoder.embed_dim(patches=False), pipe.unet.config.cross_attention_dim)
    return ConditioningMethod("uni-controlnet", pipe.unet, encoder, module)


def build_t2i_style(pipe: UNetPipeline, encoder: ImageEncoder) -> ConditioningMethod:
    """The style branch of T2I-Adapter, untrained. Patches of zeros stand for no image."""
    module = T2IStyle(encoder.embed_dim(patches=True), pipe.unet.config.cross_attention_dim)
    uncond = torch.zeros_like(encoder.uncond_features(patches=True))
    return ConditioningMethod("t2i-style", pipe.unet, encoder, module, patches=True, uncond_features=uncond)
