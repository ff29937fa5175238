"""Pictures of a class, drawn by the frozen base: a model that learns one subject keeps the others by them (arXiv:2208.12242)."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imprompt.data.dreambooth import class_text
from imprompt.models.base_pipelines import GUIDANCE, drawing, own_size, scheduled
from imprompt.utils.files import atomic_path


def class_pictures(
    pipe: Any, noun: str, count: int, folder: Path, steps: int = 50, guidance: float = GUIDANCE, seed: int = 0, batch: int = 8,
    base: str = "",
) -> Iterator[Path]:  # fmt: skip
    """The file of each picture once it is there, in order; only missing ones are drawn, each from a seed of its own.

    Files are named by noun, what draws them, and seed, so that those of another base are not taken for this one's.
    """
    how = zlib.crc32(f"{base} {steps} {guidance}".encode("utf-8", "surrogateescape"))
    stem = re.sub(r"\W+", "-", noun) + f"-{how:08x}"
    paths = {n: folder / f"{stem}-{n:04d}.png" for n in range(seed, seed + count)}
    seeds = list(paths)
    for at in range(0, count, batch):
        chunk = seeds[at : at + batch]
        missing = [n for n in chunk if not paths[n].is_file()]
        if missing:
            with scheduled(pipe, "ddim", steps):
                images = drawing(pipe, [class_text(noun)] * len(missing), steps, missing, (own_size(pipe),) * 2, guidance)
            for n, image in zip(missing, images, strict=True):
                with atomic_path(paths[n]) as partial:
                    image.save(partial)
        yield from (paths[n] for n in chunk)
