"""The frozen parts of a base model: pixels, references and texts become what the denoiser is trained on."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from imprompt.data.feature_cache import Row
from imprompt.data.transforms import Batch
from imprompt.methods.inversion import Inversion
from imprompt.models.image_encoders import Encoder


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
    counts: Tensor | None = None  # (batch,): how much each one's loss counts, where they differ

    @classmethod
    def of(cls, rows: Sequence[Row], dtype: torch.dtype) -> "Encoded":
        """Rows of a feature cache, of one shape, as they were encoded: text and image features in this dtype."""
        pooled = None if rows[0].pooled is None else torch.stack([r.pooled for r in rows if r.pooled is not None]).to(dtype)
        weight = None
        if any(r.weight is not None for r in rows):
            everywhere = torch.ones(1, *rows[0].shape[1:])
            weight = torch.stack([everywhere if r.weight is None else r.weight.float() for r in rows])
        return cls(
            torch.stack([r.mean for r in rows]).float(), torch.stack([r.std for r in rows]).float(),
            Text(torch.stack([r.states for r in rows]).to(dtype), pooled), torch.stack([r.image for r in rows]).to(dtype),
            torch.stack([r.sizes for r in rows]), weight, [r.seed for r in rows],
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "Encoded":
        """On another device."""
        text = Text(self.text.states.to(device), None if self.text.pooled is None else self.text.pooled.to(device))
        weight, counts = (None if part is None else part.to(device) for part in (self.weight, self.counts))
        mean, std, image, sizes = (part.to(device) for part in (self.mean, self.std, self.image, self.sizes))
        return Encoded(mean, std, text, image, sizes, weight, self.seeds, counts)


class Nulls(NamedTuple):
    """What stands where text or image are dropped."""

    text: Text  # of the empty caption, one row
    image: Tensor  # (1, 1, patches, features)


class Frozen:
    """VAE, text encoders and image encoder of a base, none of them trained.

    `words` are new ones that are trained: within its `spoken(pipe)` texts are encoded with gradient.
    """

    def __init__(self, pipe: Any, encoder: Encoder, grid: bool, words: Inversion | None = None):
        self.pipe, self.encoder, self.grid, self.device, self.words = pipe, encoder, grid, pipe.unet.device, words
        self._parts = [encoder.model] if any(True for _ in encoder.model.parameters()) else []
        for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
            part = getattr(pipe, name, None)
            if part is not None:
                part.eval().requires_grad_(False)
                self._parts += [part] if name != "unet" else []
        for part in self._parts:  # an earlier training from a cache left them elsewhere
            part.to(self.device)

    def park(self) -> None:
        """Move everything but the UNet off the device: a training from a cache needs it at examinations only."""
        for part in self._parts:
            part.to("cpu")

    @contextmanager
    def present(self) -> Iterator[None]:
        """Within the context all parts are on the device; afterwards where they were."""
        before = [part.device for part in self._parts]
        for part in self._parts:
            part.to(self.device)
        try:
            yield
        finally:
            for part, device in zip(self._parts, before, strict=True):
                part.to(device)

    def encode(self, batch: Batch) -> Encoded:
        """Everything that does not change from one epoch to the next."""
        vae = self.pipe.vae
        with torch.no_grad():
            pixels = batch.pixels.to(vae.device, vae.dtype) / 127.5 - 1
            posterior = vae.encode(pixels).latent_dist
        weight = None
        if batch.mask is not None:
            weight = torch.nn.functional.adaptive_avg_pool2d(batch.mask.to(vae.device).float() / 255, posterior.mean.shape[-2:])
        return Encoded(
            self._latent(posterior.mean), posterior.std * vae.config.scaling_factor, self.text(batch.texts), self.image(batch.references),
            batch.sizes, weight, batch.seeds, batch.counts if (batch.counts != 1).any() else None,
        )  # fmt: skip

    def _latent(self, mean: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def text(self, texts: Sequence[str]) -> Text:
        """As the pipeline encodes prompts. Equal captions are encoded once."""
        distinct = list(dict.fromkeys(texts))
        with torch.set_grad_enabled(self.words is not None and torch.is_grad_enabled()), self._spoken():
            found = self.pipe.encode_prompt(prompt=distinct, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        rows = torch.tensor([distinct.index(t) for t in texts], device=found[0].device)
        return Text(found[0][rows], found[2][rows] if len(found) == 4 else None)

    def _spoken(self) -> AbstractContextManager[None]:
        return self.words.spoken(self.pipe) if self.words else nullcontext()

    @torch.no_grad()
    def image(self, references: Tensor) -> Tensor:
        """(batch, references, 3, side, side) → (batch, references, patches, features)."""
        return self.encoder.features(references.flatten(0, 1), self.grid).to(self.device).unflatten(0, references.shape[:2])

    @torch.no_grad()
    def nulls(self, image: Tensor) -> Nulls:
        """Of the empty text, and of no picture as a method has it: (1, patches, features)."""
        return Nulls(self.text([""]), image[None].to(self.device))

    @torch.no_grad()
    def pictures(self, mean: Tensor) -> list[Image.Image]:
        """What the VAE makes of latents, (batch, channels, height, width), as `encode` gives them."""
        vae, config = self.pipe.vae, self.pipe.vae.config
        latents = mean.to(vae.device, vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.pipe.image_processor.postprocess(vae.decode(latents).sample)

    @torch.no_grad()
    def signature(self) -> dict[str, Tensor]:
        """What each part says to the same small input: two sets of encoders are alike when these are."""
        vae = self.pipe.vae
        ramp = torch.linspace(-1, 1, 64)
        picture = torch.stack([ramp[:, None].expand(64, 64), ramp[None].expand(64, 64), ramp[:, None] * ramp])[None]
        side = self.encoder.side
        seen = torch.nn.functional.interpolate(picture, (side, side), mode="bilinear")
        found = {
            "VAE": self._latent(vae.encode(picture.to(vae.device, vae.dtype)).latent_dist.mean),
            "text encoder": self.text(["a cat on a beach"]).states,
            "image encoder": self.encoder.features(seen, self.grid),
        }
        return {name: tensor.half().cpu() for name, tensor in found.items()}


def extras(unet: Any, encoded: Encoded, text: Text) -> dict[str, Any]:
    """Further arguments of the denoiser: SDXL is told the pooled text and the sizes."""
    if unet.config.addition_embed_type != "text_time":
        return {}
    return {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": encoded.sizes.to(text.states)}}
