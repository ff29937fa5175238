"""Bench d: a training step, beside the original recipe and beside the floor that no adapter's training can go below.

a  the original recipe: VAE, image encoder and text encoder at every step, everything frozen in float32 under autocast;
   diffusers' UNet with its own image processors. Its pixels lie ready in memory.
b  ours without a cache: pictures are read, framed and encoded at every step.
c  ours from a feature cache: rows are read from disk.
d  the floor: the UNet forward and backward to activations on the same batch; no adapter, no optimiser, no data.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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

from benchmarks import full_size
from benchmarks.timing import Times, interleave
from benchmarks.unet import public
from imprompt.config import Train
from imprompt.data.transforms import stack
from imprompt.mini import world
from imprompt.models.base_pipelines import pick_precision
from imprompt.training.frozen_encoders import Encoded
from imprompt.training.loop import objective_of, optimisers_of
from imprompt.training.objective import losses
from imprompt.training.precompute import cached
from imprompt.training.setup import Setting, build

PICTURES = 64
NAMES = {"a": "a original recipe", "b": "b ours, no cache", "c": "c ours, cache", "d": "d floor"}


@dataclass
class Contest:
    """The four contestants on one base, and which modules each of them needs on the device."""

    calls: dict[str, Callable[[], Any]]
    needs: dict[str, list[torch.nn.Module]]
    device: torch.device

    def memory(self) -> dict[str, int]:
        """Peak bytes on the GPU of each contestant alone; nothing on a CPU, where parts cannot be told from each other."""
        found = {}
        everything = {id(m): m for modules in self.needs.values() for m in modules}
        for name, call in self.calls.items() if self.device.type == "cuda" else ():
            wanted = {id(m) for m in self.needs[name]}
            for key, module in everything.items():
                module.to(self.device if key in wanted else "cpu")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            call()
            call()
            found[name] = torch.cuda.max_memory_allocated()
        return found


@contextmanager
def contest(choice: Train) -> Iterator[Contest]:
    """Everything loaded, nothing measured yet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _ in cached(choice, 0, 1):
        pass
    plain = build(replace(choice, cache=None).settled(), device)
    stored = build(choice.settled(), device)
    for part in (plain.pipe.vae, plain.pipe.text_encoder, plain.encoder.model):
        part.to(device)
    adapter = plain.method.module.float()
    optimisers = optimisers_of(choice, adapter)
    objective = objective_of(choice)

    def ours(setting: Setting) -> Callable[[], None]:
        batches = iter(setting.batches())

        def step() -> None:
            encoded = next(batches)
            with torch.autocast(device.type, plain.precision, enabled=plain.precision != torch.float32):
                loss = losses(plain.method, plain.unet, plain.schedule, encoded, plain.nulls, objective).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            _finish(device)

        return step

    encoded = next(iter(plain.batches()))
    bare = _copy(plain.unet, plain.precision)
    theirs, frozen = original(plain, choice)
    everything = [plain.pipe.vae, plain.pipe.text_encoder, plain.encoder.model, plain.unet, adapter]
    needs = {"a": frozen, "b": everything, "c": [plain.unet, adapter], "d": [bare]}
    try:
        yield Contest({"a": theirs, "b": ours(plain), "c": ours(stored), "d": floor(bare, encoded, plain)}, needs, device)
    finally:
        plain.method.release()


def original(setting: Setting, choice: Train) -> tuple[Callable[[], None], list[torch.nn.Module]]:
    """The published training script's step, made of diffusers' parts."""
    device, pipe = setting.device, setting.pipe
    unet = _copy(setting.unet, torch.float32)
    unet._load_ip_adapter_weights(public(setting.method.module))
    unet.to(device, torch.float32)
    vae, text, image = (_copy(part, torch.float32) for part in (pipe.vae, pipe.text_encoder, setting.encoder.model))
    trained = [p for name, p in unet.named_parameters() if "_ip." in name or name.startswith("encoder_hid_proj")]
    for p in trained:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    items = next(iter(setting.loader))
    batch = stack(items)
    pixels = batch.pixels.to(device) / 127.5 - 1
    references = batch.references[:, 0].to(device)
    ids = pipe.tokenizer(batch.texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)

    def step() -> None:
        with torch.autocast(device.type, setting.precision, enabled=setting.precision != torch.float32):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                states = text(ids)[0]
                embeds = image(references).image_embeds
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (len(latents),), device=device)
            x = pipe.scheduler.add_noise(latents, noise, t)
            said = unet(x, t, states, added_cond_kwargs={"image_embeds": [embeds[:, None]]}).sample
            loss = F.mse_loss(said.float(), noise.float())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        _finish(device)

    return step, [unet, vae, text, image]


def floor(unet: UNet2DConditionModel, encoded: Encoded, setting: Setting) -> Callable[[], None]:
    """What every adapter's training must at least do."""
    x = encoded.mean.to(setting.precision)
    states = encoded.text.states.clone().requires_grad_(True)
    t = torch.randint(0, 1000, (len(x),), device=setting.device)

    def step() -> None:
        with torch.autocast(setting.device.type, setting.precision, enabled=setting.precision != torch.float32):
            said = unet(x, t, states).sample
            F.mse_loss(said.float(), x.float()).backward()
        states.grad = None
        _finish(setting.device)

    return step


def _copy(module: Any, dtype: torch.dtype) -> Any:
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


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def photographs(folder: Path, side: int) -> None:
    for i, subject in zip(range(PICTURES), world.subjects(), strict=False):
        where = world.scene(i)
        world.draw(subject, where).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg", quality=92)
        (folder / f"{i:03}.txt").write_text(world.full_caption(subject, where))


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="mini and a tiny SD 1.5: seconds")
    size.add_argument("--full", action="store_true", help="SD 1.5 at 512 px, batch 8, bfloat16: for a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args(words)
    console = Console(highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "photos").mkdir()
        photographs(folder / "photos", 512)
        common = Train(data=str(folder / "photos"), validation=0, lr=1e-5, ema=0.0, out=str(folder / "run"), optimizer="adamw")
        threads = torch.get_num_threads()
        if not torch.cuda.is_available():
            torch.set_num_threads(
                1
            )  # at mini's size more gain little, and processor time, which the neighbours do not touch, is that of one
        show(console, "mini, batch 48", replace(common, batch=48, cache=str(folder / "mini")), 48, chosen.rounds, processor=True)
        torch.set_num_threads(threads)
        full_size.build(folder, small=chosen.small, dtype=torch.float32 if not torch.cuda.is_available() else torch.bfloat16)
        batch, side = (8, 512) if chosen.full else (1, 256)
        base = {"base": str(folder), "encoder": str(folder / full_size.ENCODER), "precision": "auto" if chosen.full else "float32"}
        name = f"SD 1.5{', tiny' if chosen.small else ''}, {side} px, batch {batch}"
        show(console, name, replace(common, batch=batch, size=side, cache=str(folder / "sd"), **base), batch, chosen.rounds)


def show(console: Console, name: str, choice: Train, batch: int, rounds: int, processor: bool = False) -> None:
    """Measure one base and print its table; on a CPU in processor time where asked."""
    with console.status(name), contest(choice) as found:
        clock = process_time if processor and found.device.type == "cpu" else perf_counter
        times: Times = interleave(found.calls, rounds, clock)
        memory = found.memory()
    table = Table(title=f"{name}, {str(pick_precision(choice.precision, found.device.type)).removeprefix('torch.')}", box=box.SIMPLE)
    for column in ("", "images/s", "× a", "of the floor's rate", "peak GiB", "of a's"):
        table.add_column(column, justify="left" if not column else "right")
    for key, label in NAMES.items():
        used = memory.get(key)
        table.add_row(
            label, f"{batch / times.median(key):.2f}", str(times.ratio("a", key)), str(times.ratio("d", key)),
            f"{used / 2**30:.2f}" if used else "–", f"{used / memory['a']:.2f}" if used else "–",
        )  # fmt: skip
    console.print(table)
