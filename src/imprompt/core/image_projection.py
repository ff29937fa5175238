"""Image projections: from image features to image tokens, the networks in front of the keys and values (IP-Adapter, Ye et al., 2023).

Each takes (batch, patches, image_embed_dim) and returns (batch, tokens, cross_attention_dim). Parameter names are those of the public
files. `uses_patch_features` is the kind of features that a projection takes: one embedding per patch, or one pooled embedding.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.core.attention import multi_head_attention

HEAD_DIM = 64  # channels of each attention head of a resampler, in every public file


class ImageProjection(nn.Module):
    """The base variant: pooled embedding → Linear → `num_tokens` tokens → LayerNorm (IP-Adapter, section 3.2.1)."""

    uses_patch_features = False

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, num_tokens: int = 4):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(image_embed_dim, num_tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, features: Float[Tensor, "batch 1 dim"]) -> Float[Tensor, "batch tokens cross"]:
        """The image tokens c_i of IP-Adapter's equation 4."""
        tokens: Tensor = self.proj(features).reshape(len(features), self.num_tokens, -1)
        return cast(Tensor, self.norm(tokens))


class FullImageProjection(nn.Module):
    """The full-face variant of the IP-Adapter releases: an MLP turns every patch into one token."""

    uses_patch_features = True

    def __init__(self, image_embed_dim: int, cross_attention_dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(image_embed_dim, image_embed_dim),
            nn.GELU(),
            nn.Linear(image_embed_dim, cross_attention_dim),
            nn.LayerNorm(cross_attention_dim),
        )

    def forward(self, features: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches cross"]:
        """One image token c_i for each patch (IP-Adapter, equation 4)."""
        return cast(Tensor, self.proj(features))


class Resampler(nn.Module):
    """The fine-grained variant, "Plus": learned queries attend to patches (Perceiver resampler, Flamingo, arXiv:2204.14198, figure 5)."""

    uses_patch_features = True

    def __init__(
        self,
        image_embed_dim: int,
        cross_attention_dim: int,
        num_tokens: int = 16,
        hidden_dim: int = 768,
        num_heads: int = 12,
        depth: int = 4,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_tokens, hidden_dim) / hidden_dim**0.5)
        self.proj_in = nn.Linear(image_embed_dim, hidden_dim)
        self.layers = _make_perceiver_layers(hidden_dim, num_heads, depth)
        self.proj_out = nn.Linear(hidden_dim, cross_attention_dim)
        self.norm_out = nn.LayerNorm(cross_attention_dim)

    def forward(
        self, features: Float[Tensor, "batch patches dim"], bias: Float[Tensor, "batch 1 1 patches"] | None = None
    ) -> Float[Tensor, "batch tokens cross"]:
        """The image tokens c_i of IP-Adapter's equation 4. `bias` is added to the attention scores of the patches."""
        x = self.proj_in(features)
        latents = run_perceiver_layers(self.layers, x, self.latents.expand(len(x), -1, -1), bias)
        return cast(Tensor, self.norm_out(self.proj_out(latents)))


def run_perceiver_layers(
    layers: nn.ModuleList,
    x: Float[Tensor, "batch patches hidden"],
    latents: Float[Tensor, "batch tokens hidden"],
    bias: Float[Tensor, "batch 1 1 patches"] | None = None,
) -> Float[Tensor, "batch tokens hidden"]:
    """The latents after each layer's attention to x and feed-forward network, with residual connections (Flamingo, figure 5)."""
    for attention, mlp in cast(Iterable[tuple[nn.Module, nn.Module]], layers):
        latents = latents + attention(x, latents, bias)
        latents = latents + mlp(latents)
    return latents


class ResamplerAttention(nn.Module):
    """Attention of the latents to the patches and to themselves in one softmax (Flamingo, figure 5: keys and values [x ; latents])."""

    def __init__(self, hidden_dim: int, num_heads: int):
        super().__init__()
        inner_dim = num_heads * HEAD_DIM
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.to_q = nn.Linear(hidden_dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(hidden_dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, hidden_dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch patches hidden"],
        latents: Float[Tensor, "batch tokens hidden"],
        bias: Float[Tensor, "batch 1 1 patches"] | None = None,
        modulation: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch tokens hidden"]:
        """The update of the latents. `bias` is added to the attention scores of the patches.

        modulation: shift and scale of the normalized latents, (batch, 1, hidden) each.
        """
        x, latents = self.norm1(x), self.norm2(latents)
        if modulation is not None:
            latents = latents * (1 + modulation[1]) + modulation[0]
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        if bias is not None:
            bias = F.pad(bias.to(query.dtype), (0, latents.shape[1]))
        return cast(Tensor, self.to_out(multi_head_attention(query, key, value, self.num_heads, bias=bias)))


def _make_perceiver_layers(dim: int, num_heads: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleList([ResamplerAttention(dim, num_heads), _make_feed_forward(dim)]) for _ in range(depth))


def _make_feed_forward(dim: int, factor: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, factor * dim, bias=False),
        nn.GELU(),
        nn.Linear(factor * dim, dim, bias=False),
    )


class FaceIDProjection(nn.Module):
    """FaceID: identity embedding → `num_tokens` tokens. FaceID-Portrait has 16 tokens, and one reference per face."""

    uses_patch_features = False

    def __init__(self, id_embed_dim: int, cross_attention_dim: int, num_tokens: int = 4, hidden_dim: int = 1024):
        super().__init__()
        self.id_embed_dim, self.num_tokens = id_embed_dim, num_tokens
        self.proj = nn.Sequential(nn.Linear(id_embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, num_tokens * cross_attention_dim))
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, features: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch tokens cross"]:
        """The image tokens c_i of IP-Adapter's equation 4, from the identity embedding at the start of the first row of features."""
        return cast(Tensor, self.norm(self.proj(features[:, 0, : self.id_embed_dim]).unflatten(1, (self.num_tokens, -1))))


class FacePerceiver(nn.Module):
    """A Perceiver resampler (Flamingo, figure 5) whose queries are the tokens of an identity instead of learned ones."""

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, num_heads: int, depth: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(image_embed_dim, cross_attention_dim)
        self.layers = _make_perceiver_layers(cross_attention_dim, num_heads, depth)
        self.proj_out = nn.Linear(cross_attention_dim, cross_attention_dim)
        self.norm_out = nn.LayerNorm(cross_attention_dim)

    def forward(
        self, tokens: Float[Tensor, "batch tokens cross"], patches: Float[Tensor, "batch patches dim"]
    ) -> Float[Tensor, "batch tokens cross"]:
        """The identity's tokens after attention to the patches of the image."""
        return cast(Tensor, self.norm_out(self.proj_out(run_perceiver_layers(self.layers, self.proj_in(patches), tokens))))


class FaceIDPlusProjection(FaceIDProjection):
    """FaceID-Plus: identity embedding and image. Version 2 adds the identity's own tokens to the resampled ones (`shortcut`)."""

    uses_patch_features = True

    def __init__(
        self,
        id_embed_dim: int,
        image_embed_dim: int,
        cross_attention_dim: int,
        num_tokens: int = 4,
        hidden_dim: int = 1024,
        num_heads: int = 12,
        depth: int = 4,
        *,
        shortcut: bool = False,
    ):
        super().__init__(id_embed_dim, cross_attention_dim, num_tokens, hidden_dim)
        self.shortcut = shortcut
        self.perceiver_resampler = FacePerceiver(image_embed_dim, cross_attention_dim, num_heads, depth)

    def forward(self, features: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch tokens cross"]:
        """The image tokens c_i of IP-Adapter's equation 4.

        features: the first row holds the identity embedding, padded with zeros; the others are the patches of the face's image.
        """
        tokens = super().forward(features)
        resampled = cast(Tensor, self.perceiver_resampler(tokens, features[:, 1:]))
        return tokens + resampled if self.shortcut else resampled


class TimeResampler(nn.Module):
    """InstantX's resampler for SD3.5: a Perceiver resampler (Flamingo, figure 5) in which the timestep modulates patches and latents.

    The latents before attention and before the feed-forward network are scaled and shifted by the timestep (AdaLN, DiT,
    arXiv:2212.09748, figure 3).
    """

    uses_patch_features = True
    _SINUSOID_DIM = 320

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, num_tokens: int = 64, hidden_dim: int = 1280, depth: int = 4):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.latents = nn.Parameter(torch.randn(1, num_tokens, hidden_dim) / hidden_dim**0.5)
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(self._SINUSOID_DIM, hidden_dim), "linear_2": nn.Linear(hidden_dim, hidden_dim)}
        )
        self.proj_in = nn.Linear(image_embed_dim, hidden_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([
                ResamplerAttention(hidden_dim, hidden_dim // HEAD_DIM), _make_feed_forward(hidden_dim),
                nn.Sequential(nn.SiLU(), nn.Linear(hidden_dim, 4 * hidden_dim)),
            ])
            for _ in range(depth)
        )  # fmt: skip
        self.proj_out = nn.Linear(hidden_dim, cross_attention_dim)
        self.norm_out = nn.LayerNorm(cross_attention_dim)

    def embed_timestep(self, timestep: float | Tensor) -> Float[Tensor, "1 hidden"]:
        """The embedding of a timestep, 0 … 1000."""
        weight = cast(nn.Linear, self.time_embedding["linear_1"]).weight
        frequencies = torch.exp(-math.log(10_000) * torch.arange(self._SINUSOID_DIM // 2, device=weight.device) / (self._SINUSOID_DIM // 2))
        angles = torch.as_tensor(timestep, device=weight.device).float() * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()])[None].to(weight.dtype)
        return cast(Tensor, self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](sinusoid))))

    def forward(
        self, features: Float[Tensor, "batch patches dim"], time_embedding: Float[Tensor, "1 hidden"]
    ) -> Float[Tensor, "batch tokens cross"]:
        """The image tokens at a timestep, embedded by `embed_timestep`."""
        x = self.proj_in(features) + time_embedding[:, None]
        latents = self.latents.expand(len(x), -1, -1)
        for attention, mlp, modulation in cast(Iterable[tuple[ResamplerAttention, nn.Sequential, nn.Module]], self.layers):
            shift_attn, scale_attn, shift_mlp, scale_mlp = modulation(time_embedding)[:, None].chunk(4, dim=-1)
            latents = latents + attention(x, latents, modulation=(shift_attn, scale_attn))
            latents = latents + mlp[1:](mlp[0](latents) * (1 + scale_mlp) + shift_mlp)
        return cast(Tensor, self.norm_out(self.proj_out(latents)))


class MLPImageProjection(FaceIDProjection):
    """InstantX's projection for Flux: pooled embedding → MLP → `num_tokens` tokens → LayerNorm."""

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, num_tokens: int = 128, hidden_dim: int = 0):
        super().__init__(image_embed_dim, cross_attention_dim, num_tokens, hidden_dim or 2 * image_embed_dim)


Projector = ImageProjection | FullImageProjection | Resampler | FaceIDProjection | TimeResampler
