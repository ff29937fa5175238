"""What image prompts cost a UNet, for diffusers and for us, in units of the same UNet without one.

A generation is 10 steps with classifier-free guidance: timesteps descend, the prompt embeddings are the same tensor throughout. With
--small, whole generations are timed (in processor time), ours from `attach` on. Otherwise a step takes long: single steps are timed, and
one more candidate does everything that we do once (attach, keys and values of image and text) and the first step; a generation of ours
is then that plus 9 steps. Image encoding is outside for both.
"""

import argparse
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.random_models import SD15, SDXL, copy_unet_sharing_weights, random_adapter, random_model
from benchmarks.timing import Ratio, Times, interleave, ratio_by_round
from imprompt.core.adapter import Adapter
from imprompt.dit.attach import attach
from imprompt.models.image_prompt import ImagePrompt

NUM_STEPS = 10
TIMESTEPS = [torch.tensor(1000 * i // NUM_STEPS + 1) for i in reversed(range(NUM_STEPS))]
REFERENCE_COUNTS = (1, 8, 64)
TOKEN_COUNTS = (4, 16)  # per reference: base adapter, Plus adapter
NUM_TEXT_TOKENS = 77
CAPTION = """median over the rounds ± half the interquartile range
once: what we do once per prompt, in steps of plain; deviation: between the two outputs, relative"""

Step = Callable[[], Tensor]


class ModelSize(NamedTuple):
    """A UNet's configuration, and the features and the adapter that go with it."""

    name: str
    unet_config: dict[str, Any]
    latent_size: int
    pooled_dim: int = 1024  # CLIP ViT-H/14
    patch_shape: tuple[int, int] = (257, 1280)
    resampler_dim: int = 768


FULL = (ModelSize("SD 1.5", SD15, 64), ModelSize("SDXL", SDXL, 128, resampler_dim=1280))
_NARROW_XL = SDXL | {"block_out_channels": (192, 384, 768), "attention_head_dim": (3, 6, 12)}  # still 64 channels per head
_TINY_15 = SD15 | {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 64}
_TINY_XL = SDXL | {"block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2), "cross_attention_dim": 64}
DEFAULT = (ModelSize("SD 1.5, 256 px", SD15, 32), ModelSize("SDXL, widths × 0.6, 256 px", _NARROW_XL, 32, resampler_dim=768))
SMALL = (ModelSize("SD 1.5, tiny", _TINY_15, 16, 64, (17, 64), 64), ModelSize("SDXL, tiny", _TINY_XL, 16, 64, (17, 64), 64))


class Overhead(NamedTuple):
    """One line of the table: times of a generation."""

    num_references: int
    num_tokens: int
    diffusers: Ratio  # to plain
    ours: Ratio  # to plain
    ours_to_diffusers: Ratio
    once: float | None  # what we do once per prompt, in steps of plain; None where it was not timed separately
    deviation: float  # between the two outputs, relative: both compute the same


def measure_overhead(size: ModelSize, rounds: int, *, whole_generations: bool) -> Iterator[Overhead]:
    """Every number of references with every number of tokens."""
    plain = random_model(lambda: UNet2DConditionModel(**size.unet_config))
    unets = (plain, *(copy_unet_sharing_weights(plain) for _ in range(3)))
    for num_tokens in TOKEN_COUNTS:
        num_patches, width = (1, size.pooled_dim) if num_tokens == 4 else size.patch_shape
        adapter = random_adapter(plain, num_tokens, width, size.resampler_dim)
        unets[1]._load_ip_adapter_weights(to_public_layout(adapter))
        for count in REFERENCE_COUNTS:
            prompt = ImagePrompt(adapter, torch.randn(1, count, num_patches, width), torch.randn(1, 1, num_patches, width))
            with load_candidates(size, unets, prompt, whole_generations=whole_generations) as candidates:
                times = interleave(candidates, rounds, process_time if whole_generations else perf_counter)
                yield summarize(count, num_tokens, times)


@contextmanager
def load_candidates(
    size: ModelSize, unets: Sequence[UNet2DConditionModel], prompt: ImagePrompt, *, whole_generations: bool
) -> Iterator[dict[str, Step]]:
    """What is timed, by name."""
    plain, with_diffusers, attached, unattached = unets
    run = build_generation(size)
    embeds = {"image_embeds": [diffusers_image_embeds(prompt)]}

    def attach_and_run(timesteps: Iterable[Tensor]) -> Tensor:
        with attach(unattached, prompt, cfg_layout=("uncond", "cond")):
            return run(unattached, timesteps)

    if whole_generations:
        yield {
            "plain": lambda: run(plain, TIMESTEPS),
            "diffusers": lambda: run(with_diffusers, TIMESTEPS, embeds),
            "ours": lambda: attach_and_run(TIMESTEPS),
        }
        return
    with attach(attached, prompt, cfg_layout=("uncond", "cond")):
        steps = {"plain": single_steps(run, plain), "diffusers": single_steps(run, with_diffusers, embeds)}
        yield steps | {"ours": single_steps(run, attached), "first": lambda: attach_and_run(TIMESTEPS[:1])}


def summarize(num_references: int, num_tokens: int, times: Times) -> Overhead:
    """The ratios of all candidates."""
    plain, diffusers, ours = (times.seconds[name] for name in ("plain", "diffusers", "ours"))
    once = None
    if first := times.seconds.get("first"):
        once = ratio_by_round([f - step for f, step in zip(first, ours, strict=True)], plain).median
        ours = [(f + (NUM_STEPS - 1) * step) / NUM_STEPS for f, step in zip(first, ours, strict=True)]
    our_output, reference = times.returned["ours"], times.returned["diffusers"]
    deviation = float((our_output - reference).norm() / reference.norm())
    ratios = (ratio_by_round(diffusers, plain), ratio_by_round(ours, plain), ratio_by_round(ours, diffusers))
    return Overhead(num_references, num_tokens, *ratios, once, deviation)


def build_generation(size: ModelSize) -> Callable[..., Tensor]:
    """The UNet calls of a generation with guidance: (unet, timesteps, additional added_cond_kwargs) → the last output."""
    latents = torch.randn(2, 4, size.latent_size, size.latent_size)
    prompt_embeds = torch.randn(2, NUM_TEXT_TOKENS, size.unet_config["cross_attention_dim"])
    is_sdxl = "addition_embed_type" in size.unet_config
    sdxl_kwargs = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.ones(2, 6)} if is_sdxl else {}

    @torch.no_grad()
    def run(unet: UNet2DConditionModel, timesteps: Iterable[Tensor], kwargs: dict[str, Any] | None = None) -> Tensor:
        for t in timesteps:
            added_cond_kwargs = {**sdxl_kwargs, **(kwargs or {})}
            output = unet(latents, t, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added_cond_kwargs, return_dict=False)[0]
        return output

    return run


def single_steps(run: Callable[..., Tensor], unet: UNet2DConditionModel, *kwargs: dict[str, Any]) -> Step:
    """One step at each call, down the timesteps."""
    timesteps = cycle(TIMESTEPS)
    return lambda: run(unet, [next(timesteps)], *kwargs)


def diffusers_image_embeds(prompt: ImagePrompt) -> Tensor:
    """As diffusers' pipelines pass them: unconditional and conditional rows, (2, references, width) or (2, references, patches, width)."""
    embeds = torch.cat([prompt.uncond_features.expand_as(prompt.image_features), prompt.image_features])
    return embeds.squeeze(2) if embeds.shape[2] == 1 else embeds


def to_public_layout(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """The adapter as diffusers reads it from a public file."""
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        group, name = key.split(".", 1)
        nested[group][name] = value
    return nested


def main(arguments: Sequence[str] = ()) -> None:
    """Print a table for every model size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks unet_overhead", description=__doc__.splitlines()[0])
    size_flags = parser.add_mutually_exclusive_group()
    size_flags.add_argument("--small", action="store_true", help="tiny widths, whole generations, one thread, processor time: a minute")
    size_flags.add_argument("--full", action="store_true", help="full widths at the models' native resolutions: hours on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    if args.small:
        torch.set_num_threads(1)  # more of them gain nothing on tiny tensors, and processor time is that of one
    console = Console()
    for size in SMALL if args.small else FULL if args.full else DEFAULT:
        unit = (
            f"whole generations of {NUM_STEPS} steps"
            if args.small
            else f"single steps; ours: (the first + {NUM_STEPS - 1} more) / {NUM_STEPS}"
        )
        table = Table(title=f"{size.name}: {unit}", caption=CAPTION, box=box.SIMPLE)
        for heading in ("references\n× tokens", "diffusers\n/ plain", "ours\n/ plain", "ours\n/ diffusers", "once", "deviation"):
            table.add_column(heading, justify="right", no_wrap=True)
        with console.status(size.name):
            for row in measure_overhead(size, args.rounds, whole_generations=args.small):
                once = "included" if row.once is None else f"{row.once:.2f}"
                ratios = (str(ratio) for ratio in (row.diffusers, row.ours, row.ours_to_diffusers))
                table.add_row(f"{row.num_references} × {row.num_tokens}", *ratios, once, f"{row.deviation:.0e}")
        console.print(table)
    console.print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
