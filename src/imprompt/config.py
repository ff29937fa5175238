"""What the user chose: one frozen dataclass per verb. Standard library only, so that `--help` is instant.

Every field is a flag of the command line, a key of the TOML file given with `--config`, and a keyword in Python.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from imprompt.errors import UserError

SCHEDULERS = ("ddim", "pndm", "dpm++", "euler", "euler-a", "heun", "unipc", "lcm")


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Generate:
    """Draw pictures after reference pictures."""

    image: tuple[str, ...] = _option((), "reference picture; repeat it for several of one subject", metavar="PATH")
    prompt: str = _option("", "text")
    negative: str = _option("", "what not to draw")
    scale: float = _option(1.0, "λ, the weight of the image: 0 … 1 and beyond")
    adapter: str | None = _option(None, "adapter: a file, a hub file, mini or mini-plus (default: mini on the mini base)")
    encoder: str | None = _option(None, "image encoder: folder or hub id (default: found from the adapter)")
    base: str = _option("mini", "base model: mini, a folder or a hub id")
    steps: int = _option(30, "denoising steps")
    guidance: float | None = _option(None, "guidance scale (default: 3 on mini, 7.5 elsewhere)")
    scheduler: str = _option("ddim", f"one of {', '.join(SCHEDULERS)}")
    seed: int = _option(0, "seed of the first picture; the next ones count up")
    count: int = _option(4, "number of pictures")
    size: str | None = _option(None, "side in pixels, or WIDTHxHEIGHT (default: the model's own)")
    fit: str = _option("crop", "references that are not square: crop, pad or squash")
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
        _one_of(("crop", "pad", "squash"), fit=self.fit)
        _one_of(("auto", "float32", "bfloat16", "float16"), dtype=self.dtype)
        self.pixels()

    def pixels(self) -> tuple[int, int] | None:
        """(width, height), or None for the model's own."""
        if self.size is None:
            return None
        parts = str(self.size).lower().split("x")
        if len(parts) > 2 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
            raise UserError(f"size: expected a side in pixels or WIDTHxHEIGHT, received {self.size!r}")
        return int(parts[0]), int(parts[-1])


def _at_least(low: int, **values: int) -> None:
    for name, value in values.items():
        if value < low:
            raise UserError(f"{name}: expected at least {low}, received {value}")


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
        elif value is not None and one in (int, float, str):
            if one is str and isinstance(value, (int, Path)) and not isinstance(value, bool):
                value = str(value)
            allowed = (int, float) if one is float else one
            if isinstance(value, bool) or not isinstance(value, allowed):
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
