"""ControlNet Reference-only (Zhang, 2023): nothing is trained; the UNet's self-attention also attends to the noised reference image.

At every step the latents of the reference image are noised to the timestep of that step, and one UNet call stores the input of each
self-attention layer. The second call has keys and values from [its own input ; the stored one]. In unconditional rows its output is
interpolated with self-attention to the row alone, by the style fidelity.
"""

from typing import cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from imprompt.core.noise_schedule import NoiseSchedule, add_noise
from imprompt.methods.base import Conditioning, ConditioningMethod, ConditioningModule, UNetForward, is_null, unflatten_pixels
from imprompt.models.base_pipelines import noise_schedule_from
from imprompt.models.image_encoders import FeatureEncoder
from imprompt.utils.protocols import UNetPipeline

STYLE_FIDELITY = 0.5


class ReferenceOnly(ConditioningModule):
    """The image features are latents, (batch, references, positions, channels). Unconditional rows attend to the reference image too."""

    also_in_uncond_rows = ("latents", "noise")

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule):
        super().__init__()
        self._frozen = (unet, schedule)  # in a tuple, so that the UNet is no submodule

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """The latents of the first reference image, fixed noise for them, and which rows have no image."""
        latents = unflatten_pixels(image_features)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents).expand_as(latents)
        return {"latents": latents, "noise": noise, "is_null": is_null(image_features).to(latents.dtype)}

    def scale_conditioning(self, uncond: Conditioning, cond: Conditioning, scale: float) -> Conditioning:
        """The method has no scale."""
        return cond

    def call_unet(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cond: Conditioning, **unet_kwargs: object
    ) -> Tensor:
        """Two UNet calls: one stores the reference's self-attention inputs, the other attends to them."""
        base_unet, schedule = self._frozen[0], self._frozen[1].to(latents.device)
        t = torch.searchsorted(schedule.timesteps.float().contiguous(), timesteps.float().contiguous())
        t = t.clamp(max=len(schedule.timesteps) - 1)
        noised = add_noise(schedule, cond["latents"].float(), cond["noise"].float(), t).to(latents)
        processors = [ReferenceAttnProcessor(layer, cond["is_null"] > 0) for layer in _find_self_attention(base_unet)]
        try:
            unet(noised, timesteps, prompt_embeds, **unet_kwargs)
            for processor in processors:
                processor.is_storing = False
            return cast(Tensor, unet(latents, timesteps, prompt_embeds, **unet_kwargs).sample)
        finally:
            for processor in processors:
                processor.restore()


class ReferenceAttnProcessor:
    """The processor of one self-attention layer, which first stores its input and then also attends to the stored one."""

    def __init__(self, layer: Attention, uncond_rows: Tensor):
        self.layer, self.uncond_rows, self.is_storing = layer, uncond_rows, True
        self.replaced = layer.processor
        self.stored: Tensor | None = None
        layer.set_processor(self)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: object, **kwargs: object
    ) -> Tensor:
        """The output of the layer, (rows, positions, hidden)."""
        self_only = self.replaced(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        if self.is_storing:
            self.stored = hidden_states
            return cast(Tensor, self_only)
        assert self.stored is not None
        with_reference = self.replaced(attn, hidden_states, torch.cat([hidden_states, self.stored], dim=1), *args, **kwargs)
        interpolated = STYLE_FIDELITY * self_only + (1 - STYLE_FIDELITY) * with_reference
        return torch.where(self.uncond_rows[:, None, None], interpolated, with_reference)

    def restore(self) -> None:
        """Put the replaced processor back."""
        self.layer.set_processor(self.replaced)


def _find_self_attention(unet: UNet2DConditionModel) -> list[Attention]:
    return [module for name, module in unet.named_modules() if isinstance(module, Attention) and name.endswith("attn1")]


def build_reference_only(pipe: UNetPipeline, encoder: FeatureEncoder) -> ConditioningMethod:
    """The method, which has nothing to train."""
    module = ReferenceOnly(pipe.unet, noise_schedule_from(pipe.scheduler))
    return ConditioningMethod("reference-only", pipe.unet, encoder, module)
