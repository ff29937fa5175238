"""Public adapter files: read, detect their type, write, convert.

In memory, an adapter's tensors always have the flat layout of the `.safetensors` releases: `image_proj.…` and
`ip_adapter.<n>.to_{k,v}_ip.weight`; the weights of a trained aggregator are `aggregator.…`, which other readers ignore. Nested
pickles, other prefixes and the training states of the original scripts are converted to it on reading.
"""

import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from imprompt.core.adapter import Adapter
from imprompt.core.aggregation import AGGREGATORS
from imprompt.core.image_projection import (
    HEAD_DIM,
    FaceIDPlusProjection,
    FaceIDProjection,
    FullImageProjection,
    ImageProjection,
    Projector,
    Resampler,
)
from imprompt.errors import CheckpointError
from imprompt.utils.files import atomic_path

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
_PREFIX_ALIASES = {"image_proj_model.": "image_proj.", "adapter_modules.": "ip_adapter."}  # of other scripts → of the releases
_PROCESSOR_WEIGHT = re.compile(r"unet\.(.+)\.processor\.(to_[kv]_ip\.weight)")
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")  # of a UNet, in the order of the public numbering
_METADATA_KEY = "imprompt"
ARCFACE_DIM = 512  # of an identity embedding; no CLIP encoder has patch features of this dimension
Metadata = dict[str, Any]  # what imprompt writes into a file, as JSON
_PUBLIC_PREFIXES = ("image_proj.", "ip_adapter.", "aggregator.")


@dataclass(frozen=True)
class AdapterSpec:
    """What kind of adapter a file contains, detected from the names and shapes of its tensors."""

    adapter_type: str  # base, plus, full-face; faceid, faceid-plus, faceid-resampler
    num_tokens: int  # image tokens per reference; 0 where every patch becomes one
    image_embed_dim: int  # of the image encoder's features
    cross_attention_dim: int  # of the text embeddings
    layers: Mapping[int, int]  # public layer index n → hidden dimension
    num_parameters: int
    dtype: str
    metadata: Metadata = field(default_factory=dict)  # what imprompt wrote into the file
    aggregator: str = "concat"  # how several references are aggregated

    @property
    def uses_patch_features(self) -> bool:
        """Whether the adapter takes the encoder's patch features; otherwise its pooled embedding."""
        return self.adapter_type in ("plus", "full-face", "faceid-plus")

    @property
    def is_faceid(self) -> bool:
        """Whether the adapter takes identity embeddings: the FaceID family."""
        return self.adapter_type.startswith("faceid")

    @property
    def normalized_id_embeds(self) -> bool:
        """Whether the adapter takes identity embeddings of length 1."""
        return bool(self.metadata.get("normalized", self.adapter_type != "faceid-resampler"))

    @property
    def base_model(self) -> str:
        """The family of base models that the adapter fits."""
        families = {(768, 16): "SD 1.5", (1024, 16): "SD 2.1", (2048, 70): "SDXL"}
        return self.metadata.get("base") or families.get((self.cross_attention_dim, len(self.layers)), "unknown")

    @property
    def image_encoder(self) -> str:
        """The image encoder that the adapter needs, and which of its outputs."""
        if self.is_faceid and not self.uses_patch_features:
            return f"face recognition embedding ({self.image_embed_dim}, {'normalized' if self.normalized_id_embeds else 'unnormalized'})"
        output = "penultimate patch features" if self.uses_patch_features else "pooled embedding"
        encoders = {
            ("pooled embedding", 1024): "CLIP ViT-H/14", ("pooled embedding", 1280): "CLIP ViT-bigG/14",
            ("penultimate patch features", 1280): "CLIP ViT-H/14", ("penultimate patch features", 1664): "CLIP ViT-bigG/14",
        }  # fmt: skip
        name = self.metadata.get("encoder") or encoders.get((output, self.image_embed_dim), "an encoder")
        return f"{name}, {output} ({self.image_embed_dim})"


# ------------------------------------------------------------------------------------------------------------ reading


def read_adapter_file(path: Path | str) -> tuple[dict[str, Tensor], Metadata]:
    """The tensors of an adapter file in the public flat layout, and the metadata that imprompt wrote into it.

    Raises CheckpointError for anything that is not an intact adapter file. Pickles run no code (`weights_only`).
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, it does not raise for a name too long
        raise CheckpointError(f"no adapter file at {path}; give a .safetensors or .bin file")
    if path.suffix not in ADAPTER_SUFFIXES:
        raise CheckpointError(f"{path.name}: expected an adapter as {', '.join(ADAPTER_SUFFIXES)}, received {path.suffix or 'no suffix'}")
    tensors, metadata = _read_pickle(path) if path.suffix in PICKLE_SUFFIXES else read_tensors(path)
    method = str(metadata.get("method", "ip-adapter"))
    if not method.startswith("ip-adapter"):
        raise CheckpointError(
            f"{path.name} was trained by method {method!r}; expected an IP-Adapter; imprompt evaluate accepts other methods"
        )
    return _to_public_layout(tensors, path.name), _variant_from_filename(path.name) | metadata


def read_metadata(path: Path | str) -> Metadata:
    """The metadata that imprompt wrote into a `.safetensors` file, without reading its tensors. Raises CheckpointError."""
    with _open_safetensors(path) as file:
        return _parse_metadata((file.metadata() or {}).get(_METADATA_KEY, "{}"))


def tensor_names(path: Path | str) -> list[str]:
    """The names of all tensors of a `.safetensors` file, without reading them. Raises CheckpointError."""
    with _open_safetensors(path) as file:
        return list(file.keys())


def load_module(module: nn.Module, path: Path | str) -> None:
    """Load a file's tensors into a module of the same names and shapes. Raises CheckpointError where they differ."""
    tensors, _ = read_tensors(Path(path))
    _check_shapes(tensors, module, Path(path).name, "pass the base model that it was trained with")
    module.load_state_dict(tensors)


def _check_shapes(tensors: Mapping[str, Tensor], module: nn.Module, file_name: str, remedy: str) -> None:
    """Raise CheckpointError unless the tensors have the names and shapes of the module's."""
    received, expected = ({k: tuple(v.shape) for k, v in state.items()} for state in (tensors, module.state_dict()))
    for key in dict.fromkeys([*expected, *received]):
        if expected.get(key) != received.get(key):
            raise CheckpointError(
                f"{file_name}: {key} should be {expected.get(key, 'nothing')}, received {received.get(key, 'nothing')}; {remedy}"
            )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    """All tensors of a `.safetensors` file unchanged, and the metadata that imprompt wrote into it. Raises CheckpointError."""
    with _open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, _parse_metadata((file.metadata() or {}).get(_METADATA_KEY, "{}"))


@contextmanager
def _open_safetensors(path: Path | str) -> Iterator[safetensors.safe_open]:
    """An open `.safetensors` file. Raises CheckpointError where it is damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{Path(path).name} is damaged or not a safetensors file; download or copy it again") from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings are meant for the file's author
            content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = dict(_flatten(content))
    except Exception as error:  # a damaged pickle can raise nearly any exception
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(path):
            raise CheckpointError(
                f"{path.name} contains more than tensors and was not opened, because loading it could run code; "
                "ask its author for a .safetensors file"
            ) from error
        raise CheckpointError(f"{path.name} is damaged or not a PyTorch file; download or copy it again") from error
    return tensors, _parse_metadata(content.get(_METADATA_KEY) if isinstance(content, Mapping) else None)


def _is_pickle(path: Path) -> bool:
    """Whether the file starts like torch's zip archive or like a pickle; a renamed text file does neither."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def _flatten(node: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings, with their keys joined by dots."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, Tensor):
        yield prefix, node


def _parse_metadata(header: object) -> Metadata:
    """The metadata that imprompt wrote into a file; empty where another program wrote the entry."""
    try:
        metadata = json.loads(header if isinstance(header, str) else json.dumps(header))
    except (ValueError, TypeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _to_public_layout(tensors: dict[str, Tensor], file_name: str) -> dict[str, Tensor]:
    """The tensors of any known layout in the public one. Raises CheckpointError where they are no IP-Adapter."""
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    public: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for alias, prefix in _PREFIX_ALIASES.items():
            key = prefix + key.removeprefix(alias) if key.startswith(alias) else key
        if key.startswith(_PUBLIC_PREFIXES):
            public[key] = value
    if not any(key.startswith("ip_adapter.") for key in public):  # safetensors dropped the copies that share memory
        public |= _processor_weights(tensors, file_name)
    if not any(k.startswith("ip_adapter.") for k in public) or not any(k.startswith("image_proj.") for k in public):
        raise CheckpointError(
            f"{file_name} is not an IP-Adapter: expected tensors under image_proj. and ip_adapter., "
            f"received {', '.join(sorted(tensors)[:3]) or 'none'} …; pass a whole model with --model"
        )
    return dict(sorted(public.items(), key=lambda item: _natural_sort_key(item[0])))


def _processor_weights(tensors: Mapping[str, Tensor], file_name: str) -> dict[str, Tensor]:
    """The weights that a training state keeps in the UNet's attention processors, with their public names."""
    weights = {match.groups(): value for key, value in tensors.items() if (match := _PROCESSOR_WEIGHT.fullmatch(key))}
    if unknown := [layer for layer, _ in weights if layer.split(".")[0] not in _BLOCKS]:
        raise CheckpointError(
            f"{file_name} was trained inside an unknown model: expected layers in {', '.join(_BLOCKS)}, received {unknown[0]}"
        )
    order = sorted({layer for layer, _ in weights}, key=_layer_sort_key)
    return {f"ip_adapter.{2 * order.index(layer) + 1}.{name}": value for (layer, name), value in weights.items()}


def _layer_sort_key(layer: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Down blocks, up blocks, mid block; numbers in a name are compared as numbers."""
    return _BLOCKS.index(layer.split(".")[0]), _natural_sort_key(layer)


def _natural_sort_key(text: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)]


# ---------------------------------------------------------------------------------------------------- detecting the type


def detect_spec(tensors: Mapping[str, Tensor], metadata: Metadata | None = None) -> AdapterSpec:
    """The adapter that tensors in the public layout belong to. Raises CheckpointError for an unknown type."""
    layers = {}
    for key in tensors:
        if match := re.fullmatch(r"ip_adapter\.(\d+)\.to_k_ip\.weight", key):
            layers[int(match[1])], cross_attention_dim = _checked_shape(tensors, key)
    if not layers:
        raise CheckpointError("the file has no ip_adapter.<n>.to_k_ip.weight: it contains no adapter, or was saved incompletely")
    aggregator = str((metadata or {}).get("aggregator", "concat"))
    if aggregator not in AGGREGATORS:
        raise CheckpointError(f"the file aggregates references by {aggregator!r}; expected one of {', '.join(AGGREGATORS)}")
    adapter_type, num_tokens, image_embed_dim = _detect_projection(tensors, cross_attention_dim, metadata or {})
    num_parameters = sum(t.numel() for t in tensors.values())
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return AdapterSpec(
        adapter_type, num_tokens, image_embed_dim, cross_attention_dim, layers, num_parameters, dtype, metadata or {}, aggregator
    )


def _detect_projection(tensors: Mapping[str, Tensor], cross_attention_dim: int, metadata: Metadata) -> tuple[str, int, int]:
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
    if shape("norm.weight", 1) and (size := shape("proj.0.weight")):
        return "faceid", _first_dim(shape("proj.2.weight")) // cross_attention_dim, size[1]
    if (size := shape("proj_in.weight")) and (latents := shape("latents", 3)):
        is_faceid = size[1] == ARCFACE_DIM or "normalized" in metadata  # FaceID-Portrait, unnormalized
        return "faceid-resampler" if is_faceid else "plus", latents[1], size[1]
    names = sorted(key for key in tensors if key.startswith("image_proj."))
    raise CheckpointError(f"unknown type of adapter: image_proj contains {', '.join(names[:4])} …")


def _checked_shape(tensors: Mapping[str, Tensor], key: str, dimensions: int = 2) -> torch.Size:
    """The shape of a tensor that determines others. Raises CheckpointError unless it has so many dimensions, none of them empty."""
    size = tensors[key].shape
    if len(size) != dimensions or 0 in size:
        raise CheckpointError(f"{key} should have {dimensions} dimensions, received {tuple(size)}; the file is incomplete or altered")
    return size


def _first_dim(size: torch.Size | None) -> int:
    return size[0] if size else 0


# ----------------------------------------------------------------------------------------------- adapters and writing


def load_adapter(path: Path | str) -> tuple[Adapter, AdapterSpec]:
    """An adapter from a file, frozen and in float32, and its type. Raises CheckpointError."""
    tensors, metadata = read_adapter_file(path)
    spec = detect_spec(tensors, metadata)
    with torch.device("meta"):
        aggregator = AGGREGATORS[spec.aggregator](spec.image_embed_dim, spec.cross_attention_dim)
        adapter = Adapter(_build_projector(spec, tensors), spec.layers, spec.cross_attention_dim, aggregator)
        for n, shapes in _lora_shapes(tensors).items():
            adapter.add_lora(n, shapes)
    _check_shapes(tensors, adapter, Path(path).name, "the file is incomplete or altered")
    adapter.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return adapter.requires_grad_(False).eval(), spec


def _variant_from_filename(file_name: str) -> Metadata:
    """The part of a public FaceID file's variant that only its name has, not its tensors."""
    return {"version": 2 if "plusv2" in file_name else 1, "normalized": "unnorm" not in file_name} if "faceid" in file_name else {}


def _lora_shapes(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, tuple[int, int, int]]]:
    """The LoRA weights of FaceID files: layer n → part → dimension in, dimension out, rank."""
    shapes: dict[int, dict[str, tuple[int, int, int]]] = {}
    for key in tensors:
        if match := re.fullmatch(r"ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.down\.weight", key):
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
    if spec.adapter_type in ("faceid", "faceid-plus"):
        hidden_dim, id_embed_dim = _checked_shape(tensors, "image_proj.proj.0.weight")
        if spec.adapter_type == "faceid":
            return FaceIDProjection(id_embed_dim, cross_attention_dim, num_tokens, hidden_dim)
        heads, depth = _resampler_layers(tensors, "image_proj.perceiver_resampler.layers.", cross_attention_dim)
        shortcut = spec.metadata.get("version") == 2
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
    write_tensors({key: value.to(dtype or value.dtype) for key, value in adapter.state_dict().items()}, path, metadata)


def write_tensors(tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, object] | None = None) -> None:
    """Write tensors in the public layout, atomically; the suffix selects the format. Raises CheckpointError for an unknown one."""
    path = Path(path)
    if path.suffix not in ADAPTER_SUFFIXES:
        raise CheckpointError(f"cannot write {path.name}: expected a name ending in {', '.join(ADAPTER_SUFFIXES)}")
    tensors = _with_own_storage(tensors)
    with atomic_path(path) as partial:
        if path.suffix in PICKLE_SUFFIXES:
            nested: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
            for key, value in tensors.items():
                group, name = key.split(".", 1)
                nested.setdefault(group, {})[name] = value
            torch.save(nested | ({_METADATA_KEY: dict(metadata)} if metadata else {}), partial)
        else:
            header = {"format": "pt"} | ({_METADATA_KEY: json.dumps(dict(metadata))} if metadata else {})
            safetensors.torch.save_file(tensors, partial, header)


def _with_own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where needed: a pickle would store the whole of a slice, and safetensors refuses tensors that share memory."""
    copies: dict[str, Tensor] = {}
    used_pointers = set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in used_pointers:
            value = value.clone()
        used_pointers.add(value.untyped_storage().data_ptr())
        copies[key] = value
    return copies


def convert_adapter(source: Path | str, target: Path | str, *, without_aggregator: bool = False) -> AdapterSpec:
    """Rewrite any readable adapter file or training state as a public file, with unchanged values and data types.

    `without_aggregator` leaves out a trained aggregator, for readers that refuse unknown tensors (InvokeAI).
    """
    tensors, metadata = read_adapter_file(source)
    if without_aggregator:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("aggregator.")}
        metadata = {key: value for key, value in metadata.items() if key != "aggregator"}
    spec = detect_spec(tensors, metadata)
    write_tensors(tensors, target, metadata)
    return spec
