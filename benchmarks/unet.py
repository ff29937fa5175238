"""Bench b: what image prompts cost a UNet, for diffusers and for us, in units of the same UNet without one.

A generation is 10 steps with guidance: timesteps descend, the text states are the same tensor throughout. With --small,
whole generations are timed (in processor time), ours from `attach` on. Otherwise a step is long: single steps are timed,
and one more contestant does everything that we do once (attach, keys and values of image and text) and the first step;
a generation of ours is then that plus 9 steps. Image encoding is outside for both.
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

from benchmarks.models import SD15, SDXL, random_adapter, random_model, twin
from benchmarks.timing import Ratio, Times, interleave, ratio
from imprompt.core.adapter import Adapter
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.injection import attach

STEPS = 10
TIMES = [torch.tensor(1000 * i // STEPS + 1) for i in reversed(range(STEPS))]
REFERENCES = (1, 8, 64)
TOKENS = (4, 16)  # per reference: global, resampler
TEXT = 77
CAPTION = """median over the rounds ± half the interquartile range
once: what we do once per prompt, in steps of plain; differ: between the two outputs, relative"""

Call = Callable[[], Tensor]


class Shape(NamedTuple):
    """A UNet, and the features and the adapter that go with it."""

    name: str
    unet: dict[str, Any]
    side: int  # of the latents
    pooled: int = 1024  # CLIP ViT-H/14
    grid: tuple[int, int] = (257, 1280)
    resampler: int = 768  # width


FULL = (Shape("SD 1.5", SD15, 64), Shape("SDXL", SDXL, 128, resampler=1280))
_NARROW_XL = SDXL | {"block_out_channels": (192, 384, 768), "attention_head_dim": (3, 6, 12)}  # still 64 channels per head
_TINY_15 = SD15 | {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 64}
_TINY_XL = SDXL | {"block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2), "cross_attention_dim": 64}
DEFAULT = (Shape("SD 1.5, 256 px", SD15, 32), Shape("SDXL, widths × 0.6, 256 px", _NARROW_XL, 32, resampler=768))
SMALL = (Shape("SD 1.5, tiny", _TINY_15, 16, 64, (17, 64), 64), Shape("SDXL, tiny", _TINY_XL, 16, 64, (17, 64), 64))


class Row(NamedTuple):
    """One line of the table: times of a generation."""

    references: int
    tokens: int
    diffusers: Ratio  # to plain
    ours: Ratio  # to plain
    ours_to_diffusers: Ratio
    once: float | None  # what we do once per prompt, in steps of plain; None where it was not timed apart
    difference: float  # between the two outputs, relative: they draw the same


def measure(shape: Shape, whole: bool, rounds: int) -> Iterator[Row]:
    """Every number of references with every number of tokens."""
    plain = random_model(lambda: UNet2DConditionModel(**shape.unet))
    unets = (plain, twin(plain), twin(plain), twin(plain))
    for tokens in TOKENS:
        patches, width = (1, shape.pooled) if tokens == 4 else shape.grid
        adapter = random_adapter(plain, tokens, width, shape.resampler)
        unets[1]._load_ip_adapter_weights(public(adapter))
        for references in REFERENCES:
            prompt = ImagePrompt(adapter, torch.randn(1, references, patches, width), torch.randn(1, 1, patches, width))
            with contestants(shape, unets, prompt, whole) as calls:
                yield _row(references, tokens, interleave(calls, rounds, process_time if whole else perf_counter))


@contextmanager
def contestants(shape: Shape, unets: Sequence[UNet2DConditionModel], prompt: ImagePrompt, whole: bool) -> Iterator[dict[str, Call]]:
    """What is timed, by name."""
    plain, theirs, mine, fresh = unets
    run = generation(shape)
    embeds = {"image_embeds": [diffusers_embeds(prompt)]}

    def from_nothing(times: Iterable[Tensor]) -> Tensor:
        with attach(fresh, prompt, groups=(0, 1)):
            return run(fresh, times)

    if whole:
        yield {"plain": lambda: run(plain, TIMES), "diffusers": lambda: run(theirs, TIMES, embeds), "ours": lambda: from_nothing(TIMES)}
        return
    with attach(mine, prompt, groups=(0, 1)):
        calls = {"plain": stepper(run, plain), "diffusers": stepper(run, theirs, embeds), "ours": stepper(run, mine)}
        yield calls | {"first": lambda: from_nothing(TIMES[:1])}


def _row(references: int, tokens: int, times: Times) -> Row:
    plain, theirs, ours = (times.seconds[name] for name in ("plain", "diffusers", "ours"))
    once = None
    if first := times.seconds.get("first"):
        once = ratio([f - step for f, step in zip(first, ours, strict=True)], plain).median
        ours = [(f + (STEPS - 1) * step) / STEPS for f, step in zip(first, ours, strict=True)]
    a, b = times.returned["ours"], times.returned["diffusers"]
    return Row(references, tokens, ratio(theirs, plain), ratio(ours, plain), ratio(ours, theirs), once, float((a - b).norm() / b.norm()))


def generation(shape: Shape) -> Callable[..., Tensor]:
    """The denoiser's calls of a generation with guidance: (unet, timesteps, more added conditions) → the last output."""
    latents = torch.randn(2, 4, shape.side, shape.side)
    text = torch.randn(2, TEXT, shape.unet["cross_attention_dim"])
    sdxl = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.ones(2, 6)} if "addition_embed_type" in shape.unet else {}

    @torch.no_grad()
    def run(unet: UNet2DConditionModel, times: Iterable[Tensor], more: dict[str, Any] | None = None) -> Tensor:
        for time in times:
            out = unet(latents, time, encoder_hidden_states=text, added_cond_kwargs={**sdxl, **(more or {})}, return_dict=False)[0]
        return out

    return run


def stepper(run: Callable[..., Tensor], unet: UNet2DConditionModel, *more: dict[str, Any]) -> Call:
    """One step at each call, down the timesteps."""
    times = cycle(TIMES)
    return lambda: run(unet, [next(times)], *more)


def diffusers_embeds(prompt: ImagePrompt) -> Tensor:
    """As diffusers' pipelines pass them: null and conditional rows, (2, references, width) or (2, references, patches, width)."""
    embeds = torch.cat([prompt.null.expand_as(prompt.features), prompt.features])
    return embeds.squeeze(2) if embeds.shape[2] == 1 else embeds


def public(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """The adapter as diffusers reads it from a public file."""
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        group, name = key.split(".", 1)
        nested[group][name] = value
    return nested


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks unet", description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="tiny widths, whole generations, one thread, processor time: a minute")
    size.add_argument("--full", action="store_true", help="full widths at the models' own sizes: hours on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(words)
    if chosen.small:
        torch.set_num_threads(1)  # more of them gain nothing on tiny tensors, and processor time is that of one
    console = Console()
    for shape in SMALL if chosen.small else FULL if chosen.full else DEFAULT:
        timed = f"whole generations of {STEPS} steps" if chosen.small else f"single steps; ours: (the first + {STEPS - 1} more) / {STEPS}"
        table = Table(title=f"{shape.name}: {timed}", caption=CAPTION, box=box.SIMPLE)
        for name in ("references\n× tokens", "diffusers\n/ plain", "ours\n/ plain", "ours\n/ diffusers", "once", "differ"):
            table.add_column(name, justify="right", no_wrap=True)
        with console.status(shape.name):
            for row in measure(shape, chosen.small, chosen.rounds):
                once = "in it" if row.once is None else f"{row.once:.2f}"
                ratios = (str(r) for r in (row.diffusers, row.ours, row.ours_to_diffusers))
                table.add_row(f"{row.references} × {row.tokens}", *ratios, once, f"{row.difference:.0e}")
        console.print(table)
    console.print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
