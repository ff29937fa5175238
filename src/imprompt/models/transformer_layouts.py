"""Adapter files for transformers: XLabs (Flux), InstantX (Flux and SD3.5, in both namings), converted to the public layout and back.

In memory all have the layout of InstantX's releases, which is that of UNet adapters: `image_proj.…`, `ip_adapter.<n>.to_{k,v}_ip.…`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

# XLabs-AI/flux-ip-adapter: `double_blocks.3.processor.ip_adapter_double_stream_k_proj.weight`
_XLABS_LAYER = re.compile(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)")
_XLABS_PROJECTION = "ip_adapter_proj_model."
_PUBLIC_LAYER = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.(weight|bias)")

# InstantX/SD3.5-Large-IP-Adapter, as diffusers names it: layers.0.attn.to_q → layers.0.0.to_q
_DIFFUSERS_RESAMPLER = {
    "ln0": "0.norm1", "ln1": "0.norm2", "attn.to_q": "0.to_q", "attn.to_kv": "0.to_kv", "attn.to_out.0": "0.to_out", "adaln_norm": "1.0",
    "ff.net.0.proj": "1.1", "ff.net.2": "1.3", "adaln_proj": "2.1",
}  # fmt: skip
_RESAMPLER_LAYER = re.compile(r"(image_proj\.layers\.\d+)\.(.+)\.(weight|bias)")


def rename_to_public(name: str) -> str:
    """The public name of a tensor of any transformer adapter; other names are returned unchanged."""
    if match := _XLABS_LAYER.fullmatch(name):
        return f"ip_adapter.{match[1]}.to_{match[2]}_ip.{match[3]}"
    if name.startswith(_XLABS_PROJECTION):
        return "image_proj." + name.removeprefix(_XLABS_PROJECTION)
    if (match := _RESAMPLER_LAYER.fullmatch(name)) and match[2] in _DIFFUSERS_RESAMPLER:
        return f"{match[1]}.{_DIFFUSERS_RESAMPLER[match[2]]}.{match[3]}"
    return name


def to_released_names(tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Tensors in the public layout by the names of their family's releases, which other programs read."""
    return {_rename_to_xlabs(name) if family == "xlabs-flux" else name: tensor for name, tensor in tensors.items()}


def _rename_to_xlabs(name: str) -> str:
    if match := _PUBLIC_LAYER.fullmatch(name):
        return f"double_blocks.{match[1]}.processor.ip_adapter_double_stream_{match[2]}_proj.{match[3]}"
    return _XLABS_PROJECTION + name.removeprefix("image_proj.") if name.startswith("image_proj.") else name


def detect_family(tensors: Mapping[str, Tensor]) -> str:
    """The family (core.adapter.FAMILIES) of an adapter's tensors in the public layout.

    UNet files number cross-attention layers only, 1, 3, 5 …; those of transformers number every block from 0.
    """
    if "ip_adapter.0.norm_ip.linear.weight" in tensors:
        return "instantx-sd3"
    if "ip_adapter.0.to_k_ip.bias" in tensors:
        return "xlabs-flux"
    if "ip_adapter.0.to_k_ip.weight" not in tensors:
        return "unet"
    return "instantx-flux" if "image_proj.proj.2.weight" in tensors else "transformer"
