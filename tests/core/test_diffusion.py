"""Each prediction type determines x_0 exactly; min-SNR weights are those of their paper (arXiv:2303.09556)."""

import pytest
import torch
from diffusers import DDIMScheduler

from imprompt.core.noise_schedule import (
    PREDICTION_TYPES,
    NoiseSchedule,
    add_noise,
    make_rectified_flow_schedule,
    make_vp_schedule,
    min_snr_weight,
    training_target,
)

BASE = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def make_schedule(prediction_type):
    if prediction_type == "flow":
        sigmas = torch.arange(1, 1001) / 1000
        return make_rectified_flow_schedule(sigmas, 1000 * sigmas)
    return make_vp_schedule(BASE.alphas_cumprod, prediction_type)


def random_batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 8, 8, generator=g), torch.randn(6, 4, 8, 8, generator=g), torch.tensor([0, 10, 300, 600, 900, 998])


def solve_x_0(s: NoiseSchedule, prediction, x, t):
    """x_0 from a prediction, solved by hand."""
    a, b = (table[t].reshape(-1, 1, 1, 1) for table in (s.alpha, s.sigma))
    solutions = {
        "epsilon": (x - b * prediction) / a,
        "v_prediction": a * x - b * prediction,
        "sample": prediction,
        "flow": x - b * prediction,
    }
    return solutions[s.prediction_type]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_determines_the_image(prediction_type):
    s, (x0, noise, t) = make_schedule(prediction_type), random_batch()
    x = add_noise(s, x0, noise, t)
    assert torch.allclose(solve_x_0(s, training_target(s, x0, noise, t), x, t), x0, atol=2e-4)


def test_equals_diffusers():
    x0, noise, t = random_batch()
    s = make_schedule("v_prediction")
    assert torch.allclose(add_noise(s, x0, noise, t), BASE.add_noise(x0, noise, t), atol=1e-6)
    assert torch.allclose(training_target(s, x0, noise, t), BASE.get_velocity(x0, noise, t), atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_the_error_of_the_image(prediction_type):
    """w·|error of the prediction|² = min(SNR, γ)·|error of x_0|², whatever is predicted."""
    s, (x0, noise, t) = make_schedule(prediction_type), random_batch()
    right = training_target(s, x0, noise, t)
    wrong = right + 0.1
    x = add_noise(s, x0, noise, t)
    error = (solve_x_0(s, wrong, x, t) - solve_x_0(s, right, x, t)).square().mean((1, 2, 3))
    snr = (s.alpha[t] / s.sigma[t]) ** 2
    assert torch.allclose(min_snr_weight(s, t, 5.0) * 0.01, snr.clamp(max=5) * error, rtol=2e-2)


def test_an_unknown_prediction_type_is_named():
    x0, noise, t = random_batch()
    with pytest.raises(ValueError, match="guess"):
        training_target(make_schedule("epsilon")._replace(prediction_type="guess"), x0, noise, t)
