"""Bench c: `imprompt generate` on a full-size SD 1.5 on disk, with random weights: wall time and peak memory."""

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

from benchmarks.models import SD15, random_adapter, random_model
from imprompt.mini.tokenizer import make_tokenizer
from imprompt.models import checkpoints

# The real ones: CLIP ViT-L/14's text side, SD's VAE, CLIP ViT-H/14's image side.
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

ADAPTER, REFERENCE, ENCODER = "adapter.safetensors", "reference.png", "image_encoder"


def build(folder: Path, small: bool = False, dtype: torch.dtype = torch.float16) -> None:
    """Write a base model in diffusers' form, an image encoder, a global adapter and a picture, as public releases have them."""
    unet, text, vae, vision = SMALL if small else FULL
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    blocks = len(vae["block_out_channels"])
    vae = vae | {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
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
    random_model(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)), dtype).save_pretrained(folder / ENCODER)
    CLIPImageProcessor().save_pretrained(folder / ENCODER)
    Image.linear_gradient("L").convert("RGB").save(folder / REFERENCE)


def generate(folder: Path, dtype: str, size: int, steps: int) -> dict[str, Any]:
    """`imprompt generate` in a process of its own: its exit code, seconds, peak memory in GiB and what it printed."""
    flags = {"base": folder, "adapter": folder / ADAPTER, "encoder": folder / ENCODER, "image": folder / REFERENCE}
    flags |= {"steps": steps, "size": size, "count": 1, "dtype": dtype, "out": folder / "out"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "imprompt", "generate", *words, "--json"]
    watched = [sys.executable, "-m", "benchmarks.usage", *command]
    return json.loads(subprocess.run(watched, capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}).stdout)


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks full_size", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny widths: seconds")
    parser.add_argument("--folder", type=Path, help="keep the models there, and use those found there (default: a temporary folder)")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--size", type=int, help="pixels (default: 512; 64 with --small)")
    parser.add_argument("--steps", type=int, default=2)
    chosen = parser.parse_args(words)
    size = chosen.size or (64 if chosen.small else 512)
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        if not (folder / REFERENCE).exists():  # written last
            start = time.perf_counter()
            build(folder, chosen.small)
            console.print(f"full_size: models written in {time.perf_counter() - start:.0f} s")
        taken = generate(folder, chosen.dtype, size, chosen.steps)
    result = {"small": chosen.small, "dtype": chosen.dtype, "size": size, "steps": chosen.steps, **taken}
    if taken["code"]:
        console.print(f"full_size: imprompt generate failed with {taken['code']}\n{taken['errors']}", markup=False)
        return
    del result["output"], result["errors"]
    spent = f"{taken['seconds']} s, {taken['cpu_seconds']} s of processor time, peak {taken['peak_gib']} GiB resident"
    console.print(f"full_size: {size} px, {chosen.steps} steps, {chosen.dtype}: {spent}")
    print(json.dumps(result))
