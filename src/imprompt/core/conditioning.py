"""How strongly, where and when an image prompt conditions the denoiser: the scale of each layer, the mask, the conditioning window."""

from collections.abc import Mapping, Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from imprompt.errors import UserError

# λ of IP-Adapter (Ye et al., 2023, arXiv:2308.06721, equation 8): one for all layers, or by prefix of the layer's name
Scale = float | Mapping[str, float]

# The blocks of SDXL that carry style and layout according to InstantStyle (Wang et al., 2024, arXiv:2404.02733).
STYLE: Mapping[str, float] = {"up_blocks.0.attentions.1": 1.0}
LAYOUT: Mapping[str, float] = {"down_blocks.2.attentions.1": 1.0}

BLOCK_PRESETS = {"style": next(iter(STYLE)), "layout": next(iter(LAYOUT))}

_MAX_SCALE = 1e4  # far above any use, and λV' stays finite in half precision


def check_scale(scale: object) -> None:
    """Raise UserError unless the scale is a finite number, or a mapping from names of blocks to such numbers."""
    for value in scale.values() if isinstance(scale, Mapping) else [scale]:
        if not isinstance(value, Real) or isinstance(value, bool) or not abs(float(value)) <= _MAX_SCALE:
            raise UserError(f"scale: expected a number up to {_MAX_SCALE:g}, or a mapping from blocks to such numbers; received {value!r}")
    if isinstance(scale, Mapping) and not all(isinstance(block, str) for block in scale):
        raise UserError(f"scale: expected a mapping from names of blocks to numbers; received {dict(scale)!r}")


def check_window(start_at: float, end_at: float) -> None:
    """Raise UserError unless 0 ≤ start_at ≤ end_at ≤ 1."""
    window = [start_at, end_at]
    if not all(isinstance(fraction, Real) for fraction in window) or not 0 <= start_at <= end_at <= 1:
        raise UserError(f"expected 0 ≤ start_at ≤ end_at ≤ 1, received start_at={start_at!r}, end_at={end_at!r}")


def layer_scale(scale: Scale, layer: str) -> float:
    """λ of one layer in IP-Adapter's equation 8: of the longest prefix in `scale` that fits the layer's name, 0 where none fits.

    layer: a name such as `up_blocks.1.attentions.0.transformer_blocks.0.attn2`.
    """
    if not isinstance(scale, Mapping):
        return float(scale)
    prefixes = [prefix for prefix in scale if _has_prefix(layer, prefix)]
    return float(scale[max(prefixes, key=len)]) if prefixes else 0.0


def ramp_scale(first: float, last: float, layers: Sequence[str]) -> dict[str, float]:
    """A scale for each of these layers, rising or falling linearly from the first to the last."""
    steps = max(1, len(layers) - 1)
    return {layer: first + (last - first) * i / steps for i, layer in enumerate(layers)}


def unknown_blocks(scale: Scale, layers: list[str]) -> list[str]:
    """The prefixes in `scale` that fit no layer's name; most likely they are misspelled."""
    if not isinstance(scale, Mapping):
        return []
    return [prefix for prefix in scale if not any(_has_prefix(layer, prefix) for layer in layers)]


def _has_prefix(layer: str, prefix: str) -> bool:
    return not prefix or layer == prefix or layer.startswith(prefix + ".")


def downsample_mask(
    mask: Float[Tensor, "*frames mask_height mask_width"], height: int, width: int, downsampling_level: int = 0
) -> Float[Tensor, "masks positions 1"]:
    """The mask, in 0 … 1, averaged over the area of each attention position. height and width: of the latents.

    At each downsampling level of a UNet a position covers twice as many latents per side. Where a side is odd, the last position covers
    the remainder, so that a border stays in place at every level and any size. The mask multiplies the image term of equation 8, as in
    regional prompting of diffusers (`ip_adapter_masks`). A video may have a mask for each frame.
    """
    latent_mask = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]).float(), (height, width), mode="area")
    return F.avg_pool2d(latent_mask, 2**downsampling_level, ceil_mode=True).flatten(1)[..., None]


def denoising_progress(timestep: Tensor | float, num_train_timesteps: int) -> Float[Tensor, " timesteps"]:
    """Progress through the noise schedule, 0 at pure noise and towards 1 at the image: 1 − (t + 1)/T for t in 0 … T − 1, for each t."""
    return 1 - (torch.as_tensor(timestep).flatten().double() + 1) / num_train_timesteps


def window_gate(progress: Float[Tensor, " timesteps"], start_at: float, end_at: float) -> Float[Tensor, " timesteps"]:
    """1 while start_at ≤ progress < end_at, otherwise 0. A tensor, so that torch.compile neither branches nor recompiles."""
    return ((progress >= start_at) & (progress < end_at)).float()
