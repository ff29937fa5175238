"""SeeCoder (Xu et al., 2023, Prompt-Free Diffusion, arXiv:2305.16223): a hierarchical visual encoder replaces the prompt.

Pixels → the three coarser levels of a backbone → a decoder over all levels with lateral convolutions → learned local queries that
attend to the levels in turn, joined by global queries. Only this encoder is trained; the UNet is frozen. It is small: 16 local queries
for 64 × 64 pixels, where the paper has 144 for 512 × 512.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from imprompt.methods.base import Conditioning, ConditioningMethod, ConditioningModule, UNetForward, get_dtype, unflatten_pixels
from imprompt.models.image_encoders import FeatureEncoder
from imprompt.utils.protocols import UNetPipeline


class SeeCoder(ConditioningModule):
    """SeeCoder's conditioning: context tokens of the reference replace the prompt. The unconditional input is a gray image."""

    LOCAL_QUERIES, GLOBAL_QUERIES, DECODER_LAYERS, QUERY_LAYERS = 16, 4, 6, 6

    def __init__(self, cross_attention_dim: int, dim: int = 128, heads: int = 4):
        super().__init__()
        channels = (dim // 4, dim // 2, dim)
        self.backbone = ResNetModel(
            ResNetConfig(
                embedding_size=dim // 4, hidden_sizes=channels, depths=(1, 1, 1), layer_type="basic", downsample_in_first_stage=True
            )
        )
        self.laterals = nn.ModuleList(nn.Conv2d(n, dim, 1) for n in channels)
        self.level_embeds = nn.Parameter(torch.randn(len(channels), dim) / dim**0.5)
        self.position_embeds = nn.ParameterList(nn.Parameter(torch.randn(dim, side, side) / dim**0.5) for side in (8, 4, 2))
        self.decoder = nn.TransformerEncoder(_make_layer(dim, heads), self.DECODER_LAYERS, enable_nested_tensor=False)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        self.local_queries = nn.Parameter(torch.randn(1, self.LOCAL_QUERIES, dim) / dim**0.5)
        self.global_queries = nn.Parameter(torch.randn(1, self.GLOBAL_QUERIES, dim) / dim**0.5)
        self.query_layers = nn.ModuleList(
            nn.TransformerDecoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(self.QUERY_LAYERS)
        )
        self.joint = nn.TransformerEncoder(_make_layer(dim, heads), 2, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, cross_attention_dim))

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The context tokens of the first reference image: local queries, then global ones."""
        pixels = unflatten_pixels(image_features).to(get_dtype(self))
        levels = self._decode_levels(pixels)
        queries = self.local_queries.expand(len(pixels), -1, -1)
        for i, layer in enumerate(self.query_layers):
            queries = layer(queries, levels[i % len(levels)])
        joint = self.joint(torch.cat([queries, self.global_queries.expand(len(pixels), -1, -1)], dim=1))
        return {"tokens": self.out(joint)}

    def _decode_levels(self, pixels: Tensor) -> list[Tensor]:
        """The backbone's levels, each (batch, positions, dim), decoded together, then added up from coarse to fine."""
        states = self.backbone(pixels, output_hidden_states=True).hidden_states[1:]
        maps = []
        for n, (state, lateral, embeds) in enumerate(zip(states, self.laterals, self.position_embeds, strict=True)):
            positions = F.interpolate(embeds[None], state.shape[2:], mode="bilinear")
            maps.append(lateral(state) + positions + self.level_embeds[n, :, None, None])
        decoded = self.decoder(torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1))
        parts = decoded.split([m.shape[2] * m.shape[3] for m in maps], dim=1)
        levels = [part.transpose(1, 2).reshape(m.shape) for part, m in zip(parts, maps, strict=True)]
        for n in range(len(levels) - 2, -1, -1):
            levels[n] = levels[n] + F.interpolate(levels[n + 1], levels[n].shape[2:], mode="nearest")
        return [conv(level).flatten(2).transpose(1, 2) for conv, level in zip(self.smooth, levels, strict=True)]

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Call the UNet with the context tokens in place of the prompt."""
        return cast(Tensor, unet(latents, timesteps, cond["tokens"].to(prompt_embeds), **unet_kwargs).sample)


def _make_layer(dim: int, heads: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)


def build_seecoder(pipe: UNetPipeline, encoder: FeatureEncoder) -> ConditioningMethod:
    """Build SeeCoder with untrained weights."""
    return ConditioningMethod("seecoder", pipe.unet, encoder, SeeCoder(pipe.unet.config.cross_attention_dim))
