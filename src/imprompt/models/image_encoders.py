"""Feature encoders: CLIP image encoders with pooled or patch features, and encoders that return pixels, latents or nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, SiglipImageProcessor, SiglipVisionModel

from imprompt.errors import UserError
from imprompt.models import hub
from imprompt.models.feature_distribution import FeatureDistribution, distribution_features
from imprompt.models.tensor_files import check_finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class FeatureEncoder(Protocol):
    """Turns images into the features that a method is conditioned on: (images, patches, embed_dim).

    `patches` selects one feature per patch; otherwise the features are pooled, which counts as one patch.
    """

    image_size: int  # side in pixels of preprocessed images

    @property
    def model(self) -> nn.Module:
        """The part that is moved between devices."""

    def embed_dim(self, *, patches: bool) -> int:
        """The last dimension of the features."""

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """The input of `encode_pixels`: (images, 3, image_size, image_size) in float32 on the CPU."""

    def encode_pixels(self, pixels: Tensor, *, patches: bool) -> Tensor:
        """Features of preprocessed images: (images, patches, embed_dim)."""

    def encode_images(self, images: Sequence[Image.Image], *, patches: bool) -> Tensor:
        """Features of images: (images, patches, embed_dim)."""

    def uncond_features(self, *, patches: bool) -> Tensor:
        """Features that stand for no image, for classifier-free guidance: (1, patches, embed_dim)."""


class ImageEncoder:
    """A CLIP image encoder, whose pooled features are the projected embedding."""

    model_class: ClassVar[Any] = CLIPVisionModelWithProjection
    processor_class: ClassVar[Any] = CLIPImageProcessor

    def __init__(
        self,
        model: CLIPVisionModelWithProjection | SiglipVisionModel,
        processor: Any = None,
        distribution: FeatureDistribution | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.distribution = distribution  # of the images that the base model knows, where it knows only a small world
        self.image_size = side = model.config.image_size
        self.processor = processor or self._default_processor(side)

    @classmethod
    def _default_processor(cls, side: int) -> Any:
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @classmethod
    def load(cls, source: str | Path, subfolder: str | None = None, dtype: torch.dtype | None = None) -> "ImageEncoder":
        """From a local folder or a hub id. Raises UserError where there is none."""
        location = {"subfolder": subfolder} if subfolder else {}
        hub.prepare(source)
        try:
            model, info = cls.model_class.from_pretrained(source, dtype=dtype or torch.float32, output_loading_info=True, **location)
            if missing := info["missing_keys"]:  # transformers would initialize them at random
                raise ValueError(f"{len(missing)} of its tensors are missing")
        except Exception as error:  # missing, damaged and other models make the library raise nearly any exception
            raise UserError(
                f"no {cls._family()} image encoder at {f'{source}/{subfolder}' if subfolder else source} ({hub.explain_failure(error)}); "
                "give a folder or hub id with --image-encoder (offline, only folders and the local cache work)"
            ) from error
        check_finite(model, f"{source}/{subfolder}" if subfolder else str(source))
        try:
            processor = cls.processor_class.from_pretrained(source, **location)
        except (OSError, ValueError):  # adapter repositories contain the encoder without its processor
            processor = None
        return cls(model, processor, FeatureDistribution.load(Path(source) / (subfolder or "")))

    @classmethod
    def _family(cls) -> str:
        return "CLIP"

    def embed_dim(self, *, patches: bool) -> int:
        """The dimension of the patch features, or of the pooled embedding."""
        return int(self.model.config.hidden_size if patches else self.model.config.projection_dim)

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, 3, image_size, image_size), in float32 on the CPU: resized, center-cropped and normalized as for training."""
        pixels: Tensor = self.processor(images=list(images), return_tensors="pt").pixel_values
        return pixels

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, *, patches: bool) -> Tensor:
        """Pooled: (images, 1, embed_dim), the projected embedding. Patches: (images, patches, embed_dim), the penultimate hidden states."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        if patches:
            return self.model(pixels, output_hidden_states=True).hidden_states[-2]
        return self.model(pixels).image_embeds[:, None]

    def encode_images(self, images: Sequence[Image.Image], *, patches: bool) -> Tensor:
        """Features of images: (images, patches, embed_dim)."""
        return self.encode_pixels(self.preprocess(images), patches=patches)

    def find_unfamiliar(self, images: Sequence[Image.Image]) -> list[int]:
        """The images that are far from everything the base model was trained on; none where that is not known."""
        if self.distribution is None or not images:
            return []
        distances = self.distribution.distances(distribution_features(self, self.preprocess(images)))
        return (distances > self.distribution.max_distance).nonzero()[:, 0].tolist()

    def uncond_features(self, *, patches: bool) -> Tensor:
        """(1, patches, embed_dim): zeros for the pooled embedding; for patches, the features of pixels that are zero."""
        if not patches:
            return torch.zeros(1, 1, self.embed_dim(patches=False), dtype=self.model.dtype, device=self.model.device)
        return self.encode_pixels(torch.zeros(1, 3, self.image_size, self.image_size), patches=True)


class SiglipEncoder(ImageEncoder):
    """A SigLIP image encoder, whose pooled features are its pooler's output. No image is zeros, also for patches."""

    model_class = SiglipVisionModel
    processor_class = SiglipImageProcessor

    @classmethod
    def _default_processor(cls, side: int) -> Any:
        return SiglipImageProcessor(size={"height": side, "width": side})

    @classmethod
    def _family(cls) -> str:
        return "SigLIP"

    def embed_dim(self, *, patches: bool) -> int:
        """The dimension of all features."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, *, patches: bool) -> Tensor:
        """Pooled: (images, 1, embed_dim), the pooler's output. Patches: (images, patches, embed_dim), the penultimate hidden states."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        out = self.model(pixels, output_hidden_states=patches)
        return out.hidden_states[-2] if patches else out.pooler_output[:, None]

    def uncond_features(self, *, patches: bool) -> Tensor:
        """(1, patches, embed_dim) of zeros."""
        config = self.model.config
        count = (config.image_size // config.patch_size) ** 2 if patches else 1
        return torch.zeros(1, count, config.hidden_size, dtype=self.model.dtype, device=self.model.device)


class PixelEncoder:
    """Features are the pixels themselves, in −1 … 1: (images, image_size², 3). `patches` has no effect."""

    def __init__(self, image_size: int):
        self.image_size = image_size
        self.model: nn.Module = nn.Identity()

    def embed_dim(self, *, patches: bool) -> int:
        """The three color channels."""
        return 3

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, 3, image_size, image_size) in −1 … 1: resized by the shorter side and center-cropped."""
        size = (self.image_size, self.image_size)
        squares = [ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC) for image in images]
        return torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2).float() / 127.5 - 1

    def encode_pixels(self, pixels: Tensor, *, patches: bool) -> Tensor:
        """(images, 3, height, width) → (images, height · width, 3)."""
        return pixels.flatten(2).transpose(1, 2)

    def encode_images(self, images: Sequence[Image.Image], *, patches: bool) -> Tensor:
        """Features of images: (images, patches, embed_dim)."""
        return self.encode_pixels(self.preprocess(images), patches=patches)

    def uncond_features(self, *, patches: bool) -> Tensor:
        """A gray image: zeros."""
        return torch.zeros(1, self.image_size**2, 3)


class LatentEncoder(PixelEncoder):
    """Features are a VAE's latents: (images, height · width, channels). `patches` has no effect."""

    def __init__(self, vae: "AutoencoderKL", image_size: int):
        super().__init__(image_size)
        self.model: AutoencoderKL = vae

    def embed_dim(self, *, patches: bool) -> int:
        """The channels of the latents."""
        return int(self.model.config.latent_channels)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, *, patches: bool) -> Tensor:
        """The mean of the VAE's posterior, scaled: (images, 3, height, width) → (images, patches, channels)."""
        latents = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.mean * self.model.config.scaling_factor
        return latents.flatten(2).transpose(1, 2)

    def uncond_features(self, *, patches: bool) -> Tensor:
        """Latents of zeros."""
        return torch.zeros_like(self.encode_pixels(torch.zeros(1, 3, self.image_size, self.image_size), patches=patches))


class NullEncoder(PixelEncoder):
    """For methods that fine-tune on their subject and are conditioned on no image: features are a single zero."""

    def __init__(self) -> None:
        super().__init__(image_size=1)

    def embed_dim(self, *, patches: bool) -> int:
        """One."""
        return 1

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, 3, 1, 1) of zeros."""
        return torch.zeros(len(images), 3, 1, 1)

    def encode_pixels(self, pixels: Tensor, *, patches: bool) -> Tensor:
        """(images, 1, 1) of zeros."""
        return pixels.new_zeros(len(pixels), 1, 1)

    def uncond_features(self, *, patches: bool) -> Tensor:
        """(1, 1, 1) of zeros."""
        return torch.zeros(1, 1, 1)
