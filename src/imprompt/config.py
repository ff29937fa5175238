"""What the user chose: one frozen dataclass per verb. Standard library only, so that `--help` is instant.

Every field is a flag of the command line, a key of the TOML file given with `--config`, and a keyword in Python.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from imprompt.errors import UserError

SCHEDULERS = ("ddim", "pndm", "dpm++", "euler", "euler-a", "heun", "unipc", "lcm")


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


FITS = ("crop", "pad", "squash", "tile")

# How several references are brought together without training, and with it too.
COMBINE = ("concat", "average", "max", "average-tokens", "max-tokens", "joint")
AGGREGATORS = (*COMBINE, "self-attention", "attention", "attention-tokens")


@dataclass(frozen=True)
class Generate:
    """Draw pictures after reference pictures."""

    image: tuple[str, ...] = _option((), "reference picture; repeat it for several of one subject", metavar="PATH")
    prompt: str = _option("", "text")
    negative: str = _option("", "what not to draw")
    scale: float = _option(1.0, "λ, the weight of the image: 0 … 1 and beyond")
    weights: str = _option("", "of several references, such as 2,1,1: a weight of 2 is the same as giving the picture twice")
    combine: str = _option("auto", f"several references: {', '.join(COMBINE)} (default: as the adapter was trained, or side by side)")
    face: str | None = _option(
        None, "identity embeddings for a FaceID adapter: .npy or .safetensors (default: from the references, by the extra faces)",
        metavar="FILE",
    )  # fmt: skip
    region: str | None = _option(None, "picture that is white where the references are to be heard", metavar="PATH")
    blocks: str = _option("", "where in the model: style, layout, or BLOCK=λ with commas between, such as up_blocks=1,mid_block=0.5")
    start: float = _option(0.0, "from when on the references are heard: 0 is the first step, 1 the end")
    end: float = _option(1.0, "until when")
    negative_image: str | None = _option(None, "picture that is not to be drawn after", metavar="PATH")
    save_prompt: str | None = _option(None, "keep the image prompt in this .safetensors file; --image takes it again", metavar="FILE")
    also: tuple[str, ...] = _option(
        (),
        "a further image prompt: image=b.png,scale=0.5,… with adapter, encoder, region, blocks, start, end, fit, combine",
        metavar="SPEC",
    )
    adapter: str | None = _option(None, "adapter: a file, a hub file, mini or mini-plus (default: mini on the mini base)")
    encoder: str | None = _option(None, "image encoder: folder or hub id (default: found from the adapter)")
    base: str = _option("mini", "base model: mini, a folder, a single .safetensors file or a hub id")
    base_config: str | None = _option(None, "of a single file: a folder of the same family in diffusers' form (default: from the hub)")
    init: str | None = _option(None, "picture to begin with instead of noise", metavar="PATH")
    strength: float | None = _option(None, "how far to go from it: 0 … 1 (default: 0.6; 1 for --inpaint)")
    inpaint: str | None = _option(None, "picture to draw into", metavar="PATH")
    mask: str | None = _option(None, "white where to draw into it", metavar="PATH")
    control: tuple[str, ...] = _option(
        (), "structure: KIND=IMAGE or KIND=IMAGE:WEIGHT; edges or silhouette on mini, canny, depth, pose …, a folder or a hub id",
        metavar="CONTROL",
    )  # fmt: skip
    lora: tuple[str, ...] = _option((), "LoRA of the base: a file, a folder or a hub id; :SCALE after it weighs it", metavar="LORA")
    steps: int = _option(30, "denoising steps")
    guidance: float | None = _option(None, "guidance scale (default: 3 on mini, 7.5 elsewhere)")
    scheduler: str = _option("ddim", f"one of {', '.join(SCHEDULERS)}")
    seed: int = _option(0, "seed of the first picture; the next ones count up")
    count: int = _option(4, "number of pictures")
    size: str | None = _option(None, "side in pixels, or WIDTHxHEIGHT (default: the model's own)")
    fit: str = _option("crop", f"references that are not square: one of {', '.join(FITS)}")
    dtype: str = _option("auto", "auto, float32, bfloat16 or float16")
    device: str = _option("auto", "auto, cpu, cuda, mps …")
    out: str = _option("imprompt-out", "folder for the pictures and the contact sheet")

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps, count=self.count)
        _at_least(0, seed=self.seed)
        if self.seed + self.count > 2**63:
            raise UserError(f"seed: expected less than 2⁶³, received {self.seed}")
        _finite(scale=self.scale, guidance=self.guidance)
        _one_of(SCHEDULERS, scheduler=self.scheduler)
        _one_of(FITS, fit=self.fit)
        _one_of(("auto", *COMBINE), combine=self.combine)
        self._doors()
        self.numbers()
        self.further()
        block_scales(self.blocks)
        _one_of(("auto", "float32", "bfloat16", "float16"), dtype=self.dtype)
        self.pixels()

    def _doors(self) -> None:
        """What goes together, and what does not."""
        _shares(start=self.start, end=self.end, strength=1.0 if self.strength is None else self.strength)
        if self.start > self.end:
            raise UserError(f"start: expected at most end ({self.end:g}), received {self.start:g}")
        if self.init and self.inpaint:
            raise UserError("init and inpaint: expected one of them; both say what picture to begin with")
        if bool(self.inpaint) != bool(self.mask):
            missing, there = ("mask", "inpaint") if self.inpaint else ("inpaint", "mask")
            raise UserError(f"{missing}: {there} needs it; give both --inpaint IMAGE and --mask IMAGE")
        if self.strength is not None and not (self.init or self.inpaint):
            raise UserError("strength: says how far to go from a picture; give one with --init or --inpaint")
        if (self.init or self.inpaint) and self.strong() * self.steps < 1:
            raise UserError(f"strength: {self.strong():g} of {self.steps} steps is less than one; expected at least {1 / self.steps:.2g}")
        self.controls()

    def strong(self) -> float:
        """How far to go from the picture that is begun with."""
        return self.strength if self.strength is not None else 1.0 if self.inpaint else 0.6

    def controls(self) -> list[tuple[str, str, float]]:
        """Kind, picture and weight of each structure control."""
        found = []
        for word in self.control:
            kind, sign, rest = word.partition("=")
            if not (kind and sign and rest):
                raise UserError(f"control: expected KIND=IMAGE or KIND=IMAGE:WEIGHT, such as canny=edges.png:0.8; received {word!r}")
            found.append((kind, *weighed(rest)))
        return found

    def further(self) -> "list[Generate]":
        """The further image prompts, each as if it were the only one."""
        return [build(Generate, _further(word) | {"base": self.base}) for word in self.also]

    def numbers(self) -> list[float] | None:
        """The weights, or None where all weigh the same."""
        try:
            found = [float(word) for word in str(self.weights).split(",")] if self.weights else None
        except ValueError as error:
            raise UserError(f"weights: expected numbers with commas between them, such as 2,1,1; received {self.weights!r}") from error
        if found is not None and len(found) != len(self.image):
            raise UserError(f"weights: expected one for each of the {len(self.image)} references, received {len(found)}")
        return found

    def pixels(self) -> tuple[int, int] | None:
        """(width, height), or None for the model's own."""
        if self.size is None:
            return None
        parts = str(self.size).lower().split("x")
        if len(parts) > 2 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
            raise UserError(f"size: expected a side in pixels or WIDTHxHEIGHT, received {self.size!r}")
        return int(parts[0]), int(parts[-1])


# Of an image prompt; the rest of Generate is the picture's.
PROMPT_FIELDS = (
    "image", "scale", "weights", "combine", "face", "region", "blocks", "start", "end", "negative_image", "adapter", "encoder", "fit"
)  # fmt: skip


def weighed(word: str) -> tuple[str, float]:
    """PATH:WEIGHT taken apart; the weight is 1 where there is none."""
    match = re.fullmatch(r"(.+):(-?(?:\d+\.?\d*|\.\d+))", word)
    return (match[1], float(match[2])) if match else (word, 1.0)


def block_scales(words: str) -> dict[str, float]:
    """What `blocks` says: the beginning of a layer's name → λ, or nothing. Raises UserError."""
    found: dict[str, float] = {}
    for word in filter(None, (w.strip() for w in words.split(","))):
        name, _, number = word.partition("=")
        try:
            value = float(number) if number else 1.0
        except ValueError as error:
            raise UserError(f"blocks: expected BLOCK=λ, such as up_blocks=0.8; received {word!r}") from error
        found[name] = value
    return found


def _further(word: str) -> dict[str, Any]:
    """image=a.png,image=b.png,scale=0.5 as fields. A comma that no field follows belongs to the value before it."""
    found: dict[str, Any] = {}
    for part in re.split(r",(?=[a-z_]+=)", word):
        name, sign, value = part.partition("=")
        if not sign or name not in PROMPT_FIELDS:
            raise UserError(f"also: expected {', '.join(f'{n}=…' for n in PROMPT_FIELDS[:4])} … with commas between; received {part!r}")
        if name == "image":
            found["image"] = (*found.get("image", ()), value)
        elif name in ("scale", "start", "end"):
            try:
                found[name] = float(value)
            except ValueError as error:
                raise UserError(f"also: {name}: expected a number, received {value!r}") from error
        else:
            found[name] = value
    if not found.get("image"):
        raise UserError(f"also: expected at least one image=PATH; received {word!r}")
    return found


WAYS = (*COMBINE, "attention", "self-attention", "dreambooth", "dreambooth-lora", "inversion")


@dataclass(frozen=True)
class Personalise:
    """Draw a person or a thing again, after several photographs."""

    folder: str = _option("", "folder of photographs of one subject, or a list of them", place=True)
    prompt: tuple[str, ...] = _option((), "text, * stands for the subject; repeat it for several", metavar="TEXT")
    negative: str = _option("", "what not to draw")
    method: str = _option("average-tokens", f"one of {', '.join(WAYS)}; the last three learn the subject first")
    noun: str = _option("", "what the subject is: cat, person; needed by the methods that learn it")
    adapter: str | None = _option(None, "adapter: a file, mini … (default: the embedded one that suits the method, on mini)")
    encoder: str | None = _option(None, "image encoder: folder or hub id (default: found from the adapter)")
    scale: float = _option(1.0, "λ, the weight of the photographs: 0 … 1 and beyond")
    base: str = _option("mini", "base model: mini, a folder or a hub id")
    learning: int = _option(0, "optimiser steps of a method that learns the subject (default: the method's own)")
    prior: int = _option(-1, "pictures of other such things that a DreamBooth is to keep; the base draws them (default: 200, 16 on mini)")
    steps: int = _option(30, "denoising steps")
    guidance: float | None = _option(None, "guidance scale (default: 3 on mini, 7.5 elsewhere)")
    scheduler: str = _option("ddim", f"one of {', '.join(SCHEDULERS)}")
    seed: int = _option(0, "seed of the first picture of each prompt; the next ones count up")
    count: int = _option(4, "pictures for each prompt")
    size: str | None = _option(None, "side in pixels, or WIDTHxHEIGHT (default: the model's own)")
    fit: str = _option("crop", f"photographs that are not square: one of {', '.join(FITS)}")
    dtype: str = _option("auto", "auto, float32, bfloat16 or float16")
    device: str = _option("auto", "auto, cpu, cuda, mps …")
    out: str = _option("imprompt-out", "folder for the pictures, the contact sheet and what was learned")

    def __post_init__(self) -> None:
        _one_of(WAYS, method=self.method)
        _at_least(0, learning=self.learning)
        _at_least(-1, prior=self.prior)
        if not self.folder:
            raise UserError("folder: expected a folder of photographs of one subject, received nothing")
        learns = self.method in PERSONAL
        if learns and not self.noun:
            raise UserError(f"noun: {self.method} has to know what the subject is, such as cat or person; received nothing")
        if not self.noun and any("*" in text for text in self.prompt):
            raise UserError("noun: * stands for the subject; say what it is, such as cat or person")
        for name, given, of_learning in (
            ("adapter", self.adapter is not None, False), ("encoder", self.encoder is not None, False),
            ("fit", self.fit != "crop", False), ("learning", self.learning > 0, True), ("prior", self.prior >= 0, True),
        ):  # fmt: skip
            if given and of_learning != learns:
                raise UserError(f"{name}: does nothing with {self.method}, which {'learns the subject' if learns else 'needs no learning'}")
        if self.method == "inversion" and self.scale != 1:
            raise UserError("scale: inversion learns words, which are said or not; leave --scale out")
        self.drawn("")

    def prompts(self) -> tuple[str, ...]:
        """Each prompt, with the noun in the place of *; without any, a photograph of the subject."""
        told = self.prompt or (f"a photo of a {self.noun}" if self.noun else "",)
        return tuple(text if self.method in PERSONAL else text.replace("*", self.noun) for text in told)

    def drawn(self, text: str, **more: Any) -> Generate:
        """The drawing of one prompt."""
        shared = {f.name for f in fields(Generate)} & {f.name for f in fields(self)} - {"prompt", "adapter"}
        return Generate(**{name: getattr(self, name) for name in shared}, prompt=text, **more)

    def training(self) -> "Train":
        """The training of a method that learns the subject."""
        return Train(
            data=self.folder, base=self.base, method=self.method, noun=self.noun, steps=self.learning, prior=self.prior, seed=self.seed,
            device=self.device, out=str(Path(self.out) / self.method),
        )  # fmt: skip


# Each method, and what it reads of a picture: the encoder's pooled embedding or its grid, the pixels, the latents, or nothing.
READS = {
    "ip-adapter": "pooled",
    "ip-adapter-plus": "grid",
    "ip-adapter-full-face": "grid",
    "simple": "pooled",
    "simple-plus": "grid",
    "uni-controlnet": "pooled",
    "t2i-style": "grid",
    "shuffle": "pixels",
    "seecoder": "pixels",
    "image-variations": "pooled",
    "sd-unclip": "pooled",
    "blip-diffusion": "grid",
    "open-unclip": "pooled",
    "kandinsky": "pooled",
    "versatile": "grid",
    "reference-only": "latents",
    "dreambooth": "nothing",
    "dreambooth-lora": "nothing",
    "inversion": "nothing",
}
COPIES = (
    "shuffle",
    "image-variations",
    "sd-unclip",
    "blip-diffusion",
    "open-unclip",
    "kandinsky",
    "versatile",
)  # train a copy of UNet weights
MANY = (
    "ip-adapter",
    "ip-adapter-plus",
    "ip-adapter-full-face",
    "simple",
    "simple-plus",
    "uni-controlnet",
    "t2i-style",
    "blip-diffusion",
)  # hear several references
PERSONAL = tuple(name for name, read in READS.items() if read == "nothing")  # learn one subject, and are shown no picture afterwards
METHODS = tuple(name for name in READS if name not in (*PERSONAL, "reference-only"))  # those that are trained to hear pictures
GENERAL = tuple(name for name in READS if name not in (*PERSONAL, "ip-adapter-full-face"))  # the first paper's: not its variant for faces

# What fits the embedded model, for whatever the user left open; elsewhere it is P1's settings (arXiv:2308.06721, section 4.1.2).
_MINI: dict[str, Any] = {
    "steps": 2_500,
    "batch": 48,
    "lr": 3e-3,
    "optimizer": "muon",
    "schedule": "cosine",
    "warmup": 100,
    "ema": 0.998,
    "timesteps": "logit-normal",
    "drop_text": 0.3,  # every caption of this world names the kind: what must tell it has to be alone more often
}
_PAPER: dict[str, Any] = {
    "steps": 20_000,
    "batch": 8,
    "lr": 1e-4,
    "optimizer": "adamw",
    "schedule": "constant",
    "warmup": 0,
    "ema": 0.0,
    "timesteps": "uniform",
    "drop_text": 0.05,
}
MINI_SUBJECT: dict[str, Any] = {"lr": 1e-3, "drop_text": 0.1}  # where an adapter of mini goes on by subjects: captions tell no look
_ADAM = {"optimizer": "adamw", "lr": 1e-3}  # on mini, where Muon is not to be had


# Of one subject's photographs: nothing is dropped, nothing is held out, nothing is tried before. On mini: docs/log.md.
_SUBJECT: dict[str, Any] = {
    "optimizer": "adamw",
    "drop_text": 0.0,
    "drop_image": 0.0,
    "drop_both": 0.0,
    "validation": 0,
    "preflight": False,
    "schedule": "constant",
    "warmup": 0,
    "ema": 0.0,
    "save_every": 200,
    "keep": 1,
}
_ONE_SUBJECT: dict[tuple[str, bool], dict[str, Any]] = {  # by method, and whether on mini
    ("dreambooth", True): {"steps": 60, "batch": 4, "lr": 1e-3, "schedule": "cosine", "prior": 16, "token": "sks"},
    ("dreambooth-lora", True): {"steps": 60, "batch": 4, "lr": 1e-2, "schedule": "cosine", "prior": 16, "token": "sks"},
    ("inversion", True): {"steps": 100, "batch": 4, "lr": 5e-2, "prior": 0, "token": "<subject>"},
    ("dreambooth", False): {"steps": 800, "batch": 2, "lr": 5e-6, "prior": 200, "token": "sks"},
    ("dreambooth-lora", False): {"steps": 500, "batch": 2, "lr": 1e-4, "prior": 200, "token": "sks"},
    ("inversion", False): {"steps": 3_000, "batch": 4, "lr": 5e-4, "prior": 0, "token": "<subject>"},
}


@dataclass(frozen=True)
class Train:
    """Train an adapter. Fields left open depend on the base: see `settled`."""

    data: str = _option("mini", "training data: mini, a folder, COCO, a list (.jsonl, .csv, .parquet), or .tar shards")
    base: str = _option("mini", "base model: mini, a folder or a hub id")
    method: str = _option("ip-adapter", f"one of {', '.join(METHODS)}; of one subject alone {', '.join(PERSONAL)}")
    out: str = _option("run", "folder of the run")
    noun: str = _option("", f"what the subject is, for {', '.join(PERSONAL)}: cat, person")
    token: str = _option("", "the subject's name in texts (default: sks before the noun, or <subject>)")
    prior: int = _option(-1, "pictures of other such things that a DreamBooth is to keep; the base draws them (default: 200, 16 on mini)")
    prior_weight: float = _option(1.0, "how much they count")
    prior_folder: str | None = _option(None, "where they are kept, for several trainings (default: class/ in the run's folder)")
    adapter: str | None = _option(None, "fine-tune from this adapter instead of starting anew: a file, mini …")
    encoder: str | None = _option(None, "image encoder: folder or hub id (default: the base's or the adapter's own)")
    cache: str | None = _option(None, "feature cache to train from; encoded from the data first, where it is not complete")
    steps: int = _option(0, "optimiser steps (default: 2500 on mini, 20000 elsewhere)")
    batch: int = _option(0, "pictures a step and process (default: 48 on mini, 8 elsewhere)")
    accumulate: int = _option(1, "batches for one step")
    lr: float = _option(0.0, "learning rate (default: 3e-3 on mini, 1e-4 elsewhere)")
    schedule: str = _option("auto", "of the learning rate: constant, cosine or linear")
    warmup: int = _option(-1, "steps until the full learning rate")
    weight_decay: float = _option(0.01, "of AdamW")
    clip: float = _option(1.0, "largest norm of the gradient; 0 for none")
    optimizer: str = _option("auto", "adamw, muon or adamw8bit (default: muon on mini, adamw elsewhere)")
    ema: float = _option(-1.0, "decay of the weights' moving average, which is what is saved; 0 for none")
    drop_text: float = _option(-1.0, "share of pictures trained without their text (default: 0.3 on mini, 0.05 elsewhere)")
    drop_image: float = _option(0.05, "share trained without their image")
    drop_both: float = _option(0.05, "share trained without either")
    timesteps: str = _option("auto", "uniform or logit-normal")
    min_snr: float = _option(0.0, "γ of the min-SNR weight, 5 is usual; 0 for none")
    noise_offset: float = _option(0.0, "strength of the noise offset, 0.1 is usual; 0 for none")
    precision: str = _option("auto", "auto, float32, bfloat16 or float16; the frozen parts are held in it")
    checkpointing: bool = _option(False, "compute activations twice to save memory")
    size: int | None = _option(None, "side of the training pictures (default: the base's own)")
    crop: str = _option("centre", "centre or random")
    flip: bool = _option(False, "mirror half of the pictures")
    buckets: bool = _option(False, "train on several shapes instead of squares")
    caption: str = _option("", "text of pictures that have none")
    references: int = _option(0, "references for one picture (default: 1; 9 with --subjects)")
    fewest: int = _option(0, "of these are different, at random from this many on (default: 1 with --subjects, but 9 for self-attention)")
    combine: str = _option("auto", f"several references: {', '.join(AGGREGATORS)} (default: the adapter's own, or side by side)")
    subjects: int = _option(
        0, "draw each picture after the others of its subject, of subjects with at least so many files; 0 for after itself"
    )
    held_out: float = _option(-1.0, "share of the subjects that is left for testing (default: a third; of mini none, it has others)")
    augment: float = _option(0.0, "how much references are altered, 0 … 1")
    own_crop: bool = _option(False, "crop references on their own, not as the target")
    least: int = _option(0, "pictures with a shorter side than this many pixels are left out")
    max_unreadable: float = _option(0.1, "share of unreadable records that ends the run")
    workers: int = _option(2, "threads that read and prepare pictures")
    save_every: int = _option(500, "steps between two saves")
    keep: int = _option(2, "saves that are kept, besides the best")
    validate_every: int = _option(500, "steps between two examinations")
    validation: int = _option(16, "pictures that are examined; 0 for none")
    validation_steps: int = _option(20, "denoising steps of the pictures that are drawn then")
    judge: str | None = _option(None, "CLIP model for CLIP-I and CLIP-T: mini, a folder or a hub id (default: mini's on mini)")
    tracker: str = _option("", "tensorboard or wandb, besides the run's own page")
    resume: str = _option("auto", "auto continues what is in the folder; never starts anew")
    processes: int = _option(1, "processes on this machine")
    deepspeed: bool = _option(False, "DeepSpeed ZeRO-2: optimiser states and gradients split among the processes")
    preflight: bool = _option(True, "overfit one batch first, and say what is wrong")
    seed: int = _option(0, "of everything random")
    device: str = _option("auto", "auto, cpu, cuda, mps …")

    def __post_init__(self) -> None:
        _at_least(1, accumulate=self.accumulate, save_every=self.save_every, keep=self.keep)
        _at_least(0, references=self.references, fewest=self.fewest, subjects=self.subjects)
        _at_least(1, validate_every=self.validate_every, processes=self.processes, workers=self.workers)
        _at_least(0, steps=self.steps, batch=self.batch, seed=self.seed, validation=self.validation, least=self.least)
        _at_least(1, size=1 if self.size is None else self.size, validation_steps=self.validation_steps)
        _finite(lr=self.lr, weight_decay=self.weight_decay, clip=self.clip, min_snr=self.min_snr, noise_offset=self.noise_offset)
        shares = {name: getattr(self, name) for name in ("drop_text", "drop_image", "drop_both", "augment", "max_unreadable")}
        _shares(**{name: value for name, value in shares.items() if (name, value) != ("drop_text", -1.0)})
        if self.references > 1 and self.method not in MANY:
            raise UserError(f"references: {self.method} hears one; expected 1, or one of {', '.join(MANY)} as the method")
        if self.drop_text + self.drop_image + self.drop_both > 1:
            raise UserError("drop_text, drop_image and drop_both: expected at most 1 together")
        _one_of((*METHODS, *PERSONAL), method=self.method)
        if self.method in PERSONAL:
            self._of_one_subject()
        _one_of(("auto", *AGGREGATORS), combine=self.combine)
        if self.combine != "auto" and not self.method.startswith("ip-adapter"):
            raise UserError(f"combine: {self.method} has a way of its own; expected a method of the ip-adapter family")
        if self.subjects == 1:
            raise UserError("subjects: expected at least 2 pictures of a subject, one to draw and one to draw after; received 1")
        if not (self.held_out == -1 or 0 <= self.held_out < 1):
            raise UserError(f"held_out: expected 0 or more, and less than 1; received {self.held_out}")
        if self.fewest > (self.references or (9 if self.subjects else 1)):
            raise UserError(f"fewest: expected at most as many as references, received {self.fewest}")
        if self.combine == "self-attention" and (self.references or 9) != 9:
            raise UserError(f"references: self-attention reads nine of them (P2); received {self.references}")
        _one_of(("auto", "adamw", "muon", "adamw8bit"), optimizer=self.optimizer)
        _one_of(("centre", "random"), crop=self.crop)
        _one_of(("", "tensorboard", "wandb"), tracker=self.tracker)
        _one_of(("auto", "never"), resume=self.resume)
        _one_of(("auto", "float32", "bfloat16", "float16"), precision=self.precision)
        _one_of(("auto", "constant", "cosine", "linear"), schedule=self.schedule)
        _one_of(("auto", "uniform", "logit-normal"), timesteps=self.timesteps)
        if self.deepspeed and self.ema > 0:
            raise UserError("ema: not to be had under DeepSpeed, which keeps the exact weights to itself; leave it out")
        if not self.ema < 1:
            raise UserError(f"ema: expected less than 1, received {self.ema}")

    def _of_one_subject(self) -> None:
        if not self.noun:
            raise UserError(f"noun: {self.method} has to know what the subject is, such as cat or person; received nothing")
        if self.cache or self.adapter or self.subjects:
            raise UserError(f"{self.method} learns one subject from its photographs; leave cache, adapter and subjects out")
        _finite(prior_weight=self.prior_weight)
        _at_least(0, prior_weight=self.prior_weight)
        _at_least(-1, prior=self.prior)

    def settled(self) -> "Train":
        """With every open field filled in."""
        usual = _MINI if self.base == "mini" else _PAPER
        if self.method in PERSONAL:
            usual = usual | _SUBJECT | _ONE_SUBJECT[self.method, self.base == "mini"]
        if self.deepspeed:
            usual = usual | {"ema": 0.0} | (_ADAM if self.base == "mini" else {})
        elif self.base == "mini" and (self.optimizer.startswith("adamw") or self.precision == "float16"):
            usual = usual | _ADAM
        open_still = {f.name: f.default for f in fields(self)}
        references = self.references or (9 if self.subjects else 1)
        several = bool(self.subjects) and self.combine != "self-attention"
        usual = usual | {
            "references": references,
            "fewest": 1 if several else references,
            "held_out": 0.0 if re.match("mini(:|$)", self.data) else 1 / 3,
        }
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) == open_still[name]})


@dataclass(frozen=True)
class Encode:
    """Encode data into a feature cache, to train from again and again."""

    data: str = _option("mini", "data: mini, a folder, COCO, a list (.jsonl, .csv, .parquet), or .tar shards", place=True)
    out: str = _option("cache", "folder of the cache; one begun there is continued", place=True)
    base: str = _option("mini", "base model whose VAE and text encoders are used: mini, a folder or a hub id")
    method: str = _option("ip-adapter", f"what it is for, one of {', '.join(METHODS)}: what it reads of a picture is stored")
    encoder: str | None = _option(None, "image encoder: folder or hub id (default: the base's own, or the releases')")
    batch: int = _option(0, "pictures at a time (default: 64 on mini, 8 elsewhere)")
    size: int | None = _option(None, "side of the training pictures (default: the base's own)")
    crop: str = _option("centre", "centre or random")
    flip: bool = _option(False, "mirror half of the pictures")
    buckets: bool = _option(False, "several shapes instead of squares")
    caption: str = _option("", "text of pictures that have none")
    references: int = _option(1, "references for one picture")
    augment: float = _option(0.0, "how much references are altered, 0 … 1")
    own_crop: bool = _option(False, "crop references on their own, not as the target")
    least: int = _option(0, "pictures with a shorter side than this many pixels are left out")
    max_unreadable: float = _option(0.1, "share of unreadable records that ends the work")
    precision: str = _option("auto", "auto, float32, bfloat16 or float16: what the encoders compute in")
    workers: int = _option(2, "threads that read and prepare pictures")
    processes: int = _option(1, "processes on this machine")
    seed: int = _option(0, "of crops, flips and augmentation")
    device: str = _option("auto", "auto, cpu, cuda, mps …")

    def __post_init__(self) -> None:
        _at_least(1, references=self.references, workers=self.workers, processes=self.processes, size=1 if self.size is None else self.size)
        _at_least(0, batch=self.batch, seed=self.seed, least=self.least)
        _shares(augment=self.augment, max_unreadable=self.max_unreadable)
        _one_of(METHODS, method=self.method)
        _one_of(("centre", "random"), crop=self.crop)
        _one_of(("auto", "float32", "bfloat16", "float16"), precision=self.precision)

    @classmethod
    def of(cls, train: Train) -> "Encode":
        """What a training needs in its cache."""
        shared = {f.name for f in fields(cls)} & {f.name for f in fields(train)} - {"out", "batch"}
        wanted = cls(out=train.cache or cls.out, **{name: getattr(train, name) for name in shared})
        return replace(wanted, references=1) if train.subjects else wanted  # a training by subjects puts rows together by itself

    def settled(self) -> "Encode":
        """With every open field filled in."""
        return replace(self, batch=self.batch or (64 if self.base == "mini" else 8))


@dataclass(frozen=True)
class Validate:
    """Look at training data."""

    data: str = _option("mini", "data: mini, a folder, COCO, a list (.jsonl, .csv, .parquet), or .tar shards", place=True)
    out: str = _option("data-report", "folder of the report")
    least: int = _option(512, "pictures with a shorter side than this many pixels are called too small")
    workers: int = _option(2, "threads that read pictures")

    def __post_init__(self) -> None:
        _at_least(1, workers=self.workers)
        _at_least(0, least=self.least)


@dataclass(frozen=True)
class Evaluate:
    """Measure image prompts: draw after held-out pictures, score, compare."""

    adapter: tuple[str, ...] = _option((), "adapter to measure: a file, mini or mini-plus; NAME=FILE names its row", metavar="FILE")
    against: tuple[str, ...] = _option(
        (), "what to compare with: another adapter or method's file, reference-only, or a pipeline by folder or hub id", metavar="WHAT"
    )
    base: str = _option("mini", "base model: mini, a folder or a hub id")
    encoder: str | None = _option(None, "image encoder of the adapters: folder or hub id (default: each one's own)")
    data: str = _option("mini", "pictures with captions: mini's held-out set, COCO, or any training data")
    subjects: int = _option(0, "draw by subject, of those with at least so many photographs; 0 for after each picture by itself")
    references: int = _option(1, "photographs of a subject that are drawn after")
    targets: int = _option(1, "other photographs of each subject that are to be drawn")
    split: str | None = _option(None, "subjects.json of a training: its test subjects alone", metavar="FILE")
    noun: str = _option("", "what the subjects are, as captions call them: person (default: of mini the kind)")
    caption: str = _option("", "text of pictures that have none (default: a photo of a NOUN)")
    identity: str = _option("auto", "what tells subjects apart: mini, insightface, facenet or none (default: mini's with subjects on mini)")
    limit: int = _option(0, "number of prompts (default: 1000 of mini, 5000 of other data)")
    learning: int = _option(0, "optimiser steps of methods that learn each subject (default: their own)")
    prior: int = _option(-1, "pictures of other such things that they are to keep (default: their own number)")
    samples: int = _option(4, "pictures for each prompt")
    text: str = _option("none", "what the image prompts are given as text: none or caption")
    scale: float = _option(1.0, "λ, the weight of the image")
    curve: int = _option(0, "prompts for a curve of λ, with another picture's caption as text; 0 for none")
    steps: int = _option(50, "denoising steps")
    guidance: float | None = _option(None, "guidance scale (default: 3 on mini, 7.5 elsewhere)")
    scheduler: str = _option("ddim", f"one of {', '.join(SCHEDULERS)}")
    size: int | None = _option(None, "side in pixels (default: the model's own)")
    batch: int = _option(0, "pictures drawn at a time (default: 64 on mini, 8 elsewhere)")
    judge: str | None = _option(None, "CLIP model for CLIP-I, CLIP-T and CMMD: mini, a folder or a hub id (default: ViT-L/14, or mini's)")
    features: str = _option("auto", "what FID and KID look at: mini, clip, inception, or a model by folder or hub id such as DINO")
    lpips: bool = _option(False, "also measure LPIPS to the reference (an extra: pip install 'imprompt[inception]')")
    seed: int = _option(0, "of the first picture; the next ones count up")
    processes: int = _option(1, "processes on this machine")
    resamples: int = _option(200, "bootstrap resamples for the intervals")
    dtype: str = _option("auto", "auto, float32, bfloat16 or float16")
    device: str = _option("auto", "auto, cpu, cuda, mps …")
    out: str = _option("evaluation", "folder of the evaluation; one begun there is continued")

    def __post_init__(self) -> None:
        _at_least(1, samples=self.samples, steps=self.steps, processes=self.processes, size=1 if self.size is None else self.size)
        _at_least(1, references=self.references, targets=self.targets)
        _at_least(0, limit=self.limit, curve=self.curve, batch=self.batch, seed=self.seed, subjects=self.subjects, learning=self.learning)
        if self.subjects == 1:
            raise UserError("subjects: expected at least 2 photographs of a subject, one to draw after and one to draw; received 1")
        if not self.subjects and (self.references, self.targets, self.split) != (1, 1, None):
            raise UserError("references, targets and split are for pictures by subject: say how many photographs, --subjects 10")
        if self.seed > 2**62:
            raise UserError(f"seed: expected less than 2⁶², received {self.seed}")
        if self.curve == 1:
            raise UserError("curve: expected 0, or at least 2 prompts, of which an interval can be told; received 1")
        _at_least(2, resamples=self.resamples)
        _finite(scale=self.scale, guidance=self.guidance)
        _one_of(SCHEDULERS, scheduler=self.scheduler)
        _one_of(("none", "caption"), text=self.text)
        _one_of(("auto", "float32", "bfloat16", "float16"), dtype=self.dtype)

    def settled(self) -> "Evaluate":
        """With every open field filled in."""
        mini = self.base == "mini"
        return replace(
            self,
            adapter=self.adapter or (("mini",) if mini and not self.against else ()),
            guidance=self.guidance if self.guidance is not None else 3.0 if mini else 7.5,
            batch=self.batch or (64 if mini else 8),
            judge=self.judge or ("mini" if mini else "openai/clip-vit-large-patch14"),
            features=("mini" if mini else "clip") if self.features == "auto" else self.features,
            identity=("mini" if re.match("mini(:|$)", self.data) and self.subjects else "none")
            if self.identity == "auto"
            else self.identity,
        )


PAPERS = ("ip-adapter", "personalisation")


# The rows of the second paper that can be named one by one.
REMEMBERED = (
    "one", "one-plus", "concat", "average", "max", "average-tokens", "max-tokens", "average-plus", "max-plus", "self-attention",
    "attention-tokens", "references", *PERSONAL
)  # fmt: skip


@dataclass(frozen=True)
class Reproduce:
    """Regenerate a paper's comparison on the embedded model: train what is missing, measure all, judge the paper's claims."""

    paper: str = _option("ip-adapter", f"one of {', '.join(PAPERS)}", place=True)
    budget: str = _option("full", "full: hours on two cores; smoke: a minute or two, says only whether it runs")
    method: tuple[str, ...] = _option((), "just this row; repeat it for several (the report shows what is there)", metavar="METHOD")
    processes: int = _option(2, "processes on this machine; each trains and measures a row of its own")
    device: str = _option("auto", "auto, cpu, cuda, mps …")
    out: str = _option("runs/reproduce", "folder; one begun there is continued")

    def __post_init__(self) -> None:
        _at_least(1, processes=self.processes)
        _one_of(PAPERS, paper=self.paper)
        _one_of(("full", "smoke"), budget=self.budget)
        for name in self.method:
            _one_of(GENERAL if self.paper == "ip-adapter" else REMEMBERED, method=name)


def _at_least(low: int, **values: float) -> None:
    for name, value in values.items():
        if value < low:
            raise UserError(f"{name}: expected at least {low}, received {value}")


def _shares(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}: expected 0 … 1, received {value}")


def _finite(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name}: expected a finite number, received {value}")


def _one_of(allowed: tuple[str, ...], **values: str) -> None:
    for name, value in values.items():
        if value not in allowed:
            raise UserError(f"{name}: expected one of {', '.join(allowed)}; received {value!r}")


# ------------------------------------------------------------------------------------------ from files and from words

Config = TypeVar("Config")


def options(kind: type) -> list[tuple[Field[Any], type, bool]]:
    """Each field of a verb with the type of one value and whether it may be repeated."""
    hints = get_type_hints(kind)
    found = []
    for f in fields(kind):
        inner = [a for a in get_args(hints[f.name]) if a not in (type(None), Ellipsis)]
        found.append((f, inner[0] if inner else hints[f.name], hints[f.name] == tuple[str, ...]))
    return found


def build(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A verb's dataclass from plain values, with a clear error for an unknown field or a wrong type."""
    known = {f.name: (one, many) for f, one, many in options(kind)}
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"unknown field {unknown[0]!r}; expected one of {', '.join(known)}")
    checked = {}
    for name, value in values.items():
        one, many = known[name]
        if many:
            value = (value,) if isinstance(value, (str, Path)) or not isinstance(value, (list, tuple)) else tuple(value)
        elif value is not None and one in (int, float, str, bool):
            if one is str and isinstance(value, (int, Path)) and not isinstance(value, bool):
                value = str(value)
            allowed = (int, float) if one is float else one
            if isinstance(value, bool) != (one is bool) or not isinstance(value, allowed):
                raise UserError(f"{name}: expected {one.__name__}, received {value!r}")
        checked[name] = value
    missing = [f.name for f, _, _ in options(kind) if f.default is MISSING and f.name not in checked]
    if missing:
        raise UserError(f"{missing[0]} is needed")
    return kind(**checked)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The fields in a TOML file."""
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no configuration at {path}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is not a readable TOML file: {error}") from error
