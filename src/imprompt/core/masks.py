"""A mask over the picture → a weight for every position of a layer."""

import torch.nn.functional as F
from torch import Tensor


def mask_weights(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize a mask to a layer by averaging. mask: (H, W) in 0 … 1. Returns (1, height · width, 1)."""
    small = F.interpolate(mask[None, None].float(), (height, width), mode="area")
    return small.reshape(1, height * width, 1)


def level_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Height and width at each level of a UNet: every downsampling is a convolution of stride 2 that rounds up."""
    sizes = [(height, width)]
    for _ in range(levels - 1):
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes
