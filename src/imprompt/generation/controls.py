"""Structure control beside image prompts: ControlNets, which a pipeline runs, and T2I-Adapters, whose features are handed to the UNet.

A T2I-Adapter looks at its picture once; a forward pre-hook adds what it found to every call of the UNet. So it goes with
every pipeline, and with ControlNets, of which diffusers has a pipeline for each task.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from torch import Tensor, nn

from imprompt.errors import UserError, brief
from imprompt.models.hub import MINI

# Public releases for SD 1.5 by what their picture shows; anything else is a folder or a hub id.
RELEASES = {
    "canny": "lllyasviel/control_v11p_sd15_canny",
    "depth": "lllyasviel/control_v11f1p_sd15_depth",
    "pose": "lllyasviel/control_v11p_sd15_openpose",
    "lineart": "lllyasviel/control_v11p_sd15_lineart",
    "softedge": "lllyasviel/control_v11p_sd15_softedge",
    "scribble": "lllyasviel/control_v11p_sd15_scribble",
    "normal": "lllyasviel/control_v11p_sd15_normalbae",
    "seg": "lllyasviel/control_v11p_sd15_seg",
    "tile": "lllyasviel/control_v11f1e_sd15_tile",
}
EMBEDDED = {"edges": "controlnet_edges", "silhouette": "t2i_silhouette"}  # mini's own


@dataclass(frozen=True)
class Control:
    """A picture that says where things are, and the model that reads it."""

    model: Any  # ControlNetModel or T2IAdapter
    picture: Image.Image
    weight: float = 1.0

    @property
    def by_pipeline(self) -> bool:
        """Whether a pipeline of diffusers runs it."""
        return isinstance(self.model, ControlNetModel)


def load_control(kind: str, base: str, device: str, dtype: torch.dtype) -> Any:
    """The model of this name, or in this folder, or of this hub id; its configuration says which of the two kinds it is.

    Raises UserError where there is none.
    """
    if base == "mini" and kind not in EMBEDDED and "/" not in kind:
        raise UserError(f"control: mini reads {' and '.join(EMBEDDED)}; received {kind!r}")
    source: Any = MINI / EMBEDDED[kind] if base == "mini" and kind in EMBEDDED else RELEASES.get(kind, kind)
    classes: dict[str, Any] = {"ControlNetModel": ControlNetModel, "T2IAdapter": T2IAdapter}
    try:
        name = ControlNetModel.load_config(source)["_class_name"]
        if name not in classes:
            raise ValueError(f"a {name} lies there")
        return classes[name].from_pretrained(source, torch_dtype=dtype).to(device).eval()
    except Exception as error:  # for missing and damaged parts the libraries raise nearly anything
        names = ", ".join(EMBEDDED if base == "mini" else RELEASES)
        raise UserError(
            f"control: no ControlNet or T2I-Adapter at {kind} ({brief(error)}); expected {names}, a folder or a hub id"
        ) from error


@contextmanager
def adapted(unet: nn.Module, controls: Sequence[Control], size: tuple[int, int]) -> Iterator[None]:
    """Within the context the UNet hears these T2I-Adapters. size: width and height of what is drawn, in pixels."""
    if not controls:
        yield
        return
    features = [_features(control, size) for control in controls]
    depths = {len(found) for found in features}
    if len(depths) > 1:
        raise UserError("control: these T2I-Adapters were made for different models")
    together = [torch.stack(list(level)).sum(0) for level in zip(*features, strict=True)]

    def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sample = args[0] if args else kwargs["sample"]
        spread = [level.to(sample).expand(len(sample), -1, -1, -1).clone() for level in together]  # the UNet takes the list apart
        return args, {**kwargs, "down_intrablock_additional_residuals": spread}

    handle = unet.register_forward_pre_hook(feed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _features(control: Control, size: tuple[int, int]) -> list[Tensor]:
    """What a T2I-Adapter finds in its picture at each level of the UNet: (1, channels, height, width)."""
    model = control.model
    weight = next(model.parameters())
    channels = model.adapter.conv_in.in_channels // model.adapter.unshuffle.downscale_factor**2
    picture = control.picture.convert("L" if channels == 1 else "RGB").resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).float().div(255).reshape(size[1], size[0], channels).permute(2, 0, 1)[None]
    return [control.weight * level for level in model(pixels.to(weight))]


def condition(control: Control, size: tuple[int, int]) -> Image.Image:
    """A ControlNet's picture at the size that is drawn."""
    return control.picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
