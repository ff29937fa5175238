"""Base models: loaded from the package, a folder or the hub; schedulers by name."""

import importlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor

from imprompt.errors import UserError
from imprompt.hub import MINI

# diffusers' class for each name, and what it is told beyond the model's own settings.
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def pick_device(device: str = "auto") -> str:
    """The device of this name; `auto` takes the best one here."""
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} is not to be had here; use cpu or auto") from error
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str, device: str, mini: bool) -> torch.dtype:
    """`auto`: float16 on GPUs; on CPU bfloat16 for mini where the processor computes in it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device != "cpu":
        return torch.float16
    return torch.bfloat16 if mini and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@lru_cache(maxsize=1)
def load_base(source: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A text-to-image pipeline with a UNet. The last one loaded is kept in memory.

    Raises UserError where there is none, or where its denoiser is no UNet.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    mini = source == "mini"
    if mini and not (MINI / "model_index.json").is_file():
        raise UserError("the embedded model is not there yet; build it with: imprompt mini make")
    if source.endswith(FILES) and not Path(source).is_dir():
        raise UserError(f"{source} is a single file; expected a folder in diffusers' form, or a hub id")
    kind: Any = StableDiffusionPipeline if mini else DiffusionPipeline
    optional = {"safety_checker": None, "requires_safety_checker": False} if mini else {}
    try:
        pipe = kind.from_pretrained(MINI if mini else source, torch_dtype=dtype, **optional)
    except (OSError, ValueError) as error:
        raise UserError(f"no base model at {source}: expected mini, a folder in diffusers' form, or a hub id ({_short(error)})") from error
    if not hasattr(pipe, "unet"):
        raise UserError(f"{source} is a {type(pipe).__name__} without a UNet; expected a Stable Diffusion 1.5, 2.1 or XL model")
    if mini and device == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())  # at these shapes the fused kernel is the slower one on CPU
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


FILES = (".safetensors", ".ckpt", ".bin")


def set_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline the scheduler of this name, with the model's own noise schedule."""
    class_name, settings = _SCHEDULERS[name]
    kind = getattr(importlib.import_module("diffusers"), class_name)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)


def check_size(pipe: Any, width: int, height: int) -> None:
    """Raise UserError for a size that the model cannot draw."""
    step = math.lcm(8, pipe.vae_scale_factor)  # diffusers asks for multiples of 8 whatever the VAE
    if width % step or height % step:
        near = tuple(max(step, round(n / step) * step) for n in (width, height))
        raise UserError(f"size: the model draws multiples of {step} pixels, received {width}x{height}; nearest is {near[0]}x{near[1]}")
    least = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if min(width, height) < least:
        raise UserError(f"size: the model draws at least {least} pixels a side, received {width}x{height}")


def own_size(pipe: Any) -> int:
    """The side in pixels that the model was trained at."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
