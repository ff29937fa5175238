"""A mask over the picture → a weight for every position of a layer."""

import torch.nn.functional as F
from torch import Tensor


def mask_weights(mask: Tensor, height: int, width: int, level: int = 0) -> Tensor:
    """The share of each position that is white. mask: (H, W) in 0 … 1; height and width: of the latents. Returns (1, positions, 1).

    At each level of a UNet a position covers twice as many latents each way. Where the side is odd, the last position covers what is
    left: so a border lies where the picture has it, at every level and any size.
    """
    latents = F.interpolate(mask[None, None].float(), (height, width), mode="area")
    return F.avg_pool2d(latents, 2**level, ceil_mode=True).reshape(1, -1, 1)
