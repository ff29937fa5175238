"""The frozen encoders of a base model: images, references and captions → what the denoiser is trained on."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from imprompt.data.feature_cache import CachedSample
from imprompt.data.transforms import Batch
from imprompt.methods.inversion import TextualInversion
from imprompt.models.image_encoders import FeatureEncoder
from imprompt.utils.protocols import UNetPipeline


class PromptEmbeds(NamedTuple):
    """The outputs of the text encoders."""

    prompt_embeds: Tensor  # (batch, tokens, cross_attention_dim)
    pooled_prompt_embeds: Tensor | None = None  # (batch, width): SDXL

    def where(self, keep: Tensor, other: "PromptEmbeds") -> "PromptEmbeds":
        """These embeddings where `keep`, (batch,), is True, and the other ones elsewhere."""
        prompt_embeds = torch.where(keep[:, None, None], self.prompt_embeds, other.prompt_embeds.to(self.prompt_embeds))
        pooled, other_pooled = self.pooled_prompt_embeds, other.pooled_prompt_embeds
        if pooled is None or other_pooled is None:
            return PromptEmbeds(prompt_embeds)
        return PromptEmbeds(prompt_embeds, torch.where(keep[:, None], pooled, other_pooled.to(pooled)))

    def to(self, target: torch.device | torch.dtype | str) -> "PromptEmbeds":
        """On another device, or in another dtype."""
        pooled = self.pooled_prompt_embeds
        return PromptEmbeds(self.prompt_embeds.to(target), None if pooled is None else pooled.to(target))


class TrainingBatch(NamedTuple):
    """An encoded batch, on which the denoiser is trained; a feature cache stores its rows."""

    latent_mean: Tensor  # (batch, channels, height, width): posterior of the VAE, scaled
    latent_std: Tensor  # like latent_mean
    text: PromptEmbeds
    image_features: Tensor  # (batch, references, patches, features)
    time_ids: Tensor  # (batch, 6), SDXL: original height and width, crop top and left, target height and width
    mask: Tensor | None  # (batch, 1, height, width), 0 … 1: where the error counts
    seeds: list[int]  # one per image, for its noise, its timestep and what is dropped
    loss_weight: Tensor | None = None  # (batch,); None where all are 1

    @classmethod
    def from_cached_samples(cls, samples: Sequence[CachedSample], dtype: torch.dtype) -> "TrainingBatch":
        """Samples of a feature cache that have the same shape; text and image features get this dtype, the one of the encoders."""
        prompt_embeds = torch.stack([s.prompt_embeds for s in samples])
        pooled = [s.pooled_prompt_embeds for s in samples if s.pooled_prompt_embeds is not None]
        mask = None
        if any(s.mask is not None for s in samples):
            ones = torch.ones(1, *samples[0].shape[1:])
            mask = torch.stack([ones if s.mask is None else s.mask.float() for s in samples])
        return cls(
            torch.stack([s.latent_mean for s in samples]).float(), torch.stack([s.latent_std for s in samples]).float(),
            PromptEmbeds(prompt_embeds, torch.stack(pooled) if pooled else None).to(dtype),
            torch.stack([s.image_features for s in samples]).to(dtype), torch.stack([s.time_ids for s in samples]), mask,
            [s.seed for s in samples],
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "TrainingBatch":
        """On another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in self._asdict().items() if isinstance(part, (Tensor, PromptEmbeds))}
        return self._replace(**moved)


class UncondInputs(NamedTuple):
    """What replaces dropped text and dropped images."""

    text: PromptEmbeds  # of the empty prompt, one row
    image_features: Tensor  # (1, 1, patches, features)


class FrozenEncoders:
    """VAE, text encoders and image encoder of a base model. None of them is trained, and neither is its UNet.

    patches: whether the image encoder's patch features are used, not its pooled embedding. inversion: a method that trains the
    embeddings of placeholder tokens; prompts are then encoded with its tokens, and with gradient.
    """

    def __init__(self, pipe: UNetPipeline, image_encoder: FeatureEncoder, *, patches: bool, inversion: TextualInversion | None = None):
        self.pipe, self.image_encoder, self.patches, self.inversion = pipe, image_encoder, patches, inversion
        self.device: torch.device = pipe.unet.device
        self._modules: list[Any] = [image_encoder.model] if any(True for _ in image_encoder.model.parameters()) else []
        for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
            module = getattr(pipe, name, None)
            if module is not None:
                module.eval().requires_grad_(False)
                self._modules += [module] if name != "unet" else []
        for module in self._modules:  # an earlier training from a cache may have offloaded it
            module.to(self.device)

    def offload(self) -> None:
        """Move everything except the UNet to the CPU: a training from a cache needs it for validation only."""
        for module in self._modules:
            module.to("cpu")

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within the context all encoders are on the device; afterwards they are where they were before."""
        devices = [module.device for module in self._modules]
        for module in self._modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module, device in zip(self._modules, devices, strict=True):
                module.to(device)

    def encode_batch(self, batch: Batch) -> TrainingBatch:
        """Everything about a batch that does not change from one epoch to the next."""
        vae = self.pipe.vae
        with torch.no_grad():
            posterior = vae.encode(batch.pixel_values.to(vae.device, vae.dtype) / 127.5 - 1).latent_dist
        mask = None
        if batch.mask is not None:
            mask = F.adaptive_avg_pool2d(batch.mask.to(vae.device).float() / 255, posterior.mean.shape[-2:])
        return TrainingBatch(
            self._scale_latents(posterior.mean), posterior.std * vae.config.scaling_factor, self.encode_prompts(batch.captions),
            self.encode_references(batch.reference_pixel_values), batch.time_ids, mask, batch.seeds,
            batch.loss_weights if (batch.loss_weights != 1).any() else None,
        )  # fmt: skip

    def _scale_latents(self, mean: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """As the pipeline encodes prompts; equal ones are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        needs_grad = self.inversion is not None and torch.is_grad_enabled()
        with torch.set_grad_enabled(needs_grad), self._placeholder_tokens():
            prompt_embeds, _, *pooled = self.pipe.encode_prompt(
                prompt=distinct, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        assert prompt_embeds is not None
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=prompt_embeds.device)
        return PromptEmbeds(prompt_embeds[rows], pooled[0][rows] if pooled and pooled[0] is not None else None)

    def _placeholder_tokens(self) -> AbstractContextManager[None]:
        return self.inversion.with_placeholder_tokens(self.pipe) if self.inversion else nullcontext()

    @torch.no_grad()
    def encode_references(self, pixel_values: Tensor) -> Tensor:
        """(batch, references, 3, side, side) → (batch, references, patches, features)."""
        features = self.image_encoder.encode_pixels(pixel_values.flatten(0, 1), patches=self.patches)
        return features.to(self.device).unflatten(0, pixel_values.shape[:2])

    @torch.no_grad()
    def encode_uncond(self, uncond_features: Tensor) -> UncondInputs:
        """The unconditional inputs: the embeddings of the empty prompt, and the unconditional image features of the trained method.

        uncond_features: (1, patches, features).
        """
        return UncondInputs(self.encode_prompts([""]), uncond_features[None].to(self.device))

    @torch.no_grad()
    def decode_latents(self, latent_mean: Tensor) -> list[Image.Image]:
        """The images that the VAE decodes from latents of `encode_batch`, (batch, channels, height, width)."""
        vae, config = self.pipe.vae, self.pipe.vae.config
        latents = latent_mean.to(vae.device, vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.pipe.image_processor.postprocess(vae.decode(latents).sample)

    @torch.no_grad()
    def fingerprint(self) -> dict[str, Tensor]:
        """The output of each encoder for a small fixed input. Where these agree, two sets of encoders are the same."""
        vae = self.pipe.vae
        ramp = torch.linspace(-1, 1, 64)
        image = torch.stack([ramp[:, None].expand(64, 64), ramp[None].expand(64, 64), ramp[:, None] * ramp])[None]
        side = self.image_encoder.image_size
        outputs = {
            "VAE": self._scale_latents(vae.encode(image.to(vae.device, vae.dtype)).latent_dist.mean),
            "text encoder": self.encode_prompts(["a cat on a beach"]).prompt_embeds,
            "image encoder": self.image_encoder.encode_pixels(F.interpolate(image, (side, side), mode="bilinear"), patches=self.patches),
        }
        return {name: tensor.half().cpu() for name, tensor in outputs.items()}


def added_cond_kwargs(unet: UNet2DConditionModel, batch: TrainingBatch) -> dict[str, Any]:
    """Further arguments of the denoiser: SDXL is also conditioned on the pooled prompt embeddings and the time ids."""
    if unet.config.addition_embed_type != "text_time":
        return {}
    text = batch.text
    return {"added_cond_kwargs": {"text_embeds": text.pooled_prompt_embeds, "time_ids": batch.time_ids.to(text.prompt_embeds)}}
