"""SeeCoder (Prompt-Free Diffusion, arXiv:2305.16223): a hierarchical visual encoder makes the whole context, in place of the text.

Pixels → a backbone's three coarser levels → a decoder over all of them with lateral convolutions → learned queries that
read the levels in turn, joined by global ones. Only this encoder is trained; the UNet is frozen. In miniature: 16 local
queries, as 64 × 64 pixels have less to tell than 512 × 512, which get 144.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from imprompt.methods.base import Given, Rewriting, dtype_of


class SeeCoder(Rewriting):
    """No picture is a grey one."""

    LOCAL, GLOBAL, DECODER, QUERY = 16, 4, 6, 6  # queries; layers

    def __init__(self, cross: int, width: int = 128, heads: int = 4):
        super().__init__()
        sizes = (width // 4, width // 2, width)
        self.backbone = ResNetModel(
            ResNetConfig(
                embedding_size=width // 4, hidden_sizes=sizes, depths=(1, 1, 1), layer_type="basic", downsample_in_first_stage=True
            )
        )
        self.laterals = nn.ModuleList(nn.Conv2d(n, width, 1) for n in sizes)
        self.level = nn.Parameter(torch.randn(len(sizes), width) / width**0.5)
        self.places = nn.ParameterList(nn.Parameter(torch.randn(width, side, side) / width**0.5) for side in (8, 4, 2))
        self.decoder = nn.TransformerEncoder(_layer(width, heads), self.DECODER, enable_nested_tensor=False)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in sizes)
        self.local = nn.Parameter(torch.randn(1, self.LOCAL, width) / width**0.5)
        self.whole = nn.Parameter(torch.randn(1, self.GLOBAL, width) / width**0.5)
        self.readers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(self.QUERY)
        )
        self.joint = nn.TransformerEncoder(_layer(width, heads), 2, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, cross))

    def given(self, image: Tensor) -> Given:
        side = round(image.shape[2] ** 0.5)
        pixels = image[:, 0].transpose(1, 2).unflatten(2, (side, side)).to(dtype_of(self))
        levels = self._levels(pixels)
        queries = self.local.expand(len(pixels), -1, -1)
        for i, reader in enumerate(self.readers):
            queries = reader(queries, levels[i % len(levels)])
        both = self.joint(torch.cat([queries, self.whole.expand(len(pixels), -1, -1)], dim=1))
        return {"tokens": self.out(both)}

    def _levels(self, pixels: Tensor) -> list[Tensor]:
        """The backbone's levels, each (batch, places, width), decoded together, then joined from coarse to fine."""
        states = self.backbone(pixels, output_hidden_states=True).hidden_states[1:]
        maps = []
        for n, (state, lateral, place) in enumerate(zip(states, self.laterals, self.places, strict=True)):
            here = F.interpolate(place[None], state.shape[2:], mode="bilinear")
            maps.append(lateral(state) + here + self.level[n, :, None, None])
        flat = self.decoder(torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1))
        parts = flat.split([m.shape[2] * m.shape[3] for m in maps], dim=1)
        grids = [part.transpose(1, 2).unflatten(2, m.shape[2:]) for part, m in zip(parts, maps, strict=True)]
        for n in range(len(grids) - 2, -1, -1):
            grids[n] = grids[n] + F.interpolate(grids[n + 1], grids[n].shape[2:], mode="nearest")
        return [conv(g).flatten(2).transpose(1, 2) for conv, g in zip(self.smooth, grids, strict=True)]

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        return cast(Tensor, unet(x, time, given["tokens"].to(text), **extra).sample)


def _layer(width: int, heads: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
