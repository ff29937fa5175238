"""Adapters that put image tokens behind the text tokens, in the frozen cross-attention.

The paper's ablation, the simple adapter (arXiv:2308.06721, section 4.4.1); the global branch of Uni-ControlNet
(arXiv:2305.16322); the style branch of T2I-Adapter (arXiv:2302.08453). Only the way to the tokens differs.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from imprompt.core.image_projection import Projector
from imprompt.methods.base import Given, Rewriting, absent, dtype_of


class SimpleAdapter(Rewriting):
    """The projector of an IP-Adapter, in the text's own space. λ shrinks the tokens."""

    def __init__(self, image_proj: Projector):
        super().__init__()
        self.image_proj = image_proj

    def given(self, image: Tensor) -> Given:
        batch, references = image.shape[:2]
        tokens: Tensor = self.image_proj(image.flatten(0, 1).to(dtype_of(self)))
        return {"tokens": tokens.reshape(batch, references * tokens.shape[1], -1)}

    def weighed(self, nothing: Given, heard: Given, scale: float) -> Given:
        return {name: scale * value for name, value in heard.items()}

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        return cast(Tensor, unet(x, time, torch.cat([text, given["tokens"].to(text)], dim=1), **extra).sample)


class UniControlNetGlobal(SimpleAdapter):
    """z → LayerNorm → gated feed-forward → LayerNorm → gated feed-forward → 4 tokens × strength."""

    TOKENS = 4

    def __init__(self, features: int, cross: int):
        nn.Module.__init__(self)
        between = (features + self.TOKENS * cross) // 2
        self.norm1, self.ff1 = nn.LayerNorm(features), FeedForward(features, between, mult=2, activation_fn="geglu")
        self.norm2, self.ff2 = nn.LayerNorm(between), FeedForward(between, self.TOKENS * cross, mult=2, activation_fn="geglu")

    def given(self, image: Tensor) -> Given:
        batch, references = image.shape[:2]
        z = image[:, :, 0].to(dtype_of(self))
        return {"tokens": self.ff2(self.norm2(self.ff1(self.norm1(z)))).reshape(batch, references * self.TOKENS, -1)}


class T2IStyle(SimpleAdapter):
    """Patch states and 8 learned tokens → 3 transformer layers → the 8 tokens. For no picture, the last of the text's own tokens."""

    TOKENS = 8

    def __init__(self, features: int, cross: int):
        nn.Module.__init__(self)
        self.style = nn.Parameter(torch.randn(1, self.TOKENS, features) / features**0.5)
        self.before, self.after = nn.LayerNorm(features), nn.LayerNorm(features)
        layer = nn.TransformerEncoderLayer(features, max(1, features // 64), 4 * features, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.proj = nn.Linear(features, cross, bias=False)

    def given(self, image: Tensor) -> Given:
        patches = image.flatten(1, 2).to(dtype_of(self))
        seen = torch.cat([patches, self.style.expand(len(patches), -1, -1)], dim=1)
        tokens = self.proj(self.after(self.layers(self.before(seen))[:, -self.TOKENS :]))
        return {"tokens": tokens, "absent": absent(image).float()}

    def weighed(self, nothing: Given, heard: Given, scale: float) -> Given:
        return {"tokens": scale * heard["tokens"], "absent": heard["absent"]}

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        tokens = torch.where(given["absent"][:, None, None] > 0, text[:, -self.TOKENS :], given["tokens"].to(text))
        return super().call(unet, x, time, text, {"tokens": tokens}, **extra)
