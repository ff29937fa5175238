"""From image features to image tokens: the small network in front of the keys and values.

Each takes (batch, patches, features) and gives (batch, tokens, cross). Parameter names are those of the public files.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.core.attention import attend

HEAD_CHANNELS = 64  # of the resampler's attention, in every public file


class LinearProjector(nn.Module):
    """The global variant: one pooled embedding → Linear → N tokens → LayerNorm (IP-Adapter, section 3.2)."""

    def __init__(self, features: int, cross: int, tokens: int = 4):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(features, tokens * cross)
        self.norm = nn.LayerNorm(cross)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, 1, features) → (batch, tokens, cross)."""
        tokens: Tensor = self.proj(features).reshape(len(features), self.tokens, -1)
        return cast(Tensor, self.norm(tokens))


class MLPProjector(nn.Module):
    """The full-face variant: every patch of the grid becomes one token."""

    def __init__(self, features: int, cross: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, cross), nn.LayerNorm(cross))

    def forward(self, features: Tensor) -> Tensor:
        """(batch, patches, features) → (batch, patches, cross)."""
        return cast(Tensor, self.proj(features))


class Resampler(nn.Module):
    """The fine-grained variant ("Plus"): N learned queries read the grid in `depth` layers (the Perceiver resampler)."""

    def __init__(self, features: int, cross: int, tokens: int = 16, width: int = 768, heads: int = 12, depth: int = 4):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)
        self.proj_in = nn.Linear(features, width)
        self.layers = nn.ModuleList(nn.ModuleList([ResamplerAttention(width, heads), feed_forward(width)]) for _ in range(depth))
        self.proj_out = nn.Linear(width, cross)
        self.norm_out = nn.LayerNorm(cross)

    def forward(self, features: Tensor, bias: Tensor | None = None) -> Tensor:
        """(batch, patches, features) → (batch, tokens, cross). bias: added to the patches' scores, (batch, 1, 1, patches)."""
        x = self.proj_in(features)
        latents = self.latents.expand(len(x), -1, -1)
        for attention, mlp in cast(Iterable[tuple[nn.Module, nn.Module]], self.layers):
            latents = latents + attention(x, latents, bias)
            latents = latents + mlp(latents)
        return cast(Tensor, self.norm_out(self.proj_out(latents)))


class ResamplerAttention(nn.Module):
    """The queries attend to the patches and to themselves, in one softmax."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        inner = heads * HEAD_CHANNELS
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor, bias: Tensor | None = None) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        if bias is not None:
            bias = F.pad(bias.to(query.dtype), (0, latents.shape[1]))
        return cast(Tensor, self.to_out(attend(query, key, value, self.heads, bias=bias)))


def feed_forward(width: int, factor: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, factor * width, bias=False),
        nn.GELU(),
        nn.Linear(factor * width, width, bias=False),
    )


Projector = LinearProjector | MLPProjector | Resampler
