"""Base models: loaded from the package, a folder or the hub; schedulers by name."""

import importlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from imprompt.core.noise_schedule import TARGETS, Schedule, rectified_flow, variance_preserving
from imprompt.errors import UserError, brief
from imprompt.models import checkpoints
from imprompt.models.hub import MINI
from imprompt.unet.mkldnn import order, pack

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


MINI_GUIDANCE, GUIDANCE = 3.0, 7.5


def pick_device(device: str = "auto") -> str:
    """The device of this name; `auto` takes the best one here."""
    if device != "auto":
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} is not to be had here; use cpu or auto") from error
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def claim_device(device: str = "auto") -> str:
    """`pick_device` for this process: of several on a machine with GPUs, each takes its own and makes it the current one."""
    device = pick_device(device)
    if device.startswith("cuda"):
        index = int(os.environ.get("LOCAL_RANK", torch.device(device).index or 0)) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return f"cuda:{index}"
    return device


def pick_dtype(dtype: str, device: str, mini: bool) -> torch.dtype:
    """`auto`: float16 on GPUs; on CPU bfloat16 for mini where the processor computes in it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device != "cpu":
        return torch.float16
    return torch.bfloat16 if mini and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def pick_precision(name: str, device: str) -> torch.dtype:
    """For training. `auto`: bfloat16 where the device computes in it, else float32 (float16 overflows in the resampler)."""
    if name != "auto":
        return getattr(torch, name)
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@lru_cache(maxsize=1)
def load_base(source: str, device: str = "cpu", dtype: torch.dtype = torch.float32, config: str | None = None) -> Any:
    """A pipeline with a UNet. The last one loaded is kept in memory. config: of a single file, see `_from_file`.

    Raises UserError where there is none, or where its denoiser is no UNet.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    mini = source == "mini"
    if mini and not (MINI / "model_index.json").is_file():
        raise UserError("the embedded model is not there yet; build it with: imprompt mini make")
    single = source.endswith(FILES) and not os.path.isdir(source)
    kind: Any = StableDiffusionPipeline if mini else DiffusionPipeline
    optional = {"safety_checker": None, "requires_safety_checker": False} if mini else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers say dtype, which older ones ignore in silence
            pipe = (
                _from_file(source, dtype, config)
                if single
                else kind.from_pretrained(MINI if mini else source, torch_dtype=dtype, **optional)
            )
    except UserError:
        raise
    except Exception as error:  # for missing and damaged parts the libraries raise nearly anything
        raise UserError(f"no base model at {source}: expected mini, a folder in diffusers' form, or a hub id ({brief(error)})") from error
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel) or not hasattr(pipe, "vae_scale_factor"):
        raise UserError(
            f"{source} is a {type(pipe).__name__}, which image prompts are not made for; expected a Stable Diffusion 1.5, 2.1 or XL model"
        )
    if mini and device == "cpu":
        if dtype == torch.bfloat16:
            pack(pipe.unet)
        else:
            order(pipe.unet)
            order(pipe.vae)
        pipe.unet.set_attn_processor(AttnProcessor())  # at these shapes the fused kernel is the slower one on CPU
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _from_file(source: str, dtype: torch.dtype, config: str | None) -> Any:
    """A Stable Diffusion from a single file, as people share them. Which family it is, is read off its keys.

    The configuration of that family comes from the hub, or from `config`, any folder of it in diffusers' form.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if not os.path.isfile(source):
        raise UserError(f"no base model at {source}: there is no such file")
    if not source.endswith(".safetensors"):
        raise UserError(
            f"{source} is a pickle, which could run code; expected a .safetensors file, a folder in diffusers' form, or a hub id"
        )
    keys = checkpoints.keys(source)
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise UserError(
            f"{source} holds no whole model: expected model.diffusion_model.… among its tensors; "
            "an adapter goes to --adapter, a LoRA to --lora"
        )
    large = any(key.startswith("conditioner.embedders.") for key in keys)
    kind: Any = StableDiffusionXLPipeline if large else StableDiffusionPipeline
    told = {"image_encoder": None} | ({"config": config} if config else {}) | ({} if large else {"safety_checker": None})
    try:
        return kind.from_single_file(source, torch_dtype=dtype, local_files_only=bool(config), **told)
    except Exception as error:
        remedy = "is the folder of the same family?" if config else "offline, name a folder of the same family with --base-config"
        raise UserError(
            f"{source} could not be read as a {'SDXL' if large else 'Stable Diffusion'} model ({brief(error)}); {remedy}"
        ) from error


def schedule_of(scheduler: Any) -> Schedule:
    """The noise schedule that a base was trained with, read off its scheduler. Raises UserError for one that is not known."""
    config = scheduler.config
    count = config.num_train_timesteps
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        fresh = type(scheduler).from_config(config)
        return rectified_flow(fresh.sigmas[:count].flip(0), fresh.timesteps[:count].flip(0))
    target = config.get("prediction_type", "epsilon")
    if target == "flow_prediction":
        return rectified_flow(torch.arange(1, count + 1) / count, torch.arange(count))
    if target not in TARGETS:
        raise UserError(f"the base predicts {target!r}; expected one of {', '.join(TARGETS)}, or flow_prediction")
    return variance_preserving(scheduler.alphas_cumprod, target)


FILES = (".safetensors", ".ckpt", ".bin")


@contextmanager
def scheduled(pipe: Any, name: str, steps: int) -> Iterator[None]:
    """Give a pipeline the scheduler of this name, with the model's own noise schedule, and put its own one back.

    Raises UserError for more steps than the scheduler can take.
    """
    class_name, settings = _SCHEDULERS[name]
    kind = getattr(importlib.import_module("diffusers"), class_name)
    own = pipe.scheduler
    scheduler = kind.from_config(own.config, **settings)
    # Of T timesteps, the offset of some models and the finite σ of some schedulers take one each.
    most = scheduler.config.get("original_inference_steps") or scheduler.config.num_train_timesteps - 2
    if steps > most:
        raise UserError(f"steps: expected at most {most} with {name}, received {steps}")
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def for_task(pipe: Any, init: bool, mask: bool, controlnets: Sequence[Any]) -> Any:
    """diffusers' pipeline for a task, around the same parts: from a picture, into a picture, with ControlNets."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

    if not init and not mask and not controlnets:
        return pipe
    kind: Any = AutoPipelineForInpainting if mask else AutoPipelineForImage2Image if init else AutoPipelineForText2Image
    more = {"controlnet": list(controlnets) if len(controlnets) > 1 else controlnets[0]} if controlnets else {}
    made = kind.from_pipe(pipe, **more)
    made.set_progress_bar_config(disable=True)
    return made


def grain(pipe: Any) -> tuple[int, int]:
    """Of what number of pixels a side is a multiple, and its smallest."""
    step = math.lcm(8, pipe.vae_scale_factor)  # diffusers asks for multiples of 8 whatever the VAE
    return step, -(-pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1) // step) * step


def check_size(pipe: Any, width: int, height: int) -> None:
    """Raise UserError for a size that the model cannot draw."""
    step, least = grain(pipe)
    if width % step or height % step:
        near = tuple(max(least, round(n / step) * step) for n in (width, height))
        raise UserError(f"size: the model draws multiples of {step} pixels, received {width}x{height}; nearest is {near[0]}x{near[1]}")
    if min(width, height) < least:
        raise UserError(f"size: the model draws at least {least} pixels a side, received {width}x{height}")


def guidance_of(base: str) -> float:
    """The guidance scale that suits a base."""
    return MINI_GUIDANCE if base == "mini" else GUIDANCE


def drawing(
    pipe: Any, prompts: Sequence[str], steps: int, seeds: Iterable[int], size: tuple[int, int], guidance: float
) -> list[Image.Image]:
    """One picture for each prompt and seed. size: height and width in pixels."""
    return pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        height=size[0],
        width=size[1],
    ).images


def own_size(pipe: Any) -> int:
    """The side in pixels that the model was trained at."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def hide_progress() -> None:
    """No progress bars for loading files: they are many and short."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
