"""Structure control: ControlNets, which a pipeline runs, and T2I-Adapters, whose features are added in the UNet.

A T2I-Adapter reads its control image once; a forward pre-hook adds its features to every call of the UNet. So it goes with
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

from imprompt.errors import UserError
from imprompt.models import hub
from imprompt.models.hub import MINI_PATH

# Public releases for SD 1.5 by the kind of control image; anything else is a folder or a hub id.
PUBLIC_CONTROLNETS = {
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
BUNDLED_CONTROLS = {"edges": "controlnet_edges", "silhouette": "t2i_silhouette"}  # of mini


@dataclass(frozen=True)
class Control:
    """A control image at the size of the output, the model that reads it, and its conditioning scale."""

    model: Any  # ControlNetModel or T2IAdapter
    image: Image.Image
    scale: float = 1.0

    @property
    def is_controlnet(self) -> bool:
        """Whether a pipeline of diffusers runs it, rather than `apply_t2i_adapters`."""
        return isinstance(self.model, ControlNetModel)


def load_control(kind: str, model: str, device: str, dtype: torch.dtype) -> Any:
    """A ControlNet or T2I-Adapter by name, folder or hub id; its own configuration decides which of the two it is.

    Raises UserError where there is none.
    """
    if model == "mini" and kind not in BUNDLED_CONTROLS and "/" not in kind:
        raise UserError(f"control: mini has {' and '.join(BUNDLED_CONTROLS)}; received {kind!r}")
    source: Any = MINI_PATH / BUNDLED_CONTROLS[kind] if model == "mini" and kind in BUNDLED_CONTROLS else PUBLIC_CONTROLNETS.get(kind, kind)
    classes: dict[str, Any] = {"ControlNetModel": ControlNetModel, "T2IAdapter": T2IAdapter}
    hub.prepare(source)
    try:
        name = ControlNetModel.load_config(source)["_class_name"]
        if name not in classes:
            raise ValueError(f"it is a {name}")
        return classes[name].from_pretrained(source, torch_dtype=dtype).to(device).eval()
    except Exception as error:  # for missing and damaged parts the libraries raise nearly anything
        names = ", ".join(BUNDLED_CONTROLS if model == "mini" else PUBLIC_CONTROLNETS)
        raise UserError(
            f"control: no ControlNet or T2I-Adapter at {kind} ({hub.explain_failure(error)}); expected {names}, a folder or a hub id"
        ) from error


@contextmanager
def apply_t2i_adapters(unet: nn.Module, controls: Sequence[Control]) -> Iterator[None]:
    """Within the context the UNet is conditioned on these T2I-Adapters, whose images have the size of the output."""
    if not controls:
        yield
        return
    features = [_compute_features(control) for control in controls]
    depths = {len(levels) for levels in features}
    if len(depths) > 1:
        raise UserError("control: these T2I-Adapters were made for different models")
    summed = [torch.stack(list(level)).sum(0) for level in zip(*features, strict=True)]

    def add_features(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sample = args[0] if args else kwargs["sample"]
        residuals = [level.to(sample).expand(len(sample), -1, -1, -1).clone() for level in summed]  # the UNet empties the list
        return args, {**kwargs, "down_intrablock_additional_residuals": residuals}

    handle = unet.register_forward_pre_hook(add_features, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _compute_features(control: Control) -> list[Tensor]:
    """Features of a control image for each level of the UNet: (1, channels, height, width)."""
    model = control.model
    weight = next(model.parameters())
    channels = model.adapter.conv_in.in_channels // model.adapter.unshuffle.downscale_factor**2
    image = control.image.convert("L" if channels == 1 else "RGB")
    pixels = torch.from_numpy(np.array(image)).float().div(255).reshape(image.height, image.width, channels).permute(2, 0, 1)[None]
    return [control.scale * level for level in model(pixels.to(weight))]
