"""Image encoders: pictures → features, pooled or grid, and the features of nothing. Also what sees pixels or latents as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from imprompt.errors import UserError, brief


class Encoder(Protocol):
    """What turns pictures into what a method reads: (pictures, patches, width)."""

    model: Any  # the part that is moved between devices
    side: int  # of the pictures that `prepare` makes

    def width(self, grid: bool) -> int: ...
    def prepare(self, images: Sequence[Image.Image]) -> Tensor: ...
    def features(self, pixels: Tensor, grid: bool) -> Tensor: ...
    def encode(self, images: Sequence[Image.Image], grid: bool) -> Tensor: ...
    def null(self, grid: bool) -> Tensor: ...


class ImageEncoder:
    """A CLIP image encoder. Features are always (pictures, patches, width); the pooled embedding is one patch."""

    def __init__(self, model: CLIPVisionModelWithProjection, processor: CLIPImageProcessor | None = None):
        self.model = model.eval().requires_grad_(False)
        self.side = side = model.config.image_size
        self.processor = processor or CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @classmethod
    def load(cls, source: str | Path, subfolder: str | None = None, dtype: torch.dtype | None = None) -> "ImageEncoder":
        """From a local folder or a hub id. Raises UserError where there is none."""
        where = {"subfolder": subfolder} if subfolder else {}
        try:
            model, found = CLIPVisionModelWithProjection.from_pretrained(
                source, dtype=dtype or torch.float32, output_loading_info=True, **where
            )
            if missing := found["missing_keys"]:  # transformers would make them up
                raise ValueError(f"{len(missing)} of its tensors are missing")
        except Exception as error:  # for missing, damaged and other models the library raises nearly anything
            place = f"{source}/{subfolder}" if subfolder else str(source)
            raise UserError(
                f"no CLIP image encoder at {place} ({brief(error)}); "
                "give a folder or hub id with --encoder (offline, only folders and the local cache work)"
            ) from error
        try:
            processor = CLIPImageProcessor.from_pretrained(source, **where)
        except (OSError, ValueError):  # adapter repositories ship the encoder without its processor
            processor = None
        return cls(model, processor)

    def width(self, grid: bool) -> int:
        """Width of the features: of the grid, or of the pooled embedding."""
        return self.model.config.hidden_size if grid else self.model.config.projection_dim

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """(pictures, 3, side, side), in float32 on the CPU: resized, centre-cropped and normalised as the encoder was trained."""
        return self.processor(images=list(images), return_tensors="pt").pixel_values

    @torch.no_grad()
    def features(self, pixels: Tensor, grid: bool) -> Tensor:
        """Pooled: (pictures, 1, width), the projected embedding. Grid: (pictures, patches, width), the penultimate states."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        if grid:
            return self.model(pixels, output_hidden_states=True).hidden_states[-2]
        return self.model(pixels).image_embeds[:, None]

    def encode(self, images: Sequence[Image.Image], grid: bool) -> Tensor:
        """Features of pictures, (pictures, patches, width)."""
        return self.features(self.prepare(images), grid)

    def null(self, grid: bool) -> Tensor:
        """Features of no image, (1, patches, width): a zero embedding; for the grid, what the encoder says to zero pixels."""
        if not grid:
            return torch.zeros(1, 1, self.width(grid), dtype=self.model.dtype, device=self.model.device)
        return self.features(torch.zeros(1, 3, self.side, self.side), grid)


class PixelEncoder:
    """Features are the pixels themselves, in −1 … 1: (pictures, side · side, 3)."""

    def __init__(self, side: int):
        self.side = side
        self.model: Any = nn.Identity()

    def width(self, grid: bool) -> int:
        return 3

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """(pictures, 3, side, side): the shorter side resized, the middle cut out."""
        squares = [ImageOps.fit(image.convert("RGB"), (self.side, self.side), Image.Resampling.BICUBIC) for image in images]
        return torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2).float() / 127.5 - 1

    def features(self, pixels: Tensor, grid: bool) -> Tensor:
        return pixels.flatten(2).transpose(1, 2)

    def encode(self, images: Sequence[Image.Image], grid: bool) -> Tensor:
        return self.features(self.prepare(images), grid)

    def null(self, grid: bool) -> Tensor:
        """Grey."""
        return torch.zeros(1, self.side**2, 3)


class LatentEncoder(PixelEncoder):
    """Features are a VAE's latents: (pictures, height · width, channels)."""

    def __init__(self, vae: Any, side: int):
        super().__init__(side)
        self.model = vae

    def width(self, grid: bool) -> int:
        return self.model.config.latent_channels

    @torch.no_grad()
    def features(self, pixels: Tensor, grid: bool) -> Tensor:
        latents = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.mean * self.model.config.scaling_factor
        return latents.flatten(2).transpose(1, 2)

    def null(self, grid: bool) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.features(torch.zeros(1, 3, self.side, self.side), grid))


class NothingEncoder:
    """Sees nothing: for methods that learn their subject and are shown no picture. Features are one zero."""

    side = 1

    def __init__(self) -> None:
        self.model: Any = nn.Identity()

    def width(self, grid: bool) -> int:
        return 1

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """(pictures, 3, 1, 1) of zeros."""
        return torch.zeros(len(images), 3, 1, 1)

    def features(self, pixels: Tensor, grid: bool) -> Tensor:
        """(pictures, 1, 1) of zeros."""
        return pixels.new_zeros(len(pixels), 1, 1)

    def encode(self, images: Sequence[Image.Image], grid: bool) -> Tensor:
        return self.features(self.prepare(images), grid)

    def null(self, grid: bool) -> Tensor:
        return torch.zeros(1, 1, 1)
