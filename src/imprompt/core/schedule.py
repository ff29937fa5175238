"""When an image prompt is heard: a window of progress through the noise schedule."""

import torch
from torch import Tensor


def progress(timestep: Tensor | float, timesteps: int) -> Tensor:
    """0 at pure noise, towards 1 at the picture: 1 − (t + 1)/T for the usual discrete t in 0 … T − 1."""
    return 1 - (torch.as_tensor(timestep).flatten()[0].double() + 1) / timesteps


def window(timestep: Tensor | float, timesteps: int, start: float, end: float) -> Tensor:
    """1 while start ≤ progress < end, else 0: a scalar tensor, so that no branch and no recompilation follows."""
    now = progress(timestep, timesteps)
    return ((now >= start) & (now < end)).float()
