"""Image encoders: pictures → features, pooled or grid, and the features of nothing."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from imprompt.errors import UserError, brief


class ImageEncoder:
    """A CLIP image encoder. Features are always (pictures, patches, width); the pooled embedding is one patch."""

    def __init__(self, model: CLIPVisionModelWithProjection, processor: CLIPImageProcessor | None = None):
        self.model = model.eval().requires_grad_(False)
        side = model.config.image_size
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

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(pictures, 3, side, side): resized, centre-cropped and normalised as the encoder was trained."""
        return self.prepare(images).to(self.model.device, self.model.dtype)

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """The same in float32 on the CPU."""
        return self.processor(images=list(images), return_tensors="pt").pixel_values

    @torch.no_grad()
    def features(self, pixels: Tensor, grid: bool) -> Tensor:
        """Pooled: (pictures, 1, width), the projected embedding. Grid: (pictures, patches, width), the penultimate states."""
        if grid:
            return self.model(pixels, output_hidden_states=True).hidden_states[-2]
        return self.model(pixels).image_embeds[:, None]

    def encode(self, images: Sequence[Image.Image], grid: bool) -> Tensor:
        """Features of pictures, (pictures, patches, width)."""
        return self.features(self.pixels(images), grid)

    def null(self, grid: bool) -> Tensor:
        """Features of no image, (1, patches, width): a zero embedding; for the grid, what the encoder says to zero pixels."""
        if not grid:
            return torch.zeros(1, 1, self.width(grid), dtype=self.model.dtype, device=self.model.device)
        side = self.model.config.image_size
        return self.features(torch.zeros(1, 3, side, side, dtype=self.model.dtype, device=self.model.device), grid)
