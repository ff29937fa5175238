"""Image prompts: reference images encoded for an adapter, as values, and the encoder that makes them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imprompt.config import TRAINING_FREE_AGGREGATIONS
from imprompt.core.adapter import Adapter
from imprompt.core.aggregation import AGGREGATORS, Aggregator
from imprompt.core.attention import KeyValues
from imprompt.core.conditioning import Scale, check_scale, check_window
from imprompt.core.image_projection import FaceIDPlusProjection, Resampler
from imprompt.errors import ImageError, UserError, notify
from imprompt.models import checkpoints, hub
from imprompt.models.checkpoints import AdapterSpec
from imprompt.models.face_encoders import FaceEncoder, load_id_embeds
from imprompt.models.image_encoders import FeatureEncoder, ImageEncoder, SiglipEncoder
from imprompt.models.tensor_files import read_tensors, write_tensors
from imprompt.utils.image_paths import expand_images
from imprompt.utils.images import ImageInput, list_images, name_of, open_image, open_mask, resize_to_square, tile_to_squares

FaceEmbeds = Tensor | np.ndarray | str | Path  # identity embeddings, or a file of them


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Encoded reference images and how they condition the UNet. A value: `replace(prompt, scale=0.4)` returns another one."""

    adapter: Adapter = field(repr=False)
    image_features: Tensor = field(repr=False)  # (1 or prompts, references, patches, embed_dim)
    uncond_features: Tensor = field(repr=False)  # (1, 1, patches, embed_dim)
    scale: Scale = 1.0
    mask: Tensor | None = field(default=None, repr=False)  # (height, width), or one for each frame of a video, in 0 … 1
    start_at: float = 0.0  # of denoising, 0 … 1
    end_at: float = 1.0
    reference_weights: Tensor | None = field(default=None, repr=False)  # (references,): 2 is the same as the reference given twice
    aggregator: Aggregator | None = field(default=None, repr=False)  # instead of the adapter's own
    frame_weights: Tensor | None = field(default=None, repr=False)  # (frames,): a factor of the scale for each frame of a video

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_window(self.start_at, self.end_at)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are wanted of the adapter or of the features."""
        return self.image_features.requires_grad or any(parameter.requires_grad for parameter in self.adapter.parameters())

    def key_values(self, timestep: float | None = None) -> tuple[dict[int, KeyValues], dict[int, KeyValues]]:
        """Keys and values of no image and of the references: (1, tokens, hidden_dim) and (1 or prompts, tokens, hidden_dim).

        timestep: 0 … 1000, for adapters whose keys and values depend on it.

        Each prompt has a pass of its own, so that it does not depend on the others of its batch: matrix products of another
        size differ in the last digits, which a UNet in bfloat16 amplifies. With gradients, where autograd is on.
        """
        per_prompt = [self._key_values(features, timestep) for features in self.image_features.split(1)]
        uncond = per_prompt[0][0]
        image = {n: KeyValues(*map(torch.cat, zip(*(image[n] for _, image in per_prompt), strict=True))) for n in uncond}
        if not all(bool(tensor.isfinite().all()) for part in (uncond, image) for pair in part.values() for tensor in pair):
            raise UserError(
                "the keys and values of the image prompt are not finite: the adapter's weights or the image features are too large for "
                f"{next(iter(image.values())).key.dtype}; choose another adapter, or another --dtype"
            )
        return uncond, image

    def _key_values(self, image_features: Tensor, timestep: float | None) -> tuple[dict[int, KeyValues], dict[int, KeyValues]]:
        """Those of no image and of one prompt, from one batched pass. image_features: (1, references, patches, embed_dim)."""
        selected, aggregator, like = self._selected_references(), self.active_aggregator, next(self.adapter.parameters())
        features, no_image = image_features[:, selected].to(like), self.uncond_features.to(like)  # a saved prompt may have float8
        prompts, references = features.shape[:2]
        if type(aggregator) is not Aggregator:
            batch = torch.cat([no_image.expand(1, references, -1, -1), features])
            weights = None if self.reference_weights is None else self.reference_weights[selected].to(batch).expand(len(batch), -1)
            key_values = self.adapter(batch, weights, aggregator, timestep)
            return _map_tensors(key_values, lambda x: x[:1]), _map_tensors(key_values, lambda x: x[1:])
        batch = torch.cat([no_image, features.flatten(0, 1)[:, None]])  # no image once, then every reference
        key_values = self.adapter(batch, None, aggregator, timestep)
        uncond = _map_tensors(key_values, lambda x: x[:1].repeat(1, references, 1))
        return uncond, _map_tensors(key_values, lambda x: x[1:].unflatten(0, (prompts, references)).flatten(1, 2))

    @property
    def active_aggregator(self) -> Aggregator:
        """How several references are aggregated: the prompt's own aggregator, or the adapter's."""
        return self.aggregator or self.adapter.aggregator

    def attention_bias(self) -> Tensor | None:
        """The logarithm of each image token's weight, (1, tokens), for weighted references that are concatenated; otherwise None."""
        if self.reference_weights is None or not self.active_aggregator.concatenates:
            return None
        features = self.image_features[:1, :1].to(next(self.adapter.parameters()))
        num_tokens = self.adapter.image_tokens(features, None, self.active_aggregator).shape[1]
        return self.reference_weights[self._selected_references()].log().repeat_interleave(num_tokens)[None]

    def _selected_references(self) -> list[int]:
        """The references that the aggregator uses, out of those whose weight is not zero."""
        count, weights = self.image_features.shape[1], self.reference_weights
        weighted = list(range(count)) if weights is None else weights.nonzero()[:, 0].tolist()
        return [weighted[n] for n in self.active_aggregator.select_references(len(weighted))]

    def save(self, path: str | Path) -> None:
        """Save it to a `.safetensors` file, from which `ImagePromptEncoder.load_prompt` restores it without the images."""
        if Path(path).suffix != ".safetensors":
            raise UserError(f"an image prompt is saved to a .safetensors file, received {Path(path).name}")
        names = ("image_features", "uncond_features", "reference_weights", "mask", "frame_weights")
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        settings = {
            "scale": dict(self.scale) if isinstance(self.scale, Mapping) else self.scale, "start_at": self.start_at, "end_at": self.end_at,
            "aggregation": self.aggregator.name if self.aggregator else "", "adapter": _adapter_fingerprint(self.adapter),
        }  # fmt: skip
        write_tensors(tensors, path, {"prompt": settings})

    def with_scale(self, scale: Scale) -> "ImagePrompt":
        """The same prompt with another λ."""
        return replace(self, scale=scale)


def _map_tensors(key_values: Mapping[int, KeyValues], function: Callable[[Tensor], Tensor]) -> dict[int, KeyValues]:
    return {n: KeyValues(*map(function, pair)) for n, pair in key_values.items()}


class ImagePromptEncoder:
    """An adapter with the image encoder that it was trained with: turns reference images into image prompts."""

    def __init__(self, adapter: Adapter, spec: AdapterSpec, encoder: FeatureEncoder):
        embed_dim = encoder.embed_dim(patches=spec.uses_patch_features)
        if embed_dim != spec.image_embed_dim:
            raise UserError(
                f"the image encoder does not fit the adapter: expected {spec.image_encoder}, "
                f"received features of dimension {embed_dim}; choose another with --image-encoder"
            )
        self.adapter, self.spec, self.encoder = adapter, spec, encoder

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] = (),
        *,
        scale: Scale = 1.0,
        mask: ImageInput | Sequence[ImageInput] | None = None,
        start_at: float = 0.0,
        end_at: float = 1.0,
        resize_mode: str = "crop",
        reference_weights: Sequence[float] | None = None,
        aggregation: str | None = None,
        negative_image: ImageInput | None = None,
        face_embeds: FaceEmbeds | None = None,
        frame_weights: Sequence[float] | None = None,
    ) -> ImagePrompt:
        """An image prompt from one reference image, or from several of one subject.

        scale: λ, a number, or a mapping from UNet blocks to numbers.
        mask: white where the image prompt applies; an image, or a tensor (height, width) in 0 … 1, stretched to the output; for a video
            also one for each frame.
        start_at, end_at: when it applies, as fractions of denoising, 0 … 1.
        resize_mode: crop, pad, squash or tile, for images that are not square.
        reference_weights: a number for each image; 2 is the same as giving it twice, 0 as leaving it out.
        aggregation: how several references are aggregated without training, one of config.TRAINING_FREE_AGGREGATIONS (default: as
            the adapter was trained, or by concatenation).
        negative_image: its features replace the unconditional ones, so that guidance leads away from it.
        face_embeds: identity embeddings, (faces, 512), or a `.npy` or `.safetensors` file of them, for adapters of the FaceID family;
            without them they are computed from the images by InsightFace (pip install 'imprompt[faces]'). FaceID-Plus also takes the
            image of each face: it is cropped from the images, or, with face_embeds, given as the images, one for each embedding.
        frame_weights: a factor of the scale for each frame of a video.

        Raises UserError for arguments that the adapter does not support, ImageError for images that cannot be used.
        """
        aggregator = build_aggregator(aggregation, self.adapter)
        features, weights = self.encode_references(images, resize_mode, reference_weights, face_embeds)
        uncond = self.encode_negative(negative_image, resize_mode)
        mask = None if mask is None else load_masks(mask)
        frames = None if frame_weights is None else _check_frame_weights(frame_weights)
        return ImagePrompt(self.adapter, features[None], uncond[None], scale, mask, start_at, end_at, weights, aggregator, frames)

    def encode_references(
        self,
        images: ImageInput | Sequence[ImageInput],
        resize_mode: str = "crop",
        reference_weights: Sequence[float] | None = None,
        face_embeds: FaceEmbeds | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Features of the references, (references, patches, embed_dim), and their weights, (references,) or None. A tile is a reference."""
        opened = [open_image(image) for image in expand_images(list_images(images))]
        if isinstance(self.encoder, FaceEncoder):
            features = _encode_faces(self.encoder, opened, face_embeds, resize_mode)
            return features, _check_weights(reference_weights, len(features))
        if face_embeds is not None:
            raise UserError(f"face_embeds: a {self.spec.adapter_type} adapter takes images; expected an adapter of the FaceID family")
        if not opened:
            raise ImageError("an image prompt needs at least one image")
        tiles = [tile_to_squares(image, resize_mode) for image in opened]
        weights = _check_weights(reference_weights, len(opened))
        if weights is not None:
            weights = weights.repeat_interleave(torch.tensor([len(group) for group in tiles]))
        self._report_unfamiliar(opened)
        patches = self.spec.uses_patch_features
        return self.encoder.encode_images([tile for group in tiles for tile in group], patches=patches), weights

    def _report_unfamiliar(self, images: Sequence[Image.Image]) -> None:
        """Say so where more than a quarter of the references are far from everything that the base model was trained on."""
        unfamiliar = self.encoder.find_unfamiliar(images) if isinstance(self.encoder, ImageEncoder) else []
        if len(unfamiliar) > len(images) / 4:
            which = "the reference is" if len(images) == 1 else f"{len(unfamiliar)} of {len(images)} references are"
            notify(f"mini only knows its own synthetic world, and {which} far from it: expect no likeness; for other images take "
                   "--model with Stable Diffusion and --adapter with an adapter for it")  # fmt: skip

    def encode_negative(self, negative_image: ImageInput | None = None, resize_mode: str = "crop") -> Tensor:
        """The features that guidance leads away from, (1, patches, embed_dim): those of no image, or of a negative image."""
        if negative_image is None and self.adapter.family.is_null_black:
            negative_image = Image.new("RGB", (self.encoder.image_size, self.encoder.image_size))
        if negative_image is None:
            return self.encoder.uncond_features(patches=self.spec.uses_patch_features)
        image = open_image(negative_image)
        if isinstance(self.encoder, FaceEncoder):
            return self.encoder.preprocess([image])
        return self.encoder.encode_images([_resize_whole(image, resize_mode)], patches=self.spec.uses_patch_features)

    def encode_batch(self, images: Sequence[ImageInput | Sequence[ImageInput]], **options: Any) -> ImagePrompt:
        """One image prompt for a batch of prompts, each with its own references; every prompt has the same number of them.

        `options` are those of a single call, the same for every prompt. The pipeline is called with as many prompts, or generates videos of
        as many frames, each with its own references.
        """
        prompts = [self(references, **options) for references in images]
        counts = {prompt.image_features.shape[1] for prompt in prompts}
        if len(counts) != 1:
            raise UserError(f"every prompt must have the same number of references, received {', '.join(map(str, sorted(counts)))}")
        return replace(prompts[0], image_features=torch.cat([prompt.image_features for prompt in prompts]))

    def load_prompt(self, path: str | Path) -> ImagePrompt:
        """An image prompt that `ImagePrompt.save` wrote. Raises UserError for another file, or where another adapter encoded it."""
        path = Path(path)
        tensors, metadata = read_tensors(path)
        settings = metadata.get("prompt")
        if not isinstance(settings, dict) or not {"image_features", "uncond_features"} <= set(tensors):
            raise UserError(f"{path.name} contains no image prompt; expected a file that ImagePrompt.save or --save-embeds wrote")
        expected, received = _adapter_fingerprint(self.adapter), settings.get("adapter")
        if not isinstance(received, list) or len(received) != len(expected) or not all(map(_is_close, expected, received)):
            raise UserError(f"{path.name} was made with another adapter; expected the same one, or encode the images again")
        try:
            return self._restore_prompt(tensors, settings)
        except UserError as error:
            raise UserError(f"{path.name} is no image prompt as ImagePrompt.save writes it: {error}; encode the images again") from error

    def _restore_prompt(self, tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> ImagePrompt:
        """An image prompt from the contents of its file. Raises UserError for tensors or settings that do not fit the adapter."""
        features, uncond, weights = tensors["image_features"], tensors["uncond_features"], tensors.get("reference_weights")
        if features.ndim != 4 or not features.numel() or not self._takes_features(*features.shape[2:]):
            raise UserError(f"image_features of this adapter have {self.spec.image_embed_dim} channels, received {tuple(features.shape)}")
        if uncond.shape != (1, 1, *features.shape[2:]):
            raise UserError(f"uncond_features should be {(1, 1, *features.shape[2:])}, received {tuple(uncond.shape)}")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not tensor.float().isfinite().all():
                received = "NaN or infinity" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"{name} should contain finite floating-point numbers, received {received}")
        device, frames = next(self.adapter.parameters()).device, tensors.get("frame_weights")
        return ImagePrompt(
            self.adapter, features.to(device), uncond.to(device), _parse_scale(settings.get("scale", 1.0)),
            _check_mask(tensors.get("mask")), _parse_number(settings.get("start_at", 0.0), "start_at"),
            _parse_number(settings.get("end_at", 1.0), "end_at"),
            None if weights is None else _check_weights(weights.flatten().tolist(), features.shape[1]),
            build_aggregator(cast(str | None, settings.get("aggregation") or None), self.adapter),
            None if frames is None else _check_frame_weights(frames.flatten().tolist()),
        )  # fmt: skip

    def _takes_features(self, patches: int, dim: int) -> bool:
        """Whether the adapter takes image features of so many patches and channels. The first row of FaceID-Plus is the identity."""
        if self.spec.uses_patch_features:
            return dim == self.spec.image_embed_dim and patches > self.spec.is_faceid
        return dim == self.spec.image_embed_dim and patches == 1

    def to(self, device: torch.device | str) -> "ImagePromptEncoder":
        """Move image encoder and adapter to a device."""
        self.adapter.to(device)
        self.encoder.model.to(device)
        return self


def _resize_whole(image: Image.Image, resize_mode: str) -> Image.Image:
    """The whole image as one square; tiles are not possible where exactly one image is expected."""
    return resize_to_square(image, "pad" if resize_mode == "tile" else resize_mode)


def _encode_faces(encoder: FaceEncoder, images: Sequence[Image.Image], face_embeds: FaceEmbeds | None, resize_mode: str) -> Tensor:
    """Features for the FaceID family: from given identity embeddings, or from the faces that are detected in the images."""
    if face_embeds is not None:
        id_embeds = load_id_embeds(face_embeds, encoder.id_embed_dim)
        return encoder.combine_features(id_embeds, [_resize_whole(image, resize_mode) for image in images])
    if not images:
        raise UserError("a FaceID adapter needs a face: give images, or identity embeddings as face_embeds")
    return encoder.preprocess(images)


def _adapter_fingerprint(adapter: Adapter) -> list[float]:
    """Numbers that identify an adapter, whatever its device and data type."""
    return [float(p.detach().cpu().double().abs().sum()) for p in adapter.image_proj.parameters()]


def _is_close(expected: float, received: object) -> bool:
    return isinstance(received, (int, float)) and abs(received) < 1e300 and math.isclose(expected, received, rel_tol=0.01)


def _parse_number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise UserError(f"{name} should be a finite number, received {value!r:.40}")
    return float(value)


def _parse_scale(value: object) -> Scale:
    if isinstance(value, dict):
        return {str(block): _parse_number(number, f"scale of {block}") for block, number in value.items()}
    return _parse_number(value, "scale")


def _check_mask(mask: Tensor | None) -> Tensor | None:
    mask = None if mask is None else mask.float()
    if mask is not None and (mask.ndim not in (2, 3) or not mask.numel() or not 0 <= float(mask.min()) <= float(mask.max()) <= 1):
        raise UserError(f"mask should be (height, width) or (frames, height, width) in 0 … 1, received {tuple(mask.shape)}")
    return mask


def build_aggregator(aggregation: str | None, adapter: Adapter) -> Aggregator | None:
    """An aggregator without trained weights, by name; None for the adapter's own. Raises UserError where it does not fit."""
    if aggregation is None:
        return None
    if aggregation not in TRAINING_FREE_AGGREGATIONS:
        raise UserError(f"aggregation: expected one of {', '.join(TRAINING_FREE_AGGREGATIONS)}, received {aggregation!r}")
    if aggregation == "joint" and not isinstance(adapter.image_proj, Resampler):
        raise UserError("aggregation: joint passes the patches of all references to a resampler, and this adapter has none; use average")
    return AGGREGATORS[aggregation](0, 0)


def _check_weights(weights: Sequence[float] | None, count: int) -> Tensor | None:
    """The weights as a tensor, (count,). Raises UserError unless there are `count` of them, none negative, and one positive."""
    if weights is None:
        return None
    if len(weights) != count:
        raise UserError(f"reference weights: expected one for each of the {count} references, received {len(weights)}")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise UserError(f"reference weights: expected numbers of at least 0, and one above it; received {', '.join(map(str, weights))}")
    return torch.tensor(weights, dtype=torch.float32)


def _check_frame_weights(weights: Sequence[float]) -> Tensor:
    if not len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"frame weights: expected a finite number for each frame; received {', '.join(map(str, weights)) or 'none'}")
    return torch.tensor(weights, dtype=torch.float32)


def load_masks(masks: ImageInput | Sequence[ImageInput]) -> Tensor:
    """One mask, (height, width), or one for each frame of a video, (frames, height, width), in 0 … 1."""
    if isinstance(masks, Tensor) and masks.ndim == 3 and len(masks) > 1:
        masks = list(masks)
    if not isinstance(masks, (list, tuple)):
        return load_mask(cast(ImageInput, masks))
    loaded = [load_mask(mask) for mask in masks]
    if len({mask.shape for mask in loaded}) != 1:
        raise UserError(f"masks of frames: expected masks of one size, received {len(loaded)} of {len({m.shape for m in loaded})} sizes")
    return torch.stack(loaded)


def load_mask(mask: ImageInput) -> Tensor:
    """A mask, white where the image prompt applies, as (height, width) in 0 … 1. A tensor of numbers in 0 … 1 is kept as it is.

    Raises UserError for a tensor of another shape or range, ImageError for an image that is no mask.
    """
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask.squeeze(0) if mask.ndim == 3 else mask
        if mask.ndim != 2:
            raise UserError(f"expected a mask of shape (height, width), received {tuple(mask.shape)}")
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise UserError("expected a mask of numbers in 0 … 1, received others")
        return mask.float()
    return torch.from_numpy(np.array(open_mask(mask, name_of(mask, "image_mask")))) / 255


def resolve_image_encoder(model: str, image_encoder: str | None, spec: AdapterSpec | None = None) -> ImageEncoder:
    """The image encoder of this name, or that of the base model, or the one that the adapter was trained with."""
    if image_encoder:
        return ImageEncoder.load(image_encoder)
    if model == "mini":
        return ImageEncoder.load(hub.MINI_PATH / "image_encoder")
    return ImageEncoder.load(*(hub.DEFAULT_IMAGE_ENCODER if spec is None else hub.default_image_encoder(spec)))


def load(source: str | Path, weight_name: str | None = None, image_encoder: str | Path | None = None) -> ImagePromptEncoder:
    """Load an adapter and its image encoder.

    `source` is a file, or a hub id with the file's path in the repository as `weight_name`:
    `load("h94/IP-Adapter", "models/ip-adapter_sd15.safetensors")`. `mini` and `mini-plus` are the bundled adapters.
    The image encoder is determined from the adapter's shapes; `image_encoder` (a folder or a hub id) overrides it. Offline, with
    HF_HUB_OFFLINE=1, hub ids are resolved in the local cache only. Raises UserError where something is missing or does not fit.
    """
    path, location = hub.resolve_adapter(str(source), weight_name)
    adapter, spec = checkpoints.load_adapter(path)
    if spec.is_faceid and not spec.uses_patch_features:
        detects = spec.adapter_type != "instantid"  # its embeddings are those of another face recognition model
        return ImagePromptEncoder(adapter, spec, FaceEncoder(spec.image_embed_dim, normalized=spec.normalized_id_embeds, detects=detects))
    location = (str(image_encoder), None) if image_encoder else location
    encoder_class = SiglipEncoder if spec.image_encoder.startswith("SigLIP") else ImageEncoder
    encoder = encoder_class.load(*(location or hub.default_image_encoder(spec)))
    if isinstance(adapter.image_proj, FaceIDPlusProjection):
        faces = FaceEncoder(adapter.image_proj.id_embed_dim, encoder, normalized=spec.normalized_id_embeds)
        return ImagePromptEncoder(adapter, spec, faces)
    return ImagePromptEncoder(adapter, spec, encoder)
