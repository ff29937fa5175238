"""From image features to image tokens: the small network in front of the keys and values.

Each takes (batch, patches, features) and gives (batch, tokens, cross). Parameter names are those of the public files. `grid` says
which features a projector reads: the encoder's grid of patches, or one pooled embedding.
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

    grid = False

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

    grid = True

    def __init__(self, features: int, cross: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, cross), nn.LayerNorm(cross))

    def forward(self, features: Tensor) -> Tensor:
        """(batch, patches, features) → (batch, patches, cross)."""
        return cast(Tensor, self.proj(features))


class Resampler(nn.Module):
    """The fine-grained variant ("Plus"): N learned queries read the grid in `depth` layers (the Perceiver resampler)."""

    grid = True

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
        latents = perceived(self.layers, x, self.latents.expand(len(x), -1, -1), bias)
        return cast(Tensor, self.norm_out(self.proj_out(latents)))


def perceived(layers: nn.ModuleList, x: Tensor, latents: Tensor, bias: Tensor | None = None) -> Tensor:
    """The queries after they have read x, layer by layer."""
    for attention, mlp in cast(Iterable[tuple[nn.Module, nn.Module]], layers):
        latents = latents + attention(x, latents, bias)
        latents = latents + mlp(latents)
    return latents


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


class FaceProjector(nn.Module):
    """FaceID: one identity embedding → N tokens. With 16 of them, and a reference for each face, FaceID-Portrait."""

    grid = False

    def __init__(self, face: int, cross: int, tokens: int = 4, middle: int = 1024):
        super().__init__()
        self.face, self.tokens = face, tokens
        self.proj = nn.Sequential(nn.Linear(face, middle), nn.GELU(), nn.Linear(middle, tokens * cross))
        self.norm = nn.LayerNorm(cross)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, 1, face) → (batch, tokens, cross)."""
        return cast(Tensor, self.norm(self.proj(features[:, 0, : self.face]).unflatten(1, (self.tokens, -1))))


class FacePerceiver(nn.Module):
    """The tokens of an identity read the picture's grid."""

    def __init__(self, features: int, cross: int, heads: int, depth: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(features, cross)
        self.layers = nn.ModuleList(nn.ModuleList([ResamplerAttention(cross, heads), feed_forward(cross)]) for _ in range(depth))
        self.proj_out = nn.Linear(cross, cross)
        self.norm_out = nn.LayerNorm(cross)

    def forward(self, tokens: Tensor, grid: Tensor) -> Tensor:
        return cast(Tensor, self.norm_out(self.proj_out(perceived(self.layers, self.proj_in(grid), tokens))))


class FacePlusProjector(FaceProjector):
    """FaceID-Plus: identity and picture. In version 2 the identity's own tokens are added to what they found (`shortcut`)."""

    grid = True

    def __init__(
        self,
        face: int,
        features: int,
        cross: int,
        tokens: int = 4,
        middle: int = 1024,
        heads: int = 12,
        depth: int = 4,
        shortcut: bool = False,
    ):
        super().__init__(face, cross, tokens, middle)
        self.shortcut = shortcut
        self.perceiver_resampler = FacePerceiver(features, cross, heads, depth)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, 1 + patches, features) → (batch, tokens, cross). The first row holds the identity, zeros behind it."""
        tokens = super().forward(features)
        found = cast(Tensor, self.perceiver_resampler(tokens, features[:, 1:]))
        return tokens + found if self.shortcut else found


Projector = LinearProjector | MLPProjector | Resampler | FaceProjector
