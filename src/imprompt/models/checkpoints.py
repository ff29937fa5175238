"""Adapter files: read, detect their type, write, convert. In memory, tensors have the public layout, see `adapter_layouts`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from imprompt.core.adapter import FAMILIES, Adapter
from imprompt.core.aggregation import AGGREGATORS
from imprompt.core.image_projection import (
    HEAD_DIM,
    FaceIDPlusProjection,
    FaceIDProjection,
    FullImageProjection,
    ImageProjection,
    MLPImageProjection,
    Projector,
    Resampler,
    TimeResampler,
)
from imprompt.errors import CheckpointError, notify
from imprompt.models.adapter_layouts import to_public_layout
from imprompt.models.tensor_files import (
    Metadata,
    check_shapes,
    check_weights,
    read_header,
    read_tensors,
    write_tensors,
)
from imprompt.models.transformer_layouts import detect_family, to_released_names
from imprompt.utils.text import shorten

ARCFACE_DIM = 512  # of an identity embedding; no CLIP encoder has patch features of this dimension
_INDEX = "(0|[1-9][0-9]{0,3})"  # of an attention layer, in a pattern
_INSTANTID_WIDTH = 1280  # of InstantID's resampler; FaceID-Portrait's is as wide as the text embeddings


@dataclass(frozen=True)
class AdapterSpec:
    """What kind of adapter a file contains, detected from the names and shapes of its tensors."""

    adapter_type: str  # base, plus, full-face; faceid, faceid-plus, faceid-resampler, instantid
    num_tokens: int  # image tokens per reference; 0 where every patch becomes one
    image_embed_dim: int  # of the image encoder's features
    cross_attention_dim: int  # of the text embeddings
    layers: Mapping[int, int]  # public layer index n → hidden dimension
    num_parameters: int
    dtype: str
    metadata: Metadata = field(default_factory=dict)  # what imprompt wrote into the file
    aggregator: str = "concat"  # how several references are aggregated
    family: str = "unet"  # one of core.adapter.FAMILIES
    head_dim: int = 0  # channels of an attention head, for families that normalize keys

    @property
    def uses_patch_features(self) -> bool:
        """Whether the adapter takes the encoder's patch features; otherwise its pooled embedding."""
        return self.adapter_type in ("plus", "full-face", "faceid-plus", "time-resampler")

    @property
    def is_faceid(self) -> bool:
        """Whether the adapter takes identity embeddings: the FaceID family, and InstantID."""
        return self.adapter_type.startswith(("faceid", "instantid"))

    @property
    def normalized_id_embeds(self) -> bool:
        """Whether the adapter takes identity embeddings of length 1."""
        return bool(self.metadata.get("normalized", self.adapter_type in ("faceid", "faceid-plus")))

    @property
    def faceid_version(self) -> int | None:
        """1 or 2 for FaceID-Plus, whose versions have the same tensors: as the metadata or the file's name says, else 1."""
        if self.adapter_type != "faceid-plus":
            return None
        return 2 if str(self.metadata.get("version")) == "2" else 1

    @property
    def base_model(self) -> str:
        """The family of base models that the adapter fits."""
        families = {
            (768, 16): "SD 1.5", (1024, 16): "SD 2.1", (2048, 70): "SDXL", (4096, 19): "FLUX.1-dev", (4096, 57): "FLUX.1-dev",
            (2432, 38): "SD3.5 Large",
        }  # fmt: skip
        return str(self.metadata.get("base") or families.get((self.cross_attention_dim, len(self.layers)), "unknown"))

    @property
    def image_encoder(self) -> str:
        """The image encoder that the adapter needs, and which of its outputs."""
        if self.is_faceid and not self.uses_patch_features:
            return f"face recognition embedding ({self.image_embed_dim}, {'normalized' if self.normalized_id_embeds else 'unnormalized'})"
        output = "penultimate patch features" if self.uses_patch_features else "pooled embedding"
        encoders = {
            ("pooled embedding", 1024): "CLIP ViT-H/14", ("pooled embedding", 1280): "CLIP ViT-bigG/14",
            ("penultimate patch features", 1280): "CLIP ViT-H/14", ("penultimate patch features", 1664): "CLIP ViT-bigG/14",
            ("pooled embedding", 768): "CLIP ViT-L/14", ("pooled embedding", 1152): "SigLIP so400m",
            ("penultimate patch features", 1152): "SigLIP so400m",
        }  # fmt: skip
        name = self.metadata.get("encoder") or encoders.get((output, self.image_embed_dim), "an encoder")
        return f"{name}, {output} ({self.image_embed_dim})"


# ------------------------------------------------------------------------------------------------------------ reading


def read_adapter(path: Path | str) -> tuple[dict[str, Tensor], AdapterSpec]:
    """The tensors of an adapter file in the public layout, and what kind of adapter they are. Nothing is converted.

    Raises CheckpointError for anything that is not an intact adapter file. Pickles run no code.
    """
    tensors, metadata = read_adapter_file(path)
    spec = detect_spec(tensors, metadata)
    check_shapes(tensors, _build_on_meta(spec, tensors).state_dict(), Path(path).name, "the file is incomplete or altered")
    return tensors, spec


def read_adapter_file(path: Path | str) -> tuple[dict[str, Tensor], Metadata]:
    """The tensors of an adapter file in the public layout, and the metadata that imprompt wrote into it. Raises CheckpointError."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, it does not raise for a name too long
        raise CheckpointError(f"no adapter file at {path}; give a .safetensors or .bin file")
    tensors, metadata = read_tensors(path)
    method = str(metadata.get("method", "ip-adapter"))
    if not method.startswith("ip-adapter"):
        raise CheckpointError(
            f"{path.name} was trained by method {method!r}; expected an IP-Adapter; imprompt evaluate accepts other methods"
        )
    public = to_public_layout(tensors, path.name)
    check_weights(public, path.name)
    return public, _faceid_variant(path) | metadata


def load_module(module: nn.Module, path: Path | str) -> None:
    """Load a file's tensors into a module of the same names and shapes. Raises CheckpointError where they differ."""
    tensors, _ = read_tensors(path)
    check_shapes(tensors, module.state_dict(), Path(path).name, "pass the base model that it was trained with")
    check_weights({key: tensors[key] for key, value in module.state_dict().items() if value.is_floating_point()}, Path(path).name)
    module.load_state_dict(tensors)


def _faceid_variant(path: Path) -> Metadata:
    """What distinguishes the FaceID files but is not in their tensors, from the file's name and what other programs wrote into it."""
    text = re.sub(r"[^a-z0-9]", "", " ".join([path.name, *map(str, read_header(path).values())]).lower())
    version = {"version": 2} if "plusv2" in text else {"version": 1} if "faceidplus" in text else {}
    return version | ({"normalized": False} if "unnorm" in text else {})


# ---------------------------------------------------------------------------------------------------- detecting the type


def detect_spec(tensors: Mapping[str, Tensor], metadata: Metadata | None = None) -> AdapterSpec:
    """The adapter that tensors in the public layout belong to. Raises CheckpointError for an unknown type."""
    layers, metadata = {}, metadata or {}
    for key in tensors:
        if match := re.fullmatch(rf"ip_adapter\.{_INDEX}\.to_k_ip\.weight", key):
            layers[int(match[1])], cross_attention_dim = _checked_shape(tensors, key)
    if not layers:
        raise CheckpointError("the file has no ip_adapter.<n>.to_k_ip.weight: it contains no adapter, or was saved incompletely")
    aggregator = str(metadata.get("aggregator", "concat"))
    if aggregator not in AGGREGATORS:
        raise CheckpointError(f"the file aggregates references by {aggregator!r}; expected one of {', '.join(AGGREGATORS)}")
    family = detect_family(tensors)
    adapter_type, num_tokens, image_embed_dim = _detect_projection(tensors, cross_attention_dim, metadata, family)
    num_parameters = sum(t.numel() for t in tensors.values())
    dtype = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    return AdapterSpec(
        adapter_type, num_tokens, image_embed_dim, cross_attention_dim, layers, num_parameters, dtype, metadata, aggregator, family,
        _detect_head_dim(tensors, metadata, family),
    )  # fmt: skip


def _detect_head_dim(tensors: Mapping[str, Tensor], metadata: Metadata, family: str) -> int:
    """The channels of an attention head. Raises CheckpointError where an adapter that we trained does not say."""
    match family:
        case "instantx-sd3":
            return _checked_shape(tensors, "ip_adapter.0.norm_ip_k.weight", 1)[0]
        case "instantx-flux":
            return 128  # of Flux
        case "transformer":
            head_dim = metadata.get("head_dim")
            if not isinstance(head_dim, int) or head_dim < 1:
                raise CheckpointError(
                    "the file has layers of a transformer, and no metadata that says how many channels a head has: expected an adapter "
                    "that imprompt trained, or one of XLabs or InstantX"
                )
            return head_dim
    return 0


def _detect_projection(tensors: Mapping[str, Tensor], cross_attention_dim: int, metadata: Metadata, family: str) -> tuple[str, int, int]:
    """The adapter type, the number of image tokens and the dimension of the image features. Raises CheckpointError."""

    def shape(name: str, dimensions: int = 2) -> torch.Size | None:
        key = "image_proj." + name
        return _checked_shape(tensors, key, dimensions) if key in tensors else None

    if size := shape("proj.weight"):
        if size[0] % cross_attention_dim:
            raise CheckpointError(
                f"image_proj.proj.weight should have a multiple of {cross_attention_dim} rows, received {size[0]}; the file is altered"
            )
        return "base", size[0] // cross_attention_dim, size[1]
    if shape("proj.3.weight", 1) and (size := shape("proj.0.weight")):
        return "full-face", 0, size[1]
    if size := shape("perceiver_resampler.proj_in.weight"):
        return "faceid-plus", _first_dim(shape("proj.2.weight")) // cross_attention_dim, size[1]
    if (norm := shape("norm.weight", 1)) and (size := shape("proj.0.weight")):
        if norm[0] == size[1] != ARCFACE_DIM and family == "unet":  # FaceID normalizes last
            raise CheckpointError(
                "a face adapter of ai-toolkit (ip_clip_face: LayerNorm before the projection) is not supported; expected an IP-Adapter"
            )
        kind = "mlp" if family == "instantx-flux" else "faceid"
        return kind, _first_dim(shape("proj.2.weight")) // cross_attention_dim, size[1]
    if (size := shape("proj_in.weight")) and (latents := shape("latents", 3)):
        if family == "instantx-sd3":
            return "time-resampler", latents[1], size[1]
        if size[1] != ARCFACE_DIM and "normalized" not in metadata:
            return "plus", latents[1], size[1]
        is_instantid = latents[2] == _INSTANTID_WIDTH != cross_attention_dim  # otherwise FaceID-Portrait, unnormalized
        return "instantid" if is_instantid else "faceid-resampler", latents[1], size[1]
    names = sorted(key for key in tensors if key.startswith("image_proj."))
    raise CheckpointError(f"unknown type of adapter: image_proj contains {', '.join(map(shorten, names[:4]))} …")


def _checked_shape(tensors: Mapping[str, Tensor], key: str, dimensions: int = 2) -> torch.Size:
    """The shape of a tensor that determines others. Raises CheckpointError unless it has so many dimensions, none of them empty."""
    if key not in tensors:
        raise CheckpointError(f"{key} is missing; the file is incomplete or altered")
    size = tensors[key].shape
    if len(size) != dimensions or 0 in size:
        raise CheckpointError(f"{key} should have {dimensions} dimensions, received {tuple(size)}; the file is incomplete or altered")
    return size


def _first_dim(size: torch.Size | None) -> int:
    return size[0] if size else 0


# ----------------------------------------------------------------------------------------------- adapters and writing


def load_adapter(path: Path | str) -> tuple[Adapter, AdapterSpec]:
    """An adapter from a file, frozen and in float32, and its type. Reports what the file does not determine. Raises CheckpointError."""
    tensors, spec = read_adapter(path)
    report_assumptions(spec, Path(path).name)
    adapter = _build_on_meta(spec, tensors)
    adapter.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return adapter.requires_grad_(False).eval(), spec


def report_assumptions(spec: AdapterSpec, file_name: str) -> None:
    """Report what neither the tensors nor the metadata nor the name of a file determine."""
    if spec.adapter_type == "faceid-plus" and str(spec.metadata.get("version")) not in ("1", "2"):
        notify(
            f"{file_name} is taken for version 1 of FaceID-Plus: its tensors are the same as those of version 2, and neither name nor "
            "metadata tell; for version 2, write it once with imprompt convert --faceid-version 2"
        )
    if spec.adapter_type == "instantid":
        notify(f"{file_name} is the IP-Adapter of InstantID; without IdentityNet, its ControlNet, results differ from InstantID's")


def _build_on_meta(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> Adapter:
    """An adapter of this kind whose tensors have shapes and no values."""
    with torch.device("meta"):
        aggregator = AGGREGATORS[spec.aggregator](spec.image_embed_dim, spec.cross_attention_dim)
        family = FAMILIES[spec.family]
        adapter = Adapter(_build_projector(spec, tensors), spec.layers, spec.cross_attention_dim, aggregator, family, spec.head_dim)
        for n, shapes in _lora_shapes(tensors).items():
            adapter.add_lora(n, shapes)
    return adapter


def _lora_shapes(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, tuple[int, int, int]]]:
    """The LoRA weights of FaceID files: layer n → part → dimension in, dimension out, rank."""
    shapes: dict[int, dict[str, tuple[int, int, int]]] = {}
    for key in tensors:
        if match := re.fullmatch(rf"ip_adapter\.{_INDEX}\.to_(q|k|v|out)_lora\.down\.weight", key):
            rank, in_dim = _checked_shape(tensors, key)
            up = key.replace("down", "up")
            out_dim = _checked_shape(tensors, up)[0] if up in tensors else in_dim
            shapes.setdefault(int(match[1]), {})[match[2]] = (in_dim, out_dim, rank)
    return shapes


def _resampler_layers(tensors: Mapping[str, Tensor], prefix: str, hidden_dim: int) -> tuple[int, int]:
    """The number of heads of a resampler's layers, and the number of layers."""
    query = f"{prefix}0.0.to_q.weight"
    depth = len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})
    return max(1, (_checked_shape(tensors, query)[0] if query in tensors else hidden_dim) // HEAD_DIM), depth


def _build_projector(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> Projector:
    embed_dim, cross_attention_dim, num_tokens = spec.image_embed_dim, spec.cross_attention_dim, spec.num_tokens
    if spec.adapter_type == "time-resampler":
        latents, depth = tensors["image_proj.latents"], _resampler_layers(tensors, "image_proj.layers.", HEAD_DIM)[1]
        return TimeResampler(embed_dim, cross_attention_dim, num_tokens, latents.shape[2], depth)
    if spec.adapter_type == "mlp":
        return MLPImageProjection(embed_dim, cross_attention_dim, num_tokens, _checked_shape(tensors, "image_proj.proj.0.weight")[0])
    if spec.adapter_type in ("faceid", "faceid-plus"):
        hidden_dim, id_embed_dim = _checked_shape(tensors, "image_proj.proj.0.weight")
        if spec.adapter_type == "faceid":
            return FaceIDProjection(id_embed_dim, cross_attention_dim, num_tokens, hidden_dim)
        heads, depth = _resampler_layers(tensors, "image_proj.perceiver_resampler.layers.", cross_attention_dim)
        shortcut = spec.faceid_version == 2
        return FaceIDPlusProjection(id_embed_dim, embed_dim, cross_attention_dim, num_tokens, hidden_dim, heads, depth, shortcut=shortcut)
    if spec.adapter_type == "base":
        return ImageProjection(embed_dim, cross_attention_dim, num_tokens)
    if spec.adapter_type == "full-face":
        return FullImageProjection(embed_dim, cross_attention_dim)
    hidden_dim = tensors["image_proj.latents"].shape[2]
    heads, depth = _resampler_layers(tensors, "image_proj.layers.", hidden_dim)
    return Resampler(embed_dim, cross_attention_dim, num_tokens, hidden_dim, heads, depth)


def save(adapter: Adapter, path: Path | str, metadata: Mapping[str, object] | None = None, dtype: torch.dtype | None = None) -> None:
    """Write an adapter as a public file that diffusers and ComfyUI read: `.safetensors`, or `.bin` for old readers."""
    if adapter.family.name == "transformer":
        metadata = {"head_dim": adapter.head_dim} | dict(metadata or {})
    tensors = {key: value.to(dtype or value.dtype) for key, value in adapter.state_dict().items()}
    write_tensors(to_released_names(tensors, adapter.family.name), path, metadata)


def convert_adapter(
    source: Path | str, target: Path | str, *, without_aggregator: bool = False, faceid_version: int | None = None
) -> AdapterSpec:
    """Rewrite any readable adapter file or training state as a public file, with unchanged values and data types.

    `without_aggregator` leaves out a trained aggregator, for readers that refuse unknown tensors (InvokeAI). `faceid_version`, 1 or 2,
    is written into the metadata of a FaceID-Plus adapter.
    """
    tensors, spec = read_adapter(source)
    metadata = spec.metadata
    if without_aggregator:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("aggregator.")}
        metadata = {key: value for key, value in metadata.items() if key != "aggregator"}
    if faceid_version is not None:
        if spec.adapter_type != "faceid-plus":
            raise CheckpointError(
                f"faceid_version: only FaceID-Plus has two versions, and {Path(source).name} is a {spec.adapter_type} adapter"
            )
        metadata = metadata | {"version": faceid_version}
    spec = detect_spec(tensors, metadata)
    report_assumptions(spec, Path(source).name)
    write_tensors(to_released_names(tensors, spec.family), target, metadata)
    return spec
