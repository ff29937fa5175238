"""Rows of a comparison from what a user names: an adapter, a method's file, a pipeline, `text`, `copy`, `real`."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from imprompt.config import COMBINE, MANY, PERSONAL, READS, Evaluate, Train
from imprompt.errors import ImageError, UserError
from imprompt.evaluation.external import is_outside, load_outside
from imprompt.evaluation.system import Case, Contender, How
from imprompt.methods import Method, create
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.inversion import Inversion
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.methods.loading import load_method
from imprompt.models import checkpoints, hub
from imprompt.models.base_pipelines import claim_device, drawing, load_base, pick_dtype, scheduled
from imprompt.models.face_encoders import FaceEncoder

REAL = ("copy", "real", "reference")  # rows that are not drawn
SHOWN = (*REAL, "text")  # rows that need no contender of their own


@dataclass(frozen=True)
class Text:
    """The base model with text alone: what is there without any image prompt."""

    pipe: Any = field(repr=False)
    scheduler: str
    name: str = "text"
    trainable: int | None = 0

    def draw(self, cases: Sequence[Case], texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
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
    say: Callable[[str], str] = field(default=str, repr=False)  # how a text is put to it

    def rehearse(self, judge: str) -> None:
        """Raise UserError where what it hears cannot be had, or where `judge` of identity is what conditions it."""
        encoder = self.method.encoder
        if not isinstance(encoder, FaceEncoder):
            return
        if judge == "insightface":
            raise UserError(
                f"identity: InsightFace tells {self.name} who it is to draw, so it would score itself; "
                "expected another judge: --identity facenet, or none"
            )
        encoder.found([Image.new("RGB", (64, 64))])

    def heard(self, case: Case) -> Case:
        """The case with the references that can be heard, again from the first where some cannot. Raises ImageError where none can.

        In evaluation a photograph in which no face is found is passed over as one that cannot be opened is.
        """
        encoder = self.method.encoder
        if not isinstance(encoder, FaceEncoder):
            return case
        kept = [picture for picture, there in zip(case.references, encoder.found(case.references), strict=True) if there]
        if not kept:
            raise ImageError(f"no face was found in the {len(case.references)} reference(s) of {case.key}")
        return case._replace(references=tuple(kept[n % len(kept)] for n in range(len(case.references))))

    @torch.no_grad()
    def draw(self, cases: Sequence[Case], texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
        method, device = self.method, self.pipe.unet.device
        count = len(cases[0].references) if method.name in MANY else 1
        pictures = [picture for case in cases for picture in case.references[:count]]
        features = method.encoder.encode(pictures, method.grid).unflatten(0, (-1, count)).to(device)
        with (
            method.attached(self.pipe, features, method.null()[None].to(device), how.scale),
            scheduled(self.pipe, self.scheduler, how.steps),
        ):
            return drawing(self.pipe, [self.say(t) for t in texts], how.steps, seeds, (how.size[1], how.size[0]), how.guidance)


class Learner:
    """A method that learns each subject from its photographs before it draws: DreamBooth, Textual Inversion.

    What it learned is let go once the subject is drawn. `learning` is the time that it has spent so far, in seconds of one process.
    """

    def __init__(self, method: str, name: str, choice: Evaluate, pipe: Any):
        self.method, self.name, self.choice, self.pipe = method, name, choice, pipe
        self.learning = 0.0
        self.trainable: int | None = sum(p.numel() for p in create(method, pipe).module.parameters())

    def draw(self, cases: Sequence[Case], texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
        drawn: dict[int, Image.Image] = {}
        for subject in dict.fromkeys(case.subject for case in cases):
            places = [n for n, case in enumerate(cases) if case.subject == subject]
            with TemporaryDirectory() as folder:
                known = self.learned(cases[places[0]], Path(folder))
                pictures = known.draw([cases[n] for n in places], [texts[n] for n in places], [seeds[n] for n in places], how)
            drawn |= dict(zip(places, pictures, strict=True))
        return [drawn[n] for n in range(len(cases))]

    def learned(self, case: Case, folder: Path) -> WithMethod:
        """The method after its training on a case's references. Its seed follows from the subject's name."""
        from imprompt.training import train

        (folder / "photographs").mkdir()
        for n, picture in enumerate(case.references):
            picture.save(folder / "photographs" / f"{n:03}.png")
        chance = zlib.crc32(case.subject.encode("utf-8", "surrogateescape")) % 10_000
        choice = Train(
            data=str(folder / "photographs"), base=self.choice.base, method=self.method, noun=case.noun, out=str(folder / "run"),
            seed=self.choice.seed + chance, device=self.choice.device, workers=1, steps=self.choice.learning,
            prior=self.choice.prior, prior_folder=str(Path(self.choice.out) / "class"),
        )  # fmt: skip
        began = time.perf_counter()
        for _ in train(choice):
            pass
        self.learning += time.perf_counter() - began
        return with_file(str(folder / "run" / "adapter.safetensors"), self.name, self.pipe, self.choice)


def load_contender(source: str, choice: Evaluate) -> Contender:
    """What a row's name stands for. Raises UserError for what is none of the kinds.

    `source` may begin with a name of its own, NAME=SOURCE, and of an adapter end in how it brings references
    together: SOURCE@average.
    """
    name, source = named(source)
    source, how = taken_apart(source)
    device = claim_device(choice.device)
    dtype = pick_dtype(choice.dtype, torch.device(device).type, choice.base == "mini")
    if source in PERSONAL:
        return Learner(source, name, choice, load_base(choice.base, device, dtype))
    if source != "text" and source not in READS and not Path(source).is_file() and source not in hub.EMBEDDED and is_outside(source):
        return load_outside(source, device, dtype)
    pipe = load_base(choice.base, device, dtype)
    if source == "text":
        return Text(pipe, choice.scheduler, name)
    found = with_file(source, name, pipe, choice)
    if how:
        if not isinstance(found.method, IPAdapter):
            raise UserError(f"{source} is no IP-Adapter; expected one before @{how}")
        found.method.bring_together(how)
    return found


def with_file(source: str, name: str, pipe: Any, choice: Evaluate) -> WithMethod:
    """A method with its weights, ready to draw."""
    method = load_method(source, pipe, choice.base, choice.encoder)
    trainable = sum(p.numel() for p in method.module.parameters())
    return WithMethod(pipe, method, choice.scheduler, name, trainable, method.said if isinstance(method, (DreamBooth, Inversion)) else str)


def named(source: str) -> tuple[str, str]:
    """NAME=SOURCE taken apart; without a name, one made from the source."""
    name, sign, rest = source.partition("=")
    if sign and name and "/" not in name and not Path(source).exists():
        return name, rest
    plain, how = taken_apart(source)
    path = Path(plain)
    if path.suffix in checkpoints.FORMATS:
        return ((path.parent.name or path.stem) if path.stem in ("adapter", "best") else path.stem) + (f"@{how}" if how else ""), source
    return source.rsplit("/", 1)[-1] or source, source


def taken_apart(source: str) -> tuple[str, str]:
    """An adapter and how it brings several references together, one of config.COMBINE; the latter empty for its own way."""
    rest, _, how = source.rpartition("@")
    return (rest, how) if how in COMBINE else (source, "")


def check_source(source: str) -> None:
    """Raise UserError early for a name that stands for nothing."""
    source, _ = taken_apart(named(source)[1])
    if source in SHOWN or source in hub.EMBEDDED or source == "reference-only" or source in PERSONAL or Path(source).is_file():
        return
    if source in READS:
        raise UserError(f"{source} is a method; train it first (imprompt train --method {source}), then name its adapter.safetensors")
