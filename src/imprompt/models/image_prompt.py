"""Prompter = encoder + adapter: pictures in, an image prompt out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imprompt.config import COMBINE
from imprompt.core.adapter import Adapter
from imprompt.core.aggregation import AGGREGATORS, Aggregator
from imprompt.core.attention import KeyValues
from imprompt.core.conditioning import Scale
from imprompt.core.image_projection import FaceProjector, Resampler
from imprompt.errors import ImageError, UserError
from imprompt.models import checkpoints, hub
from imprompt.models.checkpoints import Spec
from imprompt.models.face_encoders import FaceEncoder, read_faces
from imprompt.models.image_encoders import Encoder, ImageEncoder
from imprompt.utils.images import Picture, fit, open_image, squares

Faces = Tensor | np.ndarray | str | Path  # identity embeddings, or a file of them


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
        which = self._chosen()
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
        each = self.adapter(pictures.to(next(self.adapter.parameters())), None, self.together)
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
        tokens = self.adapter.tokens(self.features[:1, :1].to(next(self.adapter.parameters())), None, self.together).shape[1]
        return self.weights[self._chosen()].log().repeat_interleave(tokens)[None]

    def _chosen(self) -> list[int]:
        """Which references are read, of those that have a weight."""
        heard = list(range(self.features.shape[1])) if self.weights is None else self.weights.nonzero()[:, 0].tolist()
        return [heard[n] for n in self.together.chosen(len(heard))]

    def save(self, path: str | Path) -> None:
        """Keep it in a `.safetensors` file; `Prompter.read` makes it again without the pictures."""
        tensors = {"features": self.features, "null": self.null, "weights": self.weights, "mask": self.mask}
        scale = dict(self.scale) if isinstance(self.scale, Mapping) else self.scale
        how = self.aggregator.name if self.aggregator else ""
        about = {"prompt": {"scale": scale, "start": self.start, "end": self.end, "combine": how, "adapter": _sums(self.adapter)}}
        if Path(path).suffix != ".safetensors":
            raise UserError(f"an image prompt is kept in a .safetensors file, received {Path(path).name}")
        checkpoints.write({name: value for name, value in tensors.items() if value is not None}, path, about)

    def scaled(self, scale: Scale) -> "ImagePrompt":
        """The same prompt with another λ."""
        return replace(self, scale=scale)


class Prompter:
    """An adapter with the image encoder that it was trained for."""

    def __init__(self, adapter: Adapter, spec: Spec, encoder: Encoder):
        width = encoder.width(spec.grid)
        if width != spec.features:
            raise UserError(
                f"the image encoder does not fit the adapter: expected {spec.encoder}, "
                f"received features of width {width}; choose another with --encoder"
            )
        self.adapter, self.spec, self.encoder = adapter, spec, encoder

    def __call__(
        self,
        images: Picture | Sequence[Picture] = (),
        scale: Scale = 1.0,
        mask: Picture | Tensor | None = None,
        start: float = 0.0,
        end: float = 1.0,
        fit: str = "crop",
        weights: Sequence[float] | None = None,
        combine: str | None = None,
        negative: Picture | None = None,
        faces: Faces | None = None,
    ) -> ImagePrompt:
        """An image prompt from one picture, or from several of one subject.

        scale is λ (a number, or a mapping from blocks to numbers); mask is white where the prompt is heard; start and
        end are progress through the noise schedule, 0 … 1; fit says what happens to pictures that are not square.
        weights has a number for each picture: 2 is the same as giving it twice, 0 as leaving it out. combine brings several
        together without training: one of config.COMBINE (default: as the adapter was trained, or side by side). What is drawn is
        guided away from `negative`, instead of from no image at all.

        Adapters of the FaceID family hear who somebody is: `faces` are identity embeddings, (faces, 512), or a `.npy` or
        `.safetensors` file of them; without, they are computed from the pictures by InsightFace (pip install 'imprompt[faces]').
        FaceID-Plus hears the faces' pictures too, which are cut out of yours; beside `faces`, as you give them, one for each.
        """
        together = combined(combine, self.adapter)
        pictures = [images] if isinstance(images, (str, Path, bytes, Image.Image)) else list(images)
        if isinstance(self.encoder, FaceEncoder):
            features, null = _of_faces(self.encoder, pictures, faces, fit), self.encoder.null(self.spec.grid)
            if negative is not None:
                null = _of_faces(self.encoder, [negative], None, fit)
            given = _weights(weights, len(features))
        elif faces is not None:
            raise UserError(f"faces: a {self.spec.kind} adapter hears pictures; expected one of the FaceID family")
        else:
            tiles = [squares(open_image(picture), fit) for picture in pictures]
            features, null = self.encode([tile for of_one in tiles for tile in of_one])
            given = _weights(weights, len(pictures))
            if given is not None:
                given = given.repeat_interleave(torch.tensor([len(of_one) for of_one in tiles]))
            if negative is not None:
                null = self.encode(negative, "pad" if fit == "tile" else fit)[0]
        where = None if mask is None else as_mask(mask)
        return ImagePrompt(self.adapter, features[None], null[None], scale, where, start, end, given, together)

    def each(self, images: Sequence[Picture | Sequence[Picture]], **more: Any) -> ImagePrompt:
        """One image prompt for a batch of prompts, each with references of its own; as many for each.

        `more` is what a single call takes, weights for every prompt alike. The pipeline is given as many prompts.
        """
        apart = [self(pictures, **more) for pictures in images]
        counts = {prompt.features.shape[1] for prompt in apart}
        if len(counts) != 1:
            raise UserError(f"each: expected as many references for every prompt, received {', '.join(map(str, sorted(counts)))}")
        return replace(apart[0], features=torch.cat([prompt.features for prompt in apart]))

    def read(self, path: str | Path) -> ImagePrompt:
        """An image prompt that was kept with `ImagePrompt.save`. Raises UserError where it is none, or another adapter's."""
        path = Path(path)
        tensors, about = checkpoints.read_tensors(path)
        kept = about.get("prompt")
        if not isinstance(kept, dict) or not {"features", "null"} <= set(tensors):
            raise UserError(f"{path.name} holds no image prompt; expected a file that ImagePrompt.save or --save-prompt wrote")
        mine, theirs = _sums(self.adapter), kept.get("adapter")
        if not isinstance(theirs, list) or len(theirs) != len(mine) or not all(map(_close, mine, theirs)):
            raise UserError(f"{path.name} was made with another adapter; expected the same one, or make it anew from the pictures")
        device = next(self.adapter.parameters()).device
        features, null = tensors["features"].to(device), tensors["null"].to(device)
        together = combined(kept.get("combine") or None, self.adapter)
        scale, start, end = kept.get("scale", 1.0), float(kept.get("start", 0)), float(kept.get("end", 1))
        return ImagePrompt(self.adapter, features, null, scale, tensors.get("mask"), start, end, tensors.get("weights"), together)

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


def _of_faces(encoder: FaceEncoder, pictures: list[Picture], faces: Faces | None, fit_: str) -> Tensor:
    """Features of the FaceID family: of faces that are given, or of those that are found in the pictures."""
    opened = [open_image(picture) for picture in pictures]
    if faces is not None:
        return encoder.beside(read_faces(faces, encoder.face), [fit(image, "pad" if fit_ == "tile" else fit_) for image in opened])
    if not opened:
        raise UserError("a FaceID adapter needs a face: give pictures, or identity embeddings as faces")
    return encoder.prepare(opened)


def _sums(adapter: Adapter) -> list[float]:
    """By which an adapter is known again, whatever device and precision it is used in."""
    return [float(p.detach().cpu().double().abs().sum()) for p in adapter.image_proj.parameters()]


def _close(mine: float, theirs: Any) -> bool:
    return isinstance(theirs, (int, float)) and math.isclose(mine, theirs, rel_tol=0.01)


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


def as_mask(mask: Picture | Tensor) -> Tensor:
    """A picture, white where the prompt is heard, as (height, width) in 0 … 1; a tensor stays."""
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
    where = (str(encoder), None) if encoder else found
    if spec.faces and not spec.grid:
        return Prompter(adapter, spec, FaceEncoder(spec.features, normalised=spec.normalised))
    picture = ImageEncoder.load(*(where or hub.default_encoder(spec)))
    if isinstance(adapter.image_proj, FaceProjector):
        return Prompter(adapter, spec, FaceEncoder(adapter.image_proj.face, picture, spec.normalised))
    return Prompter(adapter, spec, picture)
