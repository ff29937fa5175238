"""Public adapter files: read, recognise, write, convert.

Inside, an adapter file is always the flat layout of `.safetensors` releases: `image_proj.…` and
`ip_adapter.<n>.to_{k,v}_ip.weight`; where several references are brought together by trained weights, these are
`aggregator.…`, which other readers leave alone. Nested pickles, other prefixes and the original scripts' training states are
brought to it on reading.
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
    HEAD_CHANNELS,
    FacePlusProjector,
    FaceProjector,
    LinearProjector,
    MLPProjector,
    Projector,
    Resampler,
)
from imprompt.errors import CheckpointError
from imprompt.utils.files import atomic_path

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FORMATS = (".safetensors", *PICKLES)
_PREFIXES = {"image_proj_model.": "image_proj.", "adapter_modules.": "ip_adapter."}  # others' → ours
_TRAINED_INSIDE = re.compile(r"unet\.(.+)\.processor\.(to_[kv]_ip\.weight)")
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")  # of a UNet, in public order
_METADATA_KEY = "imprompt"
FACE = 512  # width of an identity by ArcFace; no CLIP encoder has a grid of this width
_OURS = ("image_proj.", "ip_adapter.", "aggregator.")


@dataclass(frozen=True)
class Spec:
    """What an adapter file is, read off its keys and shapes."""

    kind: str  # global, resampler, full-face; faceid, faceid-plus, faceid-resampler
    tokens: int  # image tokens per reference; 0 where every patch becomes one
    features: int  # width of the encoder's output
    cross: int  # width of the text states
    layers: Mapping[int, int]  # public index n → hidden width
    parameters: int
    dtype: str
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what imprompt wrote about the file
    aggregator: str = "concat"  # what brings several references together

    @property
    def grid(self) -> bool:
        """Whether the encoder's grid of patches is read; otherwise its pooled embedding."""
        return self.kind in ("resampler", "full-face", "faceid-plus")

    @property
    def faces(self) -> bool:
        """Whether it hears identities: the FaceID family."""
        return self.kind.startswith("faceid")

    @property
    def normalised(self) -> bool:
        """Whether the identities that it hears are of length 1."""
        return bool(self.metadata.get("normalised", self.kind != "faceid-resampler"))

    @property
    def base(self) -> str:
        """The family of base models that it fits."""
        known = {(768, 16): "SD 1.5", (1024, 16): "SD 2.1", (2048, 70): "SDXL"}
        return self.metadata.get("base") or known.get((self.cross, len(self.layers)), "unknown")

    @property
    def encoder(self) -> str:
        """The image encoder that it needs."""
        output = "penultimate grid" if self.grid else "pooled embedding"
        known = {(False, 1024): "CLIP ViT-H/14", (False, 1280): "CLIP ViT-bigG/14", (True, 1280): "CLIP ViT-H/14"}
        known |= {(True, 1664): "CLIP ViT-bigG/14"}
        if self.faces and not self.grid:
            return f"face recognition embedding ({self.features}, {'normalised' if self.normalised else 'as it comes'})"
        name = self.metadata.get("encoder") or known.get((self.grid, self.features), "an encoder")
        return f"{name}, {output} ({self.features})"


# ------------------------------------------------------------------------------------------------------------ reading


def read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter file in the public flat layout, and what imprompt wrote about it.

    Raises CheckpointError for anything that is not an intact adapter file. Pickles run no code (`weights_only`).
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, it does not raise for a name too long
        raise CheckpointError(f"no adapter file at {path}; give a .safetensors or .bin file")
    if path.suffix not in FORMATS:
        raise CheckpointError(f"{path.name}: expected an adapter as {', '.join(FORMATS)}, received {path.suffix or 'no suffix'}")
    tensors, metadata = _read_pickle(path) if path.suffix in PICKLES else read_tensors(path)
    method = str(metadata.get("method", "ip-adapter"))
    if not method.startswith("ip-adapter"):
        raise CheckpointError(f"{path.name} was trained by method {method!r}; expected an IP-Adapter: imprompt evaluate takes the others")
    return _public(tensors, path.name), _variant(path.name) | metadata


def about(path: Path | str) -> dict[str, Any]:
    """What imprompt wrote about a `.safetensors` file, without reading its tensors."""
    with _opened(path) as file:
        return _own_words((file.metadata() or {}).get(_METADATA_KEY, "{}"))


def keys(path: Path | str) -> list[str]:
    """The names of all tensors of a `.safetensors` file, without reading them. Raises CheckpointError."""
    with _opened(path) as file:
        return list(file.keys())


def load_module(module: nn.Module, path: Path | str) -> None:
    """Read a module's tensors as they stand in the file. Raises CheckpointError where file and module do not fit."""
    tensors, _ = read_tensors(Path(path))
    expected = module.state_dict()
    wrong = sorted({k for k, v in expected.items() if k not in tensors or tensors[k].shape != v.shape} | (set(tensors) - set(expected)))
    if wrong:
        received = tuple(tensors[wrong[0]].shape) if wrong[0] in tensors else "nothing"
        wanted = tuple(expected[wrong[0]].shape) if wrong[0] in expected else "nothing"
        raise CheckpointError(f"{Path(path).name}: {wrong[0]} should be {wanted}, received {received}; name the base it was trained on")
    module.load_state_dict(tensors)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a `.safetensors` file as they stand there, and what imprompt wrote about it. Raises CheckpointError."""
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, _own_words((file.metadata() or {}).get(_METADATA_KEY, "{}"))


@contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    """A `.safetensors` file. Raises CheckpointError where it is damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{Path(path).name} is damaged or not a safetensors file; download or copy it again") from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to the file's author
            content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = dict(_flat(content))
    except Exception as error:  # there is little that a damaged pickle does not raise
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(path):
            raise CheckpointError(
                f"{path.name} holds more than tensors and was not opened, because loading it could run code; "
                "ask its author for a .safetensors file"
            ) from error
        raise CheckpointError(f"{path.name} is damaged or not a PyTorch file; download or copy it again") from error
    return tensors, _own_words(content.get(_METADATA_KEY) if isinstance(content, Mapping) else None)


def _is_pickle(path: Path) -> bool:
    """Whether it begins as torch's zip archive or as a pickle; a renamed text does neither."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings, their keys joined by dots."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, Tensor):
        yield prefix, node


def _own_words(header: Any) -> dict[str, Any]:
    """What imprompt wrote about a file; nothing where the entry is somebody else's."""
    try:
        words = json.loads(header if isinstance(header, str) else json.dumps(header))
    except (ValueError, TypeError, RecursionError):
        return {}
    return words if isinstance(words, dict) else {}


def _public(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Bring any known layout to the public one."""
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for other, ours in _PREFIXES.items():
            key = ours + key.removeprefix(other) if key.startswith(other) else key
        if key.startswith(_OURS):
            found[key] = value
    if not any(key.startswith("ip_adapter.") for key in found):  # safetensors dropped the shared copies
        inside = {match.groups(): value for key, value in tensors.items() if (match := _TRAINED_INSIDE.fullmatch(key))}
        if strange := [layer for layer, _ in inside if layer.split(".")[0] not in _BLOCKS]:
            raise CheckpointError(
                f"{name} was trained inside an unknown model: expected layers in {', '.join(_BLOCKS)}, received {strange[0]}"
            )
        order = sorted({layer for layer, _ in inside}, key=_public_order)
        for (layer, weight), value in inside.items():
            found[f"ip_adapter.{2 * order.index(layer) + 1}.{weight}"] = value
    if not any(k.startswith("ip_adapter.") for k in found) or not any(k.startswith("image_proj.") for k in found):
        raise CheckpointError(
            f"{name} is not an IP-Adapter: expected tensors under image_proj. and ip_adapter., "
            f"received {', '.join(sorted(tensors)[:3]) or 'none'} …; a whole model goes to --base"
        )
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _public_order(layer: str) -> tuple[int, list[Any]]:
    """Down, up, mid; numbers as numbers."""
    return _BLOCKS.index(layer.split(".")[0]), _natural(layer)


def _natural(text: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)]


# -------------------------------------------------------------------------------------------------------- recognising


def recognise(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Spec:
    """What these tensors (in the public layout) are. Raises CheckpointError where they are of no known kind."""
    layers = {}
    for key in tensors:
        if match := re.fullmatch(r"ip_adapter\.(\d+)\.to_k_ip\.weight", key):
            layers[int(match[1])], cross = _size(tensors, key)
    if not layers:
        raise CheckpointError("the file has no ip_adapter.<n>.to_k_ip.weight: it holds no adapter, or was saved incompletely")

    def shape(name: str, dimensions: int = 2) -> torch.Size | None:
        key = "image_proj." + name
        return _size(tensors, key, dimensions) if key in tensors else None

    if size := shape("proj.weight"):
        kind, tokens, features = "global", size[0] // cross, size[1]
        if size[0] % cross:
            raise CheckpointError(f"image_proj.proj.weight should have a multiple of {cross} rows, received {size[0]}; the file is altered")
    elif shape("proj.3.weight", 1) and (size := shape("proj.0.weight")):
        kind, tokens, features = "full-face", 0, size[1]
    elif size := shape("perceiver_resampler.proj_in.weight"):
        kind, tokens, features = "faceid-plus", _rows(shape("proj.2.weight")) // cross, size[1]
    elif shape("norm.weight", 1) and (size := shape("proj.0.weight")):
        kind, tokens, features = "faceid", _rows(shape("proj.2.weight")) // cross, size[1]
    elif (size := shape("proj_in.weight")) and (latents := shape("latents", 3)):
        faces = size[1] == FACE or "normalised" in (metadata or {})  # FaceID-Portrait, unnormalised
        kind, tokens, features = "faceid-resampler" if faces else "resampler", latents[1], size[1]
    else:
        names = sorted(key for key in tensors if key.startswith("image_proj."))
        raise CheckpointError(f"unknown kind of adapter: image_proj holds {', '.join(names[:4])} …")
    parameters = sum(t.numel() for t in tensors.values())
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    together = str((metadata or {}).get("aggregator", "concat"))
    if together not in AGGREGATORS:
        raise CheckpointError(f"the file brings references together by {together!r}; expected one of {', '.join(AGGREGATORS)}")
    return Spec(kind, tokens, features, cross, layers, parameters, dtype, metadata or {}, together)


def _size(tensors: Mapping[str, Tensor], key: str, dimensions: int = 2) -> torch.Size:
    """The shape of a tensor that the rest is read off. Raises CheckpointError where it cannot be."""
    size = tensors[key].shape
    if len(size) != dimensions or 0 in size:
        raise CheckpointError(f"{key} should have {dimensions} dimensions, received {tuple(size)}; the file is incomplete or altered")
    return size


def _rows(size: torch.Size | None) -> int:
    return size[0] if size else 0


# ----------------------------------------------------------------------------------------------- adapters and writing


def load_adapter(path: Path | str) -> tuple[Adapter, Spec]:
    """An adapter from a file, in float32, and what it is."""
    tensors, metadata = read(path)
    spec = recognise(tensors, metadata)
    with torch.device("meta"):
        adapter = Adapter(_projector(spec, tensors), spec.layers, spec.cross, AGGREGATORS[spec.aggregator](spec.features, spec.cross))
        for n, parts in _low_rank(tensors).items():
            adapter.add_low_rank(n, parts)
    expected = {key: value.shape for key, value in adapter.state_dict().items()}
    wrong = [key for key, size in expected.items() if key not in tensors or tensors[key].shape != size] or [
        key for key in tensors if key not in expected
    ]
    if wrong:
        received = tuple(tensors[wrong[0]].shape) if wrong[0] in tensors else "nothing"
        wanted = tuple(expected[wrong[0]]) if wrong[0] in expected else "nothing"
        raise CheckpointError(f"{Path(path).name}: {wrong[0]} should be {wanted}, received {received}; the file is incomplete or altered")
    adapter.load_state_dict({key: tensors[key].float() for key in expected}, assign=True)
    return adapter.requires_grad_(False).eval(), spec


def _variant(name: str) -> dict[str, Any]:
    """What the keys of a FaceID file do not tell, as its public name does."""
    return {"version": 2 if "plusv2" in name else 1, "normalised": "unnorm" not in name} if "faceid" in name else {}


def _low_rank(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, tuple[int, int, int]]]:
    """FaceID's low-rank additions: layer n → part → width in, width out, rank."""
    found: dict[int, dict[str, tuple[int, int, int]]] = {}
    for key in tensors:
        if match := re.fullmatch(r"ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.down\.weight", key):
            rank, inner = _size(tensors, key)
            up = key.replace("down", "up")
            outer = _size(tensors, up)[0] if up in tensors else inner
            found.setdefault(int(match[1]), {})[match[2]] = (inner, outer, rank)
    return found


def _layers(tensors: Mapping[str, Tensor], prefix: str, width: int) -> tuple[int, int]:
    """Of a resampler's layers: the heads of each, and how many there are."""
    query = f"{prefix}0.0.to_q.weight"
    depth = len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})
    return max(1, (_size(tensors, query)[0] if query in tensors else width) // HEAD_CHANNELS), depth


def _projector(spec: Spec, tensors: Mapping[str, Tensor]) -> Projector:
    if spec.kind in ("faceid", "faceid-plus"):
        middle, face = _size(tensors, "image_proj.proj.0.weight")
        if spec.kind == "faceid":
            return FaceProjector(face, spec.cross, spec.tokens, middle)
        heads, depth = _layers(tensors, "image_proj.perceiver_resampler.layers.", spec.cross)
        return FacePlusProjector(face, spec.features, spec.cross, spec.tokens, middle, heads, depth, spec.metadata.get("version") == 2)
    if spec.kind == "global":
        return LinearProjector(spec.features, spec.cross, spec.tokens)
    if spec.kind == "full-face":
        return MLPProjector(spec.features, spec.cross)
    width = tensors["image_proj.latents"].shape[2]
    heads, depth = _layers(tensors, "image_proj.layers.", width)
    return Resampler(spec.features, spec.cross, spec.tokens, width, heads, depth)


def save(adapter: Adapter, path: Path | str, metadata: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None) -> None:
    """Write an adapter as a public file, which diffusers and ComfyUI read. `.safetensors`, or `.bin` for old readers."""
    write({key: value.to(dtype or value.dtype) for key, value in adapter.state_dict().items()}, path, metadata)


def write(tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors that are in the public layout, atomically; the suffix decides the container."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise CheckpointError(f"cannot write {path.name}: expected a name ending in {', '.join(FORMATS)}")
    own = _with_own_storage(tensors)
    with atomic_path(path) as partial:
        if path.suffix in PICKLES:
            nested: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
            for key, value in own.items():
                group, name = key.split(".", 1)
                nested.setdefault(group, {})[name] = value
            torch.save(nested | ({_METADATA_KEY: dict(metadata)} if metadata else {}), partial)
        else:
            header = {"format": "pt"} | ({_METADATA_KEY: json.dumps(dict(metadata))} if metadata else {})
            safetensors.torch.save_file(own, partial, header)


def _with_own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies where need be: a slice would drag its whole into a pickle, and safetensors refuses tensors that share memory."""
    own: dict[str, Tensor] = {}
    taken = set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in taken:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        own[key] = value
    return own


def convert(source: Path | str, target: Path | str, plain: bool = False) -> Spec:
    """Rewrite any readable adapter file or training state as a public file. Values and dtypes stay as they are.

    plain: leave out a trained way of bringing references together, for readers that refuse what they do not know (InvokeAI).
    """
    tensors, metadata = read(source)
    if plain:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("aggregator.")}
        metadata = {key: value for key, value in metadata.items() if key != "aggregator"}
    spec = recognise(tensors, metadata)
    write(tensors, target, metadata)
    return spec
