"""The objective: which conditions are dropped, and random numbers that belong to the image and not to the batch."""

import pytest
import torch

from imprompt.config.training import LossConfig
from imprompt.core.noise_schedule import make_vp_schedule
from imprompt.training.frozen_encoders import PromptEmbeds, TrainingBatch, UncondInputs
from imprompt.training.objective import BatchRandomness, compute_loss, keep_masks


def make_batch(seeds, mask=None):
    generator = torch.Generator().manual_seed(0)
    shape = (len(seeds), 4, 8, 8)
    return TrainingBatch(
        torch.randn(shape, generator=generator), torch.rand(shape, generator=generator),
        PromptEmbeds(torch.randn(len(seeds), 5, 6, generator=generator)), torch.randn(len(seeds), 1, 1, 7, generator=generator),
        torch.zeros(len(seeds), 6), mask, list(seeds),
    )  # fmt: skip


def make_config(text=0.05, image=0.05, both=0.05, sampling="uniform", noise_offset=0.0):
    return LossConfig(
        text_drop_prob=text, image_drop_prob=image, both_drop_prob=both, timestep_sampling=sampling, noise_offset=noise_offset
    )


class ZeroDenoiser:
    """Always predicts zero, and records its inputs."""

    def predict(self, latents, timesteps, prompt_embeds, image_features, **unet_kwargs):
        self.inputs = (latents, timesteps, prompt_embeds, image_features)
        return torch.zeros_like(latents)


class UNetWithoutAddedConditions:
    class config:
        addition_embed_type = None


SCHEDULE = make_vp_schedule(torch.linspace(0.99, 0.01, 1000), "epsilon")
UNCOND = UncondInputs(PromptEmbeds(torch.zeros(1, 5, 6)), torch.zeros(1, 1, 1, 7))


def loss_of_zero_denoiser(batch, config, method=None):
    return compute_loss(method or ZeroDenoiser(), UNetWithoutAddedConditions, SCHEDULE, batch, UNCOND, config)


def test_drop_probabilities():
    drop_u = (torch.arange(10_000) + 0.5) / 10_000
    text, image = keep_masks(drop_u, make_config(text=0.1, image=0.2, both=0.05))
    dropped = (~text & image, text & ~image, ~text & ~image)
    assert [round(float(mask.float().mean()), 4) for mask in dropped] == [0.1, 0.2, 0.05]


def test_dropped_conditions_are_replaced_by_the_unconditional_ones():
    method = ZeroDenoiser()
    loss_of_zero_denoiser(make_batch(range(40)), make_config(0.3, 0.3, 0.3), method)
    _, _, text, image = method.inputs
    no_text, no_image = (text == 0).all((1, 2)), (image == 0).all((1, 2, 3))
    assert 8 < no_text.sum() < 36 and 8 < no_image.sum() < 36 and (no_text & no_image).any() and (no_text ^ no_image).any()


def test_random_numbers_belong_to_the_image():
    batched, alone = BatchRandomness.sample(make_batch([5, 6, 7])), BatchRandomness.sample(make_batch([6]))
    assert all(torch.equal(a[1], b[0]) for a, b in zip(batched, alone, strict=True))
    assert not torch.equal(batched.noise[0], batched.noise[1])


def test_the_loss_of_a_zero_prediction_is_the_mean_square_of_the_noise():
    batch = make_batch(range(6))
    loss = loss_of_zero_denoiser(batch, make_config())
    assert loss.shape == (6,) and torch.allclose(loss, BatchRandomness.sample(batch).noise.square().mean((1, 2, 3)))


def test_the_loss_is_averaged_within_the_mask():
    mask = torch.zeros(6, 1, 8, 8)
    mask[..., :4] = 1
    batch = make_batch(range(6), mask)
    loss = loss_of_zero_denoiser(batch, make_config())
    assert torch.allclose(loss, BatchRandomness.sample(batch).noise[..., :4].square().mean((1, 2, 3)))


@pytest.mark.parametrize(("sampling", "low", "high"), [("uniform", 0.18, 0.32), ("logit-normal", 0.05, 0.15)])
def test_timestep_sampling(sampling, low, high):
    method = ZeroDenoiser()
    loss_of_zero_denoiser(make_batch(range(400)), make_config(sampling=sampling), method)
    fraction_of_last_quarter = (method.inputs[1] >= 750).float().mean()
    assert low < fraction_of_last_quarter < high


def test_the_noise_offset_shifts_whole_channels():
    batch = make_batch(range(3))
    plain, shifted = (loss_of_zero_denoiser(batch, make_config(noise_offset=offset)) for offset in (0.0, 0.5))
    randomness = BatchRandomness.sample(batch)
    expected = (randomness.noise + 0.5 * randomness.offset_noise).square().mean((1, 2, 3))
    assert torch.allclose(shifted, expected) and not torch.equal(plain, shifted)
