"""Rows of a comparison from what a user names: an adapter, a method's file, a pipeline, `text`, `copy`, `real`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imprompt import checkpoints, hub
from imprompt.config import READS, Evaluate
from imprompt.encoders import ImageEncoder
from imprompt.errors import CheckpointError, UserError
from imprompt.evaluate.contender import Contender, How
from imprompt.evaluate.outside import is_outside, load_outside
from imprompt.hosts.packing import pack
from imprompt.hosts.unet import check_fit
from imprompt.methods import Method, create
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.pipelines import claim_device, drawing, load_base, pick_dtype, scheduled
from imprompt.prompter import Prompter
from imprompt.training.encoding import find_encoder

SHOWN = ("copy", "real", "text")  # rows that need no contender of their own, or no picture


@dataclass(frozen=True)
class Text:
    """The base model with text alone: what is there without any image prompt."""

    pipe: Any = field(repr=False)
    scheduler: str
    name: str = "text"
    trainable: int | None = 0

    def draw(self, references: Sequence[Image.Image], texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
        with scheduled(self.pipe, self.scheduler, how.steps):
            return drawing(self.pipe, texts, how.steps, seeds, (how.size[1], how.size[0]), how.guidance)


@dataclass(frozen=True)
class WithMethod:
    """A method of ours, trained, on a base model."""

    pipe: Any = field(repr=False)
    method: Method = field(repr=False)
    scheduler: str
    name: str
    trainable: int | None

    @torch.no_grad()
    def draw(self, references: Sequence[Image.Image], texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
        method, device = self.method, self.pipe.unet.device
        features = method.encoder.encode(references, method.grid)[:, None].to(device)
        with (
            method.attached(self.pipe, features, method.null()[None].to(device), how.scale),
            scheduled(self.pipe, self.scheduler, how.steps),
        ):
            return drawing(self.pipe, texts, how.steps, seeds, (how.size[1], how.size[0]), how.guidance)


def load_contender(source: str, choice: Evaluate) -> Contender:
    """What a row's name stands for. Raises UserError for what is none of the kinds.

    `source` may begin with a name of its own: NAME=SOURCE.
    """
    name, source = named(source)
    device = claim_device(choice.device)
    dtype = pick_dtype(choice.dtype, torch.device(device).type, choice.base == "mini")
    if source != "text" and source not in READS and not Path(source).is_file() and source not in hub.EMBEDDED and is_outside(source):
        return load_outside(source, device, dtype)
    pipe = load_base(choice.base, device, dtype)
    if source == "text":
        return Text(pipe, choice.scheduler, name)
    method = load_method(source, pipe, choice.base, choice.encoder)
    method.module.to(device).requires_grad_(False).eval()
    trainable = sum(p.numel() for p in method.module.parameters())
    if choice.base == "mini" and device == "cpu" and dtype == torch.bfloat16 and trainable > LARGE:
        method.module.to(dtype)
        pack(method.module)
    return WithMethod(pipe, method, choice.scheduler, name, trainable)


LARGE = 5_000_000  # parameters of a module that is worth laying out for the processor


def named(source: str) -> tuple[str, str]:
    """NAME=SOURCE taken apart; without a name, one made from the source."""
    name, sign, rest = source.partition("=")
    if sign and name and "/" not in name and not Path(source).exists():
        return name, rest
    path = Path(source)
    if path.suffix in checkpoints.FORMATS:
        return (path.parent.name or path.stem) if path.stem in ("adapter", "best") else path.stem, source
    return source.rsplit("/", 1)[-1] or source, source


def load_method(source: str, pipe: Any, base: str, encoder: str | None) -> Method:
    """A method with its weights: a file that `imprompt train` wrote, a public adapter, mini, mini-plus, or reference-only."""
    if source == "reference-only":
        return create(source, pipe, _own_encoder(base, encoder, pipe))
    path, place = hub.find_adapter(source)
    about = checkpoints.about(path) if path.suffix == ".safetensors" else {}
    name = str(about.get("method", "ip-adapter"))
    if name.startswith("ip-adapter"):
        adapter, spec = checkpoints.load_adapter(path)
        where = (encoder, None) if encoder else place or hub.default_encoder(spec)
        prompter = Prompter(adapter, spec, ImageEncoder.load(*where)).to(pipe.unet.device)
        check_fit(adapter, pipe.unet)
        return IPAdapter(pipe.unet, prompter.encoder, adapter)
    if name not in READS:
        raise CheckpointError(f"{path.name} was trained by method {name!r}; expected one of {', '.join(READS)}")
    method = create(name, pipe, _own_encoder(base, encoder, pipe))
    checkpoints.load_module(method.module, path)
    return method


def _own_encoder(base: str, encoder: str | None, pipe: Any) -> ImageEncoder:
    found = find_encoder(base, encoder)
    found.model.to(pipe.unet.device)  # type: ignore[arg-type]
    return found


def check_source(source: str) -> None:
    """Raise UserError early for a name that stands for nothing."""
    _, source = named(source)
    if source in SHOWN or source in hub.EMBEDDED or source == "reference-only" or Path(source).is_file():
        return
    if source in READS:
        raise UserError(f"{source} is a method; train it first (imprompt train --method {source}), then name its adapter.safetensors")
