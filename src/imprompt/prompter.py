"""Prompter = encoder + adapter: pictures in, an image prompt out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from imprompt import checkpoints, hub
from imprompt.checkpoints import Spec
from imprompt.config import COMBINE
from imprompt.core.adapter import Adapter
from imprompt.core.aggregators import AGGREGATORS, Aggregator
from imprompt.core.attention import KeyValues
from imprompt.core.projectors import Resampler
from imprompt.core.scales import Scale
from imprompt.encoders import ImageEncoder
from imprompt.errors import ImageError, UserError
from imprompt.images import Picture, fit, open_image


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Reference pictures as an adapter hears them. A value: `replace(prompt, scale=0.4)` gives another one."""

    adapter: Adapter = field(repr=False)
    features: Tensor = field(repr=False)  # (1 or prompts, references, patches, features)
    null: Tensor = field(repr=False)  # (1, 1, patches, features)
    scale: Scale = 1.0
    mask: Tensor | None = field(default=None, repr=False)  # (H, W) in 0 … 1
    start: float = 0.0
    end: float = 1.0
    weights: Tensor | None = field(default=None, repr=False)  # (references,): 2 is the same as the reference given twice
    aggregator: Aggregator | None = field(default=None, repr=False)  # instead of the adapter's own

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"expected 0 ≤ start ≤ end ≤ 1, received start={self.start}, end={self.end}")

    @torch.no_grad()
    def key_values(self) -> tuple[dict[int, KeyValues], dict[int, KeyValues]]:
        """Keys and values of the null and of the image, from one batched pass: (1 or prompts, tokens, hidden) each."""
        which = self.together.chosen(self.features.shape[1])
        features, weights = self.features[:, which], None if self.weights is None else self.weights[which]
        prompts, references = features.shape[:2]
        if type(self.together) is not Aggregator:
            both = torch.cat([self.null.expand(1, references, -1, -1), features]).to(next(self.adapter.parameters()))
            weights = None if weights is None else weights.to(both).expand(len(both), -1)
            each = self.adapter(both, weights, self.together)
            return (
                {n: KeyValues(*(x[:1] for x in pair)) for n, pair in each.items()},
                {n: KeyValues(*(x[1:] for x in pair)) for n, pair in each.items()},
            )
        pictures = torch.cat([self.null, features.flatten(0, 1)[:, None]])  # the null once, then every reference
        each = self.adapter(pictures.to(next(self.adapter.parameters())))
        null = {n: KeyValues(*(x[:1].repeat(1, references, 1) for x in pair)) for n, pair in each.items()}
        image = {n: KeyValues(*(x[1:].unflatten(0, (prompts, references)).flatten(1, 2) for x in pair)) for n, pair in each.items()}
        return null, image

    @property
    def together(self) -> Aggregator:
        """What brings the references together."""
        return self.aggregator or self.adapter.aggregator

    def bias(self) -> Tensor | None:
        """Of references that lie side by side: the logarithm of the weight of each token, (1, tokens)."""
        if self.weights is None or not self.together.beside:
            return None
        tokens = self.adapter.tokens(self.features[:1, :1].to(next(self.adapter.parameters()))).shape[1]
        return self.weights[self.together.chosen(len(self.weights))].log().repeat_interleave(tokens)[None]

    def scaled(self, scale: Scale) -> "ImagePrompt":
        """The same prompt with another λ."""
        return replace(self, scale=scale)


class Prompter:
    """An adapter with the image encoder that it was trained for."""

    def __init__(self, adapter: Adapter, spec: Spec, encoder: ImageEncoder):
        width = encoder.width(spec.grid)
        if width != spec.features:
            raise UserError(
                f"the image encoder does not fit the adapter: expected {spec.encoder}, "
                f"received features of width {width}; choose another with --encoder"
            )
        self.adapter, self.spec, self.encoder = adapter, spec, encoder

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        scale: Scale = 1.0,
        mask: Picture | Tensor | None = None,
        start: float = 0.0,
        end: float = 1.0,
        fit: str = "crop",
        weights: Sequence[float] | None = None,
        combine: str | None = None,
    ) -> ImagePrompt:
        """An image prompt from one picture, or from several of one subject.

        scale is λ (a number, or a mapping from blocks to numbers); mask is white where the prompt is heard; start and
        end are progress through the noise schedule, 0 … 1; fit says what happens to pictures that are not square.
        weights has a number for each picture: 2 is the same as giving it twice, 0 as leaving it out. combine brings several
        together without training: one of config.COMBINE (default: as the adapter was trained, or side by side).
        """
        together = combined(combine, self.adapter)
        features, null = self.encode(images, fit)
        where = None if mask is None else _mask(mask)
        return ImagePrompt(self.adapter, features[None], null[None], scale, where, start, end, _weights(weights, len(features)), together)

    def encode(self, images: Picture | Sequence[Picture], fit_: str = "crop") -> tuple[Tensor, Tensor]:
        """Features of the pictures, (references, patches, width), and of the null, (1, patches, width)."""
        pictures = [images] if isinstance(images, (str, Path, bytes, Image.Image)) else list(images)
        if not pictures:
            raise ImageError("an image prompt needs at least one picture")
        opened = [fit(open_image(picture), fit_) for picture in pictures]
        return self.encoder.encode(opened, self.spec.grid), self.encoder.null(self.spec.grid)

    def to(self, device: torch.device | str) -> "Prompter":
        """Move encoder and adapter."""
        self.adapter.to(device)
        self.encoder.model.to(device)
        return self


def combined(name: str | None, adapter: Adapter) -> Aggregator | None:
    """What brings references together without training, by name; None where the adapter's own does. Raises UserError."""
    if name is None:
        return None
    if name not in COMBINE:
        raise UserError(f"combine: expected one of {', '.join(COMBINE)}, received {name!r}")
    if name == "joint" and not isinstance(adapter.image_proj, Resampler):
        raise UserError("combine: joint lays the references' patches before a resampler, and this adapter has none; take average")
    return AGGREGATORS[name](0, 0)


def _weights(weights: Sequence[float] | None, count: int) -> Tensor | None:
    if weights is None:
        return None
    if len(weights) != count:
        raise UserError(f"weights: expected one for each of the {count} references, received {len(weights)}")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise UserError(f"weights: expected numbers of at least 0, and one above it; received {', '.join(map(str, weights))}")
    return torch.tensor(weights, dtype=torch.float32)


def _mask(mask: Picture | Tensor) -> Tensor:
    if isinstance(mask, Tensor):
        if mask.ndim != 2:
            raise UserError(f"expected a mask of shape (height, width), received {tuple(mask.shape)}")
        return mask.float()
    grey = open_image(mask).convert("L")
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).reshape(grey.height, grey.width) / 255


def find_encoder(base: str, named: str | None, spec: Spec | None = None) -> ImageEncoder:
    """The image encoder: the one named, the base's own, or the one the adapter was trained with."""
    if named:
        return ImageEncoder.load(named)
    if base == "mini":
        return ImageEncoder.load(hub.MINI / "image_encoder")
    if spec is not None:
        return ImageEncoder.load(*hub.default_encoder(spec))
    return ImageEncoder.load(*hub.RELEASED_ENCODER)


def load(source: str | Path, weight: str | None = None, encoder: str | Path | None = None) -> Prompter:
    """Load an adapter and its encoder.

    `source` is a file, or a hub id with the file's path in the repository as `weight`:
    `load("h94/IP-Adapter", "models/ip-adapter_sd15.safetensors")`. `mini` and `mini-plus` are the embedded adapters.
    The encoder is found from the adapter's shapes; `encoder` (a folder or a hub id) overrules. Offline, with
    HF_HUB_OFFLINE=1, hub ids are looked up in the local cache only.
    """
    path, found = hub.find_adapter(str(source), weight)
    adapter, spec = checkpoints.load_adapter(path)
    where = (str(encoder), None) if encoder else found or hub.default_encoder(spec)
    return Prompter(adapter, spec, ImageEncoder.load(*where))
