"""Noising and what a denoiser is trained to predict: ε, v, the picture itself, or the flow.

A schedule is a table: x_t = α_t x_0 + σ_t ε for every t, and the time that the denoiser is told.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TARGETS = ("epsilon", "v_prediction", "sample", "flow")


class Schedule(NamedTuple):
    """The noise schedule of a base model."""

    alpha: Tensor  # (T,)
    sigma: Tensor  # (T,)
    time: Tensor  # (T,): what the denoiser is told
    target: str  # one of TARGETS

    def to(self, device: torch.device | str) -> "Schedule":
        return Schedule(self.alpha.to(device), self.sigma.to(device), self.time.to(device), self.target)


def variance_preserving(alphas_cumprod: Tensor, target: str) -> Schedule:
    """α_t² = ᾱ_t and σ_t² = 1 − ᾱ_t: Stable Diffusion 1.5, 2.1 and XL."""
    cumulative = alphas_cumprod.double()
    return Schedule(cumulative.sqrt().float(), (1 - cumulative).sqrt().float(), torch.arange(len(cumulative)), target)


def rectified_flow(sigmas: Tensor, times: Tensor) -> Schedule:
    """x_t = (1 − σ) x_0 + σ ε (arXiv:2209.03003)."""
    return Schedule(1 - sigmas, sigmas, times, "flow")


def add_noise(schedule: Schedule, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t. x, noise: (batch, channels, height, width); t: (batch,), rows of the schedule."""
    return _rows(schedule.alpha, t, x) * x + _rows(schedule.sigma, t, x) * noise


def target_of(schedule: Schedule, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the denoiser should say of x_t."""
    match schedule.target:
        case "epsilon":
            return noise
        case "v_prediction":
            return _rows(schedule.alpha, t, x) * noise - _rows(schedule.sigma, t, x) * x
        case "sample":
            return x
        case "flow":
            return noise - x
    raise ValueError(f"unknown target {schedule.target!r}; expected one of {', '.join(TARGETS)}")


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """min(SNR, γ) on the error of x_0, whatever is predicted (arXiv:2303.09556, equation 6). (batch,).

    An error e of the prediction is an error f·e of x_0, so the weight on e² is f² min(SNR, γ).
    """
    alpha, sigma = schedule.alpha[t].double(), schedule.sigma[t].double()
    snr = (alpha / sigma.clamp(min=1e-8)) ** 2
    factor = {"epsilon": 1 / snr.clamp(min=1e-8), "v_prediction": sigma**2, "sample": torch.ones_like(snr), "flow": sigma**2}
    return (factor[schedule.target] * snr.clamp(max=gamma)).float()


def _rows(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table[t].to(like).reshape(-1, *[1] * (like.ndim - 1))
