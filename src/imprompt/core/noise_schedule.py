"""The forward process and the training target of diffusion models: noise ε, velocity v, the image itself, or flow.

A noise schedule is a table of α_t, σ_t for every t in x_t = α_t x_0 + σ_t ε (IP-Adapter, Ye et al., 2023, section 3.1), and of the
timestep that the UNet is conditioned on.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
LOGIT_NORMAL_LOCATION = -0.3  # our own value, chosen on the embedded model; below 0, timesteps with less noise are preferred


class NoiseSchedule(NamedTuple):
    """The noise schedule of a base model: tables of T entries."""

    alpha: Tensor  # (T,)
    sigma: Tensor  # (T,)
    timesteps: Tensor  # (T,): what the UNet is conditioned on
    prediction_type: str  # one of PREDICTION_TYPES

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule on another device."""
        return NoiseSchedule(self.alpha.to(device), self.sigma.to(device), self.timesteps.to(device), self.prediction_type)


def make_vp_schedule(alphas_cumprod: Float[Tensor, " T"], prediction_type: str) -> NoiseSchedule:
    """The variance-preserving schedule of SD 1.5, 2.1 and XL: α_t² = ᾱ_t, σ_t² = 1 − ᾱ_t (DDPM, arXiv:2006.11239, equation 4)."""
    cumulative = alphas_cumprod.double()
    return NoiseSchedule(cumulative.sqrt().float(), (1 - cumulative).sqrt().float(), torch.arange(len(cumulative)), prediction_type)


def make_rectified_flow_schedule(sigmas: Float[Tensor, " T"], timesteps: Shaped[Tensor, " T"]) -> NoiseSchedule:
    """The straight paths x_t = (1 − σ) x_0 + σ ε of rectified flow (Liu et al., 2022, arXiv:2209.03003, equation 1)."""
    return NoiseSchedule(1 - sigmas, sigmas, timesteps, "flow")


def add_noise(
    schedule: NoiseSchedule, x_0: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], t: Int[Tensor, " batch"]
) -> Float[Tensor, "batch *shape"]:
    """x_t = α_t x_0 + σ_t ε (DDPM, arXiv:2006.11239, equation 4). `t` indexes the schedule's tables."""
    return _per_sample(schedule.alpha, t, x_0) * x_0 + _per_sample(schedule.sigma, t, x_0) * noise


def training_target(
    schedule: NoiseSchedule, x_0: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], t: Int[Tensor, " batch"]
) -> Float[Tensor, "batch *shape"]:
    """What the UNet is trained to predict from x_t, by the schedule's prediction type. Raises ValueError for an unknown one.

    ε (IP-Adapter, equation 6), v = α_t ε − σ_t x_0 (Salimans and Ho, 2022, arXiv:2202.00512, section 4), x_0, or the flow ε − x_0
    (Liu et al., 2022, arXiv:2209.03003, equation 1).
    """
    match schedule.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return _per_sample(schedule.alpha, t, x_0) * noise - _per_sample(schedule.sigma, t, x_0) * x_0
        case "sample":
            return x_0
        case "flow":
            return noise - x_0
    raise ValueError(f"unknown prediction type {schedule.prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")


def min_snr_weight(schedule: NoiseSchedule, t: Int[Tensor, " batch"], gamma: float) -> Float[Tensor, " batch"]:
    """The min-SNR-γ loss weight, min(SNR, γ) on the error of x_0 (Hang et al., 2023, arXiv:2303.09556, equation 6).

    An error e of the prediction is an error f·e of x_0, so that the weight of e² is f² min(SNR, γ) for every prediction type.
    """
    alpha, sigma = schedule.alpha[t].double(), schedule.sigma[t].double()
    snr = (alpha / sigma.clamp(min=1e-8)) ** 2
    factor = {"epsilon": 1 / snr.clamp(min=1e-8), "v_prediction": sigma**2, "sample": torch.ones_like(snr), "flow": sigma**2}
    return (factor[schedule.prediction_type] * snr.clamp(max=gamma)).float()


def logit_normal_quantile(
    u: Float[Tensor, "*shape"], location: float = LOGIT_NORMAL_LOCATION, eps: float = 1e-6
) -> Float[Tensor, "*shape"]:
    """Map uniform numbers in 0 … 1 to logit-normal timesteps in 0 … 1: sigmoid(location + Φ⁻¹(u)). u is clamped to eps … 1 − eps.

    Esser et al., 2024 (Stable Diffusion 3, arXiv:2403.03206, section 3.1), with scale 1.
    """
    return torch.sigmoid(torch.special.ndtri(u.clamp(eps, 1 - eps)) + location)


def _per_sample(table: Float[Tensor, " T"], t: Int[Tensor, " batch"], like: Float[Tensor, "batch *shape"]) -> Tensor:
    """The entries of a table at t, in the dtype of `like` and broadcastable to it."""
    return table[t].to(like).reshape(-1, *[1] * (like.ndim - 1))
