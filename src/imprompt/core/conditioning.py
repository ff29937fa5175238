"""How strongly, where and when an image prompt conditions the denoiser: scale per layer, mask, and start/end window."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = float | Mapping[str, float]

# The blocks of SDXL that InstantStyle (arXiv:2404.02733) found to carry style and layout.
STYLE: Mapping[str, float] = {"up_blocks.0.attentions.1": 1.0}
LAYOUT: Mapping[str, float] = {"down_blocks.2.attentions.1": 1.0}


BLOCKS = {"style": next(iter(STYLE)), "layout": next(iter(LAYOUT))}  # by the name that people know


def scale_of(scale: Scale, layer: str) -> float:
    """λ of the layer with this name, such as `up_blocks.1.attentions.0.transformer_blocks.0.attn2`."""
    if isinstance(scale, Mapping):
        fitting = [prefix for prefix in scale if layer == prefix or layer.startswith(prefix + ".") or not prefix]
        return float(scale[max(fitting, key=len)]) if fitting else 0.0
    return float(scale)


def unmatched(scale: Scale, layers: list[str]) -> list[str]:
    """The prefixes of a mapping that no layer begins with: most likely misspelt."""
    if not isinstance(scale, Mapping):
        return []
    return [p for p in scale if p and not any(name == p or name.startswith(p + ".") for name in layers)]


def mask_weights(mask: Tensor, height: int, width: int, level: int = 0) -> Tensor:
    """The share of each position that is white. mask: (H, W) in 0 … 1; height and width: of the latents. Returns (1, positions, 1).

    At each level of a UNet a position covers twice as many latents each way. Where the side is odd, the last position covers what is
    left: so a border lies where the picture has it, at every level and any size.
    """
    latents = F.interpolate(mask[None, None].float(), (height, width), mode="area")
    return F.avg_pool2d(latents, 2**level, ceil_mode=True).reshape(1, -1, 1)


def progress(timestep: Tensor | float, timesteps: int) -> Tensor:
    """0 at pure noise, towards 1 at the picture: 1 − (t + 1)/T for the usual discrete t in 0 … T − 1."""
    return 1 - (torch.as_tensor(timestep).flatten()[0].double() + 1) / timesteps


def window(timestep: Tensor | float, timesteps: int, start: float, end: float) -> Tensor:
    """1 while start ≤ progress < end, else 0: a scalar tensor, so that no branch and no recompilation follows."""
    now = progress(timestep, timesteps)
    return ((now >= start) & (now < end)).float()
