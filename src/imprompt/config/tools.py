"""Configuration of `inspect`, `convert` and `mini`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from imprompt.config.common import MAX_DENOISING_STEPS, MAX_IMAGES, MAX_SCALE, UNSET, Options, Scheduler, option
from imprompt.errors import UserError


@dataclass(frozen=True)
class InspectConfig(Options):
    """Describe an adapter file."""

    file: str = option("", "adapter file", positional=True, path=True)

    def check(self) -> None:
        if not self.file:
            raise UserError("file: expected an adapter file, received nothing")


@dataclass(frozen=True)
class ConvertConfig(Options):
    """Rewrite an adapter file or a training state as a public file."""

    source: str = option("", "adapter file or training state", positional=True, path=True)
    target: str = option("", "a name ending in .safetensors, or .bin for old readers", positional=True, path=True)
    without_aggregator: bool = option(False, "only what every reader knows: without the trained aggregation of several references")
    faceid_version: int | None = option(
        UNSET, "version of a FaceID-Plus adapter, to be written into its metadata (default: as its name or metadata say)", ge=1, le=2
    )

    def check(self) -> None:
        if not (self.source and self.target):
            raise UserError("source and target: expected two files, such as imprompt convert adapter.bin adapter.safetensors")


@dataclass(frozen=True)
class MiniBuildConfig(Options):
    """Train every part of mini from scratch (resumable)."""

    output_dir: str = option("runs/mini", "work folder; a run in it is continued", alias=("-o",), path=True)
    budget: float = option(1.0, "fraction of the full number of steps (0.001 for a trial)", gt=0, le=10)
    only: tuple[str, ...] = option((), "just this part; repeat it for several", metavar="PART")
    install: bool = option(False, "make the result the embedded model")


@dataclass(frozen=True)
class MiniStyleConfig(Options):
    """Fine-tune a custom model from mini, in another drawing style (resumable)."""

    style: Literal["ink", "mosaic"] = option("ink", "drawing style", positional=True)
    output_dir: str | None = option(UNSET, "folder; a run in it is continued (default: runs/mini-STYLE)", alias=("-o",), path=True)
    budget: float = option(1.0, "fraction of the full number of steps (0.01 for a trial)", gt=0, le=10)


@dataclass(frozen=True)
class MiniPreviewConfig(Options):
    """Make a contact sheet of the synthetic world and of what mini generates."""

    output_dir: str = option("imprompt-out", "folder of the contact sheet", alias=("-o",), path=True)
    seed: int = option(0, "seed, and the first test sample", ge=0, le=MAX_IMAGES)


@dataclass(frozen=True)
class MiniEvaluateConfig(Options):
    """Measure mini against its thresholds."""

    task: tuple[str, ...] = option((), "just this task; repeat it for several", metavar="TASK")
    scale: tuple[float, ...] = option((), "λ of the task image-text; repeat it for several", metavar="λ", ge=-MAX_SCALE, le=MAX_SCALE)
    num_prompts: int = option(1000, "number of test samples", ge=1, le=MAX_IMAGES)
    num_inference_steps: int = option(50, "denoising steps", ge=1, le=MAX_DENOISING_STEPS, alias=("--steps",))
    guidance_scale: float | None = option(UNSET, "classifier-free guidance scale (default: 3)", ge=0, le=MAX_SCALE)
    scheduler: Scheduler = option("ddim", "noise scheduler")
    output_dir: str | None = option(UNSET, "folder for contact sheets and curves (default: none are written)", alias=("-o",), path=True)

    def find_unused(self) -> Iterator[str]:
        if self.scale and self.task and "image-text" not in self.task:
            yield "scale: has an effect on the task image-text only"
