"""Base models: pipelines loaded from the package, a folder, a single file or the hub; devices, data types and schedulers by name."""

import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import nn

from imprompt.core.noise_schedule import PREDICTION_TYPES, NoiseSchedule, make_rectified_flow_schedule, make_vp_schedule
from imprompt.errors import UserError, summarize_error
from imprompt.models import hub
from imprompt.models.hub import MINI_PATH
from imprompt.models.tensor_files import check_finite, tensor_names
from imprompt.unet.mkldnn import prepack_weights, to_channels_last_if_faster
from imprompt.utils.compat import cpu_supports_bfloat16
from imprompt.utils.protocols import UNetPipeline

if TYPE_CHECKING:
    from diffusers import ControlNetModel, SchedulerMixin

# diffusers' class for each name, and its arguments in addition to the model's own scheduler config.
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

MINI_GUIDANCE_SCALE, DEFAULT_GUIDANCE_SCALE = 3.0, 7.5
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".bin")


def resolve_device(device: str = "auto") -> str:
    """The device of this name; `auto` is a GPU where there is one, else the CPU. Raises UserError for one that does not work."""
    if device != "auto":
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} is not available on this machine; use cpu or auto") from error
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def set_device(device: str = "auto") -> str:
    """`resolve_device` for this process: with several GPUs, each local process uses its own and makes it the current one."""
    device = resolve_device(device)
    if device.startswith("cuda"):
        index = int(os.environ.get("LOCAL_RANK", torch.device(device).index or 0)) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return f"cuda:{index}"
    return device


def resolve_dtype(dtype: str, device: str, *, is_mini: bool) -> torch.dtype:
    """The data type for sampling. `auto`: float16 on GPUs; on the CPU bfloat16 for mini if the CPU supports it, else float32."""
    if dtype != "auto":
        return _dtype_named(dtype)
    if device != "cpu":
        return torch.float16
    return torch.bfloat16 if is_mini and cpu_supports_bfloat16() else torch.float32


def resolve_mixed_precision(dtype: str, device: str) -> torch.dtype:
    """The data type for training. `auto`: bfloat16 if the device supports it, else float32 (float16 overflows in the resampler)."""
    if dtype != "auto":
        return _dtype_named(dtype)
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if device == "cpu" and cpu_supports_bfloat16() else torch.float32


def _dtype_named(name: str) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, name))


def load_pipeline(source: str, device: str = "cpu", dtype: torch.dtype = torch.float32, model_config: str | None = None) -> UNetPipeline:
    """A pipeline with a UNet, from `mini`, a folder, a single file or a hub id. Every call loads it anew.

    `model_config` is for single files, see `_load_single_file`. Raises UserError where there is no such model, or where its
    denoiser is not a UNet.
    """
    is_mini = source == "mini"
    if is_mini and not (MINI_PATH / "model_index.json").is_file():
        raise UserError("the embedded model is not built yet; build it with: imprompt mini build")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers use the argument dtype, which older ones ignore silently
            if not is_mini:
                hub.prepare(source)
            is_file = source.endswith(SINGLE_FILE_SUFFIXES) and not os.path.isdir(source)
            pipe = _load_single_file(source, dtype, model_config) if is_file else _load_pretrained(source, dtype)
    except UserError:
        raise
    except Exception as error:  # missing and damaged parts make the libraries raise nearly any exception
        raise UserError(
            f"no base model at {source}: expected mini, a folder in diffusers' form, or a hub id ({hub.explain_failure(error)})"
        ) from error
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel) or not hasattr(pipe, "vae_scale_factor"):
        raise UserError(
            f"{source} is a {type(pipe).__name__}, which image prompts do not support; expected a Stable Diffusion 1.5, 2.1 or XL model"
        )
    for name, component in getattr(pipe, "components", {}).items():
        if isinstance(component, nn.Module):
            check_finite(component, f"{source}: {name}")
    if is_mini and device == "cpu":
        _optimize_for_cpu(pipe, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _load_pretrained(source: str, dtype: torch.dtype) -> UNetPipeline:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    if source == "mini":
        pipe = StableDiffusionPipeline.from_pretrained(MINI_PATH, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False)
    else:
        check_model_index(source)
        pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, trust_remote_code=False)
    return cast(UNetPipeline, pipe)


def check_model_index(source: str) -> None:
    """Raise UserError where the model_index.json of a folder or hub id names classes outside diffusers and transformers.

    Older versions of diffusers run the code of such classes, without a question if they are in a folder.
    """
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(source)
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"{source} brings its own pipeline, {index.get('_class_name')}, and is not loaded, because that would run its code")
    for name, component in index.items():
        library = component[0] if isinstance(component, (list, tuple)) and component else None
        if isinstance(library, str) and not _is_trusted(library):
            raise UserError(f"{source} takes its {name} from {library}, and is not loaded, because that would run its code")


def _is_trusted(library: str) -> bool:
    """Whether a component comes from diffusers or transformers; the folders of diffusers' pipelines have names of their own."""
    if library in ("diffusers", "transformers"):
        return True
    folders = ("diffusers.pipelines", "diffusers.pipelines.deprecated")
    return library.isidentifier() and any(importlib.util.find_spec(f"{folder}.{library}") for folder in folders)


def _optimize_for_cpu(pipe: UNetPipeline, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        prepack_weights(pipe.unet)
    else:
        to_channels_last_if_faster(pipe.unet)
        to_channels_last_if_faster(pipe.vae)
    pipe.unet.set_attn_processor(AttnProcessor())  # for mini's small tensors the fused attention kernel is slower on the CPU


def _load_single_file(source: str, dtype: torch.dtype, model_config: str | None) -> UNetPipeline:
    """A Stable Diffusion pipeline from a single file in the original layout. Its tensor names tell whether it is SDXL.

    The configuration of its family comes from the hub, or from `model_config`: any folder of that family in diffusers' form.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if not os.path.isfile(source):
        raise UserError(f"no base model at {source}: there is no such file")
    if not source.endswith(".safetensors"):
        raise UserError(
            f"{source} is a pickle, which could run code; expected a .safetensors file, a folder in diffusers' form, or a hub id"
        )
    names = tensor_names(source)
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise UserError(
            f"{source} does not contain a whole model: expected model.diffusion_model.… among its tensors; "
            "pass an adapter with --adapter, a LoRA with --lora"
        )
    is_sdxl = any(name.startswith("conditioner.embedders.") for name in names)
    pipeline_class = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    components = (
        {"image_encoder": None} | ({"config": model_config} if model_config else {}) | ({} if is_sdxl else {"safety_checker": None})
    )
    if not model_config:
        hub.prepare("")  # the configuration of its family
    try:
        if model_config:
            check_model_index(model_config)
        pipe = pipeline_class.from_single_file(source, torch_dtype=dtype, local_files_only=bool(model_config), **components)
        return cast(UNetPipeline, pipe)
    except UserError:
        raise
    except Exception as error:
        remedy = "is the folder of the same family?" if model_config else "offline, pass a folder of the same family with --model-config"
        raise UserError(
            f"{source} could not be read as a {'SDXL' if is_sdxl else 'Stable Diffusion'} model ({summarize_error(error)}); {remedy}"
        ) from error


def noise_schedule_from(scheduler: "SchedulerMixin") -> NoiseSchedule:
    """The noise schedule that a model was trained with, from its scheduler's config. Raises UserError for an unknown prediction type."""
    config = scheduler.config
    num_timesteps = config.num_train_timesteps
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        fresh = type(scheduler).from_config(config)
        return make_rectified_flow_schedule(fresh.sigmas[:num_timesteps].flip(0), fresh.timesteps[:num_timesteps].flip(0))
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type == "flow_prediction":
        return make_rectified_flow_schedule(torch.arange(1, num_timesteps + 1) / num_timesteps, torch.arange(num_timesteps))
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"the base model predicts {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}, or flow_prediction")
    return make_vp_schedule(scheduler.alphas_cumprod, prediction_type)


@contextmanager
def use_scheduler(pipe: UNetPipeline, name: str, num_inference_steps: int) -> Iterator[None]:
    """Within the context the pipeline uses the scheduler of this name, with the model's own noise schedule.

    Raises UserError for more steps than the scheduler supports.
    """
    class_name, arguments = _SCHEDULERS[name]
    original = pipe.scheduler
    scheduler = getattr(importlib.import_module("diffusers"), class_name).from_config(original.config, **arguments)
    # Of T timesteps, the offset of some models and the finite σ of some schedulers take one each.
    max_steps = scheduler.config.get("original_inference_steps") or scheduler.config.num_train_timesteps - 2
    if num_inference_steps > max_steps:
        raise UserError(f"num_inference_steps: expected at most {max_steps} with {name}, received {num_inference_steps}")
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = original


def to_task_pipeline(
    pipe: UNetPipeline, *, image_to_image: bool = False, inpainting: bool = False, controlnets: Sequence["ControlNetModel"] = ()
) -> UNetPipeline:
    """diffusers' pipeline for a task, around the same models; the pipeline itself for plain text-to-image."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

    if not image_to_image and not inpainting and not controlnets:
        return pipe
    task = AutoPipelineForInpainting if inpainting else AutoPipelineForImage2Image if image_to_image else AutoPipelineForText2Image
    components = {"controlnet": list(controlnets) if len(controlnets) > 1 else controlnets[0]} if controlnets else {}
    task_pipe = cast(UNetPipeline, task.from_pipe(pipe, **components))
    task_pipe.set_progress_bar_config(disable=True)
    return task_pipe


def size_constraints(pipe: UNetPipeline) -> tuple[int, int]:
    """The number of pixels of which each side of a generated image must be a multiple, and the smallest side."""
    multiple = math.lcm(8, pipe.vae_scale_factor)  # diffusers requires multiples of 8 whatever the VAE
    return multiple, -(-pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1) // multiple) * multiple


def check_size(pipe: UNetPipeline, width: int, height: int) -> None:
    """Raise UserError for a size in pixels that the model cannot generate."""
    multiple, smallest = size_constraints(pipe)
    if width % multiple or height % multiple:
        nearest = "x".join(str(max(smallest, round(side / multiple) * multiple)) for side in (width, height))
        raise UserError(f"resolution: the model generates multiples of {multiple} pixels, received {width}x{height}; nearest is {nearest}")
    if min(width, height) < smallest:
        raise UserError(f"resolution: the model generates at least {smallest} pixels a side, received {width}x{height}")


def native_resolution(pipe: UNetPipeline) -> int:
    """The side in pixels of the images that the model was trained on."""
    return cast(int, pipe.unet.config.sample_size * pipe.vae_scale_factor)


def default_guidance_scale(model: str) -> float:
    """The guidance scale that suits a base model."""
    return MINI_GUIDANCE_SCALE if model == "mini" else DEFAULT_GUIDANCE_SCALE


def sample_images(
    pipe: UNetPipeline, prompts: Sequence[str], num_inference_steps: int, seeds: Iterable[int], size: tuple[int, int], guidance_scale: float
) -> list[Image.Image]:
    """One image for each prompt and its seed. size: height and width in pixels."""
    output = pipe(
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        height=size[0],
        width=size[1],
    )
    return cast(list[Image.Image], output.images)


def hide_loading_progress() -> None:
    """Switch off diffusers' and transformers' progress bars for loading files, which are many and short."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
