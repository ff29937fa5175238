"""`imprompt generate` on a full-size SD 1.5 on disk, with random weights: wall time and peak memory."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from rich.console import Console
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.random_models import SD15, random_adapter, random_model
from imprompt.mini.tokenizer import build_tokenizer
from imprompt.models import checkpoints

# The sizes of the real models: the text encoder of CLIP ViT-L/14, SD's VAE, the image encoder of CLIP ViT-H/14.
TEXT: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VAE: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VISION: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
}
_TINY = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FULL = (SD15, TEXT, VAE, VISION)
SMALL = (
    SD15 | {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32},
    TEXT | _TINY | {"hidden_size": 32},
    VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    VISION | _TINY | {"hidden_size": 64, "projection_dim": 64},
)

ADAPTER, REFERENCE, IMAGE_ENCODER = "adapter.safetensors", "reference.png", "image_encoder"


def write_models(folder: Path, *, small: bool = False, dtype: torch.dtype = torch.float16) -> None:
    """Write a base model in diffusers' format, an image encoder, a base adapter and a reference image, as public releases have them."""
    unet, text, vae, vision = SMALL if small else FULL
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    num_blocks = len(vae["block_out_channels"])
    vae = vae | {"down_block_types": ("DownEncoderBlock2D",) * num_blocks, "up_block_types": ("UpDecoderBlock2D",) * num_blocks}
    pipe = StableDiffusionPipeline(
        unet=random_model(lambda: UNet2DConditionModel(**unet), dtype),
        text_encoder=random_model(lambda: CLIPTextModel(CLIPTextConfig(vocab_size=49408, **text, **ids)), dtype),
        vae=random_model(lambda: AutoencoderKL(**vae, latent_channels=4, sample_size=512), dtype),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    checkpoints.save(random_adapter(pipe.unet, 4, vision["projection_dim"], dtype=dtype), folder / ADAPTER)
    del pipe
    random_model(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)), dtype).save_pretrained(folder / IMAGE_ENCODER)
    CLIPImageProcessor().save_pretrained(folder / IMAGE_ENCODER)
    Image.linear_gradient("L").convert("RGB").save(folder / REFERENCE)


def run_generate(folder: Path, dtype: str, resolution: int, num_inference_steps: int) -> dict[str, Any]:
    """`imprompt generate` in a process of its own: its exit code, seconds, peak memory in GiB and output."""
    options: dict[str, object] = {
        "model": folder, "adapter": folder / ADAPTER, "image-encoder": folder / IMAGE_ENCODER, "image": folder / REFERENCE,
        "num-inference-steps": num_inference_steps, "resolution": resolution, "num-images": 1, "dtype": dtype, "output-dir": folder / "out",
    }  # fmt: skip
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.resource_usage", sys.executable, "-m", "imprompt", "generate", *flags, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}).stdout)


def main(arguments: Sequence[str] = ()) -> None:
    """Write the models unless they are there, generate, and print what it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks full_size_generation", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny widths: seconds")
    parser.add_argument("--model-dir", type=Path, help="keep the models there, and use those that are there (default: a temporary folder)")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--resolution", type=int, help="pixels (default: 512; 64 with --small)")
    parser.add_argument("--num-inference-steps", type=int, default=2)
    args = parser.parse_args(arguments)
    resolution = args.resolution or (64 if args.small else 512)
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model_dir or Path(temporary)
        if not (folder / REFERENCE).exists():  # written last
            start = time.perf_counter()
            write_models(folder, small=args.small)
            console.print(f"full_size_generation: models written in {time.perf_counter() - start:.0f} s")
        usage = run_generate(folder, args.dtype, resolution, args.num_inference_steps)
    settings = {"small": args.small, "dtype": args.dtype, "resolution": resolution, "num_inference_steps": args.num_inference_steps}
    if usage["code"]:
        console.print(f"full_size_generation: imprompt generate failed with {usage['code']}\n{usage['errors']}", markup=False)
        return
    spent = f"{usage['seconds']} s, {usage['cpu_seconds']} s of processor time, peak {usage['peak_gib']} GiB resident"
    console.print(f"full_size_generation: {resolution} px, {args.num_inference_steps} steps, {args.dtype}: {spent}")
    print(json.dumps(settings | {name: value for name, value in usage.items() if name not in ("output", "errors")}))
