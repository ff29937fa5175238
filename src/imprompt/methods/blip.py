"""BLIP-Diffusion (arXiv:2305.14720): a Q-Former reads picture and words; its queries stand in the text, after the start token.

Q-Former, the text's encoder and the UNet are trained. Two departures, both because a method is handed the frozen text
encoder's output and not the words: the Q-Former reads the whole text instead of the subject's name, and the trained part
of the text encoder is one further layer, which reads the text with the queries in it. A third, for simplicity: the text's
rows attend to the patches as the queries do, where the released Q-Former lets the queries alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from imprompt.methods.base import FineTuned, Given, dtype_of


class BlipDiffusion(FineTuned):
    """Queries attend to each other and to the text, then to the patches."""

    QUERIES, LAYERS = 16, 2

    def __init__(self, unet: Any, features: int):
        super().__init__(unet)
        cross = unet.config.cross_attention_dim
        heads = max(1, cross // 64)
        self.queries = nn.Parameter(torch.randn(1, self.QUERIES, cross) / cross**0.5)
        self.patches = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, cross))
        self.readers = nn.ModuleList(
            nn.TransformerDecoderLayer(cross, heads, 4 * cross, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(self.LAYERS)
        )
        self.proj = nn.Sequential(nn.LayerNorm(cross), nn.Linear(cross, cross), nn.GELU(), nn.Linear(cross, cross))
        self.text = nn.TransformerEncoderLayer(cross, heads, 4 * cross, 0.0, "gelu", batch_first=True, norm_first=True)
        with torch.no_grad():  # it starts much as the base
            for outlet in (self.text.self_attn.out_proj, self.text.linear2):
                outlet.weight.mul_(0.1)

    def given(self, image: Tensor) -> Given:
        return {"patches": self.patches(image.flatten(1, 2).to(dtype_of(self)))}

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        text = text.to(dtype_of(self))
        joined = torch.cat([self.queries.expand(len(text), -1, -1), text], dim=1)
        for reader in self.readers:
            joined = reader(joined, given["patches"])
        tokens = self.proj(joined[:, : self.QUERIES])
        states = torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1)
        causal = nn.Transformer.generate_square_subsequent_mask(states.shape[1], states.device, states.dtype)
        return self.own(x, time, self.text(states, src_mask=causal))
