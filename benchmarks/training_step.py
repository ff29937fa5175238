"""A training step next to the original recipe, and next to the lower bound of any adapter's training.

a  the original recipe: VAE, image encoder and text encoder at every step, everything frozen in float32 under autocast;
   diffusers' UNet with its own image processors. Its pixels are in memory already.
b  ours without a cache: images are read, cropped and encoded at every step.
c  ours from a feature cache: samples are read from disk.
d  the lower bound: the UNet forward and backward to activations on the same batch; no adapter, no optimizer, no data.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import full_size_generation
from benchmarks.timing import Times, interleave
from benchmarks.unet_overhead import to_public_layout
from imprompt.config import TrainConfig
from imprompt.core.adapter import Adapter
from imprompt.data.transforms import collate
from imprompt.mini import world
from imprompt.models.base_pipelines import resolve_mixed_precision
from imprompt.training.frozen_encoders import TrainingBatch
from imprompt.training.loop import make_optimizers
from imprompt.training.objective import compute_loss
from imprompt.training.precompute import fill_feature_cache
from imprompt.training.setup import TrainingContext, setup_training

NUM_IMAGES = 64
LABELS = {"a": "a original recipe", "b": "b ours, no cache", "c": "c ours, cache", "d": "d lower bound"}


@dataclass
class Candidates:
    """The steps of the four candidates on one base model, and the modules that each of them needs on the device."""

    steps: dict[str, Callable[[], Any]]
    modules: dict[str, list[torch.nn.Module]]
    device: torch.device

    def measure_peak_memory(self) -> dict[str, int]:
        """Peak bytes on the GPU of each candidate alone; empty on a CPU, where the candidates' memory cannot be separated."""
        peaks = {}
        all_modules = {id(module): module for modules in self.modules.values() for module in modules}
        for name, step in self.steps.items() if self.device.type == "cuda" else ():
            needed = {id(module) for module in self.modules[name]}
            for key, module in all_modules.items():
                module.to(self.device if key in needed else "cpu")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            step()
            step()
            peaks[name] = torch.cuda.max_memory_allocated()
        return peaks


@contextmanager
def load_candidates(config: TrainConfig) -> Iterator[Candidates]:
    """Everything loaded, nothing measured yet."""
    device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), config.with_defaults()
    for _ in fill_feature_cache(config.encode_config(), config.adapter, 0, 1):
        pass
    uncached = setup_training(config.with_options(feature_cache=None), device)
    from_cache = setup_training(config, device)
    assert uncached.image_encoder is not None
    for part in (uncached.pipe.vae, uncached.pipe.text_encoder, uncached.image_encoder.model):
        part.to(device)
    adapter = uncached.method.module.float()
    optimizers = make_optimizers(config.optimization, adapter)

    def our_step(context: TrainingContext) -> Callable[[], None]:
        batches = iter(context.batches())

        def step() -> None:
            batch = next(batches)
            with torch.autocast(device.type, uncached.dtype, enabled=uncached.dtype != torch.float32):
                losses = compute_loss(uncached.method, uncached.unet, uncached.noise_schedule, batch, uncached.uncond, config.loss)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            _synchronize(device)

        return step

    batch = next(iter(uncached.batches()))
    unet_copy = _copy_module(uncached.unet, uncached.dtype)
    recipe_step, frozen = original_recipe_step(uncached)
    ours = [uncached.pipe.vae, uncached.pipe.text_encoder, uncached.image_encoder.model, uncached.unet, adapter]
    modules = {"a": frozen, "b": ours, "c": [uncached.unet, adapter], "d": [unet_copy]}
    try:
        steps = {"a": recipe_step, "b": our_step(uncached), "c": our_step(from_cache)}
        yield Candidates(steps | {"d": lower_bound_step(unet_copy, batch, uncached)}, modules, device)
    finally:
        uncached.method.remove_from_unet()


def original_recipe_step(context: TrainingContext) -> tuple[Callable[[], None], list[torch.nn.Module]]:
    """The step of the published training script, made of diffusers' parts, and its modules."""
    device, pipe = context.device, context.pipe
    adapter = context.method.module
    assert context.image_encoder is not None and isinstance(adapter, Adapter)
    unet = _copy_module(context.unet, torch.float32)
    unet._load_ip_adapter_weights(to_public_layout(adapter))
    unet.to(device, torch.float32)
    modules = (pipe.vae, pipe.text_encoder, context.image_encoder.model)
    vae, text_encoder, image_encoder = (_copy_module(module, torch.float32) for module in modules)
    trainable = [p for name, p in unet.named_parameters() if "_ip." in name or name.startswith("encoder_hid_proj")]
    for p in trainable:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01)
    batch = collate(next(iter(context.loader)))
    pixel_values = batch.pixel_values.to(device) / 127.5 - 1
    references = batch.reference_pixel_values[:, 0].to(device)
    token_ids = pipe.tokenizer(batch.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)

    def step() -> None:
        with torch.autocast(device.type, context.dtype, enabled=context.dtype != torch.float32):
            with torch.no_grad():
                latents = vae.encode(pixel_values).latent_dist.sample() * vae.config.scaling_factor
                prompt_embeds = text_encoder(token_ids)[0]
                image_embeds = image_encoder(references).image_embeds
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),), device=device)
            noisy_latents = pipe.scheduler.add_noise(latents, noise, timesteps)
            added_cond_kwargs = {"image_embeds": [image_embeds[:, None]]}
            prediction = unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added_cond_kwargs).sample
            loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(device)

    return step, [unet, vae, text_encoder, image_encoder]


def lower_bound_step(unet: UNet2DConditionModel, batch: TrainingBatch, context: TrainingContext) -> Callable[[], None]:
    """What the training of any adapter has to compute at least."""
    latents = batch.latent_mean.to(context.dtype)
    prompt_embeds = batch.text.prompt_embeds.clone().requires_grad_(True)
    timesteps = torch.randint(0, 1000, (len(latents),), device=context.device)

    def step() -> None:
        with torch.autocast(context.device.type, context.dtype, enabled=context.dtype != torch.float32):
            prediction = unet(latents, timesteps, prompt_embeds).sample
            F.mse_loss(prediction.float(), latents.float()).backward()
        prompt_embeds.grad = None
        _synchronize(context.device)

    return step


def _copy_module(module: Any, dtype: torch.dtype) -> Any:
    """Another module with the same values; sharing them where the dtype is the same."""
    with torch.device("meta"):
        other = type(module).from_config(module.config) if hasattr(module, "from_config") and hasattr(module, "config_name") else None
    if other is None:
        other = type(module)._from_config(module.config)
    other.load_state_dict({name: value.to(dtype) for name, value in module.state_dict().items()}, assign=True)
    for name, buffer in module.named_buffers():
        owner = other.get_submodule(name.rpartition(".")[0])
        owner.register_buffer(name.rpartition(".")[2], buffer.clone(), persistent=False)
    if isinstance(other, UNet2DConditionModel) and next(iter(module.attn_processors.values())).__class__.__name__ == "AttnProcessor":
        other.set_attn_processor(AttnProcessor())
    return other.eval().requires_grad_(False)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_images(folder: Path, resolution: int) -> None:
    """Write images of mini's world with captions, as training data."""
    for i, subject in zip(range(NUM_IMAGES), world.iterate_subjects(), strict=False):
        scene = world.make_scene(i)
        image = world.render(subject, scene).resize((resolution, resolution), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:03}.jpg", quality=92)
        (folder / f"{i:03}.txt").write_text(world.format_full_caption(subject, scene))


def main(arguments: Sequence[str] = ()) -> None:
    """Measure mini, then SD 1.5 with random weights."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="mini and a tiny SD 1.5: seconds")
    size.add_argument("--full", action="store_true", help="SD 1.5 at 512 px, batch 8, bfloat16: for a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    console, on_gpu = Console(highlight=False, soft_wrap=True), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        write_images(folder / "images", 512)
        mini = TrainConfig.from_options(
            data=str(folder / "images"), num_validation_images=0, learning_rate=1e-5, ema_decay=0.0, output_dir=str(folder / "run"),
            optimizer="adamw", train_batch_size=48, feature_cache=str(folder / "mini"),
        )  # fmt: skip
        num_threads = torch.get_num_threads()
        if not on_gpu:
            torch.set_num_threads(1)  # at mini's size more gain little, and the processor time of one thread is independent of other work
        print_step_times(console, "mini, batch 48", mini, 48, args.rounds, clock=perf_counter if on_gpu else process_time)
        torch.set_num_threads(num_threads)
        full_size_generation.write_models(folder, small=args.small, dtype=torch.bfloat16 if on_gpu else torch.float32)
        batch_size, resolution = (8, 512) if args.full else (1, 256)
        sd15 = mini.with_options(
            model=str(folder), image_encoder=str(folder / full_size_generation.IMAGE_ENCODER), feature_cache=str(folder / "sd15"),
            mixed_precision="auto" if args.full else "float32", train_batch_size=batch_size, resolution=resolution,
        )  # fmt: skip
        label = f"SD 1.5{', tiny' if args.small else ''}, {resolution} px, batch {batch_size}"
        print_step_times(console, label, sd15, batch_size, args.rounds, clock=perf_counter)


def print_step_times(
    console: Console, label: str, config: TrainConfig, batch_size: int, rounds: int, *, clock: Callable[[], float]
) -> None:
    """Measure the candidates on one base model and print their table."""
    with console.status(label), load_candidates(config) as candidates:
        times: Times = interleave(candidates.steps, rounds, clock)
        peaks = candidates.measure_peak_memory()
        dtype = resolve_mixed_precision(config.runtime.mixed_precision, candidates.device.type)
    table = Table(title=f"{label}, {str(dtype).removeprefix('torch.')}", box=box.SIMPLE)
    for heading in ("", "images/s", "× a", "of the lower bound's rate", "peak GiB", "of a's"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, text in LABELS.items():
        peak = peaks.get(name)
        table.add_row(
            text, f"{batch_size / times.median(name):.2f}", str(times.ratio("a", name)), str(times.ratio("d", name)),
            f"{peak / 2**30:.2f}" if peak else "–", f"{peak / peaks['a']:.2f}" if peak else "–",
        )  # fmt: skip
    console.print(table)
