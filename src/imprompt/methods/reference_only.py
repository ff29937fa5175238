"""ControlNet Reference-only: nothing is trained. The UNet first reads the noised reference; its self-attention is heard.

At every step the reference's latents are noised to the step's time and the UNet runs once to bank what enters each
self-attention; then it draws, with keys and values from [its own ; the bank]. In the unconditional rows the result is
mixed with attention to themselves alone, by the style fidelity.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from imprompt.core.noise_schedule import Schedule, add_noise
from imprompt.methods.base import Given, Rewriting, absent

FIDELITY = 0.5


class ReferenceOnly(Rewriting):
    """Reads latents as features: (batch, references, places, channels). Unconditional rows read the reference too."""

    shared = ("latents", "noise")

    def __init__(self, unet: Any, schedule: Schedule):
        super().__init__()
        self._frozen = (unet, schedule)  # a tuple, so that they are no part of this module

    def given(self, image: Tensor) -> Given:
        side = round(image.shape[2] ** 0.5)
        latents = image[:, 0].transpose(1, 2).unflatten(2, (side, side))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents).expand_as(latents)
        return {"latents": latents, "noise": noise, "absent": absent(image).to(latents.dtype)}

    def weighed(self, nothing: Given, heard: Given, scale: float) -> Given:
        return heard

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        host, schedule = self._frozen
        schedule = schedule.to(x.device)
        t = torch.searchsorted(schedule.time.float().contiguous(), time.float().contiguous()).clamp(max=len(schedule.time) - 1)
        nothing = given["absent"] > 0
        noised = add_noise(schedule, given["latents"].float(), given["noise"].float(), t).to(x)
        banked = [Banked(layer, nothing) for layer in _self_attention(host)]
        try:
            unet(noised, time, text, **extra)
            for processor in banked:
                processor.writing = False
            return cast(Tensor, unet(x, time, text, **extra).sample)
        finally:
            for processor in banked:
                processor.restore()


class Banked:
    """The processor of one self-attention: it first keeps what it reads, then also reads what it kept."""

    def __init__(self, layer: Attention, nothing: Tensor):
        self.layer, self.nothing, self.writing = layer, nothing, True
        self.replaced = layer.processor
        self.bank: Tensor | None = None
        layer.set_processor(self)

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Any = None, *rest: Any, **more: Any) -> Tensor:
        own = self.replaced(attn, hidden_states, encoder_hidden_states, *rest, **more)
        if self.writing:
            self.bank = hidden_states
            return cast(Tensor, own)
        assert self.bank is not None
        both = self.replaced(attn, hidden_states, torch.cat([hidden_states, self.bank], dim=1), *rest, **more)
        mixed = FIDELITY * own + (1 - FIDELITY) * both
        return torch.where(self.nothing[:, None, None], mixed, both)

    def restore(self) -> None:
        self.layer.set_processor(self.replaced)


def _self_attention(unet: Any) -> list[Attention]:
    return [module for name, module in unet.named_modules() if isinstance(module, Attention) and name.endswith("attn1")]
