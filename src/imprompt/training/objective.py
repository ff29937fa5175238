"""The training objective: from an encoded batch to one loss per image."""

from typing import NamedTuple, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from imprompt.config.training import LossConfig
from imprompt.core.noise_schedule import NoiseSchedule, add_noise, logit_normal_quantile, min_snr_weight, training_target
from imprompt.training.frozen_encoders import TrainingBatch, UncondInputs, added_cond_kwargs


class Denoiser(Protocol):
    """A method in training: predicts the target of the noise schedule, conditioned on text and image."""

    def predict(
        self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, image_features: Tensor, **unet_kwargs: object
    ) -> Tensor: ...


class BatchRandomness(NamedTuple):
    """All random numbers of a training step. Those of an image depend on its own seed alone."""

    latent_noise: Tensor  # (batch, channels, height, width): samples the VAE's posterior
    noise: Tensor  # like latent_noise
    offset_noise: Tensor  # (batch, channels, 1, 1)
    timestep_u: Tensor  # (batch,), uniform in 0 … 1
    drop_u: Tensor  # (batch,), uniform in 0 … 1

    @classmethod
    def sample(cls, batch: TrainingBatch) -> "BatchRandomness":
        """The numbers depend neither on how images are grouped into batches nor on the device."""
        shape = batch.latent_mean.shape[1:]
        samples = []
        for seed in batch.seeds:
            generator = torch.Generator().manual_seed(seed)
            normals = (torch.randn(size, generator=generator) for size in (shape, shape, (shape[0], 1, 1)))
            samples.append((*normals, *torch.rand(2, generator=generator)))
        return cls(*(torch.stack(column).to(batch.latent_mean.device) for column in zip(*samples, strict=True)))


def compute_loss(
    method: Denoiser, unet: UNet2DConditionModel, schedule: NoiseSchedule, batch: TrainingBatch, uncond: UncondInputs, config: LossConfig
) -> Tensor:
    """L = E‖y − y_θ(x_t, c_t, c_i, t)‖² with dropped conditions, times the loss weight of each image: (batch,), in float32.

    IP-Adapter (Ye et al., 2023, arXiv:2308.06721, equation 6, and section 4.1.2 for the drop probabilities).
    """
    randomness = BatchRandomness.sample(batch)
    timesteps = _timesteps_from_uniform(randomness.timestep_u, len(schedule.timesteps), config.timestep_sampling)
    batch = drop_conditions(batch, uncond, *keep_masks(randomness.drop_u, config))
    loss = denoising_error(
        method, unet, schedule, batch, timesteps, randomness, noise_offset=config.noise_offset, snr_gamma=config.snr_gamma
    )
    return loss if batch.loss_weight is None else loss * batch.loss_weight


def denoising_error(
    method: Denoiser, unet: UNet2DConditionModel, schedule: NoiseSchedule, batch: TrainingBatch, timesteps: Tensor,
    randomness: BatchRandomness, *, noise_offset: float = 0.0, snr_gamma: float = 0.0,
) -> Tensor:  # fmt: skip
    """The squared error of the prediction for each image, averaged within the batch's mask: (batch,), in float32.

    timesteps: (batch,), indices into the noise schedule. snr_gamma: γ of the min-SNR weight; 0 for none.
    """
    latents = batch.latent_mean.float() + batch.latent_std.float() * randomness.latent_noise
    noise = randomness.noise + noise_offset * randomness.offset_noise
    prompt_embeds = batch.text.prompt_embeds
    noisy_latents = add_noise(schedule, latents, noise, timesteps).to(prompt_embeds.dtype)
    kwargs = added_cond_kwargs(unet, batch)
    prediction = method.predict(noisy_latents, schedule.timesteps[timesteps], prompt_embeds, batch.image_features, **kwargs)
    error = (prediction.float() - training_target(schedule, latents, noise, timesteps)).square()
    if batch.mask is not None:
        mask = batch.mask.float().expand_as(error)
        error = error * mask / mask.mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    loss = error.mean((1, 2, 3))
    return loss * min_snr_weight(schedule, timesteps, snr_gamma).to(loss) if snr_gamma else loss


def keep_masks(drop_u: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Which images keep their text and which their image features: two boolean tensors, (batch,).

    One uniform number decides: below `text_drop_prob` the text is dropped, in the next interval both, in the next the image.
    """
    text_end = config.text_drop_prob
    both_end = text_end + config.both_drop_prob
    return drop_u >= both_end, (drop_u < text_end) | (drop_u >= both_end + config.image_drop_prob)


def drop_conditions(batch: TrainingBatch, uncond: UncondInputs, keep_text: Tensor, keep_image: Tensor) -> TrainingBatch:
    """The batch with the unconditional inputs where a mask, (batch,), is False."""
    uncond_features = uncond.image_features.to(batch.image_features)
    return batch._replace(
        text=batch.text.where(keep_text, uncond.text),
        image_features=torch.where(keep_image[:, None, None, None], batch.image_features, uncond_features),
    )


def _timesteps_from_uniform(u: Tensor, num_timesteps: int, sampling: str) -> Tensor:
    if sampling == "logit-normal":
        u = logit_normal_quantile(u)
    return (u * num_timesteps).long().clamp(max=num_timesteps - 1)
