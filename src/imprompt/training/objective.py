"""The objective, from an encoded batch to one loss per picture."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from imprompt.core.noise_schedule import Schedule, add_noise, min_snr_weight, target_of
from imprompt.training.frozen_encoders import Encoded, Nulls, Text, extras


@dataclass(frozen=True)
class Objective:
    """P1's settings (arXiv:2308.06721, section 4.1.2) unless told otherwise."""

    drop_text: float = 0.05
    drop_image: float = 0.05
    drop_both: float = 0.05
    timesteps: str = "uniform"  # or logit-normal (arXiv:2403.03206, section 3.1)
    min_snr: float = 0.0  # γ; 0 leaves the weights alone
    noise_offset: float = 0.0


class Denoiser(Protocol):
    """A method in training: a denoiser that is conditioned on text and image."""

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor: ...


class Chance(NamedTuple):
    """All that is random in a step; each picture's follows from its own seed."""

    latent: Tensor  # (batch, channels, height, width)
    noise: Tensor
    offset: Tensor  # (batch, channels, 1, 1)
    time: Tensor  # (batch,) in 0 … 1
    drop: Tensor  # (batch,) in 0 … 1

    @classmethod
    def draw(cls, encoded: Encoded) -> "Chance":
        """The numbers do not depend on how pictures are put together into batches, nor on the device."""
        shape = encoded.mean.shape[1:]
        rows = []
        for seed in encoded.seeds:
            g = torch.Generator().manual_seed(seed)
            latent, noise, offset = (torch.randn(size, generator=g) for size in (shape, shape, (shape[0], 1, 1)))
            rows.append((latent, noise, offset, *torch.rand(2, generator=g)))
        return cls(*(torch.stack(column).to(encoded.mean.device) for column in zip(*rows, strict=True)))


def losses(method: Denoiser, unet: Any, schedule: Schedule, encoded: Encoded, nulls: Nulls, how: Objective) -> Tensor:
    """L = E‖y − y_θ(x_t, c_t, c_i, t)‖² for each picture, (batch,), in float32."""
    chance = Chance.draw(encoded)
    t = _timesteps(chance.time, len(schedule.time), how.timesteps)
    keep_text, keep_image = kept(chance.drop, how)
    text = encoded.text.rows(keep_text, nulls.text)
    image = torch.where(keep_image[:, None, None, None], encoded.image, nulls.image.to(encoded.image))
    each = errors(method, unet, schedule, encoded, text, image, t, chance, how)
    return each if encoded.counts is None else each * encoded.counts


def errors(
    method: Denoiser, unet: Any, schedule: Schedule, encoded: Encoded, text: Text, image: Tensor, t: Tensor, chance: Chance, how: Objective
) -> Tensor:
    """The error of each picture at timesteps t, with this text and this image."""
    clean = encoded.mean.float() + encoded.std.float() * chance.latent
    noise = chance.noise + how.noise_offset * chance.offset
    x = add_noise(schedule, clean, noise, t).to(encoded.text.states.dtype)
    said = method.denoise(x, schedule.time[t], text.states, image, **extras(unet, encoded, text))
    error = (said.float() - target_of(schedule, clean, noise, t)).square()
    if encoded.weight is not None:
        weight = encoded.weight.float().expand_as(error)
        error = error * weight / weight.mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    each = error.mean((1, 2, 3))
    return each * min_snr_weight(schedule, t, how.min_snr).to(each) if how.min_snr else each


def kept(drop: Tensor, how: Objective) -> tuple[Tensor, Tensor]:
    """Whose text and whose image stay: one draw in 0 … 1 decides between text, both, image and nothing."""
    a, b = how.drop_text, how.drop_text + how.drop_both
    return drop >= b, (drop < a) | (drop >= b + how.drop_image)


def _timesteps(u: Tensor, count: int, how: str) -> Tensor:
    if how == "logit-normal":
        u = torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)) - 0.3)
    return (u * count).long().clamp(max=count - 1)
