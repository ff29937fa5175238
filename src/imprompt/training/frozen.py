"""The frozen parts of a base model: pixels, references and texts become what the denoiser is trained on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprompt.data.frame import Batch
from imprompt.encoders import ImageEncoder


class Text(NamedTuple):
    """What the text encoders say."""

    states: Tensor  # (batch, tokens, cross)
    pooled: Tensor | None = None  # (batch, width): SDXL

    def rows(self, keep: Tensor, other: "Text") -> "Text":
        """These rows where `keep`, the other's elsewhere. keep: (batch,)."""
        states = torch.where(keep[:, None, None], self.states, other.states.to(self.states))
        if self.pooled is None or other.pooled is None:
            return Text(states)
        return Text(states, torch.where(keep[:, None], self.pooled, other.pooled.to(self.pooled)))


class Encoded(NamedTuple):
    """A batch as the denoiser is trained on it: what a feature cache holds."""

    mean: Tensor  # (batch, channels, height, width): the VAE's posterior
    std: Tensor
    text: Text
    image: Tensor  # (batch, references, patches, features)
    sizes: Tensor  # (batch, 6): original height and width, top, left, height, width
    weight: Tensor | None  # (batch, 1, height, width): the mask
    seeds: list[int]

    def to(self, device: torch.device | str) -> "Encoded":
        """On another device."""
        text = Text(self.text.states.to(device), None if self.text.pooled is None else self.text.pooled.to(device))
        weight = None if self.weight is None else self.weight.to(device)
        return Encoded(self.mean.to(device), self.std.to(device), text, self.image.to(device), self.sizes.to(device), weight, self.seeds)


class Nulls(NamedTuple):
    """What stands where text or image are dropped."""

    text: Text  # of the empty caption, one row
    image: Tensor  # (1, 1, patches, features)


class Frozen:
    """VAE, text encoders and image encoder of a base, none of them trained."""

    def __init__(self, pipe: Any, encoder: ImageEncoder, grid: bool):
        self.pipe, self.encoder, self.grid = pipe, encoder, grid
        for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
            part = getattr(pipe, name, None)
            if part is not None:
                part.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoded:
        """Everything that does not change from one epoch to the next."""
        vae = self.pipe.vae
        pixels = batch.pixels.to(vae.device, vae.dtype) / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        weight = None
        if batch.mask is not None:
            weight = torch.nn.functional.adaptive_avg_pool2d(batch.mask.to(vae.device).float() / 255, posterior.mean.shape[-2:])
        return Encoded(
            self._latent(posterior.mean), posterior.std * vae.config.scaling_factor, self.text(batch.texts), self.image(batch.references),
            batch.sizes, weight, batch.seeds,
        )  # fmt: skip

    def _latent(self, mean: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Text:
        """As the pipeline encodes prompts. Equal captions are encoded once."""
        distinct = list(dict.fromkeys(texts))
        found = self.pipe.encode_prompt(
            prompt=distinct, device=self.pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        rows = torch.tensor([distinct.index(t) for t in texts], device=found[0].device)
        return Text(found[0][rows], found[2][rows] if len(found) == 4 else None)

    @torch.no_grad()
    def image(self, references: Tensor) -> Tensor:
        """(batch, references, 3, side, side) → (batch, references, patches, features)."""
        model = self.encoder.model
        features = self.encoder.features(references.flatten(0, 1).to(model.device, model.dtype), self.grid)
        return features.unflatten(0, references.shape[:2])

    @torch.no_grad()
    def nulls(self) -> Nulls:
        return Nulls(self.text([""]), self.encoder.null(self.grid)[None])


def extras(unet: Any, encoded: Encoded, text: Text) -> dict[str, Any]:
    """Further arguments of the denoiser: SDXL is told the pooled text and the sizes."""
    if unet.config.addition_embed_type != "text_time":
        return {}
    return {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": encoded.sizes.to(text.states)}}
