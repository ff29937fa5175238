"""Noising and targets: each target tells x_0 exactly; the weights are those of the paper."""

import pytest
import torch
from diffusers import DDIMScheduler

from imprompt.core.noise_schedule import TARGETS, Schedule, add_noise, min_snr_weight, rectified_flow, target_of, variance_preserving

BASE = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def schedule(target):
    if target == "flow":
        sigmas = torch.arange(1, 1001) / 1000
        return rectified_flow(sigmas, 1000 * sigmas)
    return variance_preserving(BASE.alphas_cumprod, target)


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 8, 8, generator=g), torch.randn(6, 4, 8, 8, generator=g), torch.tensor([0, 10, 300, 600, 900, 998])


def clean(s: Schedule, said, x, t):
    """x_0 from a prediction, solved by hand."""
    a, b = (table[t].reshape(-1, 1, 1, 1) for table in (s.alpha, s.sigma))
    return {"epsilon": (x - b * said) / a, "v_prediction": a * x - b * said, "sample": said, "flow": x - b * said}[s.target]


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_tells_the_picture(target):
    s, (x0, noise, t) = schedule(target), batch()
    x = add_noise(s, x0, noise, t)
    assert torch.allclose(clean(s, target_of(s, x0, noise, t), x, t), x0, atol=2e-4)


def test_equals_diffusers():
    x0, noise, t = batch()
    s = schedule("v_prediction")
    assert torch.allclose(add_noise(s, x0, noise, t), BASE.add_noise(x0, noise, t), atol=1e-6)
    assert torch.allclose(target_of(s, x0, noise, t), BASE.get_velocity(x0, noise, t), atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_min_snr_weighs_the_error_of_the_picture(target):
    """w·|error of the prediction|² = min(SNR, γ)·|error of x_0|², whatever is predicted."""
    s, (x0, noise, t) = schedule(target), batch()
    right = target_of(s, x0, noise, t)
    wrong = right + 0.1
    x = add_noise(s, x0, noise, t)
    error = (clean(s, wrong, x, t) - clean(s, right, x, t)).square().mean((1, 2, 3))
    snr = (s.alpha[t] / s.sigma[t]) ** 2
    assert torch.allclose(min_snr_weight(s, t, 5.0) * 0.01, snr.clamp(max=5) * error, rtol=2e-2)


def test_an_unknown_target_is_named():
    x0, noise, t = batch()
    with pytest.raises(ValueError, match="guess"):
        target_of(schedule("epsilon")._replace(target="guess"), x0, noise, t)
