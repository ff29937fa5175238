"""Layouts of adapter files by many programs, converted to the public one; tensors that belong to no adapter are reported.

The public layout is that of the `.safetensors` releases: `image_proj.…` and `ip_adapter.<n>.to_{k,v}_ip.weight`, for FaceID also
`ip_adapter.<n>.to_{q,k,v,out}_lora.{down,up}.weight`. The weights of a trained aggregator are `aggregator.…`, which other readers ignore.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from imprompt.errors import CheckpointError, notify
from imprompt.models.transformer_layouts import rename_to_public
from imprompt.utils.text import escape, shorten

_PUBLIC_PREFIXES = ("image_proj.", "ip_adapter.", "aggregator.")
_PREFIX_ALIASES = {"image_proj_model.": "image_proj.", "adapter_modules.": "ip_adapter."}  # of other scripts → of the releases
_WRAPPER_NAMES = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile, anywhere in a name
_EMA_NAMES = ("ema", "ema_model", "ema_state_dict", "model_ema")
_CONTAINER_NAMES = ("state_dict", "model_state_dict", "model", *_EMA_NAMES)  # around all tensors of a checkpoint
# What is before one of these is the name of a container.
_ROOTS = (
    "image_proj", "image_proj_model", "ip_adapter", "adapter_modules", "aggregator", "unet", "ip_adapter_proj_model", "double_blocks",
)  # fmt: skip
_PROCESSOR_WEIGHT = re.compile(r"unet\.(.+)\.processor\.(to_[kv]_ip\.weight|to_(?:q|k|v|out)_lora\.(?:down|up)\.weight)")
_ATTENTION_LAYER = re.compile(r"unet\.((?:.+\.)?attn([12]))\..+")
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")  # of a UNet, in the order of the public numbering


def to_public_layout(tensors: Mapping[str, Tensor], file_name: str) -> dict[str, Tensor]:
    """The tensors of any known layout in the public one. Raises CheckpointError where they are no IP-Adapter.

    Reports the tensors that are left out: those of other models, and all but one of several sets of weights.
    """
    names = _choose_weights(tensors)
    public = {_rename(name): tensors[key] for name, key in names.items() if _is_public(name)}
    processors = _processor_weights({name: tensors[key] for name, key in names.items()}, file_name)
    public = processors | public  # safetensors drops the copies that share memory
    if not _is_adapter(public):
        raise CheckpointError(
            f"{file_name} is not an IP-Adapter: expected tensors under image_proj. and ip_adapter., "
            f"received {', '.join(map(shorten, sorted(tensors)[:3])) or 'none'} …; {_suggest_option(tensors)}"
        )
    used = {key for name, key in names.items() if _is_public(name) or _PROCESSOR_WEIGHT.fullmatch(name)}
    _report_unused([key for key in tensors if key not in used], file_name)
    return dict(sorted(public.items(), key=lambda item: _natural_sort_key(item[0])))


def _choose_weights(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name without wrappers and containers → key, for the weights to use: where there are several sets, those outside an EMA,
    then those in the usual containers.
    """
    sets: dict[tuple[str, ...], dict[str, str]] = {}
    for key in tensors:
        containers, name = _unwrap(key)
        sets.setdefault(containers, {}).setdefault(name, key)
    for containers in sorted(sets, key=_rank):
        if _is_adapter(map(_rename, sets[containers])) or any(map(_PROCESSOR_WEIGHT.fullmatch, sets[containers])):
            return sets[containers]
    return {name: key for names in reversed(sets.values()) for name, key in names.items()}


def _rank(containers: tuple[str, ...]) -> tuple[bool, bool]:
    return any(name in _EMA_NAMES for name in containers), any(name not in _CONTAINER_NAMES for name in containers)


def _unwrap(key: str) -> tuple[tuple[str, ...], str]:
    """The containers around a tensor, and its name without them."""
    parts = [part for part in key.split(".") if part not in _WRAPPER_NAMES]
    depth = next((i for i, part in enumerate(parts) if part in _ROOTS), 0)
    name = ".".join(parts[depth:])
    inner = name.removeprefix("ip_adapter.")
    return tuple(parts[:depth]), inner if inner.startswith((*_PREFIX_ALIASES, "image_proj.")) else name


def _rename(name: str) -> str:
    name = rename_to_public(name)
    alias = next((alias for alias in _PREFIX_ALIASES if name.startswith(alias)), None)
    return _PREFIX_ALIASES[alias] + name.removeprefix(alias) if alias else name


def _is_public(name: str) -> bool:
    return _rename(name).startswith(_PUBLIC_PREFIXES)


def _is_adapter(names: Iterable[str]) -> bool:
    groups = {name.split(".", 1)[0] for name in names}
    return {"image_proj", "ip_adapter"} <= groups


def _suggest_option(tensors: Mapping[str, Tensor]) -> str:
    is_lora = any("lora" in key.lower() for key in tensors)
    return "pass a LoRA with --lora" if is_lora else "pass a whole model with --model"


def _report_unused(keys: list[str], file_name: str) -> None:
    groups = Counter(shorten(escape(key.split(".", 1)[0])) for key in keys)
    if groups:
        listed = ", ".join(f"{name or 'no name'} ({count} tensor{'s' * (count > 1)})" for name, count in groups.most_common(5))
        notify(f"{file_name}: left out, because they are not part of the adapter that is read: {listed}{' …' * (len(groups) > 5)}")


def _processor_weights(tensors: Mapping[str, Tensor], file_name: str) -> dict[str, Tensor]:
    """The weights that a training state keeps in the UNet's attention processors, with their public names.

    The public index of a layer counts all attention layers of the UNet: 2 for each transformer block, of which the second is
    cross-attention.
    """
    weights = {match.groups(): value for key, value in tensors.items() if (match := _PROCESSOR_WEIGHT.fullmatch(key))}
    layers = {match[1]: int(match[2]) for key in tensors if (match := _ATTENTION_LAYER.fullmatch(key))} if weights else {}
    if unknown := [layer for layer, _ in weights if layer.split(".")[0] not in _BLOCKS or layer not in layers]:
        raise CheckpointError(
            f"{file_name} was trained inside an unknown model: expected layers in {', '.join(_BLOCKS)}, received {shorten(unknown[0])}"
        )
    blocks = sorted({layer[:-1] for layer in layers if layer.split(".")[0] in _BLOCKS}, key=_layer_sort_key)
    index = {block: 2 * i for i, block in enumerate(blocks)}
    return {f"ip_adapter.{index[layer[:-1]] + layers[layer] - 1}.{name}": value for (layer, name), value in weights.items()}


def _layer_sort_key(layer: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Down blocks, up blocks, mid block; numbers in a name are compared as numbers."""
    return _BLOCKS.index(layer.split(".")[0]), _natural_sort_key(layer)


def _natural_sort_key(text: str) -> list[tuple[int, int, str]]:
    """Numbers in a name are compared by their value, however many digits they have."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, len(part.lstrip("0")), part.lstrip("0")) if part[:1].isdigit() and part.isascii() else (1, 0, part) for part in parts]
