"""How far a generation has come, from the scheduler's own timesteps."""

from typing import Any

import torch
from torch import Tensor

from imprompt.core.conditioning import denoising_progress
from imprompt.errors import UserError


def read_denoising_progress(scheduler: Any, timestep: Tensor | float) -> Tensor:
    """The progress at each timestep, 0 … 1, as float64 of shape (1,) or (rows,): the share of the scheduler's steps that have more noise.

    Timesteps themselves have other units in every kind of scheduler: 0 … 999, σ · 1000 in rectified flow, log σ / 4 in EDM. Without a
    scheduler 1 000 timesteps are assumed. Raises UserError for a timestep that the scheduler does not have, and for fractional ones
    without a scheduler.
    """
    timesteps = torch.as_tensor(timestep).flatten().double()
    if scheduler is None:
        _check_discrete(timesteps)
        return denoising_progress(timesteps, 1000)
    steps: Tensor = scheduler.timesteps.to(timesteps).unique()  # solvers of second order take a step twice
    tolerance = 1e-4 * steps.abs().max()
    if ((steps - timesteps[:, None]).abs().amin(1) > tolerance).any():
        raise UserError(
            f"start_at, end_at: the pipeline passes the UNet timestep {timesteps[0].item():g}, which is none of its scheduler's; "
            "expected start_at=0 and end_at=1"
        )
    return (steps > timesteps[:, None] + tolerance).double().mean(1)


def _check_discrete(timesteps: Tensor) -> None:
    if bool((timesteps != timesteps.round()).any()) or bool((timesteps < 0).any()):
        raise UserError(
            f"start_at, end_at: outside a pipeline expected timesteps 0 … 999, received {timesteps[0].item():g}; "
            "attach to the pipeline, whose scheduler knows its steps, or leave the window open"
        )
